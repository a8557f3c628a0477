"""Every key of every command: what it is set to, and what that changes. Names of observations are in `observation`."""

from megarlhf.config.packages import has_dali
from tests.wiring.case import Case
from tests.wiring.sections import (
    GONE,
    frozen_cases,
    limits_cases,
    loaded_cases,
    offload_cases,
    process_cases,
    refused,
    run_cases,
    sampling_cases,
    schedule_cases,
    tokenizer_cases,
    trained_cases,
)

R = "{recipe}"


def pretraining_data_cases(key, *, text):
    """Text that is trained on and text that is held out. text: the model and the term that it is for."""
    tokens, held_out = f"steps/{text}/tokens", "metrics/valid/text_loss"
    notes = f"said/{R}/corpus said/{R}/heldout cursors/text/*"
    trains = f"* fingerprints/* {notes}"
    return [
        Case(f"{key}.prefix={R}/heldout {key}.valid_prefix=null", f"{tokens} fingerprints/{key}.prefix", may=trains),
        Case(f"{key}.valid_prefix={R}/corpus {key}.prefix={R}/heldout", f"{held_out} fingerprints/{key}.valid_prefix", may=trains),
        Case(f"{key}.valid_prefix=null", held_out, may=f"fingerprints/{key}.valid_prefix passes/*"),
        Case(f"{key}.seq_len=16", f"{tokens} {held_out} cursors/text/seq_len", may=trains),
        Case(f"{key}.valid_rows=2", held_out, may="passes/*"),
        Case(f"{key}.blend=[{{prefix: {R}/corpus, weight: 1.0}}, {{prefix: {R}/rows, weight: 3.0}}] {key}.prefix=null",
             f"{tokens} metrics/text/rows_row_share fingerprints/{key}.blend*", may=f"{trains} said/{R}/rows"),
        # the batches are the same, bit for bit
        Case(f"{key}.loader=dali", "") if has_dali() else refused(f"{key}.loader=dali", f"{key}.loader: dali needs NVIDIA DALI, which is not installed"),
    ]


# pretrain

TRAINED = "metrics/model/* metrics/valid/* metrics/throughput/*"

PRETRAIN = [
    *run_cases(three="steps=3", seed="steps/model/model/tokens engine/model/initial cursors/text/seed", seed_may="model/* metrics/*",
               peak="model.adam.learning_rate"),
    *tokenizer_cases(loads=None),
    *trained_cases("model", "model", moved=TRAINED, after="metrics/valid/*"),
    *loaded_cases("model", other="sft", moved=f"model/* {TRAINED}",
                  base=f"model.architecture=null model.load={R}/runs/base"),
    *pretraining_data_cases("data", text="model/model"),
    Case("steps=2", "metrics/step models/model/steps steps/model/rate files", may="* models/model/adam_steps metrics/model/learning_rate steps/model/model/rows steps/model/model/objective"),
    Case("batch_size=5", "steps/model/model/rows steps/model/model/tokens cursors/text/num_taken", may="model/* metrics/* passes/*",
         exact={"steps/model/model/rows": (5,)}),
    *schedule_cases("model", three="steps=3", moved="model/* metrics/model/* metrics/valid/*"),
]  # fmt: skip

# sft

SFT_AFTER = "metrics/valid/* samples/* passes/*"
SFT_MOVED = f"{TRAINED} metrics/pretraining/loss metrics/pretraining/nll samples/* passes/*"
JUDGED = f"select_by=reward run.eval_every=1 reward.load={R}/runs/reward"
DEMONSTRATIONS = "steps/model/model/tokens"
DATA_NOTES = " ".join(f"said/{R}/{name}.jsonl" for name in (
    "demonstrations", "demonstrations_valid", "other_demonstrations", "rankings", "rankings_valid", "other_rankings", "prompts",
    "prompts_valid", "other_prompts",
))  # fmt: skip
TEXT_GONE = "steps/model/pretraining/rows steps/model/pretraining/tokens steps/model/pretraining/objective fingerprints/data.pretraining.prefix said/{recipe}/corpus"

