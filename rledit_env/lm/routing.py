"""Which set of edited weights each token of a forward pass is multiplied by."""

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
    """Brings passages together with sets of edited weights, which are counted from 0.

    Attributes:
        count: how many sets there are.
        serves_original: whether a pass can meet the pre-trained weights (:data:`ORIGINAL`) beside the others.
        spans: of the pass that runs now: the set of the first tokens and their number, and so on; empty where all
            tokens meet the one set.
    """

    count: int
    serves_original: bool
    spans: Sequence[tuple[int, int]]

    def sort_keys(self, sets: Sequence[int]) -> Sequence[int]:
        """The sets by which passages are sorted before they are cut into passes."""
        ...

    def routed(self, sets: Sequence[int], sizes: Sequence[int]) -> AbstractContextManager[None]:
        """Within it, the first ``sizes[0]`` tokens of a batch are multiplied by the weights of ``sets[0]``, and so
        on."""
        ...

    def original(self) -> AbstractContextManager[None]:
        """Within it, all tokens meet the pre-trained weights."""
        ...


class InModules:
    """The one set that the model's modules hold: every pass meets it as it is."""

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
    """Sets beside what the modules hold: a pass takes tokens of several, which meet the frozen weights together and at
    an edited module their own set's weight.

    Args:
        sets: over the same modules.
    """

    serves_original = True

    def __init__(self, sets: Sequence[EditedWeights]) -> None:
        self._sets = list(sets)
        self.count = len(self._sets)
        self.spans: Sequence[tuple[int, int]] = ()
        self._at_original = False

    def sort_keys(self, sets: Sequence[int]) -> Sequence[int]:
        alone = self.count == 1 and ORIGINAL not in sets
        return [0] * len(sets) if self._at_original or alone else sets

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
        before, self._at_original = self._at_original, True
        try:
            yield
        finally:
            self._at_original = before


def _grouped_linear(weights: Sequence[Tensor], bias: Tensor | None, counts: Sequence[int], x: Tensor) -> Tensor:
    """x (b, L, d_in) times its set's weight (d_out, d_in): the first ``counts[0]`` tokens the first one, and so on."""
    if len(weights) == 1:
        return linear(x, weights[0], bias)
    tokens = x.flatten(0, -2).split(list(counts))
    pieces = [linear(rows, weight, bias) for rows, weight in zip(tokens, weights, strict=True)]
    return torch.cat(pieces).view(*x.shape[:-1], -1)
