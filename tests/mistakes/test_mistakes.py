"""Some three hundred bad starts: each ends at once, in words that a user can act on, and with the right exit status.

All run in this process, one after another, through the program's own `main`; the list is in `cases`.
"""

import re
import shutil
import signal
from unittest import mock

import pytest

from megarlhf import cli
from megarlhf.api import stages
from megarlhf.telemetry.jsonl import JsonLines
from megarlhf.trainers.pretrain import Pretraining
from tests.distributed.harness import START_SECONDS
from tests.mistakes import cases

FILE_OF = {"pretrain": "base"}
LONGEST_SECONDS = 20
"""Of this process's own time, which a busy machine does not shorten; one that waits for something has as long as a rank has to start."""
LAUNCHERS = {name for environment, _ in cases.ENVIRONMENTS for name in environment}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No launcher around the test, and an end to what hangs."""
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)

    def hangs(number, frame):
        raise AssertionError("no end in sight")

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, LONGEST_SECONDS), signal.SIGALRM: (signal.ITIMER_REAL, START_SECONDS)}
    before = {number: signal.signal(number, hangs) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    yield
    for number, (timer, _) in timers.items():
        signal.setitimer(timer, 0)
        signal.signal(number, before[number])


@pytest.fixture
def places(recipe, tmp_path):
    """What stands for {recipe} and {tmp} in a case."""
    return {"recipe": str(recipe), "tmp": str(tmp_path)}


@pytest.fixture
def said(capfd):
    """Run a program's main; returns its exit status and what it printed, with runs of blanks as one."""

    def said(main, words):
        try:
            status = main(words)
        except SystemExit as end:
            status = end.code
        out, err = capfd.readouterr()
        assert out == "", "what is wrong is said on stderr"
        return status, re.sub(r"\s+", " ", err)

    return said


@pytest.fixture
def refused(said, places):
    """Run a command line and hold what it says against the sentence."""

    def refused(words, sentence, *, status=2, main=cli.main, **more):
        found, text = said(main, [filled(word, **places, **more) for word in words])
        assert filled(sentence, **places, **more) in text
        assert "Traceback" not in text
        assert found == status
        return text

    return refused


def filled(text, **places):
    """`text` with the places put in, and nothing else in braces touched."""
    for name, place in places.items():
        text = text.replace("{" + name + "}", place)
    return text


def command(stage, overrides):
    """The command line of a stage of the recipe, into a new folder where the overrides, apart at ` key=`, name none."""
    words = re.split(r" (?=[\w.]*=|run)", overrides) if overrides else []
    where = [] if any(word.startswith(("run.dir=", "run={")) for word in words) else ["run.dir={tmp}/run"]
    return [stage, "--config", f"{{recipe}}/{FILE_OF.get(stage, stage)}.yaml", *where, *words]


def named(rows):
    """Rows as test cases with readable names."""
    return [pytest.param(*row, id=ascii(" ".join(str(part) for part in row[:-1]))[1:70]) for row in rows]


@pytest.mark.parametrize(("stage", "overrides", "sentence"), named(cases.VALUES + cases.KEYS + cases.PATHS + cases.MODELS))
def test_configurations(refused, stage, overrides, sentence):
    refused(command(stage, overrides), sentence)


@pytest.mark.parametrize(("stage", "key", "content", "sentence"), named(cases.FILES))
def test_files(refused, tmp_path, stage, key, content, sentence):
    file = tmp_path / "written.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(command(stage, f"{key}={file}"), sentence, file=str(file))


@pytest.mark.parametrize(("text", "sentence"), named(cases.YAML))
def test_yaml(refused, tmp_path, text, sentence):
    file = tmp_path / "written.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(["sft", "--config", str(file)], sentence)


@pytest.mark.parametrize(("line", "sentence"), named(cases.COMMAND_LINES))
def test_command_lines(refused, line, sentence):
    refused(line.split(), sentence)


