"""Evaluations, with models that are tables: what is counted, and how it is divided."""

import dataclasses
import itertools
import json
import math

import pytest
import torch

from megarlhf.batch import Prompts, RankingBatch, Rollouts, TextBatch
from megarlhf.config.sections import HeldOutTextConfig, SamplingConfig
from megarlhf.data.tokenized import PromptRow
from megarlhf.evaluation.rankings import ranking_metrics
from megarlhf.evaluation.responses import Judged, ResponseJudge, response_lines, response_records
from megarlhf.evaluation.text import HeldOutText, language_model_loss_on
from megarlhf.evaluation.win_rate import win_rate
from megarlhf.parallel.seed import derive_seed


class Table:
    """An engine whose outputs are drawn once."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.temperatures = []

    def scores(self, batch):
        return torch.randn(batch.num_rows, generator=self.generator)

    def logprobs(self, batch, positions, *, temperature=1.0):
        self.temperatures.append(temperature)
        drawn = -torch.rand(positions.shape, generator=self.generator)
        return torch.where(positions, drawn, 0.0)


class Letters:
    """Ids are letters; 0 ends."""

    def decode(self, ids):
        return "".join(chr(96 + i) for i in ids if i)


def rollouts():
    return Rollouts(
        tokens=torch.tensor([[1, 2, 3, 0, 9], [4, 5, 6, 7, 8], [1, 1, 0, 9, 9]]),
        lengths=torch.tensor([4, 5, 3]),
        prompt_lengths=torch.tensor([2, 1, 2]),
        response_mask=torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 1, 0, 0]]).bool(),
        logprobs=torch.zeros(3, 4),
        finished=torch.tensor([True, False, True]),
    )


class Fixed:
    """A generator that notes how it was asked."""

    def __init__(self):
        self.asked = []

    def generate(self, prompts, **how):
        self.asked.append(how)
        return rollouts()


def test_rankings_are_counted_by_prompt_and_by_pair():
    ranks, prompt_index = torch.tensor([1, 2, 3, 1, 1, 2, 1]), torch.tensor([0, 0, 0, 1, 1, 2, 2])  # the second prompt ties
    batch = RankingBatch(tokens=torch.zeros(7, 2).long(), lengths=torch.full((7,), 2), ranks=ranks, prompt_index=prompt_index)
    metrics, scores = ranking_metrics(Table(1), batch), Table(1).scores(batch)
    losses, right = [], []
    for prompt in range(3):
        rows = (prompt_index == prompt).nonzero().flatten().tolist()
        gaps = [float(scores[i] - scores[j]) for i, j in itertools.permutations(rows, 2) if ranks[i] < ranks[j]]
        losses.append(sum(math.log1p(math.exp(-gap)) for gap in gaps) / len(gaps) if gaps else 0.0)
        right += [gap > 0 for gap in gaps]
    assert metrics == pytest.approx({"valid/ranking_loss": sum(losses) / 2, "valid/accuracy": sum(right) / len(right)}, rel=1e-6)
    assert len(right) == 4
    tied = dataclasses.replace(batch, ranks=torch.ones(7).long())
    assert ranking_metrics(Table(1), tied) == {}


def test_text_loss_is_the_mean_over_what_counts():
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]]).bool()
    batch = TextBatch(tokens=torch.zeros(2, 4).long(), lengths=torch.tensor([4, 4]), loss_mask=mask)
    engine = Table(2)
    loss, drawn = language_model_loss_on(engine, batch), Table(2).logprobs(batch, mask)
    assert loss == pytest.approx(-float(drawn.sum()) / 3)
    assert engine.temperatures == [1.0]
    assert HeldOutText(batch).metrics(Table(2)) == {"valid/text_loss": loss}


def test_no_held_out_text_gives_no_metric():
    for data in (None, HeldOutTextConfig()):
        assert HeldOutText.of(data, eos_id=0, vocab_size=10).metrics(Table(0)) == {}


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_a_judge_samples_with_the_same_noise_and_judges_at_the_samplings_temperature(temperature):
    generator, policy, reference = Fixed(), Table(3), Table(4)
    prompts = Prompts(tokens=torch.ones(3, 2).long(), lengths=torch.tensor([2, 1, 2]), ids=torch.arange(3))
    sampling = SamplingConfig(temperature=temperature, top_k=5, max_new_tokens=7, max_batch_size=2)
    judge = ResponseJudge(generator, prompts, sampling, seed=11, purpose="evaluate", reward=Table(5), reference=reference, policy=policy)
    judged = judge.judge()
    judge.judge()
    seed = derive_seed(11, "sampling", "evaluate")
    how = {"max_new_tokens": 7, "temperature": temperature, "top_k": 5, "top_p": None, "seed": seed, "iteration": 0, "max_batch_size": 2}
    assert generator.asked == [how, how]
    assert policy.temperatures == reference.temperatures == [temperature or 1.0] * 2  # greedy has no temperature of its own
    mask = rollouts().response_mask
    kl = (Table(3).logprobs(None, mask) - Table(4).logprobs(None, mask)).sum(dim=1)
    torch.testing.assert_close(judged.kl, kl)
    assert judged.metrics("valid") == pytest.approx(
        {
            "valid/response_len": (2 + 4 + 1) / 3,
            "valid/finished_fraction": 2 / 3,
            "valid/reward_mean": float(Table(5).scores(rollouts()).mean()),
            "valid/kl": float(kl.mean()),
        }
    )


def test_a_judge_without_models_only_measures():
    judged = Judged(rollouts(), None, None)
    assert judged.metrics("r").keys() == {"r/response_len", "r/finished_fraction"}


def test_responses_as_text():
    records = response_records(rollouts(), Letters(), reward=torch.tensor([1.0, -2.0, 0.5]), kl=None)
    assert records == [
        {"prompt": "ab", "response": "c", "finished": True, "reward": 1.0},
        {"prompt": "d", "response": "efgh", "finished": False, "reward": -2.0},
        {"prompt": "aa", "response": "", "finished": True, "reward": 0.5},
    ]


class Counting(Letters):
    """Counts what it decodes."""

    decoded = 0

    def decode(self, ids):
        self.decoded += 1
        return super().decode(ids)


def test_only_the_responses_that_are_kept_are_decoded():
    tokenizer = Counting()
    assert [record["prompt"] for record in response_records(rollouts(), tokenizer, first=2)] == ["ab", "d"]
    assert tokenizer.decoded == 4 and len(response_records(rollouts(), tokenizer, first=9)) == 3


def test_what_a_prompt_says_besides_stands_beside_its_answer():
    fields = [
        {"id": 7, "topic": ["x"]},
        {"response": "given", "reward": None, "finished": 1},
        {"kl": 1, "input_kl": 2, "input_input_kl": 3},
    ]
    judged = Judged(rollouts(), torch.tensor([1.0, -2.0, 0.5]), None)
    prompts = [PromptRow([], f"f:{i}", more) for i, more in enumerate(fields)]
    records = [json.loads(line) for line in response_lines(judged, Letters(), prompts).splitlines()]
    plain = response_records(rollouts(), Letters(), reward=judged.scores)
    assert records[0] == plain[0] | {"id": 7, "topic": ["x"]}
    assert records[1] == plain[1] | {"input_response": "given", "input_reward": None, "input_finished": 1}
    assert records[2] == plain[2] | {"input_kl": 2, "input_input_kl": 3, "input_input_input_kl": 1}


def test_win_rate_is_a_wilson_interval():
    rate, low, high = win_rate([1.0] * 12 + [0.5] * 6 + [0.0] * 2)
    assert rate == 0.75
    for bound in (low, high):  # the proportions from which the observed rate is 1.96 standard errors away
        assert abs(rate - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / 20))
    assert low < rate < high
    assert win_rate([0.0] * 5)[:2] == (0.0, 0.0) and win_rate([0.0] * 5)[2] > 0.3
    other = win_rate([0.0] * 12 + [0.5] * 6 + [1.0] * 2)
    assert other == pytest.approx((1 - rate, 1 - high, 1 - low))
    with pytest.raises(ValueError, match="at least one comparison"):
        win_rate([])
