"""The generator beside the policy: in place where the layouts agree, else a copy that the policy's weights are resharded into."""

from __future__ import annotations

from megarlhf.config.ppo import VerifyWeights
from megarlhf.data.tokenizers import Tokenizer
from megarlhf.generation.generator import Generator
from megarlhf.models.transformer import build_model, named_parameters
from megarlhf.resharding.publish import Publisher
from megarlhf.trainers.ppo_models import PpoModels


class PolicyGenerator:
    """Owns the generation layout's weights, which exist from `publish` to `release`; with others than the policy's it does not generate."""

    def __init__(self, models: PpoModels, tokenizer: Tokenizer, *, verify: VerifyWeights = "first") -> None:
        """`verify` says after which publishings the copy is compared with the policy, bit for bit."""
        self.policy = models.policy
        self.verify = verify
        spec, groups = models.policy.spec, models.generation_groups
        self.publisher = Publisher(spec.architecture, "lm", models.policy.groups, groups)
        self.chunks = models.policy.transformers
        if not self.publisher.in_place:
            self.chunks = build_model(spec, groups)
            for chunk in self.chunks:
                chunk.requires_grad_(False)
        self.parameters = named_parameters(self.chunks, groups)
        self.release()
        self.policy_updates = 0
        """Updates that the policy had seen when its weights were published last: the version of the policy that a rollout is of."""
        self.generator = Generator(
            self.chunks,
            groups,
            architecture=spec.architecture,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            check_weights=self.check_weights,
        )

    def publish(self) -> None:
        """Give the generator the policy's present weights; costs nothing in place.

        RuntimeError, on all ranks, where they are compared and differ.
        """
        self.policy.offload.need("weights")
        source, optimizer = self.policy.parameters(), self.policy.optimizer
        self.publisher.publish(source, self.parameters, version=optimizer.weights_version)
        self.policy_updates = optimizer.updates
        if self.verify != "never" and not self.publisher.in_place:
            self.publisher.verify(source, self.parameters)
            if self.verify == "first":
                self.verify = "never"

    def allocate(self) -> None:
        """Take the memory for the weights before they are published."""
        if not self.publisher.in_place:
            self.publisher.allocate(self.policy.parameters(), self.parameters)

    def release(self) -> None:
        """Free the weights until they are published again; nothing in place."""
        self.publisher.release(self.parameters)

    def check_weights(self) -> None:
        """RuntimeError where what the generator holds is not the policy as it is now."""
        if self.publisher.in_place:
            self.policy.offload.need("weights")
            return
        published, now = self.publisher.version, self.policy.optimizer.weights_version
        if published is None:
            raise RuntimeError("the generator has no weights: the policy's were not published since the start, or since they were released")
        if published != now:
            raise RuntimeError(
                f"the generator has stale weights, version {published}, and the policy's are version {now}: they must be published again"
            )
