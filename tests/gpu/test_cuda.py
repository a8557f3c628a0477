"""The same code on a CUDA device: run where there is one, skipped elsewhere."""

import warnings
from unittest import mock

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from megarlhf.batch import Experience, Prompts, TextBatch
from megarlhf.engine.checkpoint import describe, load, own_part
from megarlhf.engine.engine import Engine
from megarlhf.engine.frozen import FrozenEngine
from megarlhf.engine.offload import distinct
from megarlhf.engine.optimizer import AdamSettings
from megarlhf.engine.terms import LanguageModelLoss, PolicyLoss, Term
from megarlhf.engine.trainable import TrainEngine
from megarlhf.generation.generator import Generator
from megarlhf.generation.sampling import Sampling, sample_tokens
from megarlhf.models import vocab_head
from megarlhf.models.architecture import make_architecture
from megarlhf.models.attention import PackedRows, apart_by_heads, has_varlen_kernel
from megarlhf.models.linear import add_float32_product, float32_product
from megarlhf.models.transformer import ModelSpec, initialize
from megarlhf.parallel.groups import World
from megarlhf.storage.checkpoints import finish, partial_folder, read_saved

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
    buffers = [piece for group in resting.offload._groups.values() for moved in group.moved.values() for piece in moved.host or ()]
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("kv_heads", "per_head", "head_size"), [(4, 1, 64), (2, 3, 128), (1, 8, 80), (2, 1, 256)])
def test_packed_rows_attend_as_each_row_by_itself(dtype, kv_heads, per_head, head_size):
    """By torch's varlen kernel, forward and backward, against float64."""
    if not has_varlen_kernel(torch.device("cuda", 0), dtype, head_size):
        pytest.skip("this torch (before 2.12) or GPU lacks the kernel: rows are padded instead")
    lengths = (7, 130, 1, 64)
    generator = torch.Generator().manual_seed(4)
    mixed = torch.randn(sum(lengths), kv_heads, per_head + 2, head_size, generator=generator).to("cuda", dtype).requires_grad_()
    found = PackedRows(lengths, mixed.device).attend([mixed])
    exact = mixed.detach().double().requires_grad_()
    query, key, value = apart_by_heads([exact])
    rows = []
    for q, k, v in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
        k, v = (x.repeat_interleave(per_head, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * head_size**-0.5
        scores = scores.masked_fill(torch.ones(len(q), len(q), device="cuda", dtype=torch.bool).triu(1), -torch.inf)
        rows.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1))
    expected = torch.cat(rows)
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)
    ones = torch.randn(expected.shape, generator=generator).cuda()
    found.backward(ones.to(dtype))
    expected.backward(ones.double())
    torch.testing.assert_close(mixed.grad.double(), exact.grad, rtol=5e-2, atol=5e-2)


def test_float32_is_multiplied_in_float32(world):
    """TF32 would be wrong in the fourth digit, whatever the environment of an image says."""
    a, b = (torch.randn(512, 512, device="cuda") for _ in range(2))
    torch.testing.assert_close((a @ b).double(), a.double() @ b.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_first_minibatch_has_a_ratio_of_exactly_one(world, precision):
    spec = ModelSpec(architecture=ARCHITECTURE, head="lm", precision=precision)
    engine = filled(TrainEngine(spec, world.groups(world.layout()), micro_batch_size=3, adam=AdamSettings(), seed=1))
    batch = texts()
    old = engine.logprobs(batch, batch.loss_mask)
    rows = {"tokens": batch.tokens, "lengths": batch.lengths, "response_mask": batch.loss_mask}
    experience = Experience(**rows, old_logprobs=old, ref_logprobs=old, advantages=torch.ones_like(old))
    result = engine.step([Term("policy", PolicyLoss(clip=0.2), experience)], learning_rate=1e-3)
    assert result.stats["policy/ratio"] == (int(batch.loss_mask.sum()),) * 2 and result.stats["policy/approx_kl"][0] == 0.0


def test_sampling_on_the_device_is_that_of_the_host():
    generator = torch.Generator().manual_seed(6)
    logits = 3 * torch.randn(2000, 512, generator=generator)
    keys = {"seed": 3, "iteration": 5, "samples": torch.arange(2000), "positions": torch.arange(2000) % 77}
    for how in ({}, {"temperature": 0.7, "top_k": 20}, {"top_p": 0.8}, {"temperature": 0.0}):
        host = sample_tokens(logits.clone(), Sampling(**how), vocab_size=500, tp=None, **keys)
        on_device = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in keys.items()}
        device = sample_tokens(logits.cuda(), Sampling(**how), vocab_size=500, tp=None, **on_device)
        same = host[0] == device[0].cpu()
        assert same.float().mean() > 0.998, how  # another rounding of a logarithm may decide what is nearly equal
        torch.testing.assert_close(host[1][same], device[1].cpu()[same], atol=1e-5, rtol=1e-5)


