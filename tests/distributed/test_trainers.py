"""The stages, end to end in miniature: layouts, resumes, and the paper's facts."""

import contextlib
import io
import json
import math
import re
import shutil
from pathlib import Path
from typing import get_args
from unittest import mock

import pytest
import torch

from megarlhf.config import ConfigError
from megarlhf.data.collation import prompt_batch
from megarlhf.data.order import ShuffledOrder
from megarlhf.engine.engine import NotFiniteError
from megarlhf.evaluation import responses
from megarlhf.evaluation.responses import Purpose, ResponseJudge, generate
from megarlhf.evaluation.text import language_model_loss_on
from megarlhf.parallel.groups import World
from megarlhf.resharding.publish import Publisher
from megarlhf.runs.checkpoints import find_source
from megarlhf.runs.models import ModelPlanner
from megarlhf.trainers.sft import pretraining_shares
from tests.distributed.recipe import ADAM, STAGES, Interrupted, check_stages, curves, lines_of, run_stage_of
from tests.distributed.training import whole_state

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5


def assert_alike(one, other):
    """Equal but for rounding: nested lists and mappings of numbers and whatever else."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_alike(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_alike(a, b)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=TOLERANCE, abs=TOLERANCE)
    else:
        assert one == other


# Layouts

LAYOUTS = {
    "tp2": (2, ["parallel.tp=2"]),
    "pp2": (2, ["parallel.pp=2"]),
    "dp2": (2, []),
    "tp2 sequence parallel": (2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
    "tp2 pp2": (4, ["parallel.tp=2", "parallel.pp=2"]),
    "tp2 dp2": (4, ["parallel.tp=2"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_stage_gives_the_same_curves_in_every_layout(recipe, ranks2, ranks4, name, tmp_path):
    num_ranks, overrides = LAYOUTS[name]
    (ranks2 if num_ranks == 2 else ranks4).run(check_stages, recipe, tmp_path, STAGES, overrides)
    for stage in STAGES:
        assert_alike(curves(tmp_path / stage), curves(recipe / "runs" / stage))
    for stage in ("sft", "ppo", "grpo"):
        assert_alike(lines_of(tmp_path / stage / "samples.jsonl"), lines_of(recipe / "runs" / stage / "samples.jsonl"))


LAYOUT_FOR_EACH = {
    "two ranks": (2, "policy.parallel.tp=2 value.parallel.pp=2 reference.parallel.pp=2 generation.parallel.tp=1"),
    "four ranks": (
        4,
        "policy.parallel.tp=2 policy.parallel.pp=2 value.parallel.pp=2 reward.parallel.tp=4 reference.parallel.tp=4 "
        "generation.parallel.tp=2",
    ),
    "peers two apart": (4, "policy.parallel.tp=4 value.parallel.pp=2 generation.parallel.tp=2 generation.verify_weights=always"),
}


def check_layout_for_each(folder, runs, overrides):
    """PPO; then the generator, whose weights the run released, and which is given others than the policy's."""
    compared = []
    verify = Publisher.verify
    with mock.patch.object(Publisher, "verify", lambda *args: compared.append(verify(*args))):
        stage = run_stage_of(folder / "ppo.yaml", [f"run.dir={runs / 'ppo'}", *overrides])
    generator, policy = stage.generator, stage.roles.policy
    assert not any(parameter.numel() for parameter in generator.parameters.values())
    prompts = prompt_batch(stage.prompts, pad_id=stage.tokenizer.pad_id)
    with pytest.raises(RuntimeError, match="the generator has no weights"):
        stage.rollouts(prompts, 0)
    generator.publish()
    stage.rollouts(prompts, 0)
    policy.optimizer.publish_masters()
    version = policy.optimizer.weights_version
    with pytest.raises(RuntimeError, match=f"stale weights, version {version - 1}, and the policy's are version {version}"):
        stage.rollouts(prompts, 0)
    return len(compared), str(generator.generator.groups.layout)


@pytest.mark.parametrize("name", LAYOUT_FOR_EACH)
def test_ppo_gives_the_same_curves_with_a_layout_for_each_model(recipe, ranks2, ranks4, name, tmp_path):
    num_ranks, layouts = LAYOUT_FOR_EACH[name]
    found = (ranks2 if num_ranks == 2 else ranks4).run(check_layout_for_each, recipe, tmp_path, layouts.split())
    assert_alike(curves(tmp_path / "ppo"), curves(recipe / "runs" / "ppo"))
    assert_alike(lines_of(tmp_path / "ppo" / "samples.jsonl"), lines_of(recipe / "runs" / "ppo" / "samples.jsonl"))
    updates = [line["rollout/policy_updates"] for line in curves(tmp_path / "ppo")]
    assert updates[0] == 0 and updates == sorted(set(updates))
    for compared, layout in found:
        assert compared == 1 if "generation.verify_weights=always" not in layouts else compared >= len(updates)
        assert layout.endswith("tp_stride2") == (name == "peers two apart")


@pytest.mark.parametrize("overrides", [[], ["parallel.tp=2"]], ids=["dp2", "tp2"])
def test_generate_and_evaluate_give_the_same_on_two_ranks(recipe, ranks2, overrides, tmp_path):
    ranks2.run(check_stages, recipe, tmp_path, ["generate", "evaluate"], overrides)
    for name in ("generate", "evaluate"):
        assert_alike(lines_of(tmp_path / name / "responses.jsonl"), lines_of(recipe / "runs" / name / "responses.jsonl"))
    one, other = (json.loads((runs / "evaluate" / "evaluation.json").read_text()) for runs in (tmp_path, recipe / "runs"))
    assert_alike(one, other)
    names = {"text_loss", "loss", "reward_mean", "kl", "response_len", "finished_fraction"}
    assert one.keys() == {f"valid/{name}" for name in names}


