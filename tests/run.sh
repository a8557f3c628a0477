#!/usr/bin/env bash
# Lints the project and runs all its tests, in two lanes: everything with the oldest supported megatron-core (Python 3.11), then
# the distributed tests of what is built on it with the newest (Python 3.12, where there is one). Makes its own virtual environments, .venv and
# .venv312: see tests/install.sh, also for how to use one's own. MEGARLHF_SKIP_LANE=1 leaves out the second lane. Where there are
# GPUs, tests/gpu runs on them, and nothing else.
set -u
cd "$(dirname "$0")/.." || exit 2
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
code=0
summary=()
gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd, -) || gpus=
gpus=${CUDA_VISIBLE_DEVICES-$gpus}
export CUDA_VISIBLE_DEVICES= # all tests but those of tests/gpu are of a CPU, gloo and tensors without values
log=$(mktemp)
trap 'rm -f "$log"' EXIT

run_tests() { # run_tests PYTHON TESTS...: one lane; a file stays with one worker, so that its tests share their ranks
  local python=$1 name
  shift
  name=$("$python" -c 'import platform as p, importlib.metadata as m
print("Python", p.python_version(), "with megatron-core", m.version("megatron-core"))') || { code=1; return; }
  echo "== $name: $*"
  "$python" -m pytest -n 2 --dist loadfile --durations 10 "$@" 2>&1 | tee "$log"
  [ "${PIPESTATUS[0]}" -eq 0 ] || code=1
  summary+=("$name: $(grep -E '^=+ .*[0-9.]+s.* =+$' "$log" | tail -n 1 | tr -d '=' | xargs)")
}

find_python312() { # prints the first Python 3.12 that runs, on PATH or among pyenv's
  local pyenv candidate
  pyenv=$(readlink -f "$(command -v pyenv)" 2>/dev/null)
  for candidate in python3.12 "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.12.*/bin/python "${pyenv%/*/*}"/versions/3.12.*/bin/python; do
    if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
}

python=$(bash tests/install.sh) || exit 1
echo "== ruff"
if "$python" -m ruff check .; then summary+=("ruff: passed"); else code=1 && summary+=("ruff: FAILED"); fi
run_tests "$python" tests/unit tests/mistakes tests/wiring tests/numerics tests/distributed
if [ -n "$gpus" ]; then
  CUDA_VISIBLE_DEVICES=$gpus run_tests "$python" -n 0 tests/gpu
else
  summary+=("GPUs: none here, tests/gpu is left out")
fi

if [ -n "${MEGARLHF_SKIP_LANE:-}" ]; then
  summary+=("second lane: left out (MEGARLHF_SKIP_LANE)")
elif "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then
  summary+=("second lane: not needed, the first ran with it")
elif [ -z "$(find_python312)" ]; then
  summary+=("second lane: left out (no Python 3.12 found)")
elif newest=$(bash tests/install.sh "$PWD/.venv312" "$(find_python312)"); then
  run_tests "$newest" tests/distributed --ignore-glob '*/test_resume.py' --ignore-glob '*/test_refusals.py' \
    --ignore-glob '*/test_launchers.py' --ignore-glob '*/test_harness.py' --ignore-glob '*/test_evaluate.py' \
    --ignore-glob '*/test_storm.py' --ignore-glob '*/test_stalls.py' --ignore-glob '*/test_saving.py' --ignore-glob '*/test_doctor.py' \
    --ignore-glob '*/test_chat.py' --ignore-glob '*/test_generate_command.py' --ignore-glob '*/test_recipe_command.py' \
    -k 'not (agrees_with_plain_torch and (neox or qwen2 or deep or value))' # four of the families are enough to see what another megatron does
else
  code=1
  summary+=("second lane: FAILED to install")
fi

echo
printf '%s\n' "${summary[@]}"
if [ $code -eq 0 ]; then echo "tests/run.sh: all passed"; else echo "tests/run.sh: FAILED"; fi
exit $code
