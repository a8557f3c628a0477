"""The projection to one scalar that replaces the unembedding in reward and value models (Ouyang et al. 2022, Appendix C)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ScalarHead(nn.Module):
    """hidden -> one float32 number, whatever the trunk's precision.

    One column cannot be split: every tensor-parallel rank of the last stage holds it. Under sequence parallelism each
    sees other positions and the gradients are summed over tp, as a norm's are.
    """

    def __init__(self, hidden_size: int, *, sequence_parallel: bool, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.zeros(1, dtype=torch.float32, device=device))
        for parameter in self.parameters():
            parameter.sequence_parallel = sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [..., hidden_size] -> [...] float32."""
        return F.linear(hidden.float(), self.weight, self.bias).squeeze(-1)
