"""The command line: what it understands, and what it says before anything heavy is loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megarlhf import cli
from megarlhf.api import stages
from megarlhf.config import load_stage_config
from megarlhf.config.documentation import keys_of
from megarlhf.config.fields import without_none, without_rules
from megarlhf.config.rules import PathTo

ROOT = Path(__file__).parents[2]
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_NTASKS", "SLURM_PROCID")
YAML = """
stage: reward
run: {dir: runs/x}
tokenizer: {path: t.model}
model: {load: runs/base, adam: {learning_rate: 1e-5}}
data: {train: r.jsonl}
"""


@pytest.fixture
def started(monkeypatch):
    """What would have been run, in place of running it."""
    runs = []
    monkeypatch.setattr(cli, "_run", lambda series, problem: runs.append((series.name, series.commands, problem)) or 0)
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    return runs


@pytest.fixture
def yaml(tmp_path, monkeypatch):
    for name in ("t.model", "r.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "runs" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    return str(path)


@pytest.mark.parametrize(
    "line",
    ["--config F a.b=1 --fresh c=2", "a.b=1 c=2 --config F --fresh", "--fresh a.b=1 --config F c=2", "--fresh --config F a.b=1 c=2"],
)
def test_overrides_and_options_come_in_any_order(line):
    options = cli._parsed(["reward", *line.split()])
    assert (options.command, options.config, options.fresh) == ("reward", ["F"], True)
    assert options.overrides == ["a.b=1", "c=2"]


def test_a_run_is_started_with_its_overrides(started, yaml):
    assert cli.main(["reward", "--config", yaml, "run.seed=3", "--fresh", "batch_size=16", "parallel={tp: 2}"]) == 0
    [(name, [command], problem)] = started
    config = command.config
    assert (name, command.name, problem, command.fresh) == ("reward", "reward", None, True)
    assert (config.run.seed, config.batch_size, config.parallel.tp, config.model.adam.learning_rate) == (3, 16, 2, 1e-5)


def test_what_is_wrong_is_printed_without_a_traceback(started, yaml, capsys):
    assert cli.main(["reward", "--config", yaml, "run.sed=3", "batch_size=many"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("megarlhf reward: the configuration is not valid:\n")
    assert "command line: run.sed: unknown key (given 3); did you mean run.seed?" in err
    assert 'command line: batch_size: expected int, got "many"' in err
    for arguments, said in {
        ("ppo", "--config", yaml): "stage is reward; run it with `megarlhf reward`, not `megarlhf ppo`",
        ("ppo", "--config", "nowhere.yaml"): "nowhere.yaml: there is no such file",
        ("ppo",): "megarlhf ppo: --config is missing",
        ("reward", "--config", yaml, "batch_size"): "'batch_size' is not of the form section.key=value",
    }.items():
        assert cli.main(arguments) == 2
        assert said in capsys.readouterr().err
    assert not started


@pytest.mark.parametrize("names", ["RANK WORLD_SIZE", "SLURM_PROCID SLURM_NTASKS"])
def test_several_ranks_meet_before_one_says_what_is_wrong(started, yaml, capsys, monkeypatch, names):
    for name, value in zip([*names.split(), "MASTER_ADDR", "MASTER_PORT"], ["3", "8", "localhost", "29500"], strict=True):
        monkeypatch.setenv(name, value)
    cli.main(["reward", "--config", yaml, "run.sed=3"])
    [(_, commands, problem)] = started
    assert commands == [] and "did you mean run.seed?" in problem
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("line", ["", "train --config x", "reward --confg x", "reward --config x --frsh a=1"])
def test_argparse_ends_with_2(line, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(line.split())
    assert end.value.code == 2
    assert "megarlhf" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["pretrain", "sft", "reward", "ppo", "generate", "evaluate"])
def test_help_lists_every_key(command, capsys):
    assert cli.main([command, "--help-config"]) == 0
    text = capsys.readouterr().out
    for key in ("run.dir: str, required", "tokenizer.path: str, required", "parallel.tp: int, default 1"):
        assert key in text
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0 and "key=value" in capsys.readouterr().out


def test_every_command_has_a_stage():
    assert list(stages.STAGES) == list(cli.COMMANDS)
    for command in cli.COMMANDS:
        assert callable(stages.stage_of(command))
    assert "megarlhf.trainers.ppo" in sys.modules


# The program as a process: before torch is imported


def program(*words, **environment):
    """(exit status, stdout, stderr) of `python -m megarlhf`."""
    env = {**{name: value for name, value in os.environ.items() if name not in LAUNCHERS}, **environment}
    done = subprocess.run([sys.executable, "-m", "megarlhf", *words], capture_output=True, env=env, timeout=60, cwd=ROOT)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


WITHOUT_TORCH = """
import sys
from megarlhf import cli
try:
    status = cli.main(sys.argv[1:])
