"""What the pages say of the program, held against it: keys, messages, joining."""

import re
from pathlib import Path

from megarlhf.config import COMMANDS
from megarlhf.config.documentation import keys_of
from megarlhf.data.records import Demonstration
from megarlhf.data.tokenized import demonstration_rows
from megarlhf.data.tokenizer_training import train_sentencepiece
from megarlhf.data.tokenizers import load_tokenizer

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
KEYS = {key for cls in COMMANDS.values() for key, *_ in keys_of(cls)}


def rows_of(page):
    """The cells of every table row of a page, without its header."""
    lines = (DOCS / page).read_text().splitlines()
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines if line.startswith("|")]
    return [row for row in cells if not set("".join(row)) <= set("-") and row[0] not in ("here", "status", "it says", "what is seen")]


def test_the_settings_that_others_know_are_keys_here():
    named = [key for row in rows_of("coming_from.md") for key in re.findall(r"`([a-z_.0-9]+)`", row[0]) if key != "reward"]
    assert len(named) > 60 and set(named) <= KEYS, sorted(set(named) - KEYS)
    rows = rows_of("coming_from.md")
    assert all(len(row) == 5 and all(row[:4]) for row in rows), "a dash for what the others do not have"


def test_what_is_to_be_mended_is_what_the_program_says():
    """Every message on the page stands in the program or in the system's own words, between what it fills in."""
    source = "".join(path.read_text() for path in sorted((ROOT / "megarlhf").rglob("*.py")))
    source = re.sub(r"\"\s*\n?\s*f?\"", "", source).replace('\\"', '"').replace(r"\'", "'") + "No space left on device"
    source = re.sub(r"\{[^{}]*\}", "...", source)
    page = (DOCS / "troubleshooting.md").read_text()
    said = page[page.index("## Before") : page.index("## When it runs and does not")]
    messages = [m for line in said.splitlines() if line.startswith("| `") for m in re.findall(r"`([^`]+)`", line.split(" | ")[0])]
    parts = [part.strip() for message in messages for part in message.split("...") if len(part.strip()) > 3]
    assert len(messages) > 25
    missing = [part for part in parts if part not in source]
    assert not missing, missing


def test_the_keys_and_metrics_that_a_way_out_names_exist():
    page = (DOCS / "troubleshooting.md").read_text()
    names = {name for name in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:[:=][^`]*)?`", page) if not name.endswith((".md", ".json", ".jinja"))}
    assert len(names) > 12
    unknown = {name for name in names if not any(key == name or key.endswith(f".{name}") for key in KEYS)}
    assert not unknown
    metrics = set(re.findall(r"`([a-z]+/[a-z_]+)`", page)) - {"launcher/slurm"}
    glossary = (DOCS / "metrics.md").read_text()
    assert len(metrics) > 7 and all(f"`{name}`" in glossary for name in metrics)


def test_prompt_and_response_are_joined_as_the_page_shows(tmp_path):
    tokenizer = load_tokenizer(train_sentencepiece(["2+3=5 "] * 9, tmp_path / "t", vocab_size=267, character_coverage=1.0))
    for prompt, response in (("2+3=", "5"), ("2+3=", " 5"), ("2+3= ", "5")):
        [row], _ = demonstration_rows([Demonstration(prompt, response, "x:1")], tokenizer, max_prompt_len=9, max_response_len=9)
        assert [*row.prompt_ids, *row.response_ids] == [tokenizer.encode(char)[0] for char in prompt + response] + [tokenizer.eos_id]
        assert list(row.response_ids) == [*tokenizer.encode(response), tokenizer.eos_id]
