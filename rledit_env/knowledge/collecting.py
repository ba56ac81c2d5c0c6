"""Reads a source's rows into records: in memory while there are few, on disk beyond that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rledit_env.knowledge.fields import Row
from rledit_env.knowledge.forms import Fact, read_row
from rledit_env.knowledge.pairing import Pairing, pair
from rledit_env.knowledge.record import EditRecord, KnowledgeError, LeftOut, LooseFact
from rledit_env.knowledge.source import Source
from rledit_env.knowledge.stored import Places, Spool, StoredRows

HELD = 10_000  # facts that are held in memory; with more, all of them stay on disk


@dataclass(frozen=True)
class Collected:
    """The records of a source, and what was not used or is lacking, by reason."""

    records: Sequence[EditRecord]
    skipped: Counter[str]
    faulty: Counter[str]
    lacks: Counter[str]


def collect(kind: str, source: Source, skip: bool) -> Collected:
    """All records of a source.

    Raises:
        KnowledgeError: a row cannot be used, and `skip` is false; or the rows end in the middle.
    """
    skipped, faulty = Counter[str](), Counter[str]()
    shelf = _Shelf(kind, source, skipped)
    for number, row in enumerate(source.rows):
        try:
            if isinstance(row, KnowledgeError):
                raise row
            facts = read_row(row, kind)
        except KnowledgeError as error:
            if not skip:
                raise
            faulty[error.reason] += 1
            continue
        shelf.add(number, row, facts)
    return Collected(shelf.records(), skipped, faulty, shelf.lacks)


class _Shelf:
    """Takes facts row by row; keeps them, or only their places when there are many."""

    def __init__(self, kind: str, source: Source, skipped: Counter[str]) -> None:
        self.lacks = Counter[str]()
        self._kind, self._source, self._skipped = kind, source, skipped
        self._facts: list[EditRecord | LooseFact] = []
        self._pairing, self._places = Pairing(skipped), Places()
        self._spool = None if source.is_held or source.file is not None else Spool()
        self._is_stored = source.file is not None

    def add(self, number: int, row: Row, facts: Sequence[Fact]) -> None:
        """Add the facts of the source's row of this number."""
        if self._spool is not None:
            number = self._spool.add(row)
        for part, fact in enumerate(facts):
            if isinstance(fact, LeftOut):
                self._skipped[fact.reason] += 1
                continue
            self.lacks.update(fact.lacks)
            if not self._source.is_held:
                self._pairing.add(fact)
                self._places.add(number, part)
            if not self._is_stored:
                self._facts.append(fact)
        if len(self._facts) > HELD and not self._source.is_held:
            self._is_stored, self._facts = True, []

    def records(self) -> Sequence[EditRecord]:
        """The records of all facts."""
        if not self._is_stored:
            return tuple(pair(self._facts, self._skipped))
        if self._source.file is not None:
            path, place, spans = self._source.file
            return self._places.records(self._kind, StoredRows(path, spans, place), self._pairing)
        assert self._spool is not None
        return self._places.records(self._kind, self._spool.finish(), self._pairing)
