#!/usr/bin/env bash
# The whole chain on the embedded toy world: set-up, a check of the machine, notebooks 00-05 headless.
#
#   bash env/run.sh [arguments of `dschat run`]      e.g. --set ppo.kl_coef=0.1 --run-root /data/first
set -euo pipefail
unset PYTHONDONTWRITEBYTECODE  # without bytecode every process takes seconds longer to start

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
bash "$root/env/setup.sh"
"$root/.venv/bin/dschat" doctor
# Relative paths in the arguments mean the folder that the user stands in, so the folder is kept.
exec "$root/.venv/bin/dschat" run --preset tiny "$@"