@pytest.mark.parametrize(("content", "sentence"), named(cases.RECIPES))
def test_recipes(refused, places, tmp_path, content, sentence):
    named = (("base", "pretrain"), ("sft", "sft"))
    stages = {name: f"{stage} --config {{recipe}}/{name}.yaml run.dir={{tmp}}/{name}" for name, stage in named}
    file = tmp_path / "recipe.txt"
    file.write_bytes(content if isinstance(content, bytes) else filled(filled(content, **stages), **places).encode())
    text = refused(["recipe", str(file)], sentence)
    assert "there is no run" not in text or "there is no run" in sentence, "that a line is wrong is no mistake of those below"
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.txt"]


@pytest.mark.parametrize(("environment", "sentence"), named(cases.ENVIRONMENTS))
def test_environments(refused, monkeypatch, environment, sentence):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    refused(command("sft", ""), sentence)


@pytest.mark.parametrize(("line", "sentence"), named(cases.PREPROCESS))
def test_preprocessing(refused, line, sentence):
    refused(["preprocess", *line.split()], sentence)


@pytest.mark.parametrize(("where", "error", "sentence", "status"), [pytest.param(*row, id=ascii(row[1])) for row in cases.FAILURES])
def test_failures(refused, where, error, sentence, status):
    owner, name = {"write": (JsonLines, "append"), "step": (Pretraining, "step")}[where]
    with mock.patch.object(owner, name, side_effect=error):
        refused(command("pretrain", ""), sentence, status=status)


def test_a_bug_shows_where_it_is_once(said, places):
    with mock.patch.object(Pretraining, "step", side_effect=cases.A_BUG):
        status, text = said(cli.main, [filled(word, **places) for word in command("pretrain", "")])
    assert status == 1 and text.count("Traceback") == 1
    assert "megarlhf pretrain: this should not have happened: Traceback" in text and text.count("nobody foresaw this") == 1


@pytest.mark.parametrize(("stage", "overrides", "sentence"), named(cases.DOUBTS))
def test_what_is_doubtful_is_said_and_runs(monkeypatch, said, places, stage, overrides, sentence):
    monkeypatch.setattr(stages, "stage_of", lambda name: lambda *args, **kwargs: {})
    status, text = said(cli.main, [filled(word, **places) for word in command(stage, overrides)])
    assert status == 0
    assert f"megarlhf {stage}: is this meant? " in text and filled(sentence, **places) in text


def damage(file, how):
    """Do to a file what disks, copies and people do."""
    content = file.read_bytes() if file.exists() else b""
    if how == "removed":
        file.unlink()
    else:
        flipped = content[:-1] + bytes([content[-1] ^ 0x40]) if content else b""
        file.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "list": b"[]\n", "flipped": flipped}[how])


@pytest.mark.parametrize(("stage", "key", "file", "how", "sentence"), named(cases.DAMAGED_RUNS))
def test_damaged_runs(refused, places, tmp_path, stage, key, file, how, sentence):
    run = tmp_path / "copy"
    shutil.copytree(f"{places['recipe']}/runs/base", run)
    damage(run / file, how)
    refused(command(stage, f"{key}={run}" + (" steps=5" if stage == "pretrain" else "")), sentence)


@pytest.mark.parametrize(("ending", "how", "sentence"), named(cases.DAMAGED_CORPORA))
def test_damaged_corpora(refused, places, tmp_path, ending, how, sentence):
    for end in (".bin", ".idx"):
        shutil.copy(f"{places['recipe']}/corpus{end}", tmp_path / f"corpus{end}")
    damage(tmp_path / f"corpus{ending}", how)
    refused(command("pretrain", f"data.prefix={tmp_path}/corpus"), sentence)


def test_the_list_is_long_enough():
    lists = (cases.VALUES, cases.KEYS, cases.PATHS, cases.MODELS, cases.FILES, cases.YAML, cases.COMMAND_LINES, cases.ENVIRONMENTS)
    assert sum(map(len, (*lists, cases.FAILURES, cases.PREPROCESS))) >= 150