SFT = [
    *run_cases(three="batch_size=8", seed="steps/model/model/tokens steps/model/pretraining/tokens cursors/order/seed cursors/text/seed samples/response",
               seed_may="model/* metrics/* passes/* samples/finished", peak="model.adam.learning_rate"),
    Case("run.seed=2", "metrics/model/loss", may="*", base="dropout=0.5"),
    *tokenizer_cases(loads="model"),
    *trained_cases("model", "model", moved=SFT_MOVED, after=SFT_AFTER),
    *loaded_cases("model", other="deep", moved=f"model/* {SFT_MOVED}"),
    Case(f"data.train={R}/other_demonstrations.jsonl", f"{DEMONSTRATIONS} fingerprints/data.train", may=f"* {DATA_NOTES}"),
    Case(f"data.valid={R}/other_demonstrations.jsonl", "metrics/valid/loss samples/prompt fingerprints/data.valid",
         may=f"{DATA_NOTES} samples/* passes/* answers/*"),
    Case("data.valid=null", "metrics/valid/loss samples/prompt fingerprints/data.valid", may=f"{DATA_NOTES} samples/* passes/* answers/*"),
    Case("data.pretraining=null", "metrics/valid/text_loss fingerprints/data.pretraining.valid_prefix", may="passes/*",
         base="pretraining_mix=0"),
    *pretraining_data_cases("data.pretraining", text="model/pretraining"),
    *limits_cases(responses=True, file="data.train"),
    Case("epochs=2", "metrics/step models/model/steps cursors/order/num_taken files",
         may="* models/model/adam_steps steps/model/rate metrics/model/learning_rate steps/model/model/rows steps/model/model/objective "
         "steps/model/pretraining/rows steps/model/pretraining/objective", exact={"cursors/order/num_taken": 48}),
    Case("batch_size=12", "metrics/step steps/model/model/rows steps/model/pretraining/rows",
         may="* files models/model/steps models/model/adam_steps steps/model/rate metrics/model/learning_rate steps/model/model/objective "
         "steps/model/pretraining/objective", exact={"steps/model/model/rows": (12, 12), "steps/model/pretraining/rows": (3, 3)}),
    Case("dropout=0.5", "engine/model/dropout metrics/model/loss", may=f"model/* {SFT_MOVED}", exact={"engine/model/dropout": 0.5}),
    # text comes on top of the demonstrations, which stay what they are
    Case("pretraining_mix=0.5", "metrics/pretraining/loss_share metrics/pretraining/row_share metrics/pretraining/token_share steps/model/pretraining/rows "
         "steps/model/pretraining/objective steps/model/model/objective", may=f"model/* {SFT_MOVED} cursors/text/* steps/model/pretraining/tokens",
         exact={"metrics/pretraining/loss_share": (0.5,), "steps/model/model/rows": (24,), "steps/model/pretraining/rows": (12,)}),
    Case("pretraining_mix=0", "metrics/pretraining/loss steps/model/pretraining/rows steps/model/model/objective cursors/text/num_taken",
         may=f"model/* {SFT_MOVED} metrics/pretraining/* cursors/text/* {TEXT_GONE}", exact={"steps/model/model/rows": (24,)}),
    *schedule_cases("model", three="batch_size=8", moved=f"model/* {SFT_MOVED}"),
    Case("select_by=valid_loss", "best/step files cursors/best", may="process/saves", base="batch_size=8 run.eval_every=1"),
    Case(f"select_by=reward reward.load={R}/runs/reward", "best/step files cursors/best metrics/valid/reward_mean",
         may="said/reward sources/reward/* engine/reward/* metrics/valid/* samples/* passes/* answers/* process/saves", base="batch_size=8 run.eval_every=1"),
    refused("reward=null", "select_by reward needs reward", base=f"select_by=reward run.eval_every=1 reward={{load: {R}/runs/reward}}"),
    *frozen_cases("reward", other="reward2", moved="metrics/valid/reward_mean samples/reward cursors/best", base=JUDGED, average=False),
    *sampling_cases("sampling", sampled="samples/response"),
]  # fmt: skip

# reward

