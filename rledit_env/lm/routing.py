"""Multiplies each token of a forward pass by its set of edited weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from rledit_env.lm.kernels.products import linear
from rledit_env.lm.module_calls import replaced_forward
from rledit_env.lm.weights import EditedWeights

ORIGINAL = -1  # the set of the pre-trained weights


class Routing(Protocol):
    """Multiplies passages by their sets of edited weights, which are counted from 0.

    Attributes:
        count: number of sets.
        serves_original: whether a pass can use the pre-trained weights (:data:`ORIGINAL`) together with other sets.
        spans: for each group of consecutive tokens in the running pass, its set and its number of tokens; empty where
            the model's modules hold the only set.
    """

    count: int
    serves_original: bool
    spans: Sequence[tuple[int, int]]

    def sort_keys(self, sets: Sequence[int]) -> Sequence[int]:
        """Keys by which passages are sorted before they are cut into passes: their sets, where these matter."""
        ...

    def routed(self, sets: Sequence[int], sizes: Sequence[int]) -> AbstractContextManager[None]:
        """Context in which the first ``sizes[0]`` tokens of a batch use the weights of ``sets[0]``, and so on."""
        ...

    def original(self) -> AbstractContextManager[None]:
        """Context in which all tokens are multiplied by the pre-trained weights."""
        ...


class InModules:
    """A single set of edited weights, which the model's modules hold themselves."""

    count, serves_original = 1, False
    spans: Sequence[tuple[int, int]] = ()

    def __init__(self, weights: EditedWeights) -> None:
        self._weights = weights

    def sort_keys(self, sets: Sequence[int]) -> Sequence[int]:
        return [0] * len(sets)

    def routed(self, sets: Sequence[int], sizes: Sequence[int]) -> AbstractContextManager[None]:
        return nullcontext()

    def original(self) -> AbstractContextManager[None]:
        return self._weights.original_in_modules()


class BesideModules:
    """Several sets of edited weights, kept outside the model's modules.

    A pass may run tokens of several sets. Frozen weights multiply all of them at once; an edited module multiplies each
    set's tokens by that set's weight.

    Args:
        sets: sets of the same modules.
    """

    serves_original = True

    def __init__(self, sets: Sequence[EditedWeights]) -> None:
        self._sets = list(sets)
        self.count = len(self._sets)
        self.spans: Sequence[tuple[int, int]] = ()
        self._at_original = False

    def sort_keys(self, sets: Sequence[int]) -> Sequence[int]:
        is_only_set = self.count == 1 and ORIGINAL not in sets
        return [0] * len(sets) if self._at_original or is_only_set else sets

    @contextmanager
    def routed(self, sets: Sequence[int], sizes: Sequence[int]) -> Iterator[None]:
        counts: dict[int, int] = {}  # tokens of each set, in the batch's order
        for index, size in zip(self.sort_keys(sets), sizes, strict=True):
            counts[index] = counts.get(index, 0) + size
        original = self._sets[0].originals.run
        weights = [original if self._at_original or index == ORIGINAL else self._sets[index].run for index in counts]
        with ExitStack() as stack:
            stack.callback(setattr, self, "spans", self.spans)
            self.spans = list(counts.items())
            for name, module in self._sets[0].modules.items():
                forward = partial(_grouped_linear, [w[name] for w in weights], module.bias, list(counts.values()))
                stack.enter_context(replaced_forward(module, forward))
            yield

    @contextmanager
    def original(self) -> Iterator[None]:
        was_original, self._at_original = self._at_original, True
        try:
            yield
        finally:
            self._at_original = was_original


def _grouped_linear(weights: Sequence[Tensor], bias: Tensor | None, counts: Sequence[int], x: Tensor) -> Tensor:
    """Multiply x (b, L, d_in), its first ``counts[0]`` tokens by the first weight (d_out, d_in), and so on."""
    if len(weights) == 1:
        return linear(x, weights[0], bias)
    tokens = x.flatten(0, -2).split(list(counts))
    pieces = [linear(rows, weight, bias) for rows, weight in zip(tokens, weights, strict=True)]
    return torch.cat(pieces).view(*x.shape[:-1], -1)
