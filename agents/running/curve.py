"""The curve of score against divergence: each editor at several strengths on one stream of training facts, and the
choice of a strength for a bound on the divergence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from agents.base import Agent
from agents.running.comparison import Comparison, Setting
from agents.running.editors import Editor, with_strength
from agents.selection import divergence
from rledit_env.interface import Environment, editing_env
from rledit_env.knowledge import KnowledgeStream, held_out
from rledit_env.type_aliases import JsonObject

BOUNDS = (0.05, 0.1, 0.3, 1.0)  # nats a token
SEED = 1  # of the stream of training facts
SELECTION_KL = "selection_kl"  # a cell's divergence on text that is reserved for selection


@dataclass(frozen=True)
class Point:
    """An editor at one strength, on the stream of training facts.

    Attributes:
        editor: the editor with its factor.
        cell: the measurements: "mean" is the score, "selection_kl" the divergence for selection; "kl", on the text of
            reported results, is not used for selection.
    """

    editor: Editor
    cell: JsonObject

    @property
    def score(self) -> float | None:
        """The mean of Efficacy, Generalization and Specificity, in percent; None if it was not measured."""
        return _finite(self.cell.get("mean"))

    @property
    def kl(self) -> float | None:
        """KL(p_θ₀ ‖ p_W) in nats a token on text that is reserved for selection; None if it was not measured."""
        return _finite(self.cell.get(SELECTION_KL))

    @property
    def broke(self) -> bool:
        """Whether an update broke the LLM and was taken back."""
        return bool(self.cell.get("diverged"))


def pick(points: Iterable[Point], bound: float) -> Point | None:
    """The point with the highest score within the bound.

    Points that broke the LLM are left out. Among equal scores the smallest divergence is taken.

    Args:
        points: an editor's points.
        bound: the largest divergence, in nats a token.

    Returns:
        The point; None if none is within the bound.
    """
    within = [(p.score, -p.kl, p) for p in points
              if p.score is not None and p.kl is not None and p.kl <= bound and not p.broke]
    return max(within, key=lambda entry: entry[:2])[2] if within else None


def best_picks(picks: Mapping[str, Point | None], most: int = 5) -> list[str]:
    """Names of the editors whose picks have the highest scores on the training stream, best first.

    Editors without a strength are references and are left out.

    Args:
        picks: editor's name → its pick for a bound.
        most: the largest number of names.
    """
    scores = {name: p.score for name, p in picks.items() if p is not None and p.editor.strength is not None}
    return sorted(scores, key=lambda name: scores[name] or 0.0, reverse=True)[:most]


class Curve(Comparison):
    """The points of the curve: cells of one stream of held-out training facts, one for each editor and strength, each a
    file under ``out/curve/cells``. Scores are without generation.

    The stream's facts are those that checkpoints and hyperparameters are chosen on (`rledit_env.knowledge.held_out`),
    never the facts of reported scores. Editors that learn are trained by ``comparison``, once for all strengths.

    Args:
        comparison: gives the environment, batch size, modules and metrics.
        num_batches: batches of the stream.
        factors: the strengths to try, as factors; None tries each editor's `Strength.factors`.

    Raises:
        ValueError: there are too few facts for the stream.
    """

    def __init__(self, comparison: Comparison, num_batches: int = 20, factors: Sequence[float] | None = None) -> None:
        setting = comparison.setting
        _, facts = held_out(setting.training())
        KnowledgeStream(facts, num_batches, setting.batch_size)  # raises ValueError if there are too few facts
        stream: Setting = replace(setting, test=facts, num_batches=num_batches, generate=False)
        super().__init__(stream, comparison.views, comparison.out / "curve", comparison.progress_bar, comparison)
        self.factors = None if factors is None else tuple(sorted(set(factors)))
        self._complete: dict[str, list[Point]] = {}  # editor's name → its points, once all are finished

    def variants(self, editor: Editor) -> list[Editor]:
        """The editor at each strength, the weakest first; the editor alone if it has no strength.

        Raises:
            ValueError: the editor's configuration refuses a strength.
        """
        if editor.strength is None:
            return [editor]
        return [with_strength(editor, factor) for factor in self.factors or sorted(editor.strength.factors)]

    def points(self, editor: Editor) -> list[Point] | None:
        """The editor's points; None until all are finished.

        Raises:
            ValueError: as for :meth:`cell`.
        """
        if editor.name not in self._complete:
            cells = [(variant, self.cell(variant, SEED)) for variant in self.variants(editor)]
            points = [Point(variant, cell) for variant, cell in cells if cell is not None]
            if len(points) < len(cells):
                return None
            self._complete[editor.name] = points
        return self._complete[editor.name]

    def cell_path(self, editor: Editor, seed: int) -> Path:
        return self.out / "cells" / f"{editor.label}.json"

    def cell(self, editor: Editor, seed: int) -> JsonObject | None:
        """As `Comparison.cell`, with a ValueError for a cell of another stream of facts, too."""
        cell = super().cell(editor, seed)
        if cell is not None and cell.get("stream", self._stream()) != self._stream():
            path = self.cell_path(editor, seed)
            raise ValueError(f"{path} was computed on another stream ({_describe(cell['stream'])}, not "
                             f"{_describe(self._stream())}); delete {self.out} to compute the curve anew, or give "
                             "another folder")
        return cell

    def _measure(self, editor: Editor, agent: Agent, env: Environment, seed: int) -> JsonObject:
        measured = super()._measure(editor, agent, env, seed)
        kl = _finite(divergence(editing_env(env).lm))
        return {**measured, SELECTION_KL: kl, "stream": self._stream()}

    def _stream(self) -> JsonObject:
        setting = self.setting
        return {"source": setting.test.source, "batches": setting.num_batches, "batch_size": setting.batch_size,
                "seed": SEED}


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _describe(stream: JsonObject) -> str:
    return f"{stream['batches']}×{stream['batch_size']} of {stream['source']}, seed {stream['seed']}"
