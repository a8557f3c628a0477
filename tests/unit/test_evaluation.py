"""Evaluations, with models that are tables: what is counted, and how it is divided."""

import dataclasses
import itertools
import json
import math
from typing import get_args

import pytest
import torch

from megarlhf.batch import Prompts, RankingBatch, Rollouts, TextBatch, pad_rows
from megarlhf.config.sections import HeldOutTextConfig, SamplingConfig
from megarlhf.data.answers import Answer, AnswerRow, Label
from megarlhf.data.task_rows import TaskRow
from megarlhf.data.tasks import TaskRecord
from megarlhf.data.tokenized import PromptRow, RankingRow
from megarlhf.engine.engine import NotFiniteError
from megarlhf.evaluation.intervals import interval_metrics, mean_interval, win_rate
from megarlhf.evaluation.rankings import accuracy_by_group, accuracy_by_prompt, ranking_metrics, ranking_records
from megarlhf.evaluation.responses import Judged, Purpose, ResponseJudge, generate, response_lines, response_records
from megarlhf.evaluation.tasks import answer_results, choice_results, contains, exact_match, f1, newline_ids, task_metrics
from megarlhf.evaluation.text import HeldOutText, language_model_loss_on
from megarlhf.evaluation.win_rate import answer_scores, by_prompt, comparison, sampled_answers
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

    precision = "fp32"

    def __init__(self):
        self.asked = []

    def generate(self, prompts, **how):
        self.asked.append(how)
        return rollouts()


def test_rankings_are_counted_by_prompt_and_by_pair():
    ranks, prompt_index = torch.tensor([1, 2, 3, 1, 1, 2, 1]), torch.tensor([0, 0, 0, 1, 1, 2, 2])  # the second prompt ties
    batch = RankingBatch(tokens=torch.zeros(7, 2).long(), lengths=torch.full((7,), 2), ranks=ranks, prompt_index=prompt_index)
    scores = Table(1).scores(batch)
    metrics = ranking_metrics(scores, batch)
    losses, every_gap = [], []
    for prompt in range(3):
        rows = (prompt_index == prompt).nonzero().flatten().tolist()
        gaps = [float(scores[i] - scores[j]) for i, j in itertools.permutations(rows, 2) if ranks[i] < ranks[j]]
        losses.append(sum(math.log1p(math.exp(-gap)) for gap in gaps) / len(gaps) if gaps else 0.0)
        every_gap += gaps
    expected = {"valid/ranking_loss": sum(losses) / 2, "valid/accuracy": sum(gap > 0 for gap in every_gap) / 4}
    assert metrics == pytest.approx(expected | {"valid/score_gap": sum(every_gap) / 4}, rel=1e-5) and len(every_gap) == 4
    tied = dataclasses.replace(batch, ranks=torch.ones(7).long())
    assert ranking_metrics(scores, tied) == {}


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
    how = {"max_new_tokens": 7, "temperature": temperature, "top_k": 5, "top_p": None, "seed": seed, "iteration": 0}
    how |= {"max_batch_size": 2, "kv_cache_bytes": None, "cuda_graphs": False, "listener": None}
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
    assert [name for name in records[1] if name.startswith("input_")] == [f"input_{name}" for name in fields[1]]
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


# Rankings


def test_accuracy_by_prompt_and_by_group_are_those_of_counting():
    generator = torch.Generator().manual_seed(7)
    rows = [
        RankingRow([1], ((2,),) * len(ranks), ranks, f"f:{i}", group)
        for i, (ranks, group) in enumerate([((1, 2), "x"), ((1, 2, 2, 3), "y"), ((2, 1, 1), "x"), ((3, 2, 1), 7), ((1, 1, 2), None)])
    ]
    scores = torch.randn(sum(len(row.ranks) for row in rows), generator=generator)
    records = ranking_records(scores, rows)
    left, shares, groups = scores.tolist(), [], {}
    for row, record in zip(rows, records, strict=True):
        mine, left = left[: len(row.ranks)], left[len(row.ranks) :]
        right = [mine[i] > mine[j] for i, j in itertools.permutations(range(len(mine)), 2) if row.ranks[i] < row.ranks[j]]
        shares.append(sum(right) / len(right))
        groups.setdefault(row.group, []).extend(right)
        assert (record["source"], record["group"], record["scores"]) == (row.source, row.group, mine)
        assert (record["comparisons"], record["right"]) == (len(right), sum(right))
    mean, low, high = mean_interval(shares)
    assert mean == pytest.approx(sum(shares) / 5)
    name = "valid/accuracy_by_prompt"
    assert accuracy_by_prompt(records) == {name: mean, f"{name}_low": low, f"{name}_high": high, f"{name}_count": 5.0}
    accuracies = {group: sum(right) / len(right) for group, right in groups.items() if group is not None}
    found = accuracy_by_group(records)
    for group, accuracy in accuracies.items():
        assert found.pop(f"valid/accuracy_of_group/{group}") == pytest.approx(accuracy)
    of_groups = torch.tensor(list(accuracies.values()), dtype=torch.float64)
    assert found == pytest.approx(
        {"valid/accuracy_over_groups": float(of_groups.mean()), "valid/accuracy_over_groups_stderr": float(of_groups.std()) / math.sqrt(3)}
    )
    assert accuracy_by_group(records[-1:]) == {}
    assert accuracy_by_group(records[1:2]).keys() == {"valid/accuracy_of_group/y", "valid/accuracy_over_groups"}


