"""SameStream: one editor after another edits the same facts, and is scored on them and on how much else has changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import gymnasium as gym

from agents.base import Agent
from agents.running.editing import EditLog, edit_stream, keeping_env
from rledit_env.evaluation.general import drifts
from rledit_env.evaluation.metrics import averaged, continuations, score_records, with_answers
from rledit_env.evaluation.retention import DriftProbe, Retention, RetentionProbe
from rledit_env.interface import editing_env
from rledit_env.lm.forward import Passage
from rledit_env.self_text import SelfDrift

NO_EDIT = "no edit"


class SameStream:
    """A stream of facts that several editors edit, each from the unedited LLM on.

    Args:
        env: an environment of the facts, made with ``array_backend="torch"``.
        texts: the texts on which the divergence from the unedited LLM is measured, by kind
            (`rledit_env.evaluation.general.scored_texts`); "self" is needed.
        seed: ``env`` is reset with it.

    Attributes:
        facts: the facts.
        scores: editor's name → its scores by name, "kl", the divergence on "self", and "seconds" a fact.
        by_fact: editor's name → the mean of each fact's scores, in percent.
        drifts: editor's name → pairs of facts edited and the mean of ‖W − W₀‖ / ‖W₀‖ over the modules.
        retention, module_drift: of the first editor, as `RetentionProbe` and `DriftProbe` measure them.
        general: batches edited → the divergence by kind of text, before and after the first editor.
    """

    def __init__(self, env: gym.Env, texts: Mapping[str, Sequence[Passage]], seed: int = 0) -> None:
        self.env, self.texts, self.seed = env, texts, seed
        env.reset(seed=seed)
        self._inner = editing_env(env)
        stream = self._inner.stream
        self.facts = [fact for t in range(stream.num_batches) for fact in stream.batch(t)]
        self.scores: dict[str, dict[str, Any]] = {}
        self.by_fact: dict[str, list[float]] = {}
        self.drifts: dict[str, list[tuple[float, float]]] = {}
        self.retention: Retention | None = None
        self.module_drift: dict[str, list[float]] = {}
        self.general: dict[int, dict[str, dict[str, float]]] = {}
        self._score(NO_EDIT)

    def edit(self, name: str, editor: Agent) -> EditLog:
        """Edit the facts with an editor, and score it under a name. The editor's own environment stays the same."""
        drift, retention = DriftProbe(self.env), RetentionProbe(self.env, generate=False)
        is_first = len(self.scores) == 1
        with keeping_env(editor):
            editor.set_env(self.env)  # for editors that ask their environment about the facts
            log = edit_stream(self.env, editor, callbacks=(drift, retention) if is_first else (drift,), seed=self.seed)
        means = map(fmean, zip(*drift.by_module.values(), strict=True))
        size = self._inner.stream.batch_size
        self.drifts[name] = [(0.0, 0.0), *((size * (i + 1), mean) for i, mean in enumerate(means))]
        if is_first and retention.measured:
            self.retention, self.module_drift = retention.result, drift.by_module
        self._score(name, is_first, seconds=log.seconds_per_fact)
        return log

    def above(self, name: str, other: str) -> list[float]:
        """By how much each fact's mean score is higher with one editor than with another, in points."""
        return [one - two for one, two in zip(self.by_fact[name], self.by_fact[other], strict=True)]

    def _score(self, name: str, on_all_texts: bool = True, **more: float) -> None:
        lm, kind = self._inner.lm, self._inner.dataset.kind
        shares = score_records(lm, self.facts, kind)
        metrics = with_answers(averaged(shares), self.facts, continuations(lm, self.facts))
        columns = [shares[key] for key in ("efficacy", "generalization", "specificity")]
        self.by_fact[name] = [
            100 * fmean(share for share in row if share is not None) for row in zip(*columns, strict=True)
        ]
        kept: dict[str, SelfDrift] = drifts(lm, self.texts if on_all_texts else {"self": self.texts["self"]})
        self.scores[name] = {**metrics.as_dict(), "kl": kept["self"].kl, **more}
        if on_all_texts:
            batches = 0 if name == NO_EDIT else self._inner.stream.num_batches
            self.general[batches] = {text: drift.as_dict() for text, drift in kept.items()}
