"""The reward: −(L(B_t, W_t) + L_back + L_reg), Eq. 6–10, from replaceable components.

A component says which passages of a record it looks at and what an answer position costs. All components of the
current batch and of the backtracked ones are weighed together, so that one pass over length-sorted passages gives the
whole reward and its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from rledit_env.answering import Ending, OtherQuestions, Preference
from rledit_env.encoding import EncodedRecord
from rledit_env.lm.editable import AnswerStates, EditableLM
from rledit_env.lm.forward import Passage, at_least_float32
from rledit_env.lm.loading.placement import release_free_memory
from rledit_env.lm.losses import kl_divergence, negative_log_likelihood
from rledit_env.preservation import Constraint, Continuation, OwnText


class Component(Protocol):
    """One term of L(B, W): what a batch costs at the current weights, as a mean over its answer positions.

    Attributes:
        needs_reference: whether ``loss`` compares with θ₀'s final states.
    """

    needs_reference: bool

    def passages(self, record: EncodedRecord, choice: float) -> Sequence[Passage]:
        """The passages scored for one record; ``choice`` in [0, 1) picks among several, fixed for an episode."""
        ...

    def loss(self, lm: EditableLM, hidden: Tensor, targets: Tensor, reference: Tensor | None) -> Tensor:
        """Loss at P answer positions (P,) from final states (P, d), target ids (P,) and θ₀'s final states (P, d)."""
        ...


@runtime_checkable
class TextComponent(Protocol):
    """A component of a whole batch, whose passages are drawn at every step or have to be written by the LLM.

    Attributes:
        needs_reference: as a `Component`'s.
    """

    @property
    def needs_reference(self) -> bool: ...

    def draw(
        self,
        lm: EditableLM,
        records: Sequence[EncodedRecord],
        choices: Sequence[float],
        earlier: bool,
        rng: np.random.Generator,
    ) -> Sequence[Passage]:
        """The passages that a step scores for a batch of facts, an ``earlier`` one or the step's own.

        All that is random comes from the facts' ``choices`` in [0, 1), fixed for an episode, and from its ``rng``.
        """
        ...

    def loss(self, lm: EditableLM, hidden: Tensor, targets: Tensor, reference: Tensor | None) -> Tensor:
        """As a `Component`'s."""
        ...


def pick(passages: Sequence[Passage], choice: float) -> list[Passage]:
    """One of several passages, by a number in [0, 1)."""
    return [passages[int(choice * len(passages))]]


class Efficacy:
    """−log p_W(y* | x): the new fact on its own prompt. Not part of the paper's reward."""

    needs_reference = False

    def passages(self, record: EncodedRecord, choice: float) -> Sequence[Passage]:
        return [record.edit]

    def loss(self, lm: EditableLM, hidden: Tensor, targets: Tensor, reference: Tensor | None) -> Tensor:
        return negative_log_likelihood(lm.forward, hidden, targets)


class Generalization:
    """L_gen = −log p_W(y* | x̃): the new fact on a paraphrase (Eq. 6)."""

    needs_reference = False

    def passages(self, record: EncodedRecord, choice: float) -> Sequence[Passage]:
        return pick(record.paraphrases, choice)

    def loss(self, lm: EditableLM, hidden: Tensor, targets: Tensor, reference: Tensor | None) -> Tensor:
        return negative_log_likelihood(lm.forward, hidden, targets)


class Locality:
    """L_loc = KL(p_θ₀(·|x′) ‖ p_W(·|x′)): an unrelated answer unchanged (Eq. 7). `RewardConfig.locality_reference` may
    put the weights of before the step in θ₀'s place."""

    needs_reference = True

    def passages(self, record: EncodedRecord, choice: float) -> Sequence[Passage]:
        return pick(record.unrelated, choice)

    def loss(self, lm: EditableLM, hidden: Tensor, targets: Tensor, reference: Tensor | None) -> Tensor:
        assert reference is not None
        return kl_divergence(lm.forward, hidden, reference)


