"""One step of a run as a trace for a browser: what ran when, under the names of its phases."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from megarlhf.config import ConfigError
from megarlhf.parallel import platform
from megarlhf.runs.folder import Run
from megarlhf.storage.files import system_error

PROFILES = "profiles"


def refuse_late_profile(run: Run, total_steps: int) -> None:
    """ConfigError where the step to be profiled never comes; the same on every rank."""
    if run.config.profile_step > total_steps:
        raise ConfigError(f"run.profile_step {run.config.profile_step} comes after the run's last step, {total_steps}")


@contextlib.contextmanager
def profiled(run: Run, step: int) -> Iterator[None]:
    """Where `step` is run.profile_step, what is done inside is written to <run.dir>/profiles, a file for each rank.

    A file that cannot be written is no reason to end the run: that is said.
    """
    if run.config.profile_step != step:
        yield
        return
    with torch.profiler.profile(activities=platform.profiler_activities()) as profiler:
        yield
    path = run.dir / PROFILES / f"step_{step:08d}_rank_{run.world.rank:05d}.json.gz"
    partial = path.with_name(f"partial_{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(partial))
        partial.replace(path)
    except OSError as error:
        run.say(f"step {step}: its profile is not written: {system_error(error)}")
    else:
        run.say(f"step {step}: profiled in {path} (for ui.perfetto.dev or chrome://tracing)")