# Resumes


def everything(stage):
    """Role -> kind -> canonical name -> this rank's values: all that a checkpoint's tensors hold."""
    return {role: whole_state(engine) for role, engine in stage.models.items()}


def check_resume(folder, runs, name, overrides):
    """A run that dies in its fourth step, goes on from its second, and ends bit for bit like one that did not."""
    yaml = folder / f"{name}.yaml"
    overrides = ["run.save_every=2", *overrides]
    whole = run_stage_of(yaml, [f"run.dir={runs / 'whole'}", *overrides])
    torch.manual_seed(5)  # the state of torch's generator, which a new process does not share, does not matter
    interrupted = [f"run.dir={runs / 'interrupted'}", *overrides]
    run_stage_of(yaml, interrupted, stop_before=3)
    World.connect().barrier()
    if World.connect().rank == 0:
        assert [line["step"] for line in curves(runs / "interrupted")] == [1, 2, 3]
        shutil.copytree(runs / "interrupted", runs / "elsewhere")
    World.connect().barrier()
    resumed = run_stage_of(yaml, interrupted)
    torch.testing.assert_close(everything(resumed), everything(whole), rtol=0, atol=0)
    assert resumed.state_dict() == whole.state_dict()
    assert find_source(str(runs / "whole")).path.name == find_source(str(runs / "interrupted")).path.name


WORSE = ["model.adam.learning_rate=0.3", "schedule.shape=constant"]
"""SFT that soon gets worse, so that its best checkpoint is not its newest."""
RESUMED = {
    "sft": ["dropout=0.1", "select_by=valid_loss", "run.eval_every=1", "run.keep_checkpoints=1", *WORSE],
    "ppo": ["ppo.iterations=4", "run.eval_every=3", "policy.parallel.tp=2", "ppo.epochs=2", "ppo.minibatch_size=8"],
    "dpo": ["run.eval_every=3", "model.parallel.tp=2", "dpo.loss=ipo"],
    "grpo": ["ppo.iterations=4", "run.eval_every=3", "policy.parallel.tp=2", "ppo.epochs=2", "ppo.advantages=rloo", "ppo.kl_in=reward"],
}


@pytest.mark.parametrize("name", RESUMED)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(recipe, ranks1, ranks2, name, tmp_path):
    ranks2.run(check_resume, recipe, tmp_path, name, RESUMED[name])
    whole = curves(tmp_path / "whole")
    assert [line["step"] for line in whole] == [1, 2, 3, 4]
    assert curves(tmp_path / "interrupted") == whole
    assert lines_of(tmp_path / "interrupted" / "samples.jsonl") == lines_of(tmp_path / "whole" / "samples.jsonl")

    one_rank = [override for override in RESUMED[name] if "parallel" not in override]
    if name == "sft":
        return  # dropout's noise is drawn for each layout
    ranks1.run(check_stages, recipe, tmp_path, [name], [*one_rank, f"run.dir={tmp_path / 'elsewhere'}", "run.save_every=2"])
    assert_alike(curves(tmp_path / "elsewhere"), whole)


def said_by(yaml, overrides, **how):
    """(what a stage printed, what it was refused for)."""
    refused = None
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        try:
            run_stage_of(yaml, overrides, **how)
        except ConfigError as error:
            refused = str(error)
    return printed.getvalue(), refused


