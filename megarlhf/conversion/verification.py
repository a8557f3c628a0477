"""A converted model against transformers: both are built, and see the same random tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megarlhf.batch import TextBatch
from megarlhf.conversion.hf_folder import CONFIG, SCORE_BIAS
from megarlhf.conversion.to_hf import Exported
from megarlhf.engine.checkpoint import load_weights
from megarlhf.engine.frozen import FrozenEngine
from megarlhf.models.transformer import ModelSpec
from megarlhf.parallel.groups import World
from megarlhf.storage.files import read_json

TOLERANCE = 1e-4
"""Of a log-probability or a score, in float32."""
ROWS, WIDTH = 4, 64


def check_verifiable() -> None:
    """ValueError where transformers is not installed."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ValueError("--verify compares with transformers, which is not installed: pip install transformers") from error


@torch.no_grad()
def verify(folder: Path, ours: Exported) -> str:
    """Compare the Hugging Face folder with a checkpoint of ours, both computed in float32; returns what was found, in words.

    ValueError where the largest difference of a log-probability (of a score) is above TOLERANCE.
    """
    config = read_json(folder / CONFIG)
    a = ours.architecture
    tokens = torch.randint(0, a.vocab_size, (ROWS, min(WIDTH, a.max_seq_len)), generator=torch.Generator().manual_seed(0))
    if isinstance(pad := config.get("pad_token_id"), int):
        tokens = torch.where(tokens == pad, (pad + 1) % a.vocab_size, tokens)
    expected = _theirs(folder, tokens, ours, score_bias=config.get(SCORE_BIAS, 0.0))
    found = _ours(tokens, ours)
    what = "log-probability" if ours.head == "lm" else "score"
    difference = float((found - expected).abs().max())
    said = f"the largest difference of a {what} from transformers' is {difference:.1e}, over {found.numel()} of random tokens"
    if not difference <= TOLERANCE:
        raise ValueError(f"{folder} and {ours.saved.path} are not the same model: {said}")
    return said


def _theirs(folder: Path, tokens: Tensor, ours: Exported, *, score_bias: float) -> Tensor:
    import transformers

    kind = transformers.AutoModelForCausalLM if ours.head == "lm" else transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()  # not in the file's precision, which would round a head
    if ours.head == "scalar":
        return torch.cat([model(row[None]).logits[:, 0] for row in tokens]) + score_bias
    logprobs = model(tokens).logits[:, :-1].log_softmax(-1)
    return logprobs.gather(-1, tokens[:, 1:, None])[..., 0]


def _ours(tokens: Tensor, exported: Exported) -> Tensor:
    world = World.connect()
    spec = ModelSpec(architecture=exported.architecture, head=exported.head)
    engine = FrozenEngine(spec, world.groups(world.layout()), micro_batch_size=1)
    load_weights(exported.saved, exported.model, engine, average=exported.average)
    if exported.dtype is not None:
        for name, parameter in engine.parameters().items():
            if not name.startswith("scalar_head."):
                parameter.copy_(parameter.to(exported.dtype))
    batch = TextBatch(
        tokens=tokens, lengths=torch.full((len(tokens),), tokens.shape[1]), loss_mask=torch.ones(tokens[:, 1:].shape, dtype=torch.bool)
    )
    found = engine.logprobs(batch, batch.loss_mask) if exported.head == "lm" else engine.scores(batch)
    world.close()
    return found
