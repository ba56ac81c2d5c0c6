"""The kinds of weight update: what each does to an LLM, what it measures, and how it is stored."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rledit_env.lm.editable import EditableLM
from rledit_env.reward import frobenius_penalty
from rledit_env.updates import NOTHING, Dense, RankOne, Replacement, Update, from_tensors


@pytest.fixture
def lm(tiny_lm: Callable[..., EditableLM]) -> EditableLM:
    lm = tiny_lm(modules="model.layers.[1-2].mlp.{gate,up}_proj")
    drawn(lm, RankOne).apply(lm)  # so that W is not W₀
    return lm


def drawn(lm: EditableLM, kind: type[Update]) -> Any:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return 0.05 * torch.randn(shape, generator=generator)

    shapes = lm.module_shapes.items()
    if kind is RankOne:
        return RankOne({m: draw(3, d_in) for m, (d_in, _) in shapes}, {m: draw(3, d_out) for m, (_, d_out) in shapes})
    matrices = {m: draw(d_out, d_in) for m, (d_in, d_out) in list(shapes)[1:]}  # dense ones may leave modules out
    return Dense(matrices) if kind is Dense else Replacement(matrices)


@pytest.fixture(params=[RankOne, Dense, Replacement])
def update(lm: EditableLM, request: pytest.FixtureRequest) -> Any:
    return drawn(lm, request.param)


def test_an_applied_update_leads_to_the_weights_that_it_says_and_is_taken_back_bit_for_bit(
    lm: EditableLM, update: Update
) -> None:
    before = lm.snapshot()
    expected = update.updated(before, {m: lm.original_weight(m) for m in before})
    _, undo = update.apply(lm)
    for m, weight in lm.snapshot().items():
        torch.testing.assert_close(weight, expected[m])
    undo()
    assert all(torch.equal(lm.weight(m), w) for m, w in before.items())


def test_norm_and_penalty_are_those_of_the_change_made(lm: EditableLM, update: Update) -> None:
    before, norm = lm.snapshot(), update.norm(lm)
    made, _ = update.apply(lm)
    squares = sum(float((lm.weight(m) - w).double().square().sum()) for m, w in before.items())
    assert norm == pytest.approx(math.sqrt(squares), rel=1e-4)
    assert float(made.penalty(frobenius_penalty)) == pytest.approx(squares, rel=1e-4)


def test_the_penalty_s_gradient_is_by_the_action_s_parts_and_of_the_change(lm: EditableLM, update: Update) -> None:
    before = lm.snapshot()
    made, _ = update.apply(lm)
    cost, gradient = made.penalty_gradient(frobenius_penalty, 0.5)
    assert cost == pytest.approx(0.5 * float(made.penalty(frobenius_penalty)))
    assert set(gradient) == set(update.PARTS)
    for m, slope in gradient[update.PARTS[-1]].items():
        change = lm.weight(m) - before[m]  # ∂ ½‖ΔW‖² / ∂ΔW
        expected = update.keys[m] @ change.T if isinstance(update, RankOne) else change
        torch.testing.assert_close(slope, expected, rtol=1e-3, atol=1e-5)


def test_a_replacement_that_is_interrupted_changes_nothing(lm: EditableLM, monkeypatch: pytest.MonkeyPatch) -> None:
    before, replace = lm.snapshot(), lm.replace

    def interrupted(accumulated: Any) -> None:
        replace(accumulated)
        raise KeyboardInterrupt

    monkeypatch.setattr(lm, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        drawn(lm, Replacement).apply(lm)
    assert all(torch.equal(lm.weight(m), w) for m, w in before.items())


def test_an_update_is_read_back_from_its_tensors(update: Update) -> None:
    again = from_tensors(update.tensors())
    assert type(again) is type(update) and set(again.parts()) == set(update.PARTS)
    assert all(torch.equal(t, again.tensors()[name]) for name, t in update.tensors().items())


def test_no_tensors_are_the_update_that_does_nothing_and_unknown_ones_are_none(lm: EditableLM) -> None:
    assert from_tensors({}) is NOTHING and NOTHING.norm(lm) == 0.0
    with pytest.raises(ValueError, match=r"it holds \['keys'\]"):
        from_tensors({"keys.a": torch.zeros(1, 2)})


def test_what_does_not_fit_the_modules_is_named(lm: EditableLM, update: Update) -> None:
    assert update.misfit(lm.module_shapes) is None
    wider = {m: (d_in + 1, d_out) for m, (d_in, d_out) in lm.module_shapes.items()}
    assert "has shape" in str(update.misfit(wider))