except SystemExit as end:
    status = end.code
heavy = {"torch", "numpy", "megatron"} & set(sys.modules)
print(f"\\nstatus {status}, imported {sorted(heavy)}", file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        ("--version", 0, ""),
        ("ppo --help", 0, ""),
        ("ppo --help-config", 0, ""),
        ("chat --help", 0, ""),
        ("convert --help", 0, ""),
        ("replay --help", 0, ""),
        ("init ppo --all", 0, ""),
        ("reward --config missing.yaml", 2, "missing.yaml: there is no such file"),
        ("reward --config {yaml} batch_size=0", 2, "batch_size must be at least 1"),
        ("reward --config {yaml} data.train=gone.jsonl", 2, "data.train: there is no file gone.jsonl"),
        ("reward --config {yaml} model.load=gone", 2, "model.load: there is no run or checkpoint gone"),
        ("reward --config {yaml} --batch_size 3", 2, "as batch_size=3"),
    ],
)
def test_what_needs_no_torch_does_not_import_it(yaml, line, status, said):
    words = [sys.executable, "-c", WITHOUT_TORCH, *line.format(yaml=yaml).split()]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=60)
    assert done.stderr.endswith(f"\nstatus {status}, imported []\n"), done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr


def test_files_are_utf8_whatever_the_locale(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_bytes("\ufeffstage: sft\nrun: {dir: \u00fcbung, sed: 1}  # \u00e9\u4e2d\n".encode())
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    status, _, said = program("sft", "--config", str(config), "tokenizer.path=\u00fc\u4e2d.model", **plain)
    assert status == 2 and "Traceback" not in said
    assert "run.sed: unknown key (given 1); did you mean run.seed?" in said
    config.write_bytes(b"stage: sft\nrun: {dir: \xfc}\n")
    status, _, said = program("sft", "--config", str(config), **plain)
    assert status == 2 and "broken YAML" in said and "Traceback" not in said


def test_paths_are_put_in_where_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", "some/where")
    assert PathTo("file").accept("~/${DATA}/x.jsonl") == f"{tmp_path}/some/where/x.jsonl"
    assert PathTo("file").accept("a/~/b$DATA") == "a/~/b$DATA", "only a path that begins with ~, only ${NAME}"


def test_here_is_the_folder_of_the_file(yaml, tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    file = tmp_path / "sub" / "run.yaml"
    file.write_text(YAML.replace("r.jsonl", "'${HERE}/../r.jsonl'"))
    monkeypatch.setenv("HERE", "elsewhere")
    config = load_stage_config("sub/run.yaml", ["run.dir=${HERE}/x", "tokenizer.eos_token=${HERE}"])
    assert (config.data.train, config.run.dir, config.tokenizer.eos_token) == ("sub/../r.jsonl", "sub/x", "${HERE}")
    assert load_stage_config(file).data.train == f"{tmp_path}/sub/../r.jsonl"


def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{sys.executable} -m megarlhf ppo --help-config | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.splitlines()[1] == "0" and done.stderr == ""


def test_every_number_has_a_range_and_every_path_is_one():
    """A field of plain int or float would take anything; a path without its marker would keep a ~."""
    paths = ("path", "prefix", "train", "valid", "prompts", "prompts_valid", "demonstrations", "rankings", "load", "dir", "valid_prefix")
    paths += ("responses", "against", "labels", "function")
    for name, cls in cli.COMMANDS.items():
        for key, annotation, *_ in keys_of(cls):
            kind, rules = without_rules(without_none(annotation)[0])
            assert kind not in (int, float) or rules, f"{name}: {key} has no range"
            assert kind is not str or rules, f"{name}: {key} may be empty"
            is_path = any(isinstance(rule, PathTo) for rule in rules)
            assert is_path == (kind is str and key.rpartition(".")[2] in paths), f"{name}: {key}"