# Tasks


def query(number, *, choices=(), answers=("x",), metric="accuracy", prompt=(1, 2)):
    record = TaskRecord({"id": number}, tuple(choices), tuple(answers), metric, None, f"f:{number}")
    return TaskRow(list(prompt), tuple([ord(letter) - 96 for letter in choice] for choice in choices), 0, 0, record, 5)


class ByPosition:
    """log p of a token is minus its id over ten, plus its place times a hundredth; 0 where it is not asked for."""

    def logprobs(self, batch, positions):
        places = torch.arange(1, batch.tokens.shape[1])
        return torch.where(positions, -batch.tokens[:, 1:] / 10 + places / 100, 0.0)


def test_choices_are_scored_by_the_mean_of_their_own_tokens_and_by_the_sum():
    rows = [
        query(1, choices=("aaa", "b"), answers=("aaa",), prompt=(9, 9, 9)),
        query(2, choices=("aaaa", "d", "a"), answers=("d",), prompt=(5,)),
        query(3, choices=("cc", "c"), answers=("c",)),
    ]
    results = choice_results(ByPosition(), "t", rows, pad_id=0)
    for row, result in zip(rows, results, strict=True):
        sums = []
        for choice in row.choice_ids:
            sums.append(sum(-token / 10 + (len(row.prompt_ids) + i) / 100 for i, token in enumerate(choice)))
        means = [total / len(choice) for total, choice in zip(sums, row.choice_ids, strict=True)]
        assert result["logprobs"] == pytest.approx(sums, abs=1e-6) and result["logprobs_per_token"] == pytest.approx(means, abs=1e-6)
        assert result["choice"] == means.index(max(means)) and result["choice_by_sum"] == sums.index(max(sums))
        assert result["answer"] == row.record.num_right and result["accuracy"] == float(result["choice"] == result["answer"])
        assert result["id"] == row.record.fields["id"] and result["source"] == row.record.source
    assert [(r["choice"], r["choice_by_sum"], r["answer"]) for r in results] == [(0, 1, 0), (0, 2, 1), (0, 1, 1)]
    metrics = task_metrics("t", results)
    assert metrics["tasks/t/accuracy"] == pytest.approx(1 / 3) and metrics["tasks/t/accuracy_by_sum"] == pytest.approx(1 / 3)
    assert (metrics["tasks/t/accuracy_low"], metrics["tasks/t/accuracy_high"]) == mean_interval([1, 0, 0])[1:]


class Says:
    """A generator that answers a prompt by its first token."""

    precision = "fp16"

    def __init__(self, answers, logprob=0.0):
        self.answers, self.asked, self.logprob = answers, [], logprob

    def generate(self, prompts, **how):
        self.asked.append((prompts.num_rows, how))
        answers = [[*map(ord, self.answers[int(row[0])])] for row in prompts.tokens]
        starts = prompts.lengths.tolist()
        rows = [[*row[:start].tolist(), *answer] for row, start, answer in zip(prompts.tokens, starts, answers, strict=True)]
        tokens, lengths = pad_rows(rows, pad_id=0)
        nothing = torch.full((len(rows), tokens.shape[1] - 1), self.logprob)
        about = {"response_mask": nothing.bool(), "logprobs": nothing, "finished": torch.ones(len(rows)).bool()}
        return Rollouts(tokens=tokens, lengths=lengths, prompt_lengths=prompts.lengths, **about)


class Characters:
    """An id is a character."""

    vocab_size, pad_id = 128, 0

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_answers_are_cut_at_the_first_newline_and_judged_by_their_records_metric():
    said = {1: " The Eiffel Tower.\nQ: more", 2: "\nno", 3: " in Paris, France", 4: "one two"}
    rows = [
        query(1, answers=("a tower", "Eiffel tower"), metric="exact_match", prompt=(1, 7)),
        query(2, answers=("no",), metric="exact_match", prompt=(2,)),
        query(3, answers=("Paris",), metric="contains", prompt=(3, 7, 7)),
        query(4, answers=("two three four", "x"), metric="f1", prompt=(4,)),
    ]
    generator = Says(said)
    results = answer_results(generator, "t", rows, Characters(), rows_at_once=3)
    assert [r["response"] for r in results] == ["The Eiffel Tower.", "", "in Paris, France", "one two"]
    assert [size for size, _ in generator.asked] == [3, 1]
    assert all(how["temperature"] == 0 and how["max_new_tokens"] == 5 for _, how in generator.asked)
    metrics = task_metrics("t", results)
    means = {name: metrics[f"tasks/t/{name}"] for name in ("exact_match", "contains", "f1")}
    assert means == pytest.approx({"exact_match": 0.5, "contains": 1.0, "f1": 0.4}) and len(metrics) == 12
    assert metrics["tasks/t/exact_match_count"] == 2
    assert newline_ids(Characters()) == [10]


