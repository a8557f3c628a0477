"""The miniature's figures as PNG, drawn by matplotlib: each in the shape of one of the paper's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from stages import CURVES, SWEEPS

if TYPE_CHECKING:
    from results import Interval, Results

NAMES = {
    "ppo_ptx": "PPO-ptx",
    "ppo_ptx_2": "PPO-ptx, 2nd round",
    "ppo": "PPO",
    "sft": "SFT",
    "task_mix": "task mix",
    "prompted": "base, prompted",
    "base": "base",
}
COLOURS = dict(zip(NAMES, ("#c0392b", "#7b241c", "#e67e22", "#2874a6", "#7d8a2e", "#8e7cc3", "#888888"), strict=True))
"""By system, in the order of the legend."""


def draw(found: Results, folder: Path) -> list[Path]:
    """Draw all that there are numbers for; returns the files."""
    figures: dict[str, Callable[[Results], Figure | None]] = {
        "win_rate": win_rate,
        "grades": grades,
        "tax": tax,
        "sweeps": sweeps,
        "reward_models": reward_models,
    }
    folder.mkdir(exist_ok=True)
    written = []
    for name, figure in figures.items():
        if drawn := figure(found):
            FigureCanvasAgg(drawn)
            drawn.savefig(folder / f"{name}.png", dpi=110)
            written.append(folder / f"{name}.png")
    return written


def panels(columns: int, rows: int = 1, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """An empty figure of so many panels."""
    figure = Figure(figsize=(3.4 * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for one in axes:
        one.grid(axis="y", alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def by_size(axes: Axes, values: dict[tuple[str, str], Interval]) -> None:
    """A line for each system over the sizes, with intervals."""
    sizes = list(dict.fromkeys(size for size, _ in values))
    for shift, name in enumerate(NAMES):
        points = [(sizes.index(size), value) for (size, system), value in values.items() if system == name]
        if points:
            x = [place + 0.04 * (shift - 3) for place, _ in points]
            mean, low, high = zip(*(value for _, value in points), strict=True)
            ends = ((mean, low), (high, mean))
            errors = [[max(0.0, far - near) for far, near in zip(*pair, strict=True)] for pair in ends]  # of none in n: rounding
            axes.errorbar(x, mean, errors, marker="o", ms=4, capsize=2, color=COLOURS[name], label=NAMES[name])
    axes.set_xticks(range(len(sizes)), sizes)
    axes.set_xlim(-0.4, len(sizes) - 0.6)


def name_systems(figure: Figure, axes: Axes) -> None:
    """The names of the lines of `axes` below all panels, where they hide no point."""
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, ncols=len(NAMES), loc="outside lower center", frameon=False)


def win_rate(found: Results) -> Figure | None:
    """Figures 1 and 3: against the largest SFT baseline, by labellers and by whose prompts."""
    if not found.largest:
        return None
    figure, axes = panels(4)
    for one, (group, prompts) in zip(axes, ((g, p) for g in ("training", "held-out") for p in ("all", "customers'")), strict=True):
        by_size(one, found.win_rates(group, prompts))
        one.axhline(0.5, color="black", lw=0.6)
        one.set_ylim(0, 1)
        one.set_title(f"{group} labellers, {prompts} prompts", fontsize=9)
    axes[0].set_ylabel(f"win rate against {found.largest} SFT")
    name_systems(figure, axes[0])
    return figure


def grades(found: Results) -> Figure | None:
    """Figures 4, 5 and 31: mean grade, and the share of answers with each of the metadata."""
    if not found.systems:
        return None
    metadata = {system: found.metadata(*system) for system in found.systems}
    names = list(next(iter(metadata.values())))
    figure, axes = panels(len(names) + 1)
    by_size(axes[0], {system: found.likert(*system) for system in found.systems})
    axes[0].set_title("Likert, 1 to 7", fontsize=9)
    name_systems(figure, axes[0])
    for one, name in zip(axes[1:], names, strict=True):
        by_size(one, {system: values[name] for system, values in metadata.items()})
        one.set_ylim(0, 1)
        one.set_title(name.replace("_", " "), fontsize=9)
    return figure


def tax(found: Results) -> Figure | None:
    """Table 14 and Figures 28 and 29: tasks, and the loss on held-out text."""
    numbers = {(size, name): found.measured(found.folder(size, name)) for size, name in found.systems if name != "prompted"}
    if not numbers:
        return None
    figure, axes = panels(4)
    for one, name in zip(axes, ("asked", "unasked", "sums"), strict=False):
        key = f"tasks/{name}/accuracy"
        by_size(one, {system: (row[key], row[f"{key}_low"], row[f"{key}_high"]) for system, row in numbers.items()})
        one.axhline(0.25, color="black", lw=0.6)
        one.set_ylim(0, 1.03)
        one.set_title(f"{name}: accuracy (chance 0.25)", fontsize=9)
    by_size(axes[3], {system: (row["valid/text_loss"],) * 3 for system, row in numbers.items()})
    axes[3].set_title("held-out text, nats per token", fontsize=9)
    name_systems(figure, axes[0])
    return figure


def sweeps(found: Results) -> Figure | None:
    """Figures 33, 34 and 38: a row of panels for each sweep; dashed, what the base model has."""
    points = {name: found.sweep(name) for name in SWEEPS if found.sweep(name)}
    if not points:
        return None
    base = found.before_tuning()
    figure, axes = panels(4, len(points), height=2.8)
    for row, (name, values) in enumerate(points.items()):
        of_row, labels = axes[4 * row : 4 * row + 4], list(values)
        for one, keys in zip(of_row, (("reward",), ("Likert",), ("asked", "unasked", "sums"), ("text loss",)), strict=True):
            for key in keys:
                (line,) = one.plot(range(len(labels)), [values[point][key] for point in labels], marker="o", ms=4, label=key)
                if key in base:
                    one.axhline(base[key], color=line.get_color(), ls="--", lw=0.8)
            one.set_xticks(range(len(labels)), labels)
            one.set_title(", ".join(keys), fontsize=9)
            one.set_xlabel(name, fontsize=8)
        of_row[2].legend(fontsize=7)
    return figure


def reward_models(found: Results) -> Figure | None:
    """Section 4.1 and Appendix C.2: accuracy by labellers, and held-out loss over training."""
    curves = {name: found.curve(folder) for name, folder in CURVES.items() if found.curve(folder)}
    if not curves:
        return None
    figure, (bars, loss, accuracy) = panels(3)
    for number in (1, 2):
        if not (values := found.reward_accuracy(number)):
            continue
        x = [place + 0.25 * (number - 1) for place in range(len(values))]
        bars.bar(x, [sum(v) / len(v) for v in values.values()], width=0.22, label=f"round {number}")
        bars.set_xticks(range(len(values)), list(values), fontsize=8)
    bars.set_ylim(0.5, 1)
    bars.set_title("accuracy by labellers", fontsize=9)
    bars.legend(fontsize=7)
    for name, points in curves.items():
        share, losses, right = zip(*points, strict=True)
        loss.plot(share, losses, label=name)
        accuracy.plot(share, right, label=name)
    loss.set_title("held-out ranking loss", fontsize=9)
    accuracy.set_title("held-out accuracy", fontsize=9)
    for one in (loss, accuracy):
        one.set_xlabel("share of the training", fontsize=8)
    loss.legend(fontsize=7)
    return figure
