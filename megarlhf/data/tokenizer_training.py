"""Tokenizers of one's own: byte-pair encodings by sentencepiece, or over bytes by Hugging Face's tokenizers. Both give every text back."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

EOS, PAD = "<|endoftext|>", "<|pad|>"
"""Of a byte-level tokenizer; names that `load_tokenizer` knows."""


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


def train_byte_level(texts: Iterable[str], path: str | Path, *, vocab_size: int) -> Path:
    """Train GPT-2's byte-level byte-pair encoding (Radford et al. 2019, section 2.2), and write it as a Hugging Face tokenizer.json.

    The 256 bytes are tokens, so that no text is unknown; EOS and padding have tokens of their own. Few texts may give fewer tokens
    than `vocab_size`. ValueError where that has no room for the bytes.
    """
    path = Path(path)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < (least := len(alphabet) + 2):
        raise ValueError(f"cannot train a tokenizer with vocab_size {vocab_size}: the 256 bytes, EOS and padding need {least}")
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    how = {"special_tokens": [EOS, PAD], "initial_alphabet": alphabet, "show_progress": False}
    model.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, **how))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(model.to_str(), encoding="utf-8")
    return path