REWARD_MOVED = "metrics/reward/* metrics/valid/* metrics/throughput/*"
REWARD = [
    *run_cases(three="batch_size=7", seed="engine/model/initial steps/model/reward/tokens cursors/order/seed",
               seed_may="reward/* metrics/* passes/*", peak="model.adam.learning_rate"),
    *tokenizer_cases(loads=None),
    *trained_cases("model", "reward", moved=REWARD_MOVED, after="metrics/valid/*", scalar=True),
    *loaded_cases("model", other="sft", moved=f"reward/* {REWARD_MOVED}", role="reward", base=f"model.architecture=null model.load={R}/runs/base"),
    Case(f"data.train={R}/other_rankings.jsonl", "steps/model/reward/tokens fingerprints/data.train", may=f"* {DATA_NOTES} said/data.valid steps/model/reward/rows"),
    Case(f"data.valid={R}/other_rankings.jsonl", "metrics/valid/accuracy fingerprints/data.valid",
         may=f"{DATA_NOTES} said/data.valid metrics/valid/ranking_loss metrics/valid/score_gap passes/model"),
    Case("data.valid=null", "metrics/valid/accuracy fingerprints/data.valid",
         may=f"{DATA_NOTES} said/data.valid metrics/valid/ranking_loss metrics/valid/score_gap passes/model"),
    Case(f"data.demonstrations={R}/other_demonstrations.jsonl", "fingerprints/data.demonstrations reward/weights/scalar_head.bias",
         may=f"{DATA_NOTES} metrics/valid/demonstration_score passes/model", rounding="metrics/valid/*"),
    Case("data.demonstrations=null", "fingerprints/data.demonstrations reward/weights/scalar_head.bias",
         may=f"{DATA_NOTES} metrics/valid/demonstration_score passes/model", rounding="metrics/valid/*"),
    *limits_cases(responses=True, file="data.train"),
    Case("epochs=2", "metrics/step models/reward/steps cursors/order/num_taken files",
         may="* models/reward/adam_steps steps/model/rate metrics/reward/learning_rate steps/model/reward/rows steps/model/reward/objective",
         exact={"cursors/order/num_taken": 42}),
    Case("batch_size=20", "metrics/step steps/model/reward/tokens",
         may="* files models/reward/steps models/reward/adam_steps steps/model/rate metrics/reward/learning_rate steps/model/reward/rows steps/model/reward/objective",
         exact={"metrics/step": (1, 2)}),
    *schedule_cases("reward", three="batch_size=7", moved=f"reward/* {REWARD_MOVED}"),
]  # fmt: skip

# ppo

POLICY_AFTER = "policy/ema/* metrics/valid/* passes/*"
POLICY = f"policy/* metrics/policy/* metrics/ptx/* {POLICY_AFTER}"
VALUE = "value/* metrics/value/*"
UPDATES = f"{POLICY} {VALUE}"
RETURNS = f"metrics/rollout/return_mean metrics/rollout/return_std {UPDATES}"
KL = "metrics/rollout/kl metrics/rollout/kl_per_token metrics/rollout/kl_k3 metrics/rollout/kl_k3_per_token cursors/kl_coef"
SCORES = "metrics/rollout/reward_mean metrics/rollout/reward_std samples/reward"
VALUES = "metrics/rollout/value_mean metrics/rollout/value_std"
PPO_STEPS = (
    "models/policy/steps models/policy/adam_steps models/value/steps models/value/adam_steps steps/policy/rate steps/value/rate "
    "metrics/policy/learning_rate metrics/value/learning_rate steps/policy/policy/rows steps/policy/policy/objective "
    "steps/policy/ptx/rows steps/policy/ptx/objective steps/value/value/rows steps/value/value/objective"
)
PTX_GONE = (
    "steps/policy/ptx/rows steps/policy/ptx/tokens steps/policy/ptx/objective fingerprints/data.pretraining.prefix said/{recipe}/corpus"
)
UNEVEN = "run.seed=6 generation.sampling.max_new_tokens=24"  # some responses end early
LETTERS = f"[{{function: '{R}/words.py:letters'}}]"
GROUPS = "value=null ppo.advantages=grpo ppo.samples_per_prompt=4"
OTHER_POLICY = "* models/policy/architecture/* said/generation"

