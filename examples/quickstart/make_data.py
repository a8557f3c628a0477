"""Write the quickstart's data sets from text that every Python carries: `pydoc_data.topics` and the docstrings of its library.

    python make_data.py --output DIR [--seed N] [--tokenizer-vocab 512]

A prompt asks about a class, function, method or attribute of the standard library; its demonstration is the first sentence of
the docstring. Each name goes to one data set only. The same Python and seed give the same files.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import labelling
from stdlib_text import first_sentence, paragraphs, stdlib_docstrings, topic_documents

PROMPT_FORMS = ("Explain {}.\n", "Describe {}.\n", "What is {}?\n", "What does {} do?\n")
SPLITS = {
    "demonstrations": 0.38,
    "rankings": 0.30,
    "prompts": 0.18,
    "demonstrations_valid": 0.03,
    "rankings_valid": 0.05,
    "prompts_valid": 0.06,
}
"""Share of the names that each data set gets."""
HELDOUT_SHARE = 0.05
"""Share of the topics' documents in corpus_heldout.jsonl; the docstrings of the *_valid names are there too."""
AGREEMENT = 0.73
"""How often two labellers agree on pairs that neither ties (Ouyang et al. 2022, section 3.4: 72.6 +- 1.5 %)."""
MAX_NAME_LEN, MAX_ANSWER_LEN, MAX_RESPONSE_LEN = 36, 100, 120
"""In characters."""
MIN_SENTENCES = 1000


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The completions of one prompt to be ranked, with the way each was made."""

    prompt: str
    kinds: tuple[str, ...]
    responses: tuple[str, ...]


# ---- questions and answers ------------------------------------------------------------------------------------------


def sentences(docs: Mapping[str, str]) -> dict[str, str]:
    """First sentences by name; of the names with the same sentence only the first, so that no answer is in two data sets."""
    chosen: dict[str, str] = {}
    for name, doc in docs.items():
        askable = len(name) <= MAX_NAME_LEN and any(len(part) >= 3 for part in labelling.name_parts(PROMPT_FORMS[0].format(name)))
        sentence = first_sentence(name, doc)
        if askable and sentence is not None and len(sentence) <= MAX_ANSWER_LEN:
            chosen.setdefault(sentence.lower(), name)
    return {name: first_sentence(name, docs[name]) for name in chosen.values()}


# ---- candidates -----------------------------------------------------------------------------------------------------


class Babbler:
    """A character-level Markov chain: text that looks like that of a small language model."""

    def __init__(self, texts: Iterable[str], *, order: int):
        """Learn which character follows each `order` characters of `texts`."""
        self.order = order
        self.following: dict[str, list[str]] = defaultdict(list)
        for text in texts:
            padded = "\n" * order + text + "\n"
            for i in range(order, len(padded)):
                self.following[padded[i - order : i]].append(padded[i])

    def sample(self, rng: random.Random) -> str:
        """A text, cut off at MAX_RESPONSE_LEN."""
        text = "\n" * self.order
        while len(text) < self.order + MAX_RESPONSE_LEN:
            character = rng.choice(self.following[text[-self.order :]])
            if character == "\n":
                break
            text += character
        return text[self.order :]


def draw_candidates(rng: random.Random, prompt: str, truth: str, pool: Sequence[str], babblers: Sequence[Babbler]) -> Candidates:
    """K = 4..9 completions of different kinds (Ouyang et al. 2022, section 3.5); four times in five the true one is among them."""
    other, another = rng.sample(pool, 2)
    words, topic = truth.rstrip(".").split(), rng.choice([part for part in labelling.name_parts(prompt) if len(part) >= 3])
    stutter = rng.randint(1, len(words))
    kinds = {
        "other": other,
        "other on topic": _with_word(rng, other, topic),
        "cut": " ".join(words[: rng.randint(1, len(words) - 1)]),
        "ramble": f"{truth} {other} {another}" if rng.random() < 0.5 else f"{truth.rstrip('.')}, and {_lower(other)}",
        "shuffled": " ".join(rng.sample(words, len(words))) + ".",
        "short": rng.choice([words[0] + ".", topic.capitalize() + ".", "The.", "A function."]),
        "careless": truth.lower().rstrip("."),
        "stutter": " ".join(words[:stutter] + words[max(0, stutter - 3) : stutter] * rng.randint(1, 4) + words[stutter:]) + ".",
        "misspelled": " ".join(_misspell(rng, word) if rng.random() < 0.4 else word for word in words) + ".",
        "babble": babblers[0].sample(rng),
        "broken babble": rng.choice(babblers[1:]).sample(rng),
        "babble on topic": _with_word(rng, rng.choice(babblers).sample(rng), topic),
    }
    count = rng.randint(4, 9)
    chosen = ["true"] * (rng.random() < 0.8)
    chosen += rng.sample(list(kinds), count - len(chosen))
    rng.shuffle(chosen)
    texts = {"true": truth, **kinds}
    return Candidates(prompt=prompt, kinds=tuple(chosen), responses=tuple(texts[kind][:MAX_RESPONSE_LEN].strip() or "." for kind in chosen))


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]


def _with_word(rng: random.Random, text: str, word: str) -> str:
    """`text` with `word` in the place of one of its long words."""
    places = [match for match in re.finditer(r"\b[a-z]{4,}\b", text)]
    if not places:
        return f"{text.rstrip('.')} {word}."
    place = rng.choice(places)
    return text[: place.start()] + word + text[place.end() :]


def _misspell(rng: random.Random, word: str) -> str:
    """`word` with two letters exchanged, one left out, or one doubled."""
    if len(word) < 4:
        return word
    i = rng.randint(1, len(word) - 2)
    return word[:i] + rng.choice([word[i + 1] + word[i], "", word[i] * 2 + word[i + 1]]) + word[i + 2 :]


# ---- data sets ------------------------------------------------------------------------------------------------------


def share_of(seed: int, key: str) -> float:
    """A number in [0, 1) that depends on the seed and the key only, so that new names move no other name to another data set."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8]) / 2**64


