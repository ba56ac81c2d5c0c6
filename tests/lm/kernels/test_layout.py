"""Tests of rledit_env.lm.kernels.layout: how the passages of a pass lie in its batch."""

from __future__ import annotations

import pytest
import torch

from rledit_env.lm.kernels.layout import (
    Layout,
    cheapest_chunks,
    even_chunks,
    even_shape,
    sharing_chunks,
    tail_chunks,
)
from rledit_env.lm.kernels.packing import Past

LENGTHS = [3, 1, 7, 3]


def many_passages():
    """Lengths of 3 to 39 tokens, the passages' streams, and the most tokens of a pass."""
    generator = torch.Generator().manual_seed(0)
    for count, most_streams, most in ((1, 1, 64), (50, 3, 64), (200, 16, 256), (40, 40, 256), (300, 2, 4096)):
        lengths = torch.randint(3, 40, (count,), generator=generator).tolist()
        yield lengths, torch.randint(0, most_streams, (count,), generator=generator).tolist(), most


@pytest.mark.parametrize("quantum", [1, 16])
@pytest.mark.parametrize("kind", [Layout.padded, Layout.end_to_end])
@pytest.mark.parametrize("lengths", [LENGTHS, [4, 1, 1, 2], [9, 7, 7, 600]])
def test_what_is_laid_out_is_found_again(kind, quantum, lengths):
    layout = kind(lengths, quantum)
    rows = [torch.randn(length, 2, generator=torch.Generator().manual_seed(length)) for length in lengths]
    batch = layout.batch(rows)
    assert batch.shape == (*layout.shape, 2)
    assert batch[..., 0].numel() % quantum == 0
    for found, row in zip(layout.split(batch), rows, strict=True):
        assert torch.equal(found, row)
    assert int((batch != 0).sum()) == 2 * sum(lengths)  # the rest is zero
    assert not layout.packed or layout.shape[0] == 1
    positions = [[0, 2], [], [0], [1, 0]]
    found = batch.flatten(0, 1)[layout.places(positions, torch.device("cpu"))]
    assert torch.equal(found, torch.cat([row[p] for row, p in zip(rows, positions, strict=True)]))
    assert sum(layout.sizes) == layout.shape[0] * layout.shape[1]
    assert layout.starts == [sum(layout.sizes[:i]) for i in range(len(lengths))]


def test_passages_end_to_end_take_no_more_than_their_tokens():
    layout = Layout.end_to_end(LENGTHS)
    assert layout.shape == (1, 14)
    assert layout.position_ids(torch.device("cpu")).tolist() == [[0, 1, 2, 0, 0, 1, 2, 3, 4, 5, 6, 0, 1, 2]]
    assert Layout.padded(LENGTHS).shape == (4, 7)
    assert Layout.padded(LENGTHS).packing is None


ROWS = [(5, 6, 7), (5, 6, 8, 9), (5, 6, 7), (4,), (5, 6), (5, 6, 8, 1), (5, 6, 7)]
STREAMS = [0, 0, 0, 0, 0, 0, -1]  # the last one begins as others do, but meets other weights


def test_what_passages_begin_with_lies_in_the_row_once_for_each_stream():
    layout = Layout.sharing(ROWS, STREAMS, quantum=16)
    assert layout.shape == (1, 16) and layout.packed
    assert layout.paths == [[0, 1, 2], [0, 1, 3, 4], [0, 1, 2], [5], [0, 1], [0, 1, 3, 6], [7, 8, 9]]
    assert layout.own == [3, 2, 0, 1, 0, 1, 3] and sum(layout.sizes) == 16
    assert layout.starts == [0, 3, 5, 5, 6, 6, 7]
    assert layout.position_ids(torch.device("cpu")).tolist() == [[0, 1, 2, 2, 3, 0, 3, 0, 1, 2] + [0] * 6]
    batch = layout.batch([torch.tensor(row)[:, None].float() for row in ROWS])
    assert batch.flatten().tolist() == [5, 6, 7, 8, 9, 4, 1, 5, 6, 7] + [0] * 6
    assert [part.flatten().tolist() for part in layout.split(batch)] == [list(row) for row in ROWS]
    positions = [[2], [0, 3], [], [0], [1], [3], [0]]
    assert layout.places(positions, torch.device("cpu")).tolist() == [2, 0, 4, 5, 1, 6, 7]


