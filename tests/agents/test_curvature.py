"""K-FAC's curvature, and the projection onto its directions of low curvature."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.curvature import (
    Curvature,
    LowCurvature,
    answer_curvature,
    low_curvature,
    projected,
    restrained,
    text_curvature,
)
from agents.key_statistics import key_statistics, output_moments
from rledit_env.lm.editable import EditableLM

D_IN, D_OUT = 5, 4
MODULES = "model.layers.[1-2].mlp.down_proj"


def curvature_of(seed: int = 0, d_in: int = D_IN, d_out: int = D_OUT) -> Curvature:
    """Second moments of random rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    u, g = (
        torch.randn(20, d, generator=generator, dtype=torch.float64) * 3.0 ** -torch.arange(d) for d in (d_in, d_out)
    )
    return Curvature(u.T @ u / 20, g.T @ g / 20)


def change_of(seed: int = 1) -> Tensor:
    return torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_projection(curvature: Curvature, energy: float) -> Tensor:
    """I − Σ x xᵀ over the eigenvectors x of G ⊗ A (rows of ΔW one after another) with the largest eigenvalues that
    together have the share ``energy`` of the trace, (d_out d_in, d_out d_in)."""
    values, vectors = torch.linalg.eigh(torch.kron(curvature.outputs, curvature.inputs))
    largest_first = values.argsort(descending=True)
    total, projection = 0.0, torch.eye(len(values), dtype=torch.float64)
    for place in largest_first:
        if total >= energy * float(values.sum()):
            break
        total += float(values[place])
        projection -= torch.outer(vectors[:, place], vectors[:, place])
    return projection


@pytest.mark.parametrize("energy", [0.3, 0.6, 0.9, 0.99, 0.9999])
def test_the_projection_is_that_of_the_dense_kronecker_product(energy: float) -> None:
    curvature, change = curvature_of(), change_of()
    expected = (dense_projection(curvature, energy) @ change.flatten()).view(D_OUT, D_IN)
    torch.testing.assert_close(LowCurvature.of(curvature, energy).project(change), expected, atol=1e-10, rtol=1e-8)


def test_it_is_the_published_formula_of_both_rotations_and_a_mask() -> None:
    """U (UᵀΔW V ⊙ M) Vᵀ, with M = 1 where λ_G,i λ_A,j is below the least of the removed ones."""
    curvature, change, energy = curvature_of(2), change_of(3), 0.9
    of_inputs, v = torch.linalg.eigh(curvature.inputs)
    of_outputs, u = torch.linalg.eigh(curvature.outputs)
    values = torch.outer(of_outputs, of_inputs)
    descending = values.flatten().sort(descending=True).values
    rank = int((descending.cumsum(0) / descending.sum() < energy).sum()) + 1
    kept = (values < descending[rank - 1]).double()
    assert 0 < kept.sum() < kept.numel()
    expected = u @ ((u.T @ change @ v) * kept) @ v.T
    torch.testing.assert_close(LowCurvature.of(curvature, energy).project(change), expected, atol=1e-10, rtol=1e-8)


def test_projecting_twice_is_projecting_once_and_it_is_symmetric() -> None:
    projection = LowCurvature.of(curvature_of(), 0.9)
    change, other = change_of(1), change_of(2)
    once = projection.project(change)
    torch.testing.assert_close(projection.project(once), once, atol=1e-12, rtol=1e-10)
    assert float(once.norm()) < float(change.norm())
    left, right = float((once * other).sum()), float((change * projection.project(other)).sum())
    assert left == pytest.approx(right, rel=1e-10)


def test_a_product_is_projected_by_its_factors() -> None:
    projection = LowCurvature.of(curvature_of(), 0.9)
    generator = torch.Generator().manual_seed(4)
    keys, values = (torch.randn(3, d, generator=generator, dtype=torch.float64) for d in (D_IN, D_OUT))
    expected = projection.project(values.T @ keys)
    torch.testing.assert_close(projection.project_product(values, keys), expected, atol=1e-12, rtol=1e-10)


