"""What the configuration of every command needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megarlhf.config.sections import ParallelConfig, RunConfig, TokenizerConfig


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What every command needs."""

    stage: Literal["pretrain", "sft", "reward", "ppo", "dpo", "generate", "evaluate"]
    """The command this file is for; `megarlhf <command>` refuses a file for another."""
    run: RunConfig
    """Where the run lives."""
    tokenizer: TokenizerConfig
    """The tokenizer."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """The layout of every model that does not name its own."""
