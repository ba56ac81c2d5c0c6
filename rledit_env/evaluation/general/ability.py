"""GeneralAbility measures all sources of general ability; GeneralEvery does so before, during and after a stream."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import gymnasium as gym

from rledit_env.evaluation.general.lm_eval import lm_eval_scores
from rledit_env.evaluation.general.scored_text import drifts, scored_texts, source_of
from rledit_env.evaluation.general.tasks import load_tasks, score_task
from rledit_env.lm.editable import EditableLM

if TYPE_CHECKING:
    from rledit_env.interface import EditingEnv

LM_EVAL = "lm-eval:"
Scores = dict[str, dict[str, float]]


class GeneralAbility:
    """Measures an LLM's general ability at its current weights.

    Args:
        lm: the LLM; its pre-trained weights write the text for "self" in the constructor.
        sources: any of "self" (perplexity and KL on the unedited LLM's text, on human-written text and, if there is a
            chat template, on the unedited LLM's answers in a chat; see `scored_texts`), a folder or file of tasks or
            "hub" (see :func:`~rledit_env.evaluation.general.tasks.load_tasks`), and "lm-eval:TASK,TASK".
        shots: number of solved examples before each question.
        limit: number of examples of a task; None means all.
        seed: of the choice of examples and of the text.
        text: a UTF-8 file of human-written text for "self"; None takes the help topics of Python's standard library.

    Attributes:
        texts: the passages of "self", see `scored_texts`; empty without it.

    Raises:
        ValueError, FileNotFoundError, ImportError: a source cannot be used.
    """

    def __init__(
        self, lm: EditableLM, sources: Sequence[str] = ("self",), shots: int = 0, limit: int | None = 200,
        seed: int = 0, text: str | Path | None = None,
    ) -> None:  # fmt: skip
        self.lm, self.shots, self.limit, self.seed = lm, shots, limit, seed
        self.text = text
        self.texts = scored_texts(lm, text, seed) if "self" in sources else {}
        self._lm_eval = [name for s in sources if s.startswith(LM_EVAL) for name in s[len(LM_EVAL) :].split(",")]
        self._tasks = [
            task for source in sources if source != "self" and not source.startswith(LM_EVAL)
            for task in load_tasks(source)
        ]  # fmt: skip
        if not (self.texts or self._lm_eval or self._tasks):
            raise ValueError("there is nothing to measure general ability on; give 'self', a folder, or another source")

    @property
    def sources(self) -> dict[str, str]:
        """Task → a description of its examples' source."""
        texts = {
            "self": "sampled from the model before editing",
            "human": source_of(self.text),
            "chat": "sampled from the model before editing, to everyday questions in its chat template",
        }
        tasks = {t.name: t.source for t in self._tasks} | dict.fromkeys(self._lm_eval, "lm-eval")
        return {key: texts[key] for key in self.texts} | tasks

    def measure(self) -> Scores:
        """Scores at the current weights: those of `SelfDrift` under "self", "human" and "chat", and those of
        `TaskScore` and of lm-eval under the tasks' names."""
        scores: Scores = {key: drift.as_dict() for key, drift in drifts(self.lm, self.texts).items()}
        for task in self._tasks:
            scores[task.name] = score_task(self.lm, task, self.shots, self.limit, self.seed).as_dict()
        if self._lm_eval:
            scores |= lm_eval_scores(self.lm, self._lm_eval, self.shots or None, self.limit)
        return scores


class GeneralEvery:
    """Measures general ability while a stream is edited; a callback of `agents.edit_stream`.

    Args:
        env: the stream's environment.
        ability: the general ability to measure.
        every: batches between two measurements; None measures only before the first batch and after the last.

    Attributes:
        scores: batches edited → scores.
    """

    def __init__(self, env: gym.Env, ability: GeneralAbility, every: int | None = None) -> None:
        if every is not None and every < 1:
            raise ValueError(f"every is {every}; give 1 or more")
        self.env = cast("EditingEnv", env.unwrapped)
        self.ability, self.every = ability, every
        self.scores: dict[int, Scores] = {}

    def __call__(self, edited: int) -> None:
        """Measure after ``edited`` batches, if a measurement is due."""
        if edited == 0:  # the start of a stream
            self.scores = {}
        if edited in (0, self.env.stream.num_batches) or (self.every and edited % self.every == 0):
            self.scores[edited] = self.ability.measure()

    def measured_at(self, edited: int) -> Scores | None:
        """The scores after ``edited`` batches, for :meth:`take_up`; None if they were not measured."""
        return self.scores.get(edited)

    def take_up(self, edited: int, scores: Scores) -> None:
        """Take over a measurement of an interrupted run."""
        self.scores[edited] = scores
