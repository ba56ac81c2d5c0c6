"""Losses at answer positions, computed together with their gradients.

A position's loss depends on its own final state only. So loss and gradient are computed together, one block of
positions after the other, and only one block's logits (|V| numbers per position) are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rledit_env.lm.forward import Scored
from rledit_env.lm.precision import at_least_float32

BLOCK = 128  # positions of a block on a CPU: enough rows for an efficient product with the output head
BLOCK_BYTES = 2**24  # most bytes of a block's logits on a CPU: glibc returns larger ones to the system every time
ROWS = 8  # positions of a block that a CPU works on at once in float32: few enough for its cache
GPU_BLOCK = 256  # positions of a block on other devices, which work on all of them at once

# The losses of r positions. Arguments: log-probabilities (r, |V|), the slice of these positions among all, and the
# output head's results (r, |V|) for the constant states beside them. Returns: losses (r,) and, where needed, their
# gradient for the logits (r, |V|), which may overwrite the log-probabilities.
RowLoss = Callable[[Tensor, slice, Tensor], tuple[Tensor, Tensor]]


def negative_log_likelihood(forward: Scored, hidden: Tensor, targets: Tensor) -> Tensor:
    """−log p(target) at each position, (P,) at least in float32, from normalised final states (P, d)."""
    needs_gradient = _needs_gradient(hidden)

    def row_loss(log_p: Tensor, place: slice, _beside: Tensor) -> tuple[Tensor, Tensor]:
        target_ids = targets[place, None]
        loss = -log_p.gather(1, target_ids)[:, 0]
        if needs_gradient:
            log_p.exp_().scatter_add_(1, target_ids, log_p.new_full(target_ids.shape, -1.0))
        return loss, log_p

    losses: Tensor = _Losses.apply(hidden, forward, hidden[:0].detach(), row_loss, needs_gradient)
    return losses


def preference_loss(forward: Scored, hidden: Tensor, targets: Tensor, others: Tensor, margin: float) -> Tensor:
    """softplus(margin − log p(target) + log p(other)) at each position, (P,) at least in float32, from normalised final
    states (P, d); targets and others are token ids (P,)."""
    needs_gradient = _needs_gradient(hidden)

    def row_loss(log_p: Tensor, place: slice, _beside: Tensor) -> tuple[Tensor, Tensor]:
        likelier, other = targets[place, None], others[place, None]
        shortfall = margin - log_p.gather(1, likelier) + log_p.gather(1, other)  # (r, 1)
        if needs_gradient:  # the normaliser's logarithm, which both contain, cancels out
            slope = shortfall.sigmoid()
            log_p.zero_().scatter_add_(1, likelier, -slope).scatter_add_(1, other, slope)
        return F.softplus(shortfall)[:, 0], log_p

    losses: Tensor = _Losses.apply(hidden, forward, hidden[:0].detach(), row_loss, needs_gradient)
    return losses


def membership_loss(forward: Scored, hidden: Tensor, tokens: Tensor) -> Tensor:
    """−log Σ p(token) over some tokens (E,) at each position, (P,) at least in float32, from normalised final states
    (P, d)."""
    needs_gradient = _needs_gradient(hidden)

    def row_loss(log_p: Tensor, _place: slice, _beside: Tensor) -> tuple[Tensor, Tensor]:
        inside = log_p[:, tokens]  # (r, E)
        loss = -inside.logsumexp(1)
        if needs_gradient:
            log_p.exp_().index_add_(1, tokens, (inside + loss[:, None]).exp_(), alpha=-1.0)
        return loss, log_p

    losses: Tensor = _Losses.apply(hidden, forward, hidden[:0].detach(), row_loss, needs_gradient)
    return losses


def kl_divergence(forward: Scored, hidden: Tensor, reference: Tensor) -> Tensor:
    """KL(p_reference ‖ p) at each position, (P,) at least in float32, from normalised final states (P, d) each; the
    reference takes no gradient."""
    needs_gradient = _needs_gradient(hidden)

    def row_loss(log_p: Tensor, _place: slice, beside: Tensor) -> tuple[Tensor, Tensor]:
        log_q = forward.output.after(beside).log_softmax(-1)
        difference = log_q - log_p
        q = log_q.exp_()
        loss = torch.linalg.vecdot(q, difference)
        return loss, log_p.exp_().sub_(q) if needs_gradient else log_p

    losses: Tensor = _Losses.apply(hidden, forward, reference, row_loss, needs_gradient)
    return losses


def reverse_kl_divergence(forward: Scored, hidden: Tensor, reference: Tensor) -> Tensor:
    """KL(p ‖ p_reference) at each position, (P,) at least in float32, from normalised final states (P, d) each; the
    reference takes no gradient."""
    needs_gradient = _needs_gradient(hidden)

    def row_loss(log_p: Tensor, _place: slice, beside: Tensor) -> tuple[Tensor, Tensor]:
        difference = log_p - forward.output.after(beside).log_softmax(-1)
        p = log_p.exp()
        loss = torch.linalg.vecdot(p, difference)
        # ∂/∂logits of Σ p (log p − log q): p ⊙ (log p − log q − KL)
        return loss, difference.sub_(loss[:, None]).mul_(p) if needs_gradient else log_p

    losses: Tensor = _Losses.apply(hidden, forward, reference, row_loss, needs_gradient)
    return losses


def _needs_gradient(hidden: Tensor) -> bool:
    return hidden.requires_grad and torch.is_grad_enabled()


class _Losses(torch.autograd.Function):
    """Losses of independent positions, with ∂loss_p/∂hidden_p kept for the backward pass.

    ``beside`` has constant states (P, d) whose logits the losses also need, or none (0, d). They share the
    product with the output head, since reading the head's weights takes as long as multiplying by them.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, forward: Scored, beside: Tensor, row_loss: RowLoss, needs_gradient: bool
    ) -> Tensor:
        losses = at_least_float32(hidden.new_zeros(len(hidden)))
        slopes = torch.zeros_like(hidden if needs_gradient else hidden[:0])
        sides = 1 if len(beside) == 0 else 2
        room = BLOCK_BYTES if needs_gradient else 2 * BLOCK_BYTES  # without gradients, little else is in memory
        max_positions = room // (sides * forward.output.size * hidden.element_size()) // 16 * 16
        size, step = GPU_BLOCK, GPU_BLOCK
        if hidden.device.type == "cpu":
            size, step = max(16, min(BLOCK, max_positions)), ROWS
        for begin in range(0, len(hidden), size):
            block = slice(begin, min(begin + size, len(hidden)))
            states = torch.cat([hidden[block], beside[block]])
            # (p or 2p and up to a quantum, |V|) in the head's precision
            head_outputs = forward.output.module(F.pad(states, (0, 0, 0, -len(states) % forward.quantum)))
            raw = head_outputs[: block.stop - begin]  # the gradient is written over it
            for start in range(0, len(raw), step):
                rows = raw[start : start + step]
                place = slice(begin + start, begin + start + len(rows))
                logits = forward.output.after(rows)
                beside_outputs = head_outputs[len(raw) + start :][: len(rows)]
                losses[place], gradient = row_loss(logits.log_softmax(-1), place, beside_outputs)
                if needs_gradient:
                    rows.copy_(forward.output.after.back_in_place(gradient, logits))
            if needs_gradient:
                padded = head_outputs[: len(raw) + -len(raw) % forward.quantum]
                slopes[block] = forward.output.back(padded)[: len(raw)]  # (p, d)
        ctx.save_for_backward(slopes)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (cotangent[:, None] * slopes).to(slopes.dtype), None, None, None, None
