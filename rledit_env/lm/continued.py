"""The forward pass of passages from one of their tokens on, over cached keys and values of all before it.

What is changed at the subject's last token of a layer changes nothing at the tokens before it, and nothing below the
layer. So an optimisation of that change runs the layers from there up, on the passage's tail alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import FAILURES, Passage
from rledit_env.lm.kernels.layout import Layout, cheapest_chunks
from rledit_env.lm.precision import at_least_float32, same_numbers
from rledit_env.lm.suffix import Stub, SuffixForward
from rledit_env.lm.whole import WholeForward, WholePassages


class _FixedPast(DynamicCache):
    """Keys and values of the passages' heads; once ``fixed``, further ones are joined to them but not kept."""

    fixed = False

    def align(self, columns: Tensor) -> None:
        """Let row b hold, at place i, what it held at columns[b, i]: nothing where that is negative."""
        rows = torch.arange(len(columns), device=columns.device)[:, None]
        seen = (columns >= 0)[:, :, None, None]
        for layer in self.layers:
            kept: Any = layer
            for name in ("keys", "values"):
                states = getattr(kept, name)[rows, :, columns.clamp(min=0)]  # (B, length, heads, d)
                setattr(kept, name, (states * seen).transpose(1, 2).contiguous())

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.fixed:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx >= len(self.layers):  # the heads are empty
            return key_states, value_states
        past: Any = self.layers[layer_idx]
        return torch.cat([past.keys, key_states], dim=-2), torch.cat([past.values, value_states], dim=-2)


class ContinuedForward(SuffixForward):
    """Runs passages from their subject's last token on, from one layer up, under the LLM's current weights.

    The model builds its own masks, over heads padded on the left; nothing of an architecture is written again here.

    Args:
        lm: the LLM; its weights must stay as they are while this is used.
        passages: B passages, each with a subject.
        layer: index of the first layer run.

    Attributes:
        hidden: states (B, S, d) that enter that layer at the passages' tails, padded on the right; the subject's last
            token comes first.
        layout: how the tails lie in it.
        subjects: place of each passage's subject's last token in its row, (B,): 0.
    """

    def __init__(self, lm: EditableLM, passages: Sequence[Passage], layer: int) -> None:
        whole = lm.forward
        assert isinstance(whole, SuffixForward)
        super().__init__(lm.model, layer, whole.last_edited, whole.output)
        self.__dict__["narrows"] = whole.narrows
        self._attention = whole._attention
        starts = subject_positions(passages)
        self._starts = starts
        self.subjects = torch.zeros(len(starts), dtype=torch.long, device=lm.device)
        heads = [p.input_ids[:s] for p, s in zip(passages, starts, strict=True)]
        tails = [p.input_ids[s:] for p, s in zip(passages, starts, strict=True)]
        offset = torch.tensor(starts, device=lm.device)[:, None]  # (B, 1)
        length = max(starts)
        columns = torch.arange(length, device=lm.device) - length + offset  # of each head, once aligned on the right
        seen = columns >= 0  # (B, length)
        past = _FixedPast()
        if length:
            with torch.no_grad():
                self.base(input_ids=lm.pad_ids(heads), use_cache=True, **{self.cache_argument: past})
            past.align(columns)
        past.fixed = True
        ids = lm.pad_ids(tails)
        # Padding gets a place that the model has.
        places = (offset + torch.arange(ids.shape[1], device=lm.device)).clamp(max=lm.context_length - 1)
        self._stubs = self._run_stubbed(
            ids, layer, attention_mask=torch.cat([seen, torch.ones_like(ids, dtype=torch.bool)], dim=1).long(),
            position_ids=places, use_cache=True, **{self.cache_argument: past},
        )  # fmt: skip
        hidden = self._stubs[0].hidden
        assert hidden is not None
        self.hidden, self.layout = hidden, Layout.padded([len(tail) for tail in tails])

    def _layer_arguments(self, layout: Layout) -> list[Stub]:
        return self._stubs

    def places(self, passages: Sequence[Passage]) -> Tensor:
        """Where these passages' answer positions (the first passages of those run) lie among the tokens of
        ``hidden``."""
        found = [[c - s for c in p.positions] for p, s in zip(passages, self._starts, strict=False)]
        return self.layout.places(found + [[]] * (len(self._starts) - len(found)), self.hidden.device)

    def states(self, places: Tensor) -> Tensor:
        """Normalised final states (P, d) at some tokens of ``hidden``, counted row by row."""
        return self.final_states(self.hidden, places, self.layout)


