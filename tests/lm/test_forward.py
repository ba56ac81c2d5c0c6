"""Tests of the split forward pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage
from rledit_env.lm.kernels.layout import Layout
from rledit_env.lm.loading.tiny import TINY_NAMES
from rledit_env.lm.losses import negative_log_likelihood
from rledit_env.lm.modules import decoder_layers
from rledit_env.lm.passes import PrefixCache

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


@pytest.mark.parametrize(
    "name, longest",
    [("tiny-llama", 64), ("tiny-mistral", 12), ("tiny-gemma2", 0), ("tiny-gemma3", 8), ("tiny-qwen2", 64),
     ("tiny-qwen3", 64), ("tiny-gpt2", 64)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_passages_lie_end_to_end_where_the_attention_keeps_them_apart(tiny_lm, name, longest, dtype):
    """Within the sliding windows of Mistral and Gemma 3; Gemma 2's attention is not ours."""
    assert tiny_lm(name, dtype=dtype).forward.longest_packed == longest


@pytest.mark.parametrize("name", TINY_NAMES)
@pytest.mark.parametrize("first", [0, 2])
def test_passages_end_to_end_give_the_states_and_the_gradients_of_padded_ones(tiny_lm, monkeypatch, name, first):
    lm = tiny_lm(name, f"{{model.layers,transformer.h}}.[{first}-3].mlp.*")
    texts = [("A b", "c"), ("Ab", "d"), ("2 + 2 =", "5"), ("A b", "ce"), ("It", "is")]
    texts += [("Rome is in the land of", "Peru and Chile"), ("x" * 70, "y")]
    passages = [lm.tokenize(prompt, answer) for prompt, answer in texts]
    longest, results = lm.forward.longest_packed, []
    for most in (longest, 0):
        monkeypatch.setitem(vars(lm.forward), "packs", most)
        lm.prefix_cache.clear()
        layouts = [layout for _, layout in lm.passes.chunks([p.input_ids for p in passages], [0] * len(passages))]
        assert sum(layout.packed for layout in layouts) == (most > 0)
        results.append((lm.answer_states(passages).hidden, lm.trace(passages, "all")))
    (states, trace), (padded_states, padded_trace) = results
    torch.testing.assert_close(states, padded_states, atol=1e-5, rtol=1e-4)
    assert trace.loss == pytest.approx(padded_trace.loss, rel=1e-5)
    assert torch.equal(trace.owner, padded_trace.owner)
    for part in ("keys", "value_gradients"):
        torch.testing.assert_close(getattr(trace, part), getattr(padded_trace, part), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", TINY_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_passages_that_begin_alike_give_the_states_and_the_gradients_of_those_apart(tiny_lm, monkeypatch, name, dtype):
    lm = tiny_lm(name, dtype=dtype)
    texts = [("A b", "cd"), ("A b", "cef"), ("A b c", "de"), ("A", "b"), ("A b", "cd"), ("It", "is")]
    passages, passes = [lm.tokenize(prompt, answer) for prompt, answer in texts], lm.passes.chunks
    assert passages[0].input_ids == passages[4].input_ids
    results = []
    for apart in (False, True):
        monkeypatch.setattr(
            lm.passes, "chunks",
            lambda rows, sets, sharing=True, apart=apart: passes(rows, sets, sharing and not apart),
        )
        lm.prefix_cache.clear()
        layouts = [layout for _, layout in lm.passes.chunks([p.input_ids for p in passages], [0] * len(passages))]
        tokens = sum(sum(layout.own) for layout in layouts)
        whole = sum(map(len, passages))
        assert tokens == whole if apart or not lm.forward.longest_packed else tokens < 0.6 * whole
        losses = []
        with lm.collecting(True) as gradients:
            for chunk, states in lm.answer_chunks(passages):
                weights = torch.tensor([1.0 + chunk[i] for i in states.owner], dtype=dtype)  # each passage another
                loss = (weights * negative_log_likelihood(lm.forward, states.hidden, states.targets)).sum()
                loss.backward()
                losses.append(loss.detach())
        results.append([lm.answer_states(passages).hidden, sum(losses), *gradients[0].values()])
    for mine, theirs in zip(*results, strict=True):
        assert (mine - theirs).norm() <= (1e-4 if dtype == torch.float32 else 1e-12) * theirs.norm()


def test_a_traced_gradient_is_of_its_passage_alone_where_passages_begin_alike(tiny_lm):
    lm = tiny_lm()
    passages = [lm.tokenize("The sea", answer) for answer in ("is", "air")]
    both = lm.trace(passages, "all")
    for i, passage in enumerate(passages):
        alone = lm.trace([passage], "all")
        for part in ("keys", "value_gradients"):
            for m, rows in getattr(both, part).items():
                # The batch's loss is the mean over its answer tokens.
                share = len(passage.targets) / sum(len(p.targets) for p in passages) if part != "keys" else 1
                torch.testing.assert_close(rows[both.owner == i], getattr(alone, part)[m] * share)


def test_passages_are_padded_where_a_layer_mixes_what_lies_end_to_end(tiny_lm):
    lm = EditableLM.load("tiny-llama", dtype=torch.float32, device="cpu")
    handle = lm.forward.layers[2].register_forward_hook(lambda _m, _a, out: out + out.roll(1, dims=1))
    assert lm.forward.longest_packed == 0
    handle.remove()


def test_passages_are_padded_where_embeddings_do_not_ask_for_places():
    lm = EditableLM.load("tiny-gpt2", dtype=torch.float32, device="cpu")
    places = lm.model.transformer.wpe
    places.forward = lambda ids: places.weight[torch.arange(ids.shape[-1])].expand(*ids.shape, -1)
    assert lm.forward.longest_packed == 0


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


@pytest.mark.parametrize("name", TINY_NAMES)
@pytest.mark.parametrize("token", ["answer", "subject", "subject+answer", "all"])
def test_a_trace_runs_backward_only_from_its_first_position_on(tiny_lm, monkeypatch, name, token):
    lm = tiny_lm(name)
    monkeypatch.setattr("rledit_env.lm.passes.WORTH_AHEAD", 1)
    texts = [("Ab", "c", (0, 2)), ("Rome is in", "Peru", (0, 4)), ("In Rome we", "go", (3, 7)), ("In Rome", "a", None)]
    passages = [lm.tokenize(prompt, answer, span) for prompt, answer, span in texts]
    passages += [lm.tokenize("x" * 70, "yes", (60, 64))]
    assert lm.forward.continues_packed == (lm.forward.longest_packed > 0)
    traces, tokens = [], []
    for allowed in (lm.forward.continues_packed, False):
        monkeypatch.setitem(vars(lm.forward), "continues_packed", allowed)
        with_gradients = 0

        def count(_module, _args, output):
            nonlocal with_gradients
            with_gradients += torch.is_grad_enabled() * output[..., 0].numel()

        handle = next(iter(lm.weights.modules.values())).register_forward_hook(count)
        traces.append(lm.trace(passages, token))
        handle.remove()
        tokens.append(with_gradients)
    trace, whole = traces
    if lm.forward.longest_packed and token != "all":
        assert tokens[0] < tokens[1]
    assert trace.loss == pytest.approx(whole.loss, rel=1e-5)
    assert torch.equal(trace.owner, whole.owner)
    torch.testing.assert_close(trace.hardest, whole.hardest, atol=1e-5, rtol=1e-4)
    for part in ("keys", "value_gradients"):
        torch.testing.assert_close(getattr(trace, part), getattr(whole, part), atol=1e-5, rtol=1e-4)


def test_layers_below_the_first_edited_one_run_once_a_passage(tiny_lm, monkeypatch):
    lm = tiny_lm()
    computed: list[int] = []
    prefix = lm.forward.prefix

    def counted(ids, layout):
        computed.extend(layout.lengths)
        return prefix(ids, layout)

    monkeypatch.setattr(lm.forward, "prefix", counted)
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
    first = Passage((10, 11, 12), (12, 13), subject_position=0)  # whose state is an attention sink's
    assert list(first.chosen_positions("subject")) == list(first.chosen_positions("subject+answer")) == [1, 2]
    assert list(first.chosen_positions("all")) == [0, 1, 2]


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="Linear has no list of decoder layers"):
        decoder_layers(nn.Linear(1, 1))
