"""Converted models at several layouts: transformers' log-probabilities and scores, a step, and out again; and a recipe on one."""

import json

import pytest
import torch
import yaml

from megarlhf.conversion.command import main as convert
from megarlhf.conversion.from_hf import from_hf
from megarlhf.conversion.to_hf import Exported, to_hf
from megarlhf.engine import checkpoint
from megarlhf.engine.frozen import FrozenEngine
from megarlhf.engine.terms import LanguageModelLoss, RankingLoss, Term
from megarlhf.engine.trainable import TrainEngine
from megarlhf.models.transformer import ModelSpec
from megarlhf.parallel.groups import World
from megarlhf.storage.checkpoints import read_saved
from tests.distributed.families import make, make_tokenizer
from tests.distributed.recipe import ADAM as RECIPE_ADAM
from tests.distributed.recipe import run_stage_of, write_lines
from tests.distributed.training import ADAM, LEARNING_RATE, rankings, texts, write_checkpoint

NAMES = ["gpt2", "neox", "opt", "llama3", "smollm2", "mistral", "qwen2", "qwen3"]
"""One of each family, and a tied Llama."""
LAYOUTS = [{"tp": 2, "pp": 2}, {"tp": 4}]
TOLERANCE = 2e-5
"""Of a log-probability; the largest that was seen is 8e-6."""


def outputs(engine):
    """Log-probabilities of `texts()`, or scores of `rankings()`."""
    batch = texts()
    return engine.logprobs(batch, batch.loss_mask) if engine.spec.head == "lm" else engine.scores(rankings())


def check_converted(folder, layouts):
    """(outputs as converted, outputs after a step) in each layout; each is saved as trained-<axes> beside `folder`."""
    world, saved, found = World.connect(), read_saved(folder), []
    spec = ModelSpec(architecture=checkpoint.saved_architecture(saved, "model"), head=saved.models["model"]["head"])
    for axes in layouts:
        groups = world.groups(world.layout(**axes))
        engine = TrainEngine(spec, groups, micro_batch_size=4, adam=ADAM, seed=1)
        with pytest.raises(ValueError, match="ours: 'model' was converted and has no optimizer state: a run begins with it"):
            checkpoint.load(saved, {"model": engine})
        checkpoint.load_weights(saved, "model", engine)
        frozen = FrozenEngine(spec, groups, micro_batch_size=3)
        checkpoint.load_weights(saved, "model", frozen)
        converted = outputs(engine)
        torch.testing.assert_close(outputs(frozen), converted, rtol=1e-5, atol=1e-5)
        term = Term("text", LanguageModelLoss(), texts()) if spec.head == "lm" else Term("ranking", RankingLoss(), rankings())
        engine.start_ema(0.5)
        engine.step([term], learning_rate=LEARNING_RATE)
        engine.ema.update()
        checkpoint_path = folder.parent / f"trained-{named(axes)}"
        state = {"stage": "sft", "config": {"tokenizer": {"path": str(folder), "eos_token": None}}}
        write_checkpoint(checkpoint_path, {"policy": engine}, state, world)
        found.append((converted, outputs(engine)))
    return found


def named(axes):
    return "-".join(f"{key}{value}" for key, value in axes.items()) or "alone"


