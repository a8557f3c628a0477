"""The commands that train nothing: generate, evaluate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from megarlhf.config.relations import idle_doubts, task_violations
from megarlhf.config.rules import InputFile, Range
from megarlhf.config.sections import HeldOutTextConfig, LimitsConfig, ModelConfig, Rows, SamplingConfig, WinRateConfig
from megarlhf.config.stage import StageConfig


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(StageConfig):
    """`megarlhf generate`: sample responses for a file of prompts into <run.dir>/responses.jsonl."""

    model: ModelConfig
    """The model to sample from."""
    prompts: InputFile
    """JSONL of {"prompt"}."""
    samples_per_prompt: Rows = 1
    """Responses to each prompt; above 1 their records say which "sample" they are, from 0."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """Prompt lengths and bad records."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How responses are sampled. Where neither max_batch_size nor kv_cache_bytes says it, a copy of the model holds 256 rows at a time."""

    def doubts(self) -> list[str]:
        """What is hardly meant."""
        greedy = self.sampling.temperature == 0 and self.samples_per_prompt > 1
        return idle_doubts(self) + (["samples_per_prompt: at sampling.temperature 0 they are all the same"] if greedy else [])


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(StageConfig):
    """`megarlhf evaluate`: what the given data allow, into <run.dir>/evaluation.json."""

    model: ModelConfig
    """The model to evaluate: a language model, or a reward model."""
    reward: ModelConfig | None = None
    """A reward model that scores the language model's responses to `prompts`, and is judged by `rankings`."""
    reference: ModelConfig | None = None
    """A language model against which the KL of the responses is taken."""
    prompts: InputFile | None = None
    """JSONL of {"prompt"} to answer."""
    demonstrations: InputFile | None = None
    """JSONL of {"prompt", "response"}: loss on the responses."""
    rankings: InputFile | None = None
    """JSONL of rankings: the accuracy of `reward`, or of `model` where that is a reward model."""
    tasks: tuple[InputFile, ...] = ()
    """JSONL files, one for each benchmark (docs/evaluation.md): multiple choice, or answers generated at temperature 0."""
    shots: Annotated[int, Range(0, 1000)] | None = None
    """Examples before each query of a task; null: as many as its file says."""
    win_rate: WinRateConfig = field(default_factory=WinRateConfig)
    """Whose answers are better, and how often."""
    text: HeldOutTextConfig | None = None
    """Packed text: language-model loss."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """Row lengths and bad records."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How responses are sampled."""

    def violations(self) -> list[str]:
        """Rules across sections."""
        found, against = task_violations(self.tasks, self.shots), self.win_rate.against
        if not any((self.prompts, self.demonstrations, self.rankings, self.tasks, self.text, against, self.win_rate.labels)):
            data = "prompts, demonstrations, rankings, tasks, win_rate.against, win_rate.labels or text"
            found.append(f"{data} must be given: there is nothing to evaluate on")
        if self.reference and self.prompts is None:
            found.append("reference judges responses: it needs prompts")
        if self.reward and not any((self.prompts, self.rankings, against)):
            found.append("reward judges responses or rankings: it needs prompts, rankings or win_rate.against")
        if against and self.win_rate.responses is None and self.prompts is None:
            found.append("win_rate.against holds B's answers: win_rate.responses must name A's, or prompts what the model answers")
        return found

    def doubts(self) -> list[str]:
        """What is hardly meant."""
        return idle_doubts(self)
