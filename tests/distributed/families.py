"""Small random models of transformers, one of each family and variant, with what ours must agree with."""

import json

import torch

from megarlhf.conversion.configuration import architecture_from_hf
from megarlhf.conversion.families import FAMILIES
from megarlhf.conversion.forms import to_ours
from megarlhf.models.parameters import parameter_specs
from tests.distributed.training import VOCAB, texts

CONTEXT = 32
NEW_TOKENS = 6
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,
}
GPT2 = {"vocab_size": VOCAB, "n_positions": CONTEXT, "n_embd": 32, "n_layer": 5, "n_head": 8, "initializer_range": 0.2}
NEOX = {**SIZES, "intermediate_size": 64}
OPT = {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2, "dropout": 0.0}
LLAMA = {**SIZES, "intermediate_size": 48, "rms_norm_eps": 1e-5, "num_key_value_heads": 2}
NINE_HEADS = {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 6}
SERIAL = {"use_parallel_residual": False}


def rope(kind="default", theta=10000.0, **others):
    """rope_parameters of a configuration."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **others}}


# a small base, so that all three kinds of frequencies occur in so short a context
LLAMA3 = rope("llama3", 500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=24)
CONFIGS = {
    "gpt2": ("GPT2Config", GPT2),
    "gpt2-gelu": ("GPT2Config", {**GPT2, "n_inner": 40, "activation_function": "gelu"}),
    "neox": ("GPTNeoXConfig", {**NEOX, **rope(partial_rotary_factor=0.5)}),
    "neox-serial": ("GPTNeoXConfig", {**NEOX, **rope(partial_rotary_factor=1.0), **SERIAL, "tie_word_embeddings": True}),
    "opt": ("OPTConfig", OPT),
    "llama2": ("LlamaConfig", {**LLAMA, "num_key_value_heads": 8, **rope("linear", factor=2.0)}),
    "llama3": ("LlamaConfig", {**LLAMA, **LLAMA3}),
    "llama-biased": ("LlamaConfig", {**LLAMA, **rope(), "attention_bias": True, "mlp_bias": True}),
    "smollm2": ("LlamaConfig", {**LLAMA, **rope(theta=100000.0), "tie_word_embeddings": True}),
    "smollm2-9-heads": ("LlamaConfig", {**LLAMA, **NINE_HEADS, **rope(theta=100000.0), "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**LLAMA, **rope(theta=1e6), "sliding_window": None, "head_dim": 8}),
    "qwen2": ("Qwen2Config", {**LLAMA, **rope(theta=1e6), "num_key_value_heads": 1}),
    "qwen3": ("Qwen3Config", {**LLAMA, **rope(theta=1e6), "head_dim": 6, "tie_word_embeddings": True}),
}
"""Name -> (class of transformers' configuration, its arguments)."""


def make(name, folder, *, head="lm", dtype=torch.float32, **saving):
    """A language model, or a classifier with one label, with random weights, biases and norms, saved in `folder`."""
    import transformers  # here, so that ranks do not spend seconds on it

    torch.manual_seed(0)
    class_name, arguments = CONFIGS[name]
    config = getattr(transformers, class_name)(**arguments, **({} if head == "lm" else {"num_labels": 1, "pad_token_id": 0}))
    kind = transformers.AutoModelForCausalLM if head == "lm" else transformers.AutoModelForSequenceClassification
    model = kind.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, so that none is left out unseen
            parameter.add_(torch.randn_like(parameter), alpha=0.1 if parameter.dim() == 1 else 0.0)
    model.to(dtype).save_pretrained(folder, **saving)
    return model


def make_tokenizer(folder, *, vocab_size=VOCAB):
    """A byte-level tokenizer with special tokens and a chat template, as transformers saves it."""
    import tokenizers
    import transformers

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    model.train_from_iterator(["some text to learn from, and some more"] * 3, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    fast.save_pretrained(folder)
    return fast


def read(folder):
    """(architecture, canonical name -> our full parameter, their files' tensors) of a saved language model."""
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    architecture, family = architecture_from_hf(config), FAMILIES[config["model_type"]]
    theirs = {family.aliases.get(name, name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    ours = {}
    for spec in parameter_specs(architecture, "lm"):
        source = family.source(spec.name)
        ours[spec.name] = to_ours(source.form, [theirs[name] for name in source.names], architecture)
        assert ours[spec.name].shape == spec.shape, spec.name
    return architecture, ours, theirs


def expected_of(model):
    """(log-probabilities [batch, seq - 1], loss, gradient norm) of `texts()`, and greedy continuations of its rows' beginnings."""
    batch = texts()
    logits = model(batch.tokens).logits
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, batch.tokens[:, 1:, None])[..., 0]
    loss = -logprobs[batch.loss_mask].mean()
    loss.backward()
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]).norm()
    with torch.no_grad():
        greedy = [continued(model, row[:length]) for row, length in zip(batch.tokens, prompt_lengths(batch), strict=True)]
    return torch.where(batch.loss_mask, logprobs, 0.0).detach(), float(loss.detach()), float(norm), greedy


def prompt_lengths(batch):
    """How much of each row is a prompt: ragged."""
    return [2 + row % 3 for row in range(batch.num_rows)]


def continued(model, row):
    tokens = row.tolist()
    for _ in range(NEW_TOKENS):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens
