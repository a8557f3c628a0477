#!/usr/bin/env bash
# GRPO with a verifier on two CPU cores: a small model from nothing learns sums from demonstrations most of which are wrong, then from
# a function that knows right answers (verifier.py). No reward model, no value function, no downloads.
#
#   bash examples/arithmetic/run.sh           everything, into runs/arithmetic (an interrupted run goes on where it was)
#   bash examples/arithmetic/run.sh --smoke   the same path with a few steps, into runs/arithmetic-smoke
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/arithmetic
runs=runs/arithmetic
smoke=no
if [ "${1:-}" = --smoke ]; then smoke=yes runs=runs/arithmetic-smoke; rm -rf "$runs"; fi

python=$(bash tests/install.sh)
export OMP_NUM_THREADS=2 PYTHONUNBUFFERED=1
data=$runs/data
started=$SECONDS

launcher=()
shared=("tokenizer.path=$data/tokenizer.model")
# shellcheck source=examples/stage.sh
source examples/stage.sh

echo "== data"
if [ ! -f "$data/prompts_valid.jsonl" ]; then "$python" $here/make_data.py --output "$data"; fi
# A model from nothing, GRPO, and what both answer to sums that GRPO never saw
line sft sft.yaml run.dir="$runs/sft" data.train="$data/demonstrations.jsonl" --smoke epochs=1 batch_size=4000
line ppo grpo.yaml run.dir="$runs/grpo" policy.load="$runs/sft" reference.load="$runs/sft" data.prompts="$data/prompts.jsonl" \
  data.prompts_valid="$data/prompts_valid.jsonl" --smoke ppo.iterations=2 ppo.warmup_iterations=1
for model in sft grpo; do
  line generate generate.yaml run.dir="$runs/answers/$model" model.load="$runs/$model" prompts="$data/prompts_valid.jsonl"
done
run_recipe "$runs/recipe.txt"
"$python" $here/report.py "$runs/answers/sft" "$runs/answers/grpo"
echo "== arithmetic: done in $((SECONDS - started)) s after the installation; everything is in $runs"
