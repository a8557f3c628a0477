"""docs/api.md as a program, and what it promises of the functions it shows."""

import builtins
import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import megarlhf
from megarlhf.config import SECTIONS, RunConfig, SamplingConfig, SftConfig
from megarlhf.config.documentation import keys_of
from megarlhf.runs.interruption import Interrupted
from tests.distributed.recipe import curves, lines_of, make_data

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "api.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page's variables and what it printed, after all of it has run in a folder with data."""
    folder, printed = tmp_path_factory.mktemp("api"), []
    make_data(folder)
    names = {"print": lambda *values: printed.append(" ".join(map(str, values)))}
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        for number, snippet in enumerate(SNIPPETS):
            builtins.exec(compile(snippet, f"docs/api.md, snippet {number}", "exec"), names)
            assert not dist.is_initialized(), "a process group is left behind"
        assert torch.get_num_threads() == threads
        yield folder, names, printed


def test_every_stage_has_its_section_and_leaves_its_run(page):
    folder, names, printed = page
    assert {path.name for path in (folder / "runs").iterdir()} == {"base", "sft", "reward", "ppo", "dpo", "answers", "evaluation"}
    assert [step for step, _ in names["curve"]] == [line["step"] for line in curves(folder / "runs" / "sft")]
    assert [loss for _, loss in names["curve"]] == [line["model/loss"] for line in curves(folder / "runs" / "sft")]
    assert names["base"].metrics["valid/text_loss"] == curves(folder / "runs" / "base")[-1]["valid/text_loss"]
    assert "data.train: there is no file rankings.json; this folder holds rankings.jsonl" in printed[-1]
    assert names["found"].metrics == json.loads((folder / "runs" / "evaluation" / "evaluation.json").read_text())


def test_a_policy_says_what_the_commands_say(page):
    """The same responses as `megarlhf generate`, averaged weights included, and log-probabilities that sum to the loss of `sft`."""
    folder, names, _ = page
    prompts = [line["prompt"] for line in lines_of(folder / "prompts.jsonl")]
    written = lines_of(folder / "runs" / "answers" / "responses.jsonl")
    with names["answers"].policy as policy:
        assert policy.generate(prompts) == [line["response"] for line in written]
    again, other = names["ppo"].policy, names["sft"].policy  # two at a time
    assert again is names["ppo"].policy
    assert again.generate(prompts, sampling=SamplingConfig(max_new_tokens=12), seed=1) == [line["response"] for line in written]
    again.close()
    demonstrations = lines_of(folder / "demonstrations_valid.jsonl")
    asked, answers = [line["prompt"] for line in demonstrations], [line["response"] for line in demonstrations]
    found = torch.cat(other.logprobs(asked, answers)).double()
    assert -float(found.mean()) == pytest.approx(names["sft"].metrics["valid/loss"], rel=1e-12)
    assert other.generate([]) == [] and other.logprobs([], []) == []
    for call, said in {
        lambda: other.generate(["word " * 60]): r"^a prompt of \d+ tokens leaves no room in a context of 48$",
        lambda: other.logprobs(["a"], ["word " * 60]): r"^pair 0 has \d+ tokens with its EOS, and the model's context has 48",
        lambda: other.generate("word"): "^prompts is one text, 'word'; give a list",
        lambda: other.logprobs(["a"], "b"): "^responses is one text",
        lambda: other.logprobs(["a", "b"], ["c"]): "^there are 2 prompts and 1 responses",
        lambda: other.logprobs([""], ["c"]): "^pair 0: empty",
        lambda: other.scores(["a"], ["b"]): "^this is a language model, and a reward model is needed",
        lambda: again.generate(["a"]): "^this model is closed",
        lambda: names["reward"].policy: "holds a reward model, and a language model was asked for",
    }.items():
        with pytest.raises(ValueError, match=said):
            call()
    assert dist.is_initialized()
    other.close()
    other.close()
    assert not dist.is_initialized()


