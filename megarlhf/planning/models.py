"""The models of a run that has not been started, and perhaps cannot be here: checkpoints and tokenizer need not exist for a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megarlhf.config import ConfigError, load_stage_config
from megarlhf.config.architecture import ArchitectureConfig
from megarlhf.config.sections import ModelConfig, ParallelConfig
from megarlhf.config.stage import StageConfig
from megarlhf.conversion.configuration import architecture_from_hf
from megarlhf.data.tokenizers import load_tokenizer
from megarlhf.engine.checkpoint import saved_architecture
from megarlhf.models.architecture import PRESETS, Architecture, make_architecture
from megarlhf.models.transformer import layout_violations
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.resharding.plan import nearest_layout
from megarlhf.runs.checkpoints import find_source
from megarlhf.runs.models import ModelPlan, chosen_model
from megarlhf.runs.row_lengths import row_lengths
from megarlhf.storage.checkpoints import STATE_FILE
from megarlhf.storage.files import read_json

HEADS = {
    "pretrain": {"model": "lm"},
    "sft": {"model": "lm", "reward": "scalar"},
    "reward": {"model": "scalar"},
    "dpo": {"model": "lm", "reference": "lm"},
    "ppo": {"policy": "lm", "value": "scalar", "reward": "scalar", "reference": "lm"},
}
"""Stage -> the models that it may name, and their heads."""
GPT2_VOCAB = 50257
HF_CONFIG = "config.json"


@dataclass(frozen=True)
class RunModels:
    """All models of a run over `num_ranks` ranks."""

    config: StageConfig
    plans: Mapping[str, ModelPlan]
    generation: ParallelLayout | None
    """PPO: the generator's layout."""
    num_ranks: int
    notes: Sequence[str]
    """What had to be assumed."""
    shrunk: Sequence[str] = ()
    """Layouts that are too large for so few ranks, and were planned with fewer stages: such a run does not start."""


def run_models(path: Path, overrides: Sequence[str], given: Mapping[str, Architecture | dict], num_ranks: int) -> RunModels:
    """Resolve the models of the run that the YAML file at `path` describes.

    A model's architecture is that of `given` (role -> it, or its fields), else of the checkpoint or Hugging Face folder at its `load`.
    Where nothing is there, it is that of the YAML file beside `path`, or in a folder beside that one, whose run.dir `load` is; else of
    the preset after whose size a part of its path is named.

    ConfigError lists whatever does not fit.
    """
    config = load_stage_config(path, overrides)
    if config.stage not in HEADS:
        raise ConfigError(f"{path}: stage is {config.stage}; what can be planned is {', '.join(HEADS)}")
    notes: list[str] = []
    if unknown := given.keys() - HEADS[config.stage].keys():
        known = ", ".join(HEADS[config.stage])
        raise ConfigError(f"--architecture {', '.join(sorted(unknown))}: the models of {config.stage} are {known}")
    architectures = _Architectures(path, given, config, notes)
    plans, problems, shrunk = {}, [], []
    for role, head in HEADS[config.stage].items():
        model = getattr(config, role)
        if model is None or (model.load is None and model.architecture is None):  # no reward model beside functions
            continue
        try:
            architecture = architectures.of(role, head, model)
            layout = _layout(role, model.parallel or config.parallel, architecture, num_ranks, shrunk)
        except ConfigError as error:  # the tokenizer's, not this model's
            raise ConfigError("\n".join([*problems, str(error)])) from error
        except ValueError as error:
            problems.append(f"{role}: {error}")
            continue
        plans[role] = ModelPlan(role, model, architecture, head, layout, None, False)
        for row in (row.on(multiple=layout.sequence_parts) for row in row_lengths(config)[role]):
            if row.tokens > architecture.max_seq_len:
                problems.append(f"{role}: its context of {architecture.max_seq_len} tokens is shorter than {row.tokens} ({row.keys})")
    generation = None
    if config.stage == "ppo" and "policy" in plans:
        generation = plans["policy"].layout
        if config.generation.parallel is not None:
            try:
                policy = plans["policy"]
                generation = _layout("generation", config.generation.parallel, policy.architecture, num_ranks, shrunk)
                generation = nearest_layout(policy.architecture, "lm", policy.layout, generation)
            except ValueError as error:
                problems.append(f"generation: {error}")
        problems += plans["policy"].cache_problems(
            "generation.sampling", config.generation.sampling, config.limits.max_prompt_len, layout=generation
        )
    if config.stage == "sft" and config.reward is not None and "model" in plans:
        problems += plans["model"].cache_problems("sampling", config.sampling, config.limits.max_prompt_len)
    if problems:
        raise ConfigError("\n".join(problems))
    return RunModels(config, plans, generation, num_ranks, tuple(dict.fromkeys(notes)), tuple(shrunk))


