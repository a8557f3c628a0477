"""What the tests of the engine share: small models, ragged batches, and the slow obvious versions of what the engine does."""

import dataclasses

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megarlhf.batch import Experience, RankingBatch, TextBatch, ValueTargets
from megarlhf.engine import checkpoint
from megarlhf.engine.optimizer import AdamSettings
from megarlhf.engine.terms import LanguageModelLoss, PolicyLoss, RankingLoss, Term, ValueLoss
from megarlhf.engine.trainable import TrainEngine
from megarlhf.models.architecture import Architecture
from megarlhf.models.parameters import parameter_specs, shards_held
from megarlhf.models.transformer import ModelSpec, initialize
from megarlhf.parallel.collectives import gather_objects
from megarlhf.storage.checkpoints import finish, partial_folder, read_saved

VOCAB = 200  # padded to 256
SIZES = {"num_layers": 4, "hidden_size": 32, "vocab_size": VOCAB, "max_seq_len": 32}
GPT2 = Architecture(num_heads=4, num_kv_heads=4, ffn_size=64, **SIZES)
LLAMA = Architecture(
    **SIZES,
    num_heads=8,
    num_kv_heads=4,
    ffn_size=48,
    norm="rmsnorm",
    activation="swiglu",
    positions="rotary",
    bias=False,
    tied_embeddings=False,
)
QWEN3 = dataclasses.replace(
    LLAMA, num_layers=6, num_kv_heads=2, head_size=6, qk_norm=True, rotary_scaling="linear", rotary_scaling_factor=2.0
)
QWEN2 = dataclasses.replace(LLAMA, num_layers=5, num_kv_heads=1, qkv_bias=True, tied_embeddings=True)
NEOX = dataclasses.replace(
    GPT2, num_layers=7, positions="rotary", rotary_fraction=0.5, parallel_residual=True, activation="relu", tied_embeddings=False
)
SPECS = {
    "gpt2": ModelSpec(architecture=GPT2, head="lm"),
    "deep": ModelSpec(architecture=dataclasses.replace(GPT2, num_layers=10), head="lm"),
    "llama": ModelSpec(architecture=LLAMA, head="lm"),
    "value": ModelSpec(architecture=GPT2, head="scalar"),
    "reward": ModelSpec(architecture=LLAMA, head="scalar"),
    "qwen3": ModelSpec(architecture=QWEN3, head="lm"),
    "qwen2": ModelSpec(architecture=QWEN2, head="lm"),
    "neox": ModelSpec(architecture=NEOX, head="lm"),
    "qwen3-reward": ModelSpec(architecture=QWEN3, head="scalar"),
}
ADAM = AdamSettings(eps=1e-4, weight_decay=0.1)  # eps well above rounding: a key's bias has no gradient but noise, which Adam would magnify
LEARNING_RATE = 3e-3


def build(name, groups, *, micro_batch_size=4, adam=ADAM, seed=1, offload=(), overlap=False, **changes):
    """A trained engine of one of SPECS."""
    spec = dataclasses.replace(SPECS[name], **changes)
    engine = TrainEngine(spec, groups, micro_batch_size=micro_batch_size, adam=adam, seed=seed, offload=offload, overlap=overlap)
    fill(engine, seed=seed)
    return engine


def fill(engine, *, seed=1):
    """Weights that do something: the embedding's standard deviation of 0.02 would leave attention uniform."""
    initialize(engine.transformers, engine.spec, engine.groups, seed=seed, std=0.1)
    if isinstance(engine, TrainEngine):
        engine.optimizer.adopt_parameters()


