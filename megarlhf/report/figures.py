"""What a page draws, as plotly's figures: traces and axes are decided here; colours of the theme and smoothing in the browser."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from megarlhf.report.reading import Curve, RunRecord

COLOURS = (
    "#2f7ed8", "#f0801a", "#1fa67a", "#d9366f", "#8561d6", "#0fa3b8", "#a8761c", "#7c8796", "#6a9a1f", "#d15bd1", "#5266c4", "#c2483a",
)  # fmt: skip
DASHES = ("solid", "dash", "dot", "dashdot")
"""For runs beyond the colours, which begin again."""
PHASES = ("#5b8def", "#f2a13b", "#3cb88a", "#e0607e", "#9b7be0", "#31b1c4", "#b88a35", "#8d97a5")
GROUPS = (
    "rollout", "policy", "value", "ptx", "model", "reward", "dpo", "pretraining", "text", "valid", "alert", "throughput", "time", "memory",
)  # fmt: skip
"""Prefixes of metrics in the order of a page; others follow by name."""
MOST_POINTS = 1000
MOST_MARKED = 40
"""Points of a curve that are marked one by one."""
FRONTIERS = (("rollout", "rollout/kl", "rollout/reward_mean"), ("valid", "valid/kl", "valid/reward_mean"))
WITHIN_PHASES = ("time/offload_seconds",)
"""Seconds that the phases have in them: a sum of times has them once."""
LENGTHS = ("rollout/response_len", "valid/response_len", "responses/response_len")


@dataclass(frozen=True)
class Drawn:
    """One figure."""

    group: str
    title: str
    figure: go.Figure
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """What plotly.js takes, with the title; a trace's meta says which run is its own, or whose bars it has in what order."""
        plain = self.figure.to_plotly_json()
        layout = {name: value for name, value in plain["layout"].items() if name != "template"}
        return {"group": self.group, "title": self.title, "note": self.note, "data": list(plain["data"]), "layout": layout}


def curve_figures(runs: Sequence[RunRecord]) -> list[Drawn]:
    """A figure for each metric that any run logged, all runs in it; grouped by what stands before the name's first slash."""
    names = sorted({name for run in runs for name in run.curves}, key=_place)
    return [_curves(name, runs) for name in names]


def frontier(runs: Sequence[RunRecord]) -> list[Drawn]:
    """Reward against KL, step by step, of each run that knows both; single points are evaluations."""
    figure = go.Figure()
    for index, run in enumerate(runs):
        for kind, kl, reward in FRONTIERS:
            steps, x, y = _both(run, kl, reward)
            if not steps:
                continue
            sampled = kind == "rollout"
            figure.add_scatter(
                x=x, y=y, name=_name(run), mode="lines+markers" if sampled else "markers",
                line={"color": colour(index), "width": 0.6, "dash": dash(index)},
                marker=_fading(len(steps), colour(index)) if sampled else {"size": 12, "symbol": "diamond", "color": colour(index)},
                text=[f"{kind}, step {step}" if step else "evaluation" for step in steps],
                hovertemplate="%{text}<br>KL %{x:.4g}<br>reward %{y:.4g}", meta={"run": index},
                showlegend=sampled or "rollout/kl" not in run.curves,
            )  # fmt: skip
    if not figure.data:
        return []
    figure.update_layout(xaxis_title="KL from the reference, nats per response", yaxis_title="mean reward")
    note = "Circles are iterations, the later the darker; diamonds are validation or an evaluation. Up and to the left is better."
    return [Drawn("frontier", "Reward against KL", figure, note)]


def cost_figures(runs: Sequence[RunRecord]) -> list[Drawn]:
    """Where time and memory went, by phase, a bar for each run."""
    seconds = [_by_phase(run, "time/", "_seconds", sum) for run in runs]
    of_a_step = [{phase: total / _num_steps(run) for phase, total in of.items()} for run, of in zip(runs, seconds, strict=True)]
    peaks = [_by_phase(run, "memory/", "peak_bytes", lambda values: max(values, default=0.0) / 2**30) for run in runs]
    names = [_name(run) for run in runs]
    drawn = [
        _bars("Time by phase", names, seconds, "seconds in all", "stack", "All logged steps; saves: what training waited for."),
        _bars("Time of a step by phase", names, of_a_step, "seconds, mean of the steps", "stack", ""),
        _bars("Memory by phase", names, peaks, "GiB at the peak, rank 0", "group", "Peaks come at different times: they are not added up."),
    ]
    return [one for one in drawn if one.figure.data]


def length_figures(runs: Sequence[RunRecord]) -> list[Drawn]:
    """How long responses are: their mean tokens over the steps, and how the written-down ones are spread."""
    over_steps, spread = go.Figure(), go.Figure()
    for index, run in enumerate(runs):
        for name in LENGTHS:
            if name in run.curves:
                validation = not name.startswith("rollout")
                over_steps.add_scatter(**_line(run, index, run.curves[name], f"{_name(run)} (valid)" if validation else _name(run)))
        if run.samples:
            characters = [len(sample["response"]) for sample in run.samples]
            style = {"line": {"color": colour(index)}, "boxpoints": False, "hoverinfo": "x"}
            spread.add_box(x=characters, name=_name(run), meta={"run": index}, **style)
    over_steps.update_layout(xaxis_title="step", yaxis_title="tokens, mean")
    spread.update_layout(xaxis_title="characters of a response", yaxis={"autorange": "reversed"}, showlegend=False)
    note = "Of the responses that the runs wrote down: box from the first to the third quarter, a line at the median."
    drawn = [Drawn("lengths", "Response length", over_steps), Drawn("lengths", "Spread of response lengths", spread, note)]
    return [one for one in drawn if one.figure.data]


