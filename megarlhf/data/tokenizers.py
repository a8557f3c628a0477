"""Text to token ids and back: sentencepiece, Hugging Face `tokenizer.json`, and GPT-2's `vocab.json` + `merges.txt`.

All of them encode text as text: the name of a control token inside a document ("<|endoftext|>") becomes ordinary
tokens, never the control token, whatever the tokenizer's file says of it. So no text can end a response or bring its own
padding; the rare text that a model has no other tokens for is refused (`UnwritableText`).
"""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers

from megarlhf.data.control_pieces import CUT, huggingface_marked, huggingface_without, marks_of, sentencepiece_without
from megarlhf.storage.files import read_json

EOS_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]")
PAD_NAMES = ("<pad>", "<|pad|>", "<|padding|>", "[PAD]")


CONFIG_FILE = "tokenizer_config.json"
CONFIGURED_NAMES = ("eos_token", "pad_token", "bos_token")
"""What a `tokenizer_config.json` may name; no text may yield any of them."""


class UnwritableText(ValueError):
    """A text for which a tokenizer has nothing but a control token."""


class Tokenizer(Protocol):
    """What the program needs of a tokenizer."""

    vocab_size: int
    """The largest id + 1."""
    eos_id: int
    """Ends a response and a document; no text yields it."""
    pad_id: int
    """Fills rows on the right; a valid id, never `eos_id`.

    The pad piece of the model, or else another control piece, or else the piece of a byte that UTF-8 never has: an id that
    no text yields. Where a model has none of them it is some other id. Even that cannot matter: rows carry their lengths,
    causal attention never looks from a real token to the padding on its right, and the loss masks it.
    """
    unk_id: int | None
    """Stands for text that the model has no piece for; None where it has one for every text, or drops what it has none for."""
    fingerprint: str
    """A hash of the model's files and of `eos_id` and `pad_id`: of all that decides how text is encoded."""
    path: Path
    """The file; a chat template is looked for beside it (`data/chat.py`)."""
    controls: Mapping[str, int]
    """The names and ids of the control tokens."""
    now: datetime.datetime
    """What a chat template is told when it asks for the date."""
    opening: str | None
    """The control token that transformers begins every text with, as the files say; nothing here does, but a chat template may."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, none of them a control token. Raises UnwritableText where the model knows no other way."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without the control tokens among them (EOS, padding and their like are no text).

        Nor is an id beyond `vocab_size`, which a model may sample that has more: released ones are often padded.
        """
        ...

    def encode_marked(self, text: str) -> list[list[int]]:
        """Token ids of a text in which `marks_of` stand for control tokens; a list for each part between CUTs. UnwritableText."""
        ...


def load_tokenizer(path: str | Path, *, eos_token: str | None = None, now: datetime.datetime | None = None) -> Tokenizer:
    """The tokenizer at `path`: a file, or a folder in which one is looked for.

    Files: a sentencepiece ``.model``; a Hugging Face ``tokenizer.json``; a GPT-2 ``vocab.json`` with ``merges.txt``
    beside it (or ``NAME-vocab.json`` with ``NAME-merges.txt``). A folder is searched for ``tokenizer.json``, then
    ``vocab.json``, then ``tokenizer.model`` or its only ``.model``. `eos_token` names the EOS piece where the model's
    own answer is missing or unwanted, `now` the moment for chat templates that write the date, if not the present one.

    Raises:
        ValueError: no tokenizer there, one that cannot be read, or one without EOS.
    """
    tokenizer = _of_file(_tokenizer_file(Path(path)), eos_token)
    tokenizer.now = now if now is not None else datetime.datetime.now()
    return tokenizer


def _of_file(file: Path, eos_token: str | None) -> Tokenizer:
    if file.name.endswith("vocab.json"):
        merges = file.with_name(file.name.removesuffix("vocab.json") + "merges.txt")
        if not merges.is_file():
            raise ValueError(f"{file} needs {merges.name} beside it; copy it there")
        return HuggingFaceTokenizer(_read(file, lambda: _byte_level_bpe(file, merges)), [file, merges], eos_token=eos_token)
    if file.suffix == ".json":
        return HuggingFaceTokenizer(_read(file, lambda: tokenizers.Tokenizer.from_file(str(file))), [file], eos_token=eos_token)
    return SentencePieceTokenizer(file, eos_token=eos_token)


