"""Learning rates as functions of the step, numbered from 0: the value is the one that step uses."""

from __future__ import annotations

import math


def constant_with_warmup(step: int, *, peak: float, warmup_steps: int, start_fraction: float = 0.1) -> float:
    """Linear from start_fraction * peak at step 0 to the peak at step warmup_steps, then constant.

    The paper warms up over the first 10 iterations from a tenth of the peak (Ouyang et al. 2022, Appendix C.4).
    """
    if step >= warmup_steps:
        return peak
    return peak * (start_fraction + (1 - start_fraction) * step / warmup_steps)


def cosine(step: int, *, peak: float, total_steps: int, final_fraction: float = 0.1, warmup_steps: int = 0) -> float:
    """Linear from 0 over warmup_steps (step s uses (s + 1) / (warmup_steps + 1) of the peak), then a half cosine.

    The cosine goes from the peak at step warmup_steps to final_fraction * peak at step total_steps - 1
    (Ouyang et al. 2022, Appendices C.1 to C.3: to 10 %, no warm-up).
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    return peak * (final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress)))
