"""A trained model to ask: responses, log-probabilities, scores."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Mapping, Sequence

from torch import Tensor

from megarlhf.api.process import join, leave
from megarlhf.batch import TextBatch
from megarlhf.config import ConfigError
from megarlhf.config.inference import EvaluateConfig, GenerateConfig
from megarlhf.config.ppo import PpoConfig
from megarlhf.config.sections import ModelConfig, SamplingConfig
from megarlhf.config.stage import StageConfig
from megarlhf.data.collation import prompt_batch, text_batch
from megarlhf.data.comparisons import chat_of, prompt_of
from megarlhf.data.fields import Messages
from megarlhf.data.tokenized import DemonstrationRow, PromptRow, TextEncoder
from megarlhf.data.tokenizers import Tokenizer
from megarlhf.engine.checkpoint import load_weights, saved_architecture
from megarlhf.engine.frozen import FrozenEngine
from megarlhf.evaluation.responses import generate, generator_of, response_records
from megarlhf.models.parameters import Head
from megarlhf.models.transformer import ModelSpec
from megarlhf.parallel.groups import World
from megarlhf.runs.agreement import on_rank_0, refuse_together
from megarlhf.runs.checkpoints import find_source
from megarlhf.runs.models import chosen_model
from megarlhf.runs.records import open_tokenizer

Prompt = str | Sequence[Mapping[str, str]]
"""A text, or a chat as [{"role": "user", "content": "..."}, ...]."""


class Model:
    """A frozen model. Every method is a collective: each rank calls it with the same, and gets the same.

    It holds its weights and this process's group until `close`, or the end of a `with`.
    """

    def __init__(self, engine: FrozenEngine, tokenizer: Tokenizer, world: World, *, sampling: SamplingConfig, seed: int) -> None:
        """Args: sampling, seed: what `generate` does where it is not told."""
        self.engine, self.tokenizer = engine, tokenizer
        self._world, self._sampling, self._seed = world, sampling, seed
        self._encoder = TextEncoder(tokenizer)

    @staticmethod
    def of_run(config: StageConfig, head: Head) -> Model:
        """The model that a finished run left in its folder, in the layout that it was trained in; a collective of all ranks.

        The best checkpoint where the run chose one, else its newest; the moving average where there is one. Of `generate` and
        `evaluate` the model that they loaded. ValueError where its head is another.
        """
        role, section = ("policy", config.policy) if isinstance(config, PpoConfig) else ("model", config.model)
        loaded = isinstance(config, GenerateConfig | EvaluateConfig)
        world = join(config)
        try:
            saved = on_rank_0(world, find_source, section.load if loaded else config.run.dir)
            name = chosen_model(saved, section.load_model if loaded else None, role, head)
            if (its_head := saved.models[name]["head"]) != head:
                raise ConfigError(f"{saved.path} holds {_KINDS[its_head]}, and {_KINDS[head]} was asked for")
            refuse_together(saved.damages(world.rank, world.size), world)
            spec = ModelSpec(architecture=saved_architecture(saved, name), head=head, precision=section.precision)
            engine = _built(config, section, spec, world)
            average = saved.models[name]["has_ema"] and (section.load_average or not loaded)
            load_weights(saved, name, engine, average=average)
            tokenizer = open_tokenizer(config.tokenizer, world)
        except BaseException:
            leave(world)
            raise
        sampling = config.generation.sampling if isinstance(config, PpoConfig) else getattr(config, "sampling", SamplingConfig())
        sampling = dataclasses.replace(sampling, cuda_graphs=sampling.cuda_graphs and world.device.type == "cuda")
        return Model(engine, tokenizer, world, sampling=sampling, seed=config.run.seed)

    def generate(self, prompts: Sequence[Prompt], *, sampling: SamplingConfig | None = None, seed: int | None = None) -> list[str]:
        """A response to each prompt; what `megarlhf generate` gives to a file of them with the same sampling and seed.

        Args: sampling, seed: those of the run where they are left out.
        ValueError where a prompt leaves no room in the model's context, or the model is a reward model.
        """
        self._require("lm")
        _require_list("prompts", prompts)
        rows = [PromptRow(array("i", self._prompt_ids(f"prompt {i}", prompt)), "") for i, prompt in enumerate(prompts)]
        if not rows:
            return []
        batch, sampling = prompt_batch(rows, pad_id=self.tokenizer.pad_id), sampling or self._sampling
        seed = self._seed if seed is None else seed
        rollouts = generate(generator_of(self.engine, self.tokenizer), batch, sampling, seed=seed, purpose="generate")
        return [record["response"] for record in response_records(rollouts, self.tokenizer)]

    def logprobs(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Tensor]:
        """Of each response to its prompt the log-probability of every token in nats, EOS included: [tokens] float32.

        ValueError where a pair is longer than the model's context, or the model is a reward model.
        """
        self._require("lm")
        if not (batch := self._batch(prompts, responses)):
            return []
        found = self.engine.logprobs(batch, batch.loss_mask)
        return [row[mask] for row, mask in zip(found, batch.loss_mask, strict=True)]

    def scores(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """A reward model's score of each response, at its EOS. ValueError as in `logprobs`, and for a language model."""
        self._require("scalar")
        batch = self._batch(prompts, responses)
        return self.engine.scores(batch).tolist() if batch else []

    @property
    def is_closed(self) -> bool:
        """Whether it has been let go of."""
        return self.engine is None

    def close(self) -> None:
        """Let go of the weights and of the process group; safe to call again."""
        if not self.is_closed:
            self.engine = None
            leave(self._world)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _require(self, head: Head) -> None:
        if self.is_closed:
            raise ValueError("this model is closed: take the run's policy or reward_model again")
        if self.engine.spec.head != head:
            raise ValueError(f"this is {_KINDS[self.engine.spec.head]}, and {_KINDS[head]} is needed")

    def _prompt_ids(self, source: str, prompt: Prompt) -> list[int]:
        return self._encoder.encode_prompt(source, _read(source, prompt))

    def _batch(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> TextBatch | None:
        """Prompts with their responses, the responses in the loss mask."""
        _require_list("prompts", prompts)
        _require_list("responses", responses)
        if len(prompts) != len(responses):
            raise ValueError(f"there are {len(prompts)} prompts and {len(responses)} responses: each response needs its prompt")
        rows = [self._row(f"pair {i}", *pair) for i, pair in enumerate(zip(prompts, responses, strict=True))]
        return text_batch(rows, pad_id=self.tokenizer.pad_id) if rows else None

    def _row(self, source: str, prompt: Prompt, response: str) -> DemonstrationRow:
        read = _read(source, prompt)
        if isinstance(read, str):
            ids = self._encoder.encode_prompt(source, read)
            answer = [*self._encoder.encode(source, "response", response), self.tokenizer.eos_id]
        else:
            whole, [(start, end)] = self._encoder.encode_chat(source, chat_of(read, response), first=len(read))
            ids, answer = whole[:start], whole[start:end]
        if (length := len(ids) + len(answer)) > (context := self.engine.spec.architecture.max_seq_len):
            raise ValueError(f"{source} has {length} tokens with its EOS, and the model's context has {context}: shorten it")
        return DemonstrationRow(array("i", ids), array("i", answer), source)


_KINDS: dict[Head, str] = {"lm": "a language model", "scalar": "a reward model"}


def _built(config: StageConfig, section: ModelConfig, spec: ModelSpec, world: World) -> FrozenEngine:
    parallel = section.parallel or config.parallel
    layout = world.layout(tp=parallel.tp, pp=parallel.pp, virtual_pp=parallel.virtual_pp, sequence_parallel=parallel.sequence_parallel)
    how = {"micro_batch_size": section.micro_batch_size, "micro_batch_tokens": section.micro_batch_tokens}
    return FrozenEngine(spec, world.groups(layout), **how)


def _require_list(what: str, texts: object) -> None:
    if isinstance(texts, str):
        raise ValueError(f"{what} is one text, {texts[:40]!r}; give a list of texts")


def _read(source: str, prompt: Prompt) -> str | Messages:
    return prompt_of(source, {"prompt": prompt} if isinstance(prompt, str) else {"messages": list(prompt)})