def theirs(model):
    """What `outputs` gives, by transformers."""
    if not hasattr(model, "score"):
        batch = texts()
        logits = model(batch.tokens).logits[:, :-1].log_softmax(-1)
        return torch.where(batch.loss_mask, logits.gather(-1, batch.tokens[:, 1:, None])[..., 0], 0.0)
    batch = rankings()
    rows = [model(row[None, :length]).logits[0, 0] for row, length in zip(batch.tokens, batch.lengths.tolist(), strict=True)]
    return torch.stack(rows) + getattr(model.config, "score_bias", 0.0)


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_converted_model_is_transformers_and_trains_and_goes_back(name, head, ranks1, ranks4, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = make(name, tmp_path / "hf", head=head)
    if head == "scalar":
        model.config.pad_token_id = 10**6  # no token here is padding: its length says where a row ends
    make_tokenizer(tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "ours")
    expected = theirs(model)
    assert expected.std() > 0.1
    alone = ranks1.run(check_converted, tmp_path / "ours", [{}])
    by_rank = ranks4.run(check_converted, tmp_path / "ours", LAYOUTS)
    largest = 0.0
    kind = transformers.AutoModelForCausalLM if head == "lm" else transformers.AutoModelForSequenceClassification
    for number, axes in enumerate([{}, *LAYOUTS]):
        for rank in alone if not axes else by_rank:
            converted, trained = rank[0 if not axes else number - 1]
            largest = max(largest, float((converted - expected).abs().max()))
        saved = read_saved(tmp_path / f"trained-{named(axes)}")
        to_hf(Exported(saved, "policy"), tmp_path / f"back-{named(axes)}")
        back, said = kind.from_pretrained(tmp_path / f"back-{named(axes)}", output_loading_info=True)
        assert not any(said.values()) and type(back) is type(model)
        back.config.pad_token_id = model.config.pad_token_id
        found = theirs(back.eval())
        assert (found - expected).abs().max() > 100 * TOLERANCE, "it has learnt something"
        largest = max(largest, float((found - trained).abs().max()))
        to_hf(Exported(saved, "policy", average=True), tmp_path / f"average-{named(axes)}")
        average = kind.from_pretrained(tmp_path / f"average-{named(axes)}")
        assert_halfway(average, model, back)
    print(f"{name} {head}: the largest difference from transformers is {largest:.1e}")
    assert largest < TOLERANCE


def assert_halfway(average, one, other):
    """A moving average with decay one half after one step; OPT's first two rows of positions are nothing."""
    for name, tensor in average.state_dict().items():
        cut = 2 if name.endswith("embed_positions.weight") else 0
        middle = (one.state_dict()[name] + other.state_dict()[name]) / 2
        torch.testing.assert_close(tensor[cut:], middle[cut:], rtol=1e-5, atol=1e-6)


def check_sft(folder):
    run_stage_of(folder / "sft.yaml")
    run_stage_of(folder / "sft.yaml", ["epochs=2"])  # goes on from its own checkpoint


def test_a_run_begins_with_a_converted_model_and_its_result_goes_back(ranks1, tmp_path, capsys):
    """The model has more ids than its tokenizer, as many released ones do; the tokenizer and its template come back with it."""
    transformers = pytest.importorskip("transformers")
    model = make("qwen2", tmp_path / "hf")
    tokenizer = make_tokenizer(tmp_path / "hf", vocab_size=60)
    assert len(tokenizer) < model.config.vocab_size
    assert convert(["--from", str(tmp_path / "hf"), "--to", str(tmp_path / "ours")]) == 0
    assert "ids that the tokenizer has no text for" in capsys.readouterr().out
    asked = [{"prompt": "some text" * (1 + i % 2), "response": " to learn from"} for i in range(8)]
    write_lines(tmp_path / "demonstrations.jsonl", asked)
    config = {
        "stage": "sft",
        "run": {"dir": f"{tmp_path}/sft"},
        "tokenizer": {"path": f"{tmp_path}/ours"},
        "model": {"load": f"{tmp_path}/ours", "adam": RECIPE_ADAM, "micro_batch_size": 4},
        "data": {"train": f"{tmp_path}/demonstrations.jsonl"},
        "limits": {"max_prompt_len": 16, "max_response_len": 16},
        "sampling": {"max_new_tokens": 4},
        "epochs": 1,
        "batch_size": 4,
        "dropout": 0.0,
    }
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(config))
    ranks1.run(check_sft, tmp_path)
    assert convert(["--from", str(tmp_path / "sft"), "--to", str(tmp_path / "back"), "--dtype", "bf16", "--verify"]) == 0
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(back) is type(model) and back.dtype == torch.bfloat16
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert again.chat_template == tokenizer.chat_template and again("some text").input_ids == tokenizer("some text").input_ids
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "back"))
    assert {key for key in before if before[key] != after[key]} == {"dtype"} and before.keys() == after.keys()
    assert convert(["--from", str(tmp_path / "sft"), "--to", str(tmp_path / "back")]) == 2
    assert "back is there already: choose another folder" in capsys.readouterr().err
    (tmp_path / "ours").rename(tmp_path / "moved")
    assert convert(["--from", str(tmp_path / "sft"), "--to", str(tmp_path / "other")]) == 2
    assert "ours, which is not there: say where with --tokenizer" in capsys.readouterr().err
    assert convert(["--from", str(tmp_path / "sft"), "--to", str(tmp_path / "other"), "--tokenizer", str(tmp_path / "moved")]) == 0
