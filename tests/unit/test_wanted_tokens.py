"""What a step leaves out, seen on tensors without values: tokens that nothing is read of, and exchanges of a single copy with itself."""

from collections import Counter

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from megarlhf.engine.trainable import TrainEngine
from megarlhf.planning.dry_run import Recorder
from megarlhf.planning.fake_world import DEVICE, fake_world
from megarlhf.planning.meter import Meter
from tests.distributed.training import ADAM, SPECS, terms_of


class Exchanges(TorchDispatchMode):
    """Counts collectives by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.calls[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def tokens_through(model, terms, **layout):
    """(tokens that the feed-forward of each layer saw in a step, the collectives of the step)."""
    with fake_world(0, 2) as world, Meter(DEVICE) as meter:
        groups = world.groups(world.layout(**layout))
        Recorder(world, meter, gpus_per_node=2).use(groups)
        engine = TrainEngine(SPECS[model], groups, micro_batch_size=3, adam=ADAM, seed=1)
        (transformer,) = engine.transformers
        seen = Counter()
        for number, layer in enumerate(transformer.decoder.layers):
            layer.mlp.register_forward_pre_hook(lambda module, args, number=number: seen.update({number: args[0].shape[0]}))
        with Exchanges() as exchanges:
            engine.step(terms, learning_rate=1e-3)
        return [seen[number] for number in range(len(transformer.decoder.layers))], exchanges.calls


@pytest.mark.parametrize("model", ["gpt2", "value", "neox"])
def test_the_last_layer_goes_on_with_the_wanted_tokens_alone(model):
    terms = terms_of(model)
    tokens = sum(int(term.batch.lengths.sum()) for term in terms)
    positions = [term.loss.positions(term.batch) for term in terms]
    wanted = sum(term.batch.num_rows if at is None else int(at.sum()) for term, at in zip(terms, positions, strict=True))
    *before, last = tokens_through(model, terms, tp=2)[0]
    assert wanted < tokens and set(before) == {tokens} and last == wanted


def test_one_copy_sends_nothing_to_itself():
    of_one, of_two = (tokens_through("gpt2", terms_of("gpt2"), **layout)[1] for layout in ({"tp": 2}, {}))
    gathers = {name for calls in (of_one, of_two) for name in calls if "gather" in name or "scatter" in name}
    assert any(of_two[name] for name in gathers) and not any(of_one[name] for name in gathers), (of_one, of_two)
