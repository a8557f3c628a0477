"""What the miniature measured, as tables: of a finished run, or of one that is still going, as far as it has come."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from labelling import GROUPS, Judgement, Labeller, judge, labellers
from make_data import SEED, read_lines
from stages import CHOSEN, CURVES, POINTS, SWEEPS, SYSTEMS
from world import World, request_of

from megarlhf.evaluation.intervals import mean_interval

Interval = tuple[float, float, float]
"""(mean, low, high), 95 %."""
METADATA = ("attempts_instruction", "follows_constraints", "hallucination", "appropriate")
TASKS = ("asked", "unasked", "sums")
PANELS = tuple((group, prompts) for group in ("training", "held-out") for prompts in ("all", "customers'"))
"""Labellers, and which held-out users' prompts (Figure 3)."""


DONE = "stages.jsonl"
"""A line for each finished stage: its name, and the seconds that it took."""


def finished(runs: Path) -> dict[str, float]:
    """The seconds that each finished stage took, by its name."""
    return {line["name"]: line["seconds"] for line in read_lines(runs / DONE)} if (runs / DONE).exists() else {}


class Results:
    """What a runs folder holds, by size and system; what is not there yet is left out everywhere."""

    def __init__(self, runs: Path, sizes: Sequence[str]):
        """Look at the folder."""
        self.runs, self.world, self.people = runs, World(SEED), labellers(SEED)
        folders = [(size, system) for size in sizes for system in (*SYSTEMS, "ppo_ptx_2")]
        self.systems = [(size, system) for size, system in folders if (self.folder(size, system) / "evaluation.json").exists()]
        self.largest = max((size for size, system in self.systems if system == "sft"), key=list(sizes).index, default=None)

    def folder(self, size: str, system: str) -> Path:
        """Where a system's answers lie."""
        return self.runs / size / "answers" / system

    def answers(self, size: str, system: str) -> list[dict]:
        """Its answers to held-out users' prompts."""
        return read_lines(self.folder(size, system) / "responses.jsonl")

    def graded(self, rows: Sequence[Sequence[dict]], people: Sequence[Labeller]) -> Iterator[tuple[list[int], list[Judgement]]]:
        """Grades and exact judgements of several systems' answers to each prompt, by one labeller drawn for it."""
        for number, answers in enumerate(zip(*rows, strict=True)):
            rng = random.Random(f"comparison {number}")
            person, texts = rng.choice(people), [row["response"] for row in answers]
            judged = [judge(self.world, request_of(answers[0]), text) for text in texts]
            yield person.grades(judged, texts, rng), judged

    def win_rate(self, one: tuple[str, str], other: tuple[str, str], group: str = "training", prompts: str = "all") -> Interval:
        """How often labellers of a group prefer one system's answers; a tie is half a win. A system against itself: one half."""
        if one == other:
            return 0.5, 0.5, 0.5
        rows = [[row for row in self.answers(*system) if prompts == "all" or row["kind"] == "user-based"] for system in (one, other)]
        return mean_interval([0.5 * (a == b) + (a > b) for (a, b), _ in self.graded(rows, self.people[group])])

    def win_rates(self, group: str = "training", prompts: str = "all") -> dict[tuple[str, str], Interval]:
        """Of every system against the largest SFT baseline (Figures 1 and 3)."""
        return {system: self.win_rate(system, (self.largest, "sft"), group, prompts) for system in self.systems} if self.largest else {}

    def likert(self, size: str, system: str, group: str = "training") -> Interval:
        """Mean grade (Figures 5 and 31)."""
        values = mean_interval([(grades[0] - 1) / 6 for grades, _ in self.graded([self.answers(size, system)], self.people[group])])
        return tuple(1 + 6 * value for value in values)

    def metadata(self, size: str, system: str) -> dict[str, Interval]:
        """Share of answers with each of the booleans (Figure 4)."""
        judged = [judge(self.world, request_of(row), row["response"]) for row in self.answers(size, system)]
        return {name: mean_interval([float(getattr(one, name)) for one in judged]) for name in METADATA}

    def measured(self, folder: Path) -> dict[str, float]:
        """The numbers of a `megarlhf evaluate`."""
        return json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))

    def sweep(self, name: str) -> dict[str, dict[str, float]]:
        """Point -> numbers of a sweep, among them those of the smallest size's ppo_ptx and ppo."""
        size = next((size for size, system in self.systems if system == "ppo_ptx"), None)
        if size is None:
            return {}
        ptx, plain, swept = self.folder(size, "ppo_ptx"), self.folder(size, "ppo"), self.runs / "sweeps" / "answers" / name
        folders = {CHOSEN[name]: ptx if name in ("ptx_coef", "learning_rate") else plain} | {point: swept / point for point in POINTS[name]}
        folders |= {"0": plain} if name == "ptx_coef" else {}
        found = {point: folder for point, folder in folders.items() if (folder / "evaluation.json").exists()}
        return {point: self.point(found[point]) for point in sorted(found, key=float)} if len(found) > 1 else {}

    def before_tuning(self) -> dict[str, float]:
        """Tasks and text loss of the base model of the size that is swept: what a sweep's points lose or keep."""
        size = next((size for size, system in self.systems if system == "base"), None)
        numbers = self.point(self.folder(size, "base")) if size else {}
        return {name: value for name, value in numbers.items() if name in (*TASKS, "text loss")}

    def point(self, folder: Path) -> dict[str, float]:
        """What one point of a sweep is shown by."""
        numbers = self.measured(folder)
        rows = [read_lines(folder / "responses.jsonl")]
        grades = [grades[0] for grades, _ in self.graded(rows, self.people["training"])]
        tasks = {name: numbers[f"tasks/{name}/accuracy"] for name in TASKS}
        return {
            "reward": numbers["valid/reward_mean"],
            "Likert": sum(grades) / len(grades),
            **tasks,
            "text loss": numbers["valid/text_loss"],
        }

    def reward_accuracy(self, number: int) -> dict[str, list[float]]:
        """Accuracies on held-out users' prompts, by groups that a reward model was trained on, the one left out, held-out labellers."""
        found: dict[str, list[float]] = {"trained on": [], "left out": [], "held-out labellers": []}
        for group in ("", *map(str, range(GROUPS))):
            folder = self.runs / f"round_{number}" / (f"without_{group}" if group else "") / "accuracy"
            if not (folder / "evaluation.json").exists():
                continue
            numbers = self.measured(folder)
            for of in (*map(str, range(GROUPS)), "held-out"):
                row = "held-out labellers" if of == "held-out" else "left out" if of == group else "trained on"
                found[row] += [numbers[key] for key in (f"valid/accuracy_of_group/{of}",) if key in numbers]
        return {name: values for name, values in found.items() if values}

    def curve(self, folder: str) -> list[tuple[float, float, float]]:
        """(share of the run, loss, accuracy) of a reward model that is trained to its end, on held-out users' prompts on the way."""
        lines = read_lines(self.runs / folder / "metrics.jsonl") if folder in finished(self.runs) else []
        points = [(line["step"], line["valid/ranking_loss"], line["valid/accuracy"]) for line in lines if "valid/ranking_loss" in line]
        return [(step / points[-1][0], loss, accuracy) for step, loss, accuracy in points]


