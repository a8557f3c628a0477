"""Batches whose loss or gradients were not finite, kept in the run's folder for `megarlhf replay`.

    bad_batches/step_00000012_policy.safetensors    what the policy's first such step of step 12 was given
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from megarlhf.engine.bad_steps import write_kept
from megarlhf.engine.trainable import TrainEngine
from megarlhf.runs.folder import Run
from megarlhf.storage.files import system_error

BAD_BATCHES = "bad_batches"
MOST_KEPT = 10
"""How many stay, the newest."""


def keep_bad_batches(run: Run, step: int, models: Mapping[str, TrainEngine]) -> None:
    """Write down what the models' steps were given whose loss or gradients were not finite, and say so; rank 0 writes.

    A batch that cannot be written is no reason to stop: that is said.
    """
    for model, engine in models.items():
        bad, engine.bad_step = engine.bad_step, None
        if bad is None or not run.is_writer:
            continue
        folder = run.dir / BAD_BATCHES
        path, partial = folder / f"step_{step:08d}_{model}.safetensors", folder / "unfinished"
        about = {"id": run.id, "stage": run.stage, "tokenizer": dataclasses.asdict(run.tokenizer)}
        said = f"step {step}: {model}'s loss or gradients were not finite"
        try:
            folder.mkdir(exist_ok=True)
            write_kept(partial, bad, engine, model=model, step=step, run=about)
            partial.replace(path)
            _prune(folder)
            run.say(f"{said}; to look into it: megarlhf replay {path}")
        except OSError as error:
            run.say(f"{said}; the batch is not kept: {system_error(error)}")


def _prune(folder: Path) -> None:
    for old in sorted(folder.glob("step_*.safetensors"))[:-MOST_KEPT]:
        old.unlink()