class SentencePieceTokenizer:
    """A sentencepiece model.

    Text comes back as it was only from a model that does not normalise it; `megarlhf tokenizer` trains such ones. Many
    others turn newlines into spaces and join runs of spaces. No model tells U+2581, its sign for a space, from a space.
    """

    now: datetime.datetime

    def __init__(self, path: Path, *, eos_token: str | None = None):
        content = path.read_bytes()
        model = _read(path, lambda: sentencepiece.SentencePieceProcessor(model_proto=content))
        self.vocab_size = model.get_piece_size()
        pieces = _read(path, lambda: {model.id_to_piece(i): i for i in range(model.get_piece_size())})
        named = _named(path, pieces, eos_token)
        self.eos_id = named.get("eos_token", model.eos_id())
        if self.eos_id < 0:
            raise ValueError(_no_eos(path))
        self.unk_id = model.unk_id()
        if self.eos_id == self.unk_id:
            raise ValueError(f"{path}: its EOS stands for unknown text too, which would end responses; name another with eos_token=")
        pad_id = named.get("pad_token", model.pad_id())
        controls = {self.eos_id, *named.values(), *(i for i in range(self.vocab_size) if model.is_control(i))} - {self.unk_id}
        impossible = pieces.get("<0xFF>")  # a byte piece already matches no text
        self.pad_id = _pad_or_other(pad_id, self.eos_id, controls, impossible)
        self.fingerprint = _fingerprint([content], self.eos_id, self.pad_id)
        self._controls = controls | ({impossible} & {self.pad_id})
        self.path, self.controls = path, {model.id_to_piece(i): i for i in sorted(controls)}
        self.opening = _configured_opening(path, named)
        self._id_of_mark = {mark: i for i, mark in marks_of(controls).items()}
        rewritten = _read(path, lambda: sentencepiece_without(content, controls))
        self._model = _read(path, lambda: sentencepiece.SentencePieceProcessor(model_proto=rewritten))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, none of them a control token. Raises UnwritableText."""
        return _writable(self._model.encode(text), self._controls)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without the control tokens among them."""
        return self._model.decode([int(i) for i in ids if i not in self._controls and i < self.vocab_size])

    def encode_marked(self, text: str) -> list[list[int]]:
        """Token ids by parts of a marked text (see `Tokenizer`); what is between two marks is encoded like a text of its own."""
        parts = []
        for part in text.split(CUT):
            pieces = re.split(f"([{''.join(self._id_of_mark)}])", part)
            parts.append([i for piece in pieces for i in ([self._id_of_mark[piece]] if piece in self._id_of_mark else self.encode(piece))])
        return parts


class HuggingFaceTokenizer:
    """A tokenizer of the `tokenizers` package: any ``tokenizer.json``, and GPT-2's byte-level BPE."""

    now: datetime.datetime

    def __init__(self, model: tokenizers.Tokenizer, files: Sequence[Path], *, eos_token: str | None = None):
        path = files[0]
        model.no_truncation()  # a file may carry a limit, which would cut texts in silence
        model.no_padding()
        vocab = model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        named = _named(path, vocab, eos_token)
        usual = [vocab[name] for name in EOS_NAMES if name in vocab]
        if "eos_token" not in named and not usual:
            raise ValueError(_no_eos(path))
        self.eos_id = named["eos_token"] if "eos_token" in named else usual[0]
        self.unk_id = vocab.get(getattr(model.model, "unk_token", None))
        special = {i for i, token in model.get_added_tokens_decoder().items() if token.special}
        controls = (special | set(named.values()) | {vocab[name] for name in PAD_NAMES if name in vocab}) - {self.unk_id}
        pads = [named.get("pad_token"), *(vocab.get(name) for name in PAD_NAMES)]
        pad_id = next((i for i in pads if i not in (None, self.eos_id)), -1)
        byte_level = isinstance(model.decoder, tokenizers.decoders.ByteLevel)
        impossible = vocab.get("\u00ff" if byte_level else "<0xFF>")  # the byte FF, as the model writes it
        self.pad_id = _pad_or_other(pad_id, self.eos_id, controls, impossible)
        self.fingerprint = _fingerprint([file.read_bytes() for file in files], self.eos_id, self.pad_id)
        self._controls = controls | {self.eos_id} | ({impossible} & {self.pad_id})
        self._model = _read(path, lambda: huggingface_without(model, self._controls))
        self.path, self._original = path, model
        self.controls = {name: i for name, i in vocab.items() if i in controls | {self.eos_id}}
        self._mark_of_id = marks_of(self.controls.values())
        self.opening = _configured_opening(path, named)
        with_specials, without = (_read(path, partial(model.encode, "a", add_special_tokens=add)).ids for add in (True, False))
        if with_specials[:1] != without[:1] and not self._controls.isdisjoint(with_specials[:1]):
            self.opening = model.id_to_token(with_specials[0])

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, none of them a control token. Raises UnwritableText."""
        return _writable(self._model.encode(text, add_special_tokens=False).ids, self._controls)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without the control tokens among them."""
        return self._model.decode([int(i) for i in ids if i not in self._controls], skip_special_tokens=False)

    def encode_marked(self, text: str) -> list[list[int]]:
        """Token ids by parts of a marked text (see `Tokenizer`), those of the model itself where names stand for the marks."""
        ids = self._marked.encode(text, add_special_tokens=False).ids
        if sum(i in self._controls for i in ids) != sum(letter in self._marked_letters for letter in text):
            raise UnwritableText("the tokenizer does not give one control token for each that the chat template writes")
        cut, parts = self._marked.token_to_id(CUT), [[]]
        for i in ids:
            parts.append([]) if i == cut else parts[-1].append(i)
        return parts

    @cached_property
    def _marked(self) -> tokenizers.Tokenizer:
        return _read(self.path, lambda: huggingface_marked(self._original, self._mark_of_id))

    @cached_property
    def _marked_letters(self) -> frozenset[str]:
        return frozenset(self._mark_of_id.values())


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


