"""Train language models to follow instructions with human feedback: SFT, reward model, PPO-ptx on megatron-core."""

import warnings

__version__ = "0.1.0"

# megatron-core says at every import that Apex and Transformer Engine are missing, and of every model which options it deprecates.
warnings.filterwarnings("ignore", module=r"megatron\.")
# Newer PyTorch renames the collectives that megatron-core calls, and says so at each first call.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
