"""`megarlhf generate` and `megarlhf evaluate`: what a finished model says, and how good it is."""

from __future__ import annotations

import json

from megarlhf.config.stages import EvaluateConfig, GenerateConfig
from megarlhf.data.collation import prompt_batch, ranking_batch, text_batch
from megarlhf.data.tokenized import PromptRow
from megarlhf.data.tokenizers import Tokenizer
from megarlhf.engine.engine import Engine
from megarlhf.evaluation.rankings import ranking_metrics
from megarlhf.evaluation.responses import Judged, ResponseJudge, generator_of, response_records
from megarlhf.evaluation.text import language_model_loss_on
from megarlhf.parallel.groups import World
from megarlhf.runs.folder import Run
from megarlhf.runs.models import ModelPlanner
from megarlhf.runs.records import Records, open_tokenizer
from megarlhf.telemetry.tables import format_table


def generate_responses(config: GenerateConfig, world: World, *, fresh: bool = False) -> dict[str, float]:
    """`megarlhf generate`: one response to each prompt, into <run.dir>/responses.jsonl."""
    run = Run(config, world, fresh=fresh)
    tokenizer = open_tokenizer(config.tokenizer, world)
    records = Records(tokenizer, config.limits)
    rows = records.prompts(config.prompts)
    planner = ModelPlanner(world, tokenizer, config.parallel, seed=config.run.seed, problems=records.problems)
    plan = planner.plan("model", config.model, "lm", context=config.limits.max_prompt_len + config.sampling.max_new_tokens)
    planner.check()
    run.introduce([*records.notes, *planner.notes])
    judged = _judged(config, planner.build_frozen(plan), rows, tokenizer)
    run.write("responses.jsonl", _lines(judged, tokenizer))
    metrics = judged.metrics("responses")
    run.say(f"{len(rows)} responses in {run.dir / 'responses.jsonl'}: {', '.join(f'{k} {v:.4g}' for k, v in metrics.items())}")
    return metrics


def evaluate(config: EvaluateConfig, world: World, *, fresh: bool = False) -> dict[str, float]:
    """`megarlhf evaluate`: what the given data allow; a table, and <run.dir>/evaluation.json."""
    run = Run(config, world, fresh=fresh)
    tokenizer = open_tokenizer(config.tokenizer, world)
    records = Records(tokenizer, config.limits)
    prompts = records.prompts(config.prompts)
    rankings = records.rankings(config.rankings)
    demonstrations = records.demonstrations(config.demonstrations)
    held_out = records.held_out(config.text)

    planner = ModelPlanner(world, tokenizer, config.parallel, seed=config.run.seed, problems=records.problems)
    longest = max(config.limits.max_response_len, config.sampling.max_new_tokens)
    context = config.limits.max_prompt_len + longest
    mixed = max(context, config.text.seq_len) if config.text else context
    head = planner.saved_head(config.model)
    if head == "scalar" and (config.prompts or config.demonstrations or config.text):
        planner.violations.append("model: it is a reward model, which can be evaluated on rankings only")
    if head == "lm" and config.rankings:
        planner.violations.append("rankings: they need a reward model, and `model` is a language model")
    plan = planner.plan("model", config.model, head, context=mixed)
    plans = {
        role: planner.plan(role, model, kind, context=context)
        for role, model, kind in (("reward", config.reward, "scalar"), ("reference", config.reference, "lm"))
        if model is not None
    }
    planner.check()
    run.introduce([*records.notes, *planner.notes])

    engine = planner.build_frozen(plan)
    metrics = held_out.metrics(engine)
    if rankings:
        metrics |= ranking_metrics(engine, ranking_batch(rankings, pad_id=tokenizer.pad_id))
    if demonstrations:
        metrics["valid/loss"] = language_model_loss_on(engine, text_batch(demonstrations, pad_id=tokenizer.pad_id))
    if prompts:
        judges = {role: planner.build_frozen(plan) for role, plan in plans.items()}
        judged = _judged(config, engine, prompts, tokenizer, **judges)
        metrics |= judged.metrics("valid")
        run.write("responses.jsonl", _lines(judged, tokenizer))
    run.write("evaluation.json", json.dumps(metrics, indent=1) + "\n")
    if run.is_writer:
        print(format_table(("metric", "value"), [(name, f"{value:.4f}") for name, value in metrics.items()]), flush=True)
    return metrics


def _judged(
    config: GenerateConfig | EvaluateConfig,
    engine: Engine,
    rows: list[PromptRow],
    tokenizer: Tokenizer,
    reward: Engine | None = None,
    reference: Engine | None = None,
) -> Judged:
    prompts = prompt_batch(rows, pad_id=tokenizer.pad_id)
    generator = generator_of(engine, tokenizer)
    how = {"seed": config.run.seed, "purpose": config.stage}
    return ResponseJudge(generator, prompts, config.sampling, **how, reward=reward, reference=reference, policy=engine).judge()


def _lines(judged: Judged, tokenizer: Tokenizer) -> str:
    records = response_records(judged.rollouts, tokenizer, reward=judged.scores, kl=judged.kl)
    return "".join(json.dumps(record) + "\n" for record in records)
