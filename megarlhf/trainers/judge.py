"""`megarlhf generate` and `megarlhf evaluate`: what a finished model says, and how good it is."""

from __future__ import annotations

import json
from pathlib import Path

from megarlhf.config.sections import ModelConfig, SamplingConfig
from megarlhf.config.stages import EvaluateConfig, GenerateConfig
from megarlhf.data.collation import prompt_batch, ranking_batch, text_batch
from megarlhf.data.tokenized import PromptRow
from megarlhf.data.tokenizers import Tokenizer, load_tokenizer
from megarlhf.engine.checkpoint import read_state
from megarlhf.engine.frozen import FrozenEngine
from megarlhf.evaluation.rankings import ranking_metrics
from megarlhf.evaluation.responses import Judged, ResponseJudge
from megarlhf.evaluation.text import HeldOutText, language_model_loss_on
from megarlhf.generation.generator import Generator
from megarlhf.models.parameters import Head
from megarlhf.parallel.groups import World
from megarlhf.telemetry.tables import format_table
from megarlhf.trainers.data import Records
from megarlhf.trainers.models import ModelPlanner
from megarlhf.trainers.run import find_checkpoint


def generate_responses(config: GenerateConfig, world: World, *, fresh: bool = False) -> dict[str, float]:
    """`megarlhf generate`: one response to each prompt, into <run.dir>/responses.jsonl."""
    tokenizer = load_tokenizer(config.tokenizer.path, eos_token=config.tokenizer.eos_token)
    records = Records(tokenizer, config.limits)
    rows = records.prompts(config.prompts)
    planner = ModelPlanner(world, tokenizer, config.parallel, seed=config.run.seed)
    context = config.limits.max_prompt_len + config.sampling.max_new_tokens
    plan = planner.plan("model", config.model, "lm", context=context)
    planner.check()
    engine = planner.build_frozen(plan)
    judge = _judge(engine, rows, tokenizer, config.sampling, seed=config.run.seed)
    judged = judge.judge(iteration=0)
    _write_responses(Path(config.run.dir), rows, judged, tokenizer, world)
    return judged.metrics("responses")


def evaluate(config: EvaluateConfig, world: World, *, fresh: bool = False) -> dict[str, float]:
    """`megarlhf evaluate`: what the given data allow; a table, and <run.dir>/evaluation.json."""
    tokenizer = load_tokenizer(config.tokenizer.path, eos_token=config.tokenizer.eos_token)
    records = Records(tokenizer, config.limits)
    prompts = records.prompts(config.prompts) if config.prompts else []
    rankings = records.rankings(config.rankings) if config.rankings else []
    demonstrations = records.demonstrations(config.demonstrations) if config.demonstrations else []

    planner = ModelPlanner(world, tokenizer, config.parallel, seed=config.run.seed)
    longest = max(config.limits.max_response_len, config.sampling.max_new_tokens)
    context = config.limits.max_prompt_len + longest
    mixed = max(context, config.text.seq_len) if config.text else context
    head: Head = _saved_head(config.model, world)
    if head == "scalar" and (prompts or demonstrations or config.text):
        planner.violations.append("model: it is a reward model; it can be evaluated on rankings only")
    if head == "lm" and rankings:
        planner.violations.append("rankings: they need a reward model, and `model` is a language model")
    plan = planner.plan("model", config.model, head, context=mixed)
    reward = planner.plan("reward", config.reward, "scalar", context=context) if config.reward else None
    reference = planner.plan("reference", config.reference, "lm", context=context) if config.reference else None
    planner.check()

    engine = planner.build_frozen(plan)
    ids = {"eos_id": tokenizer.eos_id, "vocab_size": tokenizer.vocab_size}
    metrics = HeldOutText.of(config.text, **ids).metrics(engine)
    if rankings:
        metrics |= ranking_metrics(engine, ranking_batch(rankings, pad_id=tokenizer.pad_id))
    if demonstrations:
        metrics["valid/loss"] = language_model_loss_on(engine, text_batch(demonstrations, pad_id=tokenizer.pad_id))
    if prompts:
        judge = _judge(
            engine,
            prompts,
            tokenizer,
            config.sampling,
            seed=config.run.seed,
            reward=planner.build_frozen(reward) if reward else None,
            reference=planner.build_frozen(reference, temperature=config.sampling.temperature or 1.0) if reference else None,
        )
        judged = judge.judge(iteration=0)
        metrics |= judged.metrics("valid")
        _write_responses(Path(config.run.dir), prompts, judged, tokenizer, world)
    if world.rank == 0:
        folder = Path(config.run.dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "evaluation.json").write_text(json.dumps(metrics, indent=1))
        print(format_table(("metric", "value"), [(name, f"{value:.4f}") for name, value in metrics.items()]), flush=True)
    return metrics


def _saved_head(config: ModelConfig, world: World) -> Head:
    if config.load is None:
        return "lm"
    models = read_state(find_checkpoint(config.load, world)).models
    name = config.load_model or ("policy" if "policy" in models else next(iter(models)))
    return models[name]["head"] if name in models else "lm"


def _judge(
    engine: FrozenEngine,
    rows: list[PromptRow],
    tokenizer: Tokenizer,
    sampling: SamplingConfig,
    *,
    seed: int,
    reward: FrozenEngine | None = None,
    reference: FrozenEngine | None = None,
) -> ResponseJudge:
    generator = Generator(
        engine.transformers,
        engine.groups,
        architecture=engine.spec.architecture,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
    )
    prompts = prompt_batch(rows, pad_id=tokenizer.pad_id)
    return ResponseJudge(generator, prompts, sampling, seed=seed, reward=reward, reference=reference, policy=engine)


def _write_responses(folder: Path, rows: list[PromptRow], judged: Judged, tokenizer: Tokenizer, world: World) -> None:
    if world.rank != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    rollouts = judged.rollouts
    with open(folder / "responses.jsonl", "w") as file:
        for i, row in enumerate(rows):
            start, stop = int(rollouts.prompt_lengths[i]), int(rollouts.lengths[i])
            record = {
                "prompt": tokenizer.decode(list(row.prompt_ids)),
                "response": tokenizer.decode(rollouts.tokens[i, start:stop].tolist()),
                "finished": bool(rollouts.finished[i]),
            }
            if judged.scores is not None:
                record["reward"] = float(judged.scores[i])
            file.write(json.dumps(record) + "\n")