def ragged(num_rows, width, *, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, width + 1, (num_rows,), generator=generator)
    lengths[num_rows // 2] = width
    tokens = torch.randint(0, VOCAB, (num_rows, width), generator=generator)
    return torch.where(torch.arange(width) < lengths[:, None], tokens, 0), lengths, generator


def episodes(num_rows=10, width=13, *, seed=0):
    """Episodes with responses of ragged lengths; one has an empty response."""
    tokens, lengths, generator = ragged(num_rows, width, seed=seed)
    starts = torch.randint(1, 4, (num_rows, 1), generator=generator)
    position = torch.arange(width - 1)
    mask = (position >= starts) & (position < lengths[:, None] - 1)
    mask[3] = False

    def noise(mean, std):
        return torch.where(mask, mean + std * torch.randn(mask.shape, generator=generator), 0.0)

    rows = {"tokens": tokens, "lengths": lengths, "response_mask": mask}
    old_logprobs, old_values, advantages, returns = noise(-5.3, 0.3), noise(0.0, 1.0), noise(0.0, 1.0), noise(0.5, 1.0)
    policy = Experience(**rows, old_logprobs=old_logprobs, ref_logprobs=noise(-5.3, 0.3), advantages=advantages)
    return policy, ValueTargets(**rows, old_values=old_values, returns=returns)


def experience(num_rows=10, width=13, *, seed=0):
    """Episodes for a policy; see `episodes`."""
    return episodes(num_rows, width, seed=seed)[0]


def value_targets():
    """The same episodes for a value function."""
    return episodes()[1]


def texts(num_rows=7, width=24, *, seed=10):
    tokens, lengths, generator = ragged(num_rows, width, seed=seed)
    real = torch.arange(width - 1) < lengths[:, None] - 1
    return TextBatch(tokens=tokens, lengths=lengths, loss_mask=real & (torch.rand(real.shape, generator=generator) < 0.8))


def rankings(*, seed=20):
    """Five prompts with 2, 4, 9, 3 and 2 completions, ties among them, in no order; all of the last prompt's tie."""
    prompt_index = torch.tensor([0] * 2 + [1] * 4 + [2] * 9 + [3] * 3 + [4] * 2)
    tokens, lengths, generator = ragged(len(prompt_index), 11, seed=seed)
    ranks = torch.randint(1, 5, prompt_index.shape, generator=generator)
    ranks[:2], ranks[-2:] = torch.tensor([2, 1]), 3
    order = torch.randperm(len(prompt_index), generator=generator)
    return RankingBatch(tokens=tokens, lengths=lengths, ranks=ranks[order], prompt_index=prompt_index[order])


def terms_of(name):
    """PPO-ptx for a language model, both scalar losses in one objective for a scalar head."""
    if SPECS[name].head == "lm":
        return [Term("policy", PolicyLoss(clip=0.2), experience()), Term("ptx", LanguageModelLoss(), texts(), weight=27.8)]
    return [Term("value", ValueLoss(clip=0.2), value_targets()), Term("ranking", RankingLoss(), rankings(), weight=2.0)]


def dense_outputs(model, batch, *, head):
    """The model on each row by itself, without padding: log-probabilities and entropies or values [batch, seq - 1], or scores."""
    rows = []
    for row, length in zip(batch.tokens, batch.lengths.tolist(), strict=True):
        tokens = row[None, :length]
        hidden = model(tokens, torch.arange(length)[None], None)
        if head == "lm":
            embedding = model.embedding.word_embeddings.weight
            weight = embedding if model.share_embeddings_and_output_weights else model.output_layer.weight
            logprobs = (hidden[:-1, 0] @ weight[:VOCAB].T).log_softmax(-1)
            rows.append(logprobs.gather(1, tokens[0, 1:, None])[:, 0])
        else:
            rows.append((hidden[:, 0] @ model.scalar_head.weight[0]) + model.scalar_head.bias)
    if head == "lm":
        return torch.stack([F.pad(row, (0, batch.tokens.shape[1] - 1 - len(row))) for row in rows])
    values = torch.stack([F.pad(row[:-1], (0, batch.tokens.shape[1] - len(row))) for row in rows])
    return values, torch.stack([row[-1] for row in rows])


def dense_objective(model, name):
    """The objective of `terms_of` written out."""
    batch = experience()
    mask, count = batch.response_mask, batch.response_mask.sum()
    if SPECS[name].head == "lm":
        ratio = (dense_outputs(model, batch, head="lm")[mask] - batch.old_logprobs[mask]).exp()
        advantages = batch.advantages[mask]
        policy = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum() / count
        text = texts()
        ptx = -dense_outputs(model, text, head="lm")[text.loss_mask].mean()
        return {"policy": policy, "ptx": ptx}, policy + 27.8 * ptx
    targets = value_targets()
    values, old, returns = dense_outputs(model, batch, head="scalar")[0][mask], targets.old_values[mask], targets.returns[mask]
    clipped = old + (values - old).clamp(-0.2, 0.2)
    value = 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2).sum() / count
    ranked = rankings()
    scores = dense_outputs(model, ranked, head="scalar")[1]
    losses = []
    for prompt in range(5):
        rows = (ranked.prompt_index == prompt).nonzero()[:, 0].tolist()
        pairs = [-F.logsigmoid(scores[i] - scores[j]) for i in rows for j in rows if ranked.ranks[i] < ranked.ranks[j]]
        losses += [torch.stack(pairs).mean()] if pairs else []
    ranking = torch.stack(losses).mean()
    return {"value": value, "ranking": ranking}, value + 2.0 * ranking


