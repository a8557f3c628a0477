"""The page: everything that it shows, gathered from the runs, and put into its template with every text escaped."""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from megarlhf import __version__
from megarlhf.report.figures import MOST_POINTS, WITHIN_PHASES, colour, cost_figures, curve_figures, frontier, length_figures
from megarlhf.report.reading import RunRecord
from megarlhf.report.rules import RULES, warnings_of

MOST_SAMPLES = 500
"""Of a run: evenly spaced over what it wrote down, the newest among them."""
MOST_CHARACTERS = 2000
"""Of a prompt or a response."""
SHOWN = (
    ("reward", ("rollout/reward_mean", "valid/reward_mean", "responses/reward_mean")),
    ("KL", ("rollout/kl", "valid/kl")),
    ("loss", ("valid/loss", "valid/ranking_loss", "valid/dpo_loss", "model/loss", "reward/loss", "dpo/loss")),
    ("text loss", ("valid/text_loss", "ptx/loss")),
    ("accuracy", ("valid/accuracy", "reward/accuracy", "dpo/accuracy")),
)
"""Columns of the summary: the newest value of the first of these metrics that a run has."""
RESULTS = ("valid/", "responses/", "tasks/", "win_rate/")


def page(runs: Sequence[RunRecord], now: datetime.datetime) -> str:
    """The whole page as HTML that needs nothing else; `now` is when it was made."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    scripts = [get_plotlyjs().replace("\r\n", "\n"), _piece("page.js")]
    figures = [*frontier(runs), *cost_figures(runs), *length_figures(runs), *curve_figures(runs)]
    warnings = [warning for run in runs for warning in warnings_of(run)]
    return environment.from_string(_piece("page.html")).render(
        policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; script-src {' '.join(map(_hash, scripts))}",
        style=Markup(_piece("page.css")),
        scripts=[Markup(script) for script in scripts],
        data=_json({"figures": [figure.as_json() for figure in figures], "samples": samples(runs), "runs": _chips(runs)}),
        groups=list(dict.fromkeys(figure.group for figure in figures)),
        runs=runs,
        chips=_chips(runs),
        warnings=warnings,
        rules=RULES,
        summary=summary(runs),
        lacks=lacks(runs),
        results=results(runs),
        configuration=configuration(runs),
        environment=environment_rows(runs),
        has_samples=any(run.samples for run in runs),
        limits={"points": MOST_POINTS, "samples": MOST_SAMPLES, "characters": MOST_CHARACTERS},
        version=__version__,
        now=_moment(now.timestamp()),
    )


def samples(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Prompts and their answers by run, those first that most runs answered: [run, step, reward, KL, finished, text]."""
    by_prompt: dict[str, list[list[Any]]] = {}
    for index, run in enumerate(runs):
        for sample in _spread(run.samples):
            answer = [index, sample.get("step"), _number(sample.get("reward")), _number(sample.get("kl")), sample.get("finished")]
            by_prompt.setdefault(_cut(sample["prompt"].strip()), []).append([*answer, _cut(sample["response"].strip())])
    rows = [{"prompt": prompt, "answers": answers} for prompt, answers in by_prompt.items()]
    return sorted(rows, key=lambda row: -len({answer[0] for answer in row["answers"]}))


def summary(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Header and rows of the summary: what each run is, how far, and its newest numbers."""
    rows = []
    for run in runs:
        seconds = sum(sum(curve.finite) for name, curve in run.curves.items() if name.startswith("time/") and name not in WITHIN_PHASES)
        newest = _newest(run)
        numbers = [next((_shown(newest[name]) for name in names if name in newest), "-") for _, names in SHOWN]
        saved = f"step {run.checkpoints[-1]}" if run.checkpoints else "-"
        best = f", best {run.best}" if run.best is not None else ""
        rows.append([run.stage, _progress(run), _moment(run.written), saved + best, _duration(seconds), *numbers])
    return {"header": ["stage", "step", "last wrote", "checkpoint", "time", *(name for name, _ in SHOWN)], "rows": rows}


def lacks(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """What is not there or not whole -> the runs that lack it."""
    found: dict[str, list[str]] = {}
    for run in runs:
        for sentence in run.lacks:
            found.setdefault(sentence, []).append(run.label)
    return found


def results(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """The newest value of each number that is measured now and then, by run."""
    newest = [_newest(run) for run in runs]
    with_figures = {name for run in runs for name in run.curves}
    names = sorted({name for of in newest for name in of if name.startswith(RESULTS) or name not in with_figures})
    return [{"key": name, "values": [_shown(of[name]) if name in of else None for of in newest], "differs": False} for name in names]


def configuration(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Every key with its value in each run; "differs" where two runs of one stage do not agree, their folders apart."""
    stages = [[run for run in runs if run.stage == stage] for stage in dict.fromkeys(run.stage for run in runs)]

    def differs(key: str) -> bool:
        return key != "run.dir" and any(len({_value(run.config.get(key, _ABSENT)) for run in of}) > 1 for of in stages)

    return _table([run.config for run in runs], differs)


def environment_rows(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """What each run was started on; "differs" where the runs that say it do not agree."""
    found = [run.environment for run in runs]
    return _table(found, lambda key: len({_value(of[key]) for of in found if key in of}) > 1)


_ABSENT = object()


def _table(columns: Sequence[Mapping[str, Any]], differs: Callable[[str], bool]) -> list[dict[str, Any]]:
    keys = dict.fromkeys(key for column in columns for key in column)
    return [
        {"key": key, "values": [_value(column[key]) if key in column else None for column in columns], "differs": differs(key)}
        for key in keys
    ]


def _chips(runs: Sequence[RunRecord]) -> list[dict[str, str]]:
    return [{"label": run.label, "colour": colour(index), "stage": run.stage} for index, run in enumerate(runs)]


def _newest(run: RunRecord) -> dict[str, float]:
    return {name: curve.finite[-1] for name, curve in run.curves.items() if curve.finite} | dict(run.results)


def _progress(run: RunRecord) -> str:
    if run.last_step is None:
        return "-"
    return f"{run.last_step} of {run.total_steps}" if run.total_steps else str(run.last_step)


def _spread(of: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    count = len(of)
    return [of[-1 - at * count // MOST_SAMPLES] for at in range(MOST_SAMPLES)] if count > MOST_SAMPLES else list(reversed(of))


def _cut(text: str) -> str:
    rest = len(text) - MOST_CHARACTERS
    return f"{text[:MOST_CHARACTERS]} ... ({rest} more characters)" if rest > 0 else text


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) else None


def _shown(value: float) -> str:
    return f"{value:.4g}"


def _value(value: object) -> str:
    """A value of a configuration as YAML writes it on one line."""
    return value if isinstance(value, str) else "(absent)" if value is _ABSENT else json.dumps(value, default=str)


def _moment(seconds: float | None) -> str:
    return "-" if seconds is None else datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if seconds else "-"


def _piece(name: str) -> str:
    return (files("megarlhf.report") / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """A script's name in a content security policy: no other script runs, whatever a response says."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _json(value: object) -> Markup:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
