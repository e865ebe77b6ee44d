#!/usr/bin/env bash
# The tests, in the environment that env/setup.sh makes.
#
#   bash env/test.sh [--all] [arguments of pytest]   --all adds the tests marked slow
set -euo pipefail
unset PYTHONDONTWRITEBYTECODE  # without bytecode every process takes seconds longer to start

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
select=(-m "not slow")
arguments=()
for argument in "$@"; do
  if [[ $argument == --all ]]; then select=(); else arguments+=("$argument"); fi
done
bash "$root/env/setup.sh" test fetch tensorboard
cd -- "$root"
exec "$root/.venv/bin/python" -m pytest ${select[@]+"${select[@]}"} ${arguments[@]+"${arguments[@]}"}
