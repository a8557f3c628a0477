"""megatron's distributed optimizer, one step at a time, and its shards by parameter."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megarlhf.models.parameters import flat_ranges_counted, shards_held
from megarlhf.models.transformer import ModelSpec, Transformer, named_parameters
from megarlhf.parallel.collectives import sum_over_world
from megarlhf.parallel.groups import ModelGroups


@dataclass(frozen=True, kw_only=True)
class AdamSettings:
    """AdamW's constants (Ouyang et al. 2022, Appendix C: betas 0.9 and 0.95)."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled, not applied to biases and norms."""
    clip_grad: float | None = 1.0
    """Largest global gradient norm; None does not clip."""
    initial_loss_scale: float = 2.0**16
    """fp16 only; doubles after 1000 clean steps, halves on overflow."""
    min_loss_scale: float = 1.0
    """fp16 only: the loss scale goes no lower. Gradients that overflow even there are not for want of a scale."""


@dataclass(frozen=True)
class MasterShard:
    """The part of one parameter that this rank's optimizer updates, in float32."""

    parameter: torch.nn.Parameter
    main: Tensor
    """[n] float32: the master weights (a view of the parameter where that is float32 itself)."""
    start: int
    """Where the shard starts in the flattened parameter."""


@dataclass(frozen=True, kw_only=True)
class UpdateResult:
    """What one optimizer step did."""

    grad_norm: float
    """Global L2 norm before clipping; not finite where the step was skipped for that."""
    skipped: bool
    """The gradients were not finite: no weight changed."""
    loss_scale_used: float
    """What these gradients were computed with."""
    loss_scale: float
    """From here on."""
    searching_loss_scale: bool
    """The step was skipped for an overflow that halved fp16's loss scale: how a scale is found, no sign of divergence by itself."""
    consecutive_skips: int
    """Steps that were skipped in a row, this one included, whatever for; 0 where it was not."""


BUCKET_SIZE: int | None = None
"""Elements that are exchanged together where exchanges overlap with the computation; None: megatron's choice, some 40 million."""


