"""The operations that a training step and an edit cannot do without, counted.

Matrix products only, of real tokens only: the layers above the first edited one forward and backward, the layers below
it for passages never seen before, the output head at answer positions, gradients of the edited weights where a reward
asks for them, and the network's own products. Two operations a multiplication and addition.

Counted passage by passage. What several passages begin with can be computed once, as the package does on a CPU; with
``once`` it is counted so, over a whole step, and the floor is lower.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

import rledit_env.own_agents  # noqa: F401 - says so where another package is called agents
from agents import Hypernetwork
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage
from rledit_env.lm.kernels.products import linear, outer
from rledit_env.lm.suffix import ATTENTIONS


class Floor:
    """Counts for one model and its edited modules.

    Args:
        lm: the model.
        once: whether tokens with the same tokens before them count once, but for those of the state, where each
            passage's gradient is wanted.
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
        """The products of this many layers."""
        pairs = sum(self._depths(passages))  # of a query and a key
        return layers * (2 * self.layer * self._tokens(passages) + self.attention * pairs)

    def _depths(self, passages: Sequence[Passage]) -> list[int]:
        """Of each token that is computed, its place in its passage, from 1."""
        if self.once:
            return [len(t) for t in {p.input_ids[:n] for p in passages for n in range(1, len(p) + 1)}]
        return [n for p in passages for n in range(1, len(p) + 1)]

    def _tokens(self, passages: Sequence[Passage]) -> int:
        return len(self._depths(passages))

    def prefix(self, passages: Sequence[Passage]) -> float:
        """Of passages never seen before."""
        return self.layers_forward(passages, self.first)

    def suffix(self, passages: Sequence[Passage]) -> float:
        """A forward pass to the answers' probabilities; after the last attention, the answers' positions alone."""
        answers = sum(len(p.targets) for p in passages)
        whole = self.layers_forward(passages, self.layers - self.first) + 2 * self.head * answers
        if self.forward.narrows:
            whole -= 2 * self.outside_attention * (self._tokens(passages) - answers)
        return whole

    def backward(self, passages: Sequence[Passage], weights: bool) -> float:
        """The gradient of the edited modules' outputs and, if asked for, of their weights."""
        inputs = self.suffix(passages)
        if not self.attention_is_edited:  # nothing below the first edited module is needed
            inputs -= self.layers_forward(passages, 1) - 2 * self.outside_attention * self._tokens(passages)
        return inputs + (2 * self.edited * self._tokens(passages) if weights else 0)

    def step(
        self, edits: Sequence[Passage], new: Sequence[Passage], unrelated: Sequence[Passage], scored: Sequence[Passage]
    ) -> dict[str, float]:
        """What the LLM must do in a training step, by part.

        Args:
            edits: the next batch, whose state is computed.
            new: passages of the current batch's reward, not seen before.
            unrelated: those of them whose divergence from θ₀ is scored.
            scored: all passages of the reward, of the current and of earlier batches.
        """
        apart = copy.copy(self)
        apart.once = False
        return {
            "layers below the first edited one, for passages not seen before": self.prefix([*edits, *new]),
            "state": apart.suffix(edits) + apart.backward(edits, weights=False),
            "θ₀'s states": self.suffix(unrelated),
            "reward": self.suffix(scored),
            "reward's gradient": self.backward(scored, weights=True),
        }

    def policy(self, network: Hypernetwork, rows: int, learn: bool) -> float:
        """The network on this many rows a module, the least squares and the update; for learning with its gradient."""
        config = network.config
        blocks = sum(2 * 2 * (d_in + d_out) * config.rank * config.blocks for d_in, d_out in network.shapes.values())
        solve = sum(4 * rows * d_in + rows**2 / 3 for d_in, _ in network.shapes.values())
        update = 2 * self.edited
        credit = 4 * self.edited if learn else 0
        return rows * (blocks * (3 if learn else 1) + solve * (3 if learn else 1) + update + credit)


def _weights(module: Any) -> int:
    return sum(w.numel() for w in module.parameters() if w.dim() == 2)


def matmul_rate(dtype: torch.dtype, device: str, shape: tuple[int, int, int]) -> float:
    """Operations a second of the package's matrix products (m, k) × (k, n), the best of several tries."""
    m, k, n = shape
    a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)
    best, enough = 0.0, 4e9 if device == "cpu" else 2e13  # operations of a try: long enough for the clock
    for _ in range(5):
        count = max(1, int(enough / (2 * m * k * n)))
        _wait(device)
        start = time.perf_counter()
        for _ in range(count):
            linear(a, b)
        _wait(device)
        best = max(best, count * 2 * m * k * n / (time.perf_counter() - start))
    return best


@torch.no_grad()
def pass_rate(lm: EditableLM, tokens: int, answers: int) -> float:
    """Operations a second of a pass's own products, the median of several tries.

    Those of one pass of so many tokens, with so many answer positions: through the layers above the first edited one
    and the output head, forward and backward, and the gradients of the edited weights. Unlike :func:`matmul_rate`'s,
    they are of the shapes that a step has, and their weights come from memory, one after another.
    """
    layers, head = lm.forward.layers[lm.forward.first_layer :], lm.forward.output.module.weight
    weights = [(p, tokens) for layer in layers for p in layer.parameters() if p.dim() == 2] + [(head, answers)]
    edited = [lm.model.get_submodule(name).weight for name in lm.module_shapes]
    numbers = {
        (rows, width): torch.randn(rows, width, device=head.device, dtype=head.dtype)
        for weight, rows in [*weights, *((w, tokens) for w in edited)] for width in weight.shape
    }  # fmt: skip
    operations = sum(4 * rows * w.numel() for w, rows in weights) + sum(2 * tokens * w.numel() for w in edited)
    rates = []
    for _ in range(7):
        _wait(head.device)
        start = time.perf_counter()
        for weight, rows in weights:
            linear(numbers[rows, weight.shape[1]], weight)
            linear(numbers[rows, weight.shape[0]], weight.t())
        for weight in edited:
            outer(numbers[tokens, weight.shape[0]], numbers[tokens, weight.shape[1]])
        _wait(head.device)
        rates.append(operations / (time.perf_counter() - start))
    return statistics.median(rates)


def _wait(device: Any) -> None:
    if str(device).startswith("cuda"):
        torch.cuda.synchronize()