def frobenius_penalty(keys: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Tensor:
    """Σ_modules ‖ΔW‖_F² of ΔW = ṽᵀũ, from the factors' Gram matrices (no dense matrix)."""
    return torch.stack([((keys[m] @ keys[m].T) * (values[m] @ values[m].T)).sum() for m in keys]).sum()


def action_penalty(
    penalty: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor], made: Mapping[str, Mapping[str, Tensor]]
) -> Tensor:
    """A penalty of the change that an action made.

    Args:
        penalty: of factors; differentiable.
        made: ``keys`` (N, d_in) and ``values`` (N, d_out) by module, or, under any one name, the dense changes ΔW
            (d_out, d_in) by module. Those are seen as factors with ũ = I and ṽ = ΔWᵀ.
    """
    if "keys" in made:
        return penalty(made["keys"], made["values"])
    (changes,) = made.values()
    if not changes:
        return torch.zeros(())
    if penalty is frobenius_penalty:  # ‖ΔW‖_F² needs no identity
        return torch.stack([change.square().sum() for change in changes.values()]).sum()
    identities = {m: torch.eye(c.shape[1], dtype=c.dtype, device=c.device) for m, c in changes.items()}
    return penalty(identities, {m: c.T for m, c in changes.items()})


TEXT_COMPONENTS: dict[str, type[OwnText] | type[Continuation]] = {"own_text": OwnText, "continuation": Continuation}


def _paper_components() -> dict[str, tuple[float, Component | TextComponent]]:
    return {"generalization": (1.0, Generalization()), "locality": (0.6, Locality())}