def test_in_bfloat16_only_the_removed_part_is_rounded() -> None:
    curvature, change = curvature_of(), change_of()
    projection = LowCurvature.of(curvature, 0.9)
    exact = projection.project(change)
    rounded = projection.to(change.device, torch.bfloat16).project(change)
    assert rounded.dtype == change.dtype
    removed = float((change - exact).norm())
    assert 0 < float((rounded - exact).norm()) < 0.02 * removed


def test_a_change_along_a_removed_direction_vanishes_and_along_another_it_stays() -> None:
    curvature = curvature_of()
    projection = LowCurvature.of(curvature, 0.9)
    g, a = (torch.linalg.eigh(factor).eigenvectors for factor in (curvature.outputs, curvature.inputs))
    steepest, flattest = torch.outer(g[:, -1], a[:, -1]), torch.outer(g[:, 0], a[:, 0])
    assert float(projection.project(steepest).abs().max()) < 1e-12
    torch.testing.assert_close(projection.project(flattest), flattest, atol=1e-12, rtol=0)


def test_the_rise_of_the_loss_is_the_quadratic_form_and_a_projected_change_has_little_of_it() -> None:
    curvature, change = curvature_of(), change_of()
    form = 0.5 * change.flatten() @ torch.kron(curvature.outputs, curvature.inputs) @ change.flatten()
    assert curvature.rise(change) == pytest.approx(float(form), rel=1e-9)
    rises = [curvature.rise(LowCurvature.of(curvature, energy).project(change)) for energy in (0.5, 0.9, 0.99)]
    assert curvature.rise(change) > rises[0] > rises[1] > rises[2]
    # What is left of the trace bounds the rise: ½ ‖ΔW‖² (1 − γ) tr(A ⊗ G).
    trace = float(curvature.outputs.trace() * curvature.inputs.trace())
    assert rises[2] <= 0.5 * float(change.square().sum()) * 0.01 * trace


def test_only_the_eigenvectors_of_removed_directions_are_kept() -> None:
    projection = LowCurvature.of(curvature_of(), 0.5)
    assert projection.outputs.shape[1] < D_OUT and projection.inputs.shape[1] < D_IN
    assert projection.removed.any(0).all() and projection.removed.any(1).all()


def test_directions_without_curvature_are_not_removed() -> None:
    """A of rank 1 and G of rank 1: one direction has all of the curvature."""
    u, g = torch.ones(D_IN, dtype=torch.float64), torch.ones(D_OUT, dtype=torch.float64)
    projection = LowCurvature.of(Curvature(torch.outer(u, u), torch.outer(g, g)), 0.999)
    assert float(projection.removed.sum()) == 1
    change = change_of()
    expected = change - torch.outer(g, u) * float(g @ change @ u) / (D_IN * D_OUT)
    torch.testing.assert_close(projection.project(change), expected, atol=1e-10, rtol=0)


def test_curvatures_are_mixed_by_their_share() -> None:
    one, two = curvature_of(0), curvature_of(1)
    mixed = one.mixed(two, 0.25)
    torch.testing.assert_close(mixed.inputs, 0.75 * one.inputs + 0.25 * two.inputs)
    torch.testing.assert_close(mixed.outputs, 0.75 * one.outputs + 0.25 * two.outputs)