def test_a_checkpoint_is_copied_to_pinned_memory_and_training_goes_on_from_it(world, tmp_path):
    """The copy keeps what it was while steps follow; an engine that is filled from its file takes the same next step."""
    spec, groups = ModelSpec(architecture=ARCHITECTURE, head="lm", precision="bf16"), world.groups(world.layout())
    how = {"micro_batch_size": 4, "adam": AdamSettings(), "seed": 1}
    engine, step = filled(TrainEngine(spec, groups, **how)), [Term("text", LanguageModelLoss(), texts())]
    for _ in range(2):
        engine.step(step, learning_rate=1e-3)
    part = own_part({"model": engine})
    before = {kind: {name: values.cpu().clone() for name, values in entries.items()} for kind, entries in part.tensors["model"].items()}
    copied, described = part.on_host(), describe(engine)
    expected = engine.step(step, learning_rate=1e-3)
    for kind, entries in copied.tensors["model"].items():
        assert all(values.is_pinned() and torch.equal(values, before[kind][name]) for name, values in entries.items())
    path = tmp_path / "step_00000002"
    partial_folder(path).mkdir()
    finish(path, [copied.write(path, 0)], {"step": 2}, {"model": described})
    resumed = TrainEngine(spec, groups, **how)
    load(read_saved(path), {"model": resumed})
    assert all(state["step"].device.type == "cuda" for state in resumed.optimizer.adam.state.values() if "step" in state)
    found = resumed.step(step, learning_rate=1e-3)
    assert found.losses["text"] == pytest.approx(expected.losses["text"], rel=1e-3)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-2)


@pytest.mark.parametrize("graphs", [False, True])
def test_generating_leaves_nothing_allocated(world, graphs):
    spec = ModelSpec(architecture=ARCHITECTURE, head="lm", precision="bf16")
    engine = filled(FrozenEngine(spec, world.groups(world.layout()), micro_batch_size=8))
    generator = Generator(engine.transformers, engine.groups, architecture=ARCHITECTURE, eos_id=7, pad_id=0)
    prompts = Prompts(tokens=texts().tokens[:, :20], lengths=torch.full((8,), 20), ids=torch.arange(8))
    held = []
    for iteration in range(4):
        generator.generate(prompts, max_new_tokens=24, seed=1, iteration=iteration, cuda_graphs=graphs)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert held[1] == held[2] == held[3], held


def test_steps_leave_nothing_allocated(world):
    spec = ModelSpec(architecture=ARCHITECTURE, head="lm", precision="bf16")
    engine = filled(TrainEngine(spec, world.groups(world.layout()), micro_batch_size=3, adam=AdamSettings(), seed=1))
    held = []
    for _ in range(5):
        engine.step([Term("text", LanguageModelLoss(), texts())], learning_rate=1e-3)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert held[2] == held[3] == held[4], held
