"""Scores batches in one pass of the LLM, and computes a step's reward from the scores.

All components of the current batch and of the backtracked ones are weighted together, so that one pass over
length-sorted passages gives the whole reward and its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rledit_env.encoding import EncodedRecord
from rledit_env.lm.editable import AnswerStates, EditableLM
from rledit_env.lm.forward import Passage
from rledit_env.lm.precision import at_least_float32
from rledit_env.preservation import Multiplier
from rledit_env.reward import Component, Locality, RewardConfig, TextComponent
from rledit_env.updates import Parts, Update


@dataclass(frozen=True)
class ScoredBatch:
    """A batch as the reward scores it.

    Attributes:
        records: its facts.
        choices: for each fact, its fixed choice in [0, 1).
        weight: weight of its L(B, W).
        texts: the passages of each `TextComponent`, by the component's name (see :func:`with_texts`).
        extra: component name → weight here in addition to its weight in the configuration: a constraint's multiplier.
    """

    records: Sequence[EncodedRecord]
    choices: Sequence[float]
    weight: float
    texts: Mapping[str, Sequence[Passage]] = field(default_factory=dict)
    extra: Mapping[str, float] = field(default_factory=dict)

    def passages(self, name: str, component: Component | TextComponent) -> list[Passage]:
        """The passages of the batch that the component of that name scores."""
        if isinstance(component, TextComponent):
            if name not in self.texts:
                raise ValueError(f"the batch has no texts for the component {name!r}; draw them: with_texts(…)")
            return list(self.texts[name])
        pairs = zip(self.records, self.choices, strict=True)
        return [passage for record, choice in pairs for passage in component.passages(record, choice)]


def with_texts(
    lm: EditableLM, batch: ScoredBatch, config: RewardConfig, earlier: bool, rng: np.random.Generator
) -> ScoredBatch:
    """The batch with its texts at a step; nothing is drawn where no component needs texts."""
    parts = ((name, part) for name, (_, part) in config.components.items() if isinstance(part, TextComponent))
    texts = {name: part.draw(lm, batch.records, batch.choices, earlier, rng) for name, part in parts}
    return replace(batch, texts=texts)


@dataclass(frozen=True)
class Scores:
    """Losses of scored batches.

    Attributes:
        basic: for each batch, component name → its unweighted mean.
        weighted: for each batch, weight · Σ_components (weight + extra weight) · mean.
        reward_gradient: module → gradient of −``total`` with respect to W, (d_out, d_in) in the edited weights'
            precision, or None.
    """

    basic: list[dict[str, float]]
    weighted: list[float]
    reward_gradient: dict[str, Tensor] | None

    @property
    def total(self) -> float:
        """Σ_batches weight · Σ_components weight · mean."""
        return sum(self.weighted)

    @property
    def gradient(self) -> dict[str, Tensor] | None:
        """Module → gradient of ``total`` with respect to W, as new tensors."""
        return None if self.reward_gradient is None else {m: -g for m, g in self.reward_gradient.items()}


NO_SCORES = Scores([], [], None)


# -- scoring in one pass ---------------------------------------------------------------------------------------------


def score(
    lm: EditableLM, batches: Sequence[ScoredBatch], config: RewardConfig, gradient: bool,
    before: Mapping[str, Tensor] | None = None,
) -> Scores:  # fmt: skip
    """Losses of batches at the current weights and, if asked for, the gradient of their weighted sum.

    Args:
        lm: the LLM.
        batches: the batches to score.
        config: the reward's configuration.
        gradient: whether to compute the gradient.
        before: module → W_{t−1}, needed where the configuration :attr:`~RewardConfig.looks_back`.
    """
    return score_environments(lm, [batches], config, gradient, before)[0]


def score_environments(
    lm: EditableLM, requests: Sequence[Sequence[ScoredBatch]], config: RewardConfig, gradient: bool,
    before: Mapping[str, Tensor] | None = None,
) -> list[Scores]:  # fmt: skip
    """:func:`score` for several environments in one pass.

    Request s is scored at the s-th set of edited weights, where ``lm`` has several (see `rledit_env.lm.weight_sets`);
    each gradient is that of its request's weighted sum.
    """
    if not any(requests):
        return [NO_SCORES] * len(requests)
    work = _Work.of(requests, config)
    coefficient = (work.weight / work.tokens).to(lm.device, lm.edit_dtype)  # weight of one answer position, by slot
    reference, chunks = _states(lm, work, config, gradient, before)
    sums = torch.zeros(len(work.tokens), dtype=lm.edit_dtype, device=lm.device)
    with lm.collecting(gradient) as gradients:
        for chunk, states in chunks:
            loss = _add_losses(sums, lm, work, coefficient, reference, chunk, states)
            if gradient:
                loss.backward()
    means = (sums.cpu().double() / work.tokens).view(sum(map(len, requests)), len(work.parts))
    basic = [dict(zip(config.components, row.tolist(), strict=True)) for row in means]
    weighted = (means * work.weight.view_as(means)).sum(1).tolist()
    scores, start = [], 0
    for index, request in enumerate(requests):
        batches = slice(start, start := start + len(request))
        ascent = {m: g.neg_() for m, g in gradients[index].items()}  # in place: the tensors are our own
        scores.append(Scores(basic[batches], weighted[batches], ascent or None))
    return scores


@dataclass(frozen=True)
class _Work:
    """The passages that one pass scores. A slot is a component of a batch; its index is batch · components + component.

    Attributes:
        parts: the components.
        passages: all passages that are scored.
        slot: the slot of each passage.
        sets: the set of edited weights that each passage is scored at.
        tokens: answer positions of each slot, (slots,) float64; at least 1, so that the mean is 0 where a component has
            nothing to score in a batch.
        weight: weight of each slot's mean, (slots,) float64.
    """

    parts: list[Component | TextComponent]
    passages: list[Passage]
    slot: list[int]
    sets: list[int]
    tokens: Tensor
    weight: Tensor

    @classmethod
    def of(cls, requests: Sequence[Sequence[ScoredBatch]], config: RewardConfig) -> _Work:
        batches = [(index, batch) for index, request in enumerate(requests) for batch in request]
        passages: list[Passage] = []
        slot: list[int] = []
        sets: list[int] = []
        weight: list[float] = []
        for index, batch in batches:
            for name, (component_weight, part) in config.components.items():
                part_passages = batch.passages(name, part)
                passages.extend(part_passages)
                slot.extend([len(weight)] * len(part_passages))
                sets.extend([index] * len(part_passages))
                weight.append(batch.weight * (component_weight + batch.extra.get(name, 0.0)))
        lengths = torch.tensor([len(p.targets) for p in passages], dtype=torch.long)
        positions = torch.tensor(slot, dtype=torch.long).repeat_interleave(lengths)
        tokens = torch.bincount(positions, minlength=len(weight)).clamp(min=1).double()
        parts = [part for _, part in config.components.values()]
        return cls(parts, passages, slot, sets, tokens, torch.tensor(weight, dtype=torch.float64))

    @property
    def component(self) -> list[int]:
        """For each passage, the index of its component in ``parts``."""
        return [s % len(self.parts) for s in self.slot]


def _states(
    lm: EditableLM, work: _Work, config: RewardConfig, gradient: bool, before: Mapping[str, Tensor] | None
) -> tuple[dict[int, Tensor], Iterable[tuple[list[int], AnswerStates]]]:
    """Reference states of the passages that need them, by passage index, and chunks of all passages' states at the
    current weights. With gradients, the states of a chunk are computed when the caller gets to it."""
    passages, component = work.passages, work.component
    referenced = [i for i, c in enumerate(component) if work.parts[c].needs_reference]
    reference: dict[int, Tensor] = {}
    if config.looks_back:
        localities = [i for i in referenced if isinstance(work.parts[component[i]], Locality)]
        reference |= zip(localities, _states_before(lm, [passages[i] for i in localities], before), strict=True)
        referenced = [i for i in referenced if i not in reference]
    chunks: Iterable[tuple[list[int], AnswerStates]]
    if gradient:
        original = lm.reference_states([passages[i] for i in referenced])
        chunks = _chunks(lm, passages, work.sets, component)
    else:  # final states are small: all of them are in memory
        states, original = lm.states_beside_reference(passages, work.sets, referenced)
        chunks = [(list(range(len(passages))), states)]
    reference |= zip(referenced, original, strict=True)
    return reference, chunks


def _states_before(
    lm: EditableLM, passages: Sequence[Passage], before: Mapping[str, Tensor] | None
) -> list[Tensor]:
    """Final states (answer tokens, d) of each passage at the weights before the step; the present weights stay."""
    if before is None:
        raise ValueError("locality_reference is 'previous', which needs the weights of before the step: use a single "
                         "environment, or locality_reference='original'")
    with lm.preserved():
        lm.restore(before)
        states = lm.answer_states(passages)
    return list(states.hidden.split([len(p.targets) for p in passages]))


def _chunks(
    lm: EditableLM, passages: Sequence[Passage], sets: Sequence[int], component: Sequence[int]
) -> Iterator[tuple[list[int], AnswerStates]]:
    """:meth:`EditableLM.answer_chunks`; component by component where there are many passages, so that each product with
    the output head has more rows."""
    if sum(map(len, passages)) < 4 * lm.max_tokens_per_pass:
        yield from lm.answer_chunks(passages, sets)
        return
    for c in sorted(set(component)):
        members = [i for i, other in enumerate(component) if other == c]
        for chunk, states in lm.answer_chunks([passages[i] for i in members], [sets[i] for i in members]):
            yield [members[i] for i in chunk], states


def _add_losses(
    sums: Tensor, lm: EditableLM, work: _Work, coefficient: Tensor, reference: Mapping[int, Tensor],
    chunk: Sequence[int], states: AnswerStates,
) -> Tensor:  # fmt: skip
    """Add a chunk's losses to their slots' ``sums`` (slots,); returns their weighted sum, with its graph."""
    slots = torch.tensor([work.slot[i] for i in chunk], dtype=torch.long)
    position_slot = slots.to(lm.device)[states.owner]
    position_component = position_slot % len(work.parts)
    total = torch.zeros((), dtype=lm.edit_dtype, device=lm.device)
    for c, component in enumerate(work.parts):
        rows = (position_component == c).nonzero()[:, 0]
        if not len(rows):
            continue
        beside = None
        if component.needs_reference:
            beside = torch.cat([reference[i] for i in chunk if work.slot[i] % len(work.parts) == c])
        losses = at_least_float32(component.loss(lm, states.hidden[rows], states.targets[rows], beside))
        sums.index_add_(0, position_slot[rows], losses.detach())
        total = total + (coefficient[position_slot[rows]] * losses).sum()
    return total


# -- a step's reward -------------------------------------------------------------------------------------------------


def step_reward(
    scores: Scores, made: Update, drift: float, config: RewardConfig | None, multiplier: Multiplier | None,
    gradient: bool,
) -> tuple[float, dict[str, Any]]:  # fmt: skip
    """r_t (Eq. 10) and its parts, as `LifelongEditEnv.step` puts them into ``info``.

    Args:
        scores: scores of the step's batches, its own first; empty where the step scores none.
        made: the update that the step applied (see `Update.made`).
        drift: mean of ‖W_t − W₀‖ / ‖W₀‖.
        config: the reward's configuration; None for a reward of 0.
        multiplier: multiplier of the configuration's constraint.
        gradient: whether ``info`` has the reward's gradients.
    """
    if config is None:
        return 0.0, {"drift": drift, "diverged": not math.isfinite(drift)}
    penalty, action_gradient = _regularisation(made, config, gradient)
    reward = -(scores.total + penalty)
    if multiplier is not None and scores.basic:  # −μ (measured − bound); the measured part is in the total
        reward += multiplier.value * multiplier.constraint.bound * config.batch_stride
    largest = [torch.linalg.vector_norm(g, math.inf) for g in (scores.reward_gradient or {}).values()]
    diverged = not (math.isfinite(reward) and all(map(math.isfinite, largest)))
    info: dict[str, Any] = {
        **(scores.basic[0] if scores.basic else {}),
        "backtracking": float(sum(scores.weighted[1:])) / config.batch_stride,
        "regularisation": penalty,
        "drift": drift,
        "diverged": diverged,
    }
    if multiplier is not None:
        info["multiplier"] = multiplier.value
    if gradient and not diverged:
        if scores.reward_gradient is not None:
            info["reward_gradient"] = scores.reward_gradient
        info["action_gradient"] = action_gradient
    return (config.floor if diverged else max(reward, config.floor)), info


def _regularisation(made: Update, config: RewardConfig, needs_gradient: bool) -> tuple[float, Parts]:
    """L_reg and, if needed, the gradient of its negative with respect to the change made."""
    if needs_gradient and config.regularisation_gradient:
        penalty, gradient = made.penalty_gradient(config.penalty, config.regularisation)
        return penalty, {part: {m: -g for m, g in by_module.items()} for part, by_module in gradient.items()}
    with torch.no_grad():
        penalty = float(config.regularisation * made.penalty(config.penalty))
    return penalty, made.map(torch.zeros_like).parts() if needs_gradient else {}
