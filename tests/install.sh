#!/usr/bin/env bash
# Makes the virtual environment that the tests and the quickstart run in, and prints its interpreter.
#
#   python=$(bash tests/install.sh [VENV [PYTHON]])
#
# VENV    the environment's folder; .venv in the project's root when left out. Made when missing, brought up to date when
#         setup.py or the tested versions changed, left alone otherwise.
# PYTHON  the interpreter to make it from; the first of python3.11, python3.12, python3.13, python3 that works when left out.
#
# An active virtual environment (VIRTUAL_ENV) is neither used nor changed. To use one's own environment, with its own PyTorch,
# set MEGARLHF_PYTHON to its interpreter: it is taken as it is and nothing is installed (`pip install -e .[test]` is then
# yours to do). pip's settings (PIP_INDEX_URL, pip.conf, ...) are respected; they also decide which build of PyTorch is taken.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
venv=${1:-$root/.venv}
base=${2:-}

say() { echo "install: $*" >&2; }

usable() { "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

quietly() { # runs a command, showing its output only when it fails
  "$@" >>"$venv/install.log" 2>&1 && return
  tail -n 40 "$venv/install.log" >&2
  say "failed: $* (all of it is in $venv/install.log)"
  exit 1
}

if [ -z "$base" ] && [ -n "${MEGARLHF_PYTHON:-}" ]; then
  say "using MEGARLHF_PYTHON=$MEGARLHF_PYTHON as it is"
  echo "$MEGARLHF_PYTHON"
  exit 0
fi

if [ ! -x "$venv/bin/python" ]; then
  for candidate in ${base:-python3.11 python3.12 python3.13 python3}; do
    if usable "$candidate"; then base=$candidate && break; fi
  done
  if ! usable "${base:-none}"; then
    say "no Python >= 3.11 with the venv module among: ${base:-python3.11 python3.12 python3.13 python3}"
    exit 1
  fi
  say "making $venv from $("$base" --version)"
  "$base" -m venv "$venv" >&2
fi
python=$venv/bin/python

tested=$root/tests/constraints-py312.txt # Python 3.12 and newer
if "$python" -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then tested=$root/tests/constraints-py311.txt; fi
stamp="$root $(cat "$root/setup.py" "$tested" | cksum)"
if [ "$(cat "$venv/installed" 2>/dev/null)" != "$stamp" ]; then
  : >"$venv/install.log"
  say "installing $(grep '^torch==' "$tested")"
  quietly "$python" -m pip install -c "$tested" torch
  say "installing megarlhf and what its tests need, at the versions in ${tested#"$root"/}"
  quietly "$python" -m pip install -c "$tested" -e "${root}[test]"
  echo "$stamp" >"$venv/installed"
fi
say "$venv is ready"
echo "$python"
