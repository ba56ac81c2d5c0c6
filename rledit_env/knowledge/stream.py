"""KnowledgeDataset, one split of a data set, and KnowledgeStream, a random sequence of batches of its records."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, overload

import numpy as np

from rledit_env.knowledge.collecting import collect
from rledit_env.knowledge.forms import OWN
from rledit_env.knowledge.record import EditRecord, KnowledgeError, shown
from rledit_env.knowledge.source import Data, find_rows, split_name

LACKING = {"paraphrases": "their own prompt stands in, and Generalization is not scored on them"}
HELD_OUT = 0.2  # share of a training split on which checkpoints and hyperparameters are chosen


@dataclass(frozen=True)
class KnowledgeDataset(Sequence[EditRecord]):
    """The records of one split of one data set, in file order.

    Attributes:
        kind: "zsre", "counterfact" or "fever": how the records are scored.
        source: a description of the records' source; bundled data is named as such.
        split: "train" or "eval".
        records: the records; those of a large data set stay on disk, and each is read when asked for.
        skipped: reason → number of rows that were not used for it.
        lacks: what the data set lacks, such as "paraphrases" → number of records without it.
    """

    kind: str
    source: str
    split: str
    records: Sequence[EditRecord] = field(repr=False)
    skipped: Mapping[str, int] = field(default_factory=dict)
    lacks: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> EditRecord: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[EditRecord]: ...
    def __getitem__(self, index: int | slice) -> EditRecord | Sequence[EditRecord]:
        return self.records[index]


def load_knowledge(
    kind: str,
    data: Data = "bundled",
    split: str = "train",
    on_error: Literal["raise", "skip"] = "raise",
) -> KnowledgeDataset:
    """Load one split of a data set in any published form.

    Any kind takes any of the forms: those of ZsRE, CounterFact and FEVER, and of WikiBigEdit, UltraEditBench,
    KnowEdit's fact tasks, MQuAKE, RippleEdits, MzsRE, UnKE and AKEW. The kind decides how the facts are scored;
    "counterfact" needs the answer before the edit, which some do not have. What a data set lacks is counted in `lacks`,
    and warned of once.

    A large data set is not held: of a JSON or JSON Lines file of 32 MiB or more, and of a hub id, a folder of
    `datasets` or another file of that size with more than 10,000 facts, the records stay on disk, and each is read when
    it is asked for. All rows are read and checked once, and every record has an index, so that a stream is drawn as
    from a small data set.

    Args:
        kind: "zsre", "counterfact" or "fever".
        data: "bundled", the sample that ships with the package; the path of a JSON or JSON Lines file (gzip too),
            used whole for either split; a folder that holds `{kind}_{split}.jsonl` (or .json, .gz) or a data set of
            the `datasets` library; a mapping from split to any of these; a list of dictionaries; or a hub id, which is
            streamed ("zsre", "counterfact" and "fever" stand for the usual ones, "wikibigedit", "ultraeditbench",
            "wiki_recent", "wiki_counterfact" and "wikibio" for those data sets).
        split: "train" or "eval"; "test", "validation" and "dev" mean "eval".
        on_error: "raise" an error at the first row that cannot be used, or "skip" such rows, count them per reason in
            `skipped` and warn once with the counts.

    Raises:
        KnowledgeError: a row cannot be used (the message has place, field and value), `data` is not readable, or no row
            is left.
        ValueError: an argument has a wrong value.
    """
    if kind not in OWN:
        raise ValueError(f"kind {kind!r} is unknown; it is one of {', '.join(OWN)}")
    check_on_error(on_error)
    split = split_name(split)
    source = find_rows(kind, data, split)
    collected = collect(kind, source, skip=on_error == "skip")
    if collected.faulty:
        warnings.warn(
            f"{source.description}: {collected.faulty.total()} faulty rows skipped: {reason_counts(collected.faulty)}",
            stacklevel=2,
        )
    skipped = collected.skipped + collected.faulty
    if not collected.records:
        counts = reason_counts(skipped) or "none"
        raise KnowledgeError(f"{source.description}: no usable record (skipped: {counts}); check the data")
    for part, count in collected.lacks.items():
        warnings.warn(f"{source.description}: {count} facts have no {part}; {LACKING[part]}", stacklevel=2)
    return KnowledgeDataset(
        kind, source.description, split, collected.records, dict(skipped), dict(collected.lacks)
    )


def check_on_error(on_error: str) -> None:
    """Raise ValueError unless this is "raise" or "skip"."""
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error {on_error!r} is unknown; it is 'raise' or 'skip'")


def held_out(dataset: KnowledgeDataset) -> tuple[KnowledgeDataset, KnowledgeDataset]:
    """The facts to train on, and those held out to choose checkpoints and hyperparameters (the last `HELD_OUT`)."""
    cut = len(dataset) - max(int(HELD_OUT * len(dataset)), 1)
    names = f"first {1 - HELD_OUT:.0%}", f"last {HELD_OUT:.0%}, held out"
    first, last = (
        replace(dataset, records=records, source=f"{dataset.source}, {name}")
        for records, name in zip((dataset.records[:cut], dataset.records[cut:]), names, strict=True)
    )
    return first, last


class KnowledgeStream:
    """A data set's records as a sequence of batches, no record twice; `reset` draws the records and their order.

    Args:
        dataset: the data set.
        num_batches: number of batches in a stream.
        batch_size: number of records in a batch.

    Raises:
        ValueError: a number is not a positive integer, or the data set is too small for a stream.
    """

    def __init__(self, dataset: KnowledgeDataset, num_batches: int, batch_size: int) -> None:
        for name, value in (("num_batches", num_batches), ("batch_size", batch_size)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{name} is {value!r}; give a positive integer")
        if num_batches * batch_size > len(dataset):
            raise ValueError(
                f"{num_batches} batches of {batch_size} need {num_batches * batch_size} records, but {dataset.source} "
                f"({dataset.split}) has {len(dataset)}; lower num_batches or batch_size, or give more data"
            )
        self.dataset = dataset
        self.num_batches = int(num_batches)
        self.batch_size = int(batch_size)
        self._indices: np.ndarray | None = None

    @property
    def indices(self) -> np.ndarray:
        """Indices of the stream's records, in order: (num_batches * batch_size,) int64, read-only."""
        if self._indices is None:
            raise RuntimeError("the stream has no order yet; call reset first")
        return self._indices

    def reset(self, rng: np.random.Generator, indices: Sequence[int] | np.ndarray | None = None) -> None:
        """Draw distinct records in a random order, or take the records at ``indices`` in their order, without `rng`.

        Raises:
            ValueError: the indices are not num_batches * batch_size different integers in the data set's range; the
                stream is unchanged.
        """
        total = self.num_batches * self.batch_size
        if indices is None:
            order = rng.choice(len(self.dataset), size=total, replace=False)
        else:
            order = self.checked(indices)
        order.flags.writeable = False
        self._indices = order

    def batch(self, t: int) -> tuple[EditRecord, ...]:
        """The records of batch `t`, counted from 0.

        Raises:
            IndexError: the batch does not exist.
        """
        if not 0 <= t < self.num_batches:
            raise IndexError(f"batch {t} does not exist; the stream has batches 0 to {self.num_batches - 1}")
        start = t * self.batch_size
        return tuple(self.dataset.records[i] for i in self.indices[start : start + self.batch_size])

    def checked(self, indices: object) -> np.ndarray:
        """The indices as an array for :meth:`reset`, (num_batches * batch_size,) int64; raises the same errors."""
        total = self.num_batches * self.batch_size
        try:
            array = np.asarray(indices)
        except ValueError:  # nested lists of different lengths have no array
            array = np.empty((), dtype=object)
        if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
            raise ValueError(f"indices are {shown(indices)}; give one flat sequence of integers")
        if len(array) != total:
            raise ValueError(
                f"there are {len(array)} indices; {self.num_batches} batches of {self.batch_size} take {total}"
            )
        outside = array[(array < 0) | (array >= len(self.dataset))]
        if outside.size:
            raise ValueError(
                f"index {outside[0]} is out of range; the data set has records 0 to {len(self.dataset) - 1}"
            )
        values, counts = np.unique(array, return_counts=True)
        if len(values) < total:
            raise ValueError(f"index {values[counts > 1][0]} is given more than once; a stream has each record once")
        return array.astype(np.int64)


def reason_counts(reasons: Mapping[str, int]) -> str:
    """The reasons why rows were not used, with their counts, as one text."""
    return ", ".join(f"{count} × {reason}" for reason, count in reasons.items())
