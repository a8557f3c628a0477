"""Cases of the sections that several commands share, for one place in one command."""

from tests.wiring.case import Case
from tests.wiring.recipe import SIZES

ROTARY = {"positions": "rotary"}
LINEAR = {**ROTARY, "rotary_scaling": "linear", "rotary_scaling_factor": 4.0}
LLAMA3 = {**LINEAR, "rotary_scaling": "llama3", "rotary_original_context": 64}
ARCHITECTURE = [
    # (field, value, what a model has before)
    ("num_layers", 2, {}),
    ("hidden_size", 12, {}),
    ("num_heads", 4, {}),
    ("num_kv_heads", 1, {}),
    ("ffn_size", 16, {}),
    ("max_seq_len", 41, {}),
    ("head_size", 6, {}),
    ("norm", "rmsnorm", {}),
    ("norm_eps", 0.1, {}),
    ("activation", "relu", {}),
    ("parallel_residual", True, {}),
    ("qk_norm", True, {}),
    ("positions", "rotary", {}),
    ("rotary_base", 100.0, ROTARY),
    ("rotary_fraction", 0.5, ROTARY),
    ("rotary_scaling", "llama3", LINEAR),
    ("rotary_scaling_factor", 16.0, LINEAR),
    ("rotary_low_frequency_factor", 0.05, LLAMA3),
    ("rotary_high_frequency_factor", 20.0, LLAMA3),
    ("rotary_original_context", 16, LLAMA3),
    ("bias", False, {}),
    ("qkv_bias", True, {"bias": False}),
    ("tied_embeddings", False, {}),
]


def joined(*overrides):
    """Overrides as one text."""
    return " ".join(part for part in overrides if part)


STEPS = "models/* metrics/*/learning_rate steps/*/rate steps/*/*/rows steps/*/*/objective"
"""With "*": what another number of steps changes."""
GONE = f"{STEPS} sources/* fingerprints/* engine/* process/* inputs/* files stdout said/*"
"""With "*": all that a run leaves which did not begin."""


def run_cases(*, three, seed, seed_may="", evaluated="metrics/valid/*", peak):
    """`run` of a command that trains. three: overrides that make it three steps; peak: the key of a learning rate."""
    often = joined(three, "run.keep_checkpoints=9")
    each = joined(often, "run.save_every=1")
    broken = joined(three, f"{peak}=1.0e+38")
    stopped = "stopped by run.stop_after_minutes 1e-06 after step 1 of 3"
    sinks = {"process/sinks": "('jsonl', 'tensorboard') offline"}
    online = {"process/sinks": "('jsonl', 'wandb') online"}
    return [
        Case("run.seed=2", seed, may=seed_may),
        Case("run.save_every=2", "files", base=often, may="process/saves"),
        Case("run.save_minutes=0", "files", base=often, may="process/saves"),
        Case("run.stop_after_minutes=1.0e-6", "exit refused metrics/step", may=f"* {GONE}", base=three, says=stopped, exact={"exit": 75}),
        Case("run.keep_checkpoints=1", "files", base=joined(three, "run.save_every=1")),
        Case("run.keep_every=2", "files", base=joined(three, "run.save_every=1", "run.keep_checkpoints=1")),
        Case("run.save_in_background=False", "process/saves", base=each, exact={"process/saves": ("MainThread",) * 3}),
        Case("run.resume=newest_good", "exit refused", may=f"* {GONE}", base=each, prepare="a damaged newest", exact={"exit": 0}),
        Case("run.alert_deviations=3.0", "process/alerts", exact={"process/alerts": "3.0 deviations, window 50"}),
        Case("run.alert_window=3", "process/alerts", exact={"process/alerts": "8.0 deviations, window 3"}),
        Case("run.max_skipped_steps=1", "refused metrics/step", may=f"* files {STEPS}", base=broken, says="not finite in the last 1 steps"),
        Case("run.eval_every=1", evaluated, may="samples/* passes/* answers/*", base=three),
        Case("run.profile_step=2", "files", base=three),
        refused("run.profile_step=4", "run.profile_step 4 comes after the run's last step, 3", base=three),
        Case("run.sinks=[jsonl, tensorboard]", "process/sinks", exact=sinks),
        Case("run.wandb_mode=online", "process/sinks", base="run.sinks=[jsonl, wandb]", exact=online),
        *process_cases(),
    ]


