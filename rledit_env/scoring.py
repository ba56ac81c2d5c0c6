"""How batches are scored in one pass of the LLM, and the reward that a step gets for its scores.

All components of the current batch and of the backtracked ones are weighed together, so that one pass over
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
    """A batch as the reward sees it.

    Attributes:
        records: its facts.
        choices: their fixed choices in [0, 1).
        weight: of its L(B, W).
        texts: the passages of each `TextComponent`, by the component's name (see :func:`with_texts`).
        extra: what components weigh here beside their weights in the configuration, by name: a constraint's multiplier.
    """

    records: Sequence[EncodedRecord]
    choices: Sequence[float]
    weight: float
    texts: Mapping[str, Sequence[Passage]] = field(default_factory=dict)
    extra: Mapping[str, float] = field(default_factory=dict)

    def passages(self, name: str, component: Component | TextComponent) -> list[Passage]:
        """What the component of that name scores of the batch."""
        if isinstance(component, TextComponent):
            if name not in self.texts:
                raise ValueError(f"the batch has no texts for the component {name!r}; draw them: with_texts(…)")
            return list(self.texts[name])
        pairs = zip(self.records, self.choices, strict=True)
        return [passage for record, choice in pairs for passage in component.passages(record, choice)]


def with_texts(
    lm: EditableLM, batch: ScoredBatch, config: RewardConfig, earlier: bool, rng: np.random.Generator
) -> ScoredBatch:
    """The batch with its texts at a step; nothing is drawn where no component asks for it."""
    parts = ((name, part) for name, (_, part) in config.components.items() if isinstance(part, TextComponent))
    texts = {name: part.draw(lm, batch.records, batch.choices, earlier, rng) for name, part in parts}
    return replace(batch, texts=texts)


@dataclass(frozen=True)
class Scores:
    """Losses of scored batches.

    Attributes:
        basic: batch by batch, component name → its unweighted mean.
        weighted: batch by batch, weight · Σ_components (weight + extra weight) · mean.
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
        """Module → gradient of ``total`` with respect to W: new tensors, made when asked for."""
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
        batches: what is scored.
        config: how.
        gradient: whether to take the gradient.
        before: module → W_{t−1}, needed where the configuration :attr:`~RewardConfig.looks_back`.
    """
    return score_streams(lm, [batches], config, gradient, before)[0]


def score_streams(
    lm: EditableLM, requests: Sequence[Sequence[ScoredBatch]], config: RewardConfig, gradient: bool,
    before: Mapping[str, Tensor] | None = None,
) -> list[Scores]:  # fmt: skip
    """:func:`score` of several streams in one pass.

    Request s meets the weights of stream s, where ``lm`` holds several (see `rledit_env.lm.streams`); each stream's
    gradient is that of its own weighted sum.
    """
    if not any(requests):
        return [NO_SCORES] * len(requests)
    work = _Work.of(requests, config)
    coefficient = (work.weight / work.tokens).to(lm.device, lm.edit_dtype)  # of one answer position, by slot
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
    scores, first = [], 0
    for stream, request in enumerate(requests):
        own = slice(first, first := first + len(request))
        ascent = {m: g.neg_() for m, g in gradients[stream].items()}  # in the tensors that were made here
        scores.append(Scores(basic[own], weighted[own], ascent or None))
    return scores


@dataclass(frozen=True)
class _Work:
    """What one pass scores. A slot is a batch and a component of it: batch · components + component.

    Attributes:
        parts: the components.
        passages: all that are scored.
        slot: of each passage.
        streams: whose weights each passage meets.
        tokens: answer positions of each slot, (slots,) float64; at least 1, for a component that finds nothing to score
            in a batch: its mean is then 0.
        weight: of each slot's mean, (slots,) float64.
    """

    parts: list[Component | TextComponent]
    passages: list[Passage]
    slot: list[int]
    streams: list[int]
    tokens: Tensor
    weight: Tensor

    @classmethod
    def of(cls, requests: Sequence[Sequence[ScoredBatch]], config: RewardConfig) -> _Work:
        batches = [(stream, batch) for stream, request in enumerate(requests) for batch in request]
        passages: list[Passage] = []
        slot: list[int] = []
        streams: list[int] = []
        weight: list[float] = []
        for stream, batch in batches:
            for name, (component_weight, part) in config.components.items():
                own = batch.passages(name, part)
                passages.extend(own)
                slot.extend([len(weight)] * len(own))
                streams.extend([stream] * len(own))
                weight.append(batch.weight * (component_weight + batch.extra.get(name, 0.0)))
        lengths = torch.tensor([len(p.targets) for p in passages], dtype=torch.long)
        positions = torch.tensor(slot, dtype=torch.long).repeat_interleave(lengths)
        tokens = torch.bincount(positions, minlength=len(weight)).clamp(min=1).double()
        parts = [part for _, part in config.components.values()]
        return cls(parts, passages, slot, streams, tokens, torch.tensor(weight, dtype=torch.float64))

    @property
    def component(self) -> list[int]:
        """Of each passage, its component's place in ``parts``."""
        return [s % len(self.parts) for s in self.slot]


