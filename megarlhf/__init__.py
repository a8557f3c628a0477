"""Train language models to follow instructions with human feedback: SFT, reward model, PPO-ptx on megatron-core.

The functions of docs/api.md are here, `megarlhf.ppo(megarlhf.load("ppo", "ppo.yaml"))`, and are imported when they are first used.
"""

import importlib
import warnings

__version__ = "0.1.0"
OF_THE_API = {
    **dict.fromkeys(("dpo", "evaluate", "generate", "load", "ppo", "pretrain", "reward", "sft"), "megarlhf.api.stages"),
    "ConfigError": "megarlhf.config",
    "RunError": "megarlhf.runs.agreement",
    "Interrupted": "megarlhf.runs.interruption",
}
"""Name -> where it is."""
__all__ = list(OF_THE_API)

# megatron-core says at every import that Apex and Transformer Engine are missing, and of every model which options it deprecates.
warnings.filterwarnings("ignore", module=r"megatron\.")
# Newer PyTorch renames the collectives that megatron-core calls, and says so at each first call.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")


def __getattr__(name: str) -> object:
    """A name of the API: it stands on an upper floor, and this module is imported on all of them."""
    if name not in OF_THE_API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(OF_THE_API[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *OF_THE_API])
