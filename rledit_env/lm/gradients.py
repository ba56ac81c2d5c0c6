"""Gradients of an LLM's losses for its edited weights, in factored form and dense."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from rledit_env.lm.forward import Passage
from rledit_env.lm.hooks import module_hooks
from rledit_env.lm.kernels.layout import Layout
from rledit_env.lm.kernels.products import outer
from rledit_env.lm.losses import negative_log_likelihood
from rledit_env.lm.passes import Passes
from rledit_env.lm.precision import at_least_float32
from rledit_env.lm.weights import EditedWeights


@dataclass(frozen=True)
class Trace:
    """The fine-tuning gradient of a batch, Σ δᵀu, in factored form.

    Attributes:
        keys: module name → its inputs u at the N traced positions, (N, d_in) float32.
        value_gradients: module name → gradient δ of the loss with respect to its outputs there, (N, d_out) float32.
        owner: index of the passage that each position belongs to, (N,) int64. Passages that have taken may have no
            position (see :meth:`Gradients.trace`).
        loss: mean answer-token cross-entropy of the batch.
        hardest: the largest cross-entropy among each passage's answer tokens, (passages,) in nats.
        sums: the summed cross-entropy of each passage's answer tokens, (passages,) in nats.
        answers: the number of answer tokens of each passage, (passages,) float.
    """

    keys: dict[str, Tensor]
    value_gradients: dict[str, Tensor]
    owner: Tensor
    loss: float
    hardest: Tensor
    sums: Tensor
    answers: Tensor

    def of(self, passages: Tensor) -> Trace:
        """The trace of some of the passages, chosen by a mask (passages,), as if they were the batch.

        Its gradient is that of the mean over the chosen passages' answer tokens; ``owner`` counts these passages.
        """
        is_chosen = passages.to(self.owner.device)
        rows = is_chosen[self.owner]
        keys, gradients = ({m: t[rows] for m, t in part.items()} for part in (self.keys, self.value_gradients))
        tokens = float(self.answers[is_chosen].sum())
        factor = float(self.answers.sum()) / max(tokens, 1.0)
        return Trace(
            keys, {m: factor * g for m, g in gradients.items()}, (is_chosen.cumsum(0) - 1)[self.owner[rows]],
            float(self.sums[is_chosen].sum()) / max(tokens, 1.0), self.hardest[is_chosen], self.sums[is_chosen],
            self.answers[is_chosen],
        )  # fmt: skip


class Gradients:
    """Takes gradients at the outputs of the edited modules, so that no weight has to require one.

    Args:
        passes: runs the passages.
        weights: the edited weights.
        overwritten: names of the edited modules whose outputs the model changes in place.
    """

    def __init__(self, passes: Passes, weights: EditedWeights, overwritten: Collection[str] = ()) -> None:
        self._passes, self._weights, self.overwritten = passes, weights, frozenset(overwritten)

    def trace(
        self, passages: Sequence[Passage], token: str = "answer", until: float | None = None,
        untaken: np.ndarray | None = None,
    ) -> Trace:  # fmt: skip
        """Keys and value gradients of the mean answer-token cross-entropy at the current weights.

        Args:
            passages: the batch's edits.
            token: which positions: those that predict an answer token (``"answer"``), the subject's last token
                (``"subject"``; the answer positions where a record names no subject, or one that is the first token),
                both (``"subject+answer"``), or every token (``"all"``).
            until: used with ``untaken``: a passage has taken if every answer token has at least this probability.
            untaken: which passages had not taken before, (passages,) bool; None: all. The others are first run without
                gradients. If they have still taken, they get no positions in the trace, which halves their cost.
        """
        return self.trace_batches([passages], token, until, [untaken])[0]

    def trace_batches(
        self, batches: Sequence[Sequence[Passage]], token: str = "answer", until: float | None = None,
        untaken: Sequence[np.ndarray | None] | None = None,
    ) -> list[Trace]:  # fmt: skip
        """:meth:`trace` of several batches at once; each trace is that of the mean over its batch's answer tokens.

        Where there are several weight sets, batch b is run with set b (see `rledit_env.lm.routing`).
        """
        passages = [p for batch in batches for p in batch]
        batch_of = [b for b, batch in enumerate(batches) for _ in batch]
        builder = _TraceBuilder(batches, token, self._weights, self._passes.device)
        traced = list(range(len(passages)))
        if until is not None and untaken is not None:
            masks = [np.ones(len(b), bool) if m is None else m for b, m in zip(batches, untaken, strict=True)]
            taken = self._check_taken(passages, batch_of, np.flatnonzero(~np.concatenate(masks)), until)
            builder.add_losses(list(taken), list(taken.values()))
            traced = [i for i in traced if i not in taken]
        self._trace(builder, passages, batch_of, traced)
        return builder.traces()

    def _check_taken(
        self, passages: Sequence[Passage], batch_of: Sequence[int], candidates: Iterable[int], until: float
    ) -> dict[int, Tensor]:
        """Those of the candidates that have taken: index → its answer tokens' cross-entropy (A,)."""
        chosen = list(candidates)
        states = self._passes.answer_states([passages[i] for i in chosen], [batch_of[i] for i in chosen])
        with torch.no_grad():
            losses = negative_log_likelihood(self._passes.forward, states.hidden, states.targets)
        by_passage = zip(chosen, losses.split([len(passages[i].targets) for i in chosen]), strict=True)
        return {i: loss for i, loss in by_passage if float(loss.max()) <= -math.log(until)}

    def _trace(
        self, builder: _TraceBuilder, passages: Sequence[Passage], batch_of: Sequence[int], traced: Sequence[int]
    ) -> None:
        """Add the chosen passages to the traces."""
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def record(name: str, _module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():  # tokens that run ahead
                return output
            inputs[name] = arguments[0].detach()
            outputs[name], passed_on = self._require_gradient(name, output)
            return passed_on

        with self._hook_modules(record), torch.enable_grad():
            chosen, sets = [passages[i] for i in traced], [batch_of[i] for i in traced]
            firsts = [builder.first_position(i) for i in traced]
            for places, layout, states in self._passes.run_from(chosen, firsts, sets):
                chunk = [traced[i] for i in places]
                targets = torch.tensor([t for i in chunk for t in passages[i].targets], device=self._passes.device)
                losses = negative_log_likelihood(self._passes.forward, states, targets)
                module_outputs = [outputs[n] for n in self._weights.modules]
                total = (builder.token_weights(chunk, losses) * losses).sum()
                gradients = torch.autograd.grad(total, module_outputs, materialize_grads=True)
                builder.add(chunk, layout, losses.detach(), inputs, gradients)

    @contextmanager
    def collecting(self, wanted: bool = True) -> Iterator[list[dict[str, Tensor]]]:
        """Context in which backward passes add up their gradients of the edited weights.

        It yields a dictionary per weight set: module → gradient (d_out, d_in), in the edited weights' precision. Each
        pass adds its gradient δᵀu to the sum at an edited module's outputs, so the weights need not require gradients,
        and no pass keeps a gradient of its own. If ``wanted`` is false, gradients are switched off.
        """
        routing = self._passes.routing
        sums: list[dict[str, Tensor]] = [{} for _ in range(routing.count)]
        buffers: list[dict[str, Tensor]] = [{} for _ in range(routing.count)]

        def watch(name: str, _module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return output
            keys, spans = arguments[0].detach(), routing.spans
            output, passed_on = self._require_gradient(name, output)
            output.register_hook(lambda gradient: add(name, keys, gradient, spans))
            return passed_on

        def add(name: str, keys: Tensor, gradient: Tensor, spans: Sequence[tuple[int, int]]) -> None:
            keys, gradient, start = keys.flatten(0, -2), gradient.flatten(0, -2), 0
            for index, count in spans or [(0, len(keys))]:
                rows = slice(start, start := start + count)
                u, delta = keys[rows], gradient[rows]
                total = sums[index].get(name)
                if total is None:
                    if not buffers[index]:
                        buffers[index] = self._allocate_gradients()
                    sums[index][name] = buffers[index].pop(name).copy_(outer(delta, u))
                else:
                    total.add_(outer(delta, u))

        with self._hook_modules(watch, wanted), torch.set_grad_enabled(wanted):
            yield sums
            for total in filter(None, sums):  # of modules whose outputs no loss depends on
                total |= {n: self._zero(n) for n in self._weights.modules if n not in total}

    @contextmanager
    def _hook_modules(self, hook: Callable[..., Tensor], wanted: bool = True) -> Iterator[None]:
        """Context in which forward passes call ``hook`` with an edited module's name and a forward hook's arguments."""
        modules = self._weights.modules if wanted else {}
        with module_hooks([(module, partial(hook, name)) for name, module in modules.items()]):
            yield

    def _require_gradient(self, name: str, output: Tensor) -> tuple[Tensor, Tensor]:
        """A module's output, which now requires a gradient, and what the model gets: a copy where it overwrites it."""
        output = output if output.requires_grad else output.requires_grad_()
        return output, output.clone() if name in self.overwritten else output

    def _zero(self, name: str) -> Tensor:
        d_in, d_out = self._weights.module_shapes[name]
        return torch.zeros(d_out, d_in, dtype=self._weights.edit_dtype, device=self._passes.device)

    def _allocate_gradients(self) -> dict[str, Tensor]:
        """Uninitialised memory for a gradient of each edited weight: module → (d_out, d_in).

        It is one piece of memory: many smaller ones, allocated between a pass's activations, would fragment it.
        """
        shapes = self._weights.module_shapes
        sizes = {n: d_in * d_out for n, (d_in, d_out) in shapes.items()}
        buffer = torch.empty(sum(sizes.values()), dtype=self._weights.edit_dtype, device=self._passes.device)
        pieces = zip(shapes.items(), buffer.split(list(sizes.values())), strict=True)
        return {n: piece.view(d_out, d_in) for (n, (d_in, d_out)), piece in pieces}


class _TraceBuilder:
    """Builds the traces of several batches from the results of chunks of passages.

    Args:
        batches: the passages.
        token: which positions are traced (see :meth:`Gradients.trace`).
        weights: the edited weights.
        device: of the traces.
    """

    def __init__(
        self, batches: Sequence[Sequence[Passage]], token: str, weights: EditedWeights, device: torch.device
    ) -> None:
        self._batches, self._device = batches, device
        self._passages = [p for batch in batches for p in batch]
        self._positions = [p.chosen_positions(token) for p in self._passages]
        self._batch_of = [b for b, batch in enumerate(batches) for _ in batch]
        self._totals = [sum(len(p.targets) for p in batch) for batch in batches]  # answer tokens
        empty = {n: [torch.zeros(0, d, device=device) for d in shape] for n, shape in weights.module_shapes.items()}
        self._keys = {n: [rows] for n, (rows, _) in empty.items()}
        self._gradients = {n: [rows] for n, (_, rows) in empty.items()}
        self._owner: list[int] = []
        self._loss = [0.0] * len(batches)
        self._hardest, self._sums = torch.zeros(
            2, len(self._passages), dtype=weights.edit_dtype, device=device
        )
        self._answers = torch.tensor([float(len(p.targets)) for p in self._passages], device=device)

    def _batches_of(self, chunk: Sequence[int]) -> list[int]:
        """Batch of each answer token of a chunk."""
        return [self._batch_of[i] for i in chunk for _ in self._passages[i].targets]

    def token_weights(self, chunk: Sequence[int], losses: Tensor) -> Tensor:
        """The weight of each answer token of a chunk in its batch's mean loss, (P,)."""
        weights = [1 / self._totals[b] for b in self._batches_of(chunk)]
        return torch.tensor(weights, dtype=losses.dtype, device=self._device)

    def first_position(self, index: int) -> int:
        """The first position of a passage that its trace or its loss is taken at."""
        return min(self._positions[index][0], self._passages[index].positions[0])

    def add(
        self, chunk: Sequence[int], layout: Layout, losses: Tensor, inputs: dict[str, Tensor],
        gradients: Sequence[Tensor],
    ) -> None:  # fmt: skip
        """Add a chunk: losses (P,) at its answer positions; the modules' inputs and output gradients in its batch."""
        self.add_losses(chunk, losses.split([len(self._passages[i].targets) for i in chunk]))
        positions = [self._positions[i] for i in chunk]
        places = layout.places(positions, self._device)
        for n, gradient in zip(self._keys, gradients, strict=True):
            for pieces, values in ((self._keys, inputs[n]), (self._gradients, gradient)):
                piece = values.flatten(0, -2)[places.to(values.device)]
                pieces[n].append(at_least_float32(piece).to(self._device))
        self._owner.extend(i for i, traced in zip(chunk, positions, strict=True) for _ in traced)

    def add_losses(self, chunk: Sequence[int], by_passage: Sequence[Tensor]) -> None:
        """Add the losses of passages, (answer tokens,) each."""
        if not chunk:
            return
        losses = torch.cat(list(by_passage))
        passage_of = torch.tensor([i for i in chunk for _ in self._passages[i].targets], device=self._device)
        self._hardest.scatter_reduce_(0, passage_of, losses.to(self._hardest), "amax")
        self._sums.index_add_(0, passage_of, losses.to(self._sums))
        batches = self._batches_of(chunk)
        batch_of = torch.tensor(batches, device=self._device)
        for b in sorted(set(batches)):
            self._loss[b] += float(losses[batch_of == b].sum() / self._totals[b])

    def traces(self) -> list[Trace]:
        """The trace of each batch, with its positions in the passages' order."""
        owner = torch.tensor(self._owner, dtype=torch.long, device=self._device)
        permutation = torch.argsort(owner, stable=True)
        ends = [sum(map(len, self._batches[: b + 1])) for b in range(len(self._batches))]
        slices = [slice(end - len(batch), end) for batch, end in zip(self._batches, ends, strict=True)]
        counts = [int(((owner >= members.start) & (owner < members.stop)).sum()) for members in slices]

        def split(tensor: Tensor) -> tuple[Tensor, ...]:
            pieces: tuple[Tensor, ...] = tensor[permutation].split(counts)
            return pieces

        keys = {n: split(torch.cat(v)) for n, v in self._keys.items()}
        gradients = {n: split(torch.cat(v)) for n, v in self._gradients.items()}
        return [
            Trace(
                keys={n: v[b] for n, v in keys.items()},
                value_gradients={n: v[b] for n, v in gradients.items()},
                owner=positions - members.start,
                loss=self._loss[b],
                hardest=self._hardest[members],
                sums=self._sums[members],
                answers=self._answers[members],
            )
            for b, (positions, members) in enumerate(zip(split(owner), slices, strict=True))
        ]