def _named(path: Path, vocab: Mapping[str, int], eos_token: str | None) -> dict[str, int]:
    """The ids of what `eos_token` and a `tokenizer_config.json` beside the model name, by CONFIGURED_NAMES.

    ValueError where the vocabulary lacks the EOS that is named: another one would end nothing that was meant to end.
    """
    config = path.with_name(CONFIG_FILE)
    names = {key: _configured_name(path, key) for key in CONFIGURED_NAMES}
    eos, who = (eos_token, "eos_token") if eos_token is not None else (names["eos_token"], f"eos_token in {config}")
    if eos is not None and (not isinstance(eos, str) or eos not in vocab):
        raise ValueError(f"{path} has no token {eos!r}, which {who} names as the end of a text; name one that it has with eos_token=")
    names["eos_token"] = eos
    return {key: vocab[name] for key, name in names.items() if isinstance(name, str) and name in vocab}


def _configured(path: Path) -> dict:
    """The tokenizer_config.json beside a tokenizer's file; empty where there is none."""
    config = path.with_name(CONFIG_FILE)
    return read_json(config) if config.is_file() else {}


def _configured_name(path: Path, key: str) -> str | None:
    value = _configured(path).get(key)
    return value.get("content") if isinstance(value, dict) else value


def _configured_opening(path: Path, named: Mapping[str, int]) -> str | None:
    """What a tokenizer_config.json has transformers begin every text with, if anything."""
    adds = _configured(path).get("add_bos_token") is True and "bos_token" in named
    return _configured_name(path, "bos_token") if adds else None


def said_of_opening(tokenizer: Tokenizer) -> str | None:
    """What is to be said where plain text is for a model that was trained on texts with an opening; None where there is none."""
    if tokenizer.opening is None:
        return None
    begins = f"{tokenizer.path} has transformers begin every text with {tokenizer.opening}"
    return f"{begins}, and plain text begins without here: a chat template can write it (docs/data.md, Chats)"


def _no_eos(path: Path) -> str:
    return f"{path} does not say which token ends a text (looked for {', '.join(EOS_NAMES)}); name it with eos_token="


def _pad_or_other(pad_id: int, eos_id: int, controls: Collection[int], impossible: int | None) -> int:
    """The pad id, or the id that stands in for it (see `Tokenizer.pad_id`); a `pad_id` below 0 is none."""
    if pad_id >= 0 and pad_id != eos_id:
        return pad_id
    return next(i for i in (*sorted(controls), impossible, 0, 1) if i not in (None, eos_id))


def _writable(ids: list[int], controls: set[int]) -> list[int]:
    if not controls.isdisjoint(ids):
        found = next(i for i in ids if i in controls)
        raise UnwritableText(f"the tokenizer has no tokens for a part of it but its control token {found}")
    return ids


def _fingerprint(contents: Sequence[bytes], eos_id: int, pad_id: int) -> str:
    whole = hashlib.sha256()
    for part in (*contents, f"{eos_id} {pad_id}".encode()):
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()
