"""The same code on a CUDA device: run where there is one, skipped elsewhere."""

import warnings
from unittest import mock

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from megarlhf.batch import Prompts, TextBatch
from megarlhf.engine.engine import Engine
from megarlhf.engine.frozen import FrozenEngine
from megarlhf.engine.offload import distinct
from megarlhf.engine.optimizer import AdamSettings
from megarlhf.engine.terms import LanguageModelLoss, Term
from megarlhf.engine.trainable import TrainEngine
from megarlhf.generation.generator import Generator
from megarlhf.models import vocab_head
from megarlhf.models.architecture import make_architecture
from megarlhf.models.linear import add_float32_product, float32_product
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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_in_cuda_graphs_are_the_ordinary_ones(world, precision):
    """Ragged limits and fewer slots than rows: batches of many sizes. In bf16 another kernel attends, and near ties may fall otherwise."""
    spec = ModelSpec(architecture=ARCHITECTURE, head="lm", precision=precision)
    engine = filled(FrozenEngine(spec, world.groups(world.layout()), micro_batch_size=8))
    generator = Generator(engine.transformers, engine.groups, architecture=ARCHITECTURE, eos_id=7, pad_id=0)
    prompts = Prompts(tokens=texts(24).tokens[:, :20], lengths=torch.arange(24) % 20 + 1, ids=torch.arange(24))
    how = {"max_new_tokens": [1 + 7 * row % 60 for row in range(24)], "seed": 1, "iteration": 0, "max_batch_size": 10}
    ordinary = generator.generate(prompts, **how)
    repeated = generator.generate(prompts, cuda_graphs=True, **how)
    again = generator.generate(prompts, cuda_graphs=True, **how)
    assert torch.equal(repeated.tokens, again.tokens)
    trained = engine.logprobs(repeated, repeated.response_mask)
    if precision == "fp32":
        assert torch.equal(repeated.tokens, ordinary.tokens)
        torch.testing.assert_close(repeated.logprobs, ordinary.logprobs, atol=1e-4, rtol=1e-4)
    else:
        first = prompts.lengths  # the first tokens come from the same prefill
        assert (repeated.tokens[range(24), first] == ordinary.tokens[range(24), first]).float().mean() > 0.9
    torch.testing.assert_close(trained, repeated.logprobs, atol=2e-3 if precision == "fp32" else 0.1, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_behind_logits_are_left_in_float32(dtype):
    generator = torch.Generator().manual_seed(2)
    x, weight = (torch.randn(n, 256, generator=generator).to("cuda", dtype) for n in (40, 500))
    found, exact = float32_product(x, weight.t()), x.double() @ weight.double().T
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-3)
    twice = add_float32_product(found.clone(), x, weight.t())
    torch.testing.assert_close(twice, 2 * found, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk_rows", [16, 64])
def test_log_probabilities_in_chunks_are_the_dense_ones(world, dtype, chunk_rows):
    generator = torch.Generator().manual_seed(3)
    x, weight = (torch.randn(n, 256, generator=generator).mul(0.1).to("cuda", dtype).requires_grad_() for n in (50, 512))
    targets = torch.randint(0, 500, (50,), generator=generator).cuda()
    with mock.patch.object(vocab_head, "CHUNK_ELEMENTS", chunk_rows * 512):
        found, _ = vocab_head.head_logprobs(x, weight, targets, vocab_size=500, tp=world.groups(world.layout()).tp)
        grads = torch.autograd.grad(found.sum(), [x, weight])
    dense = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = (dense[0] @ dense[1][:500].T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)
    for grad, right in zip(grads, torch.autograd.grad(expected.sum(), dense), strict=True):
        torch.testing.assert_close(grad.double(), right, rtol=2e-2, atol=2e-2)


def test_a_step_waits_for_the_device_once_whatever_the_number_of_micro_batches(world):
    spec, batch = ModelSpec(architecture=ARCHITECTURE, head="lm", precision="bf16"), texts()
    for size in (8, 1):
        engine = filled(TrainEngine(spec, world.groups(world.layout()), micro_batch_size=size, adam=AdamSettings(), seed=1))
        step = lambda engine=engine: engine.step([Term("text", LanguageModelLoss(), batch)], learning_rate=1e-3)  # noqa: E731
        step()
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits = [str(warning.message) for warning in seen if "synchronizing CUDA operation" in str(warning.message)]
        assert len(waits) == 1, waits


EVERYTHING = ("weights", "gradients", "optimizer", "average")


def storages(engine: Engine) -> list[torch.UntypedStorage]:
    """What an engine holds beside single numbers, each storage once."""
    found = {t.untyped_storage()._cdata: t.untyped_storage() for kind in distinct(engine.held()).values() for t in kind if t.numel() > 1}
    return list(found.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_rests_gives_its_memory_back_and_trains_on_as_if_it_had_not(world, precision):
    """The losses are those of an engine that never rests, but for kernels that add in another order each time."""
    spec, groups = ModelSpec(architecture=ARCHITECTURE, head="lm", precision=precision), world.groups(world.layout())
    how = {"micro_batch_size": 4, "adam": AdamSettings(), "seed": 1}
    plain, resting = (filled(TrainEngine(spec, groups, **how, offload=kinds)) for kinds in ((), EVERYTHING))
    losses = []
    for engine in (plain, resting):
        engine.start_ema(0.9)
        for _ in range(4):
            engine.offload.rest()
            losses.append(engine.step([Term("text", LanguageModelLoss(), texts())], learning_rate=1e-3).losses["text"])
            engine.ema.update()
    assert losses[:4] == pytest.approx(losses[4:], rel=1e-2 if precision == "bf16" else 1e-4)
    torch.cuda.synchronize()
    before, held = torch.cuda.memory_allocated(), sum(storage.nbytes() for storage in storages(resting))
    resting.offload.rest()
    torch.cuda.synchronize()
    assert before - torch.cuda.memory_allocated() >= held > 0 and not any(storage.nbytes() for storage in storages(resting))
    buffers = [moved.host for group in resting.offload._groups.values() for moved in group.moved.values() if moved.host is not None]
    assert buffers and all(buffer.is_pinned() for buffer in buffers)
    resting.offload.need(*EVERYTHING)
    assert torch.cuda.memory_allocated() >= before and groups.side_stream.take_seconds() > 0


def test_copies_wait_for_what_the_device_is_doing_and_are_waited_for(world):
    """Weights that are still being written go to the host as they will be, memory in between is somebody else's, and all come back."""
    spec, groups = ModelSpec(architecture=ARCHITECTURE, head="lm"), world.groups(world.layout())
    engine = filled(TrainEngine(spec, groups, micro_batch_size=4, adam=AdamSettings(), seed=1, offload=("weights",)))
    slow = torch.randn(8192, 8192, device="cuda")
    for round_number in range(3):
        expected = {name: weight.detach().clone() + 1 for name, weight in engine.parameters().items()}
        for _ in range(8):
            slow = (slow @ slow).clamp(-1, 1)
        for weight in engine.parameters().values():
            weight.data.add_(1)  # queued behind the products
        engine.offload.rest()
        others = [torch.full((1 << 18,), float(round_number), device="cuda") for _ in range(32)]  # where the weights may have been
        engine.offload.send_for("weights")
        engine.offload.need("weights")
        for name, weight in engine.parameters().items():
            assert torch.equal(weight.detach(), expected[name]), name
        assert all((other == round_number).all() for other in others)
