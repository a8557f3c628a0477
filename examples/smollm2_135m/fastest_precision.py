"""Prints the precision that this machine multiplies faster, bf16 or fp32: a CPU without AVX512-BF16 takes many times longer for bf16."""

from __future__ import annotations

import time

import torch


def seconds(dtype: torch.dtype) -> float:
    """The best of three products of the size of SmolLM2-135M's feed-forward layer on 128 tokens."""
    tokens, weight = torch.ones(128, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        tokens @ weight
        best = min(best, time.perf_counter() - start)
    return best


if __name__ == "__main__":
    print("bf16" if seconds(torch.bfloat16) < 0.7 * seconds(torch.float32) else "fp32")
