"""A model whose weights never change: the reference policy and the reward model."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

from megarlhf.engine.engine import Engine
from megarlhf.engine.offload import Kind
from megarlhf.models.transformer import ModelSpec
from megarlhf.parallel.groups import ModelGroups
from megarlhf.storage.tensors import bytes_of


class FrozenEngine(Engine):
    """Forward passes only: no gradients, no gradient buffers, no optimizer state."""

    def __init__(
        self,
        spec: ModelSpec,
        groups: ModelGroups,
        *,
        micro_batch_size: int,
        micro_batch_tokens: int | None = None,
        offload: Collection[Kind] = (),
    ) -> None:
        super().__init__(spec, groups, micro_batch_size=micro_batch_size, micro_batch_tokens=micro_batch_tokens, offload=offload)
        for transformer in self.transformers:
            transformer.requires_grad_(False)

    def fingerprint(self) -> str:
        """A hash of this rank's weights, by which a run proves that they never changed."""
        self.offload.need("weights")
        digest = hashlib.sha256()
        for name, parameter in sorted(self.parameters().items()):
            digest.update(name.encode())
            on_host = parameter.detach().cpu().contiguous()
            digest.update(bytes_of(on_host))
        return digest.hexdigest()