PPO = [
    *run_cases(three="ppo.iterations=3", seed="samples/response steps/policy/policy/tokens steps/policy/ptx/tokens cursors/order/seed cursors/text/seed",
               seed_may="*", peak="policy.adam.learning_rate"),
    *tokenizer_cases(loads="policy"),
    *trained_cases("policy", "policy", moved=OTHER_POLICY, after=POLICY_AFTER),
    *loaded_cases("policy", other="deep", moved=OTHER_POLICY),
    *offload_cases("policy", gradients="gradients", optimizer="masters moments", average="average", base="policy.precision=bf16 ppo.iterations=2"),
    *trained_cases("value", "value", moved=f"{VALUES} {RETURNS} metrics/throughput/*", scalar=True),
    *loaded_cases("value", other="reward2", moved=f"{VALUES} {RETURNS} {VALUE} metrics/throughput/*"),
    *offload_cases("value", weights="weights masters", gradients="gradients", optimizer="moments", base="ppo.iterations=2"),
    Case("value.load_model=value", "engine/value/initial said/value sources/value/model", may=f"{VALUES} {RETURNS} models/value/architecture/* sources/value/average",
         base=f"value.load={R}/runs/ppo value.load_model=policy"),
    *frozen_cases("reward", other="reward2", moved=f"{SCORES} {RETURNS}", average=False),
    *offload_cases("reward", weights="weights"),
    refused("reward.load=null", "load (a reward model) or functions (rewards of one's own) must be given"),
    Case("reward.weight=2.0", SCORES, may=RETURNS),
    Case("reward.normalize=true", SCORES, may=RETURNS),
    Case(f"reward.functions={LETTERS}", "metrics/rollout/reward_of_letters metrics/rollout/reward_mean fingerprints/reward.functions[[]0].function "
         "fingerprints/what_is_said_besides_in_data.prompts fingerprints/what_is_said_besides_in_data.prompts_valid",
         may=f"metrics/rollout/reward_of_model {SCORES} {RETURNS}"),
    Case(f"reward.functions=[{{function: '{R}/words.py:spaces'}}]", "metrics/rollout/reward_of_spaces fingerprints/reward.functions[[]0].function",
         may=f"metrics/rollout/reward_of_letters {SCORES} {RETURNS}", base=f"reward.functions={LETTERS}"),
    Case(f"reward.functions=[{{function: '{R}/words.py:letters', weight: 3.0}}]", "metrics/rollout/reward_mean", may=f"{SCORES} {RETURNS}",
         base=f"reward.functions={LETTERS}"),
    Case(f"reward.load=null reward.functions={LETTERS}", "metrics/rollout/reward_of_model sources/reward/path engine/reward/initial",
         may=f"{SCORES} {RETURNS} passes/* said/reward sources/reward/* engine/reward/*", base=f"reward.functions={LETTERS}"),
    *frozen_cases("reference", other="deep", moved=f"{KL} {RETURNS}"),
    *offload_cases("reference", weights="weights"),
    Case(f"data.prompts={R}/other_prompts.jsonl", "samples/prompt fingerprints/data.prompts cursors/order/num_items", may=f"* {DATA_NOTES}"),
    Case("data.prompts_may_grow=True", "exit refused", may=f"* {GONE} {DATA_NOTES}", base=f"ppo.iterations=2 data.prompts={R}/more_prompts.jsonl",
         prepare="fewer prompts", exact={"exit": 0}),
    Case(f"data.prompts_valid={R}/other_prompts.jsonl", "metrics/valid/reward_mean fingerprints/data.prompts_valid",
         may=f"metrics/valid/kl metrics/valid/response_len metrics/valid/finished_fraction passes/* answers/* {DATA_NOTES}"),
    Case("data.prompts_valid=null", "metrics/valid/reward_mean fingerprints/data.prompts_valid",
         may=f"metrics/valid/* passes/* answers/* {DATA_NOTES}"),
    Case("data.pretraining=null", "metrics/valid/text_loss fingerprints/data.pretraining.valid_prefix", may="passes/*", base="ppo.ptx_coef=0"),
    *pretraining_data_cases("data.pretraining", text="policy/ptx"),
    *limits_cases(responses=False, file="data.prompts"),
    Case("limits.max_response_len=30", "said/megarlhf_ppo"),
    Case("ppo.iterations=2", "metrics/step files cursors/order/num_taken", may=f"* said/megarlhf_ppo {PPO_STEPS}", exact={"metrics/step": (1, 2)}),
    Case("ppo.batch_size=16", "cursors/order/num_taken answers/cache cursors/text/num_taken", may=f"* {PPO_STEPS}",
         exact={"cursors/order/num_taken": 16, "steps/policy/policy/rows": (8, 8), "steps/value/value/rows": (8, 8)}),
    Case("ppo.minibatch_size=4", "steps/policy/policy/rows steps/policy/ptx/rows steps/value/value/rows", may=f"{UPDATES} metrics/throughput/* steps/* {PPO_STEPS}",
         rounding=f"{KL} {VALUES} {RETURNS} samples/* metrics/rollout/*",
         exact={"steps/policy/policy/rows": (4, 4), "steps/policy/ptx/rows": (4, 4), "steps/value/value/rows": (4, 4)}),
    Case("ppo.epochs=2", "models/policy/steps models/value/steps cursors/text/num_taken", may=f"{UPDATES} metrics/throughput/* steps/* {PPO_STEPS}",
         exact={"steps/policy/policy/rows": (8, 8), "steps/value/value/rows": (8, 8), "cursors/order/num_taken": 8}),
    Case("ppo.kl_coef=0.5", "metrics/rollout/kl_coef metrics/rollout/return_mean policy/exp_avg/* value/exp_avg/*", may=f"{RETURNS} cursors/kl_coef"),
    Case("ppo.kl_in=loss", "steps/policy/policy/objective metrics/rollout/return_mean policy/exp_avg/* value/exp_avg/*", may=RETURNS, base="ppo.kl_estimator=k3"),
    Case("ppo.kl_estimator=k3", "metrics/rollout/return_mean policy/exp_avg/* value/exp_avg/*", may=f"{RETURNS} steps/policy/policy/objective"),
    Case("ppo.kl_estimator=k2", "steps/policy/policy/objective policy/exp_avg/*", may=POLICY, base="ppo.kl_in=loss ppo.kl_estimator=k3"),
    Case("ppo.kl_coef=0.5", "metrics/rollout/kl_coef steps/policy/policy/objective policy/exp_avg/*", may=f"{POLICY} cursors/kl_coef",
         base="ppo.kl_in=loss ppo.kl_estimator=k3"),
    # policy gradients without a value function
    refused("value=null", "value, the value function, is needed by ppo.advantages gae"),
    refused("ppo.advantages=rloo", "value is a model that ppo.advantages rloo does not use"),
    Case("ppo.advantages=rloo", "policy/exp_avg/*", may=POLICY, base=GROUPS),
    Case("ppo.advantages=reinforce_pp", "policy/exp_avg/*", may=POLICY, base=GROUPS),
    Case("ppo.gamma=0.5", "policy/exp_avg/*", may=POLICY, base=f"{GROUPS} ppo.advantages=reinforce_pp"),
    Case("ppo.divide_by_std=false", "policy/exp_avg/*", may=POLICY, base=GROUPS),
    Case("ppo.standardize_advantages=true", "policy/exp_avg/*", may=POLICY, base=GROUPS),
    Case("ppo.samples_per_prompt=2", "samples/prompt cursors/order/num_taken metrics/rollout/group_std", may="*", base=GROUPS, exact={"cursors/order/num_taken": 4}),
    Case("ppo.samples_per_prompt=2", "samples/prompt cursors/order/num_taken metrics/rollout/group_std", may="*", exact={"cursors/order/num_taken": 4}),
    Case("ppo.adaptive_kl=null", "cursors/kl_coef"),
    Case("ppo.adaptive_kl.target=0.0001", "cursors/kl_coef"),
    Case("ppo.adaptive_kl.horizon=100000", "cursors/kl_coef"),
    Case("ppo.gamma=0.5", "metrics/rollout/return_mean policy/exp_avg/* value/exp_avg/*", may=RETURNS),
    Case("ppo.gae_lambda=0.5", "metrics/rollout/return_mean policy/exp_avg/* value/exp_avg/*", may=RETURNS),
    Case("ppo.clip=0.01", "steps/policy/policy/objective metrics/policy/clip_fraction", may=POLICY, base="ppo.epochs=3 policy.adam.learning_rate=0.1"),
    Case("ppo.clip_high=0.01", "steps/policy/policy/objective metrics/policy/clip_fraction", may=POLICY, base="ppo.epochs=3 policy.adam.learning_rate=0.1"),
    Case("ppo.normalization=sequence", "steps/policy/policy/objective metrics/policy/loss", may=POLICY, base=UNEVEN),
    Case("ppo.normalization=constant", "steps/policy/policy/objective policy/exp_avg/*", may=POLICY, base=UNEVEN),
    Case("ppo.value_clip=0.001", "steps/value/value/objective metrics/value/clip_fraction", may=VALUE, base="ppo.epochs=3 value.adam.learning_rate=0.1"),
    Case("ppo.standardize_advantages=false", "policy/exp_avg/*", may=POLICY),
    Case("ppo.ptx_coef=27.0", "steps/policy/ptx/objective policy/exp_avg/*", may=POLICY),
    Case("ppo.ptx_coef=0", "metrics/ptx/loss cursors/text/num_taken steps/policy/ptx/rows", may=f"{POLICY} cursors/text/* metrics/throughput/* {PTX_GONE}"),
    Case("ppo.ptx_ratio=2", "steps/policy/ptx/rows cursors/text/num_taken", may=f"{POLICY} metrics/throughput/* {PTX_GONE.split(' fingerprints')[0]}",
         exact={"steps/policy/ptx/rows": (16,)}),
    Case("ppo.unfinished_penalty=-3.0", SCORES, may=RETURNS, exact={"metrics/rollout/reward_mean": (-3.0,)}),
    Case("ppo.recompute_logprobs=false", "metrics/rollout/generator_logprob_gap passes/policy", rounding=f"* {KL} {RETURNS} samples/*"),
    Case("generation.max_logprob_gap=1e-30", "exit refused", may=f"* {GONE}", exact={"exit": 1},
         says="and generation.max_logprob_gap is 1e-30: these responses are not the policy's"),
    Case("ppo.warmup_iterations=5", "steps/policy/rate steps/value/rate", may=f"* said/megarlhf_ppo {PPO_STEPS}", base="ppo.iterations=3"),
    Case("ppo.ema_decay=0.1", "policy/ema/* metrics/valid/text_loss", may="metrics/valid/* passes/* said/megarlhf_ppo"),
    Case("ppo.ema_decay=0", "policy/ema/* metrics/valid/text_loss", may="metrics/valid/* passes/* said/megarlhf_ppo"),
    # lambda decays what gamma leaves: nothing, here
    Case("ppo.gae_lambda=0.5", "", base="ppo.gamma=0"),
    # the ratio and the KL are of the policy that was sampled from; the reference is the policy, to the bit
    Case("generation.sampling.temperature=0.2", "samples/response steps/policy/policy/objective", may="*",
         base=f"reference.load={R}/runs/sft reference.micro_batch_size=5", exact={"metrics/policy/ratio": (1.0,), "metrics/rollout/kl": (0.0,)}),
    *sampling_cases("generation.sampling", sampled="samples/response metrics/rollout/reward_mean")[1:],
]  # fmt: skip