def test_words_of_answers():
    assert exact_match("the  Answer, is: 4!", ["answer is 4"]) == 1 and exact_match("4", ["5", "4"]) == 1 and exact_match("45", ["4"]) == 0
    assert contains("it was New York City.", ["new york"]) == 1 and contains("newest", ["new"]) == 0 and contains("x", ["the"]) == 0
    assert contains("", ["x"]) == 0
    assert f1("a b b c", ["b b d"]) == pytest.approx(2 * (2 / 3) * (2 / 3) / (2 / 3 + 2 / 3))  # "a" is an article
    assert f1("x y", ["z", "y x"]) == 1 and f1("", ["x"]) == 0


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        ("A", ["A", "a.", " (A) "], ["", "The", "B", "an", "?"]),  # a letter to choose: no article here
        ("The", ["the"], ["", "a"]),
        ("+", ["+"], ["", "-", "the"]),
        ("-5", ["-5", "(-5)", "-5."], ["5", "", "- 5"]),
        ("5", ["5", "5.", "$5", "5%", "- 5", "the 5"], ["-5", ".5", "55"]),
        ("3.5", ["3.5", "3.5."], ["35", "-3.5", "3,5"]),
        ("1/2", ["1/2"], ["12"]),
        ("1,000", ["1000", "1,000."], ["1.000"]),
        ("10:30", ["10:30"], ["1030"]),
    ],
)
def test_an_answer_matches_no_other_one(answer, right, wrong):
    for judge in (exact_match, contains, f1):
        assert all(judge(said, [answer]) == 1 for said in right) and all(judge(said, [answer]) == 0 for said in wrong)
    assert contains(f"I think {answer} is it.", [answer]) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_said_out_of_numbers_that_are_not_finite_is_no_answer(bad):
    """Whatever comes first would be said, and could be right: a model of bf16 that overflows in fp16 does so."""
    with pytest.raises(NotFiniteError, match="log-probabilities of what it says are not finite for 1 of 1 rows in fp16; .* take bf16"):
        answer_results(Says({1: "yes"}, bad), "t", [query(1, answers=("yes",), metric="exact_match")], Characters(), rows_at_once=3)
    prompts = Prompts(tokens=torch.ones(3, 2).long(), lengths=torch.tensor([2, 2, 2]), ids=torch.arange(3))
    says = Says({1: "yes"}, bad)
    for purpose in get_args(Purpose):
        if purpose == "ppo rollouts":  # whose update keeps the batch and says what is wrong with it
            assert generate(says, prompts, SamplingConfig(), seed=1, purpose=purpose).num_rows == 3
        else:
            with pytest.raises(NotFiniteError, match="for 3 of 3 rows"):
                generate(says, prompts, SamplingConfig(), seed=1, purpose=purpose)


# Win rates


def test_the_same_answers_are_scored_once_and_those_that_read_the_same_tie():
    class Growing:
        def scores(self, batch):
            self.num_rows = batch.num_rows
            return torch.arange(batch.num_rows).float()

    engine = Growing()
    rows = [AnswerRow([1], ids, None) for ids in ([2, 0], [3, 0], [2, 0], [2])]
    assert answer_scores(engine, rows, pad_id=9) == [0.0, 1.0, 0.0, 2.0] and engine.num_rows == 3

    def preferred(a, b, score_a, score_b):
        one, other = (Answer("p", response, finished, 4, "f:1") for response, finished in (a, b))
        record = comparison(one, other, score_a, score_b)
        assert record["id"] == 4 and (record["response_a"], record["score_b"]) == (a[0], score_b)
        return record["preference"]

    x, y, cut = ("x", True), ("y", True), ("x", False)
    assert [preferred(x, y, 1.0, 0.5), preferred(x, y, 0.5, 1.0), preferred(x, y, 1.0, 1.0)] == [1.0, 0.0, 0.5]
    assert [preferred(x, x, 1.0, 0.5), preferred(x, cut, 1.0, 0.5)] == [0.5, 1.0]


def test_sampled_answers_have_the_ids_of_their_prompts():
    prompts = [PromptRow([1, 2], "f:1", {"id": "q"}), PromptRow([4], "f:2", {}), PromptRow([1, 1], "f:3", {"id": 0})]
    answers = sampled_answers(prompts, Letters(), rollouts())
    found = [(a.prompt, a.response, a.finished, a.id) for a in answers]
    assert found == [("ab", "c", True, "q"), ("d", "efgh", False, None), ("aa", "", True, 0)]
    assert [(a.prompt, a.id) for a in sampled_answers(prompts, Letters())] == [("ab", "q"), ("d", None), ("aa", 0)]


def test_labels_of_one_prompt_are_one_comparison():
    labels = [Label(("id", 1), 1.0, ""), Label(("id", 1), 0.5, ""), Label(("prompt", "1"), 0.0, ""), Label(("id", 1), 0.0, "")]
    assert by_prompt(labels) == {("id", 1): 0.5, ("prompt", "1"): 0.0}
    assert interval_metrics("w", []) == {}
