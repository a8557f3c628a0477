"""A plan in words, as a table for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence

from megarlhf.planning.dry_run import OF_PHASES, tags_by_kind
from megarlhf.planning.estimate import TERMS
from megarlhf.planning.hardware import GB
from megarlhf.planning.holdings import KINDS
from megarlhf.planning.plan import OF_A_STEP, Plan

BAR = 40


def as_text(plan: Plan) -> str:
    """Everything a plan says, with a picture made of letters."""
    models = plan.models
    lines = [f"{models.config.stage} on {plan.cluster}", ""]
    lines += [f"  {note}" for note in (*models.notes, *plan.work.notes)]
    lines += ["", *_models(plan), "", *_memory(plan), "", *_picture(plan), "", *_time(plan), "", *_run(plan), ""]
    return "\n".join([*lines, *plan.verdict]) + "\n"


def _models(plan: Plan) -> list[str]:
    rows = [["model", "parameters", "layout", "micro-batch", "recompute", "offload", *(f"{kind}, GB" for kind in KINDS)]]
    for role, of in plan.models.plans.items():
        most = {kind: max(run.held[role][kind] for run in plan.runs) / GB for kind in KINDS}
        numbers = [f"{most[kind]:.2f}" if most[kind] else "-" for kind in KINDS]
        recompute = getattr(of.config, "recompute", "-")
        tokens = of.config.micro_batch_tokens
        size = str(of.config.micro_batch_size) if tokens is None else f"{tokens} tokens"
        offload = " ".join(of.offload) or "-"
        rows.append([role, f"{of.architecture.num_parameters(of.head) / 1e9:.3g} B", str(of.layout), size, recompute, offload, *numbers])
    lines = _table(rows, "per GPU between steps, of the rank that holds most:")
    if plan.host_bytes:
        of_node = f"{plan.host_bytes_of_node / GB:,.0f} GB per node"
        lines.append(f"  pinned host memory for what rests: {plan.host_bytes / GB:.1f} GB per GPU, {of_node}")
    if plan.models.generation is not None:
        lines.append(f"  generation: {plan.models.generation}" + (", in place" if _in_place(plan) else ", a copy"))
    return lines


def _in_place(plan: Plan) -> bool:
    policy, generation = plan.models.plans["policy"].layout, plan.models.generation
    return (policy.tp, policy.pp, policy.virtual_pp) == (generation.tp, generation.pp, generation.virtual_pp)


def _memory(plan: Plan) -> list[str]:
    rows = [["GB at the peak of", *OF_PHASES, "kept", "in all", "class", "rank"]]
    for phase in plan.phases:
        for run, of in zip(plan.runs, plan.classes, strict=True):
            if phase not in run.peaks:
                continue
            kinds = tags_by_kind(run.peaks[phase])
            kept = sum(size for kind, size in kinds.items() if kind not in OF_PHASES)
            parts = [f"{kinds[kind] / GB:.2f}" if kinds[kind] > 5e6 else "-" for kind in OF_PHASES]
            rows.append([phase, *parts, f"{kept / GB:.2f}", f"{run.peak(phase) / GB:.2f}", of.name, f"{of.rank} of {of.num_ranks}"])
    limit = f"{plan.cluster.usable_bytes / GB:.1f} GB for tensors, {plan.cluster.reserved_bytes / GB:.1f} GB for CUDA and NCCL"
    return _table(rows, f"live bytes when most are live; one {plan.cluster.gpu.name} has {limit}:")


def _picture(plan: Plan) -> list[str]:
    letters = {"weights": "w", "gradients": "g", "masters": "m", "moments": "a", "average": "e", "activations": "+", "logits": "l"}
    letters |= {"key-value cache": "k", "buckets": "b", "other": "o"}
    scale = BAR / plan.cluster.gpu.memory_bytes
    lines = []
    for phase in plan.phases:
        kinds = tags_by_kind(plan.runs[plan.peak(phase)[1]].peaks[phase])
        bar, total = "", 0.0
        for kind, letter in letters.items():
            total += kinds[kind]
            bar += letter * (round(total * scale) - len(bar))
        limit = round(plan.cluster.usable_bytes * scale)
        bar = bar.ljust(max(limit, len(bar)))
        lines.append(f"  {phase:9} {bar[:limit]}|{bar[limit:]}")
    legend = ", ".join(f"{letter} {kind}" for kind, letter in letters.items())
    return [*lines, f"  ({legend}; | limit)"]


def _time(plan: Plan) -> list[str]:
    rows = [["seconds of", *TERMS, "in all", "bound by"]]
    for (phase, role, what), seconds in plan.seconds.items():
        if sum(seconds.values()) >= 0.05:
            rows.append(_time_row(f"{phase}: {role}, {what}", seconds))
    for phase in OF_A_STEP:
        if phase in plan.phases and sum(plan.phase_seconds(phase).values()) > 0:
            rows.append(_time_row(phase, plan.phase_seconds(phase)))
    return _table(rows, "time of one step with rows as long as they may be (an estimate: docs/scale.md):")


def _time_row(name: str, seconds) -> list[str]:
    total = sum(seconds.values())
    numbers = [f"{seconds[term]:.1f}" if seconds[term] >= 0.05 else "-" for term in TERMS]
    return [name, *numbers, f"{total:.1f}", max(TERMS, key=lambda term: seconds[term]) if total else "-"]


def _run(plan: Plan) -> list[str]:
    work, cluster = plan.work, plan.cluster
    of = "of the episodes" if work.episode_tokens else "trained on"
    gpu_hours = plan.hours * cluster.num_ranks
    takes = f"{plan.hours:,.1f} hours, {gpu_hours:,.0f}" if plan.hours >= 1 else f"{60 * plan.hours:.1f} minutes, {gpu_hours:.2f}"
    return [
        f"one step: {plan.step_seconds:.1f} s, {plan.tokens_per_second_per_gpu:.0f} tokens/s/GPU {of}, "
        f"MFU {100 * plan.utilisation:.1f} % (update alone {100 * plan.update_utilisation:.1f} %)",
        f"the run: {work.steps:,} steps, {takes} GPU-hours, "
        f"{plan.pf_days:.3g} PF-days of model arithmetic",
    ]


def _table(rows: Sequence[Sequence[str]], title: str) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    number = [all(_is_number(row[i]) for row in rows[1:]) for i in range(len(rows[0]))]
    lines = [title]
    for row in rows:
        cells = [cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(row, widths, number, strict=True)]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines


def _is_number(text: str) -> bool:
    return text == "-" or text.replace(".", "", 1).isdigit()


def as_json(plan: Plan) -> dict:
    """The numbers of a plan; bytes, seconds, FLOPs."""
    classes = []
    for run, of in zip(plan.runs, plan.classes, strict=True):
        phases = {phase: {"peak_bytes": run.peak(phase), "by_tag": run.peaks[phase]} for phase in run.peaks}
        parts = [
            {
                "phase": part.phase, "model": part.model, "what": part.what, "micro_batches": part.micro_batches,
                "flops": part.cost.flops, "matmul_bytes": part.cost.matmul_bytes, "other_bytes": part.cost.other_bytes,
                "kernels": part.cost.kernels, "host_bytes": part.cost.host_bytes,
                "collectives": [{**link._asdict(), "bytes": sent, "calls": part.cost.calls[link]} for link, sent in part.cost.sent.items()],
            }
            for part in run.parts
        ]  # fmt: skip
        classes.append({"name": of.name, "rank": of.rank, "ranks": of.num_ranks, "kept": run.held, "phases": phases, "parts": parts})
    needed, number = plan.peak(plan.largest_phase)
    return {
        "stage": plan.models.config.stage,
        "cluster": {"gpu": plan.cluster.gpu.name, "nodes": plan.cluster.nodes, "gpus_per_node": plan.cluster.gpus_per_node},
        "assumed": [*plan.models.notes, *plan.work.notes],
        "fits": plan.fits,
        "host_bytes": plan.host_bytes,
        "verdict": plan.verdict,
        "largest": {"phase": plan.largest_phase, "class": plan.classes[number].name, "bytes": needed, "missing_bytes": plan.missing_bytes},
        "classes": classes,
        "seconds": {phase: dict(plan.phase_seconds(phase)) for phase in OF_A_STEP if phase in plan.phases},
        "step_seconds": plan.step_seconds,
        "tokens_per_second_per_gpu": plan.tokens_per_second_per_gpu,
        "mfu": plan.utilisation,
        "update_mfu": plan.update_utilisation,
        "steps": plan.work.steps,
        "hours": plan.hours,
        "gpu_hours": plan.hours * plan.cluster.num_ranks,
        "pf_days": plan.pf_days,
    }