# dpo

PREFERRED = "metrics/valid/dpo_loss metrics/valid/accuracy metrics/valid/margin metrics/valid/reward_chosen metrics/valid/reward_rejected"
DPO_MOVED = f"{TRAINED} metrics/dpo/* metrics/ptx/*"
RANKING_NOTES = f"{DATA_NOTES} said/data.valid"
DPO_PTX_GONE = "steps/model/ptx/rows steps/model/ptx/tokens steps/model/ptx/objective said/{recipe}/corpus"
DPO = [
    *run_cases(three="batch_size=7", seed="steps/model/dpo/tokens steps/model/ptx/tokens cursors/order/seed cursors/text/seed",
               seed_may="model/* metrics/* passes/*", peak="model.adam.learning_rate"),
    *tokenizer_cases(loads="model"),
    *trained_cases("model", "model", moved=DPO_MOVED, after="metrics/valid/*"),
    *loaded_cases("model", other="deep", moved=f"model/* {DPO_MOVED}"),
    *frozen_cases("reference", other="deep", moved=f"model/* {DPO_MOVED}"),
    Case(f"data.train={R}/other_rankings.jsonl", "steps/model/dpo/tokens fingerprints/data.train", may=f"* {RANKING_NOTES} steps/model/dpo/rows"),
    Case(f"data.valid={R}/other_rankings.jsonl", "metrics/valid/dpo_loss fingerprints/data.valid", may=f"{RANKING_NOTES} {PREFERRED} passes/*"),
    Case("data.valid=null", "metrics/valid/dpo_loss fingerprints/data.valid", may=f"{RANKING_NOTES} {PREFERRED} passes/*"),
    Case("data.pretraining=null", "metrics/valid/text_loss fingerprints/data.pretraining.valid_prefix", may="passes/*", base="dpo.ptx_coef=0"),
    *pretraining_data_cases("data.pretraining", text="model/ptx"),
    *limits_cases(responses=True, file="data.train"),
    Case("epochs=2", "metrics/step models/model/steps cursors/order/num_taken files",
         may="* models/model/adam_steps steps/model/rate metrics/model/learning_rate steps/model/dpo/rows steps/model/dpo/objective "
         "steps/model/ptx/rows steps/model/ptx/objective", exact={"cursors/order/num_taken": 42}),
    Case("batch_size=20", "metrics/step steps/model/dpo/tokens steps/model/ptx/rows",
         may="* files models/model/steps models/model/adam_steps steps/model/rate metrics/model/learning_rate steps/model/dpo/rows steps/model/dpo/objective "
         "steps/model/ptx/objective", exact={"metrics/step": (1, 2), "steps/model/ptx/rows": (20, 1)}),
    *schedule_cases("model", three="batch_size=7", moved=f"model/* {DPO_MOVED}"),
    Case("dpo.loss=ipo", "steps/model/dpo/objective metrics/dpo/loss metrics/valid/dpo_loss", may=f"model/* {DPO_MOVED}"),
    Case("dpo.beta=0.5", "steps/model/dpo/objective metrics/dpo/loss metrics/dpo/margin metrics/valid/dpo_loss", may=f"model/* {DPO_MOVED}"),
    Case("dpo.label_smoothing=0.2", "steps/model/dpo/objective metrics/dpo/loss metrics/valid/dpo_loss", may=f"model/* {DPO_MOVED}"),
    Case("dpo.ptx_coef=2.0", "steps/model/ptx/objective model/exp_avg/*", may=f"model/* {DPO_MOVED}"),
    Case("dpo.ptx_coef=0", "metrics/ptx/loss cursors/text/num_taken steps/model/ptx/rows",
         may=f"model/* {DPO_MOVED} cursors/text/* passes/* fingerprints/data.pretraining.prefix {DPO_PTX_GONE}"),
    Case("dpo.ptx_ratio=2", "steps/model/ptx/rows cursors/text/num_taken", may=f"model/* {DPO_MOVED} passes/* {DPO_PTX_GONE}", exact={"steps/model/ptx/rows": (42,)}),
]  # fmt: skip