def shown(value: Interval, digits: int = 3) -> str:
    """0.527 [0.481, 0.573]."""
    mean, low, high = value
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def ordering(rates: dict[str, Interval]) -> str:
    """The systems in the paper's order: ">" above with intervals apart, ">=" above within them, "=<" and "<" below likewise."""
    names = [name for name in ("ppo_ptx", "ppo", "sft", "prompted", "base") if name in rates]
    text = "".join(names[:1])
    for one, other in zip(names, names[1:], strict=False):
        (a, a_low, a_high), (b, b_low, b_high) = rates[one], rates[other]
        text += f" {'>' if a_low > b_high else '<' if a_high < b_low else '>=' if a >= b else '=<'} {other}"
    return text


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown under its title, and an empty line; nothing where there are no rows."""
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return [f"### {title}", "", lines[0], "|---" * len(header) + "|", *lines[1:], ""] if rows else []


def of_systems(found: Results) -> list[str]:
    """Win rates, grades, metadata and the alignment tax."""
    lines = []
    if found.largest:
        panels = {panel: found.win_rates(*panel) for panel in PANELS}
        rows = [(*system, *(shown(panels[panel][system]) for panel in PANELS)) for system in found.systems]
        names = [f"{group} labellers, {prompts} prompts" for group, prompts in PANELS]
        lines += table(f"Win rate against the {found.largest} SFT (Figures 1 and 3)", ("size", "system", *names), rows)
        for group in ("training", "held-out"):
            for size in dict.fromkeys(size for size, _ in found.systems):
                rates = {system: rate for (of, system), rate in panels[group, "all"].items() if of == size}
                lines.append(f"- {size}, {group} labellers: {ordering(rates)}")
        pairs = [((size, "ppo_ptx"), (found.largest, other)) for size, name in found.systems if name == "ppo_ptx" for other in SYSTEMS[:3]]
        rows = [(" ".join(one), " ".join(other), shown(found.win_rate(one, other))) for one, other in pairs if other in found.systems]
        lines += ["", *table("Head to head (section 4.1)", ("system", "against", "win rate, training labellers"), rows)]
    rows = []
    for system in found.systems:
        metadata = found.metadata(*system).values()
        rows.append((*system, shown(found.likert(*system), 2), shown(found.likert(*system, "held-out"), 2), *map(shown, metadata)))
    header = ("size", "system", "Likert, training labellers", "Likert, held-out", *(name.replace("_", " ") for name in METADATA))
    lines += table("Grades and metadata (Figures 4, 5 and 31)", header, rows)
    rows = []
    for size, system in found.systems:
        if system != "prompted":  # the base model itself
            numbers = found.measured(found.folder(size, system))
            tasks = [shown(tuple(numbers[f"tasks/{name}/accuracy{end}"] for end in ("", "_low", "_high"))) for name in TASKS]
            rows.append((size, system, *tasks, f"{numbers['valid/text_loss']:.3f}"))
    title = "Alignment tax (Table 14): tasks zero-shot, nats per token of held-out text"
    return lines + table(title, ("size", "system", *TASKS, "text loss"), rows)


def of_reward_models(found: Results) -> list[str]:
    """Agreement of labellers, accuracy by their group, overfitting."""
    lines = []
    for number in (1, 2):
        path = found.runs / f"round_{number}" / "labels" / "agreement.json"
        if path.exists():
            rows = [(name, shown(tuple(value))) for name, value in json.loads(path.read_text(encoding="utf-8")).items()]
            lines += table(f"Agreement of labellers about round {number}'s answers (section 3.4)", ("labellers", "agreement"), rows)
        accuracy = found.reward_accuracy(number)
        rows = [(name, f"{sum(v) / len(v):.3f}", f"{min(v):.3f} to {max(v):.3f}", str(len(v))) for name, v in accuracy.items()]
        title = f"Reward models of round {number}: accuracy by labellers (section 4.1)"
        lines += table(title, ("comparisons by", "mean", "range", "number"), rows)
    rows = []
    for name, folder in CURVES.items():
        if curve := found.curve(folder):
            best = min(curve, key=lambda point: point[1])
            rows.append((name, f"{best[1]:.4f} after {best[0]:.0%} of the run", f"{curve[-1][1]:.4f}", f"{curve[-1][2]:.3f}"))
    header = ("reward model", "smallest held-out loss", "last", "last accuracy")
    return lines + table("Overfitting of reward models (section 3.5, Appendix C.2)", header, rows)


def of_sweeps(found: Results) -> list[str]:
    """The sweeps, at the smallest size."""
    lines = []
    for name in SWEEPS:
        rows = [(point, *(f"{value:.3f}" for value in numbers.values())) for point, numbers in found.sweep(name).items()]
        if rows:
            lines += table(f"Sweep of {name} ({SWEEPS[name]})", (name, *next(iter(found.sweep(name).values()))), rows)
    return lines


def tables(found: Results) -> str:
    """All of them in Markdown."""
    return "\n".join([*of_systems(found), *of_reward_models(found), *of_sweeps(found)]) + "\n"