def check_folders(folder, runs):
    """What a start in a folder that is not empty does. The runs before it are those of the recipe, copied."""
    yaml, at = folder / "ppo.yaml", f"run.dir={runs / 'ppo'}"
    before = {path: path.read_bytes() for path in sorted((runs / "ppo").rglob("*")) if path.is_file() and path.name != "lock"}
    printed, refused = said_by(yaml, [at])
    assert "already complete at step 2; choose another run.dir" in printed and refused is None
    refusals = {
        (): "--fresh: .* is not empty",
        ("run.seed=2",): r"run.seed is 2, but the run began with 1: order, noise and samples would be another run's; keep it, or choose",
        ("ppo.iterations=1",): "step_00000002 is at step 2, beyond the run's end at 1",
        (f"data.prompts={folder}/demonstrations.jsonl", "ppo.iterations=3"): "data.prompts is not what the run in .* began with",
        ("data.pretraining.seq_len=16",): "saved pretraining stream has seq_len 32",
    }
    for overrides, expected in refusals.items():
        printed, refused = said_by(yaml, [at, *overrides], fresh=not overrides)
        assert refused is not None and re.search(expected, refused), refused
    assert said_by(folder / "sft.yaml", [at])[1] == f"run.dir: {runs / 'ppo'} holds a run of ppo; choose another folder for sft"
    sft = [f"run.dir={runs / 'sft'}", "batch_size=4", "select_by=valid_loss", "run.eval_every=1"]
    assert [line.split(",")[0] for line in said_by(folder / "sft.yaml", sft)[1].splitlines()] == [
        "batch_size is 4",
        'select_by is "valid_loss"',
    ]
    assert {path: path.read_bytes() for path in sorted((runs / "ppo").rglob("*")) if path.is_file() and path.name != "lock"} == before

    printed, refused = said_by(yaml, [at, "ppo.iterations=3", "ppo.clip=0.5", "run.eval_every=1"])
    assert refused is None
    assert "changed since then: ppo.iterations 2 -> 3" in printed and "changed since then: ppo.clip 0.2 -> 0.5" in printed
    assert "changed since then: run.eval_every 0 -> 1" in printed
    assert [line["step"] for line in curves(runs / "ppo")] == [1, 2, 3]

    lines, grown = (folder / "prompts.jsonl").read_text().splitlines(), runs / "grown.jsonl"
    added = [json.dumps({"prompt": f"what of {i}?"}) for i in range(5)]
    for text, allowed, expected in (
        ([*lines, *added], "false", "data.prompts: 5 prompts were added behind those that the run in .* set data.prompts_may_grow: true"),
        ([*lines[1:], *added, lines[0]], "true", "data.prompts is not what the run in .* began with: its content has changed"),
        (lines[:-1], "true", "data.prompts is not what the run in .* began with: its content has changed"),
    ):
        grown.write_text("\n".join(text) + "\n")
        _, refused = said_by(yaml, [at, f"data.prompts={grown}", f"data.prompts_may_grow={allowed}", "ppo.iterations=4", "ppo.clip=0.5"])
        assert refused is not None and re.search(expected, refused), refused
    grown.write_text("\n".join([*lines, *added]) + "\n")
    for iterations in (4, 5):  # the second goes on with the prompts that there are by then, in the same epoch
        more = [f"data.prompts={grown}", "data.prompts_may_grow=true", f"ppo.iterations={iterations}", "ppo.clip=0.5"]
        printed, refused = said_by(yaml, [at, *more])
        assert refused is None, refused
        said = f"5 prompts were added; a new epoch over all {len(lines) + 5} begins"
        assert (said in printed) == (iterations == 4)
    order = ShuffledOrder(len(lines) + 5, seed=1)
    order.take((len(lines) + 5) * -(-3 * 8 // len(lines)))
    samples = lines_of(runs / "ppo" / "samples.jsonl")
    prompts = [json.loads(line)["prompt"] for line in grown.read_text().splitlines()]
    for step in (4, 5):
        batch = [prompts[i] for i in order.take(8)]
        asked = [sample["prompt"] for sample in samples if sample["step"] == step]
        assert asked and asked == batch[: len(asked)]


def test_what_a_start_in_a_used_folder_does(recipe, ranks1, tmp_path):
    for name in ("ppo", "sft"):
        shutil.copytree(recipe / "runs" / name, tmp_path / name)
    ranks1.run(check_folders, recipe, tmp_path)


# Rewards of one's own


def check_functions(folder, runs):
    """A run without a reward model, and what is said of functions that are wrong, and of another one at a resume."""
    file, grpo = runs / "mine.py", folder / "grpo.yaml"
    if World.connect().rank == 0:
        shutil.copy(folder / "my_rewards.py", file)
    World.connect().barrier()
    alone = {"reward.load": "null", "reward.normalize": "false", "ppo.iterations": "1", "reward.micro_batch_size": "8"}

    def started(name, function, **other):
        keys = alone | {"reward.functions": f"[{{function: '{file}:{function}'}}]"} | other
        return said_by(grpo, [f"run.dir={runs / name}", *(f"{key}={value}" for key, value in keys.items())])[1]

    more = {"ppo.iterations": "2"}
    said = {name: started(name, name) for name in ("short", "nothing", "not_a_number", "text", "fails", "absent", "count_e")}
    records = lines_of(folder / "prompts.jsonl")
    if World.connect().rank == 0:
        changed = [{**record, "bonus": 1000} for record in records]
        new = {"prompt": "more?\n"}
        for name, lines in (("changed", changed), ("grown", [*changed, new]), ("more", [*records, new])):
            (runs / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    World.connect().barrier()
    grow = {"data.prompts_may_grow": "true"}
    said["other fields"] = started("count_e", "count_e", **more, **{"data.prompts": runs / "changed.jsonl"})
    said["other fields and more"] = started("count_e", "count_e", **more, **grow, **{"data.prompts": runs / "grown.jsonl"})
    said["more"] = started("count_e", "count_e", **more, **grow, **{"data.prompts": runs / "more.jsonl"})
    more = {"ppo.iterations": "3", "data.prompts": runs / "more.jsonl"}
    said["another name"] = started("count_e", "length", **more)
    said["a model"] = started("count_e", "count_e", **more, **{"reward.load": f"{folder}/runs/reward"})
    World.connect().barrier()
    if World.connect().rank == 0:
        file.write_text(file.read_text() + "\n# changed\n")
    World.connect().barrier()
    said["other content"] = started("count_e", "count_e", **more)
    return said


def test_rewards_of_ones_own_are_used_or_refused_by_name(recipe, ranks2, tmp_path):
    said, other = ranks2.run(check_functions, recipe, tmp_path)
    assert said == other  # on every rank
    for name, expected in {
        "short": "mine.py:short returned 1 values for 8 responses; it must return one for each",
        "nothing": "mine.py:nothing returned None; it must return a list with a number for each of the 8 responses",
        "not_a_number": r"mine.py:not_a_number gave nan for .*prompts.jsonl:\d+, response '.*'; a reward is a finite number",
        "text": r"mine.py:text gave 'good' for .*prompts.jsonl:\d+, response",
        "fails": r"mine.py:fails: KeyError: 'bonus' \(at .*mine.py:\d+, for the response to .*prompts_valid.jsonl:1\)",
        "absent": "reward.functions\\[0\\].function: .*mine.py has no function absent; it has count_e, length, short",
        "another name": "reward.functions\\[0\\].function is not what the run in .* began with: its content has changed",
        "other fields": "what is said besides in data.prompts is not what the run in .* began with: its content has changed",
        "other fields and more": "what is said besides in data.prompts is not what the run in .* began with: its content has changed",
        "a model": "reward.load: the run in .* began without a reward model; keep it so",
        "other content": "reward.functions\\[0\\].function is not what the run in .* began with: its content has changed",
    }.items():
        assert re.search(expected, said[name]), said[name]
    assert said["count_e"] is said["more"] is None
    line = curves(tmp_path / "count_e")[0]
    assert line["rollout/reward_of_count_e"] >= line["rollout/reward_mean"]  # which has the penalty in it
    assert "valid/reward_mean" in line and "rollout/reward_of_model" not in line
    samples = lines_of(tmp_path / "count_e" / "samples.jsonl")
    assert all(sample["reward"] == (sample["response"].count("e") if sample["finished"] else -1.0) for sample in samples)
    first = curves(recipe / "runs" / "grpo")[0]
    assert {"rollout/reward_of_model", "rollout/reward_of_count_e", "rollout/reward_of_length"} <= first.keys()


# The paper's facts


def weights(engine):
    return {name: parameter.detach().clone() for name, parameter in engine.parameters().items()}


def check_facts_before_training(folder, runs):
    """Value from the reward model, generator from the policy, trunks from checkpoints."""
    stage = run_stage_of(folder / "ppo.yaml", [f"run.dir={runs / 'start'}"], stop_before=0)
    stage.generator.publish()
    rollouts = stage.rollouts(prompt_batch(stage.prompts, pad_id=stage.tokenizer.pad_id), 0)
    judged = stage.judged(rollouts)
    last = (rollouts.lengths - 1)[:, None]
    whole = torch.arange(rollouts.tokens.shape[1] - 1) < rollouts.lengths[:, None] - 1
    assert stage.roles.value.spec.architecture.hidden_size < stage.roles.policy.spec.architecture.hidden_size
    torch.testing.assert_close(stage.roles.value.scores(rollouts), stage.roles.reward.scores(rollouts), rtol=0, atol=0)
    reward_values = stage.roles.reward.values(rollouts, whole)
    torch.testing.assert_close(stage.roles.value.values(rollouts, whole), reward_values, rtol=0, atol=0)
    # the value that goes with the last response token is that of the state before it
    torch.testing.assert_close(judged.values.gather(1, last - 1), reward_values.gather(1, last - 1), rtol=0, atol=1e-6)
    unfinished = torch.where(rollouts.finished, stage.roles.reward.scores(rollouts), -1.0)
    torch.testing.assert_close(judged.scores, unfinished, rtol=0, atol=0)
    torch.testing.assert_close(judged.logprobs, rollouts.logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(judged.logprobs, judged.ref_logprobs, rtol=0, atol=1e-5)

    base = run_stage_of(folder / "base.yaml")  # already complete: it has its last weights
    on_base = ["model={load: %s, adam: {learning_rate: 0.001}}" % (folder / "runs" / "base"), f"run.dir={runs / 'reward'}"]
    reward = run_stage_of(folder / "reward.yaml", on_base, stop_before=0)
    trunk = {name: value for name, value in weights(reward.model).items() if not name.startswith("scalar_head")}
    torch.testing.assert_close(trunk, weights(base.model), rtol=0, atol=0)
    assert find_source(str(folder / "runs" / "base" / "checkpoints" / "step_00000004")).path.name == "step_00000004"


def check_first_iteration(folder, runs):
    """One iteration of one minibatch at several temperatures, and without text; returns the metrics."""
    once = ["ppo.iterations=1", "ppo.minibatch_size=8", "ppo.ptx_ratio=1"]
    frozen = run_stage_of(folder / "ppo.yaml", [f"run.dir={runs / 'start'}"], stop_before=0).roles
    before = (frozen.reward.fingerprint(), frozen.reference.fingerprint())
    start = weights(frozen.policy)

    def run(name, *overrides):
        return run_stage_of(folder / "ppo.yaml", [f"run.dir={runs / name}", *once, *overrides])

    ptx = run("ptx")
    assert (ptx.roles.reward.fingerprint(), ptx.roles.reference.fingerprint()) == before
    policy = ptx.roles.policy
    names = {parameter: name for name, parameter in policy.parameters().items()}
    for parameter, average in policy.ema.averages.items():
        moved = torch.lerp(start[names[parameter]], parameter.detach(), 0.1)
        torch.testing.assert_close(average.view(parameter.shape), moved, rtol=1e-6, atol=1e-8)
    with policy.ema.swapped_in():
        assert language_model_loss_on(policy, ptx.held_out.rows) == curves(runs / "ptx")[-1]["valid/text_loss"]
    assert language_model_loss_on(policy, ptx.held_out.rows) != curves(runs / "ptx")[-1]["valid/text_loss"]

    plain, textless = run("plain", "ppo.ptx_coef=0"), run("textless", "ppo.ptx_coef=0", "data.pretraining=null")
    torch.testing.assert_close(everything(plain), everything(textless), rtol=0, atol=0)
    assert not torch.equal(weights(plain.roles.policy)["decoder.final_layernorm.weight"], weights(policy)["decoder.final_layernorm.weight"])
    run("cool", "generation.sampling.temperature=0.5")
    run("trusting", "ppo.recompute_logprobs=false", "generation.sampling.temperature=0.5")


def test_where_ppo_starts_from(recipe, ranks1, tmp_path):
    ranks1.run(check_facts_before_training, recipe, tmp_path)


def test_the_first_iteration_of_ppo(recipe, ranks1, tmp_path):
    ranks1.run(check_first_iteration, recipe, tmp_path)
    ptx, plain, cool, trusting = (curves(tmp_path / name)[0] for name in ("ptx", "plain", "cool", "trusting"))
    assert_alike(trusting, cool)
    for metrics in (ptx, plain, cool):
        assert metrics["policy/ratio"] == 1.0
        assert metrics["policy/approx_kl"] == 0.0
        assert metrics["policy/clip_fraction"] == 0
        assert metrics["rollout/kl"] == pytest.approx(0.0, abs=1e-5)  # the reference is where the policy starts
        assert metrics["rollout/generator_logprob_gap"] < 1e-5
    assert ptx["rollout/reward_mean"] == plain["rollout/reward_mean"] and "ptx/loss" not in plain
    # text is always at temperature 1: before the first update, cool rollouts see the same policy on the same rows
    assert cool["ptx/loss"] == pytest.approx(ptx["ptx/loss"], rel=1e-6)
    assert cool["rollout/reward_mean"] != ptx["rollout/reward_mean"]


def check_first_ratios(folder, runs, precision):
    """The first of several minibatches, of rows of many widths in micro-batches of three."""
    how = [f"{role}.precision={precision}" for role in ("policy", "value", "reference")]
    how += ["policy.parallel.tp=2", "reference.parallel.tp=2", "reference.micro_batch_size=3"]
    how += [f"run.dir={runs / precision}", "generation.sampling.max_new_tokens=20"]
    stage = run_stage_of(folder / "ppo.yaml", how, stop_before=0)
    results = {"policy": [], "value": []}
    for name, engine in stage.models.items():
        step = engine.step
        engine.step = lambda *args, step=step, name=name, **kwargs: results[name].append(step(*args, **kwargs)) or results[name][-1]
    metrics = type(stage).step(stage, 0)
    first, second = (result.stats for result in results["policy"])
    total, count = first["policy/ratio"]
    assert total == count and first["policy/approx_kl"][0] == 0 and first["policy/clip_fraction"][0] == 0
    assert second["policy/approx_kl"][0] != 0  # the first step has moved the policy
    assert metrics["rollout/kl"] == metrics["rollout/kl_k3"] == 0  # the reference is the policy, in its layout and micro-batches
    assert metrics["rollout/generator_logprob_gap"] < {"fp32": 1e-5, "fp16": 0.05, "bf16": 0.5}[precision]
    return metrics


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_first_ratio_is_exactly_one_in_every_precision(recipe, ranks2, precision, tmp_path):
    metrics, other = ranks2.run(check_first_ratios, recipe, tmp_path, precision)
    assert {name: value for name, value in metrics.items() if "/" in name and name.split("/")[0] in ("policy", "rollout")} == {
        name: value for name, value in other.items() if name.split("/")[0] in ("policy", "rollout")
    }


def check_own_rates(folder, runs):
    """How far one iteration moves each model when both have the same rate, and when the value's is a hundredth."""
    moved = {}
    for name, rate in (("same", ADAM["learning_rate"]), ("slow", ADAM["learning_rate"] / 100)):
        how = [f"run.dir={runs / name}", "ppo.iterations=1", f"value.adam.learning_rate={rate}"]
        before = run_stage_of(folder / "ppo.yaml", how, stop_before=0)
        start = {role: weights(engine) for role, engine in before.models.items()}
        after = run_stage_of(folder / "ppo.yaml", how)
        for role, engine in after.models.items():
            changes = [(value - start[role][key]).abs().sum() for key, value in weights(engine).items()]
            moved[name, role] = float(torch.stack(changes).sum())
    return moved


def test_the_value_model_takes_its_own_learning_rate(recipe, ranks1, tmp_path):
    (moved,) = ranks1.run(check_own_rates, recipe, tmp_path)
    assert moved["slow", "value"] == pytest.approx(moved["same", "value"] / 100, rel=0.2)
    assert moved["slow", "policy"] == pytest.approx(moved["same", "policy"], rel=1e-6)
    rates = {name: curves(tmp_path / name)[0] for name in ("same", "slow")}
    assert rates["slow"]["value/learning_rate"] == pytest.approx(rates["same"]["value/learning_rate"] / 100)
    assert rates["slow"]["policy/learning_rate"] == rates["same"]["policy/learning_rate"]


def check_purposes(folder, runs):
    """Every purpose's own draws for the same prompts, by the same weights and seed."""
    stage = run_stage_of(folder / "ppo.yaml", [f"run.dir={runs / 'noise'}"], stop_before=0)
    stage.generator.publish()
    seeds, generator = [], stage.generator.generator
    asked, answer = [], generator.generate
    generator.generate = lambda *args, **how: seeds.append(how["seed"]) or answer(*args, **how)
    prompts, sampling = prompt_batch(stage.prompts, pad_id=stage.tokenizer.pad_id), stage.config.generation.sampling
    for purpose in get_args(Purpose):
        asked.append(generate(generator, prompts, sampling, seed=1, purpose=purpose).tokens.tolist())
    assert len(set(seeds)) == len(set(map(str, asked))) == len(asked) > 4
    by_purpose = dict(zip(get_args(Purpose), seeds, strict=True))
    seeds.clear()
    stage.rollouts(prompts, 0)
    stage.judge.judge()
    assert seeds == [by_purpose["ppo rollouts"], by_purpose["ppo validation"]]
    stage = run_stage_of(folder / "sft.yaml", [f"run.dir={runs / 'sft'}"], stop_before=0)
    found = [stage.judge.purpose, stage.judge.seed]
    judging = mock.patch.object(ResponseJudge, "judge", lambda judge: found.append(judge.purpose) or _enough())
    with judging, mock.patch.object(responses, "generate", lambda *args, **how: found.append(how["purpose"]) or _enough()):
        for name in ("generate", "evaluate"):
            with contextlib.suppress(Interrupted):
                run_stage_of(folder / f"{name}.yaml", [f"run.dir={runs / name}"])
    assert found == ["sft validation", 1, "generate", "evaluate"]


def _enough():
    raise Interrupted


def test_no_two_purposes_share_their_noise(recipe, ranks1, tmp_path):
    ranks1.run(check_purposes, recipe, tmp_path)


def test_every_metric_is_documented(recipe):
    documented = (ROOT / "docs" / "metrics.md").read_text()
    patterns = [re.sub(r"<\w+>", r"\\w+", name) for name in re.findall(r"`([\w<>]+/[\w<>]+)`", documented)]
    written = {name for stage in STAGES for line in lines_of(recipe / "runs" / stage / "metrics.jsonl") for name in line}
    missing = [name for name in written if "/" in name and not any(re.fullmatch(pattern, name) for pattern in patterns)]
    assert not missing
    expected = {"policy/entropy", "rollout/kl_k3", "rollout/return_std", "rollout/value_mean", "throughput/generate_tokens_per_second"}
    expected |= {"throughput/policy_padding_fraction", "throughput/step_tokens_per_second", "memory/peak_bytes"}
    assert expected <= written
    for stage, role in (("base", "model"), ("sft", "model"), ("reward", "reward"), ("ppo", "value")):
        for line in lines_of(recipe / "runs" / stage / "metrics.jsonl"):
            assert 0 <= line[f"throughput/{role}_padding_fraction"] < 1
    for line in lines_of(recipe / "runs" / "ppo" / "metrics.jsonl"):
        assert line["rollout/kl_k3"] >= 0 and 0 < line["policy/entropy"] < math.log(400) and line["rollout/return_std"] > 0


def test_learning_rates_and_scores(recipe):
    ppo, sft, reward = (curves(recipe / "runs" / name) for name in ("ppo", "sft", "reward"))
    peak = ADAM["learning_rate"]
    assert [line["policy/learning_rate"] for line in ppo] == pytest.approx([0.1 * peak, 0.4 * peak])
    assert [line["value/learning_rate"] for line in ppo] == pytest.approx([0.1 * peak, 0.4 * peak])
    assert [line["model/learning_rate"] for line in sft] == pytest.approx([peak, 0.775 * peak, 0.325 * peak, 0.1 * peak])
    assert len(reward) == 4 and reward[-1]["valid/demonstration_score"] == pytest.approx(0.0, abs=1e-6)
    assert [line["rollout/kl_coef"] for line in ppo] == pytest.approx([0.02, 0.02 * (1 - 0.2 * 8 / 40)])  # adaptive: no KL yet
    assert all(line["rollout/generator_logprob_gap"] < 1e-5 for line in ppo)


def test_samples_are_written_down(recipe):
    samples = lines_of(recipe / "runs" / "ppo" / "samples.jsonl")
    assert [line["step"] for line in samples] == [1] * 4 + [2] * 4
    assert all(line["prompt"].endswith("?\n") and isinstance(line["response"], str) and "reward" in line for line in samples)
    assert all(line["reward"] == -1.0 for line in samples if not line["finished"])
    assert [line["step"] for line in lines_of(recipe / "runs" / "sft" / "samples.jsonl")] == [4] * 4


def check_selection(folder, runs):
    """SFT that soon gets worse, judged on every step; then PPO's models out of what it left."""
    kept = ["run.eval_every=1", "run.keep_checkpoints=1"]
    for name, how in {
        "valid_loss": WORSE,
        "reward": ["reward={load: %s, micro_batch_size: 5}" % (folder / "runs" / "reward")],
    }.items():
        run_stage_of(folder / "sft.yaml", [f"run.dir={runs / name}", f"select_by={name}", *kept, *how])
    chosen = {name: find_source(str(runs / name)).path.name for name in ("valid_loss", "reward")}
    loaded = run_stage_of(folder / "ppo.yaml", [f"run.dir={runs / 'ppo'}", f"policy.load={runs / 'valid_loss'}"], stop_before=0)
    return chosen, [note for note in loaded.notes if note.startswith("policy")]


def test_sft_keeps_and_hands_on_the_best_checkpoint(recipe, ranks1, tmp_path):
    chosen, notes = ranks1.run(check_selection, recipe, tmp_path)[0]
    for name, metric, sign in (("valid_loss", "valid/loss", -1), ("reward", "valid/reward_mean", 1)):
        scores = [sign * line[metric] for line in curves(tmp_path / name)]
        best = f"step_{1 + scores.index(max(scores)):08d}"
        assert chosen[name] == best
        assert json.loads((tmp_path / name / "checkpoints" / "best.json").read_text()) == {"step": int(best[5:])}
        kept = {path.name for path in (tmp_path / name / "checkpoints").iterdir()}
        assert kept == {"best.json", best, "step_00000004"}
    assert chosen["valid_loss"] != "step_00000004", "the test wants a best that is not the newest"
    assert len(notes) == 1 and notes[0].endswith(f"valid_loss/checkpoints/{chosen['valid_loss']} (model)")
    assert all("reward" in sample for sample in lines_of(tmp_path / "reward" / "samples.jsonl"))


def check_loading(folder, runs):
    """Which of a checkpoint's models a later stage takes, and in which form."""
    text = ["prompts=null", "demonstrations=null", "reward=null", "reference=null"]
    for name, how in {"average": [], "newest": ["model.load_average=false"]}.items():
        run_stage_of(folder / "evaluate.yaml", [f"run.dir={runs / name}", *text, *how])
    rankings = ["text=null", f"rankings={folder}/rankings_valid.jsonl", *text, "model.load_model=value"]
    run_stage_of(folder / "evaluate.yaml", [f"run.dir={runs / 'value'}", *rankings])
    run_stage_of(folder / "evaluate.yaml", [f"run.dir={runs / 'reward'}", *rankings[:-1], f"model.load={folder}/runs/reward"])


def test_a_later_stage_takes_the_average_of_the_policy_or_what_it_is_told(recipe, ranks1, tmp_path):
    ranks1.run(check_loading, recipe, tmp_path)
    names = ("average", "newest", "value", "reward")
    average, newest, value, reward = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in names)
    assert average["valid/text_loss"] == pytest.approx(curves(recipe / "runs" / "ppo")[-1]["valid/text_loss"], rel=1e-6)
    assert newest["valid/text_loss"] != average["valid/text_loss"]
    final = curves(recipe / "runs" / "reward")[-1]
    assert reward["valid/ranking_loss"] == pytest.approx(final["valid/ranking_loss"], rel=1e-6)
    assert reward["valid/accuracy"] == final["valid/accuracy"]
    assert value["valid/ranking_loss"] != reward["valid/ranking_loss"]  # PPO has moved it


# Epochs, and what is mixed into them


def check_epochs(folder, runs):
    """(rows of each step, steps) of an SFT and a reward run of two epochs whose last batches are short."""
    seen = {}
    for name, overrides in {"sft": ["batch_size=7", "epochs=2"], "reward": ["batch_size=8", "epochs=2"]}.items():
        rows = seen[name] = []
        order = ShuffledOrder.take_batch

        def watched(self, n, rows=rows, order=order):
            rows.append(order(self, n))
            return rows[-1]

        with mock.patch.object(ShuffledOrder, "take_batch", watched):
            run_stage_of(folder / f"{name}.yaml", [f"run.dir={runs / name}", *overrides])
    return seen


def test_an_epoch_takes_each_record_once(recipe, ranks1, tmp_path):
    seen = ranks1.run(check_epochs, recipe, tmp_path)[0]
    for name, num_records, sizes in (("sft", 24, [7, 7, 7, 3]), ("reward", 21, [8, 8, 5])):
        assert [len(rows) for rows in seen[name]] == sizes * 2
        assert len(curves(tmp_path / name)) == len(sizes) * 2
        whole = [item for rows in seen[name] for item in rows]
        assert sorted(whole[:num_records]) == sorted(whole[num_records:]) == list(range(num_records))


def check_mix(folder, runs):
    """The terms of an SFT step with text mixed in, and what the step says of them."""
    stage = run_stage_of(folder / "sft.yaml", [f"run.dir={runs / 'sft'}", "pretraining_mix=0.1", "batch_size=8"], stop_before=0)
    terms = stage.next_terms()
    losses = [language_model_loss_on(stage.model, term.batch) for term in terms]
    shares = pretraining_shares(terms)
    stage.next_terms = lambda: terms
    metrics = type(stage).step(stage, 0)
    plain = run_stage_of(folder / "sft.yaml", [f"run.dir={runs / 'plain'}", "pretraining_mix=0", "batch_size=8"], stop_before=0)
    return [(term.name, term.weight, term.batch.num_rows) for term in terms], losses, shares, metrics, len(plain.next_terms())


def test_pretraining_text_is_a_share_of_the_loss(recipe, ranks1, tmp_path):
    terms, losses, shares, metrics, num_plain = ranks1.run(check_mix, recipe, tmp_path)[0]
    assert terms == [("model", 0.9, 8), ("pretraining", 0.1, 1)] and num_plain == 1
    assert [metrics["model/loss"], metrics["pretraining/loss"]] == pytest.approx(losses, rel=1e-5)
    assert shares["pretraining/loss_share"] == pytest.approx(0.1) and shares["pretraining/row_share"] == pytest.approx(1 / 9)
    assert 0.1 < shares["pretraining/token_share"] < 0.5 and shares.items() <= metrics.items()


# Answers


def check_answers(folder, runs):
    """What is said of a second `generate` and `evaluate` in one folder, by what is changed for it."""
    prompts = lines_of(folder / "prompts.jsonl")[:5]
    with_ids = [{**record, "id": f"q{i}", "response": "given", "topic": {"n": i}} for i, record in enumerate(prompts)]
    for name, records in {"ids": with_ids, "others": prompts[::-1], "renamed": [{**r, "id": 1} for r in with_ids]}.items():
        (runs / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    said = {}
    for stage in ("generate", "evaluate"):
        at, ids = [f"run.dir={runs / stage}"], f"prompts={runs}/ids.jsonl"
        for name, overrides in {
            "first": [], "again": ["model.micro_batch_size=3"], "prompts": [f"prompts={runs}/others.jsonl"],
            "ids": [f"prompts={runs}/renamed.jsonl"], "model": [f"model.load={folder}/runs/sft"], "sampling": ["sampling.temperature=0.5"],
        }.items():
            given = any(override.startswith("prompts=") for override in overrides)
            said[stage, name] = said_by(folder / f"{stage}.yaml", [*at, *overrides, *([] if given else [ids])])[1]
        if stage == "evaluate":  # what it measures besides would stand beside answers of another evaluation
            said[stage, "none"] = said_by(folder / f"{stage}.yaml", [*at, "prompts=null", "reference=null", "reward=null"])[1]
        (runs / stage / "inputs.json").unlink()
        said[stage, "unknown"] = said_by(folder / f"{stage}.yaml", [*at, ids])[1]
    for name in ("sft", "base"):  # a folder of one name, whose model has been trained further by the second start
        (runs / "newest").unlink(missing_ok=True)
        (runs / "newest").symlink_to(folder / "runs" / name)
        at = [f"run.dir={runs / 'moved'}", f"model.load={runs / 'newest'}", ids]
        said["generate", f"newest is {name}"] = said_by(folder / "generate.yaml", at)[1]
    return said


def test_answers_keep_what_their_prompts_said_and_are_not_written_over_by_others(recipe, ranks1, tmp_path):
    said = ranks1.run(check_answers, recipe, tmp_path)[0]
    other = "responses.jsonl holds answers to other input"
    assert said["generate", "newest is sft"] is None and f"{other} (model); choose another" in said["generate", "newest is base"]
    assert f"{other} (prompts, fields of prompts); choose another run.dir" in said["evaluate", "none"]
    for stage in ("generate", "evaluate"):
        assert said[stage, "first"] is said[stage, "again"] is None
        changed = {"prompts": "prompts, fields of prompts", "ids": "fields of prompts", "model": "model", "sampling": "sampling"}
        for name, what in changed.items():
            assert f"responses.jsonl holds answers to other input ({what}); choose another run.dir" in said[stage, name]
        assert "holds answers, and nothing says to what" in said[stage, "unknown"]
        answers = lines_of(tmp_path / stage / "responses.jsonl")
        assert [(line["id"], line["topic"], line["input_response"]) for line in answers] == [(f"q{i}", {"n": i}, "given") for i in range(5)]
        assert all(line["response"] != "given" for line in answers)


def check_broken_models(folder, runs):
    """What is said of models whose numbers are not finite, of each command that would compare or write down what comes of them."""
    build, said = ModelPlanner.build_frozen, {}
    for stage, role, how in (
        ("generate", "model", []),
        ("evaluate", "reward", ["prompts=null", "reference=null", f"rankings={folder}/rankings_valid.jsonl"]),
        ("evaluate", "model", ["prompts=null", "reference=null", "reward=null", "text=null"]),
        ("ppo", "reward", []),
    ):

        def broken(planner, plan, role=role):
            engine = build(planner, plan)
            if plan.role == role:
                engine.parameters()["decoder.final_layernorm.weight"].fill_(math.inf)
            return engine

        with mock.patch.object(ModelPlanner, "build_frozen", broken):
            with pytest.raises(NotFiniteError) as refused:
                run_stage_of(folder / f"{stage}.yaml", [f"run.dir={runs / stage / role}", *how])
        said[f"{stage} {role}"] = str(refused.value)
    return said


def test_a_model_whose_numbers_are_not_finite_answers_and_judges_nothing(recipe, ranks1, tmp_path):
    said = ranks1.run(check_broken_models, recipe, tmp_path)[0]
    assert "log-probabilities of what it says are not finite for 20 of 20 rows in fp32; is its checkpoint sound?" in said["generate model"]
    assert all("a model's scores are not finite for" in said[name] for name in ("evaluate reward", "ppo reward"))
    assert "a model's logprobs are not finite for 8 of 8 rows" in said["evaluate model"]
    assert not (tmp_path / "generate" / "model" / "answers").exists() and not list(tmp_path.rglob("evaluation.json"))


def check_rankings(folder, runs):
    """Rankings judged by a reward model beside a policy, and by the reward model alone, whatever responses might be sampled."""
    only = ["prompts=null", "demonstrations=null", "reference=null", "text=null", f"rankings={folder}/rankings_valid.jsonl"]
    only += ["sampling.max_new_tokens=1000"]
    run_stage_of(folder / "evaluate.yaml", [f"run.dir={runs / 'beside'}", *only])
    alone = ["reward=null", f"model.load={folder}/runs/reward", "model.micro_batch_size=5"]  # the reward model's: the same products
    run_stage_of(folder / "evaluate.yaml", [f"run.dir={runs / 'alone'}", *only, *alone])
    shutil.copytree(runs / "alone", runs / "again")
    run_stage_of(folder / "evaluate.yaml", [f"run.dir={runs / 'again'}", *only[:3], "reward=null"])
    return said_by(folder / "evaluate.yaml", [f"run.dir={runs / 'none'}", *only, "reward=null"])[1]


def test_rankings_are_judged_by_the_reward_model_that_is_given(recipe, ranks1, tmp_path):
    refused = ranks1.run(check_rankings, recipe, tmp_path)[0]
    beside, alone = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("beside", "alone"))
    by_prompt = [f"valid/accuracy_by_prompt{end}" for end in ("", "_low", "_high", "_count")]
    assert beside == alone and beside.keys() == {"valid/ranking_loss", "valid/accuracy", "valid/score_gap", *by_prompt}
    assert json.loads((tmp_path / "again" / "evaluation.json").read_text()).keys() == {"valid/text_loss"}
    assert (tmp_path / "alone" / "rankings.jsonl").exists() and not (tmp_path / "again" / "rankings.jsonl").exists()
    assert "model: load_model must name one of policy, value in" in refused
