"""Preservation in the reward: how editing changes predictions of text that the LLM wrote itself, and a bound on that.

Two components that can be added to the paper's (see `rledit_env.reward`), both KL(p_θ₀ ‖ p_W) in nats per token, and
a Lagrange multiplier that keeps one of them at a bound while a policy learns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rledit_env.encoding import EncodedRecord
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage
from rledit_env.lm.losses import kl_divergence
from rledit_env.self_text import REWARD_OPENINGS, self_text, until_end

NOTHING = -1  # fills up rows of token ids in the cache


class _Divergence:
    """Base class of the components: KL(p_θ₀ ‖ p_W) at the tokens of their texts."""

    @property
    def needs_reference(self) -> bool:
        return True

    def loss(self, lm: EditableLM, hidden: Tensor, targets: Tensor, reference: Tensor | None) -> Tensor:
        assert reference is not None
        return kl_divergence(lm.forward, hidden, reference)


@dataclass(frozen=True)
class OwnText(_Divergence):
    """KL(p_θ₀ ‖ p_W) per token on text that the LLM wrote before editing: it measures how editing changes everything
    else.

    A pool of texts is sampled once per LLM; every scored step draws some of them by the episode's random numbers. No
    text has an opening that `rledit_env.evaluation.general.self_drift` scores, so that reported texts are never trained
    on. Earlier batches add nothing, since the texts belong to no fact.

    A scored step runs ``passages · tokens`` more tokens, forward and backward, with the logits of each under both LLMs.
    On SmolLM2-135M (bfloat16, one core, 20 facts per batch, the fact's prompt, a paraphrase and an unrelated one scored
    for the batch and one earlier) the step takes about 1.3 times as long as without it, and writing the pool takes half
    a minute, once.

    Attributes:
        passages: number of passages drawn per step.
        tokens: most tokens of a text after its opening.
        pool: number of texts in all.
        seed: seed of the sampling.

    Raises:
        ValueError: a number is not positive, or more passages are drawn than there are.
    """

    passages: int = 3
    tokens: int = 32
    pool: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        _check_positive(self, "passages", "tokens", "pool")
        largest_pool = len(REWARD_OPENINGS)
        if not self.passages <= self.pool <= largest_pool:
            raise ValueError(
                f"own_text draws {self.passages} passages of a pool of {self.pool}; give a pool of at least as many, "
                f"and at most {largest_pool}"
            )

    def draw(
        self,
        lm: EditableLM,
        records: Sequence[EncodedRecord],
        choices: Sequence[float],
        earlier: bool,
        rng: np.random.Generator,
    ) -> list[Passage]:
        """Different texts of the pool; none for an earlier batch."""
        if earlier:
            return []
        texts = self.texts(lm)
        return [texts[i] for i in rng.permutation(len(texts))[: self.passages]]

    def texts(self, lm: EditableLM) -> list[Passage]:
        """The pool, written by the unedited LLM when it is first needed and cached with the LLM."""
        key = ("own_text", self.tokens, self.pool, self.seed)
        cached = lm.text_cache.get(key)
        if cached is None:
            written = self_text(lm, REWARD_OPENINGS[: self.pool], self.tokens, self.seed)
            rows = [[len(p.input_ids) + 1 - len(p.targets), *p.input_ids, p.targets[-1]] for p in written]
            cached = _pad(rows)
            lm.text_cache.put(key, cached)
        passages = []
        for first, *row in cached.tolist():
            ids = [token for token in row if token != NOTHING]
            passages.append(Passage(tuple(ids[:-1]), tuple(ids[first:])))
        return passages


@dataclass(frozen=True)
class Continuation(_Divergence):
    """KL(p_θ₀ ‖ p_W) per token on what the unedited LLM writes after a fact's prompt and new target.

    Free answers of an edited LLM go wrong there: they repeat the target. An episode's random numbers choose some facts
    of each batch; the unedited LLM continues them greedily when the batch is first scored, and the texts are cached. A
    fact after which it ends the text adds nothing.

    A scored step runs the chosen facts and their texts, forward and backward, for each batch that it scores. On
    SmolLM2-135M (bfloat16, one core, 20 facts per batch, the fact's prompt, a paraphrase and an unrelated one scored
    for the batch and one earlier) it takes about 1.3 times as long as without them, and writing the texts takes half a
    step per batch.

    Attributes:
        facts: number of facts chosen from each batch; all of them where there are fewer.
        tokens: most tokens of a text after the target.

    Raises:
        ValueError: a number is not positive.
    """

    facts: int = 3
    tokens: int = 10

    def __post_init__(self) -> None:
        _check_positive(self, "facts", "tokens")

    def draw(
        self,
        lm: EditableLM,
        records: Sequence[EncodedRecord],
        choices: Sequence[float],
        earlier: bool,
        rng: np.random.Generator,
    ) -> list[Passage]:
        """Continuations of the facts with the smallest choices."""
        drawn = np.argsort(np.asarray(choices), kind="stable")[: self.facts]
        return [text for text in self.texts(lm, [records[i] for i in drawn]) if text is not None]

    def texts(self, lm: EditableLM, records: Sequence[EncodedRecord]) -> list[Passage | None]:
        """The unedited LLM's continuation of each fact; None where it writes nothing.

        They are cached for these facts together, not one by one. The facts that are decoded in one batch can change a
        token where two are almost equally likely, and a run that resumes from a checkpoint must have the same texts as
        an uninterrupted one.
        """
        starts = [(*r.edit.input_ids, r.edit.targets[-1]) for r in records]
        key = ("continuation", self.tokens, tuple(starts))
        cached = lm.text_cache.get(key)
        if cached is None:
            cached = _pad(_continue_greedily(lm, starts, self.tokens))
            lm.text_cache.put(key, cached)
        passages: list[Passage | None] = []
        for start, row in zip(starts, cached.tolist(), strict=True):
            written = [token for token in row if token != NOTHING]
            passages.append(Passage((*start, *written[:-1]), tuple(written)) if written else None)
        return passages


@torch.no_grad()
def _continue_greedily(lm: EditableLM, starts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """The unedited LLM's greedy continuations of token ids, up to its end of text and within its context."""
    rows: list[list[int]] = [[] for _ in starts]
    fitting = [i for i, start in enumerate(starts) if len(start) < lm.context_length]
    with lm.original_weights():
        for members in lm.decoded_together([starts[i] for i in fitting]):
            batch = [fitting[m] for m in members]
            room = lm.context_length - max(len(starts[i]) for i in batch)
            output = lm.decode([starts[i] for i in batch], min(tokens, room))
            for i, row in zip(batch, output.tolist(), strict=True):
                rows[i] = until_end(lm, row)
    return rows


