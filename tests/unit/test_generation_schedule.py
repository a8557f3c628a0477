"""Which row is in which slot: every row is given what it is due once, from its own prompt, whatever comes and goes."""

import sys
import types
from collections import deque
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarlhf.generation import cache as caches
from megarlhf.generation.cache import SlotCache
from megarlhf.generation.repeated_steps import batch_size, reach_of
from megarlhf.generation.schedule import PREFILL_TOKENS, Pass, SameLength, Slots, WaitingRow, dealt, level, slots_within

PROMPT = st.tuples(st.integers(1, 30), st.integers(1, 4))  # length, rows
ROWS = st.lists(PROMPT, min_size=1, max_size=12)


def rows_of(prompts, limits):
    """A row for each sample of each (length, samples)."""
    found = []
    for prompt, (length, samples) in enumerate(prompts):
        found += [WaitingRow(len(found) + k, prompt, length, limits[(len(found) + k) % len(limits)]) for k in range(samples)]
    return found


@settings(max_examples=60, deadline=None)
@given(ROWS, st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(1, 7), st.data())
def test_rows_go_through_slots_with_their_own_prompts(prompts, limits, size, data):
    """`held` is a cache whose positions say whose token they hold; rows end at random or at their limit."""
    rows = rows_of(prompts, limits)
    slots, cache, given_tokens, steps = Slots(deque(rows), size), [[] for _ in range(size)], dict.fromkeys(range(len(rows)), 0), 0
    known = set()
    while slots.held or slots.waiting:
        passes = slots.admit()
        entered = [at for at, slot in enumerate(slots.held) if slot.row.number not in known]
        known |= {slot.row.number for slot in slots.held}
        assert len(slots.held) <= size and (len(slots.held) == size or not slots.waiting)
        for plan in passes:
            assert plan.tokens - plan.decoded <= PREFILL_TOKENS
            for group in plan.prefilled:
                for at in group.slots:
                    assert at in entered
                    cache[at] = [slots.held[at].row.prompt] * group.length
            for group in plan.copied:
                for at, source in zip(group.slots, group.sources, strict=True):
                    assert at in entered
                    cache[at] = cache[source][: group.length]
        assert [plan.decoded for plan in passes] == [0] * (len(passes) - 1) + [len(slots.held)]
        prefilled = [slots.held[at].row.prompt for plan in passes for group in plan.prefilled for at in group.slots]
        assert len(prefilled) == len(set(prefilled))
        for at, slot in enumerate(slots.held):
            if at in entered:
                cache[at] = cache[at][: slot.row.length - 1]
            assert slot.position == len(cache[at]) and set(cache[at][: slot.row.length - 1]) <= {slot.row.prompt}
            cache[at].append(slot.row.prompt)
            given_tokens[slot.row.number] += 1
        slots.advance()
        at_limit = [at for at, slot in enumerate(slots.held) if given_tokens[slot.row.number] == slot.row.limit]
        assert slots.is_full_of_tokens == bool(at_limit)
        ended = {*at_limit, *data.draw(st.sets(st.integers(0, len(slots.held) - 1), max_size=2))}
        left, waited = [slot.row.number for at, slot in enumerate(slots.held) if at not in ended], [row.number for row in slots.waiting]
        moves = slots.leave(ended)
        for source, target in moves:
            assert target in ended and source not in ended
            cache[target] = list(cache[source])
        assert len(moves) <= max(0, len(ended) - len(waited))  # who waits needs no room made for him
        assert sorted(slot.row.number for slot in slots.held) == sorted(left + waited[: len(ended)])
        steps += 1
    assert all(1 <= given_tokens[row.number] <= row.limit for row in rows)


def test_long_prompts_are_prefilled_in_chunks():
    rows = [WaitingRow(number, number, length + 1, 1) for number, length in enumerate([PREFILL_TOKENS + 5, 3000, 1000, 1000, 97, 97])]
    passes = Slots(deque(rows), 6).admit()
    tokens = [[(group.length, len(group.slots)) for group in plan.prefilled] for plan in passes]
    assert tokens == [[(PREFILL_TOKENS + 5, 1)], [(3000, 1), (1000, 1)], [(1000, 1), (97, 2)]]