def _layout(
    role: str, parallel: ParallelConfig, architecture: Architecture, num_ranks: int, shrunk: list[str]
) -> ParallelLayout:
    """The layout over all ranks. With too few of them for one copy, that with as many stages as there are ranks for."""
    axes = dataclasses.asdict(parallel)
    if parallel.tp * parallel.pp > num_ranks and num_ranks % parallel.tp == 0:
        axes["pp"] = max(pp for pp in range(1, parallel.pp + 1) if num_ranks // parallel.tp % pp == 0)
        axes["virtual_pp"] = parallel.virtual_pp if axes["pp"] > 1 else 1
        of = f"tp {parallel.tp} x pp {parallel.pp} = {parallel.tp * parallel.pp} ranks"
        shrunk.append(f"{role}: one copy takes {of}, and there are {num_ranks}; planned with pp {axes['pp']}")
    layout = ParallelLayout.over(num_ranks, **axes)
    if found := layout_violations(architecture, layout):
        raise ValueError(f"the layout {layout} does not fit the model: " + "; ".join(found))
    return layout


def named_architecture(text: str, *, vocab_size: int) -> Architecture:
    """The architecture of a preset, or of the Hugging Face folder or config.json at a path. ValueError where it is neither."""
    if text not in PRESETS and not Path(text).exists():
        raise ValueError(f"{text} is neither a preset ({', '.join(PRESETS)}) nor the path of a Hugging Face folder or its {HF_CONFIG}")
    return make_architecture(text, vocab_size=vocab_size) if text in PRESETS else _described_by(Path(text))


def _described_by(path: Path) -> Architecture:
    """What a Hugging Face config.json, or that in a folder, describes. ValueError where it cannot be read or is none of ours."""
    file = path / HF_CONFIG if path.is_dir() else path
    try:
        return architecture_from_hf(read_json(file))
    except ValueError as error:
        raise ValueError(str(error) if str(file) in str(error) else f"{file}: {error}") from error


def _is_hugging_face(folder: Path) -> bool:
    return (folder / HF_CONFIG).is_file() and not (folder / STATE_FILE).exists()


def _made_of(fields: dict, vocab_size: int) -> Architecture:
    """ValueError where these are no fields of an architecture."""
    known = {field.name for field in dataclasses.fields(ArchitectureConfig)}
    if unknown := fields.keys() - known:
        raise ValueError(f"an architecture has no {', '.join(sorted(map(str, unknown)))}; it has {', '.join(sorted(known))}")
    chosen = {name: value for name, value in fields.items() if name not in ("preset", "init_std")}
    return make_architecture(fields.get("preset"), vocab_size=vocab_size, **chosen)


class _Architectures:
    """Finds the architecture of each model."""

    def __init__(self, path: Path, given: Mapping[str, Architecture | dict], config: StageConfig, notes: list[str]) -> None:
        self.path, self.given, self.tokenizer, self.notes = path, given, config.tokenizer, notes

    @cached_property
    def vocab_size(self) -> int:
        """Of the run's tokenizer, for models that are told by their sizes alone. ConfigError where the tokenizer cannot be read."""
        path = Path(self.tokenizer.path)
        if not path.exists():
            self.notes.append(f"tokenizer.path {path} is not here: GPT-2's vocabulary of {GPT2_VOCAB} is assumed")
            return GPT2_VOCAB
        try:
            return load_tokenizer(path, eos_token=self.tokenizer.eos_token).vocab_size
        except ValueError as error:
            raise ConfigError(f"tokenizer: {error}") from error

    def of(self, role: str, head: str, model: ModelConfig) -> Architecture:
        """ValueError where nothing says it, with the way out."""
        if role in self.given:
            given = self.given[role]
            return given if isinstance(given, Architecture) else _made_of(given, self.vocab_size)
        return self._as_said(role, head, model, self.path)

    def _as_said(self, role: str, head: str, model: ModelConfig, path: Path) -> Architecture:
        """What the model section of the YAML file at `path` says."""
        if model.load is None:
            return self._configured(model)
        if _is_hugging_face(Path(model.load)):
            self.notes.append(f"{role}: {model.load} is a Hugging Face folder, planned by its {HF_CONFIG}; a run needs it converted")
            return _described_by(Path(model.load))
        if Path(model.load).exists():
            saved = find_source(model.load)
            return saved_architecture(saved, chosen_model(saved, model.load_model, role, head))
        return self._not_here(role, head, model, path)

    def _configured(self, model: ModelConfig) -> Architecture:
        return _made_of(dataclasses.asdict(model.architecture), self.vocab_size)

    def _not_here(self, role: str, head: str, model: ModelConfig, path: Path) -> Architecture:
        for other in sorted(path.parent.glob("*.yaml")) + sorted(path.parent.parent.glob("*/*.yaml")):
            found = self._made_by(other, model.load)
            if found is None or other.resolve() == path.resolve():
                continue
            if found.load is None or Path(found.load).exists():
                self.notes.append(f"{role}: {model.load} is not here: its architecture is that of {other}, which makes it")
            return self._as_said(role, head, found, other)
        sizes = {preset.removeprefix("gpt3-"): preset for preset in PRESETS}
        for part in Path(model.load).parts:
            if part in sizes:
                self.notes.append(f"{role}: {model.load} is not here: {sizes[part]} is assumed by its name")
                return make_architecture(sizes[part], vocab_size=self.vocab_size)
        raise ValueError(
            f"load {model.load} is not here, and no YAML file beside {path} makes it: "
            f"say what it is, --architecture {role}=PRESET ({', '.join(PRESETS)}), or {role}=PATH of a Hugging Face {HF_CONFIG}"
        )

    @staticmethod
    def _made_by(path: Path, run_dir: str) -> ModelConfig | None:
        """The trained model of the run in `path`, where its run.dir is `run_dir`."""
        if Path(run_dir).as_posix() not in path.read_text(encoding="utf-8"):
            return None  # so that not every file is looked through for what may be wrong with it
        try:
            config = load_stage_config(path)
        except ConfigError:
            return None  # not a run's
        same = Path(config.run.dir) == Path(run_dir)
        return getattr(config, "model", getattr(config, "policy", None)) if same else None
