"""`megarlhf evaluate` on tasks, rankings of labelers and win rates: the same in every layout, and what slow counting gives."""

import json
import math

import pytest
import torch

from megarlhf.batch import Prompts, Rows
from megarlhf.config import ConfigError, load_stage_config
from megarlhf.data.tokenizers import load_tokenizer
from megarlhf.evaluation.intervals import mean_interval
from megarlhf.evaluation.responses import generator_of
from megarlhf.evaluation.tasks import newline_ids
from megarlhf.parallel.groups import World
from megarlhf.runs.folder import Run
from megarlhf.trainers.evaluate import Evaluation
from tests.distributed.recipe import lines_of, run_stage_of, write_lines

ONLY = ["demonstrations=null", "text=null", "reference=null", "limits.max_response_len=24"]
"""Bytes that a young model writes and that are no UTF-8 take more tokens to read than to write."""
ALONE = ["prompts=null", *ONLY]
LAYOUTS = {"tp2": (2, ["parallel.tp=2"]), "pp2": (2, ["parallel.pp=2"]), "dp2": (2, []), "tp2 pp2": (4, ["parallel.tp=2", "parallel.pp=2"])}


@pytest.fixture(scope="module")
def questions(recipe, tmp_path_factory):
    """A folder of what is evaluated on: two tasks, rankings with labelers, a baseline's answers, labels."""
    folder = tmp_path_factory.mktemp("questions")
    words = [record["prompt"].split("?")[0] for record in lines_of(recipe / "prompts.jsonl")]
    train = [{"part": "train", "context": f"{word}?\n", "choices": ["yes", "no"], "answer": i % 2} for i, word in enumerate(words[:4])]
    choices = [["no", f"it is a {word}", "a name"] for word in words]
    quiz = [{"id": f"q{i}", "context": f"{word}?\n", "choices": choices[i], "answer": i % 3} for i, word in enumerate(words)]
    write_lines(folder / "quiz.jsonl", [{"task": {"shots": 1, "target": "{answer}"}}, *train, *quiz])
    asked = [{"context": f"{word}?\n", "answers": ["it", word], "metric": ["f1", "contains"][i % 2]} for i, word in enumerate(words[:7])]
    write_lines(folder / "asked.jsonl", [{"task": {"max_new_tokens": 6}}, *asked])
    rankings = lines_of(recipe / "rankings.jsonl")
    write_lines(folder / "rankings.jsonl", [{**record, "labeler": i % 3} for i, record in enumerate(rankings)])
    answers = [{"id": i, **record} for i, record in enumerate(lines_of(recipe / "runs" / "generate" / "responses.jsonl"))]
    write_lines(folder / "a.jsonl", answers)
    others = [{**record, "response": f"It is {i}." if i % 4 else record["response"]} for i, record in enumerate(answers)]
    write_lines(folder / "b.jsonl", others[::-1])
    labels = [{"id": i, "preference": "a" if i % 3 else "tie"} for i in range(9)]
    write_lines(folder / "labels.jsonl", [*labels, {"id": 1, "preference": "b"}])
    return folder


def overrides_of(questions):
    win_rate = {name: str(questions / f"{file}.jsonl") for name, file in (("responses", "a"), ("against", "b"), ("labels", "labels"))}
    files = f"tasks=[{questions / 'quiz.jsonl'}, {questions / 'asked.jsonl'}]"
    return [*ALONE, files, f"rankings={questions / 'rankings.jsonl'}", f"win_rate={json.dumps(win_rate)}"]


def check_evaluation(folder, runs, overrides):
    run_stage_of(folder / "evaluate.yaml", [f"run.dir={runs}", *overrides])


@pytest.fixture(scope="module")
def on_one_rank(recipe, questions, ranks1):
    """The folder of an evaluation on one rank."""
    ranks1.run(check_evaluation, recipe, questions / "run", overrides_of(questions))
    return questions / "run"


FILES = ("tasks.jsonl", "rankings.jsonl", "comparisons.jsonl")


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_what_one_rank_gives(recipe, questions, on_one_rank, ranks2, ranks4, name, tmp_path):
    num_ranks, layout = LAYOUTS[name]
    (ranks2 if num_ranks == 2 else ranks4).run(check_evaluation, recipe, tmp_path, [*overrides_of(questions), *layout])
    one, other = (json.loads((run / "evaluation.json").read_text()) for run in (on_one_rank, tmp_path))
    assert one == pytest.approx(other, abs=1e-5)
    for file in FILES:
        for record, expected in zip(lines_of(tmp_path / file), lines_of(on_one_rank / file), strict=True):
            assert record.keys() == expected.keys()
            for key, value in record.items():
                numbers = isinstance(value, float) or (isinstance(value, list) and isinstance(value[0], float))
                assert value == (pytest.approx(expected[key], abs=1e-5) if numbers else expected[key])


