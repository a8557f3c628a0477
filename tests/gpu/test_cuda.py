"""The same code on a CUDA device: run where there is one, skipped elsewhere."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from megarlhf.batch import Prompts, TextBatch
from megarlhf.engine.engine import Engine
from megarlhf.engine.frozen import FrozenEngine
from megarlhf.engine.optimizer import AdamSettings
from megarlhf.engine.terms import LanguageModelLoss, Term
from megarlhf.engine.trainable import TrainEngine
from megarlhf.generation.generator import Generator
from megarlhf.models.architecture import make_architecture
from megarlhf.models.linear import float32_linear
from megarlhf.models.transformer import ModelSpec, initialize
from megarlhf.parallel.groups import World

ARCHITECTURE = make_architecture(None, vocab_size=500, num_layers=4, hidden_size=128, num_heads=4, max_seq_len=128)


@pytest.fixture(scope="module")
def world():
    """A world of this one GPU."""
    world = World.connect()
    yield world
    world.close()


def filled(engine: Engine) -> Engine:
    initialize(engine.transformers, engine.spec, engine.groups, seed=3, std=0.1)
    if isinstance(engine, TrainEngine):
        engine.optimizer.adopt_parameters()
    return engine


def texts(rows: int = 8, width: int = 48) -> TextBatch:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(width // 2, width + 1, (rows,), generator=generator)
    mask = torch.arange(width - 1)[None] < lengths[:, None] - 1
    return TextBatch(tokens=torch.randint(0, 500, (rows, width), generator=generator), lengths=lengths, loss_mask=mask)


def dense_logprobs(engine: FrozenEngine, batch: TextBatch) -> torch.Tensor:
    """The whole batch at once, on the GPU, through the dense formula."""
    model = engine.transformers[0]
    tokens = batch.tokens.cuda()
    positions = torch.arange(tokens.shape[1], device="cuda")[None].expand_as(tokens)
    logits = model.logits(model.full_hidden(model(tokens, positions, None))).transpose(0, 1)[..., :500].float()
    return logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


def test_logprobs_equal_the_dense_formula(world):
    engine = filled(FrozenEngine(ModelSpec(architecture=ARCHITECTURE, head="lm"), world.groups(world.layout()), micro_batch_size=3))
    batch = texts()
    with torch.no_grad():
        expected = torch.where(batch.loss_mask, dense_logprobs(engine, batch).cpu(), 0.0)
    torch.testing.assert_close(engine.logprobs(batch, batch.loss_mask), expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_lowers_the_loss(world, precision):
    spec = ModelSpec(architecture=ARCHITECTURE, head="lm", precision=precision)
    engine = filled(TrainEngine(spec, world.groups(world.layout()), micro_batch_size=4, adam=AdamSettings(), seed=1))
    batch = texts()
    losses = []
    for _ in range(20):
        result = engine.step([Term("text", LanguageModelLoss(), batch)], learning_rate=1e-3)
        losses += [] if result.skipped else [result.losses["text"]]
    assert losses[-1] < losses[0] - 0.5


def test_generator_and_trainer_agree(world):
    engine = filled(FrozenEngine(ModelSpec(architecture=ARCHITECTURE, head="lm"), world.groups(world.layout()), micro_batch_size=8))
    generator = Generator(engine.transformers, engine.groups, architecture=ARCHITECTURE, eos_id=7, pad_id=0)
    prompts = Prompts(tokens=texts().tokens[:, :20], lengths=torch.full((8,), 20), ids=torch.arange(8))
    rollouts = generator.generate(prompts, max_new_tokens=24, seed=1, iteration=0)
    trained = engine.logprobs(rollouts, rollouts.response_mask)
    torch.testing.assert_close(trained, rollouts.logprobs, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_are_left_in_float32(dtype):
    generator = torch.Generator().manual_seed(2)
    x, weight = (torch.randn(n, 256, generator=generator).to("cuda", dtype).requires_grad_() for n in (40, 500))
    found, exact = float32_linear(x, weight), x.detach().double() @ weight.detach().double().T
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-3)
    towards = torch.randn(40, 500, generator=generator).cuda()
    for grad, right in zip(
        torch.autograd.grad((found * towards).sum(), [x, weight]),
        (towards.double() @ weight.detach().double(), towards.double().T @ x.detach().double()),
        strict=True,
    ):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), right, rtol=2e-2, atol=0.3)
