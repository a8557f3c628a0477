"""The command line: what it understands, and what it says before anything heavy is loaded."""

import sys

import pytest

from megarlhf import cli

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
    monkeypatch.setattr(cli, "_run", lambda command, config, problem, place, *, fresh: runs.append((command, config, problem, fresh)) or 0)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_NTASKS", "SLURM_PROCID"):
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
    [(command, config, problem, fresh)] = started
    assert (command, problem, fresh) == ("reward", None, True)
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
    [(_, config, problem, _)] = started
    assert config is None and "did you mean run.seed?" in problem
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
    for command in cli.COMMANDS:
        assert callable(cli._stage(command))
    assert "megarlhf.trainers.ppo" in sys.modules
