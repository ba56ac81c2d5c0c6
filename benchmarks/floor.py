"""Counts the operations that a training step or an edit needs at least.

Only matrix products of real tokens (no padding) count: the layers above the first edited one, forward and backward; the
layers below it, for passages not seen before; the output head at answer positions; the gradients of the edited weights,
if the reward needs them; and the products of the hypernetwork. A multiplication and an addition are two operations.

Every passage counts in full. The package computes shared prefixes only once on a CPU; with ``once`` they also count
once over a whole step, and the floor is lower.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

import rledit_env.own_agents  # noqa: F401 - checks that `agents` is this package
from agents import Hypernetwork
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage
from rledit_env.lm.kernels.products import linear, outer
from rledit_env.lm.suffix import ATTENTIONS


class Floor:
    """Counts operations for one model and its edited modules.

    Args:
        lm: the model.
        once: whether tokens of shared prefixes count once. Those of the state always count in full, since each
            passage's own gradient is needed there.
    """

    def __init__(self, lm: EditableLM, once: bool = False) -> None:
        self.once = once
        forward = self.forward = lm.forward
        self.first = forward.first_layer
        self.layers = len(forward.layers)
        self.layer = _weights(forward.layers[0])
        attention = next(a for name in ATTENTIONS if (a := getattr(forward.layers[0], name, None)) is not None)
        self.outside_attention = self.layer - _weights(attention)
        self.attention_is_edited = any(
            n.startswith(f"{first}.{name}.") for name in ATTENTIONS for n in lm.module_shapes
            for first, module in lm.model.named_modules() if module is forward.layers[self.first]
        )  # fmt: skip
        config = lm.model.config.get_text_config()
        self.attention = 4 * config.num_attention_heads * (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )  # a query's products with one key and one value
        self.head = config.vocab_size * config.hidden_size
        self.edited = sum(d_in * d_out for d_in, d_out in lm.module_shapes.values())

    def layers_forward(self, passages: Sequence[Passage], layers: int) -> float:
        """Operations of a forward pass through this many layers."""
        pairs = sum(self._positions(passages))  # of a query and a key
        return layers * (2 * self.layer * self._tokens(passages) + self.attention * pairs)

    def _positions(self, passages: Sequence[Passage]) -> list[int]:
        """The position in its passage, from 1, of every token that is computed."""
        if self.once:
            return [len(t) for t in {p.input_ids[:n] for p in passages for n in range(1, len(p) + 1)}]
        return [n for p in passages for n in range(1, len(p) + 1)]

    def _tokens(self, passages: Sequence[Passage]) -> int:
        return len(self._positions(passages))

    def prefix(self, passages: Sequence[Passage]) -> float:
        """Operations of the layers below the first edited one, for passages not seen before."""
        return self.layers_forward(passages, self.first)

    def suffix(self, passages: Sequence[Passage]) -> float:
        """Operations of the forward pass from the first edited layer to the answers' probabilities.

        After the last attention, only the answers' positions count.
        """
        answers = sum(len(p.targets) for p in passages)
        operations = self.layers_forward(passages, self.layers - self.first) + 2 * self.head * answers
        if self.forward.narrows:
            operations -= 2 * self.outside_attention * (self._tokens(passages) - answers)
        return operations

    def backward(self, passages: Sequence[Passage], weights: bool) -> float:
        """Operations of the gradients of the edited modules' outputs and, with ``weights``, of their weights."""
        inputs = self.suffix(passages)
        if not self.attention_is_edited:  # nothing below the first edited module is needed
            inputs -= self.layers_forward(passages, 1) - 2 * self.outside_attention * self._tokens(passages)
        return inputs + (2 * self.edited * self._tokens(passages) if weights else 0)

    def step(
        self, edits: Sequence[Passage], new: Sequence[Passage], unrelated: Sequence[Passage], scored: Sequence[Passage]
    ) -> dict[str, float]:
        """Operations of the LLM in a training step, by part.

        Args:
            edits: edit passages of the next batch, from which the state is computed.
            new: passages of the current batch's reward, which were not seen before.
            unrelated: those of ``new`` whose divergence from θ₀ is scored.
            scored: all passages of the reward, of the current and of earlier batches.
        """
        in_full = copy.copy(self)
        in_full.once = False
        return {
            "layers below the first edited one, for passages not seen before": self.prefix([*edits, *new]),
            "state": in_full.suffix(edits) + in_full.backward(edits, weights=False),
            "θ₀'s states": self.suffix(unrelated),
            "reward": self.suffix(scored),
            "reward's gradient": self.backward(scored, weights=True),
        }

    def policy(self, network: Hypernetwork, rows: int, learn: bool) -> float:
        """Operations of the network on this many rows per module, the least squares and the update.

        With ``learn``, those of their gradient are included.
        """
        config = network.config
        blocks = sum(2 * 2 * (d_in + d_out) * config.rank * config.blocks for d_in, d_out in network.shapes.values())
        solve = sum(4 * rows * d_in + rows**2 / 3 for d_in, _ in network.shapes.values())
        update = 2 * self.edited
        credit = 4 * self.edited if learn else 0
        return rows * (blocks * (3 if learn else 1) + solve * (3 if learn else 1) + update + credit)


def _weights(module: Any) -> int:
    return sum(w.numel() for w in module.parameters() if w.dim() == 2)


def matmul_rate(dtype: torch.dtype, device: str, shape: tuple[int, int, int]) -> float:
    """Operations per second of the package's matrix product (m, k) × (k, n), the best of several runs."""
    m, k, n = shape
    a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)
    best, operations = 0.0, 4e9 if device == "cpu" else 2e13  # operations of a run, enough to be timed
    for _ in range(5):
        count = max(1, int(operations / (2 * m * k * n)))
        _wait(device)
        start = time.perf_counter()
        for _ in range(count):
            linear(a, b)
        _wait(device)
        best = max(best, count * 2 * m * k * n / (time.perf_counter() - start))
    return best


@torch.no_grad()
def pass_rate(lm: EditableLM, tokens: int, answers: int) -> float:
    """Operations per second of the products of one forward and backward pass, the median of several runs.

    The products are those of the layers above the first edited one and of the output head, forward and backward, and
    those of the gradients of the edited weights. Unlike the product of :func:`matmul_rate`, they have the shapes of a
    step, and each reads another weight from memory.

    Args:
        lm: the model.
        tokens: tokens in the pass.
        answers: answer positions among them.
    """
    layers, head = lm.forward.layers[lm.forward.first_layer :], lm.forward.output.module.weight
    weights = [(p, tokens) for layer in layers for p in layer.parameters() if p.dim() == 2] + [(head, answers)]
    edited = [lm.model.get_submodule(name).weight for name in lm.module_shapes]
    operands = {
        (rows, width): torch.randn(rows, width, device=head.device, dtype=head.dtype)
        for weight, rows in [*weights, *((w, tokens) for w in edited)] for width in weight.shape
    }  # fmt: skip
    operations = sum(4 * rows * w.numel() for w, rows in weights) + sum(2 * tokens * w.numel() for w in edited)
    rates = []
    for _ in range(7):
        _wait(head.device)
        start = time.perf_counter()
        for weight, rows in weights:
            linear(operands[rows, weight.shape[1]], weight)
            linear(operands[rows, weight.shape[0]], weight.t())
        for weight in edited:
            outer(operands[tokens, weight.shape[0]], operands[tokens, weight.shape[1]])
        _wait(head.device)
        rates.append(operations / (time.perf_counter() - start))
    return statistics.median(rates)


def _wait(device: Any) -> None:
    if str(device).startswith("cuda"):
        torch.cuda.synchronize()
