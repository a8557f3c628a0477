"""`megarlhf generate`: what a finished model says."""

from __future__ import annotations

import json

from megarlhf.config.inference import GenerateConfig
from megarlhf.data.collation import prompt_batch
from megarlhf.evaluation.responses import ResponseJudge, generator_of, response_lines
from megarlhf.runs.answers import ANSWERS_FILE, INPUTS_FILE, answers_to_other_input, inputs_of
from megarlhf.runs.folder import Run
from megarlhf.runs.models import ModelPlanner
from megarlhf.runs.records import Records, open_tokenizer
from megarlhf.runs.row_lengths import row_lengths


def generate_responses(config: GenerateConfig, run: Run) -> dict[str, float]:
    """`megarlhf generate`: one response to each prompt, into <run.dir>/responses.jsonl."""
    tokenizer = open_tokenizer(config.tokenizer, run.world)
    records = Records(tokenizer, config.limits)
    prompts = records.prompts("prompts", config.prompts)
    inputs = inputs_of(config, records.fingerprints, prompts)
    problems = [*records.agree(run.world), *answers_to_other_input(run, inputs)]
    planner = ModelPlanner(run, tokenizer, config.parallel, problems=problems)
    plan = planner.plan("model", config.model, "lm", rows=row_lengths(config)["model"])
    planner.check()
    run.introduce([*records.notes, *planner.notes])

    engine = planner.build_frozen(plan)
    batch = prompt_batch(prompts, pad_id=tokenizer.pad_id)
    judged = ResponseJudge(generator_of(engine, tokenizer), batch, config.sampling, seed=config.run.seed, purpose="generate").judge()
    run.write(INPUTS_FILE, json.dumps(inputs, indent=1) + "\n")
    run.write(ANSWERS_FILE, response_lines(judged, tokenizer, prompts) if run.is_writer else "")
    metrics = judged.metrics("responses")
    run.say(f"{len(prompts)} responses in {run.dir / ANSWERS_FILE}: {', '.join(f'{k} {v:.4g}' for k, v in metrics.items())}")
    return metrics
