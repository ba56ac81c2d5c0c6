"""Tests of the gated feed-forward layers of models that run on a CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rledit_env.lm.kernels.gates import FastGate, prefer_fast_gates
from rledit_env.lm.loading.loader import load_model

GATED = ("tiny-llama", "tiny-mistral", "tiny-qwen2", "tiny-qwen3")
OTHERS = ("tiny-gpt2", "tiny-gemma2")  # no gate; a gate that is no SiLU


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GATED)
def test_a_layer_and_its_gradient_are_the_models_own_bit_for_bit(name, dtype):
    model, _ = load_model(name, dtype, torch.device("cpu"))
    model.requires_grad_(False)
    plain = {n: copy.deepcopy(m) for n, m in model.named_modules() if type(m).__name__.endswith("MLP")}
    prefer_fast_gates(model)
    assert plain
    generator = torch.Generator().manual_seed(0)
    for n, module in plain.items():
        fast = model.get_submodule(n)
        assert isinstance(fast, FastGate) and isinstance(fast, type(module))
        x = torch.randn(2, 5, module.gate_proj.in_features, generator=generator).to(dtype)
        cotangent = torch.randn(x.shape, generator=generator).to(dtype)
        results = []
        for layer in (fast, module):
            leaf = x.clone().requires_grad_()
            kept: list[int] = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t, k=kept: k.append(t.data_ptr()) or t, lambda t: t):
                output = layer(leaf)
            output.backward(cotangent)
            results.append((output.detach(), leaf.grad, len(set(kept))))
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
        assert results[0][2] == results[1][2] - 1


@pytest.mark.parametrize("name", OTHERS)
def test_layers_that_compute_something_else_stay_as_they_are(name):
    model, _ = load_model(name, torch.float32, torch.device("cpu"))
    prefer_fast_gates(model)
    assert not any(isinstance(m, FastGate) for m in model.modules())


def test_a_layer_of_the_same_parts_with_another_formula_stays_as_it_is():
    class OddMLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.act_fn = nn.SiLU()

        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))

    model, _ = load_model("tiny-llama", torch.float32, torch.device("cpu"))
    model.odd = OddMLP()
    prefer_fast_gates(model)
    assert type(model.odd) is OddMLP
