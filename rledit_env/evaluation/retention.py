"""Probes of a stream: the retention of each batch, and the drift of each edited weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import gymnasium as gym
import numpy as np

from rledit_env.evaluation.metrics import check_metrics, exact_matches, record_efficacy
from rledit_env.knowledge import EditRecord
from rledit_env.lm.editable import EditableLM
from rledit_env.type_aliases import JsonObject

if TYPE_CHECKING:
    from rledit_env.interface import EditingEnv


@dataclass(frozen=True)
class Retention:
    """Efficacy of every batch after later steps, in percent.

    Attributes:
        edited: batches edited before each of the R measurements, ascending.
        efficacy: (R, T), Efficacy of each of the T batches at each measurement (teacher-forced); NaN before the batch
            was edited.
        first_exact_match: (R,), exact match of the first batch, decoded freely; NaN if it was not asked for.
    """

    edited: tuple[int, ...]
    efficacy: np.ndarray
    first_exact_match: np.ndarray

    @property
    def first_batch(self) -> np.ndarray:
        """The first batch's Efficacy at each measurement, (R,)."""
        return self.efficacy[:, 0]

    @property
    def forgetting(self) -> float:
        """The forgetting measure of continual learning (Chaudhry et al., 2018): each batch's best Efficacy before the
        last measurement minus its Efficacy at the last one, the mean over all batches but the last. NaN if no batch was
        measured twice."""
        measured_before = ~np.isnan(self.efficacy[:-1]).all(0)
        if not measured_before.any():
            return float("nan")
        best = np.nanmax(self.efficacy[:-1, measured_before], axis=0)
        return float((best - self.efficacy[-1, measured_before]).mean())

    def as_dict(self) -> JsonObject:
        """The retention as JSON types, for :meth:`from_dict`."""
        return {
            "edited": list(self.edited),
            "efficacy": [[_or_none(value) for value in row] for row in self.efficacy],
            "first_exact_match": [_or_none(value) for value in self.first_exact_match],
            "forgetting": _or_none(self.forgetting),
        }

    @classmethod
    def from_dict(cls, values: JsonObject) -> Retention:
        """The retention that :meth:`as_dict` described."""
        return cls(
            tuple(values["edited"]),
            np.array(values["efficacy"], dtype=float),
            np.array(values["first_exact_match"], dtype=float),
        )


class RetentionProbe:
    """Measures retention while a stream is edited; a callback of `agents.edit_stream`.

    A measurement scores all facts edited so far, in shared forward passes. With ``every=1`` these are about T²n / 2
    passages in a stream of T batches. States below the first edited layer are computed once.

    Args:
        env: the stream's environment.
        every: batches between two measurements; the first batch and the last are always measured.
        generate: also decode the first batch's prompts freely, at each measurement.
        metrics: how Efficacy is scored (see `rledit_env.evaluation.metrics.evaluate`).

    Raises:
        ValueError: ``every`` is less than 1, or ``metrics`` is unknown.
    """

    def __init__(self, env: gym.Env, every: int = 1, generate: bool = True, metrics: str = "paper") -> None:
        check_metrics(metrics)
        if every < 1:
            raise ValueError(f"every is {every}; give 1 or more")
        self.env = cast("EditingEnv", env.unwrapped)
        self.every, self.generate, self.metrics = every, generate, metrics
        self._edited: list[int] = []
        self._rows: list[np.ndarray] = []
        self._exact: list[float] = []

    def __call__(self, edited: int) -> None:
        """Measure after ``edited`` batches, if a measurement is due."""
        batches = self.env.stream.num_batches
        if edited == 0:  # the start of a stream
            self._edited, self._rows, self._exact = [], [], []
        elif edited in (1, batches) or edited % self.every == 0:
            groups = [self.env.stream.batch(batch) for batch in range(edited)]
            row = np.full(batches, np.nan)
            row[:edited] = batch_efficacy(self.env.lm, groups, self.env.dataset.kind, self.metrics)
            matches = exact_matches(self.env.lm, groups[0]) if self.generate else []
            self._edited.append(edited)
            self._rows.append(row)
            self._exact.append(100 * float(np.mean(matches)) if matches else np.nan)

    def measured_at(self, edited: int) -> JsonObject | None:
        """What was measured after ``edited`` batches, for :meth:`take_up`; None if nothing was."""
        if edited not in self._edited:
            return None
        place = self._edited.index(edited)
        return {"efficacy": [_or_none(value) for value in self._rows[place]], "exact": _or_none(self._exact[place])}

    def take_up(self, edited: int, values: JsonObject) -> None:
        """Take over a measurement of an interrupted run, in the order of the stream."""
        self._edited.append(edited)
        self._rows.append(np.array(values["efficacy"], dtype=float))
        self._exact.append(np.nan if values["exact"] is None else values["exact"])

    @property
    def measured(self) -> bool:
        """Whether there is a result."""
        return bool(self._rows)

    @property
    def result(self) -> Retention:
        """The retention measured so far.

        Raises:
            ValueError: nothing has been measured yet.
        """
        if not self._rows:
            raise ValueError("no batch has been edited yet; hand this object to edit_stream's callbacks first")
        return Retention(tuple(self._edited), np.stack(self._rows), np.array(self._exact))


class DriftProbe:
    """Records how far each edited weight moves while a stream is edited; a callback of `agents.edit_stream`.

    Attributes:
        by_module: module → ‖W_t − W₀‖ / ‖W₀‖ after each batch.
    """

    def __init__(self, env: gym.Env) -> None:
        self.env = cast("EditingEnv", env.unwrapped)
        self.by_module: dict[str, list[float]] = {}

    def __call__(self, edited: int) -> None:
        """Record the drift after ``edited`` batches."""
        drift = self.env.lm.drift()
        if edited == 0:  # the start of a stream
            self.by_module = {module: [] for module in drift}
        else:
            for module, value in drift.items():
                self.by_module[module].append(round(value, 6))

    def measured_at(self, edited: int) -> JsonObject | None:
        """The drift by module after ``edited`` batches, for :meth:`take_up`."""
        return {module: values[edited - 1] for module, values in self.by_module.items()} if edited else {}

    def take_up(self, edited: int, values: JsonObject) -> None:
        """Take over a measurement of an interrupted run, in the order of the stream."""
        if edited == 0:
            self.by_module = {module: [] for module in self.env.lm.module_shapes}
        for module, value in values.items():
            self.by_module[module].append(value)


def batch_efficacy(
    lm: EditableLM, batches: Sequence[Sequence[EditRecord]], kind: str, metrics: str = "paper"
) -> np.ndarray:
    """`Metrics.efficacy` of each batch of records at the current weights, in percent, (batches,), computed in shared
    forward passes."""
    shares = record_efficacy(lm, [record for batch in batches for record in batch], kind, metrics)
    sizes = [len(batch) for batch in batches]
    return np.array([100 * float(np.mean(part)) for part in np.split(np.array(shares), np.cumsum(sizes)[:-1])])


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