def test_metrics_are_those_of_counting_the_records(questions, on_one_rank):
    metrics = json.loads((on_one_rank / "evaluation.json").read_text())
    tasks, comparisons = lines_of(on_one_rank / "tasks.jsonl"), lines_of(on_one_rank / "comparisons.jsonl")
    quiz = [record for record in tasks if record["task"] == "quiz"]
    assert [record["id"] for record in quiz] == [f"q{i}" for i in range(20)] and {record["shots"] for record in quiz} == {0, 1}
    right = [record["logprobs_per_token"].index(max(record["logprobs_per_token"])) == record["answer"] for record in quiz]
    mean, low, high = mean_interval(right)
    assert [metrics[f"tasks/quiz/accuracy{end}"] for end in ("", "_low", "_high", "_count")] == [mean, low, high, 20]
    assert metrics["tasks/asked/f1_count"] == 4 and metrics["tasks/asked/contains_count"] == 3
    assert all("\n" not in record["response"] for record in tasks if record["task"] == "asked")
    for i, record in enumerate(comparisons):
        assert record["id"] == i and record["response_b"] == (f"It is {i}." if i % 4 else record["response_a"])
        assert record["preference"] == (float(record["score_a"] > record["score_b"]) if i % 4 else 0.5)
    assert metrics["win_rate/by_reward"] == pytest.approx(sum(record["preference"] for record in comparisons) / 20)
    assert metrics["win_rate/by_labels"] == pytest.approx((0.5 * 3 + 0.5 + 5) / 9) and metrics["win_rate/by_labels_count"] == 9
    rankings = lines_of(on_one_rank / "rankings.jsonl")
    assert metrics["valid/accuracy"] == pytest.approx(sum(r["right"] for r in rankings) / sum(r["comparisons"] for r in rankings))
    assert {f"valid/accuracy_of_group/{group}" for group in range(3)} <= metrics.keys()


def check_scores_slowly(folder, runs, overrides):
    """Every choice by itself, in a row without padding; every answer with no token that stops it but EOS."""
    config = load_stage_config(folder / "evaluate.yaml", [f"run.dir={runs}", *overrides])
    with Run(config, World.connect()) as run:
        evaluation = Evaluation(config, run)
        model, tokenizer = evaluation.model, evaluation.tokenizer
        metrics = evaluation.metrics()
    records = iter(lines_of(runs / "tasks.jsonl"))
    for row, record in zip(evaluation.data.tasks["quiz"], records, strict=False):
        for ids, found in zip(row.choice_ids, record["logprobs"], strict=True):
            whole = torch.tensor([[*row.prompt_ids, *ids]])
            logprobs = model.logprobs(Rows(tokens=whole, lengths=torch.tensor([whole.shape[1]])), torch.ones(1, whole.shape[1] - 1).bool())
            assert math.isclose(float(logprobs[0, -len(ids) :].sum()), found, abs_tol=1e-4)
    stops = list(range(30, 90))
    free, bound = (generator_of(model, tokenizer, stop_ids=ids) for ids in ((), stops))
    prompts = torch.arange(40, 52).view(4, 3)
    batch = Prompts(tokens=prompts, lengths=torch.tensor([3, 2, 3, 1]), ids=torch.arange(4))
    how = {"max_new_tokens": 30, "temperature": 3.0, "seed": 5, "iteration": 0}
    one, other = free.generate(batch, **how), bound.generate(batch, **how)
    cut = 0
    for i, start in enumerate(batch.lengths.tolist()):
        ids = one.tokens[i, start : one.lengths[i]].tolist()
        first = next((n for n, token in enumerate(ids) if token in stops), len(ids) - 1)
        assert other.tokens[i, start : other.lengths[i]].tolist() == ids[: first + 1]
        assert bool(other.finished[i]) == (ids[first] == tokenizer.eos_id)
        cut += first < len(ids) - 1
    assert cut, "no response had a stop id"
    return metrics


def test_choices_and_stops_are_those_of_the_slow_way(recipe, questions, ranks1, tmp_path):
    ranks1.run(check_scores_slowly, recipe, tmp_path, overrides_of(questions))


def check_own_answers(folder, runs, questions):
    """The model's own answers against a file: of themselves, and of others; returns nothing, writes runs/*."""
    run_stage_of(folder / "evaluate.yaml", [f"run.dir={runs / 'first'}", *ONLY])
    same = f"win_rate.against={runs / 'first' / 'responses.jsonl'}"
    run_stage_of(folder / "evaluate.yaml", [f"run.dir={runs / 'same'}", *ONLY, same])
    with pytest.raises(ConfigError, match="win_rate.against: 20 of 20 answers have no answer on the other side with the same prompt"):
        run_stage_of(folder / "evaluate.yaml", [f"run.dir={runs / 'other'}", *ONLY, f"win_rate.against={questions / 'b.jsonl'}"])
    judge = [f"model.load={folder}/runs/reward", "reward=null", *ALONE, f"win_rate.responses={questions / 'a.jsonl'}"]
    run_stage_of(folder / "evaluate.yaml", [f"run.dir={runs / 'judge'}", *judge, f"win_rate.against={questions / 'b.jsonl'}"])


def test_own_answers_against_a_file_and_a_reward_model_alone(recipe, questions, on_one_rank, ranks1, tmp_path):
    ranks1.run(check_own_answers, recipe, tmp_path, questions)
    same = json.loads((tmp_path / "same" / "evaluation.json").read_text())
    assert same["win_rate/by_reward"] == 0.5 and same["win_rate/by_reward_count"] == 6
    for record, expected in zip(*(lines_of(run / "comparisons.jsonl") for run in (tmp_path / "judge", on_one_rank)), strict=True):
        scores = {name: pytest.approx(expected[name], abs=1e-5) for name in ("score_a", "score_b")}  # of other micro-batches
        assert record == expected | scores


def test_recipes_tokenizer_has_newlines(recipe):
    tokenizer = load_tokenizer(recipe / "tokenizer.model")
    assert tokenizer.encode("\n")[0] in newline_ids(tokenizer)
