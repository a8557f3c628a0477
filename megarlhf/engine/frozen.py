"""A model whose weights never change: the reference policy and the reward model."""

from __future__ import annotations

import hashlib

from torch import Tensor

from megarlhf.batch import Rows
from megarlhf.engine.engine import Engine, require_finite
from megarlhf.storage.tensors import bytes_of


class FrozenEngine(Engine):
    """Forward passes only: no gradients, no gradient buffers, no optimizer state."""

    def _gathered(self, results: list[tuple[Tensor, Tensor]], batch: Rows, output: str) -> Tensor:
        """NotFiniteError, on every rank, where a number is not finite: it never will be, and whoever compares it gets an answer."""
        found = super()._gathered(results, batch, output)
        require_finite(found, output, precision=self.spec.precision)
        return found

    def fingerprint(self) -> str:
        """A hash of this rank's weights, by which a run proves that they never changed."""
        self.offload.need("weights")
        digest = hashlib.sha256()
        for name, parameter in sorted(self.parameters().items()):
            digest.update(name.encode())
            on_host = parameter.detach().cpu().contiguous()
            digest.update(bytes_of(on_host))
        return digest.hexdigest()
