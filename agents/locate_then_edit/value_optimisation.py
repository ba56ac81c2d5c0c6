"""ROME's value optimisation (Meng et al., NeurIPS 2022, Eq. 4), for all facts of a batch at once.

For each fact, a vector δ is added to the output m of an MLP's last projection at the subject's last token, and
optimised until the LLM answers with the new target. v* = m + δ is the output that the edited weight should give for the
fact's key. Only tokens from the subject's last one on are run, and only layers from the edited one up
(`rledit_env.lm.continued`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from agents.base import NotApplicable
from rledit_env.knowledge import EditRecord
from rledit_env.lm.continued import at_places, continued_forward
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage
from rledit_env.lm.hooks import module_hooks
from rledit_env.lm.losses import kl_divergence, negative_log_likelihood, reverse_kl_divergence
from rledit_env.lm.names import module_layer
from rledit_env.lm.precision import at_least_float32

KL_TERMS = ("subject", "essence")


@dataclass(frozen=True)
class ValueConfig:
    """The settings of the value optimisation. The defaults are those published for GPT-J with ROME.

    The loss of a fact is the mean of −log p(target) over its target tokens and prompts (all prompts have equal weight),
    plus ``kl_weight`` · KL, plus ``weight_decay`` · ‖δ‖ / ‖r‖², as in the published code of ROME, MEMIT and AlphaEdit.

    Attributes:
        steps: the largest number of times the loss is computed. An Adam step follows each time but the last, as in the
            published code, whose ``v_num_grad_steps: 25`` takes 24. A fact whose loss falls below ``loss_threshold``
            ends earlier.
        learning_rate: Adam's.
        weight_decay: weight of ‖δ‖ / ‖r‖² in the loss.
        kl_weight: weight of the KL divergence between the LLM with δ and without it.
        clamp: ‖δ‖ is at most this many times ‖r‖.
        loss_threshold: see ``steps``.
        relative_to: the vector r at the prompt's subject: "output", m itself, as in ROME, or "state", the layer's
            output state, as in MEMIT and AlphaEdit.
        kl: the divergence. "subject", as published: KL(new ‖ old) of the next token at the subject's last token in
            "{subject} is a", where δ is added. "essence", ours: KL(old ‖ new) of the token after "{subject} is a".

    Raises:
        ValueError: a value is out of range.
    """

    steps: int = 20
    learning_rate: float = 0.5
    weight_decay: float = 0.5
    kl_weight: float = 0.0625
    clamp: float = 4.0
    loss_threshold: float = 0.05
    relative_to: Literal["output", "state"] = "output"
    kl: Literal["subject", "essence"] = "subject"

    def __post_init__(self) -> None:
        if self.relative_to not in ("output", "state"):
            raise ValueError(f"relative_to is {self.relative_to!r}; give 'output' or 'state'")
        if self.kl not in KL_TERMS:
            raise ValueError(f"kl is {self.kl!r}; give 'subject', as published, or 'essence'")
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; give 1 or more: the loss is computed so often, and an Adam step "
                             "follows each time but the last")
        for name in ("learning_rate", "clamp"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give a positive number")
        for name in ("weight_decay", "kl_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give 0 or more")


@dataclass(frozen=True)
class Request:
    """One fact to edit, as passages.

    Attributes:
        rewrites: the prompt with its new target, alone and after each context.
        essence: "{subject} is a", whose next tokens should not change.
    """

    rewrites: tuple[Passage, ...]
    essence: Passage


@dataclass(frozen=True)
class Values:
    """The values of F facts.

    Attributes:
        initial: m, the module's output at the prompt's subject, (F, d_out), at least float32.
        delta: δ, (F, d_out).
        loss: the last loss, (F,).
        steps: number of Adam steps, (F,) int64.
    """

    initial: Tensor
    delta: Tensor
    loss: Tensor
    steps: Tensor

    @property
    def solved(self) -> Tensor:
        """v* = m + δ, (F, d_out)."""
        return self.initial + self.delta


def encode_request(lm: EditableLM, record: EditRecord, contexts: Sequence[str] = ()) -> Request:
    """The passages of a fact. In a chat template, a context precedes the prompt's own words directly.

    Ours: contexts that mention the subject are left out; the published code keeps them.

    Raises:
        NotApplicable: the fact has no subject, or its prompt does not contain it.
    """
    subject = record.subject
    span = record.subject_span
    if not subject or span is None:
        raise NotApplicable(
            f"{record.origin or 'a fact'}: locate-then-edit needs a subject that occurs in the prompt, but the subject "
            f"is {subject!r} and the prompt {record.prompt!r}; take facts with subjects (ZsRE, CounterFact)"
        )
    if not record.lead and record.prompt.startswith(lm.text.special_tokens):
        contexts = ()  # in a chat that the user wrote out, it is unknown where the prompt's own words begin
    leads = ["", *(f"{c}. " for c in contexts if subject not in c)]
    prompts = [record.prompt[: record.lead] + lead + record.prompt[record.lead :] for lead in leads]
    spans = [(span[0] + len(lead), span[1] + len(lead)) for lead in leads]
    rewrites = lm.tokenize_all(
        prompts, [record.target] * len(prompts), spans, [record.origin] * len(prompts)
    )
    essence = lm.tokenize(f"{subject} is a", "thing", subject, record.origin)
    end = essence.positions[0] + 1
    return Request(tuple(rewrites), Passage(essence.input_ids[:end], essence.targets[:1], essence.subject_position))


def up_to_subject(essence: Passage) -> Passage:
    """The essence, cut after its subject's last token; that position predicts the passage's only target."""
    position = essence.subject_position
    assert position is not None
    return Passage(essence.input_ids[: position + 1], essence.targets[:1], position)


def optimise_values(
    lm: EditableLM,
    module: str,
    requests: Sequence[Request],
    config: ValueConfig,
    progress: Callable[[int], object] | None = None,
) -> Values:
    """v* of F facts at one module, with the LLM's current weights; facts do not depend on each other.

    The memory is that of one forward pass (`EditableLM.max_tokens_per_pass`) for any F.

    Args:
        lm: the LLM; it is not changed.
        module: a linear module whose output is added to the residual stream, such as an MLP's last.
        requests: the facts.
        config: the settings.
        progress: called with the number of facts done since the last call.
    """
    if config.kl == "subject":
        requests = [replace(request, essence=up_to_subject(request.essence)) for request in requests]
    width = lm.module_shapes[module][1]
    empty = torch.zeros(len(requests), width, device=lm.device, dtype=lm.edit_dtype)
    values = Values(
        empty, empty.clone(), empty.new_zeros(len(requests)), torch.zeros(len(requests), dtype=torch.long)
    )
    for chunk in _chunks(requests, lm.max_tokens_per_pass):
        solved = _optimise(lm, module, [requests[i] for i in chunk], config)
        for all_facts, part in ((values.initial, solved.initial), (values.delta, solved.delta),
                                (values.loss, solved.loss), (values.steps, solved.steps)):  # fmt: skip
            all_facts[chunk] = part
        if progress is not None:
            progress(len(chunk))
    return values


def _chunks(requests: Sequence[Request], max_tokens: int) -> Iterator[list[int]]:
    """Indices of facts whose passages have similar lengths from the subject on, at most ``max_tokens`` padded tokens
    together."""
    longest = [
        max(len(p) - (p.subject_position or 0) for p in (*request.rewrites, request.essence)) for request in requests
    ]
    chunk: list[int] = []
    tokens = 0
    for index in sorted(range(len(requests)), key=longest.__getitem__):
        passages = len(requests[index].rewrites) + 1
        tokens += passages
        if chunk and tokens * longest[index] > max_tokens:
            yield chunk
            chunk, tokens = [], passages
        chunk.append(index)
    if chunk:
        yield chunk


def _optimise(lm: EditableLM, module: str, requests: Sequence[Request], config: ValueConfig) -> Values:
    """Optimise these facts with one Adam. The values of finished facts stay as they are; once half of the facts are
    finished, these are dropped from the forward passes."""
    count, width = len(requests), lm.module_shapes[module][1]
    delta = torch.zeros(count, width, device=lm.device, dtype=lm.edit_dtype)
    first, second = torch.zeros_like(delta), torch.zeros_like(delta)  # Adam's moments
    initial, reference, size = torch.zeros_like(delta), None, delta[:, :1]
    loss = delta.new_zeros(count)
    steps = torch.zeros(count, dtype=torch.long, device=lm.device)
    active = torch.arange(count, device=lm.device)
    step = 0
    while len(active):
        running = _Pass(lm, module, [requests[i] for i in active.tolist()])
        if reference is None:
            initial, state, reference = running.at_rest()
            size = (state if config.relative_to == "state" else initial).norm(dim=1, keepdim=True)  # ‖r‖, (F, 1)
        finished = torch.zeros(len(active), dtype=torch.bool, device=lm.device)
        while True:
            losses, gradient = running.losses(delta[active], reference[active], config)
            norm = delta[active].norm(dim=1, keepdim=True)
            scale = config.weight_decay / size[active].square()
            losses = losses + (scale * norm)[:, 0]
            gradient = gradient + scale * delta[active] / norm.clamp(min=torch.finfo(norm.dtype).tiny)
            loss[active] = torch.where(finished, loss[active], losses)
            finished = finished | (losses < config.loss_threshold)
            step += 1
            if step == config.steps:
                return Values(initial, delta, loss, steps.cpu())
            moving = active[~finished]
            gradient = gradient[~finished]
            first[moving] = 0.9 * first[moving] + 0.1 * gradient
            second[moving] = 0.999 * second[moving] + 0.001 * gradient.square()
            scaled = (second[moving] / (1 - 0.999**step)).sqrt() + 1e-8
            stepped = delta[moving] - config.learning_rate * first[moving] / (1 - 0.9**step) / scaled
            limit = config.clamp * size[moving]
            delta[moving] = stepped * (limit / stepped.norm(dim=1, keepdim=True)).clamp(max=1)
            steps[moving] = step
            if 2 * len(moving) <= len(active):
                active = moving
                break
    return Values(initial, delta, loss, steps.cpu())


class _Pass:
    """Forward passes over the passages of some facts, with vectors added at the subjects."""

    def __init__(self, lm: EditableLM, module: str, requests: Sequence[Request]) -> None:
        self.site, self.width = lm.model.get_submodule(module), lm.module_shapes[module][1]
        rewrites = [p for request in requests for p in request.rewrites]
        self.passages = [*rewrites, *(request.essence for request in requests)]
        self.layer = module_layer(module)
        self.forward = continued_forward(lm, self.passages, self.layer)
        self.places = self.forward.places(self.passages)
        counts = [len(request.rewrites) for request in requests]
        owner = [i for i, n in enumerate(counts) for _ in range(n)]
        device = lm.device
        self.owner = torch.tensor([*owner, *range(len(requests))], device=device)  # fact of each passage
        self.plain = torch.tensor([sum(counts[:i]) for i in range(len(counts))], device=device)
        answers = [(i, 1 / (len(p.targets) * counts[i])) for i, p in zip(owner, rewrites, strict=True)
                   for _ in p.targets]  # fmt: skip
        self.fact = torch.tensor([i for i, _ in answers], device=device)  # fact of each answer position
        self.share = torch.tensor([s for _, s in answers], device=device, dtype=lm.edit_dtype)
        self.targets = torch.tensor([t for p in rewrites for t in p.targets], device=device)

    def _states(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Run the passages with δ (F, d_out) added to the module's outputs.

        Returns:
            The final states (P, d) at the answer positions, the essences' last; and the module's outputs without δ at
            the plain prompts' subjects, (F, d_out).
        """
        outputs: list[Tensor] = []

        def add(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
            subjects = at_least_float32(at_places(output, self.forward.subjects))  # (B, d_out)
            outputs.append(subjects[self.plain])
            shifted = (subjects + delta[self.owner]).to(output.dtype)
            rows = output.view(len(shifted), -1, self.width)
            places = torch.arange(len(shifted), device=output.device), self.forward.subjects
            return rows.index_put(places, shifted).view_as(output)

        with module_hooks([(self.site, add)]):
            states = self.forward.states(self.places)
        return states, outputs[0]

    @torch.no_grad()
    def at_rest(self) -> tuple[Tensor, Tensor, Tensor]:
        """Run the passages with nothing added.

        Returns:
            The module's outputs at the subjects (F, d_out), its layer's output states there (F, d), and the essences'
            final states (F, d).
        """
        layer_states: list[Tensor] = []

        def keep(_module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            states = output[0] if isinstance(output, tuple) else output
            layer_states.append(at_least_float32(at_places(states, self.forward.subjects)[self.plain]))

        with module_hooks([(self.forward.layers[self.layer], keep)]):
            states, initial = self._states(self.share.new_zeros(len(self.plain), self.width))
        return initial, layer_states[0], states[len(self.targets) :]

    def losses(self, delta: Tensor, reference: Tensor, config: ValueConfig) -> tuple[Tensor, Tensor]:
        """The loss of each fact without the weight decay, (F,), and its gradient with respect to δ, (F, d_out)."""
        with torch.enable_grad():
            leaf = delta.detach().requires_grad_()
            states, _ = self._states(leaf)
            nll = negative_log_likelihood(self.forward, states[: len(self.targets)], self.targets)
            divergence = reverse_kl_divergence if config.kl == "subject" else kl_divergence
            kl = config.kl_weight * divergence(self.forward, states[len(self.targets) :], reference)
            losses = torch.zeros_like(kl).index_add(0, self.fact, nll * self.share.to(nll.dtype)) + kl
            (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        return losses.detach(), gradient

