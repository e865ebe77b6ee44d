#!/usr/bin/env bash
# The tests, in the environment that env/setup.sh makes.
#
#   bash env/test.sh [--all] [arguments of pytest]   --all adds the tests marked slow
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
select=(-m "not slow")
if [[ ${1-} == --all ]]; then
  select=()
  shift
fi
bash "$root/env/setup.sh" test fetch
cd -- "$root"
exec "$root/.venv/bin/python" -m pytest ${select[@]+"${select[@]}"} "$@"
