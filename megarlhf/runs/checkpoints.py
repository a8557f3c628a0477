"""Which folders are checkpoints of a run, and which of them is meant: on rank 0, by name and by what they hold.

Only a real folder named step_<8 digits> whose state.json names the same step and the same run is a run's own. Nothing else in
checkpoints/ is read, followed or removed.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

from megarlhf.storage.checkpoints import STATE_FILE, Saved, read_saved
from megarlhf.storage.files import read_json, write_atomically

BEST_FILE = "best.json"
NAME = re.compile(r"step_([0-9]{8,})")
FOREIGN = ("config.json", "latest_checkpointed_iteration.txt", ".metadata")
"""By which Hugging Face's folders, Megatron-LM's and one of its checkpoints are known."""
PARTIAL = re.compile(NAME.pattern + r"(\.replaced)?\.partial")


def own_checkpoints(folder: Path, *, run: str | None, skip_damaged: bool = False) -> tuple[list[Saved], list[str]]:
    """(a run's checkpoints from the newest back, a line for each folder that looks like one and is not).

    Args: run: the id that they must have been written under; None takes any.
    ValueError at the first whose state.json is damaged or missing, unless `skip_damaged`.
    """
    found, notes = [], []
    for path, step in _named(folder):
        try:
            saved = read_saved(path)
        except ValueError as error:
            if not skip_damaged:
                raise ValueError(f"{error}; remove {path}, or set run.resume: newest_good, to go on from the one before") from error
            notes.append(f"{error}; it is left alone")
            continue
        if (inside := saved.state.get("step")) != step:
            notes.append(f"{path} is left alone: it holds step {inside}")
        elif run is not None and saved.state.get("run") != run:
            notes.append(f"{path} is left alone: another run wrote it")
        else:
            found.append(saved)
    return found, notes


def find_source(path: str) -> Saved:
    """The checkpoint that `path` means: itself, or a run folder's best or newest. ValueError says what is there instead."""
    folder = Path(path)
    if (folder / STATE_FILE).is_file():
        return read_saved(folder)
    checkpoints = folder / "checkpoints"
    best = best_step(checkpoints)
    if best is not None:
        chosen = checkpoints / f"step_{best:08d}"
        if chosen.is_symlink() or not chosen.is_dir():
            raise ValueError(f"{best_file(checkpoints)} names step {best}, but there is no checkpoint {chosen}")
        return read_saved(chosen)
    found = own_checkpoints(checkpoints, run=None)[0]
    if not found:
        raise ValueError(
            f"{path} is neither a checkpoint (a folder with {STATE_FILE}) nor a run with one in {checkpoints}; {_what_is_at(folder)}"
        )
    return found[0]


def prune(folder: Path, *, run: str, keep: int, keep_every: int = 0) -> None:
    """Remove a run's own checkpoints but the newest `keep`, the best, and each `keep_every`-th step's; and what interrupted saves left."""
    best = best_step(folder)
    for saved in own_checkpoints(folder, run=run, skip_damaged=True)[0][keep:]:
        step = saved.state["step"]
        if step != best and not (keep_every and step % keep_every == 0):
            shutil.rmtree(saved.path)
    for path in folder.iterdir():
        if PARTIAL.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def best_file(folder: Path) -> Path:
    """Where the best checkpoint's step is written."""
    return folder / BEST_FILE


def write_best(folder: Path, step: int) -> None:
    """Remember the checkpoint that validation chose."""
    write_atomically(best_file(folder), json.dumps({"step": step}) + "\n")


def best_step(folder: Path) -> int | None:
    """The step of the checkpoint that a run's validation chose, if it chose one. ValueError where the file is damaged."""
    file = best_file(folder)
    if not file.is_file():
        return None
    step = read_json(file).get("step")
    if type(step) is not int or step < 0:
        raise ValueError(f'{file} is damaged: it must be {{"step": <number>}}, and names {step!r}; remove it to take the newest checkpoint')
    return step


def best_as_of(folder: Path, step: int, best: int | None) -> tuple[int | None, str]:
    """(the best checkpoint of a run that goes on from `step`, what is to be said of it).

    One that best.json names and that comes after `step` is of steps that come again, perhaps otherwise. `best` was it at `step`.
    """
    named = best_step(folder)
    if named is None or named <= step:
        return named, ""
    if best is not None and (folder / f"step_{best:08d}").is_dir():
        write_best(folder, best)
        return best, f"the best checkpoint was step {named}, which comes again: it is step {best}, as it was then"
    best_file(folder).unlink()
    return None, f"the best checkpoint was step {named}, which comes again: none is, until the next evaluation"


def unfinished(path: str, saved: Saved) -> str:
    """What is doubtful of a checkpoint that `find_source` found in the run folder `path`: the run has not come to its end."""
    step, total = saved.state.get("step"), saved.state.get("total_steps")
    if total is None or step >= total or saved.path == Path(path) or best_step(saved.path.parent) is not None:
        return ""
    return f"; is this meant? that run is at step {step} of {total}"


def _named(folder: Path) -> list[tuple[Path, int]]:
    """(path, step in its name) of the real folders with a checkpoint's name, from the highest step down."""
    if not folder.is_dir():
        return []
    matches = [(path, NAME.fullmatch(path.name)) for path in folder.iterdir()]
    named = [(path, int(match[1])) for path, match in matches if match and path.is_dir() and not path.is_symlink()]
    return sorted(named, key=lambda entry: -entry[1])


def _what_is_at(folder: Path) -> str:
    if not folder.is_dir():
        parent = next((above for above in folder.parents if above.is_dir()), Path("."))
        names = sorted(path.name for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))
        return f"there is no such folder; {parent.absolute()} has: {', '.join(names[:12]) or 'no folders'}"
    if any((folder / name).is_file() for name in FOREIGN):
        command = f"megarlhf convert --from {shlex.quote(str(folder))} --to FOLDER"
        return f"what is there is another program's: `{command}` makes a checkpoint of it"
    names = sorted(path.name for path in folder.iterdir())
    return f"it holds: {', '.join(names[:12]) or 'nothing'}"
