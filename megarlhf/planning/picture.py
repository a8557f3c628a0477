"""A plan as a picture: memory of every phase against the limit, and what the time of a step goes into."""

from __future__ import annotations

from pathlib import Path

from megarlhf.planning.dry_run import OF_PHASES, tags_by_kind
from megarlhf.planning.estimate import TERMS
from megarlhf.planning.hardware import GB
from megarlhf.planning.holdings import KINDS
from megarlhf.planning.plan import OF_A_STEP, Plan


def draw(plan: Plan, path: Path) -> None:
    """Write the picture to `path`; its ending says in which form. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    memory, time = figure.subplots(1, 2)
    _memory(plan, memory)
    _time(plan, time)
    figure.suptitle(f"{plan.models.config.stage} on {plan.cluster}")
    figure.savefig(path, dpi=110)


def _memory(plan: Plan, axes) -> None:
    peaks = {phase: tags_by_kind(plan.runs[plan.peak(phase)[1]].peaks[phase]) for phase in plan.phases}
    _stack(axes, peaks, [*KINDS, *OF_PHASES], GB)
    axes.axhline(plan.cluster.usable_bytes / GB, color="black", linestyle="--")
    axes.text(0.5, plan.cluster.usable_bytes / GB + 0.5, "limit")
    axes.set_ylabel("GB live at the peak, of the rank that holds most")
    axes.set_title("memory of each phase")


def _time(plan: Plan, axes) -> None:
    phases = [phase for phase in OF_A_STEP if phase in plan.phases and sum(plan.phase_seconds(phase).values())]
    _stack(axes, {phase: plan.phase_seconds(phase) for phase in phases}, list(TERMS), 1.0)
    axes.set_ylabel("seconds")
    axes.set_title(f"time of a step ({plan.step_seconds:.0f} s)")


def _stack(axes, bars: dict, kinds: list[str], unit: float) -> None:
    bottoms = [0.0] * len(bars)
    for kind in kinds:
        heights = [bar[kind] / unit for bar in bars.values()]
        if any(heights):
            axes.bar(list(bars), heights, bottom=bottoms, label=kind)
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.tick_params(axis="x", labelsize=8)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
