"""`megarlhf plan`: whose architecture is taken, which ranks are alike, arithmetic of time, what does not fit, and the 175B run itself."""

import contextlib
import dataclasses
import functools
import gzip
import json
import math
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from megarlhf.config import ConfigError, load_stage_config
from megarlhf.engine.footprint import bytes_kept, start_problems
from megarlhf.models.architecture import make_architecture
from megarlhf.models.parameters import shards_held
from megarlhf.parallel.layout import Coordinates, ParallelLayout
from megarlhf.planning import cheap_model, command, search, stages
from megarlhf.planning.dry_run import Part
from megarlhf.planning.estimate import part_seconds, seconds_of
from megarlhf.planning.hardware import CALL_SECONDS, GPUS, KERNEL_SECONDS, LINK_SHARE, MEMORY_SHARE, Cluster
from megarlhf.planning.meter import Cost, Link, Meter
from megarlhf.planning.models import HEADS, run_models
from megarlhf.planning.plan import Plan, dry_runs, make_plan
from megarlhf.planning.rank_classes import rank_classes
from megarlhf.planning.report import as_json, as_text
from megarlhf.planning.reshard_command import parse_layout, traffic
from megarlhf.planning.stages import Job, dry_run, dry_run_each
from megarlhf.planning.work import completions_of_prompt, forward_flops, work_of
from megarlhf.runs.checkpoints import find_source
from tests.unit.apart import ApartFromHost

ROOT = Path(__file__).parents[2]
PPO = ROOT / "examples" / "175b" / "ppo.yaml"
GPT3 = make_architecture("gpt3-125m", vocab_size=50257)
H100 = GPUS["h100-80gb"]
CLUSTER = Cluster(gpu=H100, nodes=2, gpus_per_node=8, inside=H100.inside, between=H100.between)
ONE_GPU = dataclasses.replace(CLUSTER, nodes=1, gpus_per_node=1)


def test_models_whose_checkpoints_are_not_here_are_found_by_the_files_that_make_them():
    models = run_models(PPO, [], {}, 128)
    layers = {role: plan.architecture.num_layers for role, plan in models.plans.items()}
    assert layers == {"policy": 96, "value": 32, "reward": 32, "reference": 96}
    assert any("examples/6b/pretrain.yaml, which makes it" in note for note in models.notes)
    assert any("gpt3-175b is assumed by its name" in note for note in models.notes)
    given = run_models(PPO, [], {"policy": {"preset": "gpt3-13b"}, "value": {"num_layers": 8, "hidden_size": 64, "num_heads": 8}}, 128)
    assert (given.plans["policy"].architecture.num_layers, given.plans["value"].architecture.hidden_size) == (40, 64)
    with pytest.raises(ValueError, match="an architecture has no layers"):
        run_models(PPO, [], {"policy": {"layers": 3}}, 128)
    with pytest.raises(ValueError, match="load here/nothing is not here, .* --architecture reward=PRESET"):
        run_models(PPO, ["reward.load=here/nothing"], {}, 128)