def _pad(rows: Sequence[Sequence[int]]) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[NOTHING] * (longest - len(row))] for row in rows], dtype=torch.int32)


def _check_positive(component: object, *names: str) -> None:
    for name in names:
        value = getattr(component, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} of {type(component).__name__} is {value!r}; give 1 or more")


@dataclass(frozen=True)
class Constraint:
    """A bound on a component, kept by a Lagrange multiplier μ ≥ 0 instead of a weight.

    The term −μ · (measured − bound) is added to the reward of a scored step, where measured is the component's mean on
    the step's own batch; the reward's gradient has the component's with weight μ. Between trajectories the multiplier
    changes by dual ascent: μ ← max(0, μ + rate · (measured − bound)). So it rises while the component is above the
    bound, and falls to 0 where it stays below it (see `Multiplier`).

    Attributes:
        component: the name of one of `RewardConfig.components`; "own_text" and "continuation" need not be there, and
            then have no weight of their own.
        bound: the component's largest value at a trajectory's end, in its unit: nats per token for the KLs.
        rate: rate of the dual ascent: the multiplier's rise per trajectory for each unit above the bound.
        start: the multiplier's first value.

    Raises:
        ValueError: a number is out of its range.
    """

    component: str = "own_text"
    bound: float = 0.1
    rate: float = 1.0
    start: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.bound < math.inf:
            raise ValueError(f"the bound on {self.component!r} is {self.bound}; give a positive number")
        if not 0 < self.rate < math.inf:
            raise ValueError(f"the rate of the bound on {self.component!r} is {self.rate}; give a positive number")
        if not 0 <= self.start < math.inf:
            raise ValueError(f"the bound on {self.component!r} starts with {self.start}; give 0 or more")


class Multiplier:
    """The Lagrange multiplier of a `Constraint`.

    An environment owns one (`LifelongEditEnv.multiplier`; those of a vector environment share one) and reads it at
    every step. Training calls :meth:`update` between two trajectories; nothing else changes it, in particular no
    evaluation. The agents of this project do so and save it in their checkpoints.

    Args:
        constraint: the constraint.

    Attributes:
        value: μ.
    """

    def __init__(self, constraint: Constraint) -> None:
        self.constraint, self.value = constraint, constraint.start

    def update(self, measured: float) -> float:
        """Dual ascent: μ ← max(0, μ + rate · (measured − bound)); returns the new μ.

        Args:
            measured: the component at a trajectory's end, or its mean over several trajectories.

        Raises:
            ValueError: ``measured`` is not finite; the multiplier is unchanged.
        """
        c = self.constraint
        if not math.isfinite(measured):
            raise ValueError(f"{c.component!r} was measured as {measured}; leave a trajectory without a finite one out")
        self.value = max(0.0, self.value + c.rate * (measured - c.bound))
        return self.value
