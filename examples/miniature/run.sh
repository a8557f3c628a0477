#!/usr/bin/env bash
# InstructGPT in miniature: simulated labellers, three sizes, five systems and a task-mix baseline, and the paper's figures of them.
#
#   bash examples/miniature/run.sh                       everything, into runs/miniature (an interrupted run goes on where it was)
#   bash examples/miniature/run.sh --hours 4             with so many fewer steps that it takes some four hours of one core, not eight
#   bash examples/miniature/run.sh --sizes tiny small middle  three smaller sizes: some two hours of one core, Figure 1 after one
#   bash examples/miniature/run.sh --sizes small         one size alone, its sweeps included: some hour and a half
#   bash examples/miniature/run.sh --only sweeps/kl_coef  one sweep, and what it needs; also ptx_coef, learning_rate, reward
#   bash examples/miniature/run.sh --look                tables, figures and report of what there is so far
#   bash examples/miniature/run.sh --smoke               the same path with a few steps of tiny models, into runs/miniature-smoke
set -euo pipefail
cd "$(dirname "$0")/../.."
words=("$@")
for word in "$@"; do
  if [ "$word" = --smoke ]; then rm -rf runs/miniature-smoke && words=(--runs runs/miniature-smoke "$@"); fi
done
python=$(bash tests/install.sh)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
"$python" examples/miniature/run.py ${words[@]+"${words[@]}"}
