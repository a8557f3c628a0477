"""The miniature's stages, one after the other in one process; a stage that is done is passed over, an interrupted one goes on."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import figures
from label import label
from make_data import write_data
from results import DONE, Results, finished, tables
from stages import HEAVIER, SMOKE, Form, Stage, of_hours, selected, stages

import megarlhf
from megarlhf.report.command import main as report

HERE = Path(__file__).resolve().parent

def run_stage(stage: Stage) -> None:
    """Run one stage to its end."""
    if stage.command == "label":
        words = dict(word.split("=") for word in stage.overrides)
        label(Path(words["answers"]), Path(stage.name), before=Path(words["before"]) if "before" in words else None)
        return
    words = [*stage.overrides, f"run.dir={stage.name}"]
    getattr(megarlhf, stage.command)(megarlhf.load(stage.command, HERE / f"{stage.command}.yaml", words))


def hours(minutes: float) -> str:
    """As "2 h 05 min" or "3 min"."""
    whole = max(1, round(minutes))
    return f"{whole // 60} h {whole % 60:02} min" if whole >= 60 else f"{whole} min"


def run_all(table: Sequence[Stage]) -> None:
    """Run what is left, saying before each stage what it is and how long it and all the rest will take.

    The guess is the table's minutes, times what the stages that are done have taken in proportion to theirs.
    """
    done = finished(Path())
    for number, stage in enumerate(table, start=1):
        if stage.name in done:
            continue
        expected = sum(other.minutes for other in table if other.name in done)
        pace = sum(done[other.name] for other in table if other.name in done) / 60 / expected if expected else 1.0
        left = pace * sum(other.minutes for other in table if other.name not in done)
        print(f"== {number} of {len(table)}: {stage.command} {stage.name}, {hours(pace * stage.minutes)} of {hours(left)}", flush=True)
        started = time.monotonic()
        run_stage(stage)
        done[stage.name] = time.monotonic() - started
        with Path(DONE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": stage.name, "seconds": round(done[stage.name], 1)}) + "\n")


ASKED = Path("asked.json")
"""What was asked for when the folder was begun."""


def begun(args: argparse.Namespace) -> dict:
    """What the folder goes on with: what it was begun with, or what is asked for now."""
    asked = {"smoke": args.smoke, "hours": args.hours, "sizes": args.sizes}
    before = json.loads(ASKED.read_text(encoding="utf-8")) if ASKED.exists() else asked
    if before != asked and (args.smoke or args.hours or args.sizes):
        raise SystemExit(f"{args.runs} was begun with {before}: leave these out to go on with it, or name other --runs")
    return before


def main(argv: Sequence[str] | None = None) -> None:
    """Run the miniature, or what is left of it."""
    parser = argparse.ArgumentParser(prog="run.sh", description="InstructGPT in miniature.")
    parser.add_argument("--runs", type=Path, default=Path("runs/miniature"), help="the folder of everything (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a few steps of each stage of tiny models")
    parser.add_argument("--hours", type=float, help="scale the steps so that it takes so long on one core")
    parser.add_argument("--sizes", nargs="+", choices=list(HEAVIER), help="which sizes (default: small middle large)")
    parser.add_argument("--look", action="store_true", help="run nothing: tables, figures and report of what there is so far")
    only = "stages whose folders begin so, their models' answers, and what they need: sweeps/ptx_coef, small"
    parser.add_argument("--only", metavar="NAME", help=only)
    args = parser.parse_args(argv)
    args.runs.mkdir(parents=True, exist_ok=True)
    os.chdir(args.runs)
    asked, data = begun(args), Path("data")
    sizes = sorted(asked["sizes"] or ["small", "middle", "large"], key=list(HEAVIER).index)
    form = SMOKE if asked["smoke"] else Form()
    if asked["hours"]:
        try:
            form = of_hours(sizes, asked["hours"])
        except ValueError as error:
            raise SystemExit(f"--hours: {error}") from None
    ASKED.write_text(json.dumps(asked) + "\n", encoding="utf-8")
    if not (data / "corpus.idx").exists():
        print("== data", flush=True)
        write_data(data, documents=form.documents, users=form.users, demonstrations=form.demonstrations, heldout=form.heldout)
    table = selected(stages(sizes, form), args.only)
    if args.look:
        done = finished(Path())
        table = [stage for stage in table if stage.name in done]
    run_all(table)
    found = Results(Path(), sizes)
    text = tables(found)
    Path("tables.md").write_text(text, encoding="utf-8")
    print(text, *figures.draw(found, Path("figures")), sep="\n")
    report([*(stage.name for stage in table if stage.command != "label"), "--to", "report.html"])
    print(f"== miniature: {'so far' if args.look else 'done'}; everything is in {args.runs}")


if __name__ == "__main__":
    main()
