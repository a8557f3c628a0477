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
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from megarlhf.models.transformer import Transformer
from megarlhf.parallel import platform
from megarlhf.parallel.collectives import sum_over_holders
from megarlhf.parallel.groups import ModelGroups
from megarlhf.parallel.layout import ParallelLayout

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


def schedule_violations(layout: ParallelLayout) -> list[str]:
    """Every way in which the schedules cannot run a layout here, whatever the model, as sentences.

    With two stages the next and the previous one are the same rank. gloo pairs the messages between two ranks in the
    order in which they were posted, so that interleaved stages would take each other's activations and gradients.
    """
    if layout.virtual_pp > 1 and layout.pp == 2 and platform.backend() == "gloo":
        return [
            f"pp 2 with virtual_pp {layout.virtual_pp} cannot run on gloo: next and previous stage are one rank, whose messages gloo pairs "
            "in the order they were posted, so activations and gradients would be taken for each other; use virtual_pp 1, or pp > 2"
        ]
    return []


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

    def forward_step(numbers_of_chunk: Any, model: Any, *unused: Any) -> tuple[Tensor, Callable]:
        number = next(numbers_of_chunk)
        rows = _pad_for_sequence_parallel(tokens[number].to(groups.device), groups)
        positions = torch.arange(rows.shape[1], device=rows.device)[None].expand(rows.shape[0], -1)
        hidden = model(rows, positions, None)
        transformer = model if isinstance(model, Transformer) else model.module

        def loss_function(last_hidden: Tensor) -> tuple[Tensor, Tensor, dict]:
            loss, result = compute(transformer, last_hidden, number)
            results.append(result)
            return loss, torch.zeros((), dtype=torch.int, device=groups.device), {}

        return hidden, loss_function

    interleaved = len(chunks) > 1
    pipeline = {}
    if groups.layout.pp > 1:
        pipeline["p2p_communicator"] = P2PCommunicator(groups.pp, config)
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
        **pipeline,
    )
    return results


def _tied(chunk: Any) -> bool:
    transformer = chunk if isinstance(chunk, Transformer) else chunk.module
    return transformer.share_embeddings_and_output_weights


def _pad_for_sequence_parallel(rows: Tensor, groups: ModelGroups) -> Tensor:
    """Widen [batch, seq] to a multiple of tp where the sequence is split along tp; the causal mask keeps it harmless."""
    if not groups.layout.sequence_parallel:
        return rows
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % groups.layout.tp))
