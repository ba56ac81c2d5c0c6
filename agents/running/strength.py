"""Searches the strength of an editor without training: its step size and the presentations of a batch."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean

from agents.running.editing import edit_facts
from agents.running.editors import Editor, configured_step_size, with_step_size
from rledit_env.answers import took
from rledit_env.env import LifelongEditEnv
from rledit_env.evaluation.guard import DriftGuard
from rledit_env.evaluation.metrics import continuations, top1_by_record
from rledit_env.knowledge import KnowledgeDataset
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage
from rledit_env.self_text import REWARD_OPENINGS, self_drift, self_text
from rledit_env.type_aliases import JsonObject

KL_BOUND = 0.1  # nats a token on the LLM's own text
FACTS = 6
SECONDS = 60.0
LEAST = 4  # trials that are made whatever time they take
TEXTS, TEXT_TOKENS = REWARD_OPENINGS[::12], 24  # openings and length of the divergence's text, which no report uses
FAR, NEAR, CLOSE = 10.0, 10**0.5, 2.0  # ratios of step sizes: of a large step, of a small step, and of a closed bracket
SMALLEST, LARGEST = 1e-12, 1e6


@dataclass(frozen=True)
class Trial:
    """The result of editing a few facts into the unedited LLM.

    Attributes:
        step_size, steps_per_batch: the strength.
        taken: number of facts that the edited LLM answers with.
        top1: share of a target's tokens that the edited LLM predicts, the mean over facts, in percent (`Metrics.top1`).
        kl: divergence from the unedited LLM on its own text, in nats a token; None if the LLM broke, or exceeded the
            bound of the run's guard.
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
    """The result of a search.

    Attributes:
        facts: number of facts that each trial edited.
        bound: the largest divergence allowed, in nats a token.
        trials: the trials in their order.
        chosen: among the trials within the bound, the one with most facts taken, then with the best ``top1``, then with
            the smallest divergence. If none is within the bound, the one with the smallest divergence.
        seconds: time of the search.
        complete: False if the search ended because its time was up.
    """

    facts: int
    bound: float
    trials: tuple[Trial, ...]
    chosen: Trial
    seconds: float
    complete: bool

    @property
    def reason(self) -> str:
        """Why this trial was chosen, in words."""
        chosen = self.chosen
        if not chosen.within(self.bound):
            return f"every strength tried moves the model further than {self.bound:g} nats a token; this one least"
        if chosen.taken == self.facts:
            return f"of those with which all facts take within {self.bound:g} nats a token, it moves the model least"
        return (f"{chosen.taken} of {self.facts} facts take, and {chosen.top1:.0f} % of the targets' tokens: the most "
                f"within {self.bound:g} nats a token")

    def as_dict(self) -> JsonObject:
        """For JSON."""
        return {**asdict(self), "trials": [asdict(t) for t in self.trials], "reason": self.reason}

    @classmethod
    def from_dict(cls, stored: JsonObject) -> StrengthSearch:
        """The search that :meth:`as_dict` described."""
        fields = {name: value for name, value in stored.items() if name != "reason"}
        trials = tuple(Trial(**t) for t in fields.pop("trials"))
        return cls(**{**fields, "trials": trials, "chosen": Trial(**fields["chosen"])})


