"""Make prompts and demonstrations out of what users sent, as InstructGPT did (Ouyang et al. 2022, sections 3.2, A.2 and C).

    python tools/prepare_prompts.py --input log.jsonl.gz more.parquet --output-dir data --tokenizer tok --user-key user

Records are {"prompt"}, {"prompt", "response"}, {"messages"} (docs/data.md) or few-shot sets, {"instruction", "pairs": [{"query",
"response"}, ...]}, with the user's name in a field of theirs. In this order, so that no record is displaced by one that is
dropped itself:

1. Few-shot sets: K pairs give K demonstrations, each with the instruction and the other K-1 pairs in its prompt.
2. Prompts and responses over --max-prompt-tokens and --max-response-tokens (1024, the response's EOS included) are dropped.
3. Records with personal data are dropped from the splits --pii-on: by the rules of megarlhf/data/personal.py, and by those of
   one's own, a function that takes a text and returns the name of what it found in it, or None. Every text of a record, its
   numbers and the names of inner fields are looked through, but not --user-key, --organization-key and "id".
4. Of records that share their first --prefix-characters characters, or the whole of a shorter prompt, the first is kept; of
   few-shot sets, which may share an instruction, those are dropped that are the same in everything.
5. Of each user the first --max-per-user records are kept; a few-shot set counts as one.

The split is drawn by the organization, or by the user where there is none: nobody is in two splits. A user's records for a second
organization are dropped. DIR/<split>.jsonl are the records, DIR/dropped.jsonl says of each dropped one where it stood and why,
DIR/report.txt is the closing table. Files are read once, record by record; what stays in memory is a hash of 16 bytes per kept
prefix (as a Python set, about 100 bytes) and one per user with his count.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from megarlhf.data.comparisons import prompt_of
from megarlhf.data.fields import Messages, field_of, messages_field, text_field
from megarlhf.data.files import BadRecord, kind_of, record_of, stored_records
from megarlhf.data.functions import load_function
from megarlhf.data.personal import personal_data
from megarlhf.data.tokenized import TextEncoder
from megarlhf.data.tokenizers import load_tokenizer
from megarlhf.endings import ended

Hook = Callable[[str], "str | None"]


@dataclass(frozen=True)
class Example:
    """One record to be written: what is asked, what is answered to it if anything is, and the record itself."""

    source: str
    prompt: str | Messages
    response: str | None
    record: dict[str, Any]
    is_few_shot: bool = False


@dataclass
class Tally:
    """What was kept and dropped."""

    num_records: int = 0
    kept: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)


class Memory:
    """What must be known of all records so far: hashes of prefixes, and of users with their organization and count."""

    def __init__(self, *, prefix_characters: int, max_per_user: int) -> None:
        self._prefix_characters, self._max_per_user = prefix_characters, max_per_user
        self._prefixes: set[bytes] = set()
        self._users: dict[bytes, tuple[int, bytes]] = {}

    def require_one_group(self, source: str, user: str, group: str) -> None:
        """BadRecord where the user was seen in another group: he would be in two splits."""
        count, known = self._users.setdefault(digest(user), (0, digest(group)))
        if known != digest(group):
            raise BadRecord(source, "user in two organizations", "the first one's records are kept", "Give him one name for each.")

    def admit(self, source: str, user: str, example: Example) -> None:
        """Take a record in by its first example. BadRecord where its prefix came before, or its user has had his share."""
        # Few-shot sets share an instruction on purpose: of them the whole counts, not the prefix.
        text = written(example.prompt)
        prefix, name = digest(text if example.is_few_shot else text[: self._prefix_characters]), digest(user)
        if prefix in self._prefixes:
            raise BadRecord(source, "same prefix", f"its first {self._prefix_characters} characters came before", "Nothing is to be done.")
        count, group = self._users[name]
        if count >= self._max_per_user:
            raise BadRecord(source, "user over limit", f"its user has {count} records already", "Raise --max-per-user to keep more.")
        self._prefixes.add(prefix)
        self._users[name] = (count + 1, group)

    def users_by_split(self, splits: dict[str, float], seed: int) -> Counter[str]:
        """How many users with a kept record each split has."""
        return Counter(split_of(group, splits, seed) for count, group in self._users.values() if count)


def digest(text: str) -> bytes:
    """A hash of 16 bytes."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def split_of(group: bytes, splits: dict[str, float], seed: int) -> str:
    """The split of a group's hash: the same whatever else there is."""
    at = int.from_bytes(hashlib.blake2b(group, digest_size=8, key=str(seed).encode()).digest(), "big") / 2**64
    for name, share in splits.items():
        at -= share
        if at < 0:
            return name
    return name  # what rounding left over


