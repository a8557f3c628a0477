"""Chat templates: programs in Jinja that come with a tokenizer and write a chat as one text, as transformers runs them.

A template runs in Jinja's immutable sandbox: it can read the chat and write text, nothing else.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megarlhf.storage.files import read_json

CONFIG_FILE, MAP_FILE, TEMPLATE_FILE = "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"
Render = Callable[..., str]
FINGERPRINT = "chat template"
"""What `template_fingerprint` is called among what a run remembers."""


def template_beside(tokenizer: Path) -> str:
    """The chat template of the tokenizer file: ``chat_template.jinja`` beside it, or "chat_template" in its configuration.

    Of several named ones in the configuration, "default". ValueError where there is none.
    """
    file = tokenizer.with_name(TEMPLATE_FILE)
    if file.is_file():
        try:
            return file.read_bytes().decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} cannot be read as a template: {error}") from error
    config = tokenizer.with_name(CONFIG_FILE)
    found = read_json(config).get("chat_template") if config.is_file() else None
    if isinstance(found, list):
        named = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
        found = named.get("default")
    if not isinstance(found, str):
        way_out = f'put one into {TEMPLATE_FILE} beside it, or write the records as plain text ("prompt", "response")'
        raise ValueError(f"{tokenizer} comes without a chat template, and there are chats to write; {way_out}")
    return found


def template_fingerprint(tokenizer: Path) -> str:
    """A hash of `template_beside`."""
    return hashlib.sha256(template_beside(tokenizer).encode()).hexdigest()


def has_template(tokenizer: Path) -> bool:
    """Whether there is something for `template_beside` to read. ValueError where the tokenizer's configuration is broken."""
    config = tokenizer.with_name(CONFIG_FILE)
    return tokenizer.with_name(TEMPLATE_FILE).is_file() or (config.is_file() and "chat_template" in read_json(config))


def named_tokens(tokenizer: Path) -> dict[str, str]:
    """The variables that transformers hands to a template: "bos_token", "eos_token" and their like, as far as they are configured."""
    found: dict[str, str] = {}
    for file in (tokenizer.with_name(MAP_FILE), tokenizer.with_name(CONFIG_FILE)):
        for key, value in (read_json(file) if file.is_file() else {}).items():
            name = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(name, str):
                found[key] = name
    return found


def compiled(source: str, *, now: datetime.datetime, marks: Mapping[str, str] | None = None) -> Render:
    """A template ready to be rendered with ``messages``, ``add_generation_prompt`` and the named tokens; it is told that it is `now`.

    With `marks` it writes a mark wherever the template itself writes the name of a control token; what it compares with a
    text, searches in one or hands to a text's method stays. jinja2.TemplateError for what is no template.
    """
    environment = _environment(now)
    tree = environment.parse(source)
    for node in _written(tree) if marks else ():
        field = "data" if isinstance(node, nodes.TemplateData) else "value"
        setattr(node, field, with_marks(getattr(node, field), marks))
    return environment.from_string(tree).render


def with_marks(text: str, marks: Mapping[str, str]) -> str:
    """The text with a mark for each name of a control token, the longest name first."""
    for name in sorted(marks, key=len, reverse=True):
        text = text.replace(name, marks[name])
    return text


def _written(node: nodes.Node) -> Iterator[nodes.TemplateData | nodes.Const]:
    """The texts that a template writes, or keeps to write them."""
    if isinstance(node, nodes.TemplateData) or isinstance(node, nodes.Const) and isinstance(node.value, str):
        yield node
    elif isinstance(node, nodes.Getitem | nodes.Filter) or isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):
        if node.node is not None:  # but not what is looked for in it: content.split("</s>") is about the content
            yield from _written(node.node)
    elif not isinstance(node, nodes.Compare | nodes.Test):
        for child in node.iter_child_nodes():
            yield from _written(child)


class _Generation(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}``, with which some templates say what the assistant writes: its content."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _environment(now: datetime.datetime) -> ImmutableSandboxedEnvironment:
    """As transformers sets it up: whitespace of blocks, loop controls, and the functions that templates count on."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": now.strftime}
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def messages_of(pairs: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """(role, content) as templates read them."""
    return [{"role": role, "content": content} for role, content in pairs]
