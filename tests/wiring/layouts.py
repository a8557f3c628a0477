"""Runs on two ranks in which every model has a layout of its own, or the run's: what is set, and where each must be."""

import itertools

OWN = {
    "tp: 2": "tp2 pp1 dp1",
    "pp: 2": "tp1 pp2 dp1",
    "tp: 2, sequence_parallel: true": "tp2 pp1 dp1 sp",
    "pp: 2, virtual_pp: 2": "tp1 pp2 dp1 virtual_pp2",
}
"""A layout as it is written -> as it is called."""
R = "{recipe}/runs"
MODELS = {
    # command -> (role, what it starts from)
    "pretrain": {"model": ""},
    "sft": {"model": f"load={R}/deep", "reward": f"load={R}/deep_reward"},
    "reward": {"model": f"load={R}/deep"},
    "ppo": {
        "policy": f"load={R}/deep", "value": f"load={R}/deep_reward", "reward": f"load={R}/deep_reward", "reference": f"load={R}/deep",
    },
    "dpo": {"model": f"load={R}/deep", "reference": f"load={R}/deep"},
    "generate": {"model": f"load={R}/deep"},
    "evaluate": {"model": f"load={R}/deep", "reward": f"load={R}/deep_reward", "reference": f"load={R}/deep"},
}  # fmt: skip
MORE = {
    "pretrain": ["model.architecture.num_layers=4"],
    "sft": ["select_by=reward", "run.eval_every=1"],
    "reward": ["model.architecture=null"],
    "ppo": ["limits.max_prompt_len=15"],
    "dpo": ["dpo.ptx_coef=0"],
    "generate": ["sampling.max_new_tokens=1"],
    "evaluate": ["sampling.max_new_tokens=1", "text=null", "demonstrations=null"],
}
PLAIN = {"tp: 2": "tp2 pp1 dp1", "pp: 2": "tp1 pp2 dp1"}
"""What a generator can have."""


def layout_runs(command):
    """(overrides, role -> the name of its layout) of each run; the generator's role is "generation"."""
    roles = MODELS[command]
    start = [f"{role}.{source}" for role, source in roles.items() if source] + MORE[command]
    written = list(OWN)
    for number, whole in enumerate(written):
        # all models take the run's layout
        yield [*start, f"parallel={{{whole}}}"], dict.fromkeys([*roles, *(["generation"] if command == "ppo" else [])], OWN[whole])
        # each has its own, and the run's is nobody's
        own = dict(zip(roles, itertools.islice(itertools.cycle(written), number + 1, None), strict=False))
        overrides = [*start, f"parallel={{{whole}}}", *(f"{role}.parallel={{{layout}}}" for role, layout in own.items())]
        expected = {role: OWN[layout] for role, layout in own.items()}
        if command == "ppo":
            generation = list(PLAIN)[number % 2]
            overrides.append(f"generation.parallel={{{generation}}}")
            expected["generation"] = PLAIN[generation]
        yield overrides, expected


def layout_keys(command):
    """The keys that these runs change."""
    sections = ["parallel", *(f"{role}.parallel" for role in MODELS[command]), *(["generation.parallel"] if command == "ppo" else [])]
    names = ("tp", "pp", "virtual_pp", "sequence_parallel")
    return {*sections[1:], *(f"{section}.{name}" for section in sections for name in names)}
