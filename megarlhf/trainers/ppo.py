"""PPO-ptx with four co-resident models (Ouyang et al. 2022, section 3.5, equation 2 and Appendix C.4), or without a value function."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megarlhf.algorithms.advantages import advantages_without_values, gae
from megarlhf.algorithms.kl import adapted_kl_coef
from megarlhf.algorithms.learning_rate import constant_with_warmup
from megarlhf.algorithms.masked import standardize
from megarlhf.algorithms.rewards import kl_shaped_rewards, penalize_unfinished
from megarlhf.batch import Experience, Prompts, Rollouts, ValueTargets
from megarlhf.config.ppo import PpoConfig
from megarlhf.data.collation import prompt_batch
from megarlhf.data.order import ShuffledOrder
from megarlhf.data.tokenized import PromptRow, fields_fingerprint, rows_fingerprint
from megarlhf.data.tokenizers import Tokenizer
from megarlhf.engine.terms import LanguageModelLoss, PolicyLoss, Term, ValueLoss
from megarlhf.engine.trainable import StepResult
from megarlhf.evaluation.responses import NUM_SAMPLES, ResponseJudge, generate, response_records
from megarlhf.parallel.seed import derive_seed
from megarlhf.runs.folder import Run
from megarlhf.runs.loop import Stage, run_stage, step_metrics
from megarlhf.runs.phases import Phases
from megarlhf.runs.records import Records, open_tokenizer
from megarlhf.runs.rewards import RewardFunctions, Rewards, RewardsOf
from megarlhf.trainers.policy_generator import PolicyGenerator
from megarlhf.trainers.ppo_metrics import group_metrics, require_same_policy, rollout_metrics, value_metrics
from megarlhf.trainers.ppo_models import PpoModels

FIELDS = "what is said besides in"
"""Begins the names of the fingerprints of records that rewards of one's own are given."""


@dataclass(frozen=True)
class Judgement:
    """What the frozen models and the two trained ones say of an iteration's rollouts."""

    scores: Tensor
    """[batch]: the rewards weighted and added up, penalty for unfinished responses included."""
    rewards: Mapping[str, Tensor]
    """[batch] of each reward by itself, by name."""
    logprobs: Tensor
    """[batch, seq - 1] of the policy that sampled, recomputed by the trainer (or, where so configured, the generator's)."""
    ref_logprobs: Tensor
    """[batch, seq - 1] of the reference."""
    values: Tensor | None
    """[batch, seq - 1] of the value function, where there is one."""


