"""The model against `transformers`: the same weights give the same logits, for GPT-2 and for Llama."""

import pytest
import torch
import torch.distributed as dist
import transformers

from megarlhf.models.architecture import Architecture
from megarlhf.models.transformer import ModelSpec, build_model, named_parameters
from megarlhf.parallel.groups import World

VOCAB = 150


@pytest.fixture(scope="module")
def groups():
    world = World.connect()
    yield world.groups(world.layout())
    world.close()
    assert not dist.is_initialized()


def gpt2(activation):
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=40, n_embd=48, n_layer=3, n_head=4, activation_function=activation, initializer_range=0.2
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    ours = Architecture(
        num_layers=3,
        hidden_size=48,
        num_heads=4,
        num_kv_heads=4,
        ffn_size=192,
        vocab_size=VOCAB,
        max_seq_len=40,
        activation={"gelu_new": "gelu_tanh", "gelu": "gelu"}[activation],
    )
    return theirs, ours


def gpt2_weights(theirs):
    """Conv1D holds [in, out]; its fused q, k, v are whole, ours alternate head by head."""
    t = theirs.transformer
    w = {"embedding.word_embeddings.weight": t.wte.weight, "embedding.position_embeddings.weight": t.wpe.weight}
    for i, block in enumerate(t.h):
        names = {
            "input_layernorm": block.ln_1,
            "pre_mlp_layernorm": block.ln_2,
            "self_attention.linear_qkv": block.attn.c_attn,
            "self_attention.linear_proj": block.attn.c_proj,
            "mlp.linear_fc1": block.mlp.c_fc,
            "mlp.linear_fc2": block.mlp.c_proj,
        }
        for name, module in names.items():
            weight, bias = module.weight, module.bias
            if "layernorm" not in name:
                weight = weight.T
            if "qkv" in name:
                weight, bias = (torch.cat([x.view(3, 4, 12, -1)[:, h].reshape(36, -1) for h in range(4)]) for x in (weight, bias))
                bias = bias.view(-1)
            w[f"decoder.layers.{i}.{name}.weight"], w[f"decoder.layers.{i}.{name}.bias"] = weight, bias
    return w | {"decoder.final_layernorm.weight": t.ln_f.weight, "decoder.final_layernorm.bias": t.ln_f.bias}


def llama(tied):
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        max_position_embeddings=40,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        rms_norm_eps=1e-4,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    ours = Architecture(
        num_layers=3,
        hidden_size=48,
        num_heads=6,
        num_kv_heads=2,
        ffn_size=80,
        vocab_size=VOCAB,
        max_seq_len=40,
        norm="rmsnorm",
        norm_eps=1e-4,
        activation="swiglu",
        positions="rotary",
        rotary_base=50000.0,
        bias=False,
        tied_embeddings=tied,
    )
    return theirs, ours


def llama_weights(theirs):
    """Ours: per group of queries its three heads, then its key, then its value; gate above up."""
    w = {"embedding.word_embeddings.weight": theirs.model.embed_tokens.weight, "decoder.final_layernorm.weight": theirs.model.norm.weight}
    if not theirs.config.tie_word_embeddings:
        w["output_layer.weight"] = theirs.lm_head.weight
    for i, layer in enumerate(theirs.model.layers):
        prefix, attention, mlp = f"decoder.layers.{i}", layer.self_attn, layer.mlp
        q, k, v = (projection.weight.view(2, -1, 48) for projection in (attention.q_proj, attention.k_proj, attention.v_proj))
        w[f"{prefix}.self_attention.linear_qkv.weight"] = torch.cat([q, k, v], dim=1).view(-1, 48)
        w[f"{prefix}.self_attention.linear_proj.weight"] = attention.o_proj.weight
        w[f"{prefix}.mlp.linear_fc1.weight"] = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        w[f"{prefix}.mlp.linear_fc2.weight"] = mlp.down_proj.weight
        w[f"{prefix}.input_layernorm.weight"] = layer.input_layernorm.weight
        w[f"{prefix}.pre_mlp_layernorm.weight"] = layer.post_attention_layernorm.weight
    return w


@pytest.mark.parametrize(
    ("make", "variant", "weights_of"),
    [(gpt2, "gelu_new", gpt2_weights), (gpt2, "gelu", gpt2_weights), (llama, False, llama_weights), (llama, True, llama_weights)],
    ids=["gpt2", "gpt2-exact-gelu", "llama", "llama-tied"],
)
@torch.no_grad()
def test_logits_are_those_of_transformers(groups, make, variant, weights_of):
    torch.manual_seed(0)
    theirs, architecture = make(variant)
    for name, parameter in theirs.named_parameters():  # norms and biases too, so that none is left out unseen
        parameter.add_(torch.randn_like(parameter), alpha=0.1 if parameter.dim() == 1 else 0.0)
        assert parameter.abs().max() > 0, name
    spec = ModelSpec(architecture=architecture, head="lm")
    (ours,) = build_model(spec, groups)
    parameters, weights = named_parameters([ours], groups), weights_of(theirs)
    assert parameters.keys() == weights.keys()
    for name, parameter in parameters.items():
        padding = parameter.shape[0] - weights[name].shape[0]  # of the vocabulary
        assert padding == (
            architecture.padded_vocab_size - VOCAB if name in ("embedding.word_embeddings.weight", "output_layer.weight") else 0
        )
        parameter.copy_(torch.nn.functional.pad(weights[name], (0, 0, 0, padding)) if padding else weights[name])
    tokens = torch.randint(0, VOCAB, (3, 40))
    ours.eval()
    hidden = ours(tokens, torch.arange(40)[None].expand(3, -1), None)
    logits = ours.logits(ours.full_hidden(hidden)).transpose(0, 1)[..., :VOCAB]
    expected = theirs(tokens).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
