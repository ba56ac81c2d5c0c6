"""Passages, and the interface of the forward passes that run them through an edited LLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rledit_env.lm.head import OutputHead
from rledit_env.lm.kernels.layout import Layout
from rledit_env.lm.kernels.packing import Past

TOKEN_CHOICES = ("answer", "subject", "subject+answer", "all")

# What our code may raise when it is tried on a model of unfamiliar architecture.
FAILURES = (
    AssertionError, AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Passage:
    """A prompt and its answer as token ids.

    ``input_ids`` leaves out the last answer token, whose state predicts nothing that is scored. ``positions`` are the
    indices whose states predict ``targets``; both have one entry per answer token.
    """

    input_ids: tuple[int, ...]
    targets: tuple[int, ...]
    subject_position: int | None = None

    @property
    def positions(self) -> range:
        return range(len(self.input_ids) - len(self.targets), len(self.input_ids))

    def chosen_positions(self, token: str) -> Sequence[int]:
        """The positions that ``token``, one of :data:`TOKEN_CHOICES`, stands for, in order.

        A subject that ends at the passage's first token counts as none. LLMs use that token as an attention sink (Xiao
        et al., ICLR 2024): its state is nearly the same in all texts, so that an edit there would change them all.
        """
        if token == "all":
            return range(len(self.input_ids))
        if token == "answer" or not self.subject_position:
            return self.positions
        if token == "subject":
            return [self.subject_position]
        return sorted({*self.positions, self.subject_position})

    def __len__(self) -> int:
        return len(self.input_ids)


class Scored(Protocol):
    """The part of a forward pass that losses use.

    Attributes:
        output: the output head, which computes logits from final states.
        quantum: the number of rows of matrix products is kept to multiples of this.
    """

    output: OutputHead

    @property
    def quantum(self) -> int: ...


class Forward(Scored, Protocol):
    """Runs passages through an LLM.

    `rledit_env.lm.suffix.SuffixForward` runs the decoder layers one by one. `rledit_env.lm.whole.WholeForward` runs the
    model's own forward, where running its layers gives other results (see `rledit_env.lm.self_check`).

    Attributes:
        model: the LLM.
        layers: its decoder layers.
        device: the device that computes final states.
        shares: whether a batch may store a shared prefix once (see `rledit_env.lm.kernels.layout`).
        longest_packed: tokens of the longest passages that may be packed in one row; 0: none may.
        continues_packed: whether packed passages' last tokens can be run after their first ones (:meth:`run_past`).
        batching: which texts the model continues in one batch as it does alone: "padded" means texts of any length,
            padded on the left; "by length" texts of one length; "alone" none.
    """

    model: PreTrainedModel
    layers: nn.ModuleList

    @property
    def device(self) -> torch.device: ...

    @property
    def shares(self) -> bool: ...

    @property
    def longest_packed(self) -> int: ...

    @property
    def continues_packed(self) -> bool: ...

    @property
    def batching(self) -> str: ...

    def prefix(self, input_ids: Tensor, layout: Layout) -> Tensor:
        """The part of the computation for token ids (B, L) that no edit can change, (B, L, …)."""
        ...

    def run_past(self, prefix: Tensor, layout: Layout) -> Past:
        """Keys and values of a packed row, from its :meth:`prefix` (1, L, d); no gradient."""
        ...

    def final_states(self, prefix: Tensor, places: Tensor, layout: Layout) -> Tensor:
        """Inputs (P, d) of the output head at tokens of the batch, given by indices counted row by row."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (P, |V|), at least in float32, from final states (P, d)."""
        ...

    def run_below(self, input_ids: Tensor, layer: int) -> None:
        """Run at least the layers below ``layer`` on token ids (B, L), for hooks on their modules."""
        ...

    def extended(self, input_ids: Tensor, length: int, draw: Callable[[Tensor], Tensor]) -> Tensor:
        """Texts (R, L + length) that begin with tokens (R, L); ``draw`` picks next tokens (R, 1) by logits (R, |V|)."""
        ...