@dataclass(frozen=True)
class RewardConfig:
    """What the reward consists of; the defaults are the paper's.

    Attributes:
        components: name → (weight, component) of the basic term L(B, W) (Eq. 8; λ_loc is locality's weight). Give
            your own to replace any of them; their unweighted means appear in ``info`` under their names.
            `rledit_env.preservation` has components that say what becomes of the rest of the LLM,
            `rledit_env.answering` some that ask what scores ask.
        locality_reference: what `Locality` compares with: "original", θ₀ (Eq. 7), or "previous", the weights of before
            the step, W_{t−1}, as RLEdit's published code does, for earlier batches too.
        constraint: a bound on one of the components, held by a Lagrange multiplier; None for none.
        backtracking_depth: k, how many earlier batches are scored (Eq. 9). RLEdit's published ``back_depth: 10`` counts
            the current batch, and would be 9 here.
        backtracking_decay: μ, weight of the batch i steps back is μ^i.
        backtracking_samples: score only this many of the k, drawn with replacement by weight and reweighted so that
            the expected reward is the full sum; None scores all.
        every_step: score every step; False scores only the last presentation of a batch (the other steps' reward is
            minus their regularisation), which costs less where ``steps_per_batch`` > 1.
        batch_stride: score only one in this many batches, from one drawn at ``reset`` on, with this many times the
            weight: the expected reward of every batch is what it would be with 1, and a long stream costs less. The
            others' reward is minus their regularisation.
        regularisation: η, weight of ``penalty``.
        regularisation_gradient: whether ``info["action_gradient"]`` holds the penalty's gradient; False leaves zeros,
            as in RLEdit's published code, which computes the penalty of a change that it builds without one.
        penalty: what the regularisation measures, from an action's factors (keys (N, d_in), values (N, d_out)) by
            module; must be differentiable.
        floor: the least reward of a step, weights of ``batch_stride`` included; what a step that breaks the model gets.
    """

    components: Mapping[str, tuple[float, Component | TextComponent]] = field(default_factory=_paper_components)
    backtracking_depth: int = 10
    backtracking_decay: float = 0.95
    backtracking_samples: int | None = None
    every_step: bool = True
    batch_stride: int = 1
    regularisation: float = 1e-4
    penalty: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor] = frobenius_penalty
    floor: float = -1000.0
    locality_reference: Literal["original", "previous"] = "original"
    regularisation_gradient: bool = True
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        if self.backtracking_depth < 0:
            raise ValueError(f"backtracking_depth is {self.backtracking_depth}; give 0 (none) or more")
        if self.backtracking_samples is not None and self.backtracking_samples < 1:
            raise ValueError(f"backtracking_samples is {self.backtracking_samples}; give at least 1, or None for all")
        if self.batch_stride < 1:
            raise ValueError(f"batch_stride is {self.batch_stride}; give 1 (every batch is scored) or more")
        if not self.floor < 0:
            raise ValueError(f"floor is {self.floor}; give a negative reward")
        if self.locality_reference not in ("original", "previous"):
            raise ValueError(f"locality_reference is {self.locality_reference!r}; give 'original' or 'previous'")
        bounded = self.constraint.component if self.constraint is not None else None
        if bounded is not None and bounded not in self.components:
            if bounded not in TEXT_COMPONENTS:
                known = ", ".join([*self.components, *(n for n in TEXT_COMPONENTS if n not in self.components)])
                raise ValueError(f"the constraint is on {bounded!r}, which is no component; give one of {known}")
            components = {**self.components, bounded: (0.0, TEXT_COMPONENTS[bounded]())}
            object.__setattr__(self, "components", components)

    @staticmethod
    def paper(locality: float = 0.6) -> RewardConfig:
        """The paper's reward: λ_loc = 0.6 (0.8 for some models), μ = 0.95, k = 10, η = 1e-4."""
        return RewardConfig(components={"generalization": (1.0, Generalization()), "locality": (locality, Locality())})

    @staticmethod
    def published(locality: float = 0.6) -> RewardConfig:
        """The loss of RLEdit's published code, which differs from :meth:`paper`, though the paper does not say so:
        locality is measured from W_{t−1}, and the regularisation has no gradient. k stays the paper's 10 earlier
        batches, where the code's 10 count the current one; ``replace(..., backtracking_depth=9)`` is the code's."""
        return replace(
            RewardConfig.paper(locality), locality_reference="previous", regularisation_gradient=False
        )  # fmt: skip

    @property
    def looks_back(self) -> bool:
        """Whether a component is measured from the weights of before the step."""
        parts = [part for _, part in self.components.values()]
        return self.locality_reference == "previous" and any(isinstance(part, Locality) for part in parts)

    @staticmethod
    def with_efficacy(efficacy: float = 1.0, locality: float = 1.0, samples: int | None = 1) -> RewardConfig:
        """The paper's reward with a term for the edit prompt itself and sampled backtracking: what we train with."""
        return RewardConfig(
            components={
                "efficacy": (efficacy, Efficacy()),
                "generalization": (1.0, Generalization()),
                "locality": (locality, Locality()),
            },
            backtracking_samples=samples,
        )

    @staticmethod
    def keeping(kind: str, own_text: float | None = None) -> RewardConfig:
        """The facts as the data set's scores see them, free answers that end where they should, and the rest of the LLM
        as it was; benchmarks/NOTES.md has what the weights for ZsRE and CounterFact were chosen by, FEVER's are not
        measured. Earlier batches are left to the recursion
        and to the LLM's own text, which scores all of them.

        Args:
            kind: "counterfact", whose answers have rivals, is scored by which answer is the likelier (and a little by
                the likelihood itself); "fever" likewise, but for its unrelated claims, whose answers are to stay what
                they were, right or wrong; others, such as "zsre", by the likelihood, and by what other questions about
                the same subject are answered.
            own_text: weight of the divergence on text that the LLM wrote before editing; None takes the one that
                suits the kind.
        """
        preferred: dict[str, tuple[float, Component | TextComponent]] = {
            "generalization": (0.1, Generalization()), "preference": (4.0, Preference("paraphrases")),
        }  # fmt: skip
        if kind == "counterfact":
            weight, locality, own = 60.0, 0.5, preferred | {"kept_preference": (2.0, Preference("unrelated"))}
        elif kind == "fever":
            weight, locality, own = 20.0, 4.0, preferred
        else:
            weight, locality = 20.0, 0.5
            own = {"generalization": (2.0, Generalization()), "other_questions": (0.3, OtherQuestions())}
        shared: dict[str, tuple[float, Component | TextComponent]] = {
            "efficacy": (2.0, Efficacy()), "ending": (1.0, Ending()), "locality": (locality, Locality()),
            "own_text": (weight if own_text is None else own_text, OwnText(passages=4)),
        }  # fmt: skip
        return RewardConfig(components=shared | own, backtracking_depth=0)

    def replace(self, name: str, weight: float, component: Component | TextComponent) -> RewardConfig:
        """This configuration with one component added or replaced."""
        return replace(self, components={**self.components, name: (weight, component)})