@settings(max_examples=60, deadline=None)
@given(ROWS, st.lists(st.integers(1, 100), min_size=1, max_size=5), st.integers(1, 9))
def test_every_row_is_dealt_to_one_copy_and_none_has_more_than_its_share(prompts, limits, copies):
    rows = rows_of(prompts, limits)
    hands = dealt(rows, copies)
    assert sorted(row.number for hand in hands for row in hand) == list(range(len(rows)))
    assert len(hands) == copies and max(map(len, hands)) <= -(-len(rows) // copies)


def test_work_is_dealt_evenly_and_samples_of_a_prompt_stay_together():
    rows = rows_of([(10, 4), (20, 4), (5, 4), (15, 4)], [8])
    hands = dealt(rows, 2)
    assert [{row.prompt for row in hand} for hand in hands] == [{1, 2}, {3, 0}]
    uneven = [WaitingRow(number, number, 1, limit) for number, limit in enumerate([90, 10, 50, 40, 60, 50])]
    assert sorted(sum(row.limit for row in hand) for hand in dealt(uneven, 3)) == [100, 100, 100]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 12)), min_size=1, max_size=6))
def test_rows_that_wait_are_shared_out_until_copies_are_level(copies):
    """No row is lost, none is before one that waited where it came from, and only a copy with nothing to give may have more."""
    held = [rows for rows, _ in copies]
    waiting = [deque(WaitingRow(100 * copy + at, 0, 1, 1) for at in range(rows)) for copy, (_, rows) in enumerate(copies)]
    before = [list(queue) for queue in waiting]
    level(held, waiting)
    assert sorted(row.number for queue in waiting for row in queue) == sorted(row.number for queue in before for row in queue)
    totals = [rows + len(queue) for rows, queue in zip(held, waiting, strict=True)]
    assert all(totals[copy] - min(totals) <= 1 for copy, queue in enumerate(waiting) if queue)
    for copy, queue in enumerate(waiting):
        own = [row for row in queue if row.number // 100 == copy]
        assert own == before[copy][: len(own)] == list(queue)[: len(own)]


def test_a_budget_holds_whole_slots_or_is_refused_with_what_one_takes():
    assert slots_within(None, 100, wanted=7, capacity=4) == 7
    assert slots_within(399, 100, wanted=7, capacity=4) == 3 and slots_within(10_000, 100, wanted=7, capacity=4) == 7
    with pytest.raises(ValueError, match="kv_cache_bytes 99 holds no row: the keys and values of one of 4 tokens take 100"):
        slots_within(99, 100, wanted=7, capacity=4)


def attention(query, keys, values):
    """Of one token over all before it, heads in groups: [kv_heads, group, d], [seen, kv_heads, d] -> [kv_heads * group * d]."""
    scores = torch.einsum("kgd,skd->kgs", query, keys) / query.shape[-1] ** 0.5
    return torch.einsum("kgs,skd->kgd", scores.softmax(-1), values).flatten()


@pytest.mark.parametrize("by", ["lines", "mask"])
def test_a_cache_attends_over_each_rows_own_tokens(by):
    """Prefill of unequal prompts, a copied prompt, steps at equal and unequal positions, and rows that move."""
    generator = torch.Generator().manual_seed(0)
    cache = SlotCache([1, 5], slots=5, kv_heads=2, group=3, capacity=9, head_size=4, dtype=torch.float32, device=torch.device("cpu"))
    assert cache.reads_lines
    cache.reads_lines = by == "lines"
    seen = {slot: ([], []) for slot in range(5)}

    def step(plan, positions):
        cache.begin(plan, torch.tensor(positions, dtype=torch.int64), positions)
        query, key_value = (torch.randn(plan.tokens, *shape, generator=generator) for shape in ((2, 3, 4), (2, 2, 4)))
        key, value = key_value.unbind(2)
        found, expected, at = cache.attend(5, query, key_value), torch.zeros(plan.tokens, 24), plan.decoded
        for group in plan.prefilled:
            for slot in group.slots:
                seen[slot] = ([], [])
                for _ in range(group.length):
                    seen[slot][0].append(key[at]), seen[slot][1].append(value[at])
                    expected[at] = attention(query[at], *map(torch.stack, seen[slot]))
                    at += 1
        for group in plan.copied:
            for slot, source in zip(group.slots, group.sources, strict=True):
                seen[slot] = tuple(list(part[: group.length]) for part in seen[source])
        for slot in range(plan.decoded):
            assert len(seen[slot][0]) == positions[slot]
            seen[slot][0].append(key[slot]), seen[slot][1].append(value[slot])
            expected[slot] = attention(query[slot], *map(torch.stack, seen[slot]))
        assert torch.allclose(found, expected, atol=1e-6)
        n = plan.decoded
        assert torch.allclose(cache.attend(5, query[:n], key_value), expected[:n], atol=1e-6)  # nothing asked of the others

    prefilled, copied = (SameLength(4, (0, 3)), SameLength(2, (1,))), (SameLength(4, (2,), (3,)),)
    step(Pass(4, prefilled, copied), [4, 2, 4, 4])
    step(Pass(4), [5, 3, 5, 5])
    cache.move([(3, 1)], 6)
    seen[1] = seen[3]
    cache.move([(0, 2), (2, 0)], 6)
    seen[0], seen[2] = seen[2], seen[0]
    step(Pass(3), [6, 6, 6])
    step(Pass(5, (SameLength(1, (3,)),), (SameLength(4, (4,), (0,)),)), [7, 7, 7, 1, 4])
    assert not cache._stored[1].any()


def test_steps_are_filled_up_to_a_few_sizes():
    for slots in (1, 3, 64, 100, 256):
        sizes = [batch_size(rows, slots) for rows in range(1, slots + 1)]
        assert all(rows <= size <= min(slots, max(4, rows * 1.25 + 3)) for rows, size in enumerate(sizes, 1))
        assert sizes == sorted(sizes) and len(set(sizes)) <= 24
        assert all(longest <= reach_of(longest, slots) <= max(64, 2 * longest) for longest in range(1, slots + 1))
    assert {reach_of(longest, 1000) for longest in range(1, 1001)} == {64, 128, 256, 512, 1000}


def varlen_attention(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, seqused_k, enable_gqa):
    """What torch documents of its kernel: packed rows of queries, each over the first `seqused_k` keys of its own."""
    assert all(x.dtype == torch.int32 for x in (cu_seq_q, cu_seq_k, seqused_k)) and query.shape[1] % key.shape[1] == 0
    out, group = torch.zeros_like(query), query.shape[1] // key.shape[1]
    assert enable_gqa == (group > 1) and max(cu_seq_q.diff()) <= max_q and max(cu_seq_k.diff()) <= max_k
    for row, used in enumerate(seqused_k.tolist()):
        k, v = (x[cu_seq_k[row] : cu_seq_k[row] + used].repeat_interleave(group, dim=1) for x in (key, value))
        for at in range(cu_seq_q[row], cu_seq_q[row + 1]):
            scores = torch.einsum("hd,shd->hs", query[at], k) / query.shape[-1] ** 0.5
            out[at] = torch.einsum("hs,shd->hd", scores.softmax(-1), v)
    return out


@pytest.mark.parametrize("kernel", [False, True], ids=["mask", "varlen kernel"])
def test_a_step_by_device_tensors_alone_is_the_ordinary_one(kernel):
    """Of both kinds of reading; slots that fill the batch up are written at position 0 alone."""
    generator = torch.Generator().manual_seed(0)
    shape = {"slots": 5, "kv_heads": 2, "group": 3, "capacity": 9, "head_size": 4, "dtype": torch.float32, "device": torch.device("cpu")}
    module = {"torch.nn.attention.varlen": types.SimpleNamespace(varlen_attn=varlen_attention)}
    with mock.patch.object(caches, "has_varlen_kernel", lambda *_: kernel), mock.patch.dict(sys.modules, module):
        ordinary, repeated = SlotCache([1], **shape), SlotCache([1], **shape)
        for positions in ([2, 4, 0], [3, 5, 1]):
            query, key_value = (torch.randn(4, *size, generator=generator) for size in ((2, 3, 4), (2, 2, 4)))
            ordinary.begin(Pass(3), torch.tensor(positions), positions)
            repeated.begin_decoding(torch.tensor([*positions, 0]), 8)
            expected = ordinary.attend(1, query[:3], key_value[:3])
            assert torch.allclose(repeated.attend(1, query, key_value)[:3], expected, atol=1e-6)
            assert torch.equal(repeated._stored[1][:, :3], ordinary._stored[1][:, :3])
            assert not repeated._stored[1][:, 3:, :, 1:].any() and not repeated._stored[1][:, 4:].any()
