"""The parts of an editable LM, each by itself: weights over plain modules, passes and gradients over a toy model."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rledit_env.lm.decoding import Decoder
from rledit_env.lm.forward import Passage
from rledit_env.lm.gradients import Gradients
from rledit_env.lm.head import AfterHead, OutputHead
from rledit_env.lm.kernels.layout import Layout
from rledit_env.lm.loading.tiny import tiny_model, tiny_tokenizer
from rledit_env.lm.losses import negative_log_likelihood
from rledit_env.lm.passes import Passes, PrefixCache
from rledit_env.lm.routing import ORIGINAL, BesideModules, InModules, Routing
from rledit_env.lm.tokens import PassageEncoder
from rledit_env.lm.weights import EditedWeights

PASSAGES = [Passage((1, 2, 3), (4, 5)), Passage((6, 7), (1,)), Passage((2, 3, 4, 5), (6, 7))]


def modules(dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found: dict[str, nn.Module] = {"linear": nn.Linear(4, 3), "conv": Conv1D(3, 4)}
    return {name: module.to(dtype).requires_grad_(False) for name, module in found.items()}


def update(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(3, 4, generator=generator) for name in ("linear", "conv")}


def held(module: Any) -> Tensor:
    """The module's weight, (d_out, d_in)."""
    return module.weight.t() if isinstance(module, Conv1D) else module.weight


class ToyForward:
    """Logits from embeddings by one edited module and a head: no token sees another."""

    shares, longest_packed, continues_packed, quantum, batching = False, 0, False, 1, "padded"
    device = torch.device("cpu")

    def __init__(self, edited: nn.Module) -> None:
        generator = torch.Generator().manual_seed(1)
        self.edited = edited
        self.embedding = torch.randn(8, 4, generator=generator)
        head = nn.Linear(3, 8, bias=False).requires_grad_(False)
        head.weight.data.normal_(generator=generator)
        self.output = OutputHead(head, AfterHead())
        self.model, self.layers = nn.Module(), nn.ModuleList()
        self.prefixes = 0

    def prefix(self, input_ids: Tensor, layout: Layout) -> Tensor:
        self.prefixes += len(layout.lengths)
        return self.embedding[input_ids]

    def final_states(self, prefix: Tensor, places: Tensor, layout: Layout) -> Tensor:
        return self.edited(prefix).flatten(0, 1)[places]

    def logits(self, hidden: Tensor) -> Tensor:
        return self.output.logits(hidden)


def toy(routing: type[InModules] | None = InModules) -> tuple[ToyForward, list[EditedWeights], Passes]:
    """A toy model whose module holds one set of weights, or has two sets beside it."""
    module = modules()["linear"]
    forward, weights = ToyForward(module), EditedWeights({"linear": module})
    sets = [weights] if routing else [weights.beside(), weights.beside()]
    chosen: Routing = InModules(weights) if routing else BesideModules(sets)
    passes: Any = Passes(forward, chosen, 64, PrefixCache(2**20), PrefixCache(2**20))  # type: ignore[arg-type]
    return forward, sets, passes


def plain_loss(forward: ToyForward, weight: Tensor, passages: list[Passage]) -> Tensor:
    """Mean cross-entropy of the answers' tokens."""
    bias: Any = forward.edited.bias
    states = [F.linear(forward.embedding[list(p.input_ids)][list(p.positions)], weight, bias) for p in passages]
    return F.cross_entropy(forward.logits(torch.cat(states)), torch.tensor([t for p in passages for t in p.targets]))


