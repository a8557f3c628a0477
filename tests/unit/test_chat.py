"""What a conversation is to the model, and how its answers are written."""

import io
import json
import sys

import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers

from megarlhf.chat.conversation import Conversation, SpokenText
from megarlhf.chat.talk import Talk
from megarlhf.data.tokenizers import load_tokenizer

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture
def tokenizer(tmp_path):
    """Of bytes, without a chat template."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    fast = Fast(models.BPE(vocab=letters, merges=[]))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast.add_special_tokens(["</s>"])
    fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return load_tokenizer(tmp_path)


def test_without_a_template_it_is_the_text_so_far(tokenizer):
    conversation = Conversation(tokenizer, 60)
    conversation.turns += [("first?", "one"), ("second?", "two")]
    ids, left_out = conversation.prompt("third?", 10)
    assert (tokenizer.decode(ids), left_out) == ("first?\none\nsecond?\ntwo\nthird?\n", 0)
    ids, left_out = conversation.prompt("third?", 40)
    assert (tokenizer.decode(ids), left_out) == ("second?\ntwo\nthird?\n", 1)
    assert conversation.prompt("third?", 60)[1] == 2 and len(conversation.turns) == 2
    with pytest.raises(ValueError, match="this takes 61 tokens, and the model's context has 60: write less"):
        conversation.prompt("x" * 60, 1)
    with pytest.raises(ValueError, match="without a chat template, and without one there is no system message"):
        Conversation(tokenizer, 60, "be brief")


def test_with_a_template_it_is_its_messages(tokenizer, tmp_path):
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    conversation = Conversation(load_tokenizer(tmp_path), 100, "be brief")
    conversation.turns.append(("a", "b</s>"))
    ids, _ = conversation.prompt("c", 10)
    expected = "<system>be brief", "<user>a", "<assistant>b</s>", "<user>c", "<assistant>"
    assert [tokenizer.decode(part) for part in _split(ids, tokenizer.eos_id)] == list(expected), "the name in a content is text"


def _split(ids, eos_id):
    parts = [[]]
    for i in ids:
        if i == eos_id:
            parts.append([])
        else:
            parts[-1].append(i)
    return parts


def test_letters_are_written_when_they_are_whole(tokenizer):
    written = []
    spoken = SpokenText(tokenizer, written.append)
    ids = tokenizer.encode("a\u00e9\u20ac")
    for i in ids:
        spoken.token(0, i)
    spoken.end(0, ids)
    assert written == ["a", "\u00e9", "\u20ac"] and spoken.text == "a\u00e9\u20ac"
    broken = SpokenText(tokenizer, written.append)
    broken.token(0, ids[1])
    broken.end(0, ids[1:2])
    assert written[3:] == ["\ufffd"], "half a letter at the end is said to be one"


def test_a_line_that_is_no_text_is_left_out(tokenizer, monkeypatch, capsys):
    """Bytes that are not UTF-8, whatever the locale makes of them: the conversation goes on."""
    asked = []
    talk = Talk(None, Conversation(tokenizer, 60), None, seed=1)
    monkeypatch.setattr(talk, "answer", asked.append)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\n\xff\xfe two\n\nthree"), encoding="utf-8"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    talk.run()
    assert asked == ["one", "three"] and capsys.readouterr().err == "this line is not UTF-8 text, and is left out\n"