def outputs(engine):
    """What the engine says of whole batches, before it is trained."""
    batch = experience()
    if engine.spec.head == "lm":
        return [engine.logprobs(batch, batch.response_mask)]
    return [engine.values(batch, batch.response_mask), engine.scores(batch), engine.scores(rankings())]


def local_weights(engine):
    """This rank's weights, as they travel to the test: canonical name -> a copy."""
    return {name: parameter.detach().clone() for name, parameter in engine.parameters().items()}


def assembled(shards_of_rank, name, layout):
    """Canonical name -> full parameter from every rank's `local_weights`; what several ranks hold must be bitwise equal."""
    return assemble(shards_of_rank, SPECS[name].architecture, SPECS[name].head, layout)


def assemble(shards_of_rank, architecture, head, layout):
    """`assembled`, of any model."""
    dtype = next(iter(shards_of_rank[0].values())).dtype
    whole = {p.name: torch.full(p.shape, torch.nan, dtype=dtype) for p in parameter_specs(architecture, head)}
    for rank, shards in enumerate(shards_of_rank):
        held = shards_held(architecture, head, layout, layout.coordinates(rank))
        assert held.keys() == shards.keys()
        for parameter, shard in held.items():
            for start, piece in shard.placed():
                target = whole[parameter].narrow(shard.dim, piece.start, piece.size)
                part = shards[parameter].narrow(shard.dim, start, piece.size)
                assert target.isnan().all() or torch.equal(target, part), (layout, rank, parameter)
                target.copy_(part)
    assert not any(value.isnan().any() for value in whole.values())
    return whole


def whole_state(engine):
    """Kind -> canonical name -> float32 tensor shaped as this rank's parameter: all of an engine's state, summed over its shards."""
    shards = {shard.parameter: shard for shard in engine.optimizer.shards()}
    moments = engine.optimizer.moments()
    kinds = {
        "weights": {p: shard.main for p, shard in shards.items()},
        "exp_avg": {p: moments[p][0] for p in shards},
        "exp_avg_sq": {p: moments[p][1] for p in shards},
    }
    if engine.ema is not None:
        kinds["ema"] = engine.ema.averages

    def joined(parameter, piece):
        whole = torch.zeros(parameter.numel())
        if piece is not None:
            start = shards[parameter].start
            whole[start : start + piece.numel()] = piece.detach().view(-1)
        dist.all_reduce(whole, group=engine.groups.dp)
        return whole.view(parameter.shape)

    return {kind: {name: joined(p, values.get(p)) for name, p in engine.parameters().items()} for kind, values in kinds.items()}


def write_checkpoint(path, engines, state, world):
    """A checkpoint of `engines` at `path`, as a run writes it; returns what is read of it."""
    if world.rank == 0:
        partial_folder(path).mkdir(parents=True)
    world.barrier()
    parts = gather_objects(checkpoint.own_part(engines).write(path, world.rank))
    if world.rank == 0:
        finish(path, parts, state, {name: checkpoint.describe(engine) for name, engine in engines.items()})
    world.barrier()
    return read_saved(path)