def examples_of(source: str, record: dict) -> list[Example]:
    """What a record holds. Raises BadRecord."""
    if "pairs" in record:
        return few_shot(source, record)
    messages = record.get("messages")
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
        chat = messages_field(source, record, "messages", last="assistant")
        if len(chat) < 2:
            raise BadRecord(source, "missing field", "the chat has no turn before the answer", "Add the user's turn.")
        return [Example(source, chat[:-1], chat[-1].content, record)]
    response = text_field(source, record, "response") if "response" in record else None
    return [Example(source, prompt_of(source, record), response, record)]


def few_shot(source: str, record: dict) -> list[Example]:
    """K demonstrations of K pairs: the instruction, the other pairs in their order, the query; then the response."""
    pairs = field_of(source, record, "pairs")
    if not isinstance(pairs, list) or not all(isinstance(pair, dict) for pair in pairs):
        raise BadRecord(source, "wrong type", f'"pairs" is {kind_of(pairs)}', 'Make it a list of {"query", "response"}.')
    if len(pairs) < 2:
        raise BadRecord(source, "too few pairs", f"{len(pairs)} of them", "Few-shot takes two or more.")
    instruction = text_field(source, record, "instruction")
    texts = [tuple(text_field(f"{source}, pair {i}", pair, name) for name in ("query", "response")) for i, pair in enumerate(pairs)]
    others = {name: value for name, value in record.items() if name not in ("instruction", "pairs")}
    examples = []
    for i, (query, response) in enumerate(texts):
        context = [f"{theirs}\n{answer}" for j, (theirs, answer) in enumerate(texts) if j != i]
        prompt = "\n\n".join([instruction, *context, query]) + "\n"
        examples.append(Example(f"{source}, pair {i}", prompt, response, {"prompt": prompt, "response": response} | others, True))
    return examples


def written(prompt: str | Messages) -> str:
    """A prompt as the text whose prefix counts."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{message.role}: {message.content}" for message in prompt)


class Filters:
    """What a single example must meet."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._encoder = TextEncoder(load_tokenizer(args.tokenizer, eos_token=args.eos_token))
        self._max_prompt, self._max_response = args.max_prompt_tokens, args.max_response_tokens
        self._hooks: list[Hook] = [load_hook(rule) for rule in args.pii_rules]
        self._names = {args.user_key, args.organization_key, "id"}

    def check(self, example: Example, *, personal: bool) -> None:
        """BadRecord where the example is too long, or (where `personal`) has personal data."""
        num_tokens = len(self._encoder.encode_prompt(example.source, example.prompt))
        if num_tokens > self._max_prompt:
            raise BadRecord(example.source, "prompt too long", f"{num_tokens} tokens", "Raise --max-prompt-tokens to keep it.")
        if example.response is not None:
            num_tokens = len(self._encoder.encode(example.source, "response", example.response)) + 1
            if num_tokens > self._max_response:
                raise BadRecord(example.source, "response too long", f"{num_tokens} tokens", "Raise --max-response-tokens to keep it.")
        for name, text in texts_in(example.record, self._names) if personal else ():
            for found in (*personal_data(text), *filter(None, (hook(text) for hook in self._hooks))):
                raise BadRecord(example.source, "personal data", f'{found} in "{name}"', "Remove it, or change --pii-on.")