def test_a_hugging_face_folder_is_planned_by_its_config(tmp_path):
    sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    llama = {"model_type": "llama", **sizes, "intermediate_size": 14336, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5}
    folder, file = tmp_path / "Llama-3-8B", tmp_path / "Llama-3-8B" / "config.json"
    folder.mkdir()
    file.write_text(json.dumps(llama))
    others = dict.fromkeys(("value", "reward"), {"preset": "gpt3-6.7b"})
    models = run_models(PPO, [f"policy.load={folder}", f"reference.load={folder}"], others, 8)
    policy = models.plans["policy"].architecture
    assert (policy.num_kv_heads, policy.vocab_size, policy.num_parameters()) == (8, 128256, 8_030_261_248)
    assert any("policy: " in note and "is a Hugging Face folder" in note for note in models.notes)
    for name, load, folder_of in (("sft", folder, "runs/sft"), ("dpo", "runs/sft", "runs/dpo")):
        keys = f"run: {{dir: {folder_of}}}\ntokenizer: {{path: t}}\nmodel: {{load: {load}, adam: {{learning_rate: 1}}}}\ndata: {{train: x}}"
        more = "reference: {load: runs/sft}\n" if name == "dpo" else ""
        (tmp_path / f"{name}.yaml").write_text(f"stage: {name}\n{keys}\n{more}limits: {{max_prompt_len: 9}}\n")
    later = run_models(tmp_path / "dpo.yaml", [], {}, 1)
    assert [plan.architecture for plan in later.plans.values()] == [policy, policy], "what the run before it starts from is there"
    assert any("runs/sft is not here: its architecture is that of " in note and "sft.yaml" in note for note in later.notes)
    for path in (folder, file):
        assert command._assignment(f"policy={path}") == ("policy", policy)
    assert run_models(PPO, [], dict.fromkeys(HEADS["ppo"], policy), 8).notes == (), "no vocabulary has to be assumed"
    file.write_text(json.dumps(llama | {"hidden_act": "gelu"}))
    with pytest.raises(ValueError, match="--architecture policy: .*config.json: llama: hidden_act 'gelu' is not supported"):
        command._assignment(f"policy={folder}")
    with pytest.raises(ValueError, match="nowhere is neither a preset .* nor the path of a Hugging Face folder"):
        command._assignment("policy=nowhere")
    with pytest.raises(ValueError, match="tokenizer: .*Llama-3-8B has no tokenizer.json"):
        run_models(PPO, [f"tokenizer.path={folder}"], {}, 8)
    with pytest.raises(ValueError, match=f"nor a run .*`megarlhf convert --from {folder} --to FOLDER` makes a checkpoint of it"):
        find_source(str(folder))


def test_ranks_are_alike_where_all_their_stages_are():
    classes = rank_classes(run_models(PPO, [], {}, 128))
    found = [(of.rank, of.num_ranks, of.stages["policy"], of.stages["value"]) for of in classes]
    assert found == [(0, 16, 1, 1), (16, 96, 6, 1), (112, 16, 1, 1)]
    assert "first stage of 8 (policy, reference, generation)" == classes[0].name
    mixed = rank_classes(run_models(PPO, ["value.parallel={tp: 8, pp: 4}"], {}, 128))
    assert sum(of.num_ranks for of in mixed) == 128 and len(mixed) == 5


def test_too_few_ranks_are_planned_with_fewer_stages_and_do_not_start():
    models = run_models(PPO, [], {}, 32)
    assert models.plans["policy"].layout == ParallelLayout(tp=8, pp=4, sequence_parallel=True)
    assert "one copy takes tp 8 x pp 8 = 64 ranks, and there are 32" in models.shrunk[0]


def test_seconds_are_the_sum_of_what_is_not_overlapped():
    tp, peers = Link("allreduce", "tp", 8, True), Link("send", "pp", 2, False)
    messages = {"sent": Counter({tp: 8e9, peers: 1e9}), "calls": Counter({tp: 4, peers: 2})}
    cost = Cost(flops=2e15, matmul_bytes=1e9, other_bytes=4e12, kernels=100, **messages)
    seconds = seconds_of(cost, CLUSTER)
    assert seconds["compute"] == pytest.approx(2e15 / (H100.matmul_share * H100.flops))
    assert seconds["memory"] == pytest.approx(4e12 / (MEMORY_SHARE * H100.memory_bandwidth))
    assert seconds["inside nodes"] == pytest.approx(2 * 7 / 8 * 8e9 / (LINK_SHARE * H100.inside) + 4 * CALL_SECONDS)
    assert seconds["between nodes"] == pytest.approx(1e9 / (LINK_SHARE * H100.between) + 2 * CALL_SECONDS)
    assert seconds["kernel starts"] == 0
    tiny = seconds_of(Cost(flops=1e6, matmul_bytes=1e6, kernels=1000), CLUSTER)
    assert sum(tiny.values()) == pytest.approx(1000 * KERNEL_SECONDS) and tiny["compute"] == 0


def test_a_pipeline_waits_for_its_slowest_stage():
    slow, fast = Cost(other_bytes=2e12), Cost(other_bytes=1e12)
    second = 1e12 / (MEMORY_SHARE * H100.memory_bandwidth)
    update = [(Part("update", "policy", "passes", cost, micro_batches=8), 1) for cost in (slow, fast)]
    assert part_seconds(update, CLUSTER, stages=4)["bubble"] == pytest.approx(2 * second * 3 / 8)
    assert part_seconds(update, CLUSTER, stages=4, virtual_stages=3)["bubble"] == pytest.approx(2 * second * 1 / 8)


