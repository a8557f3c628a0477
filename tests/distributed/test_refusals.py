"""What a user is told: every rank stops, one of them says why, and nobody waits for nobody."""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
from unittest import mock

import pytest

from megarlhf import cli
from megarlhf.config import ConfigError
from megarlhf.parallel.groups import World
from megarlhf.runs import records
from tests.distributed.recipe import run_stage_of


def check_messages(cases):
    """What each (YAML file, overrides) is refused for."""
    messages = []
    for yaml, overrides in cases:
        with pytest.raises(ConfigError) as refused:
            run_stage_of(yaml, overrides)
        messages.append(str(refused.value))
    return messages


@pytest.fixture(scope="module")
def broken(recipe, tmp_path_factory):
    """Data and models that do not fit the recipe's."""
    from megarlhf.data.tokenizer_training import train_sentencepiece

    folder = tmp_path_factory.mktemp("broken")
    train_sentencepiece(["some other text, and a bit more of it"] * 3, folder / "other", vocab_size=300)
    (folder / "bad.jsonl").write_text(json.dumps({"prompt": "one?\n", "response": "1"}) + '\n{"prompt": "two?\\n"}\n')
    return folder


def test_everything_that_is_wrong_is_said_at_once_on_every_rank(recipe, broken, ranks2, tmp_path):
    at = f"run.dir={tmp_path / 'run'}"
    cases = {
        "models and data": (
            recipe / "ppo.yaml",
            [
                at, "policy.load=nowhere", "policy.parallel.tp=4", "value.parallel.tp=4", "reference.parallel={tp: 2, pp: 3}",
                "reward.parallel.pp=2", f"reward.load={recipe}/runs/sft", "generation.sampling.max_new_tokens=30",
                f"data.prompts={broken}/bad.jsonl", "data.prompts_valid=missing.jsonl", "data.pretraining.prefix=gone",
                "limits.max_prompt_len=4",
            ],
        ),
        "vocabulary": (recipe / "sft.yaml", [at, f"tokenizer.path={broken}/other.model"]),
        "bad record": (recipe / "sft.yaml", [at, f"data.train={broken}/bad.jsonl"]),
        "context": (recipe / "sft.yaml", [at, "limits.max_response_len=30"]),
        "judge": (
            recipe / "sft.yaml",
            [at, "select_by=reward", "run.eval_every=1", f"reward.load={recipe}/runs/reward", "sampling.max_new_tokens=30"],
        ),
        "sequence parallel": (
            recipe / "base.yaml",
            [at, "parallel={tp: 2, sequence_parallel: true}", "data.seq_len=41", "model.architecture.max_seq_len=41"],
        ),
        "small data": (recipe / "reward.yaml", [at, "batch_size=64"]),
        "few prompts": (recipe / "ppo.yaml", [at, "ppo.batch_size=64"]),
        "validation": (recipe / "sft.yaml", [at, f"data.valid={recipe}/demonstrations.jsonl"]),
        "generation layout": (recipe / "ppo.yaml", [at, "generation.parallel={tp: 2, sequence_parallel: true}"]),
        "generation ranks": (recipe / "ppo.yaml", [at, "generation.parallel={tp: 4}"]),
        "heads": (recipe / "base.yaml", [at, "model.architecture.num_heads=3", "parallel.tp=2"]),
        "layers": (recipe / "base.yaml", [at, "model.architecture.num_layers=1", "parallel.pp=2"]),
        "tokenizer": (recipe / "sft.yaml", [at, "tokenizer.path=nothing.model"]),
        "policy from a reward model": (recipe / "ppo.yaml", [at, f"policy.load={recipe}/runs/reward"]),
        "which model": (recipe / "evaluate.yaml", [at, "reward.load_model=valu", f"reward.load={recipe}/runs/ppo"]),
        "reward model on text": (recipe / "evaluate.yaml", [at, f"model.load={recipe}/runs/reward"]),
    }
    first, second = ranks2.run(check_messages, list(cases.values()))
    assert first == second
    said = dict(zip(cases, first, strict=True))

    lines = said["models and data"].splitlines()
    expected = [
        "bad.jsonl:2: prompt over limit",
        "missing.jsonl: missing file: there is no such file",
        "gone.bin is missing or empty",
        "policy: nowhere is neither a checkpoint (a folder with state.json) nor a run with one in nowhere/checkpoints",
        "value: a layout of tp 4 x pp 1 = 4 ranks per copy does not divide the 2 ranks that were started: 2 % 4 = 2",
        "reward: " + f"{recipe}/runs/sft/checkpoints/step_00000004 holds a language model, and a trained reward model is needed",
        "reference: a layout of tp 2 x pp 3 = 6 ranks per copy does not divide the 2 ranks",
    ]
    assert len(lines) == len(expected), said["models and data"]
    for text, line in zip(expected, lines, strict=True):
        assert text in line
    assert "model: its vocabulary has 400 ids, the tokenizer's 300: models and tokenizer must be" in said["vocabulary"]
    assert 'bad.jsonl:2: missing field: no "response" among "prompt"' in said["bad record"]
    keys = "limits.max_prompt_len 16 + limits.max_response_len 30"
    assert said["context"].startswith(f"model: its context of 40 tokens is shorter than the 46 that the run needs ({keys}); lower them")
    keys = "limits.max_prompt_len 16 + sampling.max_new_tokens 30"
    judge = [f"{role}: its context of 40 tokens is shorter than the 46 that the run needs ({keys})" for role in ("model", "reward")]
    assert [line.partition(";")[0] for line in said["judge"].splitlines()] == judge
    keys = "data.seq_len 41 = 41, rounded up to 42 for sequence_parallel over tp 2"
    assert said["sequence parallel"].startswith(f"model: its context of 41 tokens is shorter than the 42 that the run needs ({keys})")
    assert "rankings.jsonl has 21 records to draw from, fewer than the 64 of one batch; lower batch_size to 21" in said["small data"]
    assert "prompts.jsonl has 20 records to draw from, fewer than the 64 of one batch; lower ppo.batch_size to 20" in said["few prompts"]
    assert f"data.valid: {recipe}/demonstrations.jsonl has the content of data.train" in said["validation"]
    assert said["generation layout"].startswith("generation.parallel: decoding one position at a time has no use for sequence_parallel")
    assert said["generation ranks"].startswith("generation: a layout of tp 4 x pp 1 = 4 ranks per copy does not divide the 2 ranks")
    assert "hidden_size 32 must be divisible by num_heads 3" in said["heads"]
    assert "num_layers 1 must be at least pp * virtual_pp = 2 * 1 = 2: each chunk of a stage holds a layer" in said["layers"]
    assert said["tokenizer"].startswith("tokenizer: there is no tokenizer at nothing.model")
    assert "step_00000004 holds a model with a scalar head (reward or value), and a language model is needed" in said[
        "policy from a reward model"
    ]
    assert said["which model"].startswith("reward: load_model must name one of policy, value in") and "'valu'" in said["which model"]
    assert said["reward model on text"].splitlines() == [
        "model: it is a reward model, which can be evaluated on rankings and on win_rate.responses only",
        "reward: `model` is a reward model itself; leave one of the two out",
    ]
    assert not (tmp_path / "run").exists()


