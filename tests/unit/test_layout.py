"""Layouts: every rank has one place, groups partition the ranks, stages partition the layers."""

import itertools

import pytest

from megarlhf.parallel.layout import ParallelLayout

LAYOUTS = [ParallelLayout(tp=tp, pp=pp, dp=dp) for tp, pp, dp in itertools.product((1, 2, 4), (1, 3), (1, 5))]
SIZES = {"num_layers": 8, "num_heads": 4, "num_kv_heads": 2, "hidden_size": 32, "ffn_size": 128, "padded_vocab_size": 256}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ranks_and_places_are_one_to_one_with_tp_fastest_and_pp_slowest(layout):
    places = list(itertools.product(range(layout.pp), range(layout.dp), range(layout.tp)))
    assert len(places) == layout.num_ranks
    for rank, (pp, dp, tp) in enumerate(places):
        place = layout.coordinates(rank)
        assert (place.pp, place.dp, place.tp) == (pp, dp, tp)
        assert layout.rank(tp=tp, dp=dp, pp=pp) == rank


@pytest.mark.parametrize("layout", LAYOUTS[-4:], ids=str)
@pytest.mark.parametrize("axes", ["tp", "dp", "pp", "tp,pp", "dp,pp", "tp,dp,pp"])
def test_peers_partition_the_ranks_and_differ_along_their_axes_only(layout, axes):
    peers = layout.peers(axes)
    assert sorted(itertools.chain(*peers)) == list(range(layout.num_ranks))
    size = 1
    for axis in axes.split(","):
        size *= getattr(layout, axis)
    for ranks in peers:
        assert len(ranks) == size and ranks == sorted(ranks)
        for axis in {"tp", "dp", "pp"} - set(axes.split(",")):
            assert len({getattr(layout.coordinates(rank), axis) for rank in ranks}) == 1


def test_activations_and_gradients_meet_between_two_stages_of_several_chunks():
    layouts = [(pp, virtual_pp) for pp in range(2, 6) for virtual_pp in range(1, 4)]
    meet = [(pp, virtual_pp) for pp, virtual_pp in layouts if ParallelLayout(pp=pp, virtual_pp=virtual_pp).messages_meet]
    assert meet == [(2, 2), (2, 3)]


@pytest.mark.parametrize(("pp", "virtual_pp"), [(1, 1), (2, 1), (4, 1), (2, 2), (4, 2), (2, 4)])
def test_chunks_partition_the_layers_in_the_order_in_which_activations_travel(pp, virtual_pp):
    layout = ParallelLayout(pp=pp, virtual_pp=virtual_pp)
    chunks = [layout.chunks(8, stage) for stage in range(pp)]
    travelled = [layer for v in range(virtual_pp) for stage in range(pp) for layer in chunks[stage][v]]
    assert travelled == list(range(8))
    for stage, layers in enumerate(chunks):
        assert all(layout.stage_of_layer(8, layer) == stage for layer in itertools.chain(*layers))


def test_what_remains_of_the_ranks_is_data_parallel():
    assert ParallelLayout.over(24, tp=2, pp=3) == ParallelLayout(tp=2, pp=3, dp=4)
    with pytest.raises(ValueError, match=r"tp 2 x pp 3 = 6 ranks per copy does not divide the 8 ranks .* 8 % 6 = 2"):
        ParallelLayout.over(8, tp=2, pp=3)


def test_violations_are_all_named_with_their_numbers():
    assert ParallelLayout(tp=2, pp=4, virtual_pp=2, sequence_parallel=True).violations(**SIZES) == []
    found = ParallelLayout(tp=3, pp=3).violations(**SIZES)
    assert found[0] == "num_layers 8 must be divisible by pp * virtual_pp = 3 * 1; 8 % 3 = 2"
    assert "num_kv_heads 2 must be divisible by tp 3; 2 % 3 = 2" in found and len(found) == 6
    assert ParallelLayout(virtual_pp=2).violations(**SIZES) == ["virtual_pp 2 needs pp > 1"]
    assert ParallelLayout(sequence_parallel=True).violations(**SIZES) == ["sequence_parallel needs tp > 1"]