def some_facts(facts: KnowledgeDataset, count: int = FACTS) -> KnowledgeDataset:
    """``count`` facts, spread evenly from the first to the last."""
    count = min(count, len(facts))
    return replace(facts, records=tuple(facts.records[i * len(facts) // count] for i in range(count)))


@dataclass(frozen=True)
class StrengthProbe:
    """Edits a few facts with one strength after another, each time into the unedited LLM.

    Attributes:
        lm: the LLM.
        editor: an editor with a step size (`Editor.step_size`).
        facts: the facts; every trial edits all of them.
        token: positions that the editor sees, as in `LifelongEditEnv`.
        batch_size: facts a batch.
        bound: the largest divergence allowed, in nats a token.
        guarded: whether the bound also holds on the text of `DriftGuard`, for runs with that guard.
        seconds: the time after which no further trial starts; the first `LEAST` are always made.
        progress: called with every trial.
        present_until, contexts: as in `LifelongEditEnv`. With ``present_until``, the numbers of presentations are
            upper limits.
    """

    lm: EditableLM
    editor: Editor
    facts: KnowledgeDataset
    token: str
    batch_size: int
    bound: float = KL_BOUND
    guarded: bool = False
    seconds: float = SECONDS
    progress: Callable[[Trial], object] | None = None
    present_until: float | None = None
    contexts: int = 0

    def search(self, presentations: Sequence[int]) -> StrengthSearch:
        """Find, for each number of presentations of a batch, the smallest step size with which all facts take.

        Afterwards the LLM is unedited, bit for bit, and its caches are empty.

        Args:
            presentations: numbers of presentations to try, in this order. The first step size for each is the best one
                so far (for the first, the editor's own), scaled by the ratio of the presentations.
        """
        started = time.perf_counter()
        trials: list[Trial] = []
        complete = True
        try:
            text = self_text(self.lm, TEXTS, TEXT_TOKENS)
            size, size_count = configured_step_size(self.editor), self.editor.env.get("steps_per_batch", 1)
            for count in presentations:
                bracket = Bracket(size * size_count / count)
                while complete and not bracket.closed:
                    trial = self._trial(bracket.step_size, count, text)
                    trials.append(trial)
                    bracket.narrow(trial, len(self.facts), self.bound)
                    if self.progress is not None:
                        self.progress(trial)
                    complete = len(trials) < LEAST or time.perf_counter() - started < self.seconds
                best = best_of(trials, self.bound)
                size, size_count = best.step_size, best.steps_per_batch
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
        with warnings.catch_warnings():  # a strength that breaks the LLM is a result here
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
        return Trial(step_size, steps_per_batch, self._count_taken(), top1, kl if math.isfinite(kl) else None)

    def _count_taken(self) -> int:
        answers = continuations(self.lm, self.facts.records)
        return sum(took(answer, r.target) for answer, r in zip(answers, self.facts, strict=True))


class Bracket:
    """A bracket of the smallest step size with which all facts take, for one number of presentations.

    A step size is large enough if all facts take or the bound is exceeded. The search goes up from the first step size
    while it is too small, or down while it is large enough, and then halves the bracket on a logarithmic scale.

    Args:
        step_size: the first step size.
    """

    def __init__(self, step_size: float) -> None:
        self.step_size = min(max(step_size, SMALLEST), LARGEST)  # the next one to try
        self.low: float | None = None
        self.high: float | None = None

    @property
    def closed(self) -> bool:
        """Whether the search is finished."""
        if not SMALLEST <= self.step_size <= LARGEST:
            return True
        return self.low is not None and self.high is not None and self.high / self.low <= CLOSE

    def narrow(self, trial: Trial, facts: int, bound: float) -> None:
        """Narrow the bracket by a trial of :attr:`step_size`, and choose the next step size."""
        if trial.taken == facts or not trial.within(bound):
            self.high = trial.step_size
        else:
            self.low = trial.step_size
        if self.low is not None and self.high is not None:
            self.step_size = math.sqrt(self.low * self.high)
        elif self.high is None:
            far_too_small = trial.taken == 0 and trial.within(bound / 100)
            self.step_size *= FAR if far_too_small else NEAR
        else:
            self.step_size /= NEAR if trial.within(100 * bound) else FAR


def best_of(trials: Sequence[Trial], bound: float) -> Trial:
    """The trial to choose, as described in :attr:`StrengthSearch.chosen`."""
    allowed = [t for t in trials if t.within(bound)]
    if allowed:
        return max(allowed, key=lambda t: (t.taken, t.top1, -float(t.kl or 0.0)))
    return min(trials, key=lambda t: math.inf if t.kl is None else t.kl)
