"""Seeds derived from names and numbers, so that no random state has to be carried along or saved."""

from __future__ import annotations

import hashlib

from megarlhf.parallel.groups import ModelGroups


def derive_seed(*keys: int | str) -> int:
    """A 63-bit seed that depends on every key and on nothing else (BLAKE2b of their text)."""
    digest = hashlib.blake2b("/".join(map(str, keys)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_dropout(groups: ModelGroups, *keys: int | str) -> None:
    """Seed the residual dropout of one step: equal on tensor-parallel peers, which hold the same activations, else different.

    Under sequence parallelism the peers hold different positions; there megatron draws from its tracker's
    model-parallel state, whose seed differs along tp.
    """
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    place = groups.coordinates
    seed = derive_seed(*keys, "pp", place.pp, "dp", place.dp) % 2**31
    model_parallel_cuda_manual_seed(seed, tp_rank=place.tp, ep_rank=0, etp_rank=0, force_reset_rng=True)
