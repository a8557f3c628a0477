#!/usr/bin/env bash
# InstructGPT in minutes, on two CPU cores: data from Python's own documentation, a base model, the SFT baseline, the model PPO
# starts from, the reward model, PPO-ptx and plain PPO, a closing table and a page. Two ranks over gloo; no GPU, no downloads, no accounts.
#
#   bash examples/quickstart/run.sh           everything, into runs/quickstart (an interrupted run goes on where it was)
#   bash examples/quickstart/run.sh --smoke   the same path with a few steps of each stage, into runs/quickstart-smoke
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/quickstart
runs=runs/quickstart
smoke=no
if [ "${1:-}" = --smoke ]; then smoke=yes runs=runs/quickstart-smoke; rm -rf "$runs"; fi

python=$(bash tests/install.sh)
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
data=$runs/data
started=$SECONDS

launcher=(-m torch.distributed.run --standalone --nproc_per_node 2)
shared=("tokenizer.path=$data/tokenizer.model")
# shellcheck source=examples/stage.sh
source examples/stage.sh

if [ ! -f "$data/corpus.idx" ] || [ ! -f "$data/corpus_heldout.idx" ]; then
  echo "== data"
  mkdir -p "$data"
  "$python" $here/make_data.py --output "$data" --tokenizer-vocab 1024
  preprocess() {
    "$python" -m megarlhf preprocess --input "$data/$1.jsonl" --output-prefix "$data/$1" --tokenizer "$data/tokenizer.model" --overwrite
  }
  preprocess corpus_heldout & heldout=$!
  preprocess corpus
  wait "$heldout"
fi
demonstrations=("data.train=$data/demonstrations.jsonl" "data.valid=$data/demonstrations_valid.jsonl")
text=("data.pretraining.prefix=$data/corpus" "data.pretraining.valid_prefix=$data/corpus_heldout")

# The base model, the SFT baseline, the model that PPO starts from, the reward model; then PPO-ptx, plain PPO, and the evaluation of each
line pretrain pretrain.yaml run.dir="$runs/base" data.prefix="$data/corpus" data.valid_prefix="$data/corpus_heldout" --smoke steps=4 schedule.warmup_steps=1
line sft sft.yaml run.dir="$runs/sft" model.load="$runs/base" "${demonstrations[@]}" "${text[@]}" --smoke epochs=1 batch_size=256
line sft ppo_init.yaml run.dir="$runs/ppo_init" model.load="$runs/base" "${demonstrations[@]}" "${text[@]}" --smoke epochs=1 batch_size=256
line reward reward.yaml run.dir="$runs/reward" model.load="$runs/base" data.train="$data/rankings.jsonl" \
  data.valid="$data/rankings_valid.jsonl" data.demonstrations="$data/demonstrations_valid.jsonl" --smoke batch_size=256

models=(policy.load="$runs/ppo_init" reference.load="$runs/ppo_init" reward.load="$runs/reward" value.load="$runs/reward")
prompts=(data.prompts="$data/prompts.jsonl" data.prompts_valid="$data/prompts_valid.jsonl")
line ppo ppo.yaml run.dir="$runs/ppo_ptx" "${models[@]}" "${prompts[@]}" "${text[@]}" --smoke ppo.iterations=2 ppo.warmup_iterations=1
line ppo ppo.yaml run.dir="$runs/ppo" ppo.ptx_coef=0 "${models[@]}" "${prompts[@]}" "${text[@]}" --smoke ppo.iterations=2 ppo.warmup_iterations=1

for model in sft ppo_init ppo ppo_ptx; do
  line evaluate evaluate.yaml run.dir="$runs/evaluation/$model" model.load="$runs/$model" reward.load="$runs/reward" \
    reference.load="$runs/ppo_init" prompts="$data/prompts_valid.jsonl" text.valid_prefix="$data/corpus_heldout"
done
run_recipe "$runs/recipe.txt" >"$runs/evaluation.log" # all in one program; evaluate prints its table, the rest is said on stderr
"$python" $here/report.py --runs "$runs" --pairs "$data/pairs.txt"
echo "== report"
"$python" -m megarlhf report "$runs"/{base,sft,ppo_init,reward,ppo_ptx,ppo} "$runs"/evaluation/{sft,ppo_init,ppo_ptx,ppo} --to "$runs/report.html"
echo "== quickstart: done in $((SECONDS - started)) s after the installation; everything is in $runs"
