"""From files to token rows: everything that cannot be read, or that ranks read differently, is noted and said together."""

from __future__ import annotations

import datetime
import hashlib
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from megarlhf.config.relations import task_name
from megarlhf.config.sections import HeldOutTextConfig, LimitsConfig, PretrainingDataConfig, TokenizerConfig
from megarlhf.data.answers import Answer, AnswerRow, Label, answer_rows, answers_fingerprint, paired, read_answers, read_labels
from megarlhf.data.corpus import Corpus
from megarlhf.data.pretraining import PretrainingStream
from megarlhf.data.records import RecordReport, read_demonstrations, read_prompts, read_rankings
from megarlhf.data.shares import Shares
from megarlhf.data.task_rows import TaskRow, task_fingerprint, task_rows
from megarlhf.data.tasks import Task, read_task
from megarlhf.data.templates import FINGERPRINT, template_fingerprint
from megarlhf.data.tokenized import (
    DemonstrationRow,
    PromptRow,
    RankingRow,
    demonstration_rows,
    prompt_rows,
    ranking_rows,
    rows_fingerprint,
)
from megarlhf.data.tokenizers import Tokenizer, load_tokenizer, said_of_opening
from megarlhf.evaluation.text import HeldOutText
from megarlhf.parallel.collectives import gather_objects
from megarlhf.parallel.groups import World
from megarlhf.parallel.seed import derive_seed
from megarlhf.runs.agreement import refuse_together

T = TypeVar("T")
R = TypeVar("R", DemonstrationRow, RankingRow, PromptRow, TaskRow, AnswerRow)
Batch = tuple[str, int]
"""The key and the size of a batch that is drawn from a file."""


def open_tokenizer(config: TokenizerConfig, world: World, *, now: datetime.datetime | None = None) -> Tokenizer:
    """The run's tokenizer; `now` as for `load_tokenizer`. ConfigError on every rank where any rank cannot read it."""
    problems: list[str] = []
    tokenizer = _noting(problems, load_tokenizer, config.path, eos_token=config.eos_token, now=now)
    refuse_together([f"tokenizer: {problem}" for problem in problems], world)
    return tokenizer


