"""Scores any number of facts in chunks, so that neither texts nor states of all of them are in memory at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rledit_env.evaluation.groups import edits_of
from rledit_env.evaluation.journal import Journal
from rledit_env.evaluation.metrics import Metrics, averaged, continuations, score_records, with_answers
from rledit_env.knowledge import EditRecord
from rledit_env.lm.editable import EditableLM

CHUNK = 128  # facts


@dataclass
class FactScores:
    """The scores of facts, in order.

    Attributes:
        scores: score → for each fact a share, see `rledit_env.evaluation.metrics.score_records`.
        written: the free continuations of the facts' prompts; empty if they were not asked for.
    """

    scores: dict[str, list[float | None]] = field(default_factory=dict)
    written: list[str] = field(default_factory=list)

    def metrics(self, records: Sequence[EditRecord], how: str) -> Metrics:
        """The means over these records, which are those that were scored."""
        means = averaged(self.scores, how)
        return with_answers(means, records, self.written) if self.written else means


def score_in_chunks(
    lm: EditableLM, records: Sequence[EditRecord], kind: str, how: str = "paper", generate: bool = True,
    progress: Callable[[int], object] | None = None, journal: Journal | None = None, name: str = "",
) -> FactScores:  # fmt: skip
    """The scores of records at the LLM's current weights.

    Args:
        lm: the LLM.
        records: the facts.
        kind, how, generate: as ``kind``, ``metrics`` and ``generate`` of `rledit_env.evaluation.metrics.evaluate`.
        progress: called after every chunk with the number of its facts.
        journal: keeps every chunk's scores under ``name``; those that it has already are not computed again.
        name: the name in the journal.

    Raises:
        ValueError: as for `rledit_env.evaluation.metrics.evaluate`.
    """
    if not records:
        raise ValueError("no fact has been edited yet; take at least one step first")
    result, edits = FactScores(), edits_of(records)
    for start in range(0, len(records), CHUNK):
        chunk = records[start : start + CHUNK]
        values = None if journal is None else journal.get(name, start)
        if values is None:
            with lm.caches_apart():
                scores = score_records(lm, chunk, kind, how, edits)
                values = {"scores": scores, "written": continuations(lm, chunk) if generate else []}
            if journal is not None:
                journal.append(name, start, values)
        for score in dict.fromkeys([*result.scores, *values["scores"]]):  # a chunk may lack another's groups
            shares = values["scores"].get(score, [None] * len(chunk))
            result.scores.setdefault(score, [None] * start).extend(shares)
        result.written.extend(values["written"])
        if progress is not None:
            progress(len(chunk))
    return result