def test_arithmetic_of_the_papers_runs():
    gpt3 = make_architecture("gpt3-175b", vocab_size=50257)
    tokens = forward_flops(gpt3, "lm", width=2048, logits=2048) / 2048
    h, layers = 12288, 96  # Narayanan et al. 2021, equation 3, without recomputation
    assert tokens == pytest.approx(24 * layers * h**2 * (1 + 2048 / (6 * h) + 50257 / (12 * layers * h)))
    work = work_of(run_models(PPO, [], {}, 128))
    assert work.update_flops * work.steps / 86400e15 == pytest.approx(60, rel=0.05), "Ouyang et al. 2022, section 5: 60 PF-days"
    sft = work_of(run_models(ROOT / "examples/175b/sft.yaml", [], {}, 64))
    assert sft.model_flops * sft.steps / 86400e15 == pytest.approx(4.9, rel=0.1), "and 4.9"
    assert sft.steps == 16 * math.ceil(12725 / 8)


def test_a_run_that_cannot_fit_does_not_start():
    policy = run_models(PPO, [], {}, 128).plans["policy"]
    kept = [("policy", sum(policy.bytes_kept(0).values()))]
    assert kept[0][1] == pytest.approx(33.87e9, rel=0.01)  # weights 5.6, gradients 11.3, masters 5.6, moments 11.3
    assert start_problems(kept, None, rank=0) == [] and start_problems(kept, 80e9, rank=0) == []
    (problem,) = start_problems(kept, 30e9, rank=3)
    assert problem.startswith("it does not fit: what rank 3 keeps between steps (policy 33.9 GB) needs 33.9 GB")
    assert "one GPU here has 30.0 GB: 4.9 GB are missing" in problem


def test_what_is_kept_by_description():
    a = make_architecture(None, vocab_size=256, num_layers=2, hidden_size=64, num_heads=4)
    layout = ParallelLayout(tp=2, dp=4)
    kept = bytes_kept(a, "lm", layout, layout.coordinates(0), precision="bf16", trained=True, average=True)
    assert kept["gradients"] == 2 * kept["weights"] == 4 * kept["masters"] == 2 * kept["moments"] == 4 * kept["average"]
    alone = bytes_kept(a, "scalar", layout, layout.coordinates(0), precision="fp32", trained=False)
    assert set(alone) == {"weights"}


def test_what_the_command_line_refuses(capsys):
    def said(*words):
        assert command.main([*words]) == 2
        return capsys.readouterr().err

    assert "--nodes must be above 0" in said("--config", str(PPO), "--gpu", "h200", "--nodes", "0")
    assert "MODEL=PRESET" in said("--config", str(PPO), "--gpu", "h200", "--architecture", "policy")
    assert "stage is evaluate" in said("--config", str(ROOT / "examples/quickstart/evaluate.yaml"), "--gpu", "h200")
    for stage, key in ((PPO, "generation.sampling.kv_cache_bytes"), (PPO.with_name("sft.yaml"), "sampling.kv_cache_bytes")):
        assert f"plan: {key} 99 holds no row" in said("--config", str(stage), "--gpu", "h200", f"{key}=99")
    with mock.patch.object(command.importlib.util, "find_spec", lambda name: None):
        assert "--png needs matplotlib" in said("--config", str(PPO), "--png", "plan.png")
    assert "is no layout" in said("reshard", "--from", "8x8", "--to", "tp8", "--preset", "gpt3-175b")
    assert "is no layout" in said("reshard", "--from", "tp8", "--to", "tp8@x", "--preset", "gpt3-175b")
    assert "does not divide" in said("reshard", "--from", "tp2pp2", "--to", "tp8", "--preset", "gpt3-125m")
    assert "must be above 0" in said("reshard", "--from", "tp2", "--to", "tp1", "--preset", "gpt3-125m", "--gpus-per-node", "0")


