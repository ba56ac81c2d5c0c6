"""The forward pass of passages from the subject's last token on, over cached keys and values of the tokens before it.

A change to a layer's output at the subject's last token affects neither earlier tokens (the passage's head) nor lower
layers. So an optimisation of that change runs only the layers above, on that token and those after it (the tail).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import FAILURES, Passage
from rledit_env.lm.hooks import module_hooks
from rledit_env.lm.kernels.layout import Layout, cheapest_chunks
from rledit_env.lm.names import module_layer
from rledit_env.lm.precision import at_least_float32, same_numbers
from rledit_env.lm.suffix import Stub, SuffixForward
from rledit_env.lm.whole import WholeForward, WholePassages


class _FixedPast(DynamicCache):
    """Keys and values of the passages' heads. Once ``fixed``, later ones are appended but not kept."""

    fixed = False

    def align(self, columns: Tensor) -> None:
        """Move each row's tokens: index i of row b gets the token at columns[b, i], or zeros where that is negative."""
        rows = torch.arange(len(columns), device=columns.device)[:, None]
        is_token = (columns >= 0)[:, :, None, None]
        for layer in self.layers:
            cached: Any = layer
            for name in ("keys", "values"):
                states = getattr(cached, name)[rows, :, columns.clamp(min=0)]  # (B, length, heads, d)
                setattr(cached, name, (states * is_token).transpose(1, 2).contiguous())

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.fixed:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx >= len(self.layers):  # the heads are empty
            return key_states, value_states
        past: Any = self.layers[layer_idx]
        return torch.cat([past.keys, key_states], dim=-2), torch.cat([past.values, value_states], dim=-2)


class ContinuedForward(SuffixForward):
    """Runs passages from their subject's last token on, from one layer up, under the LLM's current weights.

    The heads are padded on the left, and the model builds its own masks; no architecture's code is repeated here.

    Args:
        lm: the LLM; its weights must stay as they are while this is used.
        passages: B passages, each with a subject.
        layer: index of the first layer that is run.

    Attributes:
        hidden: states (B, S, d) that enter that layer at the passages' tails, padded on the right; the subject's last
            token comes first.
        layout: where the tails are in ``hidden``.
        subjects: index of the subject's last token in each row of ``hidden``, (B,): always 0.
    """

    def __init__(self, lm: EditableLM, passages: Sequence[Passage], layer: int) -> None:
        lm_forward = lm.forward
        assert isinstance(lm_forward, SuffixForward)
        super().__init__(lm.model, layer, lm_forward.last_edited, lm_forward.output)
        self.__dict__["narrows"] = lm_forward.narrows
        self._attention = lm_forward._attention
        starts = subject_positions(passages)
        self._starts = starts
        self.subjects = torch.zeros(len(starts), dtype=torch.long, device=lm.device)
        heads = [p.input_ids[:s] for p, s in zip(passages, starts, strict=True)]
        tails = [p.input_ids[s:] for p, s in zip(passages, starts, strict=True)]
        offset = torch.tensor(starts, device=lm.device)[:, None]  # (B, 1)
        length = max(starts)
        columns = torch.arange(length, device=lm.device) - length + offset  # source of each token, aligned on the right
        is_token = columns >= 0  # (B, length)
        past = _FixedPast()
        if length:
            with torch.no_grad():
                self.base(input_ids=lm.pad_ids(heads), use_cache=True, **{self.cache_argument: past})
            past.align(columns)
        past.fixed = True
        ids = lm.pad_ids(tails)
        # Padding needs a position that the model has, too.
        places = (offset + torch.arange(ids.shape[1], device=lm.device)).clamp(max=lm.context_length - 1)
        self._stubs = self._run_stubbed(
            ids, layer, attention_mask=torch.cat([is_token, torch.ones_like(ids, dtype=torch.bool)], dim=1).long(),
            position_ids=places, use_cache=True, **{self.cache_argument: past},
        )  # fmt: skip
        hidden = self._stubs[0].hidden
        assert hidden is not None
        self.hidden, self.layout = hidden, Layout.padded([len(tail) for tail in tails])

    def _layer_arguments(self, layout: Layout) -> list[Stub]:
        return self._stubs

    def places(self, passages: Sequence[Passage]) -> Tensor:
        """Indices of the answer positions of these passages, the first of those run, among the tokens of ``hidden``."""
        positions = [[c - s for c in p.positions] for p, s in zip(passages, self._starts, strict=False)]
        return self.layout.places(positions + [[]] * (len(self._starts) - len(positions)), self.hidden.device)

    def states(self, places: Tensor) -> Tensor:
        """Normalised final states (P, d) at tokens of ``hidden``, given by indices counted row by row."""
        return self.final_states(self.hidden, places, self.layout)