# generate and evaluate

IDLE = [
    "run.save_every=3", "run.save_minutes=3.0", "run.stop_after_minutes=3.0", "run.keep_checkpoints=3", "run.keep_every=3", "run.save_in_background=False",
    "run.resume=newest_good", "run.max_skipped_steps=3", "run.alert_deviations=3.0", "run.alert_window=3", "run.eval_every=3", "run.profile_step=3",
]  # fmt: skip


def answering_run_cases(command, *, sampled):
    """`run` of a command that takes no steps."""
    said = f"said/megarlhf_{command}"
    return [
        Case("run.seed=2", sampled, may="* stdout said/* inputs/run.seed"),
        *(Case(change, said) for change in IDLE),
        Case("run.sinks=[]", said),
        Case("run.wandb_mode=online", said),
        *process_cases(),
    ]


GENERATE = [
    *answering_run_cases("generate", sampled="responses/response"),
    *tokenizer_cases(loads="model"),
    *frozen_cases("model", other="deep", moved="responses/* inputs/model/* stdout said/*", passes=False),
    Case("model.micro_batch_size=2", "said/megarlhf_generate"),
    Case("model.micro_batch_tokens=40", "said/megarlhf_generate"),
    Case(
        "samples_per_prompt=2",
        "responses/sample responses/response inputs/samples_per_prompt answers/cache",
        may="responses/* stdout said/*",
    ),
    Case(f"prompts={R}/other_prompts.jsonl", "responses/prompt inputs/prompts", may="* inputs/* said/*"),
    *limits_cases(responses=False, file="prompts"),
    Case("limits.max_response_len=30", "said/megarlhf_generate"),
    *sampling_cases("sampling", sampled="responses/response inputs/sampling/*"),
]

