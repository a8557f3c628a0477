"""What the host reads of the device in an optimizer step, counted on tensors without values, which can answer no other question."""

from collections import Counter

import pytest
import torch

from megarlhf.engine.trainable import TrainEngine
from megarlhf.planning.dry_run import Recorder
from megarlhf.planning.fake_world import DEVICE, fake_world
from tests.distributed.training import ADAM, SPECS, terms_of
from tests.unit.apart import ApartFromHost


class ReadsCounted(ApartFromHost):
    """Counts numbers read by the host, and tensors copied to it."""

    def __init__(self):
        super().__init__(DEVICE)
        self.reads = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        to_host = str((kwargs or {}).get("device", "")) == "cpu" or func is torch.ops.aten._local_scalar_dense.default
        if to_host and any(isinstance(arg, torch.Tensor) and arg.device == DEVICE for arg in args):
            self.reads[str(func)] += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize("name", ["gpt2", "value", "reward", "qwen3-reward", "llama"])
def test_a_step_waits_for_the_device_once_whatever_the_number_of_micro_batches(name):
    with fake_world(0, 4) as world, ReadsCounted() as meter:
        groups = world.groups(world.layout(tp=2))
        Recorder(world, meter, gpus_per_node=4).use(groups)
        for size, overlap in ((100, False), (2, True), (1, False)):
            engine = TrainEngine(SPECS[name], groups, micro_batch_size=size, adam=ADAM, seed=1, overlap=overlap)
            passes = sum(len(engine.shares(term.batch)[0]) for term in terms_of(name))
            meter.reads.clear()
            engine.step(terms_of(name), learning_rate=1e-3)
            assert meter.reads.total() == 1, f"{passes} micro-batches: {meter.reads}"