class Sieve:
    """Takes records one by one, and says what of each is kept, and in which split."""

    def __init__(self, args: argparse.Namespace, splits: dict[str, float], drop: Callable[[BadRecord], None]) -> None:
        self._args, self._splits, self._drop = args, splits, drop
        self._filters = Filters(args)
        self.memory = Memory(prefix_characters=args.prefix_characters, max_per_user=args.max_per_user)

    def kept(self, source: str, stored: bytes | dict) -> tuple[str, list[Example]]:
        """The split of a record and its examples that are kept; all else is dropped."""
        try:
            record = record_of(source, stored)
            examples, user, group = examples_of(source, record), *self._owner(source, record)
            self.memory.require_one_group(source, user, group)
        except BadRecord as bad:
            self._drop(bad)
            return "", []
        split = split_of(digest(group), self._splits, self._args.seed)
        good = [example for example in examples if self._passes(example, personal=split in self._args.pii_on)]
        if not good:
            return split, []
        try:
            self.memory.admit(source, user, examples[0])
        except BadRecord as bad:
            for example in good:
                self._drop(BadRecord(example.source, bad.reason, bad.detail, bad.way_out))
            return split, []
        return split, good

    def _owner(self, source: str, record: dict) -> tuple[str, str]:
        """The record's user, and the group whose records stay together."""
        user, organization = (name_in(source, record, key) for key in (self._args.user_key, self._args.organization_key))
        if user is None:
            raise BadRecord(source, "no user", f'no "{self._args.user_key}"', "Say whose it is.")
        return user, f"user {user}" if organization is None else f"organization {organization}"

    def _passes(self, example: Example, *, personal: bool) -> bool:
        try:
            self._filters.check(example, personal=personal)
            return True
        except BadRecord as bad:
            self._drop(bad)
            return False


