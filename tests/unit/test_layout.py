"""Layouts: every rank has one place, groups partition the ranks, stages partition the layers."""

import dataclasses
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


STRIDED = [ParallelLayout(tp=2, dp=2, tp_stride=2), ParallelLayout(tp=2, pp=4, dp=3, tp_stride=6), ParallelLayout(tp=3, pp=4, tp_stride=2)]


@pytest.mark.parametrize("layout", STRIDED, ids=str)
def test_tensor_parallel_peers_may_be_apart(layout):
    places = [layout.coordinates(rank) for rank in range(layout.num_ranks)]
    assert len(set(places)) == layout.num_ranks
    assert all(layout.rank(tp=place.tp, dp=place.dp, pp=place.pp) == rank for rank, place in enumerate(places))
    for axis in ("tp", "dp", "pp"):
        for ranks in layout.peers(axis):  # process groups sort their ranks: the place in the group is that along the axis
            assert [getattr(places[rank], axis) for rank in ranks] == list(range(getattr(layout, axis)))
    assert {b - a for ranks in layout.peers("tp") for a, b in itertools.pairwise(ranks)} == {layout.tp_stride}
    with pytest.raises(ValueError, match=r"tp_stride 4 must divide pp \* dp = 1 \* 2 = 2"):
        ParallelLayout(dp=2, tp_stride=4)


@pytest.mark.parametrize("layout", LAYOUTS[-4:] + STRIDED, ids=str)
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


@pytest.mark.parametrize("first_rank", [2, 5])
def test_a_layout_over_later_ranks_is_the_same_further_on(first_rank):
    for layout in (*LAYOUTS, *STRIDED):
        later = dataclasses.replace(layout, first_rank=first_rank)
        assert list(later.ranks) == [rank + first_rank for rank in layout.ranks]
        for rank, earlier in zip(later.ranks, layout.ranks, strict=True):
            place = later.coordinates(rank)
            assert place == layout.coordinates(earlier) and later.rank(tp=place.tp, dp=place.dp, pp=place.pp) == rank
        assert later.peers("tp,pp") == [[rank + first_rank for rank in ranks] for ranks in layout.peers("tp,pp")]
        assert str(later) == f"{layout} from rank {first_rank} on"


def test_what_goes_on_and_what_comes_back_meet_between_two_stages():
    layouts = [(pp, virtual_pp) for pp in range(2, 6) for virtual_pp in range(1, 4)]
    meet = [(pp, virtual_pp) for pp, virtual_pp in layouts if ParallelLayout(pp=pp, virtual_pp=virtual_pp).messages_meet]
    assert meet == [(2, 1), (2, 2), (2, 3)]


@pytest.mark.parametrize("num_layers", [8, 9, 11, 13, 15, 30])
@pytest.mark.parametrize(("pp", "virtual_pp"), [(1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (4, 2), (2, 4), (8, 1)])
def test_chunks_partition_the_layers_in_the_order_in_which_activations_travel(num_layers, pp, virtual_pp):
    layout = ParallelLayout(pp=pp, virtual_pp=virtual_pp)
    assert layout.violations(**{**SIZES, "num_layers": num_layers}) == []
    chunks = [layout.chunks(num_layers, stage) for stage in range(pp)]
    travelled = [layer for v in range(virtual_pp) for stage in range(pp) for layer in chunks[stage][v]]
    assert travelled == list(range(num_layers))
    for stage, layers in enumerate(chunks):
        assert all(layout.stage_of_layer(num_layers, layer) == stage for layer in itertools.chain(*layers))
    depths = [len(chunks[stage][v]) for v in range(virtual_pp) for stage in range(pp)]
    assert min(depths) >= 1 and max(depths) - min(depths) <= 1
    assert depths[-1] == min(depths) and (depths[0] == min(depths) or min(depths[:-1]) == max(depths))


@pytest.mark.parametrize(
    ("num_layers", "pp", "depths"),
    [(6, 4, [1, 2, 2, 1]), (5, 4, [1, 1, 2, 1]), (7, 4, [2, 2, 2, 1]), (5, 2, [3, 2]), (30, 4, [7, 8, 8, 7]), (9, 4, [2, 2, 3, 2])],
)
def test_stages_of_unequal_depth_spare_the_head_then_the_embedding(num_layers, pp, depths):
    layout = ParallelLayout(pp=pp)
    assert [len(layout.chunks(num_layers, stage)[0]) for stage in range(pp)] == depths


def test_what_remains_of_the_ranks_is_data_parallel():
    assert ParallelLayout.over(24, tp=2, pp=3) == ParallelLayout(tp=2, pp=3, dp=4)
    with pytest.raises(ValueError, match=r"tp 2 x pp 3 = 6 ranks per copy does not divide the 8 ranks .* 8 % 6 = 2"):
        ParallelLayout.over(8, tp=2, pp=3)


def test_violations_are_all_named_with_their_numbers():
    assert ParallelLayout(tp=2, pp=4, virtual_pp=2, sequence_parallel=True).violations(**SIZES) == []
    assert ParallelLayout(tp=4, pp=3).violations(**SIZES) == []
    found = ParallelLayout(tp=3, pp=9).violations(**SIZES)
    assert found[0] == "num_layers 8 must be at least pp * virtual_pp = 9 * 1 = 9: each chunk of a stage holds a layer"
    assert "num_heads 4 must be divisible by tp 3; 4 % 3 = 1" in found and len(found) == 6
    assert found[-1] == "num_kv_heads 2 must be divisible by tp 3, or tp by it (several ranks then hold each key-value head)"
    assert ParallelLayout(virtual_pp=2).violations(**SIZES) == ["virtual_pp 2 needs pp > 1"]
    assert ParallelLayout(sequence_parallel=True).violations(**SIZES) == ["sequence_parallel needs tp > 1"]