def thinned(curve: Curve, most: int = MOST_POINTS) -> tuple[list[int], list[float | None]]:
    """(steps, values) of a curve with at most `most` points: the smallest and the largest of each of `most` / 2 equal stretches.

    So peaks and valleys stay; a value that was not finite is the smallest, and a gap.
    """
    count = len(curve.steps)
    if count <= most:
        return list(curve.steps), list(curve.values)
    stretches = most // 2

    def height(at: int) -> float:
        return -math.inf if curve.values[at] is None else curve.values[at]

    kept: list[int] = []
    for stretch in range(stretches):
        inside = range(stretch * count // stretches, (stretch + 1) * count // stretches)
        kept += sorted({min(inside, key=height), max(inside, key=height)})
    return [curve.steps[at] for at in kept], [curve.values[at] for at in kept]


def colour(index: int) -> str:
    """Of a run, by its place among the runs."""
    return COLOURS[index % len(COLOURS)]


def dash(index: int) -> str:
    """Of a run's lines."""
    return DASHES[index // len(COLOURS) % len(DASHES)]


def _place(name: str) -> tuple[int, str]:
    prefix = name.split("/", 1)[0]
    return (GROUPS.index(prefix) if prefix in GROUPS else len(GROUPS), name)


def _curves(name: str, runs: Sequence[RunRecord]) -> Drawn:
    figure = go.Figure([go.Scatter(**_line(run, at, run.curves[name])) for at, run in enumerate(runs) if name in run.curves])
    figure.update_layout(xaxis_title="step")
    return Drawn(name.split("/", 1)[0], name, figure)


def _line(run: RunRecord, index: int, curve: Curve, label: str | None = None) -> dict[str, Any]:
    steps, values = thinned(curve)
    marked = len(steps) <= MOST_MARKED
    style = {"color": colour(index), "width": 1.75, "dash": dash(index) if label in (None, _name(run)) else "dot"}
    mode = "lines+markers" if marked else "lines"
    return {
        "x": steps, "y": values, "name": label or _name(run), "mode": mode, "line": style, "marker": {"size": 4 if len(steps) > 1 else 9},
        "meta": {"run": index, "smooth": True},
    }  # fmt: skip


def _fading(count: int, of: str) -> dict[str, Any]:
    """Markers, the later the more opaque."""
    return {"size": 7, "color": of, "opacity": [1 - 0.8 * (count - 1 - at) / count for at in range(count)]}


def _both(run: RunRecord, kl: str, reward: str) -> tuple[list[int], list[float], list[float]]:
    """(steps, KL, reward) where a run knows both; step 0 stands for an evaluation."""
    if kl in run.results and reward in run.results:
        return [0], [run.results[kl]], [run.results[reward]]
    if kl not in run.curves or reward not in run.curves:
        return [], [], []
    of_kl, of_reward = (dict(zip(curve.steps, curve.values, strict=True)) for curve in (run.curves[kl], run.curves[reward]))
    steps = [step for step in of_kl if of_kl[step] is not None and of_reward.get(step) is not None]
    steps = steps[:: max(1, -(-len(steps) // MOST_POINTS))]
    return steps, [of_kl[step] for step in steps], [of_reward[step] for step in steps]


def _by_phase(run: RunRecord, prefix: str, suffix: str, of: Callable[[Iterable[float]], float]) -> dict[str, float]:
    """Phase -> number; memory that belongs to no phase is "process"."""
    found = {}
    for name, curve in run.curves.items():
        if name.startswith(prefix) and name.endswith(suffix) and name not in WITHIN_PHASES:
            found[name.removeprefix(prefix).removesuffix(suffix).strip("_") or "process"] = of(curve.finite)
    return found


def _num_steps(run: RunRecord) -> int:
    return max((len(curve.steps) for curve in run.curves.values()), default=1)


def _bars(title: str, names: Sequence[str], of_runs: Sequence[dict[str, float]], axis: str, mode: str, note: str) -> Drawn:
    """A bar for each run that has numbers, its parts by phase."""
    figure = go.Figure()
    for index, phase in enumerate(dict.fromkeys(phase for phases in of_runs for phase in phases)):
        having = [at for at, phases in enumerate(of_runs) if phase in phases]
        figure.add_bar(
            y=[names[at] for at in having], x=[of_runs[at][phase] for at in having], name=phase, orientation="h",
            marker={"color": PHASES[index % len(PHASES)]}, meta={"runs": having},
            hovertemplate="%{y}: " + phase + " %{x:.4g}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(barmode=mode, xaxis_title=axis, yaxis={"autorange": "reversed", "type": "category"}, showlegend=True)
    return Drawn("costs", title, figure, note)


def _name(run: RunRecord) -> str:
    """A run's label in a figure: plotly takes tags and entities in its texts for what they say."""
    return html.escape(run.label, quote=False)
