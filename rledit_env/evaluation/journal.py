"""Journal: measurements of a run on disk, so that an interrupted run need not repeat them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

from rledit_env.files import sync
from rledit_env.lm.editable import EditableLM
from rledit_env.type_aliases import JsonObject


class Probe(Protocol):
    """A measurement while a stream is edited, which an interrupted run can take up."""

    def __call__(self, edited: int) -> None:
        """Measure after ``edited`` batches, if a measurement is due; 0: before the first batch."""
        ...

    def measured_at(self, edited: int) -> Any:
        """What was measured after ``edited`` batches, as JSON types; None if nothing was."""
        ...

    def take_up(self, edited: int, values: Any) -> None:
        """Take over what an interrupted run measured; called in the order of the stream."""
        ...


class Journal:
    """A file of measurements, a line of JSON each. It is only appended to; a line that a killed process left unfinished
    is removed when the file is opened.

    Args:
        path: the file; created with the first measurement. Its folder must exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._values: dict[tuple[str, int], Any] = {}
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        for line in whole.splitlines():
            entry: JsonObject = json.loads(line)
            self._values[entry["probe"], entry["at"]] = entry["values"]

    def get(self, probe: str, at: int) -> Any:
        """What a probe measured at a place; None if it has not."""
        return self._values.get((probe, at))

    def of(self, probe: str) -> Mapping[int, Any]:
        """A probe's measurements by their place, in ascending order."""
        return dict(sorted((at, values) for (name, at), values in self._values.items() if name == probe))

    def append(self, probe: str, at: int, values: Any) -> None:
        """Write a measurement; it is on the disk when this returns.

        Raises:
            OSError: the disk is full or read-only.
        """
        line = json.dumps({"probe": probe, "at": at, "values": values}, ensure_ascii=False)
        is_new = not self.path.exists()
        with self.path.open("ab") as file:
            file.write(line.encode("utf-8", "surrogatepass") + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            sync(self.path.parent)
        self._values[probe, at] = values


class Journalled:
    """A probe whose measurements are kept in a journal; a callback of `agents.edit_stream`.

    What the journal has already is not measured again. With a journal, forward passes of the probe use caches of their
    own, so that later steps are the same, bit for bit, whether it measures or not.

    Args:
        name: the probe's name in the journal.
        probe: the probe.
        lm: the LLM.
        journal: the journal; None keeps nothing.
    """

    def __init__(self, name: str, probe: Probe, lm: EditableLM, journal: Journal | None) -> None:
        self.name, self.probe, self.lm, self.journal = name, probe, lm, journal
        for edited, values in journal.of(name).items() if journal is not None else ():
            probe.take_up(edited, values)

    def __call__(self, edited: int) -> None:
        if self.journal is not None and self.journal.get(self.name, edited) is not None:
            return
        with nullcontext() if self.journal is None else self.lm.caches_apart():
            self.probe(edited)
        values = self.probe.measured_at(edited)
        if self.journal is not None and values is not None:
            self.journal.append(self.name, edited, values)
