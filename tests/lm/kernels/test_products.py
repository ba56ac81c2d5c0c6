"""Tests of matrix products in float32 on a CPU."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from rledit_env.lm.kernels import products
from rledit_env.lm.kernels.products import FASTER, FastConv1D, FastLinear, even, linear, outer, prefer_fast_products
from rledit_env.lm.loading.loader import load_model


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    """The tests' matrices are small, and the processor is one on which oneDNN is faster."""
    monkeypatch.setattr(products, "WORTHWHILE", 0)
    monkeypatch.setattr(products, "mkl_suits", lambda: False)


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def by_onednn(monkeypatch):
    """How many products it did."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch is built without oneDNN")
    assert products._available()
    calls = []
    original = products._multiplied
    monkeypatch.setattr(products, "_multiplied", lambda *a: calls.append(a) or original(*a))
    return calls


@pytest.mark.parametrize("shape", [(7, 24), (3, 5, 24), (1, 24), (2, 1, 3, 24)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_a_product_and_all_its_gradients_are_those_of_float64(by_onednn, shape, transposed, biased):
    x, weight = numbers(*shape), numbers(24, 10, seed=1).t() if transposed else numbers(10, 24, seed=1)
    bias = numbers(10, seed=2) if biased else None
    cotangent = numbers(*shape[:-1], 10, seed=3)
    results = []
    for dtype, multiply in ((torch.float32, linear), (torch.float64, F.linear)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias) if t is not None]
        output = multiply(*leaves)
        output.backward(cotangent.to(dtype))
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    assert len(by_onednn) == 3  # the product, and those of two gradients
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


def test_views_and_gradients_without_memory_of_their_own_are_multiplied_right(by_onednn):
    x, weight = numbers(2, 8, 24)[:, ::2].requires_grad_(), numbers(10, 48, seed=1)[:, ::2]
    output = linear(x, weight)
    torch.testing.assert_close(output, F.linear(x, weight))
    (gradient,) = torch.autograd.grad(output.sum(), x)  # its cotangent is one number, expanded
    torch.testing.assert_close(gradient, weight.sum(0).expand(2, 4, 24))
    a, b = numbers(7, 43).t(), numbers(43, 9, seed=1)
    torch.testing.assert_close(outer(a, b), a.t() @ b)
    assert len(by_onednn) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_numbers_of_rows_make_few_sizes(by_onednn, dtype):
    weight = numbers(10, 24).to(dtype)
    for rows in range(1, 700):
        x = numbers(rows, 24, seed=rows).to(dtype)
        wanted = x.double() @ weight.double().T
        atol = 0.05 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(linear(x, weight).double(), wanted, rtol=0.02, atol=atol)
        outer(x, x)
    assert len(by_onednn) == 2 * 699
    assert len({len(x) for x, *_ in by_onednn[::2]}) == len({x.shape[1] for x, *_ in by_onednn[1::2]}) == 39
    assert all(rows <= even(rows) < rows + max(rows, 16) and even(even(rows)) == even(rows) for rows in range(1, 3000))


def test_a_weight_without_gradient_keeps_no_input(by_onednn):
    x, weight = numbers(4, 24).requires_grad_(), numbers(10, 24, seed=1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(x, weight)
    assert [t.data_ptr() for t in kept] == [weight.data_ptr()]


def test_what_onednn_is_not_for_is_left_to_pytorch(by_onednn, monkeypatch):
    x, weight = numbers(4, 24).double(), numbers(10, 24, seed=1).double()
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert torch.equal(outer(x, x), x.T @ x)
    assert linear(numbers(0, 24), numbers(10, 24)).shape == (0, 10)
    assert not outer(numbers(0, 24), numbers(0, 10)).any()
    monkeypatch.setattr(products, "WORTHWHILE", 2**20)
    x, weight = numbers(4, 24), numbers(10, 24, seed=1)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert not by_onednn


def test_without_onednn_pytorch_multiplies(monkeypatch):
    monkeypatch.setattr(products, "_available", lambda: False)
    x, weight, bias = numbers(3, 4, 24), numbers(10, 24, seed=1), numbers(10, seed=2)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2", "tiny-qwen2"])
def test_a_models_logits_and_weights_stay_what_they_are(by_onednn, name):
    model, _ = load_model(name, torch.float32, torch.device("cpu"))
    plain = copy.deepcopy(model)
    prefer_fast_products(model)
    kinds = {type(m) for m in model.modules()}
    assert kinds & {FastLinear, FastConv1D} and not kinds & {nn.Linear, Conv1D}
    ids = torch.arange(10).view(2, 5)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)
    assert by_onednn
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(issubclass(faster, usual) for usual, faster in FASTER.items())


def test_a_model_in_bfloat16_stays_as_it_is():
    model, _ = load_model("tiny-llama", torch.bfloat16, torch.device("cpu"))
    prefer_fast_products(model)
    assert not any(isinstance(m, FastLinear) for m in model.modules())


@pytest.mark.parametrize("maker, has_mkl, suits", [
    ("GenuineIntel", True, True), ("AuthenticAMD", True, False), ("GenuineIntel", False, False),
])  # fmt: skip
def test_float32_stays_with_mkl_on_its_makers_processors(monkeypatch, maker, has_mkl, suits):
    monkeypatch.undo()
    monkeypatch.setattr(products.Path, "read_text", lambda *a, **k: f"processor: 0\nvendor_id: {maker}\n")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: has_mkl)
    assert products.mkl_suits.__wrapped__() is suits
    monkeypatch.setattr(products, "mkl_suits", lambda: suits)
    large = numbers(8, 8)
    assert products.compiled(large, products.WORTHWHILE) == (products._available() and not suits)
    assert products.compiled(large.bfloat16(), 1)
