"""The only caller of megatron's pipeline schedules.

What makes a loss exact under any layout: the loss of a micro-batch is already divided by the global count, megatron
is told to divide by nothing (``calculate_per_token_loss``, a 3-tuple from the loss function, and
``finalize_model_grads`` with ``num_tokens=None``), and data-parallel gradients are summed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import schedules
from torch import Tensor

from megarlhf.models.transformer import Transformer
from megarlhf.parallel.collectives import sum_over_holders
from megarlhf.parallel.groups import ModelGroups
from megarlhf.parallel.pipeline import Shape, StageCommunicator

Result = TypeVar("Result")
Compute = Callable[[Transformer, Tensor, int], tuple[Tensor, Result]]
"""(last chunk, its hidden states [seq, batch, h], number of the micro-batch) -> (loss scalar, whatever is wanted of it)."""


def sum_gradients(chunks: list, num_tokens: Tensor | None = None, *args: Any, **kwargs: Any) -> None:
    """megatron's finalize_model_grads without its division by tokens, and the sum over the ranks that hold one key-value head."""
    finalize_model_grads(chunks, None, *args, **kwargs)
    for transformer in (chunk.module for chunk in chunks):
        tp = transformer.pg_collection.tp
        for parameter in transformer.parameters():
            dim = parameter.shard.spec.split_dim
            for start, part in parameter.shard.placed():
                if dim is not None and part.copies > 1:
                    sum_over_holders(parameter.main_grad.narrow(dim, start, part.size), part.copies, tp)


def run_schedule(
    chunks: list,
    groups: ModelGroups,
    tokens: Sequence[Tensor],
    compute: Compute,
    *,
    backward: bool,
) -> list[Result]:
    """Run micro-batches forward, and backward if asked, through the pipeline.

    Args:
        chunks: this rank's model chunks, wrapped for data parallelism when backward.
        tokens: [batch_i, seq_i] int64 of each micro-batch; at least one, and the same number on all stages of a copy.
        compute: called on the last stage for each micro-batch, in order.

    Returns: the results of compute on the last stage, an empty list elsewhere.
    """
    config = chunks[0].config
    results: list[Result] = []
    numbers = [iter(range(len(tokens))) for _ in chunks]
    shapes = [_hidden_shape(rows, groups, config.hidden_size) for rows in tokens]

    def forward_step(numbers_of_chunk: Any, model: Any, *unused: Any) -> tuple[Tensor, Callable]:
        number = next(numbers_of_chunk)
        rows = _pad_for_sequence_parallel(tokens[number].to(groups.device), groups)
        positions = torch.arange(rows.shape[1], device=rows.device)[None].expand(rows.shape[0], -1)
        hidden = model(rows, positions, None)
        assert hidden.shape == shapes[number], f"micro-batch {number}: hidden states {list(hidden.shape)}, expected {list(shapes[number])}"
        transformer = model if isinstance(model, Transformer) else model.module

        def loss_function(last_hidden: Tensor) -> tuple[Tensor, Tensor, dict]:
            loss, result = compute(transformer, last_hidden, number)
            results.append(result)
            return loss, torch.zeros((), dtype=torch.int, device=groups.device), {}

        return hidden, loss_function

    interleaved = len(chunks) > 1
    communicator = _communicator(shapes, groups, config, num_chunks=len(chunks), backward=backward)
    if interleaved:
        run = schedules.forward_backward_pipelining_with_interleaving
    elif groups.layout.pp > 1:
        run = schedules.forward_backward_pipelining_without_interleaving
    else:
        run = schedules.forward_backward_no_pipelining
    run(
        forward_step_func=forward_step,
        data_iterator=numbers if interleaved else numbers[0],
        model=chunks if interleaved else [chunks[0]],
        num_microbatches=len(tokens),
        seq_length=max(rows.shape[1] for rows in tokens),
        micro_batch_size=tokens[0].shape[0],
        forward_only=not backward,
        pg_collection=groups.collection(tied_embeddings=_tied(chunks[0])),
        p2p_communicator=communicator,
    )
    assert communicator is None or communicator.is_done
    return results


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


def _hidden_shape(rows: Tensor, groups: ModelGroups, hidden_size: int) -> Shape:
    """[seq (/ tp), batch, h] of one micro-batch's hidden states as they pass between stages."""
    batch, width = rows.shape
    if groups.layout.sequence_parallel:
        width = -(-width // groups.layout.tp)
    return width, batch, hidden_size


def _tied(chunk: Any) -> bool:
    transformer = chunk if isinstance(chunk, Transformer) else chunk.module
    return transformer.share_embeddings_and_output_weights


def _pad_for_sequence_parallel(rows: Tensor, groups: ModelGroups) -> Tensor:
    """Widen [batch, seq] to a multiple of tp where the sequence is split along tp; the causal mask keeps it harmless."""
    if not groups.layout.sequence_parallel:
        return rows
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % groups.layout.tp))
