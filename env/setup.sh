#!/usr/bin/env bash
# Makes or checks .venv in the checkout: torch first, then everything else at the versions of env/constraints.txt.
#
#   bash env/setup.sh [EXTRA ...]     EXTRA: test, fetch, tensorboard (optional dependency groups of pyproject.toml)
#
# DSCHAT_PIP_ARGS  added to every pip call, to choose a CPU or a CUDA build of torch (an index, a wheel folder)
# DSCHAT_PYTHON    the Python to build .venv from, when the one found first is not the one you want
#
# The last thing written is .venv/dschat-setup, a stamp of what was asked. It is missing after an interruption,
# so the next call goes on; pip keeps what was already installed. Takes no compiler.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
python=$venv/bin/python
log=$venv/setup.log
stamp=$venv/dschat-setup
torch_pin=$(grep -E '^torch==' "$root/env/constraints.txt")

# Settings of the caller's shell that would send pip or Python to another place than .venv.
unset PYTHONHOME PYTHONPATH PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV PIP_USER PYTHONDONTWRITEBYTECODE
export PYTHONNOUSERSITE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

say() { printf 'setup: %s\n' "$*"; }
die() { printf '%s\n' "error: $1" "${@:2}" >&2; exit 1; }

# Prints the first Python >= 3.11.5 that can make virtual environments.
find_python() {
  local seen="" candidate version
  local candidates=(python3 python3.12 python3.11 python3.13 python3.14)
  [[ -z ${DSCHAT_PYTHON-} ]] || candidates=("$DSCHAT_PYTHON")
  for candidate in "${candidates[@]}"; do
    version=$("$candidate" -c 'import sys; print(*sys.version_info[:3], sep=".")' 2>/dev/null) || continue
    if ! "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11, 5))'; then
      seen+="$candidate is $version; "
    elif ! "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
      seen+="$candidate is $version but has no venv and ensurepip; "
    else
      printf '%s\n' "$candidate"
      return
    fi
  done
  die "no usable Python" "  got:      ${seen:-nothing that runs as ${candidates[*]}}" \
    "  expected: Python >= 3.11.5 with the modules venv and ensurepip" \
    "  change:   install one (Debian, Ubuntu: the packages python3.12 and python3.12-venv), or set DSCHAT_PYTHON=/path/to/python3"
}

# Compares the stamp with what is asked now, or tells something of both. $1 is the action; the rest are extras.
stamped() {
  "$python" -I - "$1" "$stamp" "$root" "${DSCHAT_PIP_ARGS-}" "${@:2}" <<'PY'
import hashlib, json, pathlib, sys

action, stamp, root, pip_args, *extras = sys.argv[1:]
stamp, root = pathlib.Path(stamp), pathlib.Path(root)
text = b"".join((root / name).read_bytes() for name in ("pyproject.toml", "env/constraints.txt"))
now = {"root": str(root), "python": sys.version.split()[0], "files": hashlib.sha256(text).hexdigest()}
old = {"extras": [], "pip_args": "", **(json.loads(stamp.read_text()) if stamp.exists() else {})}
# An unset DSCHAT_PIP_ARGS keeps the build of torch that is there.
other_build = pip_args not in ("", old["pip_args"])
if action == "current":
    sys.exit(other_build or not set(extras) <= set(old["extras"]) or any(old.get(k) != v for k, v in now.items()))
if action == "other-build":
    sys.exit(not (stamp.exists() and other_build))
if action == "requirements":  # of the project, with the extras asked for now or before
    import tomllib
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    groups = [project["optional-dependencies"][extra] for extra in sorted({*extras, *old["extras"]})]
    print(*project["dependencies"], *(name for group in groups for name in group), sep="\n")
if action in ("write", "spoil"):
    done = {**now, "extras": sorted({*extras, *old["extras"]}), "pip_args": pip_args or old["pip_args"]}
    done |= {"files": "unfinished", "pip_args": old["pip_args"]} if action == "spoil" else {}
    temporary = stamp.with_name("dschat-setup.tmp")
    temporary.write_text(json.dumps(done))
    temporary.replace(stamp)
PY
}

# Says which torch build .venv holds, without importing it.
build_found() {
  "$python" -I - "$venv" <<'PY'
import pathlib, runpy, sys

found = next(pathlib.Path(sys.argv[1]).glob("lib/python3*/site-packages/torch/version.py"), None)
if found is None:
    sys.exit("error: torch is not in .venv\n  change: remove .venv and run env/setup.sh again")
torch = runpy.run_path(str(found))
kind = next((f"{name.upper()} {torch[name]}" for name in ("cuda", "hip", "xpu") if torch.get(name)), "CPU")
print(f"setup: .venv is ready: Python {sys.version.split()[0]}, torch {torch['__version__']} ({kind} build)")
PY
}

