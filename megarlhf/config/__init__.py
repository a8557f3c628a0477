"""Run configurations: frozen dataclasses, a strict loader, and one class per command."""

from megarlhf.config.architecture import ArchitectureConfig
from megarlhf.config.dpo import DpoConfig, DpoDataConfig, DpoSettings
from megarlhf.config.inference import EvaluateConfig, GenerateConfig
from megarlhf.config.loader import ConfigError, check_config, doubts, dump_yaml, load_config
from megarlhf.config.ppo import (
    GenerationConfig,
    PpoConfig,
    PpoDataConfig,
    PpoPolicyConfig,
    PpoReferenceConfig,
    PpoRewardConfig,
    PpoSettings,
    PpoValueConfig,
    RewardFunctionConfig,
)
from megarlhf.config.sections import (
    AdamConfig,
    AdaptiveKlConfig,
    CorpusConfig,
    HeldOutTextConfig,
    LimitsConfig,
    ModelConfig,
    ParallelConfig,
    PretrainingDataConfig,
    RunConfig,
    SamplingConfig,
    ScheduleConfig,
    TokenizerConfig,
    TrainedModelConfig,
    WinRateConfig,
)
from megarlhf.config.stages import COMMANDS, load_stage_config
from megarlhf.config.training import PretrainConfig, RewardConfig, RewardDataConfig, SftConfig, SftDataConfig

SECTIONS = [
    AdamConfig, AdaptiveKlConfig, ArchitectureConfig, CorpusConfig, DpoConfig, DpoDataConfig, DpoSettings, EvaluateConfig, GenerateConfig,
    GenerationConfig, HeldOutTextConfig, LimitsConfig, ModelConfig, ParallelConfig, PpoConfig, PpoDataConfig, PpoPolicyConfig,
    PpoReferenceConfig, PpoRewardConfig, PpoSettings, PpoValueConfig, PretrainConfig, PretrainingDataConfig, RewardConfig,
    RewardDataConfig, RewardFunctionConfig, RunConfig, SamplingConfig, ScheduleConfig, SftConfig, SftDataConfig, TokenizerConfig,
    TrainedModelConfig, WinRateConfig,
]  # fmt: skip
"""Every class that a configuration is made of."""
__all__ = ["COMMANDS", "SECTIONS", "ConfigError", "check_config", "doubts", "dump_yaml", "load_config", "load_stage_config"]
__all__ += [section.__name__ for section in SECTIONS]
