"""Several streams' edited weights over one frozen model, and one pass that serves them all.

A pass takes rows of many passages. All rows meet the frozen weights together; at an edited module, each stream's rows
meet that stream's own weight. Cached prefixes and θ₀'s states do not depend on the edits, so streams share them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rledit_env.lm.editable import AnswerStates, EditableLM
from rledit_env.lm.forward import Passage, replaced_forward
from rledit_env.lm.kernels.products import linear

ORIGINAL = -1  # a stream whose weights are the pre-trained ones


class StreamLM(EditableLM):
    """An `EditableLM` with edited weights of its own, over the frozen model and the caches of another.

    What it adds in memory is its edited weights: a master copy in float32 and, where the model runs in less, the copy
    that it runs with (:attr:`nbytes`). It begins with the pre-trained weights and leaves ``shared``'s own alone.

    Args:
        shared: whose frozen weights, tokenizer and caches are used.
    """

    def __init__(self, shared: EditableLM) -> None:
        self.__dict__.update(shared.__dict__)
        self._master = {n: w.clone() for n, w in shared._original.items()}
        self._original_oriented = {
            n: w.t() if isinstance(self._modules[n], Conv1D) else w for n, w in shared._original_run.items()
        }
        self._run = {  # (d_out, d_in); the master itself where that is what the model runs in
            n: w if w.dtype == self.dtype else self._original_oriented[n].clone() for n, w in self._master.items()
        }
        self.holder = None
        self._members: list[StreamLM] = [self]
        self._at_original = False
        self._now: list[tuple[int, int]] = []  # see _route

    @property
    def nbytes(self) -> int:
        """Bytes of memory that this stream adds to what it shares."""
        own = {w.data_ptr(): w.nbytes for weights in (self._master, self._run) for w in weights.values()}
        return sum(own.values())

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamLM:
        """Another stream with the same edited weights, its own, over what this one shares."""
        other = memo[id(self)] = StreamLM(self)
        other.prefix_cache = copy.deepcopy(self.prefix_cache, memo)
        other.reference_cache = copy.deepcopy(self.reference_cache, memo)
        other.restore(self._master)
        return other

    # -- a pass ----------------------------------------------------------------------------------------------------

    def _meeting(self, streams: Sequence[int]) -> Sequence[int]:
        alone = len(self._members) == 1 and ORIGINAL not in streams
        return super()._meeting(streams) if self._at_original or alone else streams

    @contextmanager
    def _routed(self, streams: Sequence[int], sizes: Sequence[int]) -> Iterator[None]:
        counts: dict[int, int] = {}  # tokens of each stream, in the batch's order
        for stream, size in zip(self._meeting(streams), sizes, strict=True):
            counts[stream] = counts.get(stream, 0) + size
        weights = [
            self._original_oriented if self._at_original or s == ORIGINAL else self._members[s]._run for s in counts
        ]
        with ExitStack() as stack:
            stack.callback(setattr, self, "_now", self._now)
            self._now = list(counts.items())
            for name, module in self._modules.items():
                forward = partial(_grouped_linear, [w[name] for w in weights], module.bias, list(counts.values()))
                stack.enter_context(replaced_forward(module, forward))
            yield

    def states_beside_reference(
        self, passages: Sequence[Passage], streams: Sequence[int], referenced: Sequence[int]
    ) -> tuple[AnswerStates, list[Tensor]]:
        """As `EditableLM`'s, in one pass: θ₀ is one more stream in it."""
        found = self._known_references([passages[i] for i in referenced])
        missing = [passages[i] for i, state in zip(referenced, found, strict=True) if state is None]
        states = self.answer_states([*passages, *missing], [*streams, *[ORIGINAL] * len(missing)])
        own = sum(len(p.targets) for p in passages)
        fresh = iter(self._keep_references(missing, states.hidden[own:]))
        reference = [next(fresh) if state is None else state for state in found]
        return AnswerStates(states.hidden[:own], states.targets[:own], states.owner[:own]), reference

    def decode(self, rows: Sequence[Sequence[int]], most: int, **sampling: Any) -> Tensor:
        with self._routed([0], [0]):
            return super().decode(rows, most, **sampling)

    # -- weights -----------------------------------------------------------------------------------------------------

    def _refresh(self, name: str, module: nn.Module) -> None:
        if self._run[name] is not self._master[name]:
            self._run[name].copy_(self._master[name])

    @contextmanager
    def original_weights(self) -> Iterator[None]:
        before, self._at_original = self._at_original, True
        try:
            yield
        finally:
            self._at_original = before

    @property
    def _streams(self) -> int:
        return len(self._members)

    @property
    def _route(self) -> Sequence[tuple[int, int]]:
        return self._now

    def save_pretrained(self, folder: str | Path, overwrite: bool = False) -> Path:
        current = {n: module.weight.data for n, module in self._modules.items()}
        for n, module in self._modules.items():
            module.weight.data = self._run[n].t() if isinstance(module, Conv1D) else self._run[n]
        try:
            return super().save_pretrained(folder, overwrite)
        finally:
            for n, module in self._modules.items():
                module.weight.data = current[n]


def together(streams: Sequence[StreamLM]) -> EditableLM:
    """The streams as one LM, to be given to :meth:`EditableLM.trace_batches` and `rledit_env.scoring.score_streams`.

    Their s-th batch or request then meets the weights of ``streams[s]``. Nothing is copied.

    Raises:
        ValueError: there are no streams, or they are not of one frozen model.
    """
    if len({id(stream.model) for stream in streams}) != 1:
        raise ValueError(f"the {len(streams)} streams share no frozen model; make them from one EditableLM")
    joint = copy.copy(streams[0])
    joint._members = list(streams)
    return joint


def _grouped_linear(weights: Sequence[Tensor], bias: Tensor | None, counts: Sequence[int], x: Tensor) -> Tensor:
    """x (b, L, d_in) times its stream's weight (d_out, d_in): the first ``counts[0]`` tokens the first one, and so
    on."""
    if len(weights) == 1:
        return linear(x, weights[0], bias)
    tokens = x.flatten(0, -2).split(list(counts))
    pieces = [linear(rows, weight, bias) for rows, weight in zip(tokens, weights, strict=True)]
    return torch.cat(pieces).view(*x.shape[:-1], -1)
