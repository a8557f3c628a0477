"""`megarlhf plan reshard --from LAYOUT --to LAYOUT --preset PRESET`: what moves when weights go to a generation layout; arithmetic only."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from megarlhf.config import ConfigError
from megarlhf.models.architecture import Architecture
from megarlhf.models.transformer import layout_violations
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.planning.hardware import LINK_SHARE, Cluster
from megarlhf.resharding.execute import BUCKET_BYTES
from megarlhf.resharding.plan import ReshardPlan, nearest_layout, plan_reshard

LAYOUT = re.compile(r"tp(\d+)(?:pp(\d+))?(?:dp(\d+))?(?:v(\d+))?")
BF16 = 2


@dataclass(frozen=True)
class Traffic:
    """What one publishing moves, at bf16."""

    plan: ReshardPlan
    kept: list[int]
    sent: list[int]
    received: list[int]
    between: list[int]
    """Bytes that each rank exchanges with other nodes, the larger of both directions."""

    @property
    def target_bytes(self) -> int:
        """Weights of one rank in the target layout, the most of all ranks."""
        return max(kept + received for kept, received in zip(self.kept, self.received, strict=True))

    def seconds(self, cluster: Cluster) -> float:
        """Of the busiest link: a rank's, inside its node or to other nodes."""
        times = []
        for rank, between in enumerate(self.between):
            inside = max(self.sent[rank], self.received[rank]) - between
            times.append(max(0, inside) / (LINK_SHARE * cluster.inside) + between / (LINK_SHARE * cluster.between))
        return max(times)


def parse_layout(text: str, num_ranks: int | None = None) -> ParallelLayout:
    """ "tp8pp8dp16" as a layout; without dp it is spread over `num_ranks`. ConfigError where it is none."""
    found = LAYOUT.fullmatch(text)
    if found is None:
        raise ConfigError(f"{text!r} is no layout: it is written as tp8pp8dp16, with v2 at its end for two virtual stages")
    tp, pp, dp, virtual = (int(part) if part else None for part in found.groups())
    pp, virtual = pp or 1, virtual or 1
    if min(tp, pp, dp or 1, virtual) < 1:
        raise ConfigError(f"{text!r} is no layout: its numbers must be above 0")
    try:
        layout = ParallelLayout.over(num_ranks or tp * pp * (dp or 1), tp=tp, pp=pp, virtual_pp=virtual)
    except ValueError as error:
        raise ConfigError(f"{text}: {error}") from error
    if dp is not None and layout.dp != dp:
        of = f"{text} has {tp * pp * dp} ranks, and the other layout has {num_ranks}"
        raise ConfigError(f"{of}: weights are resharded between layouts over the same ranks")
    return layout


def traffic(architecture: Architecture, source: ParallelLayout, target: ParallelLayout, *, gpus_per_node: int) -> Traffic:
    """What moves from `source` to `target`. ConfigError where a layout does not hold such a model."""
    for layout in (source, target):
        if found := layout_violations(architecture, layout):
            raise ConfigError(f"the layout {layout} does not fit the model: " + "; ".join(found))
    plan = plan_reshard(architecture, "lm", source, nearest_layout(architecture, "lm", source, target))
    ranks = range(source.num_ranks)
    sent, received, kept, out, into = ([0] * len(ranks) for _ in range(5))
    for route in plan.routes:
        size = BF16 * route.elements
        if route.source == route.target:
            kept[route.target] += size
            continue
        sent[route.source] += size
        received[route.target] += size
        if route.source // gpus_per_node != route.target // gpus_per_node:
            out[route.source] += size
            into[route.target] += size
    return Traffic(plan, kept, sent, received, [max(pair) for pair in zip(out, into, strict=True)])


def as_text(moved: Traffic, cluster: Cluster) -> str:
    """The traffic as a table."""
    gb = 1e9
    plan, ranks = moved.plan, moved.plan.source.num_ranks
    nodes: Counter = Counter()
    for rank, between in enumerate(moved.between):
        nodes[rank // cluster.gpus_per_node] += between
    busiest = max(range(ranks), key=lambda rank: max(moved.sent[rank], moved.received[rank]))
    node, node_bytes = nodes.most_common(1)[0]
    lines = [f"{plan.source} -> {plan.target}, {plan.architecture.num_parameters() / 1e9:.3g} B parameters in bf16"]
    amounts = {"kept": moved.kept, "sent": moved.sent, "received": moved.received, "to or from other nodes": moved.between}
    for name, values in amounts.items():
        least, mean, most = (f"{value / gb:.2f}" for value in (min(values), sum(values) / ranks, max(values)))
        lines.append(f"  GB per rank {name}: least {least}, mean {mean}, most {most}")
    lines += [
        f"  busiest rank: {busiest}, sends {moved.sent[busiest] / gb:.2f} GB and receives {moved.received[busiest] / gb:.2f} GB",
        f"  busiest node: {node}, {node_bytes / gb:.2f} GB with other nodes",
        f"  peak memory beside the source: {(moved.target_bytes + 2 * BUCKET_BYTES) / gb:.2f} GB "
        f"(the target's {moved.target_bytes / gb:.2f} GB and two buckets of {BUCKET_BYTES / gb:.2f} GB)",
        f"  about {moved.seconds(cluster):.2f} s on {cluster}",
    ]
    return "\n".join(lines) + "\n"