def split_of(seed: int, name: str) -> str:
    """The data set `name` belongs to."""
    share = share_of(seed, name)
    for split, size in SPLITS.items():
        share -= size
        if share < 0:
            return split
    return split


def prompt_of(seed: int, name: str) -> str:
    """The prompt that asks about `name`."""
    return PROMPT_FORMS[int(share_of(seed, f"form of {name}") * len(PROMPT_FORMS))].format(name)


def corpus(seed: int, docs: Mapping[str, str], answers: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Pretraining documents, and those held out: some of the manual, and the docstrings of the names the *_valid sets ask about."""
    train, heldout, seen = [], [], set()
    for document in topic_documents():
        (heldout if share_of(seed, document) < HELDOUT_SHARE else train).append(document)
    # Held-out names first: where two names share a docstring, neither may be in the training part.
    for name, doc in sorted(docs.items(), key=lambda item: not split_of(seed, item[0]).endswith("_valid")):
        text = "\n".join(paragraphs(doc))
        if text and text not in seen:
            seen.add(text)
            (heldout if split_of(seed, name).endswith("_valid") else train).append(f"{name}\n{text}")
    asked = [sentence for name, sentence in answers.items() if split_of(seed, name).endswith("_valid")]
    whole = "\n".join(train)
    asked = [sentence for sentence in asked if sentence in whole]  # few are; every text is looked through for these alone
    train = [text for text in train if not any(sentence in text for sentence in asked)]
    random.Random(f"{seed}:corpus").shuffle(train)
    return train, heldout


def known_pairs(documents: Iterable[str]) -> list[str]:
    """The pairs of words that follow each other, in lower case, in two documents or more."""
    counts: Counter[str] = Counter()
    for document in documents:
        clauses = (re.findall(r"[a-z]+", clause) for clause in re.split(r"[.:;!?]\s|\n", document.lower()))
        counts.update({f"{left} {right}" for words in clauses for left, right in itertools.pairwise(words)})
    return sorted(pair for pair, count in counts.items() if count >= 2)


def rank_all(
    seed: int, candidates: Mapping[str, Sequence[Candidates]], pairs: frozenset[str]
) -> tuple[dict[str, list], dict[str, list[list[float]]], dict[str, float]]:
    """The rankings of one simulated labeller by split, the rule's scores by split, and what they measure.

    That is noise, agreement with another labeller, and ties.
    """
    everything = [item for split in sorted(candidates) for item in candidates[split]]
    scores = [[labelling.score(item.prompt, response, pairs) for response in item.responses] for item in everything]
    noises = []
    for labeller in range(2):
        rng = random.Random(f"{seed}:labeller {labeller}")
        drawn = [[rng.gauss(0, 1) for _ in row] for row in scores]
        # one text, one opinion: two candidates that came out the same are graded alike
        noises.append([[z[item.responses.index(text)] for text in item.responses] for item, z in zip(everything, drawn, strict=True)])
    std = labelling.calibrated_noise(scores, noises, target=AGREEMENT)
    one, two = ([labelling.grades(s, z, noise_std=std) for s, z in zip(scores, noise, strict=True)] for noise in noises)
    num_pairs = sum(len(row) * (len(row) - 1) // 2 for row in one)
    ties = sum(count * (count - 1) // 2 for row in one for count in Counter(row).values())
    measured = {
        "noise std": std,
        "agreement of two labellers": labelling.agreement(one, two),
        "agreement with the rule": labelling.agreement(one, scores),
        "tied pairs": ties / num_pairs,
        "pairs": num_pairs,
    }
    rows, scored = ({split: [] for split in candidates} for _ in range(2))
    graded = zip(one, scores, strict=True)
    for split in sorted(candidates):
        for item in candidates[split]:
            grades, of_rule = next(graded)
            rows[split].append({"prompt": item.prompt, "responses": list(item.responses), "ranks": labelling.ranks(grades)})
            scored[split].append(of_rule)
    return rows, scored, measured


def make_all(seed: int) -> tuple[dict[str, list[dict]], list[str], list[str]]:
    """Records by file name (without .jsonl), the known pairs of words, and the lines of the report.

    Raises:
        ValueError: this Python has too few docstrings.
    """
    docs, missing = stdlib_docstrings()
    answers = sentences(docs)
    if len(answers) < MIN_SENTENCES:
        raise ValueError(f"found {len(answers)} docstrings to learn from, of at least {MIN_SENTENCES}; run Python without -OO")
    names: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name in sorted(answers, key=lambda name: share_of(seed, f"order of {name}")):
        names[split_of(seed, name)].append(name)
    train, heldout = corpus(seed, docs, answers)
    records: dict[str, list[dict]] = {"corpus": [{"text": text} for text in train], "corpus_heldout": [{"text": text} for text in heldout]}
    for split in ("demonstrations", "demonstrations_valid"):
        records[split] = [{"prompt": prompt_of(seed, name), "response": answers[name]} for name in names[split]]
    for split in ("prompts", "prompts_valid"):
        records[split] = [{"prompt": prompt_of(seed, name), "id": name} for name in names[split]]

    pool = [record["response"] for record in records["demonstrations"]]
    pairs = known_pairs(train)
    rng, babblers = random.Random(f"{seed}:candidates"), [Babbler(pool, order=order) for order in (5, 3, 2)]
    candidates = {
        split: [draw_candidates(rng, prompt_of(seed, name), answers[name], pool, babblers) for name in names[split]]
        for split in ("rankings", "rankings_valid")
    }
    rows, scored, measured = rank_all(seed, candidates, frozenset(pairs))
    records |= rows
    if missing:
        print(f"this Python has no {', '.join(missing)}: their docstrings are left out")
    return records, pairs, report(records, candidates["rankings"], rows["rankings"], scored["rankings"], measured)


def report(
    records: Mapping[str, list[dict]],
    candidates: Sequence[Candidates],
    rows: Sequence[dict],
    scores: Sequence[Sequence[float]],
    measured: Mapping[str, float],
) -> list[str]:
    """What was made, in lines to print."""
    lines = [f"{'file':24} {'records':>8} {'mean characters':>16} {'longest':>8}"]
    for name, items in records.items():
        lens = [len(item.get("text", "")) + len(item.get("prompt", "")) + max(map(len, _responses(item)), default=0) for item in items]
        lines.append(f"{name + '.jsonl':24} {len(items):8} {sum(lens) / len(lens):16.1f} {max(lens):8}")
    lines += ["", f"{'candidate':16} {'count':>6} {'score':>6} {'ranked first':>13}   example (train, one prompt each)"]
    by_kind = defaultdict(list)
    for item, row, scored in zip(candidates, rows, scores, strict=True):
        for kind, response, rank, score in zip(item.kinds, item.responses, row["ranks"], scored, strict=True):
            by_kind[kind].append((score, rank == 1, item.prompt.strip(), response))
    for kind, made in sorted(by_kind.items(), key=lambda entry: -sum(m[0] for m in entry[1]) / len(entry[1])):
        mean, first = (sum(m[i] for m in made) / len(made) for i in (0, 1))
        lines.append(f"{kind:16} {len(made):6} {mean:6.2f} {first:13.2f}   {made[0][2]} -> {made[0][3]}")
    lines += ["", *(f"{name:28} {value:10.3f}" for name, value in measured.items())]
    lines += ["", *(f"{json.dumps(records[name][0])}" for name in records)]
    return lines


def _responses(item: Mapping) -> Sequence[str]:
    return item.get("responses", [item.get("response", "")])


def main(argv: Sequence[str] | None = None) -> None:
    """Write every file into --output and print what is in them."""
    parser = argparse.ArgumentParser(description="Write the quickstart's data sets.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer-vocab", type=int, help="also train tokenizer.model with so many pieces")
    args = parser.parse_args(argv)
    records, pairs, lines = make_all(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, items in records.items():
        (args.output / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    (args.output / "pairs.txt").write_text("\n".join(pairs) + "\n", encoding="utf-8")
    print("\n".join(lines))
    if args.tokenizer_vocab is not None:
        train_tokenizer(args.output, records, vocab_size=args.tokenizer_vocab)


def train_tokenizer(output: Path, records: Mapping[str, list[dict]], *, vocab_size: int) -> None:
    """Train tokenizer.model on the corpus and the demonstrations, and print how long the rows are in tokens."""
    from megarlhf.data.tokenizer_training import train_sentencepiece
    from megarlhf.data.tokenizers import load_tokenizer

    texts = [item["text"] for item in records["corpus"]] + [item["prompt"] + item["response"] for item in records["demonstrations"]]
    tokenizer = load_tokenizer(train_sentencepiece(texts, output / "tokenizer", vocab_size=vocab_size))
    for name in ("corpus", "demonstrations", "rankings", "prompts"):
        rows = [item.get("text", item.get("prompt", "") + response) for item in records[name] for response in _responses(item)]
        lens = sorted(len(tokenizer.encode(row)) for row in rows)
        print(f"{name:24} {sum(lens):8} tokens, median row {lens[len(lens) // 2]}, 99 % {lens[int(0.99 * len(lens))]}, longest {lens[-1]}")


if __name__ == "__main__":
    main()
