"""Records that stay on disk: a large data set is read once and checked, and its rows are read again when asked for.

A row takes some thirty bytes of memory, and less than a hundred while the rows are read, whatever it holds. Every
record has an index, as in a small data set: a stream draws from all of them, and the same seed gives the same facts.
"""

from __future__ import annotations

import json
import os
import tempfile
import weakref
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

from rledit_env.knowledge.fields import Row
from rledit_env.knowledge.forms import read_row
from rledit_env.knowledge.pairing import Pairing, as_unrelated
from rledit_env.knowledge.record import EditRecord, KnowledgeError, LooseFact
from rledit_env.knowledge.scanning import Spans


class StoredRows:
    """The rows of a JSON file, read from the disk one at a time.

    Args:
        path: the file.
        spans: where its rows lie.
        place: what the rows' places begin with; None: the rows are those of a `Spool`, which have their places.
    """

    def __init__(self, path: Path, spans: Spans, place: str | None = None) -> None:
        self.path, self.place = path, place
        self.starts, self.lengths, self.numbers = (
            np.asarray(numbers) for numbers in (spans.starts, spans.lengths, spans.numbers)
        )
        self._state = _state(path)

    def __deepcopy__(self, memo: dict[int, object]) -> StoredRows:
        return self

    def row(self, index: int) -> Row:
        """The row at an index.

        Raises:
            KnowledgeError: the file is gone, or has changed since it was read.
        """
        try:
            if _state(self.path) != self._state:
                raise OSError("it has changed since it was read")
            with self.path.open("rb") as file:
                file.seek(int(self.starts[index]))
                value = json.loads(file.read(int(self.lengths[index])))
        except (OSError, ValueError) as error:
            raise KnowledgeError(
                f"{self.path}: a row cannot be read again ({error}); leave the file as it is while it is in use",
                reason="changed file",
            ) from error
        if self.place is None:
            where, value = value
            return Row(value, where)
        return Row(value, f"{self.place}, line {self.numbers[index]}")


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


class Spool:
    """A temporary file to which rows are written that have no file of their own, such as those of a hub data set. It is
    removed when its rows are no longer used."""

    def __init__(self) -> None:
        handle, name = tempfile.mkstemp(prefix="rledit-", suffix=".jsonl")
        self.path, self.spans = Path(name), Spans()
        self._file, self._at = os.fdopen(handle, "wb"), 0
        self._remove = weakref.finalize(self, _remove, self.path, os.getpid())
        weakref.finalize(self, self._file.close)

    def add(self, row: Row) -> int:
        """Write a row; returns its number."""
        line = json.dumps([row.where, row.values], default=str).encode() + b"\n"
        self.spans.add(self._at, len(line) - 1, len(self.spans) + 1)
        self._file.write(line)
        self._at += len(line)
        return len(self.spans) - 1

    def finish(self) -> StoredRows:
        """The rows written so far; nothing can be added after that."""
        self._file.close()
        rows = StoredRows(self.path, self.spans)
        self._remove.detach()
        weakref.finalize(rows, _remove, self.path, os.getpid())
        return rows


def _remove(path: Path, process: int) -> None:
    if os.getpid() == process:  # a forked process leaves the file to the one that made it
        path.unlink(missing_ok=True)


@dataclass(frozen=True, eq=False)
class StoredRecords(Sequence[EditRecord]):
    """Records that are read from stored rows.

    Attributes:
        kind: the kind of environment that they are read for.
        rows: the rows.
        places: each fact's row, and its place among the facts of this row, (facts,) each.
        edited: the fact of each record, (records,).
        lenders: the fact that lends each record its unrelated fact, (records,); -1 if it has its own.
    """

    kind: str
    rows: StoredRows
    places: tuple[np.ndarray, np.ndarray]
    edited: np.ndarray
    lenders: np.ndarray

    def __len__(self) -> int:
        return len(self.edited)

    @overload
    def __getitem__(self, index: int) -> EditRecord: ...
    @overload
    def __getitem__(self, index: slice) -> StoredRecords: ...
    def __getitem__(self, index: int | slice) -> EditRecord | StoredRecords:
        if isinstance(index, slice):
            return StoredRecords(self.kind, self.rows, self.places, self.edited[index], self.lenders[index])
        fact, lender = self._fact(self.edited[index]), int(self.lenders[index])
        return fact.completed(as_unrelated(self._fact(lender))) if isinstance(fact, LooseFact) else fact

    def _fact(self, number: int) -> EditRecord | LooseFact:
        row, part = (int(column[number]) for column in self.places)
        fact = read_row(self.rows.row(row), self.kind)[part]
        assert isinstance(fact, (EditRecord, LooseFact)), "rows that are left out are not stored"
        return fact


class Places:
    """The places of facts while they are read: their rows, and which of a row's facts they are."""

    def __init__(self) -> None:
        self.rows, self.parts = array("i"), array("h")

    def add(self, row: int, part: int) -> None:
        self.rows.append(row)
        self.parts.append(part)

    def records(self, kind: str, rows: StoredRows, pairing: Pairing) -> StoredRecords:
        """The facts as records, each loose one with its lender."""
        return StoredRecords(kind, rows, (np.asarray(self.rows), np.asarray(self.parts)), *pairing.plan())