def check_one_rank_fails(yaml, overrides):
    """A file that one machine cannot read stops both."""

    def unreadable(*args, **kwargs):
        raise ValueError("prompts.jsonl is on a disk that this machine does not have")

    here = mock.patch.object(records, "read_prompts", unreadable) if World.connect().rank == 1 else contextlib.nullcontext()
    with here, pytest.raises(ConfigError) as refused:
        run_stage_of(yaml, overrides)
    return str(refused.value)


def test_what_one_rank_finds_stops_all(recipe, ranks2, tmp_path):
    messages = ranks2.run(check_one_rank_fails, recipe / "ppo.yaml", [f"run.dir={tmp_path / 'run'}", "data.prompts_valid=null"])
    assert messages == ["rank 1 of 2: prompts.jsonl is on a disk that this machine does not have"] * 2


def check_old_copy(yaml, overrides, name, key, old):
    """What a run is refused for when rank 1 finds another file, one that can be read, where it looks for `name`."""

    def changed(function):
        def there(path, *args, **kwargs):
            return function(old if str(path).endswith(name) else path, *args, **kwargs)

        return there

    read = ("read_demonstrations", "read_prompts", "read_rankings", "Corpus", "load_tokenizer")
    with contextlib.ExitStack() as stack:
        if World.connect().rank == 1:
            for function in read:
                stack.enter_context(mock.patch.object(records, function, changed(getattr(records, function))))
        with pytest.raises(ConfigError) as refused:
            run_stage_of(yaml, overrides)
    return str(refused.value)


