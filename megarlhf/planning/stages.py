"""What each stage does in a step, as its trainer does it, run through once by one rank."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from unittest import mock

from megarlhf.batch import Experience, Rows
from megarlhf.config.ppo import PpoConfig
from megarlhf.config.sections import LimitsConfig, ModelConfig, SamplingConfig
from megarlhf.engine.engine import Engine
from megarlhf.engine.terms import DpoLoss, LanguageModelLoss, PolicyLoss, RankingLoss, Term, ValueLoss
from megarlhf.engine.trainable import TrainEngine
from megarlhf.evaluation.responses import generator_of
from megarlhf.generation.cache import SlotCache
from megarlhf.generation.generator import Generator
from megarlhf.generation.in_flight import PassInFlight
from megarlhf.generation.schedule import slots_within
from megarlhf.parallel.groups import World
from megarlhf.planning import rows
from megarlhf.planning.dry_run import Batch, Part, RankRun, Recorder
from megarlhf.planning.fake_world import DEVICE, fake_world
from megarlhf.planning.meter import Cost, Meter
from megarlhf.planning.models import HEADS, RunModels
from megarlhf.planning.repetition import Repetition
from megarlhf.planning.work import completions_of_prompt
from megarlhf.trainers.policy_generator import PolicyGenerator
from megarlhf.trainers.ppo_models import PpoModels

DECODED = 4
"""Tokens of each row that a dry run decodes; those after the first tell what one costs."""


@dataclass(frozen=True)
class Ends:
    """The ids that a generator needs to know of a tokenizer."""

    eos_id: int = 0
    pad_id: int = 0


@dataclass(frozen=True)
class Job:
    """One rank of a run, to be run through a step."""

    models: RunModels
    rank: int
    gpus_per_node: int
    only: Collection[str] | None = None
    """The phases that are wanted beside "build"; None: all."""


def dry_run(models: RunModels, rank: int, gpus_per_node: int) -> RankRun:
    """Run one rank of the run through a step; this process must not be in a world."""
    return dry_run_each([Job(models, rank, gpus_per_node)])[0]


def dry_run_each(jobs: Sequence[Job]) -> list[RankRun]:
    """One after the other; what operations one has seen the next knows."""
    known: dict[tuple, Repetition] = {}
    with _old_objects_left_alone():
        return [_dry_run(job, known) for job in jobs]


def _dry_run(job: Job, known: dict[tuple, Repetition]) -> RankRun:
    node = job.rank // job.gpus_per_node
    with fake_world(job.rank, job.models.num_ranks) as world:
        with Meter(DEVICE, lambda other: other // job.gpus_per_node == node, known) as meter:
            recorder = Recorder(world, meter, gpus_per_node=job.gpus_per_node, only=job.only)
            STAGES[job.models.config.stage](job.models, world, recorder)
    return recorder.run


@contextlib.contextmanager
def _old_objects_left_alone() -> Iterator[None]:
    """What there is already is not looked through whenever a phase begins with a collection of garbage: a quarter second each."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _build(models: RunModels, world: World, recorder: Recorder, *, dropout: float = 0.0, roles: Collection[str] | None = None) -> None:
    for role, plan in models.plans.items():
        if roles is not None and role not in roles:
            continue
        trained = role in ("model", "policy", "value")
        if trained:
            engine = plan.trained(world, seed=models.config.run.seed, dropout=dropout)
            recorder.use(engine.groups)
            engine.optimizer.adopt_parameters()
            engine.optimizer.publish_masters()
        else:
            engine = plan.frozen(world)
        recorder.add(role, engine)
        engine.offload.rest()


def _save(recorder: Recorder) -> None:
    """What the loop does before it writes; beside that a save holds one buffer (storage/tensors.py)."""
    if not recorder.wants("save"):
        return
    with recorder.phase("save"):
        for role, engine in recorder.engines.items():
            if isinstance(engine, TrainEngine):
                recorder.once("save", role, "weights looked at", engine.weights_are_finite)
                engine.optimizer.moments()


def _pretrain(models: RunModels, world: World, recorder: Recorder) -> None:
    config = models.config
    loss = LanguageModelLoss()
    size = _rows_at_once(config.model, config.data.seq_len)
    batch = Batch(lambda n: Term("model", loss, rows.text(n, config.data.seq_len)), config.batch_size, size)
    _train_alone(models, world, recorder, [batch])


def _sft(models: RunModels, world: World, recorder: Recorder) -> None:
    config, loss = models.config, LanguageModelLoss()
    lengths = _lengths(config.limits)
    size = _rows_at_once(config.model, sum(lengths))
    batches = [Batch(lambda n: Term("model", loss, rows.demonstrations(n, *lengths)), config.batch_size, size)]
    if mix := config.pretraining_mix:
        seq_len = config.data.pretraining.seq_len
        num_rows = max(1, round(mix * config.batch_size))
        at_once = _rows_at_once(config.model, seq_len)
        batches.append(Batch(lambda n: Term("pretraining", loss, rows.text(n, seq_len), weight=mix), num_rows, at_once))
    _train_alone(models, world, recorder, batches, dropout=config.dropout)
    if config.reward is None or not recorder.wants("generate"):
        return
    model, sampling = recorder.engines["model"], config.sampling
    _generate(recorder, "model", generator_of(model, Ends()), lengths[0], sampling, num_rows=0)
    with recorder.phase("score"):
        reward = recorder.engines["reward"]
        recorder.use(reward.groups)
        reward.scores(rows.text(reward.groups.layout.dp * reward.micro_batch_size, lengths[0] + sampling.max_new_tokens))


