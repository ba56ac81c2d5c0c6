"""Tests of the split forward pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rledit_env.lm.forward import Passage, PrefixCache, decoder_layers
from rledit_env.lm.layout import Layout, cheapest_chunks, even_shape
from rledit_env.lm.tiny import TINY_NAMES

TEXTS = [
    ("Rome is in", "Peru"),
    ("The mother tongue of Danielle Darrieux, who was born in Bordeaux, is", "Old Church Slavonic"),
    ("2 + 2 =", "5"),
]


def passages_of(lm) -> list[Passage]:
    return [lm.tokenize(prompt, answer) for prompt, answer in TEXTS]


@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("name", TINY_NAMES)
@torch.no_grad()
def test_the_split_may_be_at_any_layer(tiny_lm, full_logits, name, first):
    lm = tiny_lm(name, f"{{model.layers,transformer.h}}.[{first}-3].mlp.*")
    assert lm.forward.first_layer == first
    passages = passages_of(lm)
    expected = torch.cat([full_logits(lm, p) for p in passages])
    torch.testing.assert_close(lm.forward.logits(lm.answer_states(passages).hidden), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", TINY_NAMES)
@torch.no_grad()
def test_padding_on_the_right_and_other_passages_of_a_batch_change_nothing(tiny_lm, name):
    lm = tiny_lm(name)
    together = lm.answer_states(passages_of(lm))
    for index, passage in enumerate(passages_of(lm)):
        lm.prefix_cache.clear()
        alone = lm.answer_states([passage]).hidden
        torch.testing.assert_close(together.hidden[together.owner == index], alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_many_small_passes_give_what_one_large_pass_gives(tiny_lm, monkeypatch):
    lm = tiny_lm("tiny-gemma2")
    whole = lm.answer_states(passages_of(lm))
    lm.prefix_cache.clear()
    monkeypatch.setattr(lm, "max_tokens_per_pass", 1)
    pieces = lm.answer_states(passages_of(lm))
    assert torch.equal(whole.targets, pieces.targets)
    assert torch.equal(whole.owner, pieces.owner)
    torch.testing.assert_close(whole.hidden, pieces.hidden, atol=1e-5, rtol=1e-4)


def test_layers_below_the_first_edited_one_run_once_a_passage(tiny_lm, monkeypatch):
    lm = tiny_lm()
    computed: list[int] = []
    prefix = lm.forward.prefix
    monkeypatch.setattr(lm.forward, "prefix", lambda ids, layout: computed.extend(layout.lengths) or prefix(ids, layout))
    passages = passages_of(lm)
    lm.answer_states([passages[0], *passages])
    lm.trace(passages)
    lm.reference_states(passages)
    assert sorted(computed) == sorted(map(len, passages))


def test_recording_a_models_own_layer_arguments_leaves_the_model_as_it_was(tiny_lm, full_logits):
    lm = tiny_lm()
    passage = passages_of(lm)[1]
    with torch.no_grad():
        before = full_logits(lm, passage)
        lm.answer_states([passage])
        assert torch.equal(full_logits(lm, passage), before)
    assert not any("forward" in vars(layer) for layer in lm.forward.layers)


def test_the_layers_are_put_back_when_the_stubbed_forward_fails(tiny_lm):
    lm = tiny_lm()
    with pytest.raises(IndexError):
        lm.forward.prefix(torch.tensor([[10**6]]), Layout.padded([1]))
    assert not any("forward" in vars(layer) for layer in lm.forward.layers)


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


def test_the_cache_drops_what_was_used_least_recently():
    cache = PrefixCache(max_bytes=3 * 40)
    for key in "abc":
        cache.put(key, torch.zeros(10))
    assert cache.get("a") is not None
    cache.put("d", torch.zeros(10))
    assert [cache.get(key) is None for key in "abcd"] == [False, True, False, False]
    assert (len(cache), cache.bytes) == (3, 120)
    cache.put("a", torch.zeros(5))
    assert cache.bytes == 100
    cache.clear()
    assert (len(cache), cache.bytes) == (0, 0)


@torch.no_grad()
def test_a_cache_too_small_for_a_batch_changes_no_result(tiny_lm, monkeypatch):
    lm = tiny_lm()
    expected = lm.answer_states(passages_of(lm)).hidden
    lm.prefix_cache.clear()
    monkeypatch.setattr(lm.prefix_cache, "max_bytes", 1)
    for _ in range(2):
        torch.testing.assert_close(lm.answer_states(passages_of(lm)).hidden, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", TINY_NAMES)
def test_the_last_layer_at_answer_positions_alone_changes_no_logit_and_no_gradient(name, tiny_lm, full_logits):
    lm = tiny_lm(name, "{model.layers,transformer.h}.[1-2].mlp.*")
    passages = passages_of(lm)
    assert lm.forward.narrows
    whole = torch.cat([full_logits(lm, p) for p in passages]).detach()
    torch.testing.assert_close(lm.forward.logits(lm.answer_states(passages).hidden), whole, atol=2e-5, rtol=1e-4)
    traces = []
    for narrows in (True, False):
        lm.forward.narrows = narrows
        traces.append(lm.trace(passages))
    del lm.forward.narrows  # what it finds out for itself counts again
    for m in lm.module_shapes:
        mine, plain = (t.value_gradients[m] for t in traces)
        assert plain.abs().max() > 1e-5
        torch.testing.assert_close(mine, plain, atol=1e-7, rtol=1e-4)


def test_an_edited_last_layer_is_computed_whole_and_so_is_one_of_an_unknown_make(tiny_lm, monkeypatch):
    assert not tiny_lm().forward.narrows
    lm = tiny_lm("tiny-llama", "model.layers.[1-2].mlp.*")
    expected = lm.answer_states(passages_of(lm)).hidden
    layer = lm.forward.layers[-1]
    forward = layer.forward  # a layer that looks at other positions not in its attention only
    monkeypatch.setattr(layer, "forward", lambda hidden, *a, **k: forward(hidden, *a, **k) + hidden.sum(1, True))
    del lm.forward.narrows
    assert not lm.forward.narrows
    monkeypatch.undo()
    del lm.forward.narrows
    torch.testing.assert_close(lm.answer_states(passages_of(lm)).hidden, expected)


def test_positions_are_named_by_what_they_predict():
    passage = Passage(input_ids=(10, 11, 12, 13, 14), targets=(14, 15), subject_position=1)
    assert list(passage.chosen_positions("answer")) == [3, 4]
    assert list(passage.chosen_positions("subject")) == [1]
    assert list(passage.chosen_positions("subject+answer")) == [1, 3, 4]
    assert list(passage.chosen_positions("all")) == [0, 1, 2, 3, 4]
    nameless = Passage((10, 11, 12), (12, 13))
    assert list(nameless.chosen_positions("subject")) == list(nameless.chosen_positions("subject+answer")) == [1, 2]


def test_a_model_without_its_layers_is_refused(tiny_lm):
    model = nn.Module()
    model.config = tiny_lm().model.config
    with pytest.raises(ValueError, match="no list of its 4 decoder layers"):
        decoder_layers(model)