class Optimizer:
    """AdamW with float32 master weights and moments sharded over data-parallel ranks (ZeRO-1)."""

    def __init__(
        self, transformers: list[Transformer], spec: ModelSpec, groups: ModelGroups, settings: AdamSettings, *, overlap: bool = False
    ) -> None:
        """Args: overlap: sum gradients over data-parallel ranks beside the last micro-batch's backward pass, and gather the weights beside
        what follows a step, until `finish_gather`; with one such rank there is nothing to do.
        """
        self.overlap = overlap
        self._gathering = False
        self.groups = groups
        self.settings = settings
        self.updates = 0
        """Updates made (steps that were not skipped): Adam's step in its bias correction."""
        self.weights_version = 0
        """Goes up whenever the parameters may have changed: by an update, or when the masters were set otherwise and published."""
        self.consecutive_skips = 0
        """Steps skipped in a row until now, those of a search for a loss scale included."""
        tied = spec.architecture.tied_embeddings and spec.head == "lm"
        collection = groups.collection(tied_embeddings=tied)
        self.chunks = _wrapped(transformers, collection, overlap=overlap)
        config = OptimizerConfig(
            optimizer="adam",
            lr=0.0,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            adam_eps=settings.eps,
            clip_grad=0.0,  # clipped in `step`, in one pass over all tensors
            bf16=spec.precision == "bf16",
            fp16=spec.precision == "fp16",
            initial_loss_scale=settings.initial_loss_scale,
            min_loss_scale=settings.min_loss_scale,
            hysteresis=1,  # the first overflow halves the loss scale
            params_dtype=transformers[0].config.params_dtype,
            use_distributed_optimizer=True,
        )
        made = get_megatron_optimizer(config, self.chunks, pg_collection=collection, use_gloo_process_groups=False)
        chained = getattr(made, "chained_optimizers", [made])
        assert len(chained) == 1
        self.megatron = chained[0]
        for group in self.megatron.param_groups:
            if isinstance(self.adam, torch.optim.AdamW):
                group["fused"] = True
        held = shards_held(spec.architecture, spec.head, groups.layout, groups.coordinates)
        in_norm = {
            parameter: flat_ranges_counted(held[name], spec.architecture, spec.head, groups.layout, groups.coordinates)
            for name, parameter in named_parameters(transformers, groups).items()
        }
        self._shards = tuple(self._of_megatron())
        self._in_norm = [(shard.main, *part) for shard in self._shards for part in _within(shard, in_norm[shard.parameter])]
        """What this rank brings into the gradient norm, as (master weights, first, last) of their flat gradient, so that each element
        counts once over the ranks of a copy."""

    @property
    def adam(self) -> torch.optim.Optimizer:
        """The optimizer under megatron's: torch's AdamW, or Transformer Engine's or Apex's fused one where installed."""
        return self.megatron.optimizer

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by in the backward pass: 1 but for fp16."""
        return 1.0 if self.megatron.grad_scaler is None else float(self.megatron.get_loss_scale())

    @property
    def at_smallest_loss_scale(self) -> bool:
        """Whether fp16's loss scale can go no lower; never so in another precision."""
        return self.megatron.grad_scaler is not None and self.loss_scale <= self.settings.min_loss_scale

    def zero_grad(self) -> None:
        """Clear gradients before a step's backward passes."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.megatron.zero_grad()

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss times the current loss scale."""
        return self.megatron.scale_loss(loss)

    @torch.no_grad()
    def step(self, learning_rate: float, beside: Tensor) -> tuple[UpdateResult, list[float]]:
        """Clip, update the master weights and gather the parameters; skipped on every rank where any gradient is not finite.

        The device is waited for once, when the gradient norm is read; `beside` [n] is read with it, and returned.
        """
        for group in self.megatron.param_groups:
            group["lr"] = learning_rate
            group["weight_decay"] = self.settings.weight_decay * group.get("wd_mult", 1.0)
        scale = self.loss_scale
        overflow = self.megatron.prepare_grads()
        square, *read = torch.cat([self._square_of_grad_norm(), beside.double()]).tolist()
        norm = math.sqrt(square)
        skipped = overflow or not math.isfinite(norm)
        self.consecutive_skips = self.consecutive_skips + 1 if skipped else 0
        scale_now = self.loss_scale
        result = UpdateResult(
            grad_norm=norm,
            skipped=skipped,
            loss_scale_used=scale,
            loss_scale=scale_now,
            searching_loss_scale=scale_now < scale,
            consecutive_skips=self.consecutive_skips,
        )
        if skipped:
            return result, read
        clip = self.settings.clip_grad
        if clip is not None and norm > clip:
            torch._foreach_mul_([shard.main.grad for shard in self.shards()], clip / (norm + 1e-6))
        self.megatron.step_with_ready_grads()
        if self.overlap:
            for chunk in self.chunks:
                chunk.start_param_sync()
            self._gathering = True
        self.updates += 1
        self.weights_version += 1
        return result, read

    def finish_gather(self) -> None:
        """Have the weights of the last step whole: before anything reads, moves or sets them."""
        if self._gathering:
            self._gathering = False
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)  # which waits where a gather is under way

    def _square_of_grad_norm(self) -> Tensor:
        """[1] float64 on the device, the same on all ranks."""
        grads = [main.grad.view(-1)[first:last] for main, first, last in self._in_norm]
        norms = torch._foreach_norm(grads) if grads else []
        square = torch.stack(norms).double().square().sum() if norms else torch.zeros((), dtype=torch.float64)
        return sum_over_world(square.reshape(1).to(self.groups.device), self.groups)

    def shards(self) -> Iterator[MasterShard]:
        """Every shard that this rank updates."""
        return iter(self._shards)

    def _of_megatron(self) -> Iterator[MasterShard]:
        m = self.megatron
        pairs = [(m.model_float16_groups, m.shard_fp32_from_float16_groups), (m.model_fp32_groups, m.shard_fp32_groups)]
        for parameter_groups, main_groups in pairs:
            for parameters, mains in zip(parameter_groups, main_groups, strict=True):
                for parameter, main in zip(parameters, mains, strict=True):
                    yield MasterShard(parameter, main, m._get_model_param_range_map(parameter)["param"].start)

    def moments(self) -> dict[torch.nn.Parameter, tuple[Tensor, Tensor]]:
        """Parameter -> Adam's first and second moments [n] of this rank's shard; zeros before the first update."""
        kept = {shard.parameter: (shard.main, self.adam.state.get(shard.main)) for shard in self.shards()}
        return {
            parameter: tuple(torch.zeros_like(main) if state is None else state[key] for key in ("exp_avg", "exp_avg_sq"))
            for parameter, (main, state) in kept.items()
        }

    @torch.no_grad()
    def restore(self, *, updates: int) -> dict[torch.nn.Parameter, tuple[Tensor, Tensor]]:
        """Make Adam's state that of `updates` updates, and return its moments as `moments` does, for the caller to fill.

        torch's AdamW counts updates per tensor; Transformer Engine's and Apex's fused Adam count them per group.
        """
        self.updates = updates
        counts_per_tensor = isinstance(self.adam, torch.optim.AdamW)
        for shard in self.shards():
            state = self.adam.state[shard.main]
            for key in ("exp_avg", "exp_avg_sq"):
                if key not in state:
                    state[key] = torch.empty_like(shard.main)
            if counts_per_tensor:
                state["step"] = torch.tensor(float(updates), device=shard.main.device)
        if not counts_per_tensor:
            for group in self.megatron.param_groups:
                group["step"] = updates
        return self.moments()

    @torch.no_grad()
    def publish_masters(self) -> None:
        """Cast the master weights into the parameters and gather them over data-parallel ranks."""
        self.finish_gather()
        self.weights_version += 1
        self.megatron._copy_main_params_to_model_params()
        for chunk in self.chunks:
            chunk.start_param_sync(force_sync=True)

    @torch.no_grad()
    def adopt_parameters(self) -> None:
        """Set the master weights from the parameters, after these were initialised."""
        self.finish_gather()
        self.weights_version += 1
        self.megatron.reload_model_params()