def continued_forward(lm: EditableLM, passages: Sequence[Passage], layer: int) -> ContinuedForward | WholePassages:
    """A forward pass to run passages repeatedly while a layer's output changes at the subjects' last tokens.

    It runs the passages' tails from that layer up, or whole passages where the model does not allow that.
    """
    if isinstance(lm.forward, SuffixForward):
        if lm.forward.continues is None:
            lm.forward.continues = _tails_agree(lm, passages[:4], layer)
        if lm.forward.continues:
            return ContinuedForward(lm, passages, layer)
    ids = lm.pad_ids([p.input_ids for p in passages])
    return WholePassages(WholeForward.of(lm.forward), passages, subject_positions(passages), ids)


@torch.no_grad()
def _tails_agree(lm: EditableLM, passages: Sequence[Passage], layer: int) -> bool:
    """Whether running these passages' tails gives the logits of running them whole."""
    ids = lm.pad_ids([p.input_ids for p in passages])
    whole = WholePassages(WholeForward.of(lm.forward), passages, subject_positions(passages), ids)
    try:
        tails = ContinuedForward(lm, passages, layer)
        tail_logits, whole_logits = (run.logits(run.states(run.places(passages))) for run in (tails, whole))
    except FAILURES:  # an unfamiliar architecture
        return False
    return same_numbers(tail_logits, whole_logits, lm.dtype)


@dataclass(frozen=True)
class SubjectStates:
    """States of the LLM at the subject's last token of P passages.

    Attributes:
        keys: module → its inputs, (P, d_in), at least float32.
        hidden: outputs of the last module's decoder layer, (P, d), at least float32.
    """

    keys: dict[str, Tensor]
    hidden: Tensor


def subject_positions(passages: Sequence[Passage]) -> list[int]:
    """Index of the subject's last token in each passage.

    Raises:
        ValueError: a passage has no subject.
    """
    positions = [p.subject_position for p in passages]
    if any(position is None for position in positions):
        raise ValueError("a passage has no subject; tokenise it with the subject, which must occur in the prompt")
    return [position for position in positions if position is not None]


def at_places(states: Tensor, places: Tensor) -> Tensor:
    """The state at one index of each row, (B, d), from the states of B rows, (B, L, d) or (B · L, d)."""
    rows = states.view(len(places), -1, states.shape[-1])
    return rows[torch.arange(len(places)), places]


@torch.no_grad()
def subject_states(
    lm: EditableLM, modules: Sequence[str], passages: Sequence[Passage], updates: dict[str, Tensor] | None = None
) -> SubjectStates:
    """Inputs of some edited modules and outputs of the last module's layer, at the subjects' last tokens.

    Args:
        lm: the LLM, at its current weights.
        modules: names, in the order of the layers.
        passages: P passages with a subject.
        updates: module → ΔW (d_out, d_in), added to the weights for this run only; no weight is written.
    """
    last = module_layer(modules[-1])
    heads = [
        Passage(p.input_ids[: position + 1], (), position)
        for p, position in zip(passages, subject_positions(passages), strict=True)
    ]
    keys: dict[str, list[Tensor]] = {m: [] for m in modules}
    hidden: list[Tensor] = []
    order: list[int] = []
    last_tokens: list[Tensor] = []

    def keep_inputs(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            keys[name].append(at_least_float32(at_places(args[0], last_tokens[-1])))

        return hook

    def keep_outputs(_module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        states = output[0] if isinstance(output, tuple) else output
        hidden.append(at_least_float32(at_places(states, last_tokens[-1])))

    on_inputs = [(lm.model.get_submodule(m), keep_inputs(m)) for m in modules]
    with module_hooks([(lm.forward.layers[last], keep_outputs)], on_inputs), with_updates(lm, updates or {}):
        for chunk in cheapest_chunks([len(p) for p in heads], lm.passes.token_limit):
            members = [heads[i] for i in chunk]
            last_tokens.append(torch.tensor([len(p) - 1 for p in members], device=lm.device))
            lm.forward.run_below(lm.pad_ids([p.input_ids for p in members]), last + 1)
            order += chunk
    permutation = torch.argsort(torch.tensor(order, device=lm.device))
    return SubjectStates({m: torch.cat(k)[permutation] for m, k in keys.items()}, torch.cat(hidden)[permutation])


@contextmanager
def with_updates(lm: EditableLM, updates: dict[str, Tensor]) -> Iterator[None]:
    """Context in which the model runs as if ΔW (d_out, d_in) were added to the named modules; no weight is written."""

    def hook(update: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def add(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return (at_least_float32(output) + args[0].to(update.dtype) @ update.T).to(output.dtype)

        return add

    with module_hooks([(lm.model.get_submodule(name), hook(u)) for name, u in updates.items()]):
        yield
