"""What a page warns of: each rule with its threshold, as a pure function of one run's curves."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean, median

from megarlhf.report.reading import Curve, RunRecord

RECENT_SHARE = 0.1
"""What "of late" means: this last share of a curve's points, and one at least."""
MOST_SKIPPED = 0.01
LEAST_FINISHED = 0.9
MOST_CLIPPED = 0.25
MOST_KL_PER_TOKEN = 1.0
"""Nats: the policy then gives its tokens e times the reference's probability, in the geometric mean."""
KL_JUMP, KL_JUMP_WINDOW, KL_JUMP_FLOOR = 3.0, 10, 5.0
"""Times the largest of so many steps before, and the nats per response below which no jump counts."""
MOST_GAP = 1.0
LEAST_EXPLAINED = 0.0
MOST_TIED = 0.5
MOST_RISE = 0.05
GRADIENT_SPIKE = 10.0

Found = Iterator[str]


@dataclass(frozen=True)
class Warned:
    """One sentence about one run."""

    run: str
    rule: str
    text: str
    way_out: str


@dataclass(frozen=True)
class Rule:
    """When a run is warned of."""

    name: str
    threshold: str
    """In words, with the number."""
    way_out: str
    judge: Callable[[Mapping[str, Curve]], Found]
    """A sentence for each metric that breaks it."""


def warnings_of(run: RunRecord) -> list[Warned]:
    """All that the rules say of a run, in the rules' order."""
    return [Warned(run.label, rule.name, text, rule.way_out) for rule in RULES for text in rule.judge(run.curves)]


def recent(curve: Curve) -> float | None:
    """The mean of the newest tenth of a curve; None where nothing in it is finite."""
    newest = [value for value in curve.values[-max(1, round(RECENT_SHARE * len(curve.values))) :] if value is not None]
    return fmean(newest) if newest else None


def _not_finite(curves: Mapping[str, Curve]) -> Found:
    for name, curve in curves.items():
        lost = [step for step, value in zip(curve.steps, curve.values, strict=True) if value is None]
        if lost:
            yield f"{name} was not finite in {len(lost)} of {len(curve.steps)} steps, first in step {lost[0]}"


def _skipped(curves: Mapping[str, Curve]) -> Found:
    for name, curve in _named(curves, r".*/skipped_steps"):
        share = fmean(curve.finite or [0.0])
        if share > MOST_SKIPPED:
            first = next(step for step, value in zip(curve.steps, curve.values, strict=True) if value)
            yield f"{name}: {100 * share:.3g} % of the optimizer steps were skipped, first in step {first}"


def _unfinished(curves: Mapping[str, Curve]) -> Found:
    for name, finished in _of_late(curves, r"(rollout|valid)/finished_fraction"):
        if finished < LEAST_FINISHED:
            yield f"{name}: {100 * (1 - finished):.3g} % of the newest responses did not end within their limit"


def _clipped(curves: Mapping[str, Curve]) -> Found:
    for name, clipped in _of_late(curves, r"(policy|value)/clip_fraction"):
        if clipped > MOST_CLIPPED:
            yield f"{name} is {clipped:.3g} of late"


def _kl_is_large(curves: Mapping[str, Curve]) -> Found:
    for name, kl in _of_late(curves, r"rollout/kl_per_token"):
        if kl > MOST_KL_PER_TOKEN:
            yield f"{name} is {kl:.3g} nats of late"


def _kl_jumps(curves: Mapping[str, Curve]) -> Found:
    for name, curve in _named(curves, r"rollout/kl"):
        points = [(step, value) for step, value in zip(curve.steps, curve.values, strict=True) if value is not None]
        for at in range(KL_JUMP_WINDOW, len(points)):
            before = max(value for _, value in points[at - KL_JUMP_WINDOW : at])
            step, value = points[at]
            if value > max(KL_JUMP * before, KL_JUMP_FLOOR):
                yield f"{name} leapt to {value:.3g} nats in step {step}; the most in the {KL_JUMP_WINDOW} steps before was {before:.3g}"
                break


def _alerts(curves: Mapping[str, Curve]) -> Found:
    for name, curve in _named(curves, r"alert/.*"):
        raised = [step for step, value in zip(curve.steps, curve.values, strict=True) if value]
        if raised:
            yield f"{name} was raised in {len(raised)} of {len(curve.steps)} steps, first in step {raised[0]}"


def _generator_disagrees(curves: Mapping[str, Curve]) -> Found:
    for name, curve in _named(curves, r"rollout/generator_logprob_gap"):
        worst = max(curve.finite, default=0.0)
        if worst > MOST_GAP:
            yield f"{name} reached {worst:.3g} nats in step {curve.steps[curve.values.index(worst)]}"


def _critic_is_useless(curves: Mapping[str, Curve]) -> Found:
    for name, explained in _of_late(curves, r"value/explained_variance"):
        if explained < LEAST_EXPLAINED:
            yield f"{name} is {explained:.3g} of late: a constant would predict the returns better"