ANSWERED = "evaluation/valid/reward_mean evaluation/valid/kl evaluation/valid/response_len evaluation/valid/finished_fraction"
RANKED = "evaluation/valid/accuracy evaluation/valid/ranking_loss evaluation/valid/score_gap evaluation/valid/accuracy_by_prompt evaluation/valid/accuracy_by_prompt_low"
ONLY = "prompts=null reference=null demonstrations=null rankings=null text=null"
WON = f"win_rate.responses={R}/answers_a.jsonl win_rate.against={R}/answers_b.jsonl win_rate.labels={R}/labels.jsonl"
RATED = "evaluation/win_rate/* stdout said/* fingerprints/* files passes/*"
EVALUATE = [
    *answering_run_cases("evaluate", sampled="responses/response evaluation/valid/reward_mean"),
    *tokenizer_cases(loads="model"),
    *frozen_cases("model", other="deep", moved=f"responses/* inputs/model/* {ANSWERED} evaluation/valid/text_loss evaluation/valid/loss stdout passes/*"),
    *frozen_cases("reward", other="reward2", moved=f"responses/reward evaluation/valid/reward_mean {RANKED} evaluation/valid/* stdout", average=False),
    Case("reward=null", "responses/reward evaluation/valid/reward_mean engine/reward/initial", may="engine/reward/* said/reward passes/reward stdout", base="rankings=null"),
    *frozen_cases("reference", other="deep", moved="responses/kl evaluation/valid/kl stdout"),
    Case("reference=null", "responses/kl evaluation/valid/kl engine/reference/initial", may="engine/reference/* said/reference passes/* stdout"),
    Case(f"prompts={R}/other_prompts.jsonl", "responses/prompt inputs/prompts evaluation/valid/reward_mean", may=f"responses/* {ANSWERED} inputs/* stdout answers/* passes/* {DATA_NOTES}"),
    Case("prompts=null", "responses/prompt", may=f"responses/* {ANSWERED} inputs/* files stdout answers/* passes/* {DATA_NOTES}", base="reference=null"),
    Case(f"demonstrations={R}/other_demonstrations.jsonl", "evaluation/valid/loss", may=f"stdout passes/* {DATA_NOTES}"),
    Case("demonstrations=null", "evaluation/valid/loss", may=f"stdout passes/* {DATA_NOTES}"),
    Case(f"rankings={R}/other_rankings.jsonl", RANKED, may=f"evaluation/valid/accuracy_by_prompt_* stdout passes/* {DATA_NOTES}"),
    Case("rankings=null", RANKED, may=f"evaluation/valid/accuracy_by_prompt_* files stdout passes/* {DATA_NOTES}"),
    Case(f"tasks=[{R}/other_task.jsonl]", "evaluation/tasks/*", may="stdout said/* fingerprints/* passes/model", base=f"{ONLY} reward=null shots=0 tasks=[{R}/task.jsonl]"),
    Case("shots=0", "passes/model", may="evaluation/tasks/* stdout said/* fingerprints/*", base=f"{ONLY} reward=null shots=2 tasks=[{R}/task.jsonl]"),
    Case(f"win_rate.responses={R}/answers_c.jsonl", "evaluation/win_rate/by_reward", may=f"{RATED}", base=f"{ONLY} {WON}"),
    Case(f"win_rate.against={R}/answers_c.jsonl", "evaluation/win_rate/by_reward", may=f"{RATED}", base=f"{ONLY} {WON}"),
    Case(f"win_rate.labels={R}/other_labels.jsonl", "evaluation/win_rate/by_labels", may=f"{RATED}", base=f"{ONLY} {WON}"),
    Case("text=null", "evaluation/valid/text_loss", may="stdout passes/*"),
    Case(f"text.valid_prefix={R}/corpus", "evaluation/valid/text_loss", may="stdout passes/*"),
    Case("text.seq_len=16", "evaluation/valid/text_loss", may="stdout passes/*"),
    Case("text.valid_rows=2", "evaluation/valid/text_loss", may="stdout passes/*"),
    *limits_cases(responses=True, file="demonstrations"),
    *sampling_cases("sampling", sampled="responses/response inputs/sampling/*"),
]

CASES = {"pretrain": PRETRAIN, "sft": SFT, "reward": REWARD, "ppo": PPO, "dpo": DPO, "generate": GENERATE, "evaluate": EVALUATE}
