"""The miniature as a table: every stage with its folder, its command and what it changes in the command's YAML file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from labelling import GROUPS

SYSTEMS = ("base", "prompted", "task_mix", "sft", "ppo", "ppo_ptx")
CHOSEN = {"ptx_coef": "2.0", "kl_coef": "0.1", "learning_rate": "3e-4", "learning_rate_without_ptx": "3e-4"}
"""What the systems take, chosen on prompts_tuning.jsonl (docs/fidelity.md says what was tried)."""
POINTS = {
    "ptx_coef": ("0.1", "0.3", "1.0", "4.0"),
    "kl_coef": ("0.002", "0.02", "0.5", "2.0"),
    "learning_rate": ("3e-5", "1e-4", "1e-3"),
    "learning_rate_without_ptx": ("3e-5", "1e-4", "1e-3"),
}
"""Points of the sweeps beside what was chosen, which are the smallest size's ppo_ptx and ppo themselves."""
SWEEPS = {
    "ptx_coef": "Figure 33",
    "kl_coef": "Figure 34: without ptx",
    "learning_rate": "Figure 38",
    "learning_rate_without_ptx": "Figure 38: without ptx",
}
CURVES = {
    "one epoch, a prompt's pairs together": "round_1/reward",
    "four epochs": "sweeps/reward/epochs_4",
    "pairs shuffled": "sweeps/reward/pairs_shuffled",
}
"""How a reward model is trained, and where."""
HEAVIER = {"tiny": 0.5, "small": 1, "middle": 4, "large": 20}
"""Seconds that a token takes, in those of the small size; measured on a CPU."""

STEPS = ("pretrain_steps", "sft_epochs", "iterations")
"""What of a form makes it longer."""