def continued_forward(lm: EditableLM, passages: Sequence[Passage], layer: int) -> ContinuedForward | WholePassages:
    """What runs passages again and again while something changes at their subjects' last tokens, from a layer up:
    their tails, or where the model does not allow that, the passages whole."""
    if isinstance(lm.forward, SuffixForward):
        if lm.forward.continues is None:
            lm.forward.continues = _continues(lm, passages[:4], layer)
        if lm.forward.continues:
            return ContinuedForward(lm, passages, layer)
    ids = lm.pad_ids([p.input_ids for p in passages])
    return WholePassages(WholeForward.of(lm.forward), passages, subject_positions(passages), ids)


@torch.no_grad()
def _continues(lm: EditableLM, passages: Sequence[Passage], layer: int) -> bool:
    """Whether these passages' tails give what the passages give whole."""
    ids = lm.pad_ids([p.input_ids for p in passages])
    whole = WholePassages(WholeForward.of(lm.forward), passages, subject_positions(passages), ids)
    try:
        tails = ContinuedForward(lm, passages, layer)
        alone, both = (part.logits(part.states(part.places(passages))) for part in (tails, whole))
    except FAILURES:  # a model of another make
        return False
    return same_numbers(alone, both, lm.dtype)


@dataclass(frozen=True)
class SubjectStates:
    """What the LLM computes at the last token of P passages' subjects.

    Attributes:
        keys: module → its inputs there, (P, d_in), at least float32.
        hidden: states that leave the layer of the last module, (P, d), at least float32.
    """

    keys: dict[str, Tensor]
    hidden: Tensor


def subject_positions(passages: Sequence[Passage]) -> list[int]:
    """Index of each passage's subject's last token.

    Raises:
        ValueError: a passage has no subject.
    """
    found = [p.subject_position for p in passages]
    if any(position is None for position in found):
        raise ValueError("a passage has no subject; tokenise it with the subject, which must occur in the prompt")
    return [position for position in found if position is not None]


def at_places(states: Tensor, places: Tensor) -> Tensor:
    """Of the states of B rows, (B, L, d) or (B · L, d), those at one place in each row, (B, d)."""
    rows = states.view(len(places), -1, states.shape[-1])
    return rows[torch.arange(len(places)), places]


@torch.no_grad()
def subject_states(
    lm: EditableLM, modules: Sequence[str], passages: Sequence[Passage], updates: dict[str, Tensor] | None = None
) -> SubjectStates:
    """Inputs of some edited modules, and the last one's layer's outputs, at the subjects' last tokens.

    Args:
        lm: the LLM, at its current weights.
        modules: in the layers' order.
        passages: P passages with a subject.
        updates: module → ΔW (d_out, d_in) that the LLM is run with beside its weights; the LLM is not changed.
    """
    last = layer_of(modules[-1])
    heads = [
        Passage(p.input_ids[: position + 1], (), position)
        for p, position in zip(passages, subject_positions(passages), strict=True)
    ]
    keys: dict[str, list[Tensor]] = {m: [] for m in modules}
    hidden: list[Tensor] = []
    order: list[int] = []
    place: list[Tensor] = []

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            keys[name].append(at_least_float32(at_places(args[0], place[-1])))

        return hook

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        hidden.append(at_least_float32(at_places(states, place[-1])))

    handles = [lm.model.get_submodule(m).register_forward_pre_hook(keep(m)) for m in modules]
    handles.append(lm.forward.layers[last].register_forward_hook(leave))
    try:
        with with_updates(lm, updates or {}):
            for chunk in cheapest_chunks([len(p) for p in heads], lm.passes.token_limit):
                members = [heads[i] for i in chunk]
                place.append(torch.tensor([len(p) - 1 for p in members], device=lm.device))
                lm.forward.run_below(lm.pad_ids([p.input_ids for p in members]), last + 1)
                order += chunk
    finally:
        for handle in handles:
            handle.remove()
    back = torch.argsort(torch.tensor(order, device=lm.device))
    return SubjectStates({m: torch.cat(k)[back] for m, k in keys.items()}, torch.cat(hidden)[back])


@contextmanager
def with_updates(lm: EditableLM, updates: dict[str, Tensor]) -> Iterator[None]:
    """Within it the model runs as if ΔW (d_out, d_in) were added to the modules named; no weight is written."""

    def hook(update: Tensor) -> Any:
        def add(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return (at_least_float32(output) + args[0].to(update.dtype) @ update.T).to(output.dtype)

        return add

    handles = [lm.model.get_submodule(name).register_forward_hook(hook(u)) for name, u in updates.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layer_of(module: str) -> int:
    """Index of the decoder layer that a module's dotted name is in."""
    return next(int(part) for part in module.split(".") if part.isdigit())