def test_a_reshard_at_1024_ranks_is_planned_by_arithmetic(capsys):
    assert command.main(["reshard", "--from", "tp8pp8dp16", "--to", "tp8pp1", "--preset", "gpt3-175b"]) == 0
    said = capsys.readouterr().out
    for line in (
        "tp8 pp8 dp16 -> tp8 pp1 dp128, 175 B parameters in bf16",
        "GB per rank received: least 38.06, mean 38.22, most 38.27",  # 7 / 8 of 43.7
        "busiest link: rank 0 to other nodes, 38.88 GB",
        "(the target's 43.71 GB but for 5.44 GB in place, and at most two buckets of 0.27 GB)",
        "about 0.97 s on 128 x 8 h100-80gb",
    ):
        assert line in said


def test_a_reshard_onto_other_ranks(capsys):
    assert command.main(["reshard", "--from", "tp2pp2", "--to", "tp2dp1@4", "--preset", "gpt3-125m", "--gpus-per-node", "4"]) == 0
    said = capsys.readouterr().out
    half = 2 * sum(math.prod(shard.shape) for shard in shards_held(GPT3, "lm", ParallelLayout(tp=2), Coordinates(0, 0, 0)).values())
    assert said.startswith("tp2 pp2 dp1 -> tp2 pp1 dp1 from rank 4 on") and "on 2 x 4 h100-80gb" in said
    assert f"rank 4: bytes kept 0, sent 0, received {half:,}\n" in said
    assert f"the target's {half / 1e9:.2f} GB but for 0.00 GB in place" in said


def test_traffic_of_a_publishing_covers_the_target():
    a = make_architecture("gpt3-125m", vocab_size=50257)
    source, target = parse_layout("tp2pp4dp2"), parse_layout("tp2pp1", 16)
    moved = traffic(a, source, target, gpus_per_node=4)
    held = bytes_kept(a, "lm", target, target.coordinates(0), precision="bf16", trained=False)["weights"]
    assert all(kept + received == held for kept, received in zip(moved.kept, moved.received, strict=True))
    assert sum(moved.sent) == sum(moved.received) and moved.target_bytes == held
    assert traffic(a, source, source, gpus_per_node=4).sent == [0] * 16


OFFLOAD = ["policy.offload=[gradients, optimizer, average]", "value.offload=[weights, gradients, optimizer]", "reward.offload=[weights]",
           "reference.offload=[weights]"]  # fmt: skip


@pytest.fixture(scope="module")
def plans_of_first_class():
    """Nodes -> the 175B run's plan as its first rank shows it, in the phases that need most there."""
    jobs = {}
    for nodes, keys, phases in ((16, (), ("generate", "update")), (8, OFFLOAD, ("score", "update")), (4, (), ("generate",))):
        jobs[nodes] = Job(run_models(PPO, keys, {}, 8 * nodes), 0, 8, phases)
    with mock.patch.object(stages, "Meter", ApartFromHost):
        runs = dry_run_each(list(jobs.values()))
    clusters = {nodes: dataclasses.replace(CLUSTER, nodes=nodes) for nodes in jobs}
    return {
        nodes: Plan(job.models, clusters[nodes], rank_classes(job.models)[:1], [run], work_of(job.models))
        for (nodes, job), run in zip(jobs.items(), runs, strict=True)
    }


def test_the_175b_run_fits_16_nodes(plans_of_first_class):
    plan = plans_of_first_class[16]
    assert plan.fits and plan.verdict[0].startswith("it fits: generate needs most, 64.1 GB")
    kept = {kind: size / 1e9 for kind, size in plan.runs[0].held["policy"].items()}
    assert kept == pytest.approx({"weights": 5.64, "gradients": 11.29, "masters": 5.64, "moments": 11.29, "average": 5.64}, abs=0.01)
    assert plan.peak("update")[0] == pytest.approx(62.5e9, rel=0.01)  # docs/scale.md
    assert 0.3 < plan.update_utilisation < 0.5
    assert as_json(plan)["largest"]["phase"] == "generate" and "it fits" in as_text(plan)


