"""The reward: −(L(B_t, W_t) + L_back + L_reg), Eq. 6–10, from replaceable components.

A component says which passages of a record it scores and what an answer position costs; `rledit_env.scoring` scores
batches with components.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from rledit_env.answering import Ending, OtherQuestions, Preference
from rledit_env.encoding import EncodedRecord
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage
from rledit_env.lm.losses import kl_divergence, negative_log_likelihood
from rledit_env.preservation import Constraint, Continuation, OwnText
from rledit_env.updates import Penalty, frobenius_penalty


class Component(Protocol):
    """One term of L(B, W): a batch's mean loss over its answer positions, at the current weights.

    Attributes:
        needs_reference: whether ``loss`` needs the unedited model's final states.
    """

    needs_reference: bool

    def passages(self, record: EncodedRecord, choice: float) -> Sequence[Passage]:
        """The passages scored for one record; ``choice`` in [0, 1) picks among several, fixed for an episode."""
        ...

    def loss(self, lm: EditableLM, hidden: Tensor, targets: Tensor, reference: Tensor | None) -> Tensor:
        """Loss (P,) at P answer positions from final states (P, d), target ids (P,) and the unedited model's states."""
        ...


@runtime_checkable
class TextComponent(Protocol):
    """A component of a whole batch, whose passages are drawn at every step or written by the LLM.

    Attributes:
        needs_reference: as in `Component`.
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
        """The passages that a step scores for a batch of facts: an ``earlier`` batch or the step's own.

        All randomness comes from the facts' ``choices`` in [0, 1), fixed for an episode, and from its ``rng``.
        """
        ...

    def loss(self, lm: EditableLM, hidden: Tensor, targets: Tensor, reference: Tensor | None) -> Tensor:
        """As in `Component`."""
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
    """L_loc = KL(p_θ₀(·|x′) ‖ p_W(·|x′)): an unrelated answer unchanged (Eq. 7). With another
    `RewardConfig.locality_reference`, the weights before the step take the place of θ₀."""

    needs_reference = True

    def passages(self, record: EncodedRecord, choice: float) -> Sequence[Passage]:
        return pick(record.unrelated, choice)

    def loss(self, lm: EditableLM, hidden: Tensor, targets: Tensor, reference: Tensor | None) -> Tensor:
        assert reference is not None
        return kl_divergence(lm.forward, hidden, reference)


TEXT_COMPONENTS: dict[str, type[OwnText] | type[Continuation]] = {"own_text": OwnText, "continuation": Continuation}


def _paper_components() -> dict[str, tuple[float, Component | TextComponent]]:
    return {"generalization": (1.0, Generalization()), "locality": (0.6, Locality())}


@dataclass(frozen=True)
class RewardConfig:
    """What the reward consists of; the defaults are the paper's.

    Attributes:
        components: name → (weight, component) of the basic term L(B, W) (Eq. 8; λ_loc is locality's weight). Give
            your own to replace any of them; their unweighted means appear in ``info`` under their names.
            `rledit_env.preservation` has components that score changes of the rest of the LLM, `rledit_env.answering`
            some that measure what the scores measure.
        locality_reference: what `Locality` compares with: "original", θ₀ (Eq. 7), or "previous", the weights before the
            step, W_{t−1}, as RLEdit's published code does, for earlier batches too.
        constraint: a bound on one of the components, kept by a Lagrange multiplier; None for no bound.
        backtracking_depth: k, the number of earlier batches that are scored (Eq. 9). RLEdit's published
            ``back_depth: 10`` counts the current batch, and would be 9 here.
        backtracking_decay: μ; the batch i steps back has the weight μ^i.
        backtracking_samples: score only this many of the k, drawn with replacement by weight and reweighted so that
            the expected reward is the full sum; None scores all.
        every_step: score every step; False scores only the last presentation of a batch (the other steps' reward is
            minus their regularisation), which costs less where ``steps_per_batch`` > 1.
        batch_stride: score only one in this many batches, from a first one drawn at ``reset``, with this many times the
            weight: the expected reward of every batch is that of a stride of 1, and a long episode costs less. The
            reward of the other batches is minus their regularisation.
        regularisation: η, weight of ``penalty``.
        regularisation_gradient: whether ``info["action_gradient"]`` has the penalty's gradient; False leaves zeros, as
            in RLEdit's published code, which computes the penalty of a change without a gradient.
        penalty: what the regularisation measures, from an action's factors (keys (N, d_in), values (N, d_out)) by
            module; must be differentiable.
        floor: the lowest reward of a step, weights of ``batch_stride`` included; that of a step that breaks the model.
    """

    components: Mapping[str, tuple[float, Component | TextComponent]] = field(default_factory=_paper_components)
    backtracking_depth: int = 10
    backtracking_decay: float = 0.95
    backtracking_samples: int | None = None
    every_step: bool = True
    batch_stride: int = 1
    regularisation: float = 1e-4
    penalty: Penalty = frobenius_penalty
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
        """The loss of RLEdit's published code, which differs from :meth:`paper`, though the paper does not say so.

        Locality is measured from W_{t−1}, and the regularisation has no gradient. k is the paper's 10 earlier batches;
        the code's 10 include the current one, which is ``replace(..., backtracking_depth=9)`` here.
        """
        return replace(
            RewardConfig.paper(locality), locality_reference="previous", regularisation_gradient=False
        )  # fmt: skip

    @property
    def looks_back(self) -> bool:
        """Whether a component compares with the weights before the step."""
        parts = [part for _, part in self.components.values()]
        return self.locality_reference == "previous" and any(isinstance(part, Locality) for part in parts)

    @staticmethod
    def with_efficacy(efficacy: float = 1.0, locality: float = 1.0, samples: int | None = 1) -> RewardConfig:
        """The paper's reward with a term for the edit prompt itself, and with sampled backtracking."""
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
        """A reward for facts as the data set's scores measure them, free answers that end where they should, and an
        otherwise unchanged LLM.

        benchmarks/NOTES.md has the measurements behind the weights for ZsRE and CounterFact; FEVER's are not measured.
        No earlier batches are scored: the recursion and the LLM's own text cover them.

        Args:
            kind: "counterfact", whose facts have two answers, is scored by which answer is likelier (and a little by
                the likelihood itself); "fever" likewise, but its unrelated claims must keep their answers, right or
                wrong; others, such as "zsre", by the likelihood and by the answers to other questions about the same
                subject.
            own_text: weight of the divergence on text that the LLM wrote before editing; None means the kind's default.
        """
        preferred: dict[str, tuple[float, Component | TextComponent]] = {
            "generalization": (0.1, Generalization()), "preference": (4.0, Preference("paraphrases")),
        }  # fmt: skip
        if kind == "counterfact":
            weight, locality, specific = 60.0, 0.5, preferred | {"kept_preference": (2.0, Preference("unrelated"))}
        elif kind == "fever":
            weight, locality, specific = 20.0, 4.0, preferred
        else:
            weight, locality = 20.0, 0.5
            specific = {"generalization": (2.0, Generalization()), "other_questions": (0.3, OtherQuestions())}
        shared: dict[str, tuple[float, Component | TextComponent]] = {
            "efficacy": (2.0, Efficacy()), "ending": (1.0, Ending()), "locality": (locality, Locality()),
            "own_text": (weight if own_text is None else own_text, OwnText(passages=4)),
        }  # fmt: skip
        return RewardConfig(components=shared | specific, backtracking_depth=0)

    def replace(self, name: str, weight: float, component: Component | TextComponent) -> RewardConfig:
        """This configuration with one component added or replaced."""
        return replace(self, components={**self.components, name: (weight, component)})


def resolve_reward(reward: RewardConfig | str | None) -> RewardConfig | None:
    """The configuration for the environment's ``reward`` argument; None for ``"none"``."""
    if reward is None or reward == "paper":
        return RewardConfig()
    if reward == "efficacy":
        return RewardConfig.with_efficacy()
    if reward == "none":
        return None
    if isinstance(reward, RewardConfig):
        return reward
    raise ValueError(f"reward is {reward!r}; give None or 'paper', 'efficacy', 'none', or a RewardConfig")


def backtracked(step: int, config: RewardConfig, rng: np.random.Generator) -> dict[int, float]:
    """The earlier batches that are scored at batch ``step`` (0-based), with their weights: {i: μ^i}, i steps back.

    With ``backtracking_samples`` m, m batches are drawn from p_i ∝ μ^i, with the weight Σμ^i / m each; the expectation
    is the full sum.
    """
    depth = min(config.backtracking_depth, step)
    weights = config.backtracking_decay ** np.arange(1, depth + 1)
    samples = config.backtracking_samples
    if samples is None or samples >= depth:
        return {i: float(w) for i, w in enumerate(weights, start=1)}
    drawn = rng.choice(depth, size=samples, p=weights / weights.sum()) + 1
    counts = {int(i): int(n) for i, n in zip(*np.unique(drawn, return_counts=True), strict=True)}
    return {i: n * float(weights.sum()) / samples for i, n in counts.items()}
