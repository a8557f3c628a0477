"""`megarlhf report RUN [RUN ...] [--to FILE.html]`: run folders as one page that opens from disk."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path

from megarlhf.endings import ended
from megarlhf.report.reading import read_runs
from megarlhf.storage.files import write_atomically

SUMMARY = "Write one HTML page about runs, finished or still going: curves, samples, costs, configurations, warnings."


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page that the command line asks for; returns the exit status (see `ended`)."""
    options = _parser().parse_args(arguments)
    return ended("megarlhf report", lambda: print(_write(options), flush=True), after_ctrl_c="no page was written")


def _write(options: argparse.Namespace) -> str:
    runs = read_runs(options.runs)
    target = options.to or options.runs[0] / "report.html"
    if not target.parent.is_dir():
        raise ValueError(f"--to: there is no folder {target.parent}")
    if target.is_dir():
        raise ValueError(f"--to: {target} is a folder; name a file in it, such as {target / 'report.html'}")
    try:
        from megarlhf.report.page import page
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("plotly"):
            raise
        raise ValueError("the page is drawn by plotly, which is not installed: pip install megarlhf[report]") from error
    text = page(runs, datetime.datetime.now(datetime.UTC))
    write_atomically(target, text)
    return f"{target}: {len(runs)} run{'s' if len(runs) > 1 else ''}, {len(text.encode()) / 1e6:.1f} MB"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megarlhf report", description=SUMMARY, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the run.dir of a stage, generate or evaluate")
    parser.add_argument("--to", type=Path, metavar="FILE.html", help="where to write it (default: report.html in the first run's folder)")
    return parser
