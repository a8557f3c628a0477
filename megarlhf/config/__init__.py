"""Run configurations: frozen dataclasses, a strict loader, and one class per command."""

from megarlhf.config.loader import ConfigError, check_config, doubts, dump_yaml, load_config
from megarlhf.config.stages import COMMANDS, load_stage_config

__all__ = ["COMMANDS", "ConfigError", "check_config", "doubts", "dump_yaml", "load_config", "load_stage_config"]
