"""The generator beside the policy: in place where the layouts agree, else a copy that the policy's weights are resharded into."""

from __future__ import annotations

from megarlhf.data.tokenizers import Tokenizer
from megarlhf.generation.generator import Generator
from megarlhf.models.transformer import build_model, named_parameters
from megarlhf.resharding.publish import Publisher
from megarlhf.trainers.ppo_models import PpoModels


class PolicyGenerator:
    """Owns the generation layout's weights; they are unset before the first `publish`."""

    def __init__(self, models: PpoModels, tokenizer: Tokenizer) -> None:
        self.policy = models.policy
        spec, groups = models.policy.spec, models.generation_groups
        self.publisher = Publisher(spec.architecture, "lm", models.policy.groups, groups)
        self.chunks = models.policy.transformers
        if not self.publisher.in_place:
            self.chunks = build_model(spec, groups)
            for chunk in self.chunks:
                chunk.requires_grad_(False)
        self.parameters = named_parameters(self.chunks, groups)
        self.version = 0
        """How often weights were published."""
        self.generator = Generator(
            self.chunks, groups, architecture=spec.architecture, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id
        )

    def publish(self) -> None:
        """Give the generator the policy's present weights; costs nothing in place."""
        self.policy.offload.need("weights")
        self.version += 1
        self.publisher.publish(self.policy.parameters(), self.parameters, version=self.version)