@pytest.mark.parametrize("numpy", [False, True])
def test_every_kind_of_action_is_restrained_in_its_array_backend(numpy: bool) -> None:
    projections = low_curvature({"m": curvature_of()}, 0.9)
    generator = torch.Generator().manual_seed(5)
    keys, values = (torch.randn(3, d, generator=generator) for d in (D_IN, D_OUT))
    expected = projected({"m": values.T @ keys}, projections)["m"]

    def array(tensor: Tensor) -> Any:
        return tensor.numpy() if numpy else tensor

    for action, part in (
        ({"keys": {"m": array(keys)}, "values": {"m": array(values)}}, "updates"),
        ({"updates": {"m": array(values.T @ keys)}}, "updates"),
        ({"accumulated": {"m": array(values.T @ keys)}}, "accumulated"),
    ):
        found = restrained(action, projections)
        assert set(found) == {part} and isinstance(found[part]["m"], np.ndarray if numpy else Tensor)
        torch.testing.assert_close(torch.as_tensor(found[part]["m"]), expected)
    assert restrained({"updates": {}}, projections) == {"updates": {}}


# -- the curvature of a model


@pytest.fixture
def lm(tiny_lm: Callable[..., EditableLM]) -> EditableLM:
    return tiny_lm("tiny-llama", MODULES)


def test_the_curvature_of_text_is_of_the_texts_that_the_prior_uses(
    lm: EditableLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agents.key_statistics.cache_dir", lambda: tmp_path)
    modules = list(lm.module_shapes)
    found = text_curvature(lm, modules, tokens=1024, progress=False)
    inputs = key_statistics(lm, modules, tokens=1024, progress=False).second_moments
    outputs = output_moments(lm, modules, tokens=256, progress=False)
    assert (found.tokens, set(found.by_module)) == (1024, set(modules)) and found.seconds > 0
    for m, curvature in found.by_module.items():
        assert torch.equal(curvature.inputs, inputs[m]) and torch.equal(curvature.outputs, outputs[m])


def test_the_time_of_the_curvature_is_said_before_the_first_run_and_known_afterwards(
    lm: EditableLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("agents.key_statistics.cache_dir", lambda: tmp_path)
    modules = list(lm.module_shapes)
    first = text_curvature(lm, modules, tokens=1024)
    said = capsys.readouterr().out
    assert "once for this model: second moments of 2 modules' inputs over 1,024 tokens" in said
    assert "once for this model: second moments of 2 modules' output gradients over 256 tokens" in said
    again = text_curvature(lm, modules, tokens=1024)
    assert "once for this model" not in capsys.readouterr().out
    assert again.seconds == first.seconds > 0


def test_the_curvature_of_facts_is_that_of_autograd(lm: EditableLM) -> None:
    passages = [lm.tokenize("The home of Ann is", "Peru"), lm.tokenize("Bob lives in", "Oslo town")]
    modules = list(lm.module_shapes)
    inputs: dict[str, list[Tensor]] = {m: [] for m in modules}
    gradients: dict[str, list[Tensor]] = {m: [] for m in modules}
    for p in passages:
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def keep(name: str, kept: dict[str, tuple[Tensor, Tensor]] = seen) -> Any:
            def hook(_module: Any, args: Any, output: Tensor) -> Tensor:
                kept[name] = args[0].detach()[0], output.requires_grad_()
                return output

            return hook

        handles = [lm.model.get_submodule(m).register_forward_hook(keep(m)) for m in modules]
        with torch.enable_grad():
            logits = lm.model(input_ids=torch.tensor([p.input_ids])).logits[0]
            loss = -logits.log_softmax(-1)[list(p.positions), torch.tensor(p.targets)].sum()
            slopes = torch.autograd.grad(loss, [seen[m][1] for m in modules])
        for handle in handles:
            handle.remove()
        for m, slope in zip(modules, slopes, strict=True):
            inputs[m].append(seen[m][0][list(p.positions)])
            gradients[m].append(slope[0][list(p.positions)])
    found = answer_curvature(lm, passages, modules)
    for m in modules:
        u, g = torch.cat(inputs[m]), torch.cat(gradients[m])
        torch.testing.assert_close(found[m].inputs, u.T @ u / len(u), rtol=1e-3, atol=1e-5)
        expected = g.T @ g / len(g)
        torch.testing.assert_close(found[m].outputs, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