class Records:
    """Reads a run's files under its limits. What fails is noted in `problems` and read as nothing.

    Files are called by the keys of the configuration that name them. `apart_from` is the key of what is trained on, where the
    file is for validation; `batch` says how much is drawn from it at a time.

    With a `world` every rank must ask for the same files in the same order: records are tokenized in shares over its ranks.
    """

    def __init__(self, tokenizer: Tokenizer, limits: LimitsConfig, world: World | None = None) -> None:
        self.tokenizer = tokenizer
        self.limits = limits
        self.world = world
        self.problems: list[str] = []
        self.notes: list[str] = []
        """What was read, what of it was left out and why, and what of it is doubtful: a line for each."""
        self.fingerprints: dict[str, str] = {"tokenizer": tokenizer.fingerprint}
        """"tokenizer", "chat template" where there are chats, and the key of each file that was read -> a hash of what the run sees."""
        self._paths: dict[str, str] = {"tokenizer": "tokenizer.path"}  # tokenizer first: see `agree`
        self._prompts: dict[str, set[bytes]] = {}
        self._corpora: list[str] = []

    def demonstrations(
        self, key: str, path: str | None, *, apart_from: str | None = None, batch: Batch | None = None
    ) -> list[DemonstrationRow]:
        """{"prompt", "response"} as rows; none without a path."""
        rows = self._rows(key, path, read_demonstrations, demonstration_rows, in_shares=True, **self._lengths())
        return self._checked(key, rows, apart_from, batch)

    def rankings(self, key: str, path: str | None, *, apart_from: str | None = None, batch: Batch | None = None) -> list[RankingRow]:
        """Rankings and pairs as rows, those that compare anything; none without a path."""
        rows = self._rows(key, path, read_rankings, ranking_rows, in_shares=True, **self._lengths())
        compared = [row for row in rows if len(set(row.ranks)) > 1]
        if rows and not compared:
            self.problems.append(f"{key}: {path} compares nothing: each of its {len(rows)} rankings is one tie; rank some response higher")
        elif len(compared) < len(rows):
            self.notes.append(f"{path}: {len(rows) - len(compared)} of {len(rows)} rankings are one tie, which compares nothing: left out")
        return self._checked(key, compared, apart_from, batch)

    def prompts(self, key: str, path: str | None, *, apart_from: str | None = None, batch: Batch | None = None) -> list[PromptRow]:
        """{"prompt"} as rows; none without a path."""
        rows = self._rows(key, path, read_prompts, prompt_rows, in_shares=True, max_prompt_len=self.limits.max_prompt_len)
        return self._checked(key, rows, apart_from, batch)

    def tasks(self, key: str, paths: Sequence[str], *, shots: int | None, seed: int) -> dict[str, list[TaskRow]]:
        """Each file's task by its name. Args: shots, seed: see `task_rows`."""
        tasks = {}
        for i, path in enumerate(paths):
            convert = partial(task_rows, shots=shots, seed=derive_seed(seed, "shots"))
            rows = self._rows(f"{key}[{i}]", path, read_task, convert, task_fingerprint, **self._lengths())
            if fewer := sum(row.shots_lost > 0 for row in rows):
                limit = f"limits.max_prompt_len {self.limits.max_prompt_len}"
                self.notes.append(f"{path}: {fewer} of {len(rows)} prompts have fewer examples than asked for, so that {limit} holds")
            tasks[task_name(path)] = rows
        return tasks

    def answers(self, key: str, path: str | None) -> list[AnswerRow]:
        """{"prompt", "response"} as rows, their order kept; none without a path."""
        return self._rows(key, path, read_answers, answer_rows, answers_fingerprint, **self._lengths())

    def labels(self, path: str | None, *, about: Sequence[Answer] = ()) -> list[Label]:
        """Whose answers are better; none without a path. How many are about none of the answers `about`, if those are known, is noted."""
        if path is None:
            return []
        labels, report = _noting(self.problems, read_labels, path, on_bad_record=self.limits.on_bad_record) or ([], None)
        self._note(report)
        known = {key for answer in about for key in (("id", answer.id), ("prompt", answer.prompt))}
        if known and (others := [label for label in labels if label.key not in known]):
            what = "are about none of the pairs of win_rate.responses and win_rate.against"
            self.notes.append(f"{path}: {len(others)} of {len(labels)} labels {what}, {others[0].source} the first; is this meant?")
        return labels

    def pairs(self, ours: Sequence[Answer], theirs: Sequence[Answer]) -> list[tuple[int, int]]:
        """The numbers of two models' answers to one prompt. One that cannot be paired is as good as a bad record."""
        if not ours or not theirs:
            return []
        pairs, left_out = paired(ours, theirs)
        if self.limits.on_bad_record == "raise" or not pairs:
            self.problems += [f"win_rate.against: {line}" for line in left_out]
        else:
            self.notes += [f"win_rate.against: left out: {line}" for line in left_out]
        return pairs

    def text(self, section: str, data: PretrainingDataConfig, *, seed: int) -> PretrainingStream | None:
        """Packed text without end, from the corpora of the configuration's `section`; None where one of them cannot be read."""
        corpora = []
        for name, prefix, _ in data.corpora():
            corpus = _noting(self.problems, Corpus, prefix, seq_len=data.seq_len, **self._ids())
            if corpus is not None:
                self._remember_apart(f"{section}.{name}", prefix, corpus.fingerprint)
                corpora.append(corpus)
        weights = [weight for *_, weight in data.corpora()]
        if len(corpora) < len(weights):
            return None
        return PretrainingStream(corpora, weights=weights, seed=derive_seed(seed, "text"), loader=data.loader)

    def held_out(self, section: str, data: HeldOutTextConfig | None) -> HeldOutText:
        """Held-out text of the configuration's `section`, where there is any."""
        held_out = _noting(self.problems, HeldOutText.of, data, **self._ids()) or HeldOutText(None)
        if held_out.fingerprint is not None:
            self._remember(f"{section}.valid_prefix", data.valid_prefix, held_out.fingerprint)
            for name in self._corpora:
                self._require_apart(f"{section}.valid_prefix", name)
        return held_out

    def agree(self, world: World) -> list[str]:
        """All problems, with those of content that is not the same on every rank; a collective of the world."""
        found = gather_objects(self.fingerprints)
        for key, path in self._paths.items():
            mine = found[0].get(key)
            others = [rank for rank in range(1, world.size) if mine and found[rank].get(key, mine) != mine]
            if others:
                ranks = ", ".join(map(str, others))
                self.problems.append(f"{key}: rank {ranks} of {world.size} reads other content from {path} than rank 0: is it an old copy?")
                if key == "tokenizer":
                    break  # whatever it encodes differs too
        return self.problems

    def _rows(
        self,
        key: str,
        path: str | None,
        read: Callable,
        convert: Callable[..., tuple[list[R], RecordReport]],
        fingerprint: Callable[[list[R]], str] = rows_fingerprint,
        *,
        in_shares: bool = False,
        **how: int | Shares,
    ) -> list[R]:
        if path is None:
            return []
        records, report = _noting(self.problems, read, path, on_bad_record=self.limits.on_bad_record) or (None, None)
        if in_shares:
            how["shares"] = self._shares(records)
        if records is None:
            return []
        rows, fit = _noting(self.problems, convert, records, self.tokenizer, **how, on_bad_record=self.limits.on_bad_record) or ([], None)
        if fit is not None:
            self._note(report)
            self._note(fit if fit.num_skipped else None)
            self.notes += [f"{path}: {fit.lost}"] if fit.lost else []
            kinds = {str} if isinstance(records, Task) else {type(getattr(record, "prompt", None)) for record in records}
            if str in kinds:
                self.notes += self._unopened(path)
            if tuple in kinds:
                self._remember(FINGERPRINT, f"the files beside {self.tokenizer.path}", template_fingerprint(self.tokenizer.path))
        if rows:
            self._remember(key, path, fingerprint(rows))
        return rows

    def _unopened(self, path: str) -> list[str]:
        """A doubt, once, about plain prompts where the model likely knows texts with an opening."""
        said = said_of_opening(self.tokenizer)
        is_new = said is not None and not any(note.endswith(said) for note in self.notes)
        return [f"{path}: is this meant? {said}"] if is_new else []

    def _shares(self, records: Sequence | None) -> Shares:
        """How the ranks share records that all of them have read alike; where they have not, each does all. A collective of the world.

        `records`: what this rank has read; None where it could not.
        """
        if self.world is None or self.world.size == 1:
            return Shares()
        content = hashlib.sha256()
        for record in records or ():
            content.update(pickle.dumps(record))
        alike = len(set(gather_objects((records is None, content.digest())))) == 1
        return Shares(self.world.rank, self.world.size, gather_objects) if alike else Shares()

    def _note(self, report: RecordReport | None) -> None:
        """Note what was read, and what of it was left out."""
        if report is None:
            return
        self.notes += [str(report), *(f"  skipped {example}" for example in report.examples)]
        if report.num_skipped > len(report.examples):
            self.notes.append(f"  and {report.num_skipped - len(report.examples)} more")

    def _remember_apart(self, key: str, path: str, fingerprint: str) -> None:
        """Remember a corpus, which must not be another one of the blend under another name."""
        self._remember(key, path, fingerprint)
        for other in self._corpora:
            if self.fingerprints[other] == fingerprint:
                self.problems.append(
                    f"{key}: {path} has the content of {other}, {self._paths[other]}: name it once, with the sum of the weights"
                )
        self._corpora.append(key)

    def _remember(self, key: str, path: str, fingerprint: str) -> None:
        self.fingerprints[key] = fingerprint
        self._paths[key] = path

    def _checked(self, key: str, rows: list[R], apart_from: str | None, batch: Batch | None) -> list[R]:
        """The rows, and what is wrong or doubtful with them as a whole noted."""
        if batch is not None and 0 < len(rows) < batch[1]:
            self.problems.append(
                f"{key}: {self._paths[key]} has {len(rows)} records to draw from, fewer than the {batch[1]} of one batch; "
                f"lower {batch[0]} to {len(rows)} at most, or add records"
            )
        if rows and not self._require_apart(key, apart_from):
            self._prompts[key] = {row.prompt_ids.tobytes() for row in rows}
            shared = len(self._prompts[key] & self._prompts.get(apart_from, set()))
            if shared:
                self.notes.append(f"{key}: {shared} of its {len(self._prompts[key])} prompts are in {apart_from} too, which is trained on")
        return rows

    def _require_apart(self, key: str, apart_from: str | None) -> bool:
        """Whether a file for validation is the one that is trained on, which is a problem."""
        same = apart_from is not None and self.fingerprints.get(apart_from) == self.fingerprints[key]
        if same:
            self.problems.append(
                f"{key}: {self._paths[key]} has the content of {apart_from}, {self._paths[apart_from]}: validation on what is trained on "
                "says nothing; give it other data, or leave it out"
            )
        return same

    def _lengths(self) -> dict[str, int]:
        return {"max_prompt_len": self.limits.max_prompt_len, "max_response_len": self.limits.max_response_len}

    def _ids(self) -> dict[str, int]:
        return {"eos_id": self.tokenizer.eos_id, "vocab_size": self.tokenizer.vocab_size}


def _noting(problems: list[str], function: Callable[..., T], *args: object, **kwargs: object) -> T | None:
    """function(*args, **kwargs), or None with the ValueError, or the system's error of a file, noted."""
    try:
        return function(*args, **kwargs)
    except (ValueError, OSError) as error:
        problems.append(str(error))
        return None