# -- weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_change_the_modules_that_hold_them_and_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    given = modules(dtype)
    before = {name: held(module).clone() for name, module in given.items()}
    weights = EditedWeights(given)
    assert weights.module_shapes == {"linear": (4, 3), "conv": (4, 3)}
    undo = weights.add(update(0))
    for name, module in given.items():
        expected = before[name].to(weights.edit_dtype) + update(0)[name]
        torch.testing.assert_close(weights.weight(name), expected.to(weights.edit_dtype))
        assert torch.equal(held(module), weights.weight(name).to(dtype))
        drift = update(0)[name].norm() / before[name].float().norm()
        assert weights.drift()[name] == pytest.approx(float(drift), rel=1e-3)
    snapshot = weights.snapshot()
    undo()
    assert all(torch.equal(held(module), before[name]) for name, module in given.items())
    weights.restore(snapshot)
    with weights.original_in_modules():
        assert all(torch.equal(held(module), before[name]) for name, module in given.items())
    assert all(torch.equal(held(module), snapshot[name].to(dtype)) for name, module in given.items())
    weights.restore()
    assert all(torch.equal(held(module), before[name]) for name, module in given.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_within_original_weights_leaves_the_pre_trained_ones_alone(dtype: torch.dtype) -> None:
    given = modules(dtype)
    weights = EditedWeights(given)
    originals = {name: weights.original_weight(name).clone() for name in given}
    with weights.original_in_modules():
        weights.add(update(0))
    for name, module in given.items():
        assert torch.equal(weights.original_weight(name), originals[name])
        assert torch.equal(held(module), weights.weight(name).to(dtype))
    weights.restore()
    assert all(torch.equal(held(module), originals[name].to(dtype)) for name, module in given.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sets_beside_the_modules_leave_them_and_each_other_alone(dtype: torch.dtype) -> None:
    given = modules(dtype)
    weights = EditedWeights(given)
    weights.add(update(0))
    inside = weights.snapshot()
    first, second = weights.beside(), weights.beside()
    assert all(torch.equal(first.weight(name), weights.original_weight(name)) for name in given)
    first.add(update(1))
    assert all(torch.equal(second.weight(name), weights.original_weight(name)) for name in given)
    assert all(torch.equal(weights.weight(name), inside[name]) for name in given)
    for name, module in given.items():
        assert torch.equal(held(module), inside[name].to(dtype))
        with first.in_modules():
            assert torch.equal(held(module), first.weight(name).to(dtype))
        assert torch.equal(held(module), inside[name].to(dtype))


# -- routing


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_tokens_meet_the_weights_of_their_set(name: str) -> None:
    module: Any = modules()[name]
    weights = EditedWeights({name: module})
    sets = [weights.beside(), weights.beside()]
    for seed, each in enumerate(sets):
        each.add({name: update(seed)[name]})
    routing = BesideModules(sets)
    x = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    with routing.routed([1, ORIGINAL, 0], [2, 1, 3]):
        output = module(x)[0]
        assert list(routing.spans) == [(1, 2), (ORIGINAL, 1), (0, 3)]
    expected = [sets[1].weight(name)] * 2 + [weights.original_weight(name)] + [sets[0].weight(name)] * 3
    for token, weight in enumerate(expected):
        torch.testing.assert_close(output[token], F.linear(x[0, token], weight, module.bias))
    with routing.original(), routing.routed([0, 1], [3, 3]):
        torch.testing.assert_close(module(x), F.linear(x, weights.original_weight(name), module.bias))
    assert not routing.spans and "forward" not in vars(module)


# -- passes


@pytest.mark.parametrize("max_tokens", [1, 64])
def test_passes_give_each_passage_its_own_states_and_cache_what_no_edit_changes(max_tokens: int) -> None:
    forward, (weights,), passes = toy()
    passes.max_tokens_per_pass = max_tokens
    before = passes.reference_states(PASSAGES)
    weights.add({"linear": update(0)["linear"]})
    states = passes.answer_states(PASSAGES)
    wanted = [forward.edited(forward.embedding[list(p.input_ids)])[list(p.positions)] for p in PASSAGES]
    torch.testing.assert_close(states.hidden, torch.cat(wanted))
    assert states.targets.tolist() == [4, 5, 1, 6, 7] and states.owner.tolist() == [0, 0, 1, 2, 2]
    assert forward.prefixes == len(PASSAGES)  # once each
    for passage, reference in zip(PASSAGES, before, strict=True):
        embedded = forward.embedding[list(passage.input_ids)][list(passage.positions)]
        bias: Any = forward.edited.bias
        torch.testing.assert_close(reference, F.linear(embedded, weights.original_weight("linear"), bias))


# -- gradients


def test_a_trace_and_what_is_collected_are_autograds_gradient() -> None:
    forward, (weights,), passes = toy()
    gradients = Gradients(passes, weights)
    weight = weights.weight("linear").clone().requires_grad_()
    loss = plain_loss(forward, weight, PASSAGES)
    (expected,) = torch.autograd.grad(loss, weight)
    trace = gradients.trace(PASSAGES)
    assert trace.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    torch.testing.assert_close(trace.value_gradients["linear"].T @ trace.keys["linear"], expected)
    with gradients.collecting() as (sums,):
        for _, states in passes.answer_chunks(PASSAGES):
            (negative_log_likelihood(passes.forward, states.hidden, states.targets).sum() / 5).backward()
    torch.testing.assert_close(sums["linear"], expected)
    assert not forward.edited._forward_hooks


def test_several_sets_are_traced_and_collected_in_one_pass() -> None:
    forward, sets, passes = toy(routing=None)
    gradients = Gradients(passes, sets[0])
    sets[1].add({"linear": update(1)["linear"]})
    batches = [PASSAGES[:2], PASSAGES[1:]]
    traces = gradients.trace_batches(batches)
    with gradients.collecting() as sums:
        for _, states in passes.answer_chunks([*batches[0], *batches[1]], [0, 0, 1, 1]):
            negative_log_likelihood(passes.forward, states.hidden, states.targets).sum().backward()
    for each, batch, trace, total in zip(sets, batches, traces, sums, strict=True):
        weight = each.weight("linear").clone().requires_grad_()
        (expected,) = torch.autograd.grad(plain_loss(forward, weight, batch), weight)
        torch.testing.assert_close(trace.value_gradients["linear"].T @ trace.keys["linear"], expected)
        torch.testing.assert_close(total["linear"], expected * sum(len(p.targets) for p in batch))


def test_what_had_taken_and_still_has_gets_no_positions_and_all_else_is_the_whole_trace() -> None:
    forward, sets, passes = toy(routing=None)
    gradients = Gradients(passes, sets[0])
    sets[1].add({"linear": update(1)["linear"]})
    batches = [PASSAGES, PASSAGES[1:]]
    whole = gradients.trace_batches(batches)
    losses = sorted([*whole[0].hardest.tolist(), *whole[1].hardest.tolist()])
    until = math.exp(-(losses[2] + losses[3]) / 2)  # three of the five passages have taken
    untaken = [np.array([False, False, False]), np.array([True, False])]
    traces = gradients.trace_batches(batches, "answer", until, untaken)
    for trace, full, before in zip(traces, whole, untaken, strict=True):
        torch.testing.assert_close(trace.hardest, full.hardest)
        torch.testing.assert_close(trace.sums, full.sums)
        assert trace.loss == pytest.approx(full.loss, rel=1e-5)
        is_traced = (full.hardest > -math.log(until)) | torch.from_numpy(before)
        assert set(trace.owner.tolist()) == set(is_traced.nonzero()[:, 0].tolist())
        chosen, expected = trace.of(is_traced), full.of(is_traced)
        torch.testing.assert_close(chosen.owner, expected.owner)
        torch.testing.assert_close(chosen.keys["linear"], expected.keys["linear"])
        torch.testing.assert_close(chosen.value_gradients["linear"], expected.value_gradients["linear"])
        assert chosen.loss == pytest.approx(expected.loss, rel=1e-5)
    (taken,) = gradients.trace_batches([PASSAGES], "answer", 1e-9, [np.zeros(3, bool)])
    assert len(taken.owner) == len(taken.keys["linear"]) == 0 and taken.loss == pytest.approx(whole[0].loss, rel=1e-5)


# -- tokens, decoding


def test_an_encoder_needs_a_tokenizer_and_what_the_model_says_of_itself() -> None:
    encoder = PassageEncoder(tiny_tokenizer("tiny-llama"), tiny_model("tiny-llama"), "tiny")
    passage = encoder.tokenize("Rome is in", "Peru", "Rome")
    assert encoder.tokenizer.decode(passage.targets) == " Peru" and passage.subject_position is not None
    with pytest.raises(ValueError, match="line 3: .* but the context of tiny holds 512"):
        encoder.tokenize("x" * 600, "Peru", origin="line 3")


def test_a_decoder_gives_each_prompt_its_continuation() -> None:
    tokenizer = tiny_tokenizer("tiny-llama")
    asked: list[Any] = []

    def generate(input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, **_: Any) -> Tensor:
        asked.append(max_new_tokens)
        return torch.cat([input_ids, input_ids[:, -1:]], dim=1)  # says the last token again

    forward, _, passes = toy()
    forward.model = SimpleNamespace(generate=generate)  # type: ignore[assignment]
    decoder = Decoder(passes, PassageEncoder(tokenizer, tiny_model("tiny-llama")))
    assert decoder.generate(["abc", "ab", "xyz!"], batch_size=2) == ["c", "b", "!"]
    assert asked == [4, 4]
