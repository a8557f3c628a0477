"""Parallel layouts as values: pure arithmetic, no process group."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Coordinates:
    """Where one rank stands in a layout."""

    tp: int
    dp: int
    pp: int


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """A tensor x pipeline x data layout over ``tp * pp * dp`` ranks, those from ``first_rank`` on.

    Ranks are numbered with tp fastest, then dp, then pp (Megatron's order), so that tensor-parallel peers share a
    node. With ``virtual_pp`` > 1 each stage holds that many chunks of layers (interleaved 1F1B).

    With ``tp_stride`` s tensor-parallel peers are s ranks apart, and the s ranks from one of them to the next hold the same slice, in
    other copies or stages: tp2 with stride 2 is what ranks 0 1 2 3 of tp4 become when each keeps its quarter within its half
    (HybridFlow, arXiv 2409.19256, section 5.3). Ranks ascend in every group all the same.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    virtual_pp: int = 1
    sequence_parallel: bool = False
    tp_stride: int = 1
    first_rank: int = 0

    def __post_init__(self) -> None:
        if self.tp_stride < 1 or (self.pp * self.dp) % self.tp_stride:
            raise ValueError(f"tp_stride {self.tp_stride} must divide pp * dp = {self.pp} * {self.dp} = {self.pp * self.dp}")

    @property
    def num_ranks(self) -> int:
        """tp * pp * dp."""
        return self.tp * self.pp * self.dp

    @property
    def ranks(self) -> range:
        """The ranks of the world that it is over."""
        return range(self.first_rank, self.first_rank + self.num_ranks)

    @staticmethod
    def over(num_ranks: int, *, tp: int = 1, pp: int = 1, **axes: int) -> ParallelLayout:
        """The layout that spreads over `num_ranks` ranks; dp is what remains. ValueError when tp * pp does not divide them."""
        if num_ranks % (tp * pp):
            raise ValueError(
                f"a layout of tp {tp} x pp {pp} = {tp * pp} ranks per copy does not divide the {num_ranks} ranks that were started: "
                f"{num_ranks} % {tp * pp} = {num_ranks % (tp * pp)}"
            )
        return ParallelLayout(tp=tp, pp=pp, dp=num_ranks // (tp * pp), **axes)

    def coordinates(self, rank: int) -> Coordinates:
        """The place of `rank`, which is one of `ranks`."""
        assert rank in self.ranks
        outer, inner = divmod(rank - self.first_rank, self.tp * self.tp_stride)
        row = outer * self.tp_stride + inner % self.tp_stride  # pp * dp + dp of its place
        return Coordinates(tp=inner // self.tp_stride, dp=row % self.dp, pp=row // self.dp)

    def rank(self, *, tp: int, dp: int, pp: int) -> int:
        """The rank at a place."""
        outer, inner = divmod(pp * self.dp + dp, self.tp_stride)
        return self.first_rank + (outer * self.tp + tp) * self.tp_stride + inner

    def peers(self, axes: str) -> list[list[int]]:
        """All groups of ranks that differ only along `axes`, a comma-separated choice of tp, dp, pp; each group ascending.

        ``peers("tp")`` of tp2 dp2 is [[0, 1], [2, 3]]; ``peers("tp,pp")`` are whole copies of the model.
        """
        vary = axes.split(",")
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in self.ranks:
            place = self.coordinates(rank)
            fixed = tuple(getattr(place, axis) for axis in ("tp", "dp", "pp") if axis not in vary)
            groups.setdefault(fixed, []).append(rank)
        return list(groups.values())

    @property
    def sequence_parts(self) -> int:
        """Parts of equal length into which sequence parallelism cuts the tokens of a micro-batch; 1 without it."""
        return self.tp if self.sequence_parallel else 1

    @property
    def messages_meet(self) -> bool:
        """Whether what goes on to the next stage and what comes back from the last one travel between the same two: there are but two.

        In one group the order would then decide which is which, where stages have several chunks; and on NCCL, which carries out what
        is posted between two ranks one after the other whichever way it goes, each could wait behind the other.
        """
        return self.pp == 2

    def chunks(self, num_layers: int, pp_rank: int) -> list[range]:
        """The layers of each of a stage's ``virtual_pp`` chunks, numbered globally from 0.

        Chunk v of stage p is block ``v * pp + p`` of the ``pp * virtual_pp`` blocks. Where these do not divide the layers, some
        blocks have one layer more: those before the last, which has the head's work too, and the first, which has the
        embedding's, only when all between have. Late ones first: an early stage keeps more micro-batches' activations.
        """
        return [range(*self._block(num_layers, v * self.pp + pp_rank)) for v in range(self.virtual_pp)]

    def stage_of_layer(self, num_layers: int, layer: int) -> int:
        """The pipeline stage that holds `layer`."""
        depth, first_deeper = self._depths(num_layers)
        after = layer - first_deeper * depth  # layers of the shallow blocks
        return (layer // depth if after < 0 else first_deeper + after // (depth + 1)) % self.pp

    def _depths(self, num_layers: int) -> tuple[int, int]:
        """(layers of a block, the first of the blocks that have one more; the last has not)."""
        blocks = self.pp * self.virtual_pp
        depth, rest = divmod(num_layers, blocks)
        return depth, blocks - 1 - rest

    def _block(self, num_layers: int, block: int) -> tuple[int, int]:
        """(first layer, the one after the last) of a block."""
        depth, first_deeper = self._depths(num_layers)
        last = self.pp * self.virtual_pp - 1
        first, stop = (b * depth + max(0, min(b, last) - first_deeper) for b in (block, block + 1))
        return first, stop

    def violations(
        self, *, num_layers: int, num_heads: int, num_kv_heads: int, hidden_size: int, ffn_size: int, padded_vocab_size: int
    ) -> list[str]:
        """Every way in which this layout cannot hold such a model, as sentences with their numbers."""
        found = []
        stages = self.pp * self.virtual_pp
        if num_layers < stages:
            found.append(
                f"num_layers {num_layers} must be at least pp * virtual_pp = {self.pp} * {self.virtual_pp} = {stages}: "
                "each chunk of a stage holds a layer"
            )
        sizes = {
            "num_heads": num_heads,
            "hidden_size": hidden_size,
            "ffn_size": ffn_size,
            "the padded vocabulary": padded_vocab_size,
        }
        for name, size in sizes.items():
            if size % self.tp:
                found.append(f"{name} {size} must be divisible by tp {self.tp}; {size} % {self.tp} = {size % self.tp}")
        if num_kv_heads % self.tp and self.tp % num_kv_heads:
            found.append(
                f"num_kv_heads {num_kv_heads} must be divisible by tp {self.tp}, or tp by it (several ranks then hold each key-value head)"
            )
        if self.virtual_pp > 1 and self.pp == 1:
            found.append(f"virtual_pp {self.virtual_pp} needs pp > 1")
        if self.sequence_parallel and self.tp == 1:
            found.append("sequence_parallel needs tp > 1")
        return found

    def __str__(self) -> str:
        text = f"tp{self.tp} pp{self.pp} dp{self.dp}"
        text += f" virtual_pp{self.virtual_pp}" if self.virtual_pp > 1 else ""
        text += f" tp_stride{self.tp_stride}" if self.tp_stride > 1 else ""
        text += " sp" if self.sequence_parallel else ""
        return text + (f" from rank {self.first_rank} on" if self.first_rank else "")
