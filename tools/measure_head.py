"""The most memory that the vocabulary's head holds, forward and backward, by a count of live storages: python tools/measure_head.py

The shape is a 1.3B model's by default: 8192 tokens through hidden 2048 and a vocabulary of 50257 on one rank. What the head is given
(hidden states and weight), gradients, and all that it makes meanwhile are counted. Printed: the peak in GB, and how often the logits of
all tokens would fit in it.
"""

from __future__ import annotations

import argparse
import time

import torch

from megarlhf.models.vocab_head import head_logprobs
from megarlhf.parallel.groups import World
from megarlhf.planning.meter import Meter

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    """Measure one forward and backward pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--entropy", action="store_true", help="as in PPO's policy loss")
    args = parser.parse_args()
    world = World.connect()
    tp = world.groups(world.layout()).tp
    generator = torch.Generator().manual_seed(1)
    padded = -(-args.vocab // 128) * 128
    hidden, weight = (
        torch.randn(n, args.hidden, generator=generator).mul_(0.02).to(DTYPES[args.precision]).requires_grad_()
        for n in (args.tokens, padded)
    )
    targets = torch.randint(0, args.vocab, (args.tokens,), generator=generator)
    start = time.monotonic()
    with Meter(world.device) as meter:
        logprobs, _ = head_logprobs(hidden, weight, targets, vocab_size=args.vocab, tp=tp, entropy_too=args.entropy)
        logprobs.sum().backward()
        peak = meter.peak_bytes
    of_logits = 4 * args.tokens * padded
    print(f"{args.precision}: peak {peak / 1e9:.2f} GB, {peak / of_logits:.2f} of all logits in float32; {time.monotonic() - start:.1f} s")
    world.close()


if __name__ == "__main__":
    main()
