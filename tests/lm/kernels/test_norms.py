"""Tests of the norms of models that run on a CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rledit_env.lm.kernels.norms import FastNorm, prefer_fast_norms
from rledit_env.lm.loading.loader import load_model

WITH_RMS_NORMS = ("tiny-llama", "tiny-mistral", "tiny-gemma2", "tiny-gemma3", "tiny-qwen2", "tiny-qwen3")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WITH_RMS_NORMS)
def test_a_norm_and_its_gradient_are_the_models_own(name, dtype):
    model, _ = load_model(name, dtype, torch.device("cpu"))
    model.requires_grad_(False)
    plain = {n: copy.deepcopy(m) for n, m in model.named_modules() if type(m).__name__.endswith("RMSNorm")}
    generator = torch.Generator().manual_seed(0)
    for module in plain.values():
        module.weight.data.normal_(generator=generator)
    for n, module in plain.items():
        model.get_submodule(n).weight.data.copy_(module.weight)
    prefer_fast_norms(model)
    assert plain
    for n, module in plain.items():
        fast = model.get_submodule(n)
        assert isinstance(fast, FastNorm) and isinstance(fast, type(module))
        x = (3 * torch.randn(2, 5, len(module.weight), generator=generator)).to(dtype)
        cotangent = torch.randn(x.shape, generator=generator).to(dtype)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        got, wanted = fast(ours), module(theirs)
        tolerance = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
        got.backward(cotangent)
        wanted.backward(cotangent)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=2 * tolerance, atol=2 * tolerance)


def test_a_norm_whose_weight_is_trained_gives_it_a_gradient():
    model, _ = load_model("tiny-llama", torch.float32, torch.device("cpu"))
    prefer_fast_norms(model)
    norm = next(m for m in model.modules() if isinstance(m, FastNorm))
    norm.weight.requires_grad_(True)
    norm(torch.ones(2, len(norm.weight))).sum().backward()
    assert norm.weight.grad is not None and norm.weight.grad.abs().max() > 0


def test_a_norm_that_computes_something_else_stays_as_it_is():
    class OddRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x):
            return 2 * x * x.square().mean(-1, keepdim=True).rsqrt() * self.weight

    model, _ = load_model("tiny-llama", torch.float32, torch.device("cpu"))
    model.odd = OddRMSNorm()
    prefer_fast_norms(model)
    assert type(model.odd) is OddRMSNorm


def test_a_copy_of_a_model_has_norms_of_its_own():
    model, _ = load_model("tiny-llama", torch.float32, torch.device("cpu"))
    prefer_fast_norms(model)
    other = copy.deepcopy(model)
    norm = next(m for m in other.modules() if isinstance(m, FastNorm))
    norm.weight.data.zero_()
    assert not norm(torch.ones(1, len(norm.weight))).any()
    assert next(m for m in model.modules() if isinstance(m, FastNorm)).weight.all()
