"""The files that travel with a model: its tokenizer, its chat template, its generation settings, its own config.json."""

from __future__ import annotations

import shutil
from pathlib import Path

from megarlhf.data.tokenizers import Tokenizer, load_tokenizer
from megarlhf.storage.files import read_json, write_atomically

VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model")
"""Files of which a folder with a tokenizer has at least one."""
TOKENIZER_FILES = (
    *VOCABULARIES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
TEMPLATES = "additional_chat_templates"


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer under a name that travels."""
    return any((folder / name).is_file() for name in VOCABULARIES)


def load_travelling(path: Path, eos_token: str | None) -> Tokenizer:
    """The tokenizer at `path`, a file or a folder. ValueError, with a file's name, where it or its tokenizer_config.json is broken."""
    config = (path if path.is_dir() else path.parent) / "tokenizer_config.json"
    named = read_json(config).get("eos_token") if config.is_file() else None
    named = named.get("content", named) if isinstance(named, dict) else named
    if not isinstance(named, str | None):
        raise ValueError(f"{config}: eos_token must be the name of a token, got {named!r}")
    return load_tokenizer(path, eos_token=eos_token)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer at `source`, a file or a folder, and what belongs to it into the folder `target`. OSError where that fails.

    A file with a name of its own gets the usual one: x.model becomes tokenizer.model, x-vocab.json vocab.json.
    """
    folder = source if source.is_dir() else source.parent
    renamed = {}
    if source.is_file() and source.name not in TOKENIZER_FILES:
        renamed = _usual_names(source)
    elif source.is_dir() and not has_tokenizer(source):
        renamed = {path.name: "tokenizer.model" for path in source.glob("*.model")}
    for name in (*renamed, *(name for name in TOKENIZER_FILES if name not in renamed.values())):
        beside = source.is_file() and renamed and name in (*VOCABULARIES, "merges.txt")  # of another tokenizer
        if (folder / name).is_file() and not beside:
            write_atomically(target / renamed.get(name, name), (folder / name).read_bytes())
    if (folder / TEMPLATES).is_dir():
        shutil.copytree(folder / TEMPLATES, target / TEMPLATES)


def _usual_names(file: Path) -> dict[str, str]:
    if file.name.endswith("vocab.json"):
        return {file.name: "vocab.json", file.name.removesuffix("vocab.json") + "merges.txt": "merges.txt"}
    return {file.name: "tokenizer.model" if file.suffix == ".model" else "tokenizer.json"}