def test_the_175b_run_fits_8_nodes_with_offload_alone(plans_of_first_class):
    plan = plans_of_first_class[8]
    assert plan.fits and plan.largest_phase == "update"
    held = plan.runs[0].held
    rests = [held["policy"][kind] for kind in ("masters", "moments", "average")]
    rests += [held["value"][kind] for kind in ("weights", "masters", "moments")]
    rests += [held[role]["weights"] for role in ("reward", "reference")]
    assert plan.host_bytes == pytest.approx(sum(rests), rel=1e-3)
    kept = {role: sum(kinds.values()) for role, kinds in held.items()}
    without_offload = sum(kept.values()) + sum(plan.runs[0].peaks["update"][tag] for tag in ("activations", "other"))
    assert without_offload > plan.cluster.usable_bytes, "the same run does not fit without"
    used = kept["policy"] - held["policy"]["average"] + kept["value"]
    assert sum(size for tag, size in plan.runs[0].peaks["update"].items() if ": " in tag) == pytest.approx(used, rel=1e-3)
    assert plan.phase_seconds("update")["host link"] > 0 and "pinned host memory" in as_text(plan)


def test_the_175b_run_does_not_fit_4_nodes(plans_of_first_class):
    plan = plans_of_first_class[4]
    assert not plan.fits and len(plan.verdict) == 3
    assert "planned with pp 4" in plan.verdict[0]
    of_class = "the class 'first stage of 4 (policy, reference, generation)' (rank 0)"
    assert f"it does not fit: generate on ranks of {of_class} needs 163.5 GB" in plan.verdict[2]
    assert "83.6 GB are missing" in plan.verdict[2] and plan.missing_bytes == pytest.approx(83.6e9, abs=0.05e9)


KINDS = {
    "quickstart/pretrain": {"build", "update", "save"},
    "quickstart/sft": {"build", "update", "save"},
    "quickstart/ppo_init": {"build", "update", "save"},
    "quickstart/reward": {"build", "update", "save"},
    "quickstart/dpo": {"build", "score", "update", "save"},
    "quickstart/ppo": {"build", "reshard", "generate", "score", "update", "save"},
    "quickstart/grpo": {"build", "reshard", "generate", "score", "update", "save"},
    "smollm2_135m/reward": {"build", "update", "save"},
}


def test_a_file_of_rankings_says_how_many_answers_a_prompt_has(tmp_path):
    config, file = ROOT / "examples/quickstart/dpo.yaml", tmp_path / "rankings.jsonl.gz"
    records = [{"prompt": "p", "chosen": "a", "rejected": "b"}] * 2
    records += [{"prompt": "p", "responses": ["a", "b", "c"], "ranks": [1, 2, 3]}] * 3
    for number, expected in ((2, 2), (5, 3)):
        file.write_bytes(gzip.compress("\n".join(map(json.dumps, records[:number])).encode()))
        assert completions_of_prompt(load_stage_config(config, [f"data.train={file}"])) == (expected, ())
    array = tmp_path / "rankings.jsonl"
    array.write_text("[\n{}\n]\n")
    with pytest.raises(ConfigError, match="data.train: .*rankings.jsonl:1: broken JSON"):
        completions_of_prompt(load_stage_config(config, [f"data.train={array}"]))


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_run_is_planned(name):
    trained = "policy" if {"generate"} <= KINDS[name] else "model"
    small = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "max_seq_len": 1024}
    given = dict.fromkeys(HEADS[load_stage_config(ROOT / f"examples/{name}.yaml").stage], small)
    keys = [f"{trained}.parallel={{tp: 1}}", f"{trained}.micro_batch_tokens=1024"]
    models = run_models(ROOT / f"examples/{name}.yaml", keys, given, 1)
    plan = Plan(models, ONE_GPU, rank_classes(models), [dry_run(models, 0, 1)], work_of(models))
    assert set(plan.phases) == KINDS[name] and plan.fits and "1024 tokens" in as_text(plan)
    assert set(as_json(plan)["seconds"]) == KINDS[name] - {"build", "save"}
    update = [part for part in plan.runs[0].parts if part.what == "forward and backward"]
    assert {part.model for part in update} == {role for role, kept in plan.runs[0].held.items() if kept["gradients"]}
    # the vocabulary is padded and recomputed where it takes several chunks, and flash attention counts its scores twice backward
    assert sum(part.cost.flops for part in update) == pytest.approx(plan.work.update_flops, rel=0.2)


