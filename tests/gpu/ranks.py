"""What the ranks of a machine find when they train, publish and generate in every layout of theirs: torchrun ... -m tests.gpu.ranks

On NCCL where there are GPUs; without any the same goes over gloo. Rank 0 prints each check before it begins, so that what hangs has a name.
"""

from __future__ import annotations

import itertools
import math
import sys

import torch

from megarlhf.batch import Prompts
from megarlhf.engine.checkpoint import own_part
from megarlhf.engine.frozen import FrozenEngine
from megarlhf.engine.terms import LanguageModelLoss, Term
from megarlhf.engine.trainable import TrainEngine
from megarlhf.generation.generator import Generator
from megarlhf.models.transformer import ModelSpec, build_model, named_parameters
from megarlhf.parallel.collectives import broadcast_object, gather_objects, gather_on_rank_0, largest_of_world, of_every_copy
from megarlhf.parallel.groups import World
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.resharding.publish import Publisher
from tests.distributed.training import ADAM, GPT2, LLAMA, fill, terms_of, texts

TOLERANCES = {"fp32": 1e-3, "bf16": 0.05}
MODELS = {"gpt2": GPT2, "llama": LLAMA}


def layouts(world: World) -> list[ParallelLayout]:
    """All of this many ranks that four layers and four heads allow, with and without virtual stages and sequence parallelism."""
    found = []
    for tp, pp, virtual_pp, sequence_parallel in itertools.product((1, 2, 4), (1, 2, 4), (1, 2), (False, True)):
        is_meant = (virtual_pp == 1 or pp > 1) and (tp > 1 or not sequence_parallel)
        if is_meant and world.size % (tp * pp) == 0 and pp * virtual_pp <= 4:
            found.append(world.layout(tp=tp, pp=pp, virtual_pp=virtual_pp, sequence_parallel=sequence_parallel))
    return found


def say(world: World, text: str) -> None:
    if world.rank == 0:
        print(f"{world.size} ranks on {world.device.type}: {text}", flush=True)


def check_objects(world: World) -> None:
    """What is agreed on by objects and small numbers."""
    say(world, "objects")
    assert gather_objects(world.rank) == list(range(world.size)) and gather_objects("the same") == ["the same"] * world.size
    assert broadcast_object({"of": world.rank}) == {"of": 0} and largest_of_world([world.rank, 3], world) == [max(world.size - 1, 0), 3]
    assert gather_on_rank_0([world.rank] * world.rank, world) == ([[r] * r for r in range(world.size)] if world.rank == 0 else [])
    groups = world.groups(world.layout())
    assert of_every_copy((world.rank, 7), groups) == [[rank, 7] for rank in range(world.size)]
    world.barrier()


def steps_of(world: World, layout: ParallelLayout, name: str, precision: str, **how) -> list[float]:
    """Losses and gradient norms of three steps."""
    spec = ModelSpec(architecture=MODELS[name], head="lm", precision=precision)
    engine = TrainEngine(spec, world.groups(layout), micro_batch_size=2, adam=ADAM, seed=1, **how)
    fill(engine)
    found = []
    for _ in range(3):
        engine.offload.rest()
        result = engine.step(terms_of("gpt2"), learning_rate=1e-3)
        found += [*result.losses.values(), result.grad_norm]
    copied = own_part({"model": engine}).on_host()
    assert copied.bytes > 0 and engine.weights_are_finite()
    return found


def check_training(world: World, precision: str) -> None:
    """The same steps in all layouts, with what is done beside the computation and without."""
    for name in MODELS:
        expected = None
        for layout in layouts(world):
            for how in ({}, {"overlap": True, "offload": ("weights", "gradients", "optimizer")}):
                say(world, f"three steps of {name} in {precision}, {layout} {how or ''}")
                found = steps_of(world, layout, name, precision, **how)
                expected = expected or found
                near = all(math.isclose(a, b, rel_tol=TOLERANCES[precision], abs_tol=1e-3) for a, b in zip(found, expected, strict=True))
                assert near, f"{layout} {how}: {found}, and {expected} in {layouts(world)[0]}"


def check_publishing_and_generating(world: World, precision: str) -> None:
    """From the first layout to all others, bit for bit; the responses are the trainer's, and in float32 the same in all of them."""
    a = LLAMA if precision == "fp32" else GPT2  # whose heads are of whole 16 bytes in bf16, as the varlen kernel wants them
    spec = ModelSpec(architecture=a, head="lm", precision=precision)
    lengths = torch.tensor([5, 2, 4, 3, 5, 1, 2, 5])
    prompts = Prompts(tokens=torch.arange(40).view(8, 5) % 190, lengths=lengths, ids=torch.arange(8))
    expected = None
    for source_layout in layouts(world)[:: max(1, len(layouts(world)) // 3)]:
        source = FrozenEngine(spec, world.groups(source_layout), micro_batch_size=4)
        fill(source)
        for layout in layouts(world):
            if layout.sequence_parallel:
                continue
            for graphs in (False, True) if world.device.type == "cuda" else (False,):
                say(world, f"publish {source_layout} -> {layout} and generate in {precision}{', by CUDA graphs' if graphs else ''}")
                groups = world.groups(layout)
                publisher = Publisher(a, "lm", source.groups, groups)
                chunks = source.transformers if publisher.in_place else build_model(spec, groups)
                for chunk in chunks:
                    chunk.requires_grad_(False)
                target = named_parameters(chunks, groups)
                publisher.publish(source.parameters(), target, version=1)
                publisher.verify(source.parameters(), target)
                generator = Generator(chunks, groups, architecture=a, eos_id=3, pad_id=0)
                how = {"max_new_tokens": [3, 20, 1, 12, 5, 2, 17, 9], "seed": 1, "iteration": 0, "max_batch_size": 4, "cuda_graphs": graphs}
                rollouts = generator.generate(prompts, **how)
                trained = source.logprobs(rollouts, rollouts.response_mask)
                gap = (trained - rollouts.logprobs).abs().max()
                assert gap < (2e-3 if precision == "fp32" else 0.3), f"{layout}: log-probabilities are {gap} apart"
                expected = rollouts.tokens if expected is None else expected
                if precision == "fp32":
                    assert torch.equal(rollouts.tokens, expected), f"{layout} generates other tokens than {layouts(world)[0]}"
                publisher.release(target)


def check_memory(world: World) -> None:
    """That steps and generating keep nothing: what is allocated before and after is the same."""
    if world.device.type != "cuda":
        return
    say(world, "what steps leave allocated")
    for layout in layouts(world):
        spec = ModelSpec(architecture=GPT2, head="lm", precision="bf16")
        engine = TrainEngine(spec, world.groups(layout), micro_batch_size=2, adam=ADAM, seed=1)
        fill(engine)
        held = []
        for _ in range(6):
            engine.step([Term("text", LanguageModelLoss(), texts(8))], learning_rate=1e-3)
            torch.cuda.synchronize()
            held.append(torch.cuda.memory_allocated())
        assert held[3] == held[4] == held[5], f"{layout}: {held} bytes after each step"


def main() -> None:
    world = World.connect(timeout_minutes=5)
    check_objects(world)
    for precision in sys.argv[1:] or TOLERANCES:
        check_training(world, precision)
        check_publishing_and_generating(world, precision)
    check_memory(world)
    say(world, "a second world of the same ranks")
    check_objects(again := world.renewed(timeout_minutes=5))
    say(again, "all found right")
    again.close()


if __name__ == "__main__":
    main()