class ProximalPolicyOptimization(Stage):
    """Weights to the generator, prompts to rollouts, rollouts to experience, experience to updates."""

    shown = ("rollout/reward_mean", "rollout/kl", "ptx/loss")

    def __init__(
        self,
        config: PpoConfig,
        run: Run,
        tokenizer: Tokenizer,
        prompts: Sequence[PromptRow],
        valid: Sequence[PromptRow] = (),
        *,
        problems: Sequence[str] = (),
    ) -> None:
        """Build the models and the generator; `valid` are the prompts of evaluations, if any.

        ConfigError lists all that does not fit, and the `problems` that were found with the prompts.
        """
        self.config = config
        self.settings = config.ppo
        self.kl_coef = config.ppo.kl_coef
        self.temperature = config.generation.sampling.temperature
        """Of sampling, and so of the log-probabilities in the ratio and in the KL; text is at temperature 1."""
        self.tokenizer = tokenizer
        self.prompts = prompts
        records = Records(tokenizer, config.limits)
        section, text = "data.pretraining", config.data.pretraining
        self.text = records.text(section, text, seed=config.run.seed) if config.ppo.ptx_coef else None
        self.held_out = records.held_out(section, text)
        functions = RewardFunctions(config.reward.functions, run.world)
        fingerprints = records.fingerprints | functions.fingerprints
        problems = [*problems, *functions.problems, *records.agree(run.world), *run.keep(fingerprints)]
        self.roles = PpoModels.build(config, run, tokenizer, [*prompts, *valid], problems=problems)
        self.rewards = Rewards(config.reward, self.roles.reward, functions, tokenizer)
        rows = self.settings.iterations * self.settings.epochs * self.settings.batch_size * self.settings.ptx_ratio
        self.notes = [*(self.text.notes(rows) if self.text else []), *self.roles.notes]
        self.models = {"policy": self.roles.policy} | ({"value": self.roles.value} if self.roles.value is not None else {})
        self.generator = PolicyGenerator(self.roles, tokenizer, verify=config.generation.verify_weights)
        self.order = ShuffledOrder(len(prompts), seed=config.run.seed)
        self.judge = self._judge(valid) if valid else None
        self.total_steps = self.settings.iterations
        self.phases = Phases()

    def step(self, number: int) -> dict[str, float]:
        """One iteration: section 3.5's loop, Appendix C.4's numbers."""
        s, roles = self.settings, self.roles

        # weights -> generator
        with self.phases("reshard"):
            roles.turn_to("reshard")
            self.generator.publish()

        # prompts -> rollouts
        rows = [self.prompts[i] for i in self.order.take(s.batch_size // s.samples_per_prompt) for _ in range(s.samples_per_prompt)]
        with self.phases("generate"):
            roles.turn_to("generate")
            rollouts = self.rollouts(prompt_batch(rows, pad_id=self.tokenizer.pad_id), number)
            self.generator.release()
        mask = rollouts.response_mask

        # rollouts -> experience
        minibatches = [self.minibatch_rows(rollouts.num_rows, number, epoch) for epoch in range(s.epochs)]
        with self.phases("score"):
            roles.turn_to("score")
            judged = self.judged(rollouts, rows, minibatches[0])
        of_rollouts = rollout_metrics(rollouts, scores=judged.scores, logprobs=judged.logprobs, ref_logprobs=judged.ref_logprobs)
        require_same_policy(of_rollouts, most=self.config.generation.max_logprob_gap)
        experience, targets = self.experience(rollouts, judged)

        # experience -> updates
        policy_rate = self.learning_rate(number, self.config.policy.adam.learning_rate)
        value_rate = self.learning_rate(number, self.config.value.adam.learning_rate) if targets is not None else 0.0
        policy_steps: list[StepResult] = []
        value_steps: list[StepResult] = []
        with self.phases("update"):
            roles.turn_to("update")
            for index in itertools.chain(*minibatches):
                terms = [Term("policy", self.policy_loss(), experience.rows(index)), *self.pretraining_terms()]
                policy_steps.append(roles.policy.step(terms, learning_rate=policy_rate))
                if targets is not None:
                    terms = [Term("value", ValueLoss(clip=s.value_clip), targets.rows(index))]
                    value_steps.append(roles.value.step(terms, learning_rate=value_rate))
            roles.turn_to("average")
            roles.policy.ema.update()

        self.samples = response_records(rollouts, self.tokenizer, first=NUM_SAMPLES, reward=judged.scores)
        metrics = {"rollout/kl_coef": self.kl_coef, "rollout/policy_updates": self.generator.policy_updates}
        metrics |= step_metrics("policy", policy_steps, policy_rate)
        metrics |= self.rewards.metrics(judged.rewards)
        metrics |= of_rollouts
        metrics |= self.text.metrics() if self.text else {}
        if targets is not None:
            metrics |= value_metrics(targets.old_values, targets.returns, mask) | step_metrics("value", value_steps, value_rate)
        if s.samples_per_prompt > 1:
            metrics |= group_metrics(judged.scores, group_size=s.samples_per_prompt)
        metrics |= roles.offload_metrics()
        self.adapt_kl(metrics["rollout/kl"])
        trained = sum(result.tokens for result in (*policy_steps, *value_steps))
        return metrics | self.phases.metrics(generate=int(mask.sum()), update=trained)

    def experience(self, rollouts: Rollouts, judged: Judgement) -> tuple[Experience, ValueTargets | None]:
        """Rewards and advantages of an iteration's rollouts: what the policy, and the value function if any, learn from."""
        s, mask = self.settings, rollouts.response_mask
        in_reward = self.kl_coef if s.kl_in == "reward" else 0.0
        how = {"kl_coef": in_reward, "estimator": s.kl_estimator}
        rewards = kl_shaped_rewards(judged.scores, judged.logprobs, judged.ref_logprobs, mask, **how)
        rows = {"tokens": rollouts.tokens, "lengths": rollouts.lengths, "response_mask": mask}
        targets = None
        if judged.values is not None:
            advantages, returns = gae(rewards, judged.values, mask, gamma=s.gamma, lam=s.gae_lambda)
            targets = ValueTargets(**rows, old_values=judged.values, returns=returns)
        else:
            how = {"gamma": s.gamma, "group_size": s.samples_per_prompt, "divide_by_std": s.divide_by_std}
            advantages = advantages_without_values(s.advantages, rewards, mask, **how)
        if s.standardizes:
            advantages = standardize(advantages, mask)
        whole = Experience(**rows, old_logprobs=judged.logprobs, ref_logprobs=judged.ref_logprobs, advantages=advantages)
        return whole, targets

    def policy_loss(self) -> PolicyLoss:
        """What the policy learns by, with the KL in it where it is not in the rewards."""
        s = self.settings
        return PolicyLoss(
            clip=s.clip,
            temperature=self.temperature,
            clip_high=s.clip_high,
            kl_coef=self.kl_coef if s.kl_in == "loss" else 0.0,
            kl_estimator=s.kl_estimator,
            normalization=s.normalization,
            max_len=self.config.generation.sampling.max_new_tokens if s.normalization == "constant" else None,
        )

    def rollouts(self, prompts: Prompts, iteration: int) -> Rollouts:
        """One response to each prompt from the present policy."""
        sampling = self.config.generation.sampling
        return generate(self.generator.generator, prompts, sampling, seed=self.config.run.seed, purpose="ppo rollouts", iteration=iteration)

    def judged(self, rollouts: Rollouts, rows: Sequence[PromptRow] = (), minibatches: Sequence[Tensor] | None = None) -> Judgement:
        """Scores, log-probabilities and values of an iteration's rollouts; `rows` are their prompts, for rewards of one's own.

        With the first epoch's `minibatches` they come from the micro-batches that will be trained: in low precision a row
        beside other rows gives other numbers, and the first minibatch's ratio would not be exactly 1.
        """
        roles, mask = self.roles, rollouts.response_mask
        rewards = self.rewards.by_source(rollouts, rows)
        scores = self.rewards.combined(rewards, normalize=self.config.reward.normalize)
        return Judgement(
            scores=penalize_unfinished(scores, rollouts.finished, penalty=self.settings.unfinished_penalty),
            rewards=rewards,
            logprobs=(
                roles.policy.logprobs(rollouts, mask, temperature=self.temperature, minibatches=minibatches)
                if self.settings.recompute_logprobs
                else rollouts.logprobs
            ),
            ref_logprobs=roles.reference.logprobs(rollouts, mask, temperature=self.temperature, minibatches=minibatches),
            values=roles.value.values(rollouts, mask, minibatches=minibatches) if roles.value is not None else None,
        )

    def minibatch_rows(self, num_rows: int, iteration: int, epoch: int) -> list[Tensor]:
        """One epoch's minibatches as row numbers [minibatch_size], at random: only the seed, iteration and epoch decide."""
        key = derive_seed(self.config.run.seed, "minibatches", iteration, epoch)
        order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(key))
        return list(order.split(self.settings.minibatch_size))

    def pretraining_terms(self) -> list[Term]:
        """The ptx term of one minibatch: ptx_ratio rows of text per episode, weighed by gamma of equation 2."""
        if self.text is None:
            return []
        rows = self.text.take(self.settings.ptx_ratio * self.settings.minibatch_size)
        return [Term("ptx", LanguageModelLoss(), rows, weight=self.settings.ptx_coef)]

    def learning_rate(self, iteration: int, peak: float) -> float:
        """Constant after a linear warm-up from a tenth over the first iterations (Appendix C.4)."""
        return constant_with_warmup(iteration, peak=peak, warmup_steps=self.settings.warmup_iterations)

    def adapt_kl(self, kl_per_episode: float) -> None:
        """Move kl_coef towards its target, where one is set."""
        adaptive = self.settings.adaptive_kl
        if adaptive is not None:
            self.kl_coef = adapted_kl_coef(
                self.kl_coef,
                kl_per_episode=kl_per_episode,
                target=adaptive.target,
                horizon=adaptive.horizon,
                num_episodes=self.settings.batch_size,
            )

    def _judge(self, valid: Sequence[PromptRow]) -> ResponseJudge:
        return ResponseJudge(
            self.generator.generator,
            prompt_batch(valid, pad_id=self.tokenizer.pad_id),
            self.config.generation.sampling,
            seed=self.config.run.seed,
            purpose="ppo validation",
            reward=RewardsOf(self.rewards, valid),
            reference=self.roles.reference,
            policy=self.roles.policy,
        )

    def evaluate(self) -> dict[str, float]:
        """Reward and KL on validation prompts and loss on held-out text, of the averaged weights."""
        with self.roles.policy.ema.swapped_in():
            self.roles.turn_to("evaluate")
            metrics = self.held_out.metrics(self.roles.policy)
            if self.judge is not None:
                self.generator.publish()
                metrics |= self.judge.judge().metrics("valid")
                self.generator.release()
        return metrics

    def state_dict(self) -> dict:
        """Data cursors, and the KL coefficient where it is adapted."""
        kl_coef = self.kl_coef if self.settings.adaptive_kl is not None else None
        return {"order": self.order.state_dict(), "text": self.text.state_dict() if self.text else None, "kl_coef": kl_coef}

    def load_state_dict(self, state: dict) -> None:
        """Go on from saved cursors; text, and a coefficient that is adapted, begin where they were not there before."""
        if self.config.data.prompts_may_grow and state["order"]["num_items"] < self.order.num_items:
            self.order.begin_behind(state["order"])
        else:
            self.order.load_state_dict(state["order"])
        if self.text and state["text"] is not None:
            self.text.load_state_dict(state["text"])
        if self.settings.adaptive_kl is not None and state["kl_coef"] is not None:
            self.kl_coef = state["kl_coef"]


def ppo(config: PpoConfig, run: Run) -> dict[str, float]:
    """`megarlhf ppo`."""
    tokenizer = open_tokenizer(config.tokenizer, run.world, now=run.began)
    records = Records(tokenizer, config.limits, run.world)
    samples = config.ppo.samples_per_prompt
    batch = ("ppo.batch_size" if samples == 1 else "ppo.batch_size / ppo.samples_per_prompt", config.ppo.batch_size // samples)
    prompts = records.prompts("data.prompts", config.data.prompts, batch=batch)
    valid = records.prompts("data.prompts_valid", config.data.prompts_valid, apart_from="data.prompts")
    if config.reward.functions:  # which are given the records
        for key, rows in (("data.prompts", prompts), ("data.prompts_valid", valid)):
            records.fingerprints |= {f"{FIELDS} {key}": fields_fingerprint(rows)} if rows else {}
    added = _added(prompts, run)
    if added and not config.data.prompts_may_grow:
        records.problems.append(
            f"data.prompts: {added} prompts were added behind those that the run in {run.dir} began with; "
            "set data.prompts_may_grow: true to go on with all of them, or choose another run.dir"
        )
    elif added:
        records.notes.append(f"{config.data.prompts}: {added} prompts were added; a new epoch over all {len(prompts)} begins")
    problems = [*records.agree(run.world), *run.keep(records.fingerprints, but=["data.prompts", f"{FIELDS} data.prompts"] if added else [])]
    stage = ProximalPolicyOptimization(config, run, tokenizer, prompts, valid, problems=problems)
    stage.notes = [*records.notes, *stage.notes]
    return run_stage(stage, run)


def _added(prompts: Sequence[PromptRow], run: Run) -> int:
    """How many prompts stand behind those that the run began with; 0 where they are others, or it begins."""
    if run.resumed is None:
        return 0
    began_with = run.resumed.state["cursors"]["order"]["num_items"]
    before, began = run.resumed.state["fingerprints"], prompts[:began_with]
    found = {"data.prompts": rows_fingerprint(began), f"{FIELDS} data.prompts": fields_fingerprint(began)}
    same = all(before[key] == value for key, value in found.items() if key in before)
    return len(prompts) - began_with if same else 0