def process_cases():
    """What every command has in `run` and `stage`."""
    return [
        Case("run.threads=2", "process/threads", rounding="*", exact={"process/threads": 2}),
        Case("run.timeout_minutes=7.0", "process/timeout", exact={"process/timeout": 420.0}),
        Case("stage=other", "exit refused", may=f"* {GONE}", says="stage: expected"),
    ]


def refused(change, says, base=""):
    """A case in which the changed run is refused."""
    return Case(change, "exit refused", may=f"* {GONE}", base=base, says=says, exact={"exit": 2})


def tokenizer_cases(*, loads):
    """`tokenizer`: of the same size, and another. loads: the first model that was trained with it; None where all are fresh."""
    other, absent = "tokenizer.path={recipe}/other.model", refused("tokenizer.eos_token=nothing", "no token 'nothing'")
    if loads:
        return [refused(other, f"{loads}: "), refused("tokenizer.eos_token=a", f"{loads}: "), absent]
    return [Case(other, "fingerprints/tokenizer", may="* fingerprints/* said/* stdout"), absent]


def adam_cases(key, role, *, after=""):
    """`adam` of a trained model, in a run of one optimizer step. after: what follows from other weights after it."""
    rates = f"metrics/{role}/learning_rate steps/{role_in_notes(key)}/rate"
    weights, first, second = (f"{role}/{kind}/*" for kind in ("weights", "exp_avg", "exp_avg_sq"))
    return [
        Case(f"{key}.adam.learning_rate=0.01", f"{rates} {weights}", may=after),
        Case(f"{key}.adam.beta1=0.5", first, rounding=f"{weights} {after}"),
        Case(f"{key}.adam.beta2=0.5", second, rounding=f"{weights} {after}"),
        Case(f"{key}.adam.eps=0.1", weights, may=after),
        Case(f"{key}.adam.weight_decay=5.0", weights, may=after),
        Case(f"{key}.adam.clip_grad=0.0001", f"{first} {second} {weights}", may=after),
    ]


def trained_cases(key, role, *, moved, after="", base="", extra=(), sizes=SIZES, scalar=False):
    """A trained model. moved: patterns of what another model changes."""
    named = role_in_notes(key)
    mine = f"engine/{named}/initial models/{role}/architecture/* said/{named} {role}/* {moved}"
    fresh = joined(base, f"{key}.load=null")
    cases = []
    for field, value, given in ARCHITECTURE:
        silent = scalar and field == "tied_embeddings"
        cases.append(Case(
            f"{key}.architecture.{field}={_scalar(value)}",
            f"models/{role}/architecture/{field}" + ("" if silent else f" {role}/weights/*"),
            may=mine,
            base=joined(fresh, f"{key}.architecture={_yaml({**sizes, **given})}"),
            exact={f"models/{role}/architecture/{field}": value},
        ))  # fmt: skip
    plain = joined(fresh, f"{key}.architecture={_yaml(sizes)}")
    recompute = f"engine/{named}/recompute"
    return [
        *cases,
        Case(f"{key}.architecture.preset=gpt3-125m {key}.architecture.num_layers=null", f"models/{role}/architecture/num_layers",
             may=f"{mine} said/*", base=plain, exact={f"models/{role}/architecture/num_layers": 12}),
        Case(f"{key}.architecture={_yaml({**sizes, 'num_layers': 3})} {key}.load=null", f"models/{role}/architecture/num_layers",
             may=f"{mine} sources/* said/*", base=joined(base, f"{key}.architecture=null", f"{key}.load={{recipe}}/runs/base"),
             exact={f"models/{role}/architecture/num_layers": 3}),
        Case(f"{key}.architecture.init_std=0.1", f"engine/{named}/initial", may=mine, base=plain),
        *adam_cases(key, role, after=after),
        Case(f"{key}.recompute=selective", recompute, exact={recompute: "selective"}, base=base),
        Case(f"{key}.overlap=True", f"engine/{named}/overlap said/{named}", exact={f"engine/{named}/overlap": True}, base=base),
        *computed_cases(key, role, moved=f"{role}/* {moved}", base=base),
        *extra,
    ]  # fmt: skip


def role_in_notes(key):
    """The last part of a key: what a model is called in messages."""
    return key.rpartition(".")[2]


