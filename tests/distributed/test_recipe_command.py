"""`megarlhf recipe`: several commands in one program give what each alone gives, and end as each would."""

import contextlib
import io
import os
import re
import shutil
import signal
from unittest import mock

import pytest
import torch

from megarlhf import cli
from megarlhf.runs.interruption import Interruption
from tests.distributed.recipe import curves, make_recipe
from tests.distributed.test_launchers import in_a_box, under_torchrun

STAGES = {"base": "pretrain", "sft": "sft", "reward": "reward", "ppo": "ppo"}
KEYS = {"base": "run.threads=1", "sft": "dropout=0.2 run.threads=2 run.timeout_minutes=7", "reward": "", "ppo": "policy.parallel.tp=2"}
"""What the stages set in their process differs, and the second's must not be there in the third."""


def words_of(folder, name):
    return [STAGES[name], "--config", f"{folder}/{name}.yaml", *KEYS[name].split()]


def check_command(words, signalled=None):
    """(exit status, what it printed) of a command on these ranks; rank 1 gets SIGTERM as step `signalled` of the reward model begins."""
    from megarlhf.trainers.reward_model import RewardModelTraining

    step, threads = RewardModelTraining.step, torch.get_num_threads()

    def step_and_signal(self, number):
        if number == signalled and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number)

    with contextlib.redirect_stderr(io.StringIO()) as said, mock.patch.object(RewardModelTraining, "step", step_and_signal):
        status = cli.main(words)
    torch.set_num_threads(threads)  # as for a process that starts
    return status, said.getvalue()


@pytest.fixture(scope="module")
def alone(ranks2, tmp_path_factory):
    """The folder of a recipe whose commands each were given alone."""
    folder = make_recipe(tmp_path_factory.mktemp("alone"))
    for name in STAGES:
        assert [status for status, _ in ranks2.run(check_command, words_of(folder, name))] == [0, 0]
    return folder


@pytest.fixture
def folder(alone, tmp_path):
    """The same data and configurations in another folder, without runs, and recipe.txt."""
    for file in alone.iterdir():
        if file.suffix == ".yaml":
            (tmp_path / file.name).write_text(file.read_text().replace(str(alone), str(tmp_path)))
        elif file.is_file():
            shutil.copy(file, tmp_path)
    lines = [" ".join(words_of(tmp_path, name)) for name in STAGES]
    (tmp_path / "recipe.txt").write_text("# the whole of it\n\n" + "\n".join(lines) + "\n")
    return tmp_path


SEEN = """
import gc, os, torch
from megarlhf import cli
from megarlhf.engine.trainable import TrainEngine
from megarlhf.recipes import series

run_in = series.run_in

def seen(world, config, **how):
    engines = sum(isinstance(found, TrainEngine) for found in gc.get_objects())
    with open(f"{__file__}.{os.environ['RANK']}", "a") as file:
        print(config.stage, torch.get_num_threads(), world.timeout.total_seconds() / 60, engines, file=file)
    return run_in(world, config, **how)

if __name__ == "__main__":
    series.run_in = seen
    cli.start()
"""


def test_a_recipe_is_refused_stopped_goes_on_and_gives_what_its_commands_give(alone, folder, ranks2):
    recipe = folder / "recipe.txt"
    good = recipe.read_text()

    recipe.write_text(good + f"sft --config {folder}/sft.yaml run.dir={folder}/runs/sft2 batch_size=0\n")
    (first, said), (second, nothing) = ranks2.run(check_command, ["recipe", str(recipe)])
    assert (first, second, nothing) == (2, 2, "") and not (folder / "runs").exists()
    [(_, box)] = in_a_box(said)
    assert box.startswith(f"megarlhf recipe: nothing was started:\n{recipe}:7: sft: the configuration is not valid:\n")
    assert "batch_size must be at least 1, got 0" in box

    recipe.write_text(good)
    answers = ranks2.run(check_command, ["recipe", str(recipe)], 1)
    said = answers[0][1]
    assert [status for status, _ in answers] == [75, 75] and not (folder / "runs" / "ppo").exists()
    assert re.findall("^== .*", said, re.MULTILINE) == [
        f"== {number} of 4: {STAGES[name]} {folder}/runs/{name}" for number, name in enumerate(list(STAGES)[:3], 1)
    ]
    assert in_a_box(said)[0][1] == f"megarlhf reward ({recipe}:5): stopped by SIGTERM after step 2 of 4; start it again to go on"

    answers = ranks2.run(check_command, ["recipe", str(recipe)], 3)
    said = answers[0][1]
    assert [status for status, _ in answers] == [75, 75] and f"going on from {folder}/runs/reward/checkpoints/step_00000002" in said
    assert said.count("already complete at step 4; choose another run.dir") == 2 and "[reward] done" in said
    assert in_a_box(said)[0][1] == f"megarlhf ppo ({recipe}:6): stopped by SIGTERM before it began; start the recipe again to go on"

    script = folder / "seen.py"
    script.write_text(SEEN)
    status, said = under_torchrun(str(script), "recipe", str(recipe))
    assert status == 0, said
    for rank in range(2):
        rows = ["pretrain 1 30.0 0", "sft 2 7.0 0", "reward 1 30.0 0", "ppo 1 30.0 0"]
        assert (folder / f"seen.py.{rank}").read_text().splitlines() == rows, "threads, minutes and models of one command are in the next"

    for name in STAGES:
        assert curves(folder / "runs" / name) == curves(alone / "runs" / name), name
        parts = sorted((alone / "runs" / name).rglob("part_*.safetensors"))
        assert parts
        for part in parts:
            assert (folder / part.relative_to(alone)).read_bytes() == part.read_bytes(), part


def check_other_file(files):
    return check_command(["recipe", files[int(os.environ["RANK"])]])


def test_ranks_that_read_other_recipes_are_named(folder, ranks2):
    files = []
    for name, lines in {"all": STAGES, "fewer": ["base"], "other": STAGES}.items():
        files.append(str(folder / f"{name}.txt"))
        text = "\n".join(" ".join(words_of(folder, stage)) for stage in lines)
        (folder / f"{name}.txt").write_text(text.replace("dropout=0.2", "dropout=0.3") if name == "other" else text)
    for other, sentence in {
        files[1]: "megarlhf recipe: rank 1 of 2 read other commands than rank 0: is it an old copy?",
        files[2]: f"megarlhf sft ({files[0]}:2): the ranks were given different configurations:\n"
        "rank 1 of 2: dropout is 0.3, and 0.2 on rank 0",
    }.items():
        (first, said), (second, _) = ranks2.run(check_other_file, (files[0], other))
        assert (first, second, in_a_box(said)[0][1]) == (2, 2, sentence)
    assert not (folder / "runs").exists()


@pytest.fixture
def ctrl_c():
    """Python's own answer to it, which a process that was started in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_what_is_heard_between_runs_is_heard_in_the_next(ctrl_c):
    with Interruption((signal.SIGTERM,)) as around:
        os.kill(os.getpid(), signal.SIGTERM)
        with Interruption(within=around) as inner:
            assert inner.received == signal.SIGTERM
        with Interruption(within=around) as inner:
            os.kill(os.getpid(), signal.SIGINT)
            assert inner.received == signal.SIGINT
        assert around.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):  # between runs Ctrl-C is not waited for
            os.kill(os.getpid(), signal.SIGINT)
