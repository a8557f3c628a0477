#!/usr/bin/env bash
# DPO, GRPO and RLOO on what the quickstart made, beside its PPO-ptx and plain PPO, and a table of all. Run run.sh before it.
#
#   bash examples/quickstart/objectives.sh           into runs/quickstart
#   bash examples/quickstart/objectives.sh --smoke   a few steps of each, into runs/quickstart-smoke (run.sh --smoke before it)
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/quickstart
runs=runs/quickstart
smoke=no
if [ "${1:-}" = --smoke ]; then smoke=yes runs=runs/quickstart-smoke; fi
if [ ! -f "$runs/ppo/metrics.jsonl" ]; then
  echo "objectives: $runs/ppo is not there: run examples/quickstart/run.sh first" >&2
  exit 2
fi

python=$(bash tests/install.sh)
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
data=$runs/data
started=$SECONDS

launcher=(-m torch.distributed.run --standalone --nproc_per_node 2)
shared=("tokenizer.path=$data/tokenizer.model" "data.pretraining.prefix=$data/corpus" \
  "data.pretraining.valid_prefix=$data/corpus_heldout" reference.load="$runs/ppo_init")
# shellcheck source=examples/stage.sh
source examples/stage.sh

sampled=(policy.load="$runs/ppo_init" reward.load="$runs/reward" data.prompts="$data/prompts.jsonl" data.prompts_valid="$data/prompts_valid.jsonl")
rankings=(model.load="$runs/ppo_init" data.train="$data/rankings.jsonl" data.valid="$data/rankings_valid.jsonl")
line dpo dpo.yaml run.dir="$runs/dpo" dpo.ptx_coef=0 "${rankings[@]}" --smoke batch_size=512
line dpo dpo.yaml run.dir="$runs/dpo_ptx" "${rankings[@]}" --smoke batch_size=512
line ppo grpo.yaml run.dir="$runs/grpo_ptx" "${sampled[@]}" --smoke ppo.iterations=2 ppo.warmup_iterations=1
line ppo grpo.yaml run.dir="$runs/rloo_ptx" ppo.advantages=rloo ppo.kl_in=reward ppo.kl_estimator=k1 ppo.normalization=token \
  "${sampled[@]}" --smoke ppo.iterations=2 ppo.warmup_iterations=1

shared=("tokenizer.path=$data/tokenizer.model")
for model in dpo dpo_ptx grpo_ptx rloo_ptx; do
  line evaluate evaluate.yaml run.dir="$runs/evaluation/$model" model.load="$runs/$model" reward.load="$runs/reward" \
    reference.load="$runs/ppo_init" prompts="$data/prompts_valid.jsonl" text.valid_prefix="$data/corpus_heldout"
done
run_recipe "$runs/objectives.txt" >"$runs/evaluation.log"
"$python" $here/report.py --runs "$runs" --pairs "$data/pairs.txt" --models "SFT baseline=sft" "PPO start=ppo_init" "PPO=ppo" \
  "PPO-ptx=ppo_ptx" "DPO=dpo" "DPO-ptx=dpo_ptx" "GRPO-ptx=grpo_ptx" "RLOO-ptx=rloo_ptx"
echo "== objectives: done in $((SECONDS - started)) s; everything is in $runs"
