#!/usr/bin/env bash
# InstructGPT's recipe on a real model, on two CPU cores: SmolLM2-135M-Instruct out of a wheel on PyPI, its own best answers as
# demonstrations, a reward model and a critic cut from its first layers, PPO-ptx and plain PPO, a closing table, and the result back in
# transformers. No GPU, no account, no model hub.
#
#   bash examples/smollm2_135m/run.sh           everything, into runs/smollm2 (an interrupted run goes on where it was)
#   bash examples/smollm2_135m/run.sh --smoke   the same path with a few steps of each stage, into runs/smollm2-smoke
#
# It needs gguf and accelerate beside what tests/install.sh installs, and adds them to that environment. An environment of one's own
# (MEGARLHF_PYTHON) must have them, and transformers.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/smollm2_135m
runs=runs/smollm2
smoke=no
if [ "${1:-}" = --smoke ]; then smoke=yes runs=runs/smollm2-smoke; fi
if [ $smoke = yes ] && [ -d $runs ]; then find $runs -mindepth 1 -maxdepth 1 ! -name model -exec rm -r {} +; fi # the download stays

python=$(bash tests/install.sh)
if [ -z "${MEGARLHF_PYTHON:-}" ] && ! "$python" -c 'import accelerate, gguf' 2>/dev/null; then
  "$python" -m pip install --quiet accelerate==1.15.0 gguf==0.19.0
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} PYTHONUNBUFFERED=1
data=$runs/data
started=$SECONDS

precision=$("$python" $here/fastest_precision.py)
launcher=()
shared=("tokenizer.path=$runs/start")
# shellcheck source=examples/stage.sh
source examples/stage.sh

step() { echo "== $1 ($((SECONDS - started)) s)"; }

step "the model, in $precision"
"$python" $here/fetch_model.py --to $runs/model
if [ ! -d $runs/start ]; then "$python" -m megarlhf convert --from $runs/model --to $runs/start; fi
if [ ! -d $runs/start_8 ]; then "$python" -m megarlhf convert --from $runs/model --to $runs/start_8 --layers 8; fi

if [ ! -f $data/text.idx ]; then
  step "questions and text"
  "$python" $here/questions.py ask --output $data
  if [ $smoke = yes ]; then
    for file in prompts_valid:16 to_rank:80; do
      head -n "${file#*:}" "$data/${file%:*}.jsonl" >$data/short && mv $data/short "$data/${file%:*}.jsonl"
    done
  fi
  for text in text_heldout text; do
    "$python" -m megarlhf preprocess --input $data/$text.jsonl --output-prefix $data/$text --tokenizer $runs/start
  done
fi
step "its own answers, ranked by the rule"
if [ ! -f $runs/answers/responses.jsonl ]; then
  stage generate generate.yaml run.dir=$runs/answers model.load=$runs/start model.precision="$precision" prompts=$data/to_rank.jsonl
fi
"$python" $here/questions.py label --output $data --tokenizer $runs/start --answers $runs/answers/responses.jsonl

text=("data.pretraining.prefix=$data/text" "data.pretraining.valid_prefix=$data/text_heldout")
step "SFT, reward model, PPO-ptx, plain PPO and the evaluation of each"
line sft sft.yaml run.dir=$runs/sft model.load=$runs/start model.precision="$precision" data.train=$data/demonstrations.jsonl \
  data.valid=$data/demonstrations_valid.jsonl "${text[@]}" --smoke epochs=1 batch_size=4
line reward reward.yaml run.dir=$runs/reward model.load=$runs/start_8 model.precision="$precision" data.train=$data/rankings.jsonl \
  data.valid=$data/rankings_valid.jsonl data.demonstrations=$data/demonstrations_valid.jsonl

models=("policy.load=$runs/sft" "reference.load=$runs/sft" "reward.load=$runs/reward" "value.load=$runs/reward")
for model in policy reference reward value; do models+=("$model.precision=$precision"); done
short=(--smoke ppo.iterations=2 ppo.warmup_iterations=1 ppo.batch_size=8 ppo.minibatch_size=4)
line ppo ppo.yaml run.dir=$runs/ppo_ptx "${models[@]}" data.prompts=$data/prompts.jsonl "${text[@]}" "${short[@]}"
line ppo ppo.yaml run.dir=$runs/ppo ppo.ptx_coef=0 "${models[@]}" data.prompts=$data/prompts.jsonl "${text[@]}" "${short[@]}"

precisions=(model.precision="$precision" reward.precision="$precision" reference.precision="$precision")
for model in start sft ppo ppo_ptx; do
  line evaluate evaluate.yaml run.dir=$runs/evaluation/$model model.load=$runs/$model reward.load=$runs/reward reference.load=$runs/sft \
    "${precisions[@]}" prompts=$data/prompts_valid.jsonl text.valid_prefix=$data/text_heldout --smoke text.valid_rows=8
done
run_recipe $runs/recipe.txt >$runs/evaluation.log # all in one program; evaluate prints its table, the rest is said on stderr
"$python" $here/report.py --runs $runs

step "export to transformers"
if [ ! -d $runs/aligned ]; then "$python" -m megarlhf convert --from $runs/ppo_ptx --model policy --to $runs/aligned; fi
"$python" $here/answers.py --before $runs/model --after $runs/aligned --prompts $data/prompts_valid.jsonl
echo
echo "== SmolLM2-135M: done in $((SECONDS - started)) s after the installation; everything is in $runs"