# Runs pip with its output in the log; shows a line now and then, and the log's tail when it fails.
pip_step() {
  local what=$1 started=$SECONDS shown=$SECONDS
  shift
  say "$what ..."
  printf '\n## %s: pip %s\n' "$what" "$*" >>"$log"
  "$python" -m pip "$@" >>"$log" 2>&1 </dev/null &
  pip_pid=$!
  while kill -0 "$pip_pid" 2>/dev/null; do
    sleep 0.2
    if ((SECONDS - shown >= 20)); then
      shown=$SECONDS
      say "  $((SECONDS - started)) s: $(grep -E '^(Collecting|Installing|Building|Downloading| +Downloading)' "$log" | tail -n 1 | tr -s ' ' | cut -c1-90)"
    fi
  done
  if ! wait "$pip_pid"; then
    pip_pid=
    tail -n 25 "$log" >&2
    die "$what failed after $((SECONDS - started)) s; the lines above are the end of $log" \
      "  change: mend what pip names (network, index, disk space), choose an index with DSCHAT_PIP_ARGS, and run this again"
  fi
  pip_pid=
  say "$what: $((SECONDS - started)) s"
}

# pip writes the interpreter's path bare into a plain script such as `deepspeed`; the kernel splits it at a space
# and cuts it at 127 bytes on old systems. The scripts that pip generates itself go through /bin/sh then.
mend_scripts() {
  local line="#!$venv/bin/python" script
  [[ $line == *[[:space:]]* || ${#line} -gt 120 ]] || return 0
  for script in "$venv"/bin/*; do
    if [[ -f $script && ! -L $script && $(head -c "${#line}" "$script" | tr -d '\0') == "$line" ]]; then
      sed -i "1c #!/bin/sh\n'''exec' \"$venv/bin/python\" \"\$0\" \"\$@\"\n' '''" "$script"
    fi
  done
}

for extra in "$@"; do
  case $extra in test | fetch | tensorboard) ;; *) die "got the extra '$extra'" "  expected: test, fetch, tensorboard" ;; esac
done
read -r -a pip_args <<<"${DSCHAT_PIP_ARGS-}"
pip_pid=
trap 'if [[ -n $pip_pid ]]; then kill "$pip_pid" 2>/dev/null; wait "$pip_pid"; fi || true' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

if [[ -f $stamp ]] && stamped current "$@"; then
  build_found
  exit 0
fi

base=$(find_python)
[[ -w $root ]] || die "cannot write to $root" "  change: use a checkout on a disk that you may write to"
# flock through Python, on this shell's own descriptor: held until this shell and its pip have ended.
exec 9>>"$root/.venv.lock"
flock_9() { "$base" -c "import fcntl; fcntl.flock(9, fcntl.LOCK_EX $1)" 2>/dev/null; }
if ! flock_9 '| fcntl.LOCK_NB'; then
  say "another set-up is at work in this checkout; waiting for it"
  flock_9 '' || die "cannot lock $root/.venv.lock" "  change: use a checkout on a disk that supports file locks"
  if [[ -f $stamp ]] && stamped current "$@"; then
    build_found
    exit 0
  fi
fi

begun=$SECONDS
# Scripts in a venv name its place, so one that was moved here with its checkout, or half made, is made anew.
if [[ -e $venv ]] && { ! "$python" -m pip --version >/dev/null 2>&1 || ! grep -qsF "$venv/bin/python" "$venv/bin/pip"; }; then
  say "making .venv anew: it was moved here or never finished"
  rm -rf -- "$venv"
fi
if [[ ! -e $venv ]]; then
  say "making .venv with $("$base" -V) ($(command -v "$base"))"
  mkdir -p -- "$venv"
  "$base" -m venv "$venv" >"$log" 2>&1 ||
    { cat "$log" >&2; die "$base -m venv failed" "  change: install its venv package (Debian, Ubuntu: python3-venv), or set DSCHAT_PYTHON"; }
fi
: >>"$log"
# pip writes INSTALLER and RECORD last: a package without them was being unpacked when pip was ended, yet pip would
# take it for installed.
for info in "$venv"/lib/python3*/site-packages/*.dist-info; do
  if [[ -d $info && ! (-f $info/INSTALLER && -f $info/RECORD) ]]; then
    say "$(basename -- "$info" .dist-info) was left half installed; again"
    rm -rf -- "$info"
  fi
done
# Compiling all 16,000 files here would double the time; what a rank and a kernel import is compiled below.
install=(install --no-compile --constraint "$root/env/constraints.txt" ${pip_args[@]+"${pip_args[@]}"})
if stamped other-build; then
  # pip would keep another build of the same version. Until the new one is in, the stamp fits nothing.
  stamped spoil
  pip_step "removing torch, whose DSCHAT_PIP_ARGS were others" uninstall --yes torch
fi
mapfile -t requirements < <(stamped requirements "$@")
((${#requirements[@]})) || die "pyproject.toml of $root names no dependencies"
pip_step "1/3 $torch_pin" "${install[@]}" "$torch_pin"
pip_step "2/3 everything else" "${install[@]}" setuptools "${requirements[@]}"
pip_step "3/3 dschat_kit itself" "${install[@]}" --no-deps --no-build-isolation --editable "$root"
mend_scripts
# Python compiles what is imported when it is imported, but many images set PYTHONDONTWRITEBYTECODE: without this, every
# rank of every launch would take 10 s longer to start.
begun_import=$SECONDS
"$python" -c 'import dschat_kit.train.ppo, ipykernel.kernelapp, jupyterlab.labapp, papermill, matplotlib.figure' \
  >>"$log" 2>&1 || { tail -n 25 "$log" >&2; die "what was installed cannot be imported; the lines above say why" \
  "  change: remove .venv and run this again"; }
say "first import: $((SECONDS - begun_import)) s"
stamped write "$@"
build_found
say "set-up took $((SECONDS - begun)) s"