@pytest.mark.parametrize(
    ("stage", "name", "key"),
    [
        ("sft", "demonstrations.jsonl", "data.train"),
        ("sft", "demonstrations_valid.jsonl", "data.valid"),
        ("sft", "corpus", "data.pretraining.prefix"),
        ("sft", "tokenizer.model", "tokenizer"),
        ("reward", "rankings.jsonl", "data.train"),
        ("ppo", "prompts.jsonl", "data.prompts"),
        ("evaluate", "prompts_valid.jsonl", "prompts"),
    ],
)
def test_an_old_copy_on_one_rank_stops_all(recipe, ranks2, tmp_path, stage, name, key):
    if name == "corpus":
        for ending in (".bin", ".idx"):
            (tmp_path / f"old{ending}").write_bytes((recipe / f"corpus{ending}").read_bytes())
        with (tmp_path / "old.bin").open("r+b") as file:
            file.write((tmp_path / "old.bin").read_bytes()[2:4] * 2)  # as long as before, and of the same vocabulary
        old = tmp_path / "old"
    elif name == "tokenizer.model":
        from megarlhf.data.tokenizer_training import train_sentencepiece

        old = train_sentencepiece([(recipe / "prompts.jsonl").read_text()], tmp_path / "old", vocab_size=300)
    else:
        old = tmp_path / name
        old.write_text("".join((recipe / name).read_text().splitlines(keepends=True)[::-1]))  # as many records, in another order
    messages = ranks2.run(check_old_copy, recipe / f"{stage}.yaml", [f"run.dir={tmp_path / 'run'}"], name, key, str(old))
    assert messages[0] == messages[1]
    assert f"{key}: rank 1 of 2 reads other content from" in messages[0] and "is it an old copy?" in messages[0]
    assert not (tmp_path / "run").exists()


def check_command(arguments):
    """(exit status, what was printed) of a command in this world, with {rank} in its arguments put in."""
    rank = World.connect().rank
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        status = cli.main([argument.replace("{rank}", str(rank)) for argument in arguments])
    return status, printed.getvalue()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.adam.learning_rat=1"], "model.adam.learning_rat: unknown key (given 1); did you mean model.adam.learning_rate?"),
        (["run.seed={rank}"], "rank 1 of 2: run.seed is 1, and 0 on rank 0"),
        (["parallel.tp=3"], "megarlhf sft: model: a layout of tp 3 x pp 1 = 3 ranks per copy does not divide the 2 ranks"),
    ],
    ids=["typing error", "another configuration", "layout"],
)
def test_one_rank_speaks_and_all_stop(recipe, ranks2, tmp_path, overrides, expected):
    command = ["sft", "--config", str(recipe / "sft.yaml"), f"run.dir={tmp_path / 'run'}", *overrides]
    (status, printed), (other_status, other_printed) = ranks2.run(check_command, command)
    assert status == other_status == 2
    assert expected in printed and "Traceback" not in printed
    assert other_printed == ""


def command_line(*arguments, **environment):
    """`python -m megarlhf` as a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def test_a_typing_error_in_the_file(recipe, tmp_path):
    text = (recipe / "ppo.yaml").read_text().replace("ptx_coef: 2.0", "ptx_coeff: 2.0").replace("pretraining:", "pretrainig:")
    (tmp_path / "ppo.yaml").write_text(text)
    process = command_line("-m", "megarlhf", "ppo", "--config", str(tmp_path / "ppo.yaml"))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and out == "" and "Traceback" not in err
    assert "ppo.ptx_coeff: unknown key (given 2.0); did you mean ppo.ptx_coef?" in err
    assert "data.pretrainig: unknown key" in err and "did you mean data.pretraining?" in err


DIES = """
import sys
from megarlhf import cli
from megarlhf.data.pretraining import PretrainingStream

take, taken = PretrainingStream.take, []

def take_or_fail(self, n):
    taken.append(n)
    if {fails} and len(taken) == 3:
        raise OSError(28, "No space left on device", "metrics.jsonl")
    return take(self, n)

if __name__ == "__main__":
    PretrainingStream.take = take_or_fail
    cli.start()
"""


def test_a_rank_that_fails_in_the_middle_does_not_leave_the_others_waiting(recipe, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(2):
        script = tmp_path / f"rank{rank}.py"
        script.write_text(DIES.format(fails=rank == 1))
        arguments = ["pretrain", "--config", str(recipe / "base.yaml"), f"run.dir={tmp_path / 'run'}", "run.save_every=0"]
        where = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(command_line(str(script), *arguments, **where, PYTHONPATH=os.getcwd()))
    texts = [process.communicate(timeout=170)[1] for process in processes]
    assert "megarlhf pretrain (rank 1 of 2): metrics.jsonl: No space left on device; make room and start" in texts[1]
    assert [process.returncode for process in processes] == [1, 1]
    assert "Traceback" not in texts[0] + texts[1] and "megarlhf pretrain (rank" not in texts[0], texts[0]