def texts_in(value: Any, names: set[str | None], name: str = "") -> Iterator[tuple[str, str]]:
    """(field, text) of all texts and numbers in a value, however deep, and of inner fields' names; without the record's fields `names`."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, str(value)
    elif isinstance(value, list):
        for inner in value:
            yield from texts_in(inner, set(), name)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key not in names:
                if name:  # those of the record itself are its form
                    yield name, key
                yield from texts_in(inner, set(), f"{name}.{key}" if name else key)


def load_hook(rule: str) -> Hook:
    """The function of "file.py:name", which says what it found. ValueError where there is none."""
    path = rule.rpartition(":")[0]
    if not Path(path).is_file():
        raise ValueError(f"--pii-rules {rule}: there is no file {path or rule}; write it as my_rules.py:function")
    try:
        function = load_function(rule)
    except ValueError as error:
        raise ValueError(f"--pii-rules {rule}: {error}") from error

    def checked(text: str) -> str | None:
        try:
            found = function(text)
        except Exception as error:
            raise ValueError(f"--pii-rules {rule}: {type(error).__name__}: {error}") from error
        if found is not None and not isinstance(found, str):
            raise ValueError(f"--pii-rules {rule} returned {found!r}; it must return the name of what it found, or None")
        return found

    return checked


def prepare(args: argparse.Namespace) -> str:
    """Write the files and return the closing table. ValueError for what is wrong with arguments or files."""
    splits = shares(args.splits)
    if args.pii_on is None:
        args.pii_on = ["train"] if "train" in splits else list(splits)
    if unknown := set(args.pii_on) - splits.keys():
        raise ValueError(f"--pii-on names {', '.join(sorted(unknown))}, and the splits are {', '.join(splits)}")
    for name in ("max_prompt_tokens", "max_response_tokens", "max_per_user", "prefix_characters"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    tally, folder = Tally(), Path(args.output_dir)
    names = [*(f"{split}.jsonl" for split in splits), "dropped.jsonl"]
    there = sorted(path.name for path in folder.glob("*.jsonl"))
    if there and not args.overwrite:
        raise ValueError(f"{folder / there[0]} exists; choose another --output-dir or give --overwrite")
    if other := set(there) - set(names):  # which may hold users of these splits
        raise ValueError(f"{folder} holds {min(other)}, which is no split of this run; remove it or choose another --output-dir")
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:  # under other names until all is there
        for name in names:
            stack.callback((folder / f"{name}.partial").unlink, missing_ok=True)
        files = {name: stack.enter_context((folder / f"{name}.partial").open("w", encoding="utf-8")) for name in names}

        def drop(bad: BadRecord) -> None:
            if args.on_bad_record == "raise" and bad.reason not in REASONS:
                raise bad
            tally.dropped[bad.reason] += 1
            print(json.dumps({"source": bad.source, "reason": bad.reason, "detail": bad.detail}), file=files["dropped.jsonl"])

        sieve = Sieve(args, splits, drop)
        for source, stored in chain.from_iterable(map(stored_records, args.input)):
            tally.num_records += 1
            split, examples = sieve.kept(source, stored)
            for example in examples:
                tally.kept[split] += 1
                print(json.dumps(example.record), file=files[f"{split}.jsonl"])
        for name in names:
            files[name].close()
            os.replace(folder / f"{name}.partial", folder / name)
    table = report(tally, splits, sieve.memory.users_by_split(splits, args.seed))
    (folder / "report.txt").write_text(table + "\n", encoding="utf-8")
    return table


REASONS = {"no user", "user in two organizations", "same prefix", "user over limit"}
REASONS |= {"prompt too long", "response too long", "personal data"}
"""For which a record is dropped that is not broken."""


def name_in(source: str, record: dict, key: str | None) -> str | None:
    """A user's or organization's name, text or a number; None where there is none. Raises BadRecord."""
    name = record.get(key) if key is not None else None
    if name is None or name == "":
        return None
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise BadRecord(source, "wrong type", f'"{key}" is {kind_of(name)}', "Make it a string or an integer.")
    return str(name)


def shares(splits: list[str]) -> dict[str, float]:
    """{"train": 0.9, ...} of train=0.9 .... ValueError where they are none."""
    found: dict[str, float] = {}
    for text in splits:
        name, _, share = text.partition("=")
        if not name.isidentifier() or name in ("dropped", *found):
            raise ValueError(f"--splits: {text!r} needs a name of its own before the =, such as train=0.9")
        try:
            found[name] = float(share)
        except ValueError:
            found[name] = -1.0
        if not 0 < found[name] <= 1:
            raise ValueError(f"--splits: {text!r} needs a share above 0 and up to 1 after the =, such as train=0.9")
    if abs(sum(found.values()) - 1) > 1e-6:
        raise ValueError(f"--splits: the shares add up to {sum(found.values()):g}, not to 1")
    return found


def report(tally: Tally, splits: dict[str, float], users: Counter[str]) -> str:
    """The closing table."""
    rows = [("records read", tally.num_records, "")]
    rows += [(f"kept in {split}", tally.kept[split], f"of {users[split]} users") for split in splits]
    rows += [(f"dropped: {reason}", count, "") for reason, count in tally.dropped.most_common()]
    return "\n".join(f"{name:<36}{count:>12}  {more}".rstrip() for name, count, more in rows)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help=".jsonl, .jsonl.gz and .parquet files")
    parser.add_argument("--output-dir", required=True, help="folder of the splits and the report")
    parser.add_argument("--tokenizer", required=True, help="a .model, a tokenizer.json, a vocab.json, or a folder with one")
    parser.add_argument("--eos-token", help="name of the EOS token, where the tokenizer does not say it")
    parser.add_argument("--user-key", default="user", help="field with the user's name")
    parser.add_argument("--organization-key", help="field with the organization's name, by which the split is drawn where there is one")
    parser.add_argument("--splits", nargs="+", default=["train=0.8", "valid=0.1", "test=0.1"], help="names and shares of users")
    parser.add_argument("--seed", type=int, default=1, help="of the split")
    parser.add_argument("--max-prompt-tokens", type=int, default=1024, help="longest prompt (1k, Appendix C)")
    parser.add_argument("--max-response-tokens", type=int, default=1024, help="longest response with its EOS (1k, Appendix C)")
    parser.add_argument("--max-per-user", type=int, default=200, help="records kept of a user (section 3.2)")
    parser.add_argument("--prefix-characters", type=int, default=256, help="how long a common prefix is long (the paper does not say)")
    parser.add_argument("--pii-on", nargs="*", help="splits without personal data; train where there is one (as in the paper)")
    parser.add_argument("--pii-rules", nargs="+", default=[], help="rules of one's own beside those written here: my_rules.py:function")
    parser.add_argument("--on-bad-record", choices=("raise", "skip"), default="raise", help="stop at a broken record, or drop it")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run wrote")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Print the closing table; returns the exit status (see `ended`)."""
    args = arguments().parse_args(words)
    return ended("prepare_prompts", lambda: print(prepare(args)), after_ctrl_c="nothing was kept")


if __name__ == "__main__":
    sys.exit(main())
