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

HELD = 20_000  # facts that are held in memory; with more, all of them stay on disk


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
        self._rows: list[Row] = []  # of the held facts, for the spool
        self._pairing, self._places = Pairing(skipped), Places()
        self._spool: Spool | None = None
        self._is_stored = False

    def add(self, number: int, row: Row, facts: Sequence[Fact]) -> None:
        """Add the facts of the source's row of this number."""
        if self._source.file is None and not self._source.is_held:
            number = self._keep_row(row)
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
            self._store()

    def records(self) -> Sequence[EditRecord]:
        """The records of all facts."""
        if not self._is_stored:
            return tuple(pair(self._facts, self._skipped))
        if self._source.file is not None:
            path, place, spans = self._source.file
            return self._places.records(self._kind, StoredRows(path, spans, place), self._pairing)
        assert self._spool is not None
        return self._places.records(self._kind, self._spool.finish(), self._pairing)

    def _keep_row(self, row: Row) -> int:
        """Keep a row that has no file; returns its number among those kept."""
        if self._spool is None:
            self._rows.append(row)
            return len(self._rows) - 1
        self._spool.add(row)
        return len(self._spool.spans) - 1

    def _store(self) -> None:
        """Hold no facts from here on."""
        self._is_stored, self._facts = True, []
        if self._source.file is None:
            self._spool = Spool()
            for row in self._rows:
                self._spool.add(row)
            self._rows = []
