"""`megarlhf plan reshard --from LAYOUT --to LAYOUT --preset PRESET`: what moves when weights go to a generation layout; arithmetic only."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass

from megarlhf.config import ConfigError
from megarlhf.models.architecture import Architecture
from megarlhf.models.parameters import layout_violations, shards_held
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.planning.hardware import GB, LINK_SHARE, Cluster
from megarlhf.resharding.execute import BUCKET_BYTES
from megarlhf.resharding.plan import ReshardPlan, nearest_layout, plan_reshard

LAYOUT = re.compile(r"tp(\d+)(?:pp(\d+))?(?:dp(\d+))?(?:v(\d+))?(?:@(\d+))?")
BF16 = 2
RANKS_SHOWN = 16
"""Up to so many ranks each has a line of its own."""


@dataclass(frozen=True)
class Traffic:
    """What one publishing moves, at bf16; bytes by rank."""

    plan: ReshardPlan
    kept: list[int]
    sent: list[int]
    received: list[int]
    out: list[int]
    """Of those sent, to other nodes."""
    into: list[int]
    """Of those received, from other nodes."""
    in_place: int
    """Bytes of the target that lie in the source's tensors, on the rank that allocates most."""
    target_bytes: int
    """Bytes of the target on that rank."""

    def links(self, cluster: Cluster) -> list[list[tuple[float, int, str]]]:
        """By rank, (seconds, bytes, name) of each of its links: to and from ranks of its node, and of others."""
        inside, between = LINK_SHARE * cluster.inside, LINK_SHARE * cluster.between
        found = []
        for rank, (sent, received, out, into) in enumerate(zip(self.sent, self.received, self.out, self.into, strict=True)):
            amounts = ((sent - out, inside, "to its node"), (received - into, inside, "from its node"))
            amounts += ((out, between, "to other nodes"), (into, between, "from other nodes"))
            found.append([(size / rate, size, f"rank {rank} {where}") for size, rate, where in amounts])
        return found

    def seconds(self, cluster: Cluster) -> float:
        """Of the rank that takes longest: first with its node, then with others, both directions at once."""
        return max(max(to[0], of[0]) + max(out[0], into[0]) for to, of, out, into in self.links(cluster))


def parse_layout(text: str, num_ranks: int | None = None) -> ParallelLayout:
    """ "tp8pp8dp16" as a layout; without dp it is spread over `num_ranks`. ConfigError where it is none."""
    found = LAYOUT.fullmatch(text)
    if found is None:
        form = "it is written as tp8pp8dp16, with v2 after it for two virtual stages, and @8 at its end where it begins with rank 8"
        raise ConfigError(f"{text!r} is no layout: {form}")
    tp, pp, dp, virtual, first = (int(part) if part else None for part in found.groups())
    pp, virtual = pp or 1, virtual or 1
    if min(tp, pp, dp or 1, virtual) < 1:
        raise ConfigError(f"{text!r} is no layout: its numbers must be above 0")
    ranks = tp * pp * dp if dp is not None else num_ranks or tp * pp
    try:
        return ParallelLayout.over(ranks, tp=tp, pp=pp, virtual_pp=virtual, first_rank=first or 0)
    except ValueError as error:
        raise ConfigError(f"{text}: {error}") from error


def traffic(architecture: Architecture, source: ParallelLayout, target: ParallelLayout, *, gpus_per_node: int) -> Traffic:
    """What moves from `source` to `target`. ConfigError where a layout does not hold such a model."""
    for layout in (source, target):
        if found := layout_violations(architecture, layout):
            raise ConfigError(f"the layout {layout} does not fit the model: " + "; ".join(found))
    plan = plan_reshard(architecture, "lm", source, nearest_layout(architecture, "lm", source, target))
    sent, received, kept, out, into = ([0] * plan.num_ranks for _ in range(5))
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
    whole, in_place = _most_allocated(plan)
    return Traffic(plan, kept, sent, received, out, into, in_place, whole)


def _most_allocated(plan: ReshardPlan) -> tuple[int, int]:
    """(bytes of the target, those of them that are views of the source) on the rank where they differ most."""
    found = {}
    for rank in plan.target.ranks:
        at = plan.target.coordinates(rank)
        source = plan.source.coordinates(rank) if rank in plan.source.ranks else None
        key = (at.tp, at.pp, source and (source.tp, source.pp))  # copies of the model are alike
        if key not in found:
            shapes = {name: shard.shape for name, shard in shards_held(plan.architecture, plan.head, plan.target, at).items()}
            views = plan.views(rank)
            found[key] = tuple(
                BF16 * sum(math.prod(shape) for name, shape in shapes.items() if name in names) for names in (shapes, views)
            )
    return max(found.values(), key=lambda sizes: sizes[0] - sizes[1])


def as_text(moved: Traffic, cluster: Cluster) -> str:
    """The traffic as a table."""
    plan, ranks = moved.plan, moved.plan.num_ranks
    lines = [f"{plan.source} -> {plan.target}, {plan.architecture.num_parameters() / 1e9:.3g} B parameters in bf16"]
    amounts = {"kept": moved.kept, "sent": moved.sent, "received": moved.received}
    amounts |= {"sent to other nodes": moved.out, "received from other nodes": moved.into}
    for name, values in amounts.items():
        least, mean, most = (f"{value / GB:.2f}" for value in (min(values), sum(values) / ranks, max(values)))
        lines.append(f"  GB per rank {name}: least {least}, mean {mean}, most {most}")
    if ranks <= RANKS_SHOWN:
        rows = enumerate(zip(moved.kept, moved.sent, moved.received, strict=True))
        lines += [f"  rank {rank}: bytes kept {kept:,}, sent {sent:,}, received {received:,}" for rank, (kept, sent, received) in rows]
    nodes: Counter = Counter()
    for rank, exchanged in enumerate(zip(moved.out, moved.into, strict=True)):
        nodes[rank // cluster.gpus_per_node] += max(exchanged)
    node, node_bytes = nodes.most_common(1)[0]
    _, size, link = max((of for links in moved.links(cluster) for of in links), key=lambda of: of[0])
    whole, in_place, bucket = (size / GB for size in (moved.target_bytes, moved.in_place, BUCKET_BYTES))
    lines += [
        f"  busiest link: {link}, {size / GB:.2f} GB",
        f"  busiest node: {node}, {node_bytes / GB:.2f} GB with other nodes",
        f"  peak memory beside the source: {whole - in_place + 2 * bucket:.2f} GB "
        f"(the target's {whole:.2f} GB but for {in_place:.2f} GB in place, and at most two buckets of {bucket:.2f} GB)",
        f"  about {moved.seconds(cluster):.2f} s on {cluster}",
    ]
    return "\n".join(lines) + "\n"
