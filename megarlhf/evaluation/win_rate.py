"""Whose answers are better: by a reward model, and by people's labels (Ouyang et al. 2022, section 4.1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megarlhf.batch import Rollouts, Rows, pad_rows
from megarlhf.data.answers import Answer, AnswerRow, Key, Label
from megarlhf.data.tokenized import PromptRow
from megarlhf.data.tokenizers import Tokenizer
from megarlhf.engine.engine import Engine


def answer_scores(engine: Engine, rows: Sequence[AnswerRow], *, pad_id: int) -> list[float]:
    """A reward model's score of each answer, at its last token. The same tokens are scored once, so that they tie."""
    texts = [(*row.prompt_ids, *row.response_ids) for row in rows]
    distinct = {ids: number for number, ids in enumerate(dict.fromkeys(texts))}
    tokens, lengths = pad_rows([list(ids) for ids in distinct], pad_id=pad_id)
    scores = engine.scores(Rows(tokens=tokens, lengths=lengths)).tolist()
    return [scores[distinct[ids]] for ids in texts]


def comparison(a: Answer, b: Answer, score_a: float, score_b: float) -> dict[str, object]:
    """A pair's record: whose answer the reward model prefers. Answers that read the same tie, however they were sampled."""
    same = (a.response, a.finished) == (b.response, b.finished)
    preference = 0.5 if same or score_a == score_b else float(score_a > score_b)
    number = {"id": a.id} if a.id is not None else {}
    responses = {"response_a": a.response, "response_b": b.response, "score_a": score_a, "score_b": score_b}
    return {**number, "prompt": a.prompt, **responses, "preference": preference}


def by_prompt(labels: Iterable[Label]) -> dict[Key, float]:
    """The mean preference of each prompt's labels: several labels of one prompt are no independent comparisons."""
    found: dict[Key, list[float]] = {}
    for label in labels:
        found.setdefault(label.key, []).append(label.preference)
    return {key: sum(preferences) / len(preferences) for key, preferences in found.items()}


def sampled_answers(prompts: Sequence[PromptRow], tokenizer: Tokenizer, rollouts: Rollouts | None = None) -> list[Answer]:
    """The answers that were sampled to prompts; before that, without `rollouts`, what is known of them: all but their text."""
    answers = []
    for i, row in enumerate(prompts):
        response, finished = "", True
        if rollouts is not None:
            start, stop = int(rollouts.prompt_lengths[i]), int(rollouts.lengths[i])
            response, finished = tokenizer.decode(rollouts.tokens[i, start:stop].tolist()), bool(rollouts.finished[i])
        answers.append(Answer(tokenizer.decode(list(row.prompt_ids)), response, finished, row.fields.get("id"), row.source))
    return answers