@dataclass(frozen=True)
class Form:
    """How much of everything."""

    shapes: dict[str, tuple[int, int, int]] = field(
        default_factory=lambda: {"tiny": (2, 48, 4), "small": (3, 112, 4), "middle": (6, 192, 6), "large": (9, 384, 6)}
    )
    """Layers, width and heads of each size: 0.1, 0.5, 2.8 and 16 million parameters."""
    documents: int = 20000
    users: int = 3000  # of five prompts each
    demonstrations: int = 1040
    """Most of them: comparisons cost less, and there are five times as many (Table 6: three)."""
    heldout: int = 600
    pretrain_steps: int = 600
    sft_epochs: int = 8
    iterations: int = 60
    points: int = 4
    """Most points of a sweep."""
    short: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Further overrides of a command, which make it shorter."""

    def scaled(self, factor: float) -> Form:
        """With `factor` times the steps; data and models stay."""
        return replace(self, **{name: max(2, round(getattr(self, name) * factor)) for name in STEPS})


SMOKE = Form(
    shapes={"tiny": (1, 32, 4), "small": (2, 32, 4), "middle": (2, 48, 4), "large": (2, 64, 4)},
    documents=300,
    users=90,
    demonstrations=60,
    heldout=24,
    pretrain_steps=6,
    sft_epochs=2,
    iterations=1,
    points=1,
    short={
        "pretrain": ("batch_size=8",),
        "sft": ("batch_size=32", "run.eval_every=1"),
        "reward": ("batch_size=32",),
        "ppo": ("ppo.batch_size=16", "ppo.minibatch_size=16"),
    },
)


@dataclass(frozen=True)
class Stage:
    """One step; what it left lies in its folder."""

    name: str
    """Its folder, seen from that of everything, as all paths here and in the YAML files are."""
    command: str
    """Of megarlhf, or "label"."""
    overrides: tuple[str, ...]
    minutes: float
    """What it takes on one core: of the smallest size from trials, of the others by `HEAVIER`."""

    def shortened(self, form: Form) -> Stage:
        """With what the form says of the command; of a key that is there twice, the last one counts."""
        words = (*self.overrides, *form.short.get(self.command, ()))
        return replace(self, overrides=tuple({word.partition("=")[0]: word for word in words}.values()))

    def needs(self, other: Stage) -> bool:
        """Whether it reads what `other` left."""
        return any(f"{word}/".partition("=")[2].startswith(f"{other.name}/") for word in self.overrides)


def stages(sizes: Sequence[str], form: Form) -> list[Stage]:
    """Everything in the order in which it is run.

    The reward model first, then size by size what Figure 1 shows; a second round, the sweeps at the smallest size, and last what is
    known only of reward models.
    """
    judge = sizes[len(sizes) // 2]  # the size of the reward model, one for all: of three, the middle one (Appendix C.2)
    table = [_base(judge, form), _init(judge), *_round(1, judge, f"{judge}/ppo_init")]
    for size in sizes:
        table += _systems(size, form)
    table += _round(2, judge, f"{judge}/ppo_ptx")
    table += [_ppo(judge, "ppo_ptx_2", form, round=2), _answers(judge, f"{judge}/answers/ppo_ptx_2", f"{judge}/ppo_ptx_2")]
    table += _sweeps(sizes[0], form) + _reward_models(judge)
    return [stage.shortened(form) for stage in {stage.name: stage for stage in table}.values()]


def selected(table: Sequence[Stage], only: str | None) -> list[Stage]:
    """The stages whose names begin with `only`, evaluations of their models, and all that these need; without it all."""
    named = [stage for stage in table if only is None or stage.name.startswith(only)]
    models = {f"model.load={stage.name}" for stage in named}
    wanted = [stage for stage in table if stage in named or (stage.command == "evaluate" and models & set(stage.overrides))]
    for stage in reversed(table):
        if stage not in wanted and any(other.needs(stage) for other in wanted):
            wanted.append(stage)
    return [stage for stage in table if stage in wanted]


def of_hours(sizes: Sequence[str], hours: float) -> Form:
    """The standard form with as many steps as fit into some hours on one core; comparisons, reward models and answers take theirs."""
    minutes, fixed = (sum(stage.minutes for stage in stages(sizes, form)) for form in (Form(), replace(Form(), **dict.fromkeys(STEPS, 0))))
    if 60 * hours <= fixed:
        raise ValueError(f"{hours:g} hours are too few: comparisons, reward models and answers alone take {fixed / 60:.1f}")
    return Form().scaled((60 * hours - fixed) / (minutes - fixed))


def _base(size: str, form: Form) -> Stage:
    layers, width, heads = form.shapes[size]
    shape = f"{{num_layers: {layers}, hidden_size: {width}, num_heads: {heads}, max_seq_len: 256, init_std: 0.04}}"
    rate = {"tiny": "4e-3", "small": "3e-3", "middle": "2e-3", "large": "1e-3"}[size]
    words = (
        f"model.architecture={shape}",
        f"model.adam.learning_rate={rate}",
        f"steps={form.pretrain_steps}",
        f"schedule.warmup_steps={min(20, form.pretrain_steps // 2)}",
    )
    return Stage(f"{size}/base", "pretrain", words, 1.7 * HEAVIER[size] * form.pretrain_steps / 600)


def _init(size: str) -> Stage:
    """What PPO starts from, and its KL reference (Appendix C.3)."""
    return Stage(f"{size}/ppo_init", "sft", (f"model.load={size}/base",), 0.3 * HEAVIER[size])


def _round(number: int, judge: str, policy: str) -> list[Stage]:
    """Comparisons of a policy's answers, after those of the round before, and a reward model of them (section 3.5)."""
    here, heavy = f"round_{number}", HEAVIER[judge]
    before = (f"before=round_{number - 1}/labels",) if number > 1 else ()
    return [
        Stage(f"{here}/answers", "generate", (f"model.load={policy}",), 2 * heavy),
        Stage(f"{here}/labels", "label", (f"answers={here}/answers", *before), 0.1),
        *_reward(f"{here}/reward", judge, here, "rankings", 3 * heavy * number),
        _accuracy(f"{here}/accuracy", f"{here}/reward", here, heavy),
    ]


def _reward(folder: str, judge: str, round: str, rankings: str, minutes: float, *words: str) -> list[Stage]:
    data = (f"data.train={round}/labels/{rankings}.jsonl", f"data.valid={round}/labels/valid.jsonl")
    return [Stage(folder, "reward", (f"model.load={judge}/ppo_init", *data, *words), minutes)]