def test_a_run_that_a_callback_ends_goes_on_with_the_next_call(page):
    folder, names, _ = page
    seen, excepthook = [], sys.excepthook

    def stop(step, metrics):
        seen.append(step)
        metrics.clear()  # a copy
        if step == 2:
            raise KeyError("enough")

    overrides = ["run.dir=runs/stopped", "batch_size=6", "dpo.beta=0.2", "run.save_every=1"]
    with pytest.raises(KeyError, match="enough"):
        megarlhf.dpo(megarlhf.load("dpo", "dpo.yaml", overrides), callbacks=[stop])
    assert seen == [1, 2] and not dist.is_initialized()
    done = megarlhf.dpo(megarlhf.load("dpo", "dpo.yaml", overrides))
    assert curves(folder / "runs" / "stopped") == curves(folder / "runs" / "dpo") and done.metrics == names["dpo"].metrics
    with pytest.raises(megarlhf.ConfigError, match="--fresh"):
        megarlhf.dpo(megarlhf.load("dpo", "dpo.yaml", overrides), fresh=True)
    assert megarlhf.dpo(done.config).metrics == {}  # complete
    assert sys.excepthook is excepthook  # a world puts torch's around it, which would otherwise name the rank once more with every run


def check_on_ranks(folder, prompts):
    """Two runs and their models one after another, as a script under torchrun has them."""
    with contextlib.chdir(folder):
        seen = []
        overrides = ["run.dir=runs/two", "batch_size=6", "dpo.beta=0.2", "parallel.tp=2"]
        dpo = megarlhf.dpo(megarlhf.load("dpo", "dpo.yaml", overrides), callbacks=[lambda step, metrics: seen.append(metrics["dpo/loss"])])
        with dpo.policy as policy:
            responses = policy.generate(prompts, sampling=SamplingConfig(max_new_tokens=12))
            logprobs = policy.logprobs(prompts, responses)
        complete = megarlhf.dpo(dpo.config)
        with pytest.raises(megarlhf.ConfigError, match="there is no file none.jsonl"):
            megarlhf.dpo(megarlhf.load("dpo", "dpo.yaml", ["run.dir=runs/three", "data.train=none.jsonl"]))
    return seen, responses, logprobs, complete.metrics


def test_several_ranks_give_what_one_gives(page, ranks2):
    folder, names, _ = page
    prompts = ["word?\n", "two?\n", "pair?\n"]
    (seen, responses, logprobs, complete), other = ranks2.run(check_on_ranks, folder, prompts)
    assert (seen, responses, complete) == (other[0], other[1], {}) and all(map(torch.equal, logprobs, other[2]))
    assert seen == pytest.approx([line["dpo/loss"] for line in curves(folder / "runs" / "dpo")], rel=1e-5)
    with names["dpo"].policy as policy:
        assert policy.generate(prompts, sampling=SamplingConfig(max_new_tokens=12)) == responses
        torch.testing.assert_close(policy.logprobs(prompts, responses), logprobs, rtol=0, atol=1e-4)


def test_what_was_written_wrong_is_raised_before_torch_runs(tmp_path):
    with pytest.raises(TypeError, match="expected a PpoConfig, got RunConfig: megarlhf.load"):
        megarlhf.ppo(RunConfig(dir="x"))
    with pytest.raises(megarlhf.ConfigError, match="there is no command 'train'"):
        megarlhf.load("train", "x.yaml")
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        megarlhf.train  # noqa: B018
    assert issubclass(Interrupted, megarlhf.RunError) and megarlhf.Interrupted is Interrupted
    assert set(megarlhf.__all__) <= set(dir(megarlhf))


def test_importing_is_light():
    names = "megarlhf.ppo, megarlhf.load, megarlhf.ConfigError, megarlhf.config.PpoConfig"
    program = f"import megarlhf, megarlhf.config, sys; {names}; print(sorted({{'torch', 'numpy', 'megatron'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout == "[]\n", done.stderr


def test_every_section_can_be_imported():
    """`SECTIONS` are the classes that keys_of meets, and no others."""
    from dataclasses import is_dataclass
    from typing import get_args

    from megarlhf.config import COMMANDS
    from megarlhf.config.fields import without_none, without_rules

    met = set(COMMANDS.values())
    for cls in COMMANDS.values():
        for _, annotation, *_ in keys_of(cls):
            inner = without_rules(without_none(annotation)[0])[0]
            met |= {kind for kind in (inner, *get_args(inner)[:1]) if is_dataclass(kind)}
    assert met == set(SECTIONS) and SftConfig in met
