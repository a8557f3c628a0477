"""`megarlhf generate`: what a finished model says."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Sequence

import torch

from megarlhf.config.inference import GenerateConfig
from megarlhf.config.sections import SamplingConfig
from megarlhf.data.collation import prompt_batch
from megarlhf.data.tokenized import PromptRow
from megarlhf.data.tokenizers import Tokenizer
from megarlhf.engine.engine import NotFiniteError
from megarlhf.evaluation import responses
from megarlhf.evaluation.responses import answer_record, generator_of
from megarlhf.generation.generator import Generator
from megarlhf.runs.agreement import on_rank_0
from megarlhf.runs.answers import ANSWERS_FILE, INPUTS_FILE, PARTS_FOLDER, answers_to_other_input, inputs_of
from megarlhf.runs.folder import Run
from megarlhf.runs.models import ModelPlanner
from megarlhf.runs.partial_answers import PartWriter, read_parts
from megarlhf.runs.records import Records, open_tokenizer
from megarlhf.runs.row_lengths import row_lengths
from megarlhf.storage.files import write_atomically

ROWS_AT_ONCE = 256
"""Of a copy of the model, where the configuration does not say it."""


def generate_responses(config: GenerateConfig, run: Run) -> dict[str, float]:
    """`megarlhf generate`: responses to each prompt, into <run.dir>/responses.jsonl; goes on after any interruption."""
    tokenizer = open_tokenizer(config.tokenizer, run.world, now=run.began)
    records = Records(tokenizer, config.limits, run.world)
    prompts = records.prompts("prompts", config.prompts)
    planner = ModelPlanner(run, tokenizer, config.parallel, problems=records.agree(run.world))
    plan = planner.plan("model", config.model, "lm", rows=row_lengths(config)["model"])
    weights = plan.source.saved.identity if plan is not None and plan.source is not None else None
    inputs = inputs_of(config, records.fingerprints, prompts, weights=weights)
    planner.violations += answers_to_other_input(run, inputs)
    planner.sample("sampling", config.sampling, plan, prompts)
    planner.check()
    run.introduce([*records.notes, *planner.notes])
    run.write(INPUTS_FILE, json.dumps(inputs, indent=1) + "\n")

    total = len(prompts) * config.samples_per_prompt
    answered = on_rank_0(run.world, _answered, run, total)
    if left := sorted(set(range(total)) - set(answered)):
        if answered:
            run.say(f"going on: {len(answered)} of {total} responses are there")
        generator = generator_of(planner.build_frozen(plan), tokenizer)
        _answer(config, run, generator, tokenizer, prompts, left)
    elif (run.dir / ANSWERS_FILE).exists():
        run.say(f"all {total} responses are in {run.dir / ANSWERS_FILE} already")
        return {}
    metrics = on_rank_0(run.world, _put_in_order, run)
    run.say(f"{total} responses in {run.dir / ANSWERS_FILE}: {', '.join(f'{k} {v:.4g}' for k, v in metrics.items())}")
    return metrics


def _answered(run: Run, total: int) -> list[int]:
    """On rank 0: the rows that were answered before."""
    if (run.dir / ANSWERS_FILE).exists():
        shutil.rmtree(run.dir / PARTS_FOLDER, ignore_errors=True)  # ended before they were removed
        return list(range(total))
    return sorted(read_parts(run.dir / PARTS_FOLDER))


def _answer(
    config: GenerateConfig, run: Run, generator: Generator, tokenizer: Tokenizer, prompts: Sequence[PromptRow], rows: Sequence[int]
) -> None:
    """Sample the run's `rows`; row n is sample n % k of prompt n // k, and its noise is that of n whatever was answered before."""
    k = config.samples_per_prompt

    def record(row: int, response: Sequence[int]) -> dict[str, object]:
        prompt, finished = prompts[row // k], response[-1] == tokenizer.eos_id
        said = answer_record(tokenizer, prompt.prompt_ids, response, finished=finished, fields=prompt.fields)
        return said | ({"sample": row % k} if k > 1 else {})

    batch = prompt_batch([prompts[row // k] for row in rows], pad_id=tokenizer.pad_id)
    batch = dataclasses.replace(batch, ids=torch.tensor(rows))
    place = generator.groups.coordinates
    with contextlib.ExitStack() as stack:
        writer = None
        if generator.groups.is_last_stage and place.tp == 0:
            path = run.dir / PARTS_FOLDER / f"{run.world.rank:05d}.jsonl"
            writer = PartWriter(path, rows, record, progress=place.dp == 0)
            stack.callback(writer.close)
        how = {"seed": config.run.seed, "purpose": "generate", "listener": writer}
        try:
            responses.generate(generator, batch, _bounded(config.sampling), **how)
        except KeyboardInterrupt:
            run.say(f"what is answered stays in {run.dir / PARTS_FOLDER}; the same command goes on")
            raise
        except NotFiniteError:
            on_rank_0(run.world, shutil.rmtree, run.dir / PARTS_FOLDER)  # what they say is nothing
            raise


def _bounded(sampling: SamplingConfig) -> SamplingConfig:
    if sampling.max_batch_size is None and sampling.kv_cache_bytes is None:
        return dataclasses.replace(sampling, max_batch_size=ROWS_AT_ONCE)
    return sampling


def _put_in_order(run: Run) -> dict[str, float]:
    """On rank 0: what all ranks have written, in the order of the prompts; the means of it."""
    answers = [answer for _, answer in sorted(read_parts(run.dir / PARTS_FOLDER).items())]
    write_atomically(run.dir / ANSWERS_FILE, "".join(json.dumps(answer.record) + "\n" for answer in answers))
    shutil.rmtree(run.dir / PARTS_FOLDER)
    return {
        "responses/response_len": sum(answer.tokens for answer in answers) / len(answers),
        "responses/finished_fraction": sum(bool(answer.record["finished"]) for answer in answers) / len(answers),
    }