def test_operations_seen_before_give_and_cost_the_same():
    meta = {"device": "meta"}
    made = lambda: (torch.empty(6, 8, **meta), torch.empty(8, 8, dtype=torch.bfloat16, **meta))  # noqa: E731
    calls = [
        lambda x, y: x.to(y.dtype) @ y, lambda x, y: x.t() @ x, lambda x, y: x * 2, lambda x, y: y * 2.0, lambda x, y: x > 2,
        lambda x, y: x.topk(3), lambda x, y: x.add_(y[:6]), lambda x, y: torch.stack([x, x]), lambda x, y: x.sum(0, keepdim=True),
        lambda x, y: F.layer_norm(x, (8,)), lambda x, y: x.t().clone(), lambda x, y: torch.ones(3, **meta), lambda x, y: x.view(48),
        lambda x, y: torch.where(x > 0, x, 0), lambda x, y: torch.var_mean(x, dim=1), lambda x, y: torch._foreach_mul([x, x], 2.0),
        lambda x, y: F.scaled_dot_product_attention(x[None], x[None], x[None]), lambda x, y: x.resize_(3), lambda x, y: y.fill_(1),
    ]  # fmt: skip

    def described(call, meter=None):
        """(shape, stride, dtype, place of the argument that it is, or None) of each result, and what the call cost."""
        given = made()
        before = meter and meter.cost.copy()
        out = call(*given)
        outs = out if isinstance(out, tuple | list) else [out]
        seen = [(o.shape, o.stride(), o.dtype, next((i for i, x in enumerate(given) if x is o), None)) for o in outs]
        assert len({o.untyped_storage()._cdata for o in outs}) == len(outs)
        return seen, meter and meter.cost - before

    with Meter(torch.device("meta")) as meter:
        found = [(described(call, meter), described(call, meter), described(call, meter)) for call in calls]
        assert meter.live_bytes == 0
    for call, (first, *later) in zip(calls, found, strict=True):
        assert first[0] == described(call)[0] and later == [first, first]
    assert meter.cost.flops == 3 * (2 * 6 * 8 * 8 + 2 * 8 * 6 * 8 + 4 * 6 * 6 * 8)


def test_the_command_on_a_small_run(tmp_path, capsys):
    words = ["--config", str(ROOT / "examples/quickstart/pretrain.yaml"), "--gpu", "a100-40gb", "--gpus-per-node", "2"]
    written = tmp_path / "plan.json"
    assert command.main([*words, "--json", str(written), "model.parallel.pp=2"]) == 0
    said, found = capsys.readouterr().out, json.loads(written.read_text())
    names = [of["name"] for of in found["classes"]]
    assert "it fits: update needs most" in said and names == ["first stage of 2 (model)", "last stage of 2 (model)"]
    assert found["step_seconds"] > 0 and found["seconds"]["update"]["bubble"] > 0
    with mock.patch("megarlhf.planning.plan.dry_runs", functools.partial(dry_runs, processes=1)):
        assert command.main([*words, "--reserve-gb", "42.3"]) == 1
    less = "a smaller micro_batch_size (or micro_batch_tokens), recompute, larger tp or pp, more nodes"
    assert f"GB are missing; what needs less of each GPU: {less}; --search" in capsys.readouterr().out


def test_a_dry_run_keeps_nothing_for_the_next():
    small, wide = ({"num_layers": 2, "hidden_size": hidden, "num_heads": 4, "max_seq_len": 512} for hidden in (64, 1024))

    def run(architecture):
        keys = ["model.parallel={tp: 2, sequence_parallel: true}", f"model.architecture={json.dumps(architecture)}"]
        return dry_run(run_models(ROOT / "examples/quickstart/pretrain.yaml", keys, {}, 2), 0, 2)

    before, between, after = run(small), run(wide), run(small)
    assert (before.held, before.peaks, before.parts) == (after.held, after.peaks, after.parts)
    assert between.peaks["update"]["other"] > 10 * before.peaks["update"]["other"]


BIG = {"num_layers": 12, "hidden_size": 2048, "num_heads": 16, "max_seq_len": 1024}


SEARCHED = ROOT / "examples/6b/pretrain.yaml"
SEARCHED_KEYS = ["batch_size=64", "data.seq_len=1024", f"model.architecture={json.dumps(BIG)}"]
ONE_NODE = dataclasses.replace(CLUSTER, nodes=1)


