"""What is said of a model before a run takes it."""

import json
import types

import pytest

from megarlhf.data.templates import FINGERPRINT, template_fingerprint
from megarlhf.runs.models import ModelPlanner, precision_doubt

TEMPLATE = "{% for message in messages %}{{ message.content }}</s>{% endfor %}"


@pytest.mark.parametrize("where", ["file", "configuration"])
def test_a_model_that_was_trained_on_chats_of_another_template_is_asked_about(tmp_path, where):
    def write(template):
        if where == "file":
            (tmp_path / "chat_template.jinja").write_text(template)
        else:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))

    def said(**fingerprints):
        saved = types.SimpleNamespace(state={"fingerprints": fingerprints})
        return ModelPlanner._other_template(types.SimpleNamespace(tokenizer=types.SimpleNamespace(path=tmp_path / "tokenizer.json")), saved)

    assert said(**{FINGERPRINT: "trained"}) == "", "no template now: what is read is plain text"
    write(TEMPLATE)
    trained = {FINGERPRINT: template_fingerprint(tmp_path / "tokenizer.json")}
    assert said(**trained) == said(tokenizer="plain text then") == ""
    write(TEMPLATE + "\n")
    assert "is this meant? it was trained on chats that another template wrote" in said(**trained)


def test_a_large_model_in_float32_on_a_gpu_is_asked_about():
    assert "a GPU multiplies bf16 some ten times as fast" in precision_doubt("fp32", 10**9, "cuda")
    assert precision_doubt("fp32", 10**6, "cuda") == precision_doubt("bf16", 10**9, "cuda") == precision_doubt("fp32", 10**9, "cpu") == ""