def resolve_reward(reward: RewardConfig | str | None) -> RewardConfig | None:
    """The configuration that the environment's ``reward`` argument means; None for ``"none"``."""
    if reward is None or reward == "paper":
        return RewardConfig()
    if reward == "efficacy":
        return RewardConfig.with_efficacy()
    if reward == "none":
        return None
    if isinstance(reward, RewardConfig):
        return reward
    raise ValueError(f"reward is {reward!r}; give None or 'paper', 'efficacy', 'none', or a RewardConfig")


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


def with_texts(
    lm: EditableLM, batch: ScoredBatch, config: RewardConfig, earlier: bool, rng: np.random.Generator
) -> ScoredBatch:
    """The batch with its texts at a step; nothing is drawn where no component asks for it."""
    parts = ((name, part) for name, (_, part) in config.components.items() if isinstance(part, TextComponent))
    texts = {name: part.draw(lm, batch.records, batch.choices, earlier, rng) for name, part in parts}
    return replace(batch, texts=texts)


def backtracked(step: int, config: RewardConfig, rng: np.random.Generator) -> dict[int, float]:
    """Which earlier batches are scored at batch ``step`` (0-based), and their weights: {i: μ^i}, i steps back.

    With ``backtracking_samples`` m, m draws from p_i ∝ μ^i weigh Σμ/m each, whose expectation is the full sum.
    """
    depth = min(config.backtracking_depth, step)
    weights = config.backtracking_decay ** np.arange(1, depth + 1)
    samples = config.backtracking_samples
    if samples is None or samples >= depth:
        return {i: float(w) for i, w in enumerate(weights, start=1)}
    drawn = rng.choice(depth, size=samples, p=weights / weights.sum()) + 1
    counts = {int(i): int(n) for i, n in zip(*np.unique(drawn, return_counts=True), strict=True)}
    return {i: n * float(weights.sum()) / samples for i, n in counts.items()}


@dataclass(frozen=True)
class Scores:
    """Losses of scored batches.

    Attributes:
        basic: batch by batch, component name → its unweighted mean.
        weighted: batch by batch, weight · Σ_components (weight + extra weight) · mean.
        gradient: module → gradient of ``total`` with respect to W, (d_out, d_in) in the edited weights' precision,
            or None.
    """

    basic: list[dict[str, float]]
    weighted: list[float]
    gradient: dict[str, Tensor] | None

    @property
    def total(self) -> float:
        """Σ_batches weight · Σ_components weight · mean."""
        return sum(self.weighted)