@contextlib.contextmanager
def few_choices(*, tensor_sizes, recompute):
    """A smaller space, which takes fewer calibrations."""
    with contextlib.ExitStack() as stack:
        for module in (search, cheap_model):
            stack.enter_context(mock.patch.object(module, "RECOMPUTE", recompute))
        stack.enter_context(mock.patch.object(cheap_model.CheapModel, "tensor_sizes", lambda self: tensor_sizes))
        yield


@pytest.fixture(scope="module")
def model():
    with few_choices(tensor_sizes=[2, 4], recompute=("none", "full")):
        yield cheap_model.CheapModel(SEARCHED, SEARCHED_KEYS, {}, ONE_NODE, processes=1)


def test_a_search_finds_the_best_of_its_space(model):
    space = [model.estimate(choice) for choice in search.candidates(model)]
    found = search.search(model)
    assert len({estimate.choice for estimate in space}) == len(space) == len(found.best) + len(found.too_large) > 40
    assert found.best[0].seconds == min(e.seconds for e in space if e.peak_bytes <= ONE_NODE.usable_bytes)
    tight = dataclasses.replace(ONE_NODE, reserved_bytes=H100.memory_bytes - min(e.peak_bytes for e in space) - 1)
    with mock.patch.object(model, "cluster", tight):
        found = search.search(model)
    assert len(found.best) == 1 and "fell out for their memory" in search.as_text(found, tight)
    assert "not searched" not in search.as_text(found, tight)


def require_as_estimated(model, best):
    """A candidate's estimate against its dry run, phase by phase where a phase takes a tenth of the step or more."""
    plan = make_plan(model.models_of(best.choice), model.cluster, processes=1)
    assert best.seconds == pytest.approx(plan.step_seconds, rel=0.05), best
    assert best.peak_bytes == pytest.approx(plan.peak(plan.largest_phase)[0], rel=0.05), best
    for phase in ("generate", "score", "update"):
        seconds = sum(sum(of.values()) for (where, _, what), of in plan.seconds.items() if where == phase and "offload" not in what)
        if seconds > 0.1 * plan.step_seconds:
            assert best.phase_seconds[phase] == pytest.approx(seconds, rel=0.1), (phase, best)


def test_the_best_layouts_are_as_estimated(model):
    found = search.search(model)
    for best in (found.best[0], next(e for e in found.best if e.choice.layout.virtual_pp > 1)):
        require_as_estimated(model, best)


MEDIUM = {"num_layers": 8, "hidden_size": 2048, "num_heads": 16, "max_seq_len": 2048}
LITTLE = {**MEDIUM, "num_layers": 4, "hidden_size": 1024}
PPO_KEYS = ["value.parallel={tp: 1}", "reward.parallel={tp: 1}", "ppo.batch_size=128", "ppo.minibatch_size=32", "ppo.ptx_ratio=1",
            "generation.sampling.max_batch_size=32", "generation.sampling.max_new_tokens=256", "limits.max_prompt_len=256",
            "data.pretraining.seq_len=1024"]  # fmt: skip


def test_a_search_for_ppo_knows_offload_and_where_generation_lies():
    given = {"policy": MEDIUM, "reference": MEDIUM, "value": LITTLE, "reward": LITTLE}
    nodes = dataclasses.replace(CLUSTER, nodes=2, gpus_per_node=4)
    with few_choices(tensor_sizes=[2], recompute=("none",)):
        model = cheap_model.CheapModel(ROOT / "examples/1.3b_single_node/ppo.yaml", PPO_KEYS, given, nodes, processes=1)
        found = search.search(model)
        space = list(search.candidates(model))
    assert found.best[0].seconds == min(estimate.seconds for estimate in found.best) and len(found.best) == len(set(space)) == len(space)
    assert "\nnot searched, as configured: value tp1 pp1 dp8, reward tp1 pp1 dp8; " in search.as_text(found, nodes)
    at_rest = {e.choice: e for e in found.best if e.choice.offload}
    for e in found.best:
        if not e.choice.offload:
            other = at_rest[dataclasses.replace(e.choice, offload=True)]
            assert other.peak_bytes < e.peak_bytes and other.seconds > e.seconds
    kinds = [lambda of: True, lambda of: of.layout.pp > 1 and not of.gathered, lambda of: of.offload and of.layout.pp == 1]
    for kind in kinds:
        require_as_estimated(model, next(e for e in found.best if kind(e.choice)))
