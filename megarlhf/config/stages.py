"""The commands with their configuration classes, and how a file is read as one."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from megarlhf.config.dpo import DpoConfig
from megarlhf.config.errors import ConfigError
from megarlhf.config.fields import show
from megarlhf.config.inference import EvaluateConfig, GenerateConfig
from megarlhf.config.loader import build_config
from megarlhf.config.ppo import PpoConfig
from megarlhf.config.stage import StageConfig
from megarlhf.config.training import PretrainConfig, RewardConfig, SftConfig
from megarlhf.config.yaml_tree import read_yaml

COMMANDS: dict[str, type[StageConfig]] = {
    "pretrain": PretrainConfig,
    "sft": SftConfig,
    "reward": RewardConfig,
    "ppo": PpoConfig,
    "dpo": DpoConfig,
    "generate": GenerateConfig,
    "evaluate": EvaluateConfig,
}


def load_stage_config(path: Path | str, overrides: Sequence[str] = (), *, command: str | None = None) -> StageConfig:
    """Read a run's YAML as the configuration of its `stage`.

    ConfigError (a ValueError) lists every violation at once; also where the file is for another command than `command`.
    """
    path = Path(path)
    tree = read_yaml(path)
    stage = tree.get("stage")
    if not isinstance(stage, str) or stage not in COMMANDS:
        close = difflib.get_close_matches(str(stage), COMMANDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{path}: stage must be one of {', '.join(COMMANDS)}, got {show(stage)}{hint}")
    if command is not None and stage != command:
        raise ConfigError(f"{path}: stage is {stage}; run it with `megarlhf {stage}`, not `megarlhf {command}`")
    config = build_config(COMMANDS[stage], tree, overrides, name=str(path), here=str(path.parent))
    if config.stage != stage:
        raise ConfigError(f"command line: stage: the file is for {stage}, and an override cannot make it one for {config.stage}")
    return config