def _accuracy(folder: str, reward: str, round: str, heavy: float) -> Stage:
    words = (
        f"model.load={reward}",
        f"rankings={round}/labels/valid.jsonl",
        *("prompts=null", "tasks=[]", "text=null", "limits.max_prompt_len=96", "limits.max_response_len=128"),
    )
    return Stage(folder, "evaluate", words, 0.1 * heavy)


def _reward_models(judge: str) -> list[Stage]:
    """Reward models for their own sake: without each group of labellers (section 4.1), of four epochs, of pairs one by one."""
    heavy, table = HEAVIER[judge], []
    for group in range(GROUPS):
        folder = f"round_1/without_{group}"
        table += _reward(f"{folder}/reward", judge, "round_1", f"without_{group}", 2.4 * heavy, "run.eval_every=0")
        table.append(_accuracy(f"{folder}/accuracy", f"{folder}/reward", "round_1", heavy))
    table += _reward("sweeps/reward/epochs_4", judge, "round_1", "rankings", 12 * heavy, "epochs=4")
    # As many comparisons a step as 8 prompts have.
    return table + _reward("sweeps/reward/pairs_shuffled", judge, "round_1", "pairs", 20 * heavy, "batch_size=88")


def _systems(size: str, form: Form) -> list[Stage]:
    """What is compared at one size, and its answers to held-out users' prompts."""
    base, epochs = f"model.load={size}/base", HEAVIER[size] * form.sft_epochs / 8
    chosen = ("select_by=reward", "reward.load=round_1/reward", "run.eval_every=32", f"epochs={form.sft_epochs}", "dropout=0.2")
    mix = ("data.train=data/task_mix.jsonl", "data.valid=null")
    table = [
        _base(size, form),
        _init(size),
        Stage(f"{size}/sft", "sft", (base, *chosen, "pretraining_mix=0"), 2 * epochs),
        Stage(f"{size}/task_mix", "sft", (base, *mix, "pretraining_mix=0", f"epochs={form.sft_epochs}"), 1 * epochs),
        _ppo(size, "ppo", form, "ppo.ptx_coef=0"),
        _ppo(size, "ppo_ptx", form),
    ]
    for system in SYSTEMS:
        prompted = ("prompts=data/prompts_valid_prompted.jsonl",) if system == "prompted" else ()
        table.append(_answers(size, f"{size}/answers/{system}", f"{size}/{'base' if prompted else system}", *prompted))
    return table


def _ppo(size: str, name: str, form: Form, *words: str, round: int = 1) -> Stage:
    models = [f"{model}.load={size}/ppo_init" for model in ("policy", "reference")]
    models += [f"{model}.load=round_{round}/reward" for model in ("value", "reward")]
    folder = name if "/" in name else f"{size}/{name}"
    # Rewards stop rising earlier in larger ones, and each iteration costs more.
    iterations = form.iterations if HEAVIER[size] <= 1 else max(1, form.iterations // 2)
    steps = (f"ppo.iterations={iterations}", f"ppo.warmup_iterations={min(5, iterations // 2)}")
    minutes = (1.2 if "ppo.ptx_coef=0" in words else 2) * HEAVIER[size] * iterations / 60
    return Stage(folder, "ppo", (*models, *steps, *words), minutes)


def _answers(size: str, name: str, model: str, *words: str) -> Stage:
    return Stage(name, "evaluate", (f"model.load={model}", "reward.load=round_1/reward", *words), 0.12 * HEAVIER[size])


def words_of(sweep: str, point: str) -> tuple[str, ...]:
    """What a point of a sweep changes in what was chosen."""
    key = "policy.adam.learning_rate" if sweep.startswith("learning_rate") else f"ppo.{sweep}"
    return (*(("ppo.ptx_coef=0",) if sweep in ("kl_coef", "learning_rate_without_ptx") else ()), f"{key}={point}")


def _sweeps(size: str, form: Form) -> list[Stage]:
    """Sweeps of PPO at one size: pretraining coefficient, KL coefficient without ptx, learning rate with and without."""
    points = {f"{name}/{point}": words_of(name, point) for name in SWEEPS for point in POINTS[name][: form.points]}
    table = []
    for point, words in points.items():
        table.append(_ppo(size, f"sweeps/{point}", form, *words))
        table.append(_answers(size, f"sweeps/answers/{point}", f"sweeps/{point}"))
    return table
