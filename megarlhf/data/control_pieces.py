"""Tokenizer models rewritten so that no text can yield a control piece: the end of a text, padding, and their like.

A tokenizer's file decides which pieces match text, and many match too much: a user-defined symbol, an added token that is not
marked special, a vocabulary entry that the model finds by itself. Here those of them that mean something to the program are
taken out of what can match; their ids stay.

A chat template writes control tokens too, and means them. It writes marks in their place: letters for private use, which no
text of a record may hold, and which a second rewritten model takes for the control tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping

import tokenizers

PIECES_FIELD = 1  # sentencepiece_model.proto: ModelProto.pieces
LENGTH_DELIMITED = 2  # protobuf's wire type of messages and strings
TYPE_IS_CONTROL = b"\x18\x03"  # SentencePiece.type = CONTROL, as protobuf writes it; of a field that comes twice the last counts

CUT = "\U000f0000"  # stands for no token: what is before it and what is after it are encoded apart
FIRST_MARK = ord(CUT) + 1
LAST_MARK = 0xFFFFD  # of Unicode's plane 15, which is for private use


def marks_of(ids: Iterable[int]) -> dict[int, str]:
    """A letter of private use for each control token. ValueError for more than there are."""
    ids = sorted(ids)
    if len(ids) > LAST_MARK - FIRST_MARK:
        raise ValueError(f"the tokenizer has {len(ids)} control tokens, more than there are marks for")
    return {id_: chr(FIRST_MARK + i) for i, id_ in enumerate(ids)}


def sentencepiece_without(model: bytes, ids: Collection[int]) -> bytes:
    """A serialized sentencepiece model in which the pieces `ids` are control pieces, which no text matches.

    ValueError where the bytes are not a model.
    """
    rewritten, number = bytearray(), 0
    for tag, start, body, end in _fields(model):
        if tag == (PIECES_FIELD << 3 | LENGTH_DELIMITED):
            if number in ids:
                piece = model[body:end] + TYPE_IS_CONTROL
                rewritten += _varint(tag) + _varint(len(piece)) + piece
                start = end
            number += 1
        rewritten += model[start:end]
    return bytes(rewritten)


def _fields(message: bytes) -> Iterator[tuple[int, int, int, int]]:
    """(tag, where the field starts, where its content starts, where it ends) of a protobuf message's fields."""
    at = 0
    while at < len(message):
        start = at
        tag, at = _read_varint(message, at)
        wire_type, body = tag & 7, at
        if wire_type == LENGTH_DELIMITED:
            length, body = _read_varint(message, at)
            at = body + length
        elif wire_type == 0:
            _, at = _read_varint(message, at)
        elif wire_type in (1, 5):
            at += 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"byte {start} starts no field of a sentencepiece model")
        if at > len(message):
            raise ValueError("the file ends in the middle of a piece")
        yield tag, start, body, at


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message):
        value |= (message[at] & 0x7F) << shift
        shift += 7
        at += 1
        if not message[at - 1] & 0x80:
            return value, at
    raise ValueError("the file ends in the middle of a number")


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def huggingface_without(model: tokenizers.Tokenizer, ids: Collection[int]) -> tokenizers.Tokenizer:
    """A tokenizer of the `tokenizers` package whose tokens `ids` match no text.

    An added token becomes special, and special tokens are not looked for in a text. An entry of the model's own vocabulary,
    which the model would find even then, gets a name that is a hash.
    """
    tree = json.loads(model.to_str())
    tree["post_processor"] = None  # it adds special tokens, which we never ask for
    tree["model"] |= {"dropout": None} if tree["model"].get("dropout") else {}  # it would encode one text differently on every rank
    names = {id_: name for name, id_ in model.get_vocab(with_added_tokens=True).items()}
    hidden = _rename(tree["model"], {id_: f"control {id_} {hashlib.sha256(names[id_].encode()).hexdigest()}" for id_ in ids})
    kept = []
    for token in tree["added_tokens"]:
        if token["id"] not in hidden:
            kept.append(token | {"special": token["special"] or token["id"] in ids})
    tree["added_tokens"] = kept  # a hidden one would otherwise be added again, under a new id
    rewritten = tokenizers.Tokenizer.from_str(json.dumps(tree))
    rewritten.encode_special_tokens = True
    return rewritten


def huggingface_marked(model: tokenizers.Tokenizer, marks: Mapping[int, str]) -> tokenizers.Tokenizer:
    """A tokenizer of the `tokenizers` package whose tokens are found in a text by their `marks` and not by their names.

    With the mark in a token's place a text is cut, normalised and encoded as the original model does it with the name. CUT
    parts the text like a token, and has an id of its own beyond the others.
    """
    tree = json.loads(model.to_str())
    tree["post_processor"] = None
    _rename(tree["model"], marks)
    added = {token["id"]: token for token in tree["added_tokens"]}
    for id_, mark in marks.items():
        added[id_] = added.get(id_, _token(id_, mark)) | {"content": mark, "special": True}
    cut = max(model.get_vocab(with_added_tokens=True).values()) + 1
    tree["added_tokens"] = [*(added[id_] for id_ in sorted(added)), _token(cut, CUT)]
    return tokenizers.Tokenizer.from_str(json.dumps(tree))


def _token(id_: int, content: str) -> dict:
    return {"id": id_, "content": content, "special": True} | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


def _rename(model: dict, new_names: Mapping[int, str]) -> set[int]:
    """Rename entries of a model's vocabulary, by their ids and in place; returns the ids of those that it had."""
    vocab = model["vocab"]
    names = list(enumerate(name for name, _ in vocab)) if isinstance(vocab, list) else [(id_, name) for name, id_ in vocab.items()]
    new_name = {name: new_names[id_] for id_, name in names if id_ in new_names}
    if isinstance(vocab, list):  # Unigram: [[piece, score], ...]
        model["vocab"] = [[new_name.get(name, name), score] for name, score in vocab]
    else:
        model["vocab"] = {new_name.get(name, name): id_ for name, id_ in vocab.items()}
    if model.get("unk_token") in new_name:
        model["unk_token"] = new_name[model["unk_token"]]
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [
            [left, right]
            for left, right in model["merges"]
            if new_name.keys().isdisjoint((left, right, left + right.removeprefix(prefix)))
        ]
    return {id_ for id_, _ in names if id_ in new_names}
