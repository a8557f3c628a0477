"""`megarlhf evaluate`: how good a finished model is."""

from __future__ import annotations

import json

from megarlhf.config.stages import EvaluateConfig
from megarlhf.data.collation import prompt_batch, ranking_batch, text_batch
from megarlhf.evaluation.rankings import ranking_metrics
from megarlhf.evaluation.responses import ResponseJudge, generator_of, response_lines
from megarlhf.evaluation.text import language_model_loss_on
from megarlhf.models.parameters import Head
from megarlhf.parallel.groups import World
from megarlhf.runs.answers import ANSWERS_FILE, INPUTS_FILE, answers_to_other_input, inputs_of
from megarlhf.runs.folder import Run
from megarlhf.runs.models import ModelPlanner
from megarlhf.runs.records import Records, open_tokenizer
from megarlhf.runs.row_lengths import row_lengths
from megarlhf.telemetry.tables import format_table


def evaluate(config: EvaluateConfig, world: World, *, fresh: bool = False) -> dict[str, float]:
    """`megarlhf evaluate`: what the given data allow; a table, and <run.dir>/evaluation.json."""
    with Run(config, world, fresh=fresh) as run:
        return _evaluated(config, run)


def _evaluated(config: EvaluateConfig, run: Run) -> dict[str, float]:
    tokenizer = open_tokenizer(config.tokenizer, run.world)
    records = Records(tokenizer, config.limits)
    prompts = records.prompts("prompts", config.prompts)
    rankings = records.rankings("rankings", config.rankings)
    demonstrations = records.demonstrations("demonstrations", config.demonstrations)
    held_out = records.held_out("text.valid_prefix", config.text)
    inputs = inputs_of(config, records.fingerprints, prompts)
    problems = records.agree(run.world) + (answers_to_other_input(run, inputs) if config.prompts else [])

    planner = ModelPlanner(run, tokenizer, config.parallel, problems=problems)
    heads, lengths = planner.saved_heads(config.model), row_lengths(config)
    head: Head = "scalar" if heads == {"scalar"} or ("scalar" in heads and not _speaks(config) and config.reward is None) else "lm"
    planner.violations += _unfit(config, head)
    plans = {
        role: planner.plan(role, model, kind, rows=lengths[role])
        for role, model, kind in (("model", config.model, head), ("reward", config.reward, "scalar"), ("reference", config.reference, "lm"))
        if model is not None
    }
    planner.check()
    run.introduce([*records.notes, *planner.notes])

    engines = {role: planner.build_frozen(plan) for role, plan in plans.items()}
    engine, reward = engines["model"], engines.get("reward")
    metrics = held_out.metrics(engine)
    if rankings:
        metrics |= ranking_metrics(reward or engine, ranking_batch(rankings, pad_id=tokenizer.pad_id))
    if demonstrations:
        metrics["valid/loss"] = language_model_loss_on(engine, text_batch(demonstrations, pad_id=tokenizer.pad_id))
    if prompts:
        batch, judges = prompt_batch(prompts, pad_id=tokenizer.pad_id), {"reward": reward, "reference": engines.get("reference")}
        how = {"seed": config.run.seed, "purpose": "evaluate", "policy": engine}
        judged = ResponseJudge(generator_of(engine, tokenizer), batch, config.sampling, **how, **judges).judge()
        metrics |= judged.metrics("valid")
        run.write(INPUTS_FILE, json.dumps(inputs, indent=1) + "\n")
        run.write(ANSWERS_FILE, response_lines(judged, tokenizer, prompts) if run.is_writer else "")
    run.write("evaluation.json", json.dumps(metrics, indent=1) + "\n")
    if run.is_writer:
        print(format_table(("metric", "value"), [(name, f"{value:.4f}") for name, value in metrics.items()]), flush=True)
    return metrics


def _speaks(config: EvaluateConfig) -> bool:
    """Whether the model is asked for text."""
    return bool(config.prompts or config.demonstrations or config.text)


def _unfit(config: EvaluateConfig, head: Head) -> list[str]:
    """How the model's kind does not fit what it is to be evaluated on."""
    found = []
    if head == "scalar" and _speaks(config):
        found.append("model: it is a reward model, which can be evaluated on rankings only")
    if head == "scalar" and config.reward is not None:
        found.append("reward: `model` is a reward model itself; leave one of the two out")
    if head == "lm" and config.rankings and config.reward is None:
        found.append("rankings: they need a reward model: `model` is a language model, and `reward` is not given")
    return found
