"""ScoreProbe: scores, exact match and divergence at places of a long stream, on some of the facts edited so far."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import gymnasium as gym
import numpy as np

from rledit_env.evaluation.chunks import score_in_chunks
from rledit_env.evaluation.general.scored_text import drifts
from rledit_env.evaluation.metrics import Metrics, check_metrics
from rledit_env.lm.forward import Passage
from rledit_env.type_aliases import JsonObject

if TYPE_CHECKING:
    from rledit_env.interface import EditingEnv

KL = {"self": "kl", "human": "kl_human", "chat": "kl_chat"}
"""Kinds of text of `scored_texts` → names of their divergences in a point."""


class ScoreProbe:
    """Scores a stream while it is edited, every few batches; a callback of `agents.edit_stream`.

    A point is measured on at most ``facts`` of the facts edited by then, the same for every editor (:func:`sample`).
    Its time and memory do not grow with the stream. The last point, on all facts, is added by :meth:`conclude`.

    Args:
        env: the stream's environment.
        every: batches between two points.
        facts: the largest number of facts that a point is measured on.
        texts: the texts on which the divergence from the unedited LLM is measured (`scored_texts`).
        seed: of the choice of facts.
        metrics: how facts are scored (see `rledit_env.evaluation.metrics.evaluate`).
        say: called with every new point.

    Attributes:
        points: batches edited → the point: "batches" and "facts" edited, "scored_facts", the scores of
            `Metrics.as_dict`, the divergences ("kl", "kl_human", "kl_chat", in nats a token; those that were measured),
            "drift", and "scoring_seconds".

    Raises:
        ValueError: a number is below 1, or ``metrics`` is unknown.
    """

    def __init__(
        self, env: gym.Env, every: int, facts: int = 500, texts: Mapping[str, Sequence[Passage]] | None = None,
        seed: int = 0, metrics: str = "paper", say: Callable[[JsonObject], object] | None = None,
    ) -> None:  # fmt: skip
        check_metrics(metrics)
        if every < 1 or facts < 1:
            raise ValueError(f"every is {every} and facts is {facts}; give 1 or more of each")
        self.env = cast("EditingEnv", env.unwrapped)
        self.every, self.facts, self.texts, self.seed, self.metrics = every, facts, texts or {}, seed, metrics
        self.say = say
        self.points: dict[int, JsonObject] = {}

    def __call__(self, edited: int) -> None:
        """Measure after ``edited`` batches, if a point is due."""
        if edited == 0:  # the start of a stream
            self.points = {}
        elif edited % self.every == 0 and edited != self.env.stream.num_batches:
            started, stream = time.perf_counter(), self.env.stream
            total = edited * stream.batch_size
            places = sample(stream.num_batches * stream.batch_size, total, self.facts, self.seed)
            records = [stream.dataset[int(stream.indices[place])] for place in places]
            scored = score_in_chunks(self.env.lm, records, self.env.dataset.kind, self.metrics)
            self._add(edited, total, len(records), scored.metrics(records, self.metrics), started)

    def conclude(self, edited: int, metrics: Metrics, facts: int) -> None:
        """Add the last point, at the stream's end.

        Args:
            edited: batches edited.
            metrics: the scores of all facts.
            facts: their number.
        """
        self._add(edited, facts, facts, metrics, time.perf_counter())

    def _add(self, edited: int, facts: int, scored: int, metrics: Metrics, started: float) -> None:
        with self.env.lm.caches_apart():
            divergences = {KL[kind]: drift.kl for kind, drift in drifts(self.env.lm, self.texts).items()}
        numbers = {**metrics.as_dict(), **divergences, "drift": float(np.mean(list(self.env.lm.drift().values())))}
        self.points[edited] = {
            "batches": edited, "facts": facts, "scored_facts": scored,
            **{name: None if value is None or not math.isfinite(value) else value for name, value in numbers.items()},
            "scoring_seconds": time.perf_counter() - started,
        }  # fmt: skip
        if self.say is not None:
            self.say(self.points[edited])

    def measured_at(self, edited: int) -> JsonObject | None:
        """The point after ``edited`` batches, for :meth:`take_up`; None if there is none."""
        return self.points.get(edited)

    def take_up(self, edited: int, values: JsonObject) -> None:
        """Take over a point of an interrupted run."""
        self.points[edited] = values


def sample(total: int, edited: int, most: int, seed: int) -> list[int]:
    """The places in a stream of ``total`` facts that are scored once ``edited`` are edited, in ascending order.

    Every fact of the stream draws a number, and the ``most`` edited facts with the smallest numbers are taken: a random
    choice of the facts edited so far, of which as many as possible were scored before. It depends on these four numbers
    alone, so that the same facts are scored for every editor.
    """
    order = np.argsort(np.random.default_rng([seed, total]).random(total)[:edited], kind="stable")
    return sorted(order[:most].tolist())
