"""Small models of megatron-core's own, saved by it in the form torch_dist with the arguments that Megatron-LM would save."""

import argparse
import contextlib
import os
from dataclasses import replace
from unittest import mock

import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import distributed

from megarlhf.parallel.groups import World

VOCAB, LAYERS, HIDDEN, HEADS, SEQ = 256, 3, 32, 4, 24
SIZES = {"num_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": HEADS}
ARGUMENTS = {
    **SIZES, "kv_channels": None, "max_position_embeddings": 64, "params_dtype": torch.float32, "attention_backend": AttnBackend.unfused,
    "group_query_attention": False, "num_experts": None, "multi_latent_attention": False, "window_size": None, "swiglu": False,
}  # fmt: skip
LLAMA = {
    "swiglu": True, "add_bias_linear": False, "normalization": "RMSNorm", "norm_epsilon": 1e-6, "ffn_hidden_size": 80,
    "group_query_attention": True, "num_query_groups": 2, "position_embedding_type": "rope",
}  # fmt: skip
MODELS = {
    # name -> (arguments beside ARGUMENTS, how the checkpoint is written)
    "gpt": ({"position_embedding_type": "learned_absolute", "bias_gelu_fusion": True}, {}),
    "exact_gelu": ({"bias_gelu_fusion": False, "add_position_embedding": True}, {"layers": "apart"}),
    "partial": ({"position_embedding_type": "rope", "rotary_percent": 0.5, "rotary_seq_len_interpolation_factor": 4}, {"norms": "local"}),
    "llama2": ({**LLAMA, "untie_embeddings_and_output_weights": True}, {}),
    "llama3": ({**LLAMA, "use_rope_scaling": True, "rotary_base": 500000, "kv_channels": 16}, {"layers": "apart", "norms": "local"}),
    "qwen": ({**LLAMA, "add_qkv_bias": True, "qk_layernorm": True, "rotary_base": 1000000.0}, {}),
}


def transformer_config(a, *, tp, apart):
    """What Megatron-LM makes of the arguments."""
    gated = a.get("swiglu", False)
    return TransformerConfig(
        **SIZES,
        kv_channels=a["kv_channels"],
        num_query_groups=a.get("num_query_groups"),
        ffn_hidden_size=a.get("ffn_hidden_size"),
        gated_linear_unit=gated,
        activation_func=F.silu if gated else F.gelu,
        bias_activation_fusion=False if gated else a["bias_gelu_fusion"] if "bias_gelu_fusion" in a else True,
        normalization=a.get("normalization", "LayerNorm"),
        layernorm_epsilon=a.get("norm_epsilon", 1e-5),
        add_bias_linear=a.get("add_bias_linear", True),
        add_qkv_bias=a.get("add_qkv_bias", False),
        qk_layernorm=a.get("qk_layernorm", False),
        hetereogenous_dist_checkpoint=apart,
        tensor_model_parallel_size=tp,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )


def make_model(a, *, tp, layers="together", norms="fused"):
    """The model, its weights moved away from what they start as."""
    config = transformer_config(a, tp=tp, apart=layers == "apart")
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    if norms == "local":
        spec = replace(spec, submodules=replace(spec.submodules, sharded_state_dict_keys_map={}))
    model = GPTModel(
        config,
        spec,
        vocab_size=VOCAB,
        max_sequence_length=a["max_position_embeddings"],
        position_embedding_type=a.get("position_embedding_type", "learned_absolute"),
        rotary_percent=a.get("rotary_percent", 1.0),
        rotary_base=a.get("rotary_base", 10000),
        rope_scaling=a.get("use_rope_scaling", False),
        seq_len_interpolation_factor=a.get("rotary_seq_len_interpolation_factor"),
        share_embeddings_and_output_weights=not a.get("untie_embeddings_and_output_weights", False),
        parallel_output=False,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(len(name) + 1000 * parallel_state.get_tensor_model_parallel_rank())
            if getattr(parameter, "tensor_model_parallel", False):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return model.eval()


@torch.no_grad()
def logprobs_of(model, tokens):
    """[rows, seq - 1]."""
    rows, seq = tokens.shape
    hidden_by = torch.triu(torch.ones(1, 1, seq, seq, dtype=torch.bool), diagonal=1)
    logits = model(tokens, torch.arange(seq).expand(rows, seq), hidden_by)
    return logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]


def tokens():
    """What every model is asked about: [4, SEQ]."""
    return torch.randint(0, VOCAB, (4, SEQ), generator=torch.Generator().manual_seed(0))


def save_models(folder, tp):
    """Save every model as folder/<name>/iter_0000007; returns name -> log-probabilities of `tokens`."""
    World.connect()
    found = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(parallel_state, "_GLOBAL_MEMORY_BUFFER", None))  # ours stays
        stack.enter_context(mock.patch.dict(os.environ))  # where megatron-core notes how the first model attends, for all others
        for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
            os.environ.pop(name, None)
        stack.callback(parallel_state.destroy_model_parallel)
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
        for name, value in (("synchronize", None), ("current_device", "cpu")):  # all that saving needs of CUDA
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, value=value: value))
        model_parallel_cuda_manual_seed(1)
        for name, (more, how) in MODELS.items():
            arguments = {**ARGUMENTS, **more}
            model = make_model(arguments, tp=tp, **how)
            found[name] = logprobs_of(model, tokens())
            path = folder / name / "iter_0000007"
            if distributed.get_rank() == 0:
                path.mkdir(parents=True)
                (folder / name / "latest_checkpointed_iteration.txt").write_text("7")
            distributed.barrier()
            state = {**model.sharded_state_dict(), "args": argparse.Namespace(**arguments), "iteration": 7}
            dist_checkpointing.save(state, str(path))
    return found
