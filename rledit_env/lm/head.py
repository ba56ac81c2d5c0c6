"""Computes logits from final states: the output head's product, and the model's scale or cap after it.

Some models scale their logits (Cohere, Granite), some cap them (Gemma 2). What a model does is found by running its own
forward with known numbers in place of the head's output (:func:`read_after_head`); no architecture's setting is named
here.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rledit_env.lm.hooks import module_hooks
from rledit_env.lm.kernels.products import linear
from rledit_env.lm.module_calls import Reached, execution_device, replaced_forward
from rledit_env.lm.precision import at_least_float32

_EXACT = 1e-6  # largest relative error of scales and caps from rounding to float32


@dataclass(frozen=True)
class AfterHead:
    """Computes logits from the head's output x: cap · tanh(scale · x / cap), or scale · x without a cap."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, raw: Tensor) -> Tensor:
        """Logits, at least in float32, from the head's output (P, |V|)."""
        logits = at_least_float32(raw)
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def back_in_place(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Turn the gradient for these logits (P, |V|) into that for the head's output, in place."""
        if self.cap is not None:
            gradient.mul_(1 - (logits / self.cap).square())
        return gradient if self.scale == 1 else gradient.mul_(self.scale)


def _contiguous(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.contiguous() if isinstance(a, Tensor) else a for a in arguments)


class OutputHead:
    """A model's output head.

    Args:
        module: a linear module from final states (…, d) to one number a token of the vocabulary.
        after: computes logits from these numbers, as the model does.
    """

    def __init__(self, module: Any, after: AfterHead) -> None:
        self.module, self.after = module, after

    def of_generation(self) -> AbstractContextManager[None]:
        """Context for the model's own generation, in which the head gets contiguous states.

        Generation gives it a slice, the last position of each row (B, 1, d). For a slice and a frozen weight torch
        copies the weight B times: 20 s instead of 0.03 s for 64 rows of a 135M model in bfloat16.
        """
        return module_hooks(before=[(self.module, _contiguous)])

    @property
    def size(self) -> int:
        """Numbers that the head gives for a state: one per token of the vocabulary and per row of padding."""
        return int(self.module.weight.shape[0])

    @property
    def device(self) -> torch.device:
        return execution_device(self.module)

    def no_states(self) -> Tensor:
        """Final states (0, d) of no positions."""
        return torch.empty(0, self.module.weight.shape[1], dtype=self.module.weight.dtype, device=self.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (P, |V|), at least in float32, from normalised final states (P, d)."""
        return self.after(self.module(hidden))

    def back(self, cotangents: Tensor) -> Tensor:
        """Gradients (P, d) for the head's input from gradients (P, |V|) for its output."""
        if not self.module.weight.is_meta:
            return linear(cotangents, self.module.weight.t())
        from accelerate.utils import align_module_device  # the weight is kept on the host or the disk

        with align_module_device(self.module, self.device):
            return linear(cotangents, self.module.weight.t())


def own_head_inputs(model: PreTrainedModel, head: nn.Module, input_ids: Tensor) -> Tensor:
    """Inputs (B, L, d) of the output head in the model's own forward, for token ids (B, L); the head is not run.

    Raises:
        ValueError: the model's forward does not call its head.
    """
    states: list[Tensor] = []

    def record_states(hidden: Tensor, *_args: object, **_kwargs: object) -> None:
        states.append(hidden)
        raise Reached

    with replaced_forward(head, record_states), suppress(Reached):
        model(input_ids=input_ids, use_cache=False)
    if not states:
        raise ValueError(f"the forward of {type(model).__name__} does not call its output head")
    return states[0]


@torch.no_grad()
def read_after_head(model: PreTrainedModel, head: Any, input_ids: Tensor) -> AfterHead | None:
    """Find what the model does after its head, by putting known numbers in place of the head's output.

    Returns None where it is not of the form of :class:`AfterHead`.
    """
    size = len(head.weight)
    numbers = torch.linspace(-100, 100, size, dtype=torch.float64)
    numbers[0], numbers[-1] = 1e-4, 1e8  # the slope at zero, and the limit

    def known_output(hidden: Tensor, *_args: object, **_kwargs: object) -> Tensor:
        return numbers.to(hidden.device).repeat(*hidden.shape[:-1], 1)

    with replaced_forward(head, known_output):
        logits = model(input_ids=input_ids, use_cache=False).logits.double().flatten(0, -2)[-1].cpu()
    if logits.shape != numbers.shape or not torch.isfinite(logits).all():
        return None
    scale, limit = float(logits[0] / numbers[0]), float(logits[-1])
    scale = 1.0 if abs(scale - 1) < _EXACT else scale
    is_capped = abs(limit) < _EXACT * abs(scale * float(numbers[-1]))
    after = AfterHead(scale, limit if is_capped else None)
    return after if torch.allclose(after(numbers), logits, rtol=1e-5, atol=1e-9) else None