def _tied(curves: Mapping[str, Curve]) -> Found:
    for name, tied in _of_late(curves, r"rollout/tied_groups"):
        if tied > MOST_TIED:
            yield f"{name}: in {100 * tied:.3g} % of the newest groups all scores are the same"


def _validation_rises(curves: Mapping[str, Curve]) -> Found:
    for name, curve in _named(curves, r"valid/(loss|ranking_loss|dpo_loss)"):
        points = [(value, step) for step, value in zip(curve.steps, curve.values, strict=True) if value is not None]
        if points and points[-1][0] > (1 + MOST_RISE) * min(points)[0]:
            yield f"{name} is {points[-1][0]:.4g} at the end, and was {min(points)[0]:.4g} at step {min(points)[1]}"


def _gradients_spike(curves: Mapping[str, Curve]) -> Found:
    for name, curve in _named(curves, r".*/grad_norm"):
        begun = len(curve.values) // 10
        later = [(value, step) for value, step in zip(curve.values[begun:], curve.steps[begun:], strict=True) if value is not None]
        worst, step = max(later, default=(0.0, 0))
        usual = median(curve.finite or [0.0])
        if worst > GRADIENT_SPIKE * usual > 0:
            yield f"{name} reached {worst:.3g} in step {step}; its median is {usual:.3g}"


def _named(curves: Mapping[str, Curve], pattern: str) -> Iterator[tuple[str, Curve]]:
    return ((name, curve) for name, curve in curves.items() if re.fullmatch(pattern, name))


def _of_late(curves: Mapping[str, Curve], pattern: str) -> Iterator[tuple[str, float]]:
    """(name, `recent` value) of the curves that have one."""
    return ((name, value) for name, curve in _named(curves, pattern) if (value := recent(curve)) is not None)


_LATE = f"mean of the newest {100 * RECENT_SHARE:.0f} % of the points"
RULES = (
    Rule("not finite", "any value that is NaN or infinite", "a smaller learning rate, or clip_grad; see what came before it", _not_finite),
    Rule(
        "skipped steps",
        f"<model>/skipped_steps above {100 * MOST_SKIPPED:.0f} % of all steps",
        "a smaller learning rate or clip_grad; in fp16 the first few are the search for a loss scale",
        _skipped,
    ),
    Rule(
        "unfinished responses",
        f"rollout/ or valid/finished_fraction below {LEAST_FINISHED} ({_LATE})",
        "a larger max_new_tokens, a stronger ppo.unfinished_penalty, or demonstrations that end",
        _unfinished,
    ),
    Rule(
        "clip fraction",
        f"policy/ or value/clip_fraction above {MOST_CLIPPED} ({_LATE})",
        "a smaller learning rate, fewer epochs, or larger minibatches: the updates are cut off by the clip",
        _clipped,
    ),
    Rule(
        "KL blow-up",
        f"rollout/kl_per_token above {MOST_KL_PER_TOKEN:g} nat ({_LATE})",
        "a larger ppo.kl_coef or ppo.adaptive_kl; read the samples for what games the reward model",
        _kl_is_large,
    ),
    Rule(
        "KL leaps",
        f"rollout/kl above {KL_JUMP:g} times the largest of the {KL_JUMP_WINDOW} steps before, and above {KL_JUMP_FLOOR:g} nats",
        "look at the gradient norm and the samples of that step; a smaller learning rate",
        _kl_jumps,
    ),
    Rule("alerts", "alert/loss or alert/kl above 0 in any step", "the run's log names the metric, its value and the median", _alerts),
    Rule(
        "generator differs",
        f"rollout/generator_logprob_gap above {MOST_GAP:g} nat in any step",
        "keep ppo.recompute_logprobs on, or a higher precision: the generator samples from another policy than is trained",
        _generator_disagrees,
    ),
    Rule(
        "critic",
        f"value/explained_variance below {LEAST_EXPLAINED:g} ({_LATE})",
        "more iterations, or another learning rate of the value function",
        _critic_is_useless,
    ),
    Rule("tied groups", f"rollout/tied_groups above {MOST_TIED} ({_LATE})", "harder or easier prompts, or more samples of each", _tied),
    Rule(
        "validation rises",
        f"the last of valid/loss, valid/ranking_loss or valid/dpo_loss over {100 * MOST_RISE:.0f} % above its smallest",
        "fewer epochs, or select_by: the model fits its training data by now",
        _validation_rises,
    ),
    Rule(
        "gradient spike",
        f"<model>/grad_norm above {GRADIENT_SPIKE:g} times its median in any step after the first tenth",
        "clip_grad holds a spike back; one that comes again asks for a smaller learning rate, or a look at that batch",
        _gradients_spike,
    ),
)
"""All of them, in the order of a page."""
