"""What the forward passes of an edited LLM take and give: passages, and the interface of the ways to run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rledit_env.lm.head import OutputHead
from rledit_env.lm.kernels.layout import Layout

TOKEN_CHOICES = ("answer", "subject", "subject+answer", "all")

# What a trial of something on a model of another make may raise.
FAILURES = (
    AssertionError, AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Passage:
    """A prompt and its answer as token ids.

    ``input_ids`` leaves out the last answer token, whose state predicts nothing that is scored. ``positions`` are the
    indices whose states predict ``targets``; both have one entry an answer token.
    """

    input_ids: tuple[int, ...]
    targets: tuple[int, ...]
    subject_position: int | None = None

    @property
    def positions(self) -> range:
        return range(len(self.input_ids) - len(self.targets), len(self.input_ids))

    def chosen_positions(self, token: str) -> Sequence[int]:
        """The positions that one of :data:`TOKEN_CHOICES` means, in order."""
        if token == "all":
            return range(len(self.input_ids))
        if token == "answer" or self.subject_position is None:
            return self.positions
        if token == "subject":
            return [self.subject_position]
        return sorted({*self.positions, self.subject_position})

    def __len__(self) -> int:
        return len(self.input_ids)


class Scored(Protocol):
    """What losses at final states need of a forward pass.

    Attributes:
        output: the output head, which gives logits for final states.
        quantum: rows of matrix products are kept to multiples of this.
    """

    output: OutputHead

    @property
    def quantum(self) -> int: ...


class Forward(Scored, Protocol):
    """How passages are run through an LLM: by `rledit_env.lm.suffix.SuffixForward`, or by
    `rledit_env.lm.whole.WholeForward` where that cannot follow the model (see `rledit_env.lm.self_check`).

    Attributes:
        model: the LLM.
        layers: its decoder layers.
        device: where final states are computed.
        shares, longest_packed: how passages may lie in a batch (see `rledit_env.lm.kernels.layout`).
        batching: which texts the model continues together as it does alone: those of any length, "padded" on the left,
            those of one length ("by length"), or none ("alone").
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
    def batching(self) -> str: ...

    def prefix(self, input_ids: Tensor, layout: Layout) -> Tensor:
        """What of a batch of token ids (B, L) no edit can change, (B, L, …)."""
        ...

    def final_states(self, prefix: Tensor, places: Tensor, layout: Layout) -> Tensor:
        """States (P, d) that the output head takes, at some of the batch's tokens, counted row by row."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (P, |V|), at least in float32, from final states (P, d)."""
        ...

    def run_below(self, input_ids: Tensor, layer: int) -> None:
        """Run at least the layers below one on token ids (B, L): for what hooks on their modules see."""
        ...

    def extended(self, input_ids: Tensor, length: int, draw: Callable[[Tensor], Tensor]) -> Tensor:
        """Texts (R, L + length) from their first tokens (R, L), each next token drawn from the logits (R, |V|)."""
        ...
