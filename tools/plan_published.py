"""Holds `megarlhf plan` against published runs, on their number of GPUs: `python tools/plan_published.py [--only NAME]`.

What is not published is assumed here, in the open; docs/scale.md says why the numbers differ.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from megarlhf.planning.hardware import GPUS, Cluster
from megarlhf.planning.models import run_models
from megarlhf.planning.plan import Plan, make_plan

EXAMPLES = Path(__file__).parents[1] / "examples"
GPT3 = {"num_layers": 96, "hidden_size": 12288, "num_heads": 96}
GPT3_350M = {"num_layers": 24, "hidden_size": 1024, "num_heads": 16}
LLAMA3_70B = {
    "num_layers": 80, "hidden_size": 8192, "num_heads": 64, "num_kv_heads": 8, "ffn_size": 28672, "max_seq_len": 8192,
    "norm": "rmsnorm", "activation": "swiglu", "positions": "rotary", "bias": False, "tied_embeddings": False,
}  # fmt: skip
WITHOUT_TEXT = ("ppo.ptx_coef=0", "ppo.ptx_ratio=1")


@dataclass(frozen=True)
class Published:
    """A run, what was published of it, and how it is planned."""

    name: str
    figure: str
    gpu: str
    nodes: int
    config: str
    keys: tuple[str, ...]
    models: dict[str, dict]

    def planned(self, plan: Plan) -> str:
        """The plan's number for the same."""
        work, gpu = plan.work, plan.cluster.gpu
        if plan.models.config.stage == "pretrain":
            return f"{100 * plan.utilisation:.0f} % MFU, {plan.utilisation * gpu.flops / 1e12:.0f} TFLOP/s per GPU"
        return f"{plan.step_seconds:.0f} s per step, {plan.hours:.1f} h for {work.steps} steps"


def _each(axes: str) -> tuple[str, ...]:
    return tuple(f"{role}.parallel={{{axes}, sequence_parallel: true}}" for role in ("policy", "value", "reward", "reference"))


RUNS = (
    Published(
        "177B on 2304 H100, Megatron-LM", "44 % MFU, 433 TFLOP/s per GPU", "h100-80gb", 288, "6b/pretrain.yaml",
        ("model.parallel={tp: 8, pp: 6, virtual_pp: 4, sequence_parallel: true}", "batch_size=1152", "data.seq_len=4096",
         "model.micro_batch_size=1", "model.recompute=selective"),
        {"model": {**GPT3, "max_seq_len": 4096}},
    ),
    Published(
        "175B on 1024 A100, Megatron-LM", "44 % MFU, 138 TFLOP/s per GPU", "a100-80gb", 128, "6b/pretrain.yaml",
        ("model.parallel={tp: 8, pp: 16, sequence_parallel: true}", "batch_size=1536", "data.seq_len=2048", "model.micro_batch_size=1",
         "model.recompute=full"),
        {"model": GPT3},
    ),
    Published(
        "175B PPO on 64 A100, DeepSpeed-Chat step 3", "20 h", "a100-80gb", 8, "175b/ppo.yaml",
        (*WITHOUT_TEXT, "ppo.batch_size=1024", "ppo.minibatch_size=1024", "ppo.iterations=129", "limits.max_prompt_len=256",
         "generation.sampling.max_new_tokens=256", "value.parallel={tp: 8, sequence_parallel: true}"),
        {"value": GPT3_350M, "reward": GPT3_350M},
    ),
    Published(
        "70B PPO on 96 H100, NeMo-Aligner", "366.7 s per step", "h100-80gb", 12, "175b/ppo.yaml",
        (*WITHOUT_TEXT, *_each("tp: 8, pp: 4"), "ppo.batch_size=1024", "ppo.minibatch_size=128", "limits.max_prompt_len=170",
         "generation.sampling.max_new_tokens=340"),
        dict.fromkeys(("policy", "value", "reward", "reference"), LLAMA3_70B),
    ),
)  # fmt: skip


def main() -> None:
    """Print a row for each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of the name of the runs to plan")
    only = parser.parse_args().only
    for run in RUNS:
        if only not in run.name:
            continue
        gpu = GPUS[run.gpu]
        cluster = Cluster(gpu=gpu, nodes=run.nodes, gpus_per_node=8, inside=gpu.inside, between=gpu.between)
        plan = make_plan(run_models(EXAMPLES / run.config, run.keys, run.models, cluster.num_ranks), cluster)
        print(f"{run.name}: published {run.figure}; planned {run.planned(plan)}")
        seconds = ", ".join(f"{phase} {sum(plan.phase_seconds(phase).values()):.1f} s" for phase in plan.phases)
        print(f"  {seconds}; {'; '.join(plan.verdict)}", flush=True)


if __name__ == "__main__":
    main()
