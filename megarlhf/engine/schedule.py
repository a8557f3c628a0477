"""The only caller of megatron's pipeline schedules.

What makes a loss exact under any layout: the loss of a micro-batch is already divided by the global count, megatron
is told to divide by nothing (``calculate_per_token_loss``, a 3-tuple from the loss function, and
``finalize_model_grads`` with ``num_tokens=None``), and data-parallel gradients are summed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import schedules
from torch import Tensor

from megarlhf.batch import Rows
from megarlhf.models.attention import positions_in_rows
from megarlhf.models.transformer import Transformer
from megarlhf.parallel.collectives import sum_over_holders
from megarlhf.parallel.groups import ModelGroups
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.pipeline import Shape, StageCommunicator
from megarlhf.parallel.upload import upload

Result = TypeVar("Result")
Compute = Callable[[Transformer, Tensor, Tensor, int], tuple[Tensor, Result]]
"""(last chunk, its hidden states, the wanted tokens [n] on the device, number of the micro-batch) -> (loss scalar, whatever is wanted of
it). The hidden states are those of the wanted tokens [n, 1, h], or under sequence parallelism of all [tokens / tp, 1, h]."""


def sum_gradients(chunks: list, num_tokens: Tensor | None = None, *args: Any, **kwargs: Any) -> None:
    """megatron's finalize_model_grads without its division by tokens, and the sum over the ranks that hold one key-value head."""
    finalize_model_grads(chunks, None, *args, **kwargs)
    for transformer in (chunk.module for chunk in chunks if chunk.module.shares_heads):
        tp = transformer.pg_collection.tp
        for parameter in transformer.parameters():
            dim = parameter.shard.spec.split_dim
            for start, part in parameter.shard.placed():
                if dim is not None and part.copies > 1:
                    sum_over_holders(parameter.main_grad.narrow(dim, start, part.size), part.copies, tp)


def run_schedule(
    chunks: list,
    groups: ModelGroups,
    micro_batches: Sequence[Rows],
    wanted: Sequence[Tensor],
    compute: Compute,
    *,
    backward: bool,
) -> list[Result]:
    """Run micro-batches forward, and backward if asked, through the pipeline.

    Args:
        chunks: this rank's model chunks, wrapped for data parallelism when backward.
        micro_batches: rows on the host, which pass packed: at least one micro-batch, and the same number on all stages of a copy.
        wanted: of each the packed tokens [n] int64 that `compute` is for, on the host.
        compute: called on the last stage for each micro-batch, in order.

    Returns: the results of compute on the last stage, an empty list elsewhere.
    """
    config = chunks[0].config
    results: list[Result] = []
    numbers = [iter(range(len(micro_batches))) for _ in chunks]
    packed = [_pack(rows, groups.layout) for rows in micro_batches]
    shapes = [(len(tokens) // groups.layout.sequence_parts, 1, config.hidden_size) for tokens, _, _ in packed]
    tokens, positions, wanted = (upload(column, groups.device) for column in [*list(zip(*packed, strict=True))[:2], wanted])

    def forward_step(numbers_of_chunk: Any, model: Any, *unused: Any) -> tuple[Tensor, Callable]:
        number = next(numbers_of_chunk)
        transformer = model if isinstance(model, Transformer) else model.module
        hidden = model(tokens[number][None], positions[number][None], packed[number][2], **transformer.wanting(wanted[number]))
        expected = len(wanted[number]) if transformer.ends_with_wanted else shapes[number][0]
        assert len(hidden) == expected, f"micro-batch {number}: hidden states {list(hidden.shape)} of {expected} tokens"

        def loss_function(last_hidden: Tensor) -> tuple[Tensor, Tensor, dict]:
            loss, result = compute(transformer, last_hidden, wanted[number], number)
            results.append(result)
            return loss, torch.zeros((), dtype=torch.int, device=groups.device), {}

        return hidden, loss_function

    communicator = _communicator(shapes, groups, config, num_chunks=len(chunks), backward=backward)
    interleaved = len(chunks) > 1
    _megatron_schedule(groups.layout, interleaved=interleaved)(
        forward_step_func=forward_step,
        data_iterator=numbers if interleaved else numbers[0],
        model=chunks if interleaved else [chunks[0]],
        num_microbatches=len(micro_batches),
        seq_length=max(len(row) for row in tokens),
        micro_batch_size=1,
        forward_only=not backward,
        pg_collection=groups.collection(tied_embeddings=_tied(chunks[0])),
        p2p_communicator=communicator,
    )
    assert communicator is None or communicator.is_done
    return results


def _megatron_schedule(layout: ParallelLayout, *, interleaved: bool) -> Callable:
    if interleaved:
        return schedules.forward_backward_pipelining_with_interleaving
    return schedules.forward_backward_pipelining_without_interleaving if layout.pp > 1 else schedules.forward_backward_no_pipelining


def _communicator(
    shapes: Sequence[Shape], groups: ModelGroups, config: Any, *, num_chunks: int, backward: bool
) -> StageCommunicator | None:
    """What the stages exchange over, knowing what arrives here in which order; None with one stage.

    Micro-batches come in the order of megatron's table: (number, chunk counted from the end that they come from).
    """
    if groups.layout.pp == 1:
        return None
    group_size = config.microbatch_group_size_per_vp_stage if num_chunks > 1 else len(shapes)
    table = schedules.get_schedule_table(len(shapes), num_chunks, group_size)
    at_start, at_end = groups.is_first_stage, groups.is_last_stage
    return StageCommunicator(
        groups,
        config,
        activations=[shapes[number] for number, chunk in table if chunk > 0 or not at_start],
        gradients=[shapes[number] for number, chunk in table if chunk > 0 or not at_end] if backward else [],
    )


def padding_behind(num_tokens: int, layout: ParallelLayout) -> int:
    """Tokens behind a micro-batch of `num_tokens`: sequence parallelism splits it evenly over tp."""
    return -num_tokens % layout.sequence_parts


def _pack(rows: Rows, layout: ParallelLayout) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens [n], each one's position in its row [n], lengths of the rows) of a micro-batch; padding is a row behind the others."""
    tokens, lengths = rows.packed(), rows.lengths
    if padding := padding_behind(len(tokens), layout):
        tokens, lengths = F.pad(tokens, (0, padding)), torch.cat([lengths, lengths.new_tensor([padding])])
    return tokens, positions_in_rows(lengths), lengths


def _tied(chunk: Any) -> bool:
    transformer = chunk if isinstance(chunk, Transformer) else chunk.module
    return transformer.share_embeddings_and_output_weights