def _states(
    lm: EditableLM, work: _Work, config: RewardConfig, gradient: bool, before: Mapping[str, Tensor] | None
) -> tuple[dict[int, Tensor], Iterable[tuple[list[int], AnswerStates]]]:
    """The reference states of the passages that need them, by the passages' places, and the states of all passages at
    the current weights, in chunks: those with gradients are computed when the chunks are gone through."""
    passages, component = work.passages, work.component
    referenced = [i for i, c in enumerate(component) if work.parts[c].needs_reference]
    reference: dict[int, Tensor] = {}
    if config.looks_back:
        backward = [i for i in referenced if isinstance(work.parts[component[i]], Locality)]
        reference |= zip(backward, _states_before(lm, [passages[i] for i in backward], before), strict=True)
        referenced = [i for i in referenced if i not in reference]
    chunks: Iterable[tuple[list[int], AnswerStates]]
    if gradient:
        original = lm.reference_states([passages[i] for i in referenced])
        chunks = _chunks(lm, passages, work.streams, component)
    else:  # final states are small: all of them are held
        states, original = lm.states_beside_reference(passages, work.streams, referenced)
        chunks = [(list(range(len(passages))), states)]
    reference |= zip(referenced, original, strict=True)
    return reference, chunks


def _states_before(
    lm: EditableLM, passages: Sequence[Passage], before: Mapping[str, Tensor] | None
) -> list[Tensor]:
    """Final states (answer tokens, d) of each passage at the weights of before the step; the current ones are kept."""
    if before is None:
        raise ValueError("locality_reference is 'previous', which needs the weights of before the step: use a single "
                         "environment, or locality_reference='original'")
    with lm.preserved():
        lm.restore(before)
        states = lm.answer_states(passages)
    return list(states.hidden.split([len(p.targets) for p in passages]))


def _chunks(
    lm: EditableLM, passages: Sequence[Passage], streams: Sequence[int], component: Sequence[int]
) -> Iterator[tuple[list[int], AnswerStates]]:
    """:meth:`EditableLM.answer_chunks`, each component's passages by themselves if they fill some passes: its output
    head's product then has more rows."""
    if sum(map(len, passages)) < 4 * lm.max_tokens_per_pass:
        yield from lm.answer_chunks(passages, streams)
        return
    for c in sorted(set(component)):
        members = [i for i, other in enumerate(component) if other == c]
        for chunk, states in lm.answer_chunks([passages[i] for i in members], [streams[i] for i in members]):
            yield [members[i] for i in chunk], states


def _add_losses(
    sums: Tensor, lm: EditableLM, work: _Work, coefficient: Tensor, reference: Mapping[int, Tensor],
    chunk: Sequence[int], states: AnswerStates,
) -> Tensor:  # fmt: skip
    """Add a chunk's losses to their slots' ``sums`` (slots,); their weighted sum, with its graph."""
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
        scores: of the batches that the step looks at, its own first; none where it looks at none.
        made: the update that the step made (see `Update.made`).
        drift: mean of ‖W_t − W₀‖ / ‖W₀‖.
        config: None for no reward: 0.
        multiplier: of the configuration's constraint.
        gradient: whether the parts hold the reward's gradients.
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


def _regularisation(made: Update, config: RewardConfig, wanted: bool) -> tuple[float, Parts]:
    """L_reg and, if ``wanted``, the gradient of its negative with respect to the change made."""
    if wanted and config.regularisation_gradient:
        penalty, gradient = made.penalty_gradient(config.penalty, config.regularisation)
        return penalty, {part: {m: -g for m, g in by_module.items()} for part, by_module in gradient.items()}
    with torch.no_grad():
        penalty = float(config.regularisation * made.penalty(config.penalty))
    return penalty, made.map(torch.zeros_like).parts() if wanted else {}