def _within(shard: MasterShard, ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The parts of `ranges` of the flattened parameter that lie in a shard, counted from its first element."""
    for start, stop in ranges:
        first, last = max(start - shard.start, 0), min(stop - shard.start, shard.main.numel())
        if first < last:
            yield first, last


def _wrapped(transformers: list[Transformer], collection: ProcessGroupCollection, *, overlap: bool) -> list[DistributedDataParallel]:
    """The chunks in megatron's data-parallel wrappers."""
    alone = collection.dp_cp.size() == 1
    overlap = overlap and not alone
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        average_in_collective=False,
        overlap_grad_reduce=overlap,
        bucket_size=BUCKET_SIZE if overlap else None,
    )
    wrapper = _OnlyCopy if alone else DistributedDataParallel
    chunks = [wrapper(t.config, ddp, t, pg_collection=collection) for t in transformers]
    for chunk in chunks:
        _hook_weakly(chunk)
        for parameter in chunk.parameters():
            # where exchanges overlap, a gradient of its own is the sign that it may be sent
            parameter.gradient_is_collected = not overlap and parameter.dtype == parameter.main_grad.dtype
    if overlap:
        # Without it every micro-batch but the first step's would count as the one after which gradients may be sent.
        no_sync = [chunk.no_sync for chunk in chunks]
        transformers[0].config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        # Only now: set before, megatron would wait for weights in hooks of modules, which heads that are functions never call.
        ddp.overlap_param_gather = True
    return chunks


class _OnlyCopy(DistributedDataParallel):
    """With one data-parallel copy there is nothing to exchange, where megatron would copy all gradients and weights onto themselves."""

    def start_grad_sync(self, *unused: object) -> None:
        """Nothing."""

    def finish_grad_sync(self, *unused: object, **how: object) -> None:
        """Nothing."""

    def start_param_sync(self, *unused: object, **how: object) -> None:
        """Nothing."""


def _hook_weakly(chunk: DistributedDataParallel) -> None:
    """Hang megatron's gradient hooks on the parameters, by a weak reference, so that a model can be freed.

    Megatron hangs them on autograd's nodes, which hold the parameters and which Python's garbage collector cannot look into: a
    model, with its process groups and their threads, would live as long as the process.
    """
    chunk.grad_accs.clear()
    here = weakref.ref(chunk)
    for parameter in chunk.module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: here()._make_backward_post_hook(p)())
