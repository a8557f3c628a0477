"""Models of transformers in and out, without ranks: bit for bit, in every family, head, precision and number of files."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megarlhf.conversion.command import main as convert
from megarlhf.conversion.from_hf import from_hf
from megarlhf.conversion.hf_folder import INDEX, ONE_FILE, read_hf_folder
from megarlhf.conversion.to_hf import Exported, to_hf
from megarlhf.conversion.verification import verify
from megarlhf.data.tokenizers import load_tokenizer
from megarlhf.models.parameters import parameter_specs
from megarlhf.runs.checkpoints import find_source
from megarlhf.storage.checkpoints import read_saved
from tests.distributed.families import CONFIGS, make, make_tokenizer

CLASSES = {"lm": transformers.AutoModelForCausalLM, "scalar": transformers.AutoModelForSequenceClassification}


def loaded(folder, head):
    """(model as transformers reads it, what it says of missing, unexpected and mismatched keys)."""
    model, said = CLASSES[head].from_pretrained(folder, output_loading_info=True)
    return model.eval(), {key: value for key, value in said.items() if value}


def assert_same_weights(one, other):
    """Bit for bit, but for OPT's two rows of positions that mean nothing."""
    ones, others = one.state_dict(), other.state_dict()
    assert ones.keys() == others.keys()
    for name, tensor in ones.items():
        cut = 2 if name.endswith("embed_positions.weight") else 0
        assert tensor.dtype == others[name].dtype and torch.equal(tensor[cut:], others[name][cut:]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_is_bit_for_bit(name, head, dtype, tmp_path):
    theirs = make(name, tmp_path / "hf", head=head, dtype=dtype)
    from_hf(tmp_path / "hf", tmp_path / "ours")
    saved = find_source(str(tmp_path / "ours"))
    assert not saved.damages() and saved.models["model"]["head"] == head
    to_hf(Exported(saved, "model"), tmp_path / "back")
    back, said = loaded(tmp_path / "back", head)
    assert said == {}
    assert type(back) is type(theirs) and back.dtype == dtype
    assert_same_weights(theirs, back)
    written, given = (load_file(tmp_path / folder / ONE_FILE) for folder in ("back", "hf"))
    assert written.keys() == given.keys(), "a tied head is in no file twice"
    before, after = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("hf", "back"))
    assert after.pop("score_bias", 0.0) == 0.0
    assert after == before
    if theirs.config.tie_word_embeddings and head == "lm":
        assert back.get_output_embeddings().weight is back.get_input_embeddings().weight


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_a_config_written_anew_describes_the_same_model(name, head, tmp_path):
    """Of a model that we trained ourselves there is no config.json of before."""
    theirs = make(name, tmp_path / "hf", head=head)
    from_hf(tmp_path / "hf", tmp_path / "ours")
    (tmp_path / "ours" / "config.json").unlink()
    exported = Exported(read_saved(tmp_path / "ours"), "model")
    to_hf(exported, tmp_path / "back", family=theirs.config.model_type)
    back, said = loaded(tmp_path / "back", head)
    assert said == {} and type(back) is type(theirs)
    assert_same_weights(theirs, back)
    tokens = torch.randint(1, 200, (1, 20))
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, back(tokens).logits)
    to_hf(exported, tmp_path / "any")  # of the first family that can hold it
    other, said = loaded(tmp_path / "any", head)
    with torch.no_grad():
        torch.testing.assert_close(other(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_many_files_each_way(tmp_path):
    theirs = make("llama3", tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    from_hf(tmp_path / "hf", tmp_path / "ours", part_bytes=20_000)
    saved = read_saved(tmp_path / "ours")
    assert len(saved.files) > 3 and max(seal.bytes for seal in saved.files.values()) < 60_000
    to_hf(Exported(saved, "model"), tmp_path / "back", shard_bytes=20_000)
    assert (tmp_path / "back" / INDEX).is_file() and not (tmp_path / "back" / ONE_FILE).exists()
    back, said = loaded(tmp_path / "back", "lm")
    assert said == {}
    assert_same_weights(theirs, back)


def test_the_vocabulary_s_padding_stays_here(tmp_path):
    make("llama2", tmp_path / "hf")  # 200 ids, padded to 256
    from_hf(tmp_path / "hf", tmp_path / "ours")
    assert read_hf_folder(tmp_path / "hf").architecture.padded_vocab_size == 256
    to_hf(Exported(read_saved(tmp_path / "ours"), "model"), tmp_path / "back")
    written = load_file(tmp_path / "back" / ONE_FILE)
    shapes = {tuple(tensor.shape) for name, tensor in written.items() if "embed" in name or "lm_head" in name}
    assert shapes == {(200, 32)}


def test_other_forms_of_the_same_files(tmp_path):
    """A bare trunk's names, as GPT-2's were released; buffers; a tied head that is in the file; NeoX's older name of its head."""

    def same_when(name, change, **config):
        folder = tmp_path / f"{name}{len(list(tmp_path.iterdir()))}"
        make(name, folder)
        expected = read_hf_folder(folder)
        before = {spec.name: expected.read(spec) for spec in expected.specs()}
        save_file({key: tensor.clone() for key, tensor in change(load_file(folder / ONE_FILE)).items()}, folder / ONE_FILE)
        changed = read_hf_folder(folder)
        for spec in changed.specs():
            assert torch.equal(before[spec.name], changed.read(spec))

    same_when("gpt2", lambda tensors: {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()})
    same_when("gpt2", lambda tensors: {**tensors, "transformer.h.0.attn.bias": torch.ones(1, 1, 32, 32, dtype=torch.bool)})
    same_when("gpt2", lambda tensors: {**tensors, "lm_head.weight": tensors["transformer.wte.weight"]})
    same_when("smollm2", lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    other = {"lm_head.weight": "embed_out.weight", "embed_out.weight": "lm_head.weight"}
    same_when("neox", lambda tensors: {other.get(key, key): tensor for key, tensor in tensors.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.3.mlp.up_proj.weight"), "no file holds model.layers.3.mlp.up_proj.weight, which config.json needs"),
        (lambda t: t.update({"model.extra": torch.zeros(2)}), "model.safetensors: model.extra is left over"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(33)}), r"model.norm.weight has the shape \[33\], and config.json needs"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int32)}), "model.norm.weight is of a kind that is not supp"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}), "model.norm.weight is of a kind that is not supp"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(200, 32)}), "lm_head.weight is not the embedding, and config.json says that"),
        (lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].bfloat16()}), "lm_head.weight is not the embedding"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}), "q_proj.bias is left over: config.json describes"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, tmp_path):
    make("smollm2", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / ONE_FILE)
    change(tensors)
    save_file(tensors, tmp_path / "hf" / ONE_FILE)
    with pytest.raises(ValueError, match=message):
        from_hf(tmp_path / "hf", tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_verify_compares_with_transformers_both_ways(head, tmp_path, capsys):
    make("qwen3", tmp_path / "hf", head=head)
    assert convert(["--from", str(tmp_path / "hf"), "--to", str(tmp_path / "ours"), "--verify"]) == 0
    assert convert(["--from", str(tmp_path / "ours"), "--to", str(tmp_path / "back"), "--verify", "--dtype", "bf16"]) == 0
    said = capsys.readouterr().out
    assert said.count("the largest difference of a") == 2
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    expected = {torch.bfloat16} if head == "lm" else {torch.bfloat16, torch.float32}  # the scalar head stays as it was
    assert {tensor.dtype for tensor in load_file(tmp_path / "back" / ONE_FILE).values()} == expected
    config["rms_norm_eps"] = 0.5
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    saved = Exported(read_saved(tmp_path / "ours"), "model")
    with pytest.raises(ValueError, match="hf and .*ours are not the same model: the largest difference of a"):
        verify(tmp_path / "hf", saved)


def test_the_score_s_bias_travels_in_the_configuration(tmp_path):
    theirs = make("llama3", tmp_path / "hf", head="scalar")
    file = tmp_path / "hf" / "config.json"
    bias = float(torch.tensor(-1.2345678))
    file.write_text(json.dumps({**json.loads(file.read_text()), "score_bias": bias}))
    from_hf(tmp_path / "hf", tmp_path / "ours")
    to_hf(Exported(read_saved(tmp_path / "ours"), "model"), tmp_path / "back")
    model = read_hf_folder(tmp_path / "back")
    spec = {spec.name: spec for spec in parameter_specs(model.architecture, "scalar")}["scalar_head.bias"]
    assert model.read(spec).tolist() == [bias]
    back, said = loaded(tmp_path / "back", "scalar")
    assert said == {} and back.config.score_bias == bias
    back.save_pretrained(tmp_path / "again")  # transformers keeps it
    assert read_hf_folder(tmp_path / "again").read(spec).tolist() == [bias]
    assert_same_weights(theirs, back)


CHAT = [{"role": "user", "content": "learn from some more <|im_end|> text"}, {"role": "assistant", "content": "and \u00e9"}]


def test_tokenizers_travel_both_ways(tmp_path):
    make("smollm2", tmp_path / "hf")
    theirs = make_tokenizer(tmp_path / "hf", vocab_size=100)
    from_hf(tmp_path / "hf", tmp_path / "ours")
    ours = load_tokenizer(tmp_path / "ours")
    assert read_saved(tmp_path / "ours").state["fingerprints"]["tokenizer"] == ours.fingerprint
    assert ours.eos_id == theirs.eos_token_id
    to_hf(Exported(read_saved(tmp_path / "ours"), "model"), tmp_path / "back")
    back = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert back.apply_chat_template(CHAT, tokenize=False) == theirs.apply_chat_template(CHAT, tokenize=False)
    assert back.apply_chat_template(CHAT)["input_ids"] == theirs.apply_chat_template(CHAT)["input_ids"]
    assert (back.eos_token, back.pad_token, len(back)) == (theirs.eos_token, theirs.pad_token, len(theirs))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "hf" / file).read_bytes(), file


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(tmp_path):
    make("smollm2", tmp_path / "hf")
    make_tokenizer(tmp_path / "hf", vocab_size=300)
    tokenizer = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())
    spare = {"id": 250, "content": "<spare>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"].append(spare)
    tokenizer["model"]["vocab"]["<spare>"] = 250
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="hf: its tokenizer has [0-9]+ ids, and the model's vocabulary 200: they do not belong together"):
        from_hf(tmp_path / "hf", tmp_path / "ours")


MEASURE = """
import resource, sys
from megarlhf.conversion.command import main
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert main(["--from", sys.argv[1], "--to", sys.argv[2]]) == 0
print("grown by", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, "KiB")
"""


def test_memory_does_not_grow_with_the_model(tmp_path):
    """200 MB of layers of 1 MB tensors: what a conversion takes is a few of these."""
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=512, num_hidden_layers=32, num_attention_heads=8, max_position_embeddings=32
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    size = (tmp_path / "hf" / ONE_FILE).stat().st_size
    assert size > 220e6
    for source, target in (("hf", "ours"), ("ours", "back")):
        command = [sys.executable, "-c", MEASURE, str(tmp_path / source), str(tmp_path / target)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        grown = 1024 * int(done.stdout.split("grown by")[1].split()[0])
        assert grown < 60e6, (source, grown)