def test_passages_that_share_nothing_lie_as_they_did():
    assert Layout.sharing([(1, 2), (3,)], [0, 0], 16) == Layout.end_to_end([2, 1], 16)


@pytest.mark.parametrize("quantum", [1, 16])
def test_chunks_of_passages_that_begin_alike_hold_each_once_and_share_nearly_all_there_is(quantum):
    generator = torch.Generator().manual_seed(0)
    rows = [
        (*[kind] * 8, *torch.randint(10, 99, (int(n),), generator=generator).tolist())
        for kind, n in torch.randint(1, 9, (300, 2), generator=generator).tolist()
    ]
    streams = [i % 2 for i in range(len(rows))]
    chunks = list(sharing_chunks(rows, 256, streams, quantum))
    assert sorted(i for chunk in chunks for i in chunk) == list(range(len(rows)))
    order = [streams[i] for chunk in chunks for i in chunk]
    assert order == sorted(order)
    layouts = [Layout.sharing([rows[i] for i in chunk], [streams[i] for i in chunk], quantum) for chunk in chunks]
    assert max(layout.shape[1] for layout in layouts) <= 256
    once = len({(s, row[: n + 1]) for s, row in zip(streams, rows, strict=True) for n in range(len(row))})
    assert once < 0.5 * sum(map(len, rows))
    assert once <= sum(sum(layout.own) for layout in layouts) <= once + 8 * len(chunks)
    assert len(chunks) <= -(-once // (256 - 24))


def test_where_little_is_shared_passages_of_one_length_lie_together():
    rows = [(100 + i, *range(i % 7)) for i in range(50)]
    lengths = [len(row) for row in rows]
    assert list(sharing_chunks(rows, 64, [0] * 50)) == list(even_chunks(lengths, 64, [0] * 50))


def test_room_up_to_a_multiple_is_used():
    sizes = [10 * len(chunk) for chunk in even_chunks([10] * 41, 256, [0] * 41, quantum=32)]
    assert sizes == [220, 190]  # of 410: two chunks of 205 would take 224 tokens each
    sizes = [4 * len(chunk) for chunk in even_chunks([4] * 123, 256, [0] * 123, quantum=32)]
    assert sizes == [256, 236]


def test_chunks_of_passages_end_to_end_are_even_and_meet_few_streams():
    for lengths, streams, most in many_passages():
        chunks = list(even_chunks(lengths, most, streams))
        assert sorted(i for chunk in chunks for i in chunk) == list(range(len(lengths)))
        order = [(streams[i], lengths[i]) for chunk in chunks for i in chunk]
        assert order == sorted(order)
        sizes = [sum(lengths[i] for i in chunk) for chunk in chunks]
        assert max(sizes) <= most
        assert len(chunks) <= -(-sum(lengths) // (most - 39)) and max(sizes) - min(sizes) <= 2 * 39
    assert list(even_chunks([], 64, [])) == []
    assert list(even_chunks([3, 5], 1, [0, 0])) == [[0], [1]]  # a passage longer than the bound is alone


def test_chunks_hold_every_passage_once_within_the_bound():
    lengths = [5, 90, 7, 7, 33, 6, 90, 1] * 5
    chunks = list(cheapest_chunks(lengths, max_tokens=200))
    assert sorted(i for chunk in chunks for i in chunk) == list(range(len(lengths)))
    assert all(len(chunk) * max(lengths[i] for i in chunk) <= 200 for chunk in chunks)


def test_a_passage_longer_than_the_bound_is_a_chunk_of_its_own():
    assert list(cheapest_chunks([300, 2, 300], max_tokens=100)) == [[1], [0], [2]]


@pytest.mark.parametrize("quantum", [1, 8, 16])
def test_the_even_shape_is_the_smallest_whose_tokens_are_a_multiple(quantum):
    for rows in range(1, 40):
        for length in range(1, 30):
            found = even_shape(rows, length, quantum)
            step = 4 * quantum if quantum > 1 and rows * length > 32 * quantum else quantum
            every = [
                (r * w, r, w)
                for r in range(rows, rows + step + 1)
                for w in range(length, length + step + 1)
                if r * w % step == 0
            ]
            assert found[0] >= rows and found[1] >= length and found[0] * found[1] == min(every)[0]


def test_chunks_are_cut_where_it_costs_least():
    # One pass of eight passages of 10 and one of a single long one, rather than one with 9 × 40 tokens.
    assert list(cheapest_chunks([10] * 8 + [40], max_tokens=400, pass_tokens=16)) == [list(range(8)), [8]]
    # A pass costs more than the two tokens of padding that it would save.
    assert list(cheapest_chunks([10, 10, 11], max_tokens=400, pass_tokens=16)) == [[0, 1, 2]]


def test_no_passages_give_no_chunks():
    assert list(cheapest_chunks([], 100)) == []


def test_chunks_take_every_passage_once_with_each_stream_side_by_side_within_the_limit():
    for lengths, streams, max_tokens in many_passages():
        chunks = list(cheapest_chunks(lengths, max_tokens, streams))
        assert sorted(i for chunk in chunks for i in chunk) == list(range(len(lengths)))
        for chunk in chunks:
            assert len(chunk) == 1 or len(chunk) * max(lengths[i] for i in chunk) <= max_tokens
            order = [streams[i] for i in chunk]
            assert order == sorted(order)


def test_passages_whose_first_tokens_ran_before_have_only_the_others_in_the_row():
    counts = [2, 3, 0, 0, 1, 2, 2]
    ahead, heads = Layout.heads(ROWS, counts, STREAMS, quantum=16)
    assert ahead.shape == (1, 16) and ahead.lengths == [2, 3, 1, 2, 2]
    assert [list(path) for path in heads] == [[0, 1], [0, 1, 2], [], [], [0], [0, 1], [3, 4]]
    layout = Layout.tails([len(row) for row in ROWS], heads, Past(5), quantum=16)
    assert layout.own == [1, 1, 3, 1, 1, 2, 1] and layout.starts == [0, 1, 2, 5, 6, 7, 9]
    assert layout.position_ids(torch.device("cpu")).tolist() == [[2, 3, 0, 1, 2, 0, 1, 2, 3, 2] + [0] * 6]
    batch = layout.batch([torch.tensor(row)[:, None].float() for row in ROWS])
    assert batch[0, :, 0].tolist() == [7, 9, 5, 6, 7, 4, 6, 8, 1, 7] + [0] * 6
    positions = [[2], [3], [0, 2], [], [1], [3, 2], [2]]
    assert layout.places(positions, torch.device("cpu")).tolist() == [0, 1, 2, 4, 6, 8, 7, 9]


def test_passages_are_cut_by_the_tokens_that_need_gradients():
    rows = [(1, 2, 3, 4, 5, *range(10 * i, 10 * i + 3)) for i in range(2, 12)]  # five tokens in common, three not
    assert list(tail_chunks(rows, [5] * 10, 15, [0] * 10)) == [[*range(5)], [*range(5, 10)]]
    assert sorted(map(len, tail_chunks(rows, [5] * 10, 30, [i % 2 for i in range(10)]))) == [10]
    long = [tuple(range(100 * i, 100 * i + 42)) for i in range(4)]  # nothing in common: 40 tokens count as ten
    assert list(tail_chunks(long, [40] * 4, 20, [0] * 4)) == [[0, 1], [2, 3]]