def computed_cases(key, role, *, moved, base=""):
    """How a model is computed, trained or frozen."""
    named = role_in_notes(key)
    return [
        Case(f"{key}.precision=bf16", f"engine/{named}/precision said/{named}", may=f"engine/{named}/initial {moved}", base=base,
             exact={f"engine/{named}/precision": "torch.bfloat16"}),
        Case(f"{key}.micro_batch_size=2", f"passes/{named}", rounding="* stdout", may="metrics/throughput/*_padding_fraction", base=base),
        Case(f"{key}.micro_batch_tokens=40", f"passes/{named}", rounding="* stdout", may="metrics/throughput/*_padding_fraction",
             base=base),
    ]  # fmt: skip


def offload_cases(key, *, base="", **rests):
    """What rests while responses are sampled: the results are the same to the bit. rests: kind -> what has no memory then."""
    at_rest = f"engine/{key}/at_rest"
    return [Case(f"{key}.offload=[{kind}]", at_rest, exact={at_rest: seen}, base=base) for kind, seen in rests.items()]


def loaded_cases(key, *, other, moved, base="", average=True, role=None):
    """Where a model's weights come from. other: a run whose model fits in its place."""
    named = role_in_notes(key)
    source = f"sources/{named}/path sources/{named}/identity sources/{named}/model"
    into = f"engine/{named}/initial said/{named} said/megarlhf_* inputs/model/* {source} {moved} models/{role or named}/architecture/*"
    cases = [
        # which model stands for which is doubted, too
        Case(f"{key}.load={{recipe}}/runs/{other}", f"engine/{named}/initial said/{named}", may=into, base=base),
        refused(f"{key}.load_model=nothing", f"{named}: load_model must name one of ", base=base),
    ]
    if average:
        from_ppo = joined(base, f"{key}.load={{recipe}}/runs/ppo", f"{key}.load_model=policy")
        newest = f"sources/{named}/average inputs/model/* {moved}"
        cases.append(Case(f"{key}.load_average=false", f"engine/{named}/initial said/{named}", may=newest, base=from_ppo))
    return cases


def frozen_cases(key, *, other, moved, base="", average=True, passes=True):
    """A model that is never trained. passes: whether it is used for more than sampling."""
    given = {name: value for name, value in SIZES.items() if name != "init_std"}
    return [
        *loaded_cases(key, other=other, moved=moved, base=base, average=average),
        refused(f"{key}.architecture={_yaml(given)} {key}.load=null", f"{key}.architecture would give random weights", base=base),
        *computed_cases(key, role_in_notes(key), moved=moved, base=base)[: 3 if passes else 1],
    ]


def schedule_cases(role, *, three, moved):
    """`schedule` over three steps."""
    rates = f"metrics/{role}/learning_rate steps/model/rate"
    return [
        Case("schedule.shape=constant", rates, may=moved, base=three),
        Case("schedule.warmup_steps=2", rates, may=moved, base=three),
        Case("schedule.final_fraction=0.9", rates, may=moved, base=three),
    ]


def sampling_cases(key, *, sampled):
    """How responses are sampled. sampled: what must follow from other responses."""
    answers = "* stdout inputs/sampling/* said/*"
    return [
        Case(f"{key}.temperature=0.2", sampled, may=answers),
        Case(f"{key}.top_k=2", sampled, may=answers),
        Case(f"{key}.top_p=0.3", sampled, may=answers),
        Case(f"{key}.max_new_tokens=5", sampled, may=answers),
        Case(f"{key}.max_batch_size=3", "answers/cache", rounding="* stdout"),
        Case(f"{key}.kv_cache_bytes=3000", "answers/cache", rounding="* stdout"),
        refused(f"{key}.cuda_graphs=true", f"{key}.cuda_graphs: this process runs on a CPU, which has no CUDA graphs"),
    ]


def limits_cases(*, responses, file):
    """`limits`. responses: whether there are any in the data; file: the key of the file that is read first."""
    cases = [
        refused("limits.max_prompt_len=2", "max_prompt_len"),
        Case("limits.on_bad_record=skip", "exit refused", may=f"* {GONE}", base=f"{file}={{recipe}}/broken.jsonl", exact={"exit": 0}),
    ]
    return cases + ([refused("limits.max_response_len=2", "max_response_len")] if responses else [])


def _yaml(tree):
    return "{" + ", ".join(f"{name}: {_scalar(value)}" for name, value in tree.items()) + "}"


def _scalar(value):
    return str(value).lower() if isinstance(value, bool) else value