def _reward(models: RunModels, world: World, recorder: Recorder) -> None:
    config = models.config
    width, completions = sum(_lengths(config.limits)), completions_of_prompt(config)[0]
    make = lambda n: Term("reward", RankingLoss(), rows.rankings(n, completions, width))  # noqa: E731
    at_once = max(1, _rows_at_once(config.model, width) // completions)
    _train_alone(models, world, recorder, [Batch(make, config.batch_size, at_once)])


def _dpo(models: RunModels, world: World, recorder: Recorder) -> None:
    """The reference is asked once, before the model is built, and let go of: its time is spread over the steps."""
    config, s = models.config, models.config.dpo
    lengths, completions = _lengths(config.limits), completions_of_prompt(config)[0]
    if recorder.wants("score"):
        with recorder.phase("score"):
            _build(models, world, recorder, roles=("reference",))
            batch = rows.preferences(config.batch_size, completions, *lengths)
            recorder.forward("score", "reference", _judged, batch, of_a_step=1 / config.epochs)
        recorder.let_go("reference")
    loss = DpoLoss(kind=s.loss, beta=s.beta, label_smoothing=s.label_smoothing)
    at_once = max(1, _rows_at_once(config.model, sum(lengths)) // completions)
    batches = [Batch(lambda n: Term("dpo", loss, rows.preferences(n, completions, *lengths)), config.batch_size, at_once)]
    if s.ptx_coef:
        seq_len = config.data.pretraining.seq_len
        make = lambda n: Term("ptx", LanguageModelLoss(), rows.text(n, seq_len), weight=s.ptx_coef)  # noqa: E731
        batches.append(Batch(make, s.ptx_ratio * config.batch_size, _rows_at_once(config.model, seq_len)))
    _train_alone(models, world, recorder, batches, roles=("model",))


def _judged(engine: Engine, batch: Rows) -> object:
    return engine.logprobs(batch, batch.response_mask)


def _train_alone(
    models: RunModels, world: World, recorder: Recorder, batches: list[Batch], *, dropout: float = 0.0, roles: Collection[str] | None = None
) -> None:
    with recorder.phase("build"):
        _build(models, world, recorder, dropout=dropout, roles=roles)
    first = recorder.warm_up("model", batches)
    with recorder.phase("update"):
        recorder.update("update", "model", batches, first, steps=1)
    _save(recorder)


def _ppo(models: RunModels, world: World, recorder: Recorder) -> None:
    config: PpoConfig = models.config
    s, sampling = config.ppo, config.generation.sampling
    lengths = config.limits.max_prompt_len, sampling.max_new_tokens
    with recorder.phase("build"):
        _build(models, world, recorder)
        engines = recorder.engines
        engines["policy"].start_ema(s.ema_decay)
        engines["policy"].offload.rest()
        absent = {role: None for role in HEADS["ppo"] if role not in engines}
        roles = PpoModels(**engines, **absent, generation_groups=world.groups(models.generation), notes=())
        recorder.use(roles.generation_groups)
        with recorder.meter.tagged("generation: weights"):
            generator = PolicyGenerator(roles, Ends(), verify="never")

    trained = {role: batches for role, batches in _ppo_batches(config, lengths).items() if role in engines}
    first = {role: recorder.warm_up(role, batches) for role, batches in trained.items()}
    if recorder.wants("generate"):
        recorder.turn_to("reshard", roles)
        with recorder.phase("reshard"), recorder.meter.tagged("buckets"):
            with recorder.meter.tagged("generation: weights"):
                generator.allocate()
            recorder.once("reshard", "policy", "publish", generator.publish)
        recorder.turn_to("generate", roles)
        recorder.use(roles.generation_groups)
        _generate(recorder, "policy", generator.generator, lengths[0], sampling, num_rows=s.batch_size, samples=s.samples_per_prompt)
        generator.release()
    if recorder.wants("score"):
        recorder.turn_to("score", roles)
        with recorder.phase("score"):
            _score(recorder, rows.experience(s.batch_size, *lengths), recompute=s.recompute_logprobs, temperature=sampling.temperature)
    if recorder.wants("update"):
        recorder.turn_to("update", roles)
        with recorder.phase("update"):
            for role, batches in trained.items():
                recorder.update("update", role, batches, first[role], steps=s.epochs * (s.batch_size // s.minibatch_size))
            recorder.turn_to("average", roles, part_of="update")
            recorder.once("update", "policy", "average", roles.policy.ema.update)
    _save(recorder)


def _ppo_batches(config: PpoConfig, lengths: tuple[int, int]) -> dict[str, list[Batch]]:
    """What one optimizer step of each trained model takes."""
    s, size = config.ppo, _rows_at_once(config.policy, sum(lengths))
    policy_loss = PolicyLoss(
        clip=s.clip,
        temperature=config.generation.sampling.temperature,
        kl_coef=s.kl_coef if s.kl_in == "loss" else 0.0,
        kl_estimator=s.kl_estimator,
        normalization=s.normalization,
        max_len=lengths[1] if s.normalization == "constant" else None,
    )
    text_loss, value_loss = LanguageModelLoss(), ValueLoss(clip=s.value_clip)
    policy = [Batch(lambda n: Term("policy", policy_loss, rows.experience(n, *lengths)), s.minibatch_size, size)]
    if s.ptx_coef:
        seq_len = config.data.pretraining.seq_len
        make = lambda n: Term("ptx", text_loss, rows.text(n, seq_len), weight=s.ptx_coef)  # noqa: E731
        policy.append(Batch(make, s.ptx_ratio * s.minibatch_size, _rows_at_once(config.policy, seq_len)))
    if config.value is None:
        return {"policy": policy}
    make_value = lambda n: Term("value", value_loss, rows.value_targets(n, *lengths))  # noqa: E731
    return {"policy": policy, "value": [Batch(make_value, s.minibatch_size, _rows_at_once(config.value, sum(lengths)))]}


def _score(recorder: Recorder, episodes: Experience, *, recompute: bool, temperature: float) -> None:
    def judged(engine: Engine, of: Experience) -> object:
        return engine.logprobs(of, of.response_mask, temperature=temperature)

    if "reward" in recorder.engines:
        recorder.forward("score", "reward", lambda engine, of: engine.scores(of), episodes)
    for role in ("policy", "reference") if recompute else ("reference",):
        if role in recorder.engines:
            recorder.forward("score", role, judged, episodes)
    if "value" in recorder.engines:
        recorder.forward("score", "value", lambda engine, of: engine.values(of, of.response_mask), episodes)


def _generate(
    recorder: Recorder, role: str, generator: Generator, prompt_len: int, sampling: SamplingConfig, *, num_rows: int, samples: int = 1
) -> None:
    """One batch of the generator: its prefill with the whole cache, and tokens at the beginning and at the end of the responses.

    num_rows: of a step; 0 where the phase is no part of one. samples: rows of each prompt.
    """
    layout, meter = generator.groups.layout, recorder.meter
    new = sampling.max_new_tokens
    capacity = min(prompt_len + new, generator.architecture.max_seq_len)
    share = -(-num_rows // layout.dp) or sampling.max_batch_size or 1
    wanted = min(share, sampling.max_batch_size or share)
    batch = slots_within(sampling.kv_cache_bytes, generator.bytes_per_slot(capacity), wanted=wanted, capacity=capacity)
    groups = min(layout.pp, batch)
    make_cache, run = generator._cache, generator._run
    marks: list[Cost] = []

    def whole_cache(slots: int, _: int) -> SlotCache:
        with meter.tagged("key-value cache"):
            return make_cache(slots, capacity)

    def marked(flying: PassInFlight, number: int, *rest: object) -> None:
        run(flying, number, *rest)
        if flying.plan.decoded and number == layout.virtual_pp - 1:
            marks.append(meter.cost.copy())

    meter.logits_width = generator.architecture.padded_vocab_size // layout.tp
    steps = min(DECODED, new)
    how = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p, "seed": 1, "iteration": 0}

    def decoded(width: int, samples: int) -> tuple[Cost, Cost]:
        """(costs of the prefill and the first token, of one token later) of all rows."""
        marks.clear()
        before = meter.cost.copy()
        generator.generate(rows.prompts(batch * layout.dp, width, samples=samples), max_new_tokens=steps, **how)
        first = marks[groups - 1]
        return first - before, (marks[-1] - first) * (1 / max(1, len(marks) // groups - 1))

    with mock.patch.object(generator, "_cache", whole_cache), mock.patch.object(generator, "_run", marked):
        with recorder.phase("generate"):
            prefill, early = decoded(prompt_len, samples)
        late = decoded(capacity - steps, batch * layout.dp)[1]
    if not num_rows:
        return
    batches = share / batch
    decode = (early + late) * (0.5 * (new - 1))
    recorder.run.parts += [
        Part("generate", role, "prompts", prefill * batches, micro_batches=groups),
        Part("generate", role, "tokens", decode * batches, micro_batches=groups * max(1, new - 1)),
    ]


def _rows_at_once(model: ModelConfig, width: int) -> int:
    """Rows of `width` tokens in one micro-batch."""
    return model.micro_batch_size if model.micro_batch_tokens is None else max(1, model.micro_batch_tokens // width)


def _lengths(limits: LimitsConfig) -> tuple[int, int]:
    return limits.max_prompt_len, limits.max_response_len


STAGES: dict[str, Callable[[RunModels, World, Recorder], None]] = {
    "pretrain": _pretrain,
    "sft": _sft,
    "reward": _reward,
    "dpo": _dpo,
    "ppo": _ppo,
}