NO_SCORES = Scores([], [], None)


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
    batches = [batch for theirs in requests for batch in theirs]
    if not batches:
        return [NO_SCORES] * len(requests)
    names = list(config.components)
    passages: list[Passage] = []
    slot: list[int] = []  # batch · components + component of each passage
    for b, batch in enumerate(batches):
        for c, name in enumerate(names):
            found = _passages(config.components[name][1], name, batch)
            passages.extend(found)
            slot.extend([b * len(names) + c] * len(found))
    stream_of_batch = [s for s, theirs in enumerate(requests) for _ in theirs]
    streams = [stream_of_batch[place // len(names)] for place in slot]
    slots = torch.tensor(slot, dtype=torch.long)
    lengths = torch.tensor([len(p.targets) for p in passages], dtype=torch.long)
    # At least 1, for a component that finds nothing to score in a batch: its mean is then 0.
    tokens = torch.bincount(slots.repeat_interleave(lengths), minlength=len(batches) * len(names)).clamp(min=1).double()
    weight = torch.tensor(
        [b.weight * (config.components[n][0] + b.extra.get(n, 0.0)) for b in batches for n in names],
        dtype=torch.float64,
    )
    coefficient = (weight / tokens).to(lm.device, lm.edit_dtype)  # of one answer position, by slot
    referenced = [i for i, s in enumerate(slot) if config.components[names[s % len(names)]][1].needs_reference]
    reference: dict[int, Tensor] = {}
    if config.looks_back:
        backward = [i for i in referenced if isinstance(config.components[names[slot[i] % len(names)]][1], Locality)]
        reference |= zip(backward, _states_before(lm, [passages[i] for i in backward], before), strict=True)
        referenced = [i for i in referenced if i not in reference]
    chunks: Iterable[tuple[list[int], AnswerStates]]
    if gradient:
        several = sum(map(len, passages)) > lm.max_tokens_per_pass
        if several and lm.device.type == "cpu" and lm.dtype.itemsize >= 4:  # the step's most is held from here on
            release_free_memory()
        theirs = lm.reference_states([passages[i] for i in referenced])
        chunks = _passes(lm, passages, streams, [s % len(names) for s in slot])
    else:  # final states are small: all of them are held
        states, theirs = lm.states_beside_reference(passages, streams, referenced)
        chunks = [(list(range(len(passages))), states)]
    reference |= zip(referenced, theirs, strict=True)

    sums = torch.zeros(len(tokens), dtype=lm.edit_dtype, device=lm.device)
    with lm.collecting(gradient) as gradients:
        for chunk, states in chunks:
            position_slot = slots[chunk].to(lm.device)[states.owner]
            position_component = position_slot % len(names)
            chunk_loss = torch.zeros((), dtype=lm.edit_dtype, device=lm.device)
            for c, name in enumerate(names):
                rows = (position_component == c).nonzero()[:, 0]
                if not len(rows):
                    continue
                component = config.components[name][1]
                beside = None
                if component.needs_reference:
                    beside = torch.cat([reference[i] for i in chunk if slot[i] % len(names) == c])
                losses = at_least_float32(component.loss(lm, states.hidden[rows], states.targets[rows], beside))
                sums.index_add_(0, position_slot[rows], losses.detach())
                chunk_loss = chunk_loss + (coefficient[position_slot[rows]] * losses).sum()
            if gradient:
                chunk_loss.backward()
    means = (sums.cpu().double() / tokens).view(len(batches), len(names))
    basic = [dict(zip(names, row.tolist(), strict=True)) for row in means]
    weighted = (means * weight.view_as(means)).sum(1).tolist()
    scores, first = [], 0
    for s, request in enumerate(requests):
        own = slice(first, first := first + len(request))
        scores.append(Scores(basic[own], weighted[own], gradients[s] or None))
    return scores


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


def _passages(component: Component | TextComponent, name: str, batch: ScoredBatch) -> list[Passage]:
    """What a component scores of a batch."""
    if isinstance(component, TextComponent):
        if name not in batch.texts:
            raise ValueError(f"the batch has no texts for the component {name!r}; draw them: with_texts(…)")
        return list(batch.texts[name])
    pairs = zip(batch.records, batch.choices, strict=True)
    return [passage for record, choice in pairs for passage in component.passages(record, choice)]


def _passes(
    lm: EditableLM, passages: Sequence[Passage], streams: Sequence[int], component: Sequence[int]
) -> Iterator[tuple[list[int], AnswerStates]]:
    """:meth:`EditableLM.answer_chunks`, each component's passages by themselves if they fill some passes: its output
    head's product then has more rows."""
    if sum(map(len, passages)) < 4 * lm.max_tokens_per_pass:
        yield from lm.answer_chunks(passages, streams)
        return
    for c in sorted(set(component)):
        members = [i for i, theirs in enumerate(component) if theirs == c]
        for chunk, states in lm.answer_chunks([passages[i] for i in members], [streams[i] for i in members]):
            yield [members[i] for i in chunk], states
