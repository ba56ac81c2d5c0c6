"""Finds how strongly an editor without training has to edit: its step size, and how often a batch is presented."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from agents.running.editing import edit_facts
from agents.running.editors import Editor, configured_step_size, with_step_size
from rledit_env.answers import took
from rledit_env.env import LifelongEditEnv
from rledit_env.evaluation.general.self_text import REWARD_OPENINGS, self_drift, self_text
from rledit_env.evaluation.guard import DriftGuard
from rledit_env.evaluation.metrics import continuations, top1_by_record
from rledit_env.knowledge import KnowledgeDataset
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage

KL_BOUND = 0.1  # nats a token on the LLM's own text
FACTS = 6
SECONDS = 60.0
LEAST = 4  # trials that are made however slow they are
TEXTS, TEXT_TOKENS = REWARD_OPENINGS[::12], 24  # of the text that the divergence is measured on, which no report scores
FAR, NEAR, CLOSE = 10.0, 10**0.5, 2.0  # factors between step sizes tried
SMALLEST, LARGEST = 1e-12, 1e6


@dataclass(frozen=True)
class Trial:
    """A few facts edited into the unedited LLM.

    Attributes:
        step_size, steps_per_batch: with what.
        taken: how many of the facts took.
        top1: share of a target's tokens that the LLM now says, the mean over facts, in percent (`Metrics.top1`).
        kl: divergence from the unedited LLM on text of its own, in nats a token; None where the LLM broke, or went too
            far for the guard of the run.
    """

    step_size: float
    steps_per_batch: int
    taken: int
    top1: float
    kl: float | None

    def within(self, bound: float) -> bool:
        return self.kl is not None and self.kl <= bound


@dataclass(frozen=True)
class StrengthSearch:
    """What was tried, and what was chosen.

    Attributes:
        facts: how many facts each trial edited.
        bound: the divergence that a choice may reach, in nats a token.
        trials: in the order in which they were made.
        chosen: of those within the bound the one with which most facts take; of equal ones the one with the best
            ``top1``, then the one that diverges least. Where none is within the bound, the one that diverges least.
        seconds: spent in all.
        complete: False where the time was up before the search was.
    """

    facts: int
    bound: float
    trials: tuple[Trial, ...]
    chosen: Trial
    seconds: float
    complete: bool

    @property
    def reason(self) -> str:
        """Why this one, in words."""
        chosen = self.chosen
        if not chosen.within(self.bound):
            return f"every strength tried moves the model further than {self.bound:g} nats a token; this one least"
        if chosen.taken == self.facts:
            return f"of those with which all facts take within {self.bound:g} nats a token, it moves the model least"
        return (f"{chosen.taken} of {self.facts} facts take, and {chosen.top1:.0f} % of the targets' tokens: the most "
                f"within {self.bound:g} nats a token")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "trials": [asdict(t) for t in self.trials], "reason": self.reason}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> StrengthSearch:
        """What :meth:`as_dict` gave."""
        fields = {name: value for name, value in stored.items() if name != "reason"}
        trials = tuple(Trial(**t) for t in fields.pop("trials"))
        return cls(**{**fields, "trials": trials, "chosen": Trial(**fields["chosen"])})


def some_facts(facts: KnowledgeDataset, count: int = FACTS) -> KnowledgeDataset:
    """So many facts, evenly from the first to the last."""
    count = min(count, len(facts))
    return replace(facts, records=tuple(facts.records[i * len(facts) // count] for i in range(count)))


@dataclass(frozen=True)
class StrengthProbe:
    """Edits a few facts with one strength after another, each time into the unedited LLM.

    Attributes:
        lm: the LLM.
        editor: one with a step size (`Editor.step_size`).
        facts: to edit, all in every trial.
        token: positions that the editor sees, as in `LifelongEditEnv`.
        batch_size: facts a batch.
        bound: the divergence that is allowed, in nats a token.
        guarded: whether it is also allowed no more than that on the text of `DriftGuard`, as the run will be.
        seconds: after which no further trial is begun; the first `LEAST` are made in any case.
        progress: called with every trial.
        present_until: as in `LifelongEditEnv`, as the run will be: the numbers of presentations are then the most.
        contexts: as there.
    """

    lm: EditableLM
    editor: Editor
    facts: KnowledgeDataset
    token: str
    batch_size: int
    bound: float = KL_BOUND
    guarded: bool = False
    seconds: float = SECONDS
    progress: Callable[[Trial], Any] | None = None
    present_until: float | None = None
    contexts: int = 0

    def search(self, presentations: Sequence[int]) -> StrengthSearch:
        """Find the smallest step size with which all facts take, for each number of presentations of a batch.

        The LLM is the unedited one afterwards, bit for bit, and nothing that was computed on the way is left in it.

        Args:
            presentations: what to try, in this order. The first step size for each is the best one so far (before that,
                the editor's own), in proportion.
        """
        started = time.perf_counter()
        trials: list[Trial] = []
        complete = True
        try:
            text = self_text(self.lm, TEXTS, TEXT_TOKENS)
            size, before = configured_step_size(self.editor), self.editor.env.get("steps_per_batch", 1)
            for count in presentations:
                bracket = Bracket(size * before / count)
                while complete and not bracket.closed:
                    trial = self._trial(bracket.step_size, count, text)
                    trials.append(trial)
                    bracket.narrow(trial, len(self.facts), self.bound)
                    if self.progress is not None:
                        self.progress(trial)
                    complete = len(trials) < LEAST or time.perf_counter() - started < self.seconds
                best = best_of(trials, self.bound)
                size, before = best.step_size, best.steps_per_batch
        finally:
            self.lm.restore()
            self.lm.prefix_cache.clear()
            self.lm.reference_cache.clear()
        seconds = time.perf_counter() - started
        return StrengthSearch(len(self.facts), self.bound, tuple(trials), best, seconds, complete)

    def _trial(self, step_size: float, steps_per_batch: int, text: Sequence[Passage]) -> Trial:
        editor = with_step_size(self.editor, step_size, steps_per_batch)
        env = LifelongEditEnv(
            self.facts.kind, self.lm, data=self.facts, num_batches=1, batch_size=1, token=self.token, reward="none",
            array_backend="torch",
        )
        agent = editor.agent_class()(env, editor.configuration()).learn(0, progress_bar=False)
        with warnings.catch_warnings():  # that a strength breaks the LLM is a finding here
            warnings.simplefilter("ignore")
            guard = DriftGuard(self.lm, self.bound, "stop") if self.guarded else None
            log = edit_facts(
                self.lm, agent, self.facts, self.batch_size, self.token, steps_per_batch, guard=guard,
                present_until=self.present_until, contexts=self.contexts,
            )
        if log.diverged or log.stopped:
            return Trial(step_size, steps_per_batch, 0, 0.0, None)
        kl = self_drift(self.lm, text).kl
        top1 = 100 * fmean(top1_by_record(self.lm, self.facts.records))
        return Trial(step_size, steps_per_batch, self._taken(), top1, kl if math.isfinite(kl) else None)

    def _taken(self) -> int:
        answers = continuations(self.lm, self.facts.records)
        return sum(took(answer, r.target) for answer, r in zip(answers, self.facts, strict=True))

class Bracket:
    """The step sizes between which the smallest one lies with which all facts take, for one number of presentations.

    It goes up from the first one until all facts take or the bound is passed, down where that is so at once, and then
    between the last one that is too small and the first one that is not.

    Args:
        step_size: the first.
    """

    def __init__(self, step_size: float) -> None:
        self.step_size = min(max(step_size, SMALLEST), LARGEST)  # the next one to be tried
        self.low: float | None = None
        self.high: float | None = None

    @property
    def closed(self) -> bool:
        """Whether nothing is left to be tried."""
        if not SMALLEST <= self.step_size <= LARGEST:
            return True
        return self.low is not None and self.high is not None and self.high / self.low <= CLOSE

    def narrow(self, trial: Trial, facts: int, bound: float) -> None:
        """Take a trial of :attr:`step_size` in and choose the next one."""
        if trial.taken == facts or not trial.within(bound):
            self.high = trial.step_size
        else:
            self.low = trial.step_size
        if self.low is not None and self.high is not None:
            self.step_size = math.sqrt(self.low * self.high)
        elif self.high is None:
            hardly = trial.taken == 0 and trial.within(bound / 100)
            self.step_size *= FAR if hardly else NEAR
        else:
            self.step_size /= NEAR if trial.within(100 * bound) else FAR


def best_of(trials: Sequence[Trial], bound: float) -> Trial:
    """See :attr:`StrengthSearch.chosen`."""
    allowed = [t for t in trials if t.within(bound)]
    if allowed:
        return max(allowed, key=lambda t: (t.taken, t.top1, -float(t.kl or 0.0)))
    return min(trials, key=lambda t: math.inf if t.kl is None else t.kl)
