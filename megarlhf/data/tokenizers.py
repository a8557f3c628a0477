"""Text to token ids and back: sentencepiece, Hugging Face `tokenizer.json`, and GPT-2's `vocab.json` + `merges.txt`.

All of them encode text as text: the name of a special token inside a document ("<|endoftext|>") becomes ordinary
tokens, never the special one, so that no text can end a response or bring its own padding.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers

EOS_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]")
PAD_NAMES = ("<pad>", "<|pad|>", "<|padding|>", "[PAD]")


class Tokenizer(Protocol):
    """What the program needs of a tokenizer."""

    vocab_size: int
    """The largest id + 1."""
    eos_id: int
    """Ends a response and a document."""
    pad_id: int
    """Fills rows on the right; a valid id, never `eos_id`.

    The pad piece of the model, or else some other id. Which one cannot matter: rows carry their lengths, causal
    attention never looks from a real token to the padding on its right, and the loss masks it. Only EOS would be wrong,
    where somebody looks for the end of a response by value.
    """

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, dropping EOS and the pad piece (an ordinary id that stands in for a missing one is text)."""
        ...


def load_tokenizer(path: str | Path, *, eos_token: str | None = None) -> Tokenizer:
    """The tokenizer at `path`: a file, or a folder in which one is looked for.

    Files: a sentencepiece ``.model``; a Hugging Face ``tokenizer.json``; a GPT-2 ``vocab.json`` with ``merges.txt``
    beside it (or ``NAME-vocab.json`` with ``NAME-merges.txt``). A folder is searched for ``tokenizer.json``, then
    ``vocab.json``, then ``tokenizer.model`` or its only ``.model``. `eos_token` names the EOS piece where the model's
    own answer is missing or unwanted.

    Raises:
        ValueError: no tokenizer there, one that cannot be read, or one without EOS.
    """
    file = _tokenizer_file(Path(path))
    if file.name.endswith("vocab.json"):
        merges = file.with_name(file.name.removesuffix("vocab.json") + "merges.txt")
        if not merges.is_file():
            raise ValueError(f"{file} needs {merges.name} beside it; copy it there")
        return HuggingFaceTokenizer(_read(file, lambda: _byte_level_bpe(file, merges)), file, eos_token=eos_token)
    if file.suffix == ".json":
        return HuggingFaceTokenizer(_read(file, lambda: tokenizers.Tokenizer.from_file(str(file))), file, eos_token=eos_token)
    return SentencePieceTokenizer(file, eos_token=eos_token)


class SentencePieceTokenizer:
    """A sentencepiece model.

    Text comes back as it was only from a model that does not normalise it; `train_sentencepiece` trains such ones. Many
    others turn newlines into spaces and join runs of spaces. No model tells U+2581, its sign for a space, from a space.
    """

    def __init__(self, path: Path, *, eos_token: str | None = None):
        self._model = _read(path, lambda: sentencepiece.SentencePieceProcessor(model_file=str(path)))
        self.vocab_size = self._model.get_piece_size()
        pieces = {self._model.id_to_piece(i): i for i in range(self.vocab_size)}
        self.eos_id = self._model.eos_id() if eos_token is None else pieces.get(eos_token, -1)
        if self.eos_id < 0:
            raise ValueError(_no_eos(path, eos_token))
        pad_id = self._model.pad_id()
        self._dropped = {self.eos_id, pad_id}
        self.pad_id = _pad_or_other(None if pad_id < 0 else pad_id, self.eos_id)

    fingerprint = "x"

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        return self._model.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, dropping EOS and the pad piece."""
        return self._model.decode([int(i) for i in ids if i not in self._dropped])


class HuggingFaceTokenizer:
    """A tokenizer of the `tokenizers` package: any ``tokenizer.json``, and GPT-2's byte-level BPE."""

    def __init__(self, model: tokenizers.Tokenizer, path: Path, *, eos_token: str | None = None):
        model.no_truncation()  # a file may carry a limit, which would cut texts in silence
        model.no_padding()
        model.encode_special_tokens = True  # special names inside a text are text
        self._model = model
        vocab = model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        names = (eos_token,) if eos_token is not None else (_configured_eos(path), *EOS_NAMES)
        found = [vocab[name] for name in names if name in vocab]
        if not found:
            raise ValueError(_no_eos(path, eos_token))
        self.eos_id = found[0]
        pads = [vocab[name] for name in PAD_NAMES if name in vocab and vocab[name] != self.eos_id]
        self._dropped = {self.eos_id, *pads[:1]}
        self.pad_id = _pad_or_other(pads[0] if pads else None, self.eos_id)

    fingerprint = "x"

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, dropping EOS and the pad piece."""
        return self._model.decode([int(i) for i in ids if i not in self._dropped], skip_special_tokens=False)


def train_sentencepiece(texts: Iterable[str], model_prefix: str | Path, *, vocab_size: int, character_coverage: float = 0.9995) -> Path:
    """Train a byte-pair encoding that gives text back as it was, and write it to ``<model_prefix>.model``.

    No normalisation, no dummy space before a text, spaces and newlines kept (a newline is always one token), bytes for
    the characters outside `character_coverage`, a piece of its own for padding. The same texts give the same file.

    Raises:
        ValueError: `vocab_size` does not fit the texts (sentencepiece's message says how).
    """
    path = Path(f"{model_prefix}.model")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,  # given a path, sentencepiece would write that path into the model
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n"],
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            max_sentence_length=2**30,  # bytes; longer texts would be left out
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"cannot train a tokenizer with vocab_size {vocab_size}: {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    return path


def _tokenizer_file(path: Path) -> Path:
    if path.is_file():
        if path.suffix not in (".json", ".model"):
            raise ValueError(f"{path} is not a tokenizer; give a .model, a tokenizer.json, a vocab.json, or a folder with one")
        return path
    if not path.is_dir():
        raise ValueError(f"there is no tokenizer at {path}; give a .model, a tokenizer.json, a vocab.json, or a folder with one")
    for name in ("tokenizer.json", "vocab.json", "tokenizer.model"):
        if (path / name).is_file():
            return path / name
    models = sorted(path.glob("*.model"))
    if len(models) != 1:
        raise ValueError(f"{path} has no tokenizer.json, no vocab.json, and {len(models)} .model files; give the path of a file")
    return models[0]


def _read(path: Path, load: Callable):
    try:
        return load()
    except Exception as error:  # the `tokenizers` package raises Exception itself
        raise ValueError(f"{path} cannot be read as a tokenizer: {error}. Check that the file is complete and of its kind") from error


def _byte_level_bpe(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    """GPT-2's byte-pair encoding (Radford et al. 2019, section 2.2)."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocab), str(merges)))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    return model


def _configured_eos(path: Path) -> str | None:
    """The EOS that a `tokenizer_config.json` beside the model names."""
    config = path.with_name("tokenizer_config.json")
    eos = json.loads(config.read_text(encoding="utf-8")).get("eos_token") if config.is_file() else None
    return eos["content"] if isinstance(eos, dict) else eos


def _no_eos(path: Path, eos_token: str | None) -> str:
    if eos_token is not None:
        return f"{path} has no token {eos_token!r}; give with eos_token= the name of one it has"
    return f"{path} does not say which token ends a text (looked for {', '.join(EOS_NAMES)}); name it with eos_token="


def _pad_or_other(pad_id: int | None, eos_id: int) -> int:
    """The pad id, or the smallest id that is not EOS (`Tokenizer.pad_id` says why any will do)."""
    if pad_id is not None and pad_id != eos_id:
        return pad_id
    return 1 if eos_id == 0 else 0
