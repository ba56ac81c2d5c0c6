"""Edit records as token passages of one LM, each record tokenised once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rledit_env.knowledge import EditRecord, KnowledgeDataset, StoredRecords
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage

CHUNK = 8192  # records that are tokenised at a time to count their positions
KEPT = 4096  # tokenised records of a data set, some 5 KB each


@dataclass(frozen=True, slots=True)
class EncodedRecord:
    """One fact as passages: the edit (x, y*), every paraphrase (x̃, y*) and every unrelated pair (x′, y′), with its
    text."""

    edit: Passage
    paraphrases: tuple[Passage, ...]
    unrelated: tuple[Passage, ...]
    record: EditRecord


def encode(lm: EditableLM, record: EditRecord) -> EncodedRecord:
    """Tokenise a record.

    Raises:
        ValueError: a passage is longer than the model's context; the message names the record's file and line.
    """
    return EncodedRecord(
        edit=lm.tokenize(record.prompt, record.target, record.subject_span, record.origin),
        paraphrases=tuple(lm.tokenize(p, record.target, record.subject, record.origin) for p in record.paraphrases),
        unrelated=tuple(lm.tokenize(u.prompt, u.answer, origin=record.origin) for u in record.unrelated),
        record=record,
    )


class EncodedDataset:
    """A data set whose records are tokenised when first asked for; the ``KEPT`` latest are kept."""

    def __init__(self, lm: EditableLM, dataset: KnowledgeDataset) -> None:
        self.lm, self.dataset = lm, dataset
        self._encoded: dict[int, EncodedRecord] = {}

    def __getitem__(self, index: int) -> EncodedRecord:
        records, key = self.dataset.records, int(index)
        record = None if isinstance(records, StoredRecords) else records[key]
        if record is not None:
            key = id(record)  # the same record, even if the data set has it several times
        encoded = self._encoded.pop(key, None)
        if encoded is None:
            encoded = encode(self.lm, records[key] if record is None else record)
        self._encoded[key] = encoded  # now the latest
        if len(self._encoded) > KEPT:
            del self._encoded[next(iter(self._encoded))]
        return encoded

    def check_lengths(self, before: int = 0) -> None:
        """Raise for any passage that does not fit the model's context behind ``before`` bytes of text.

        A text has at most as many tokens as UTF-8 bytes (plus the special ones), so only texts near the limit are
        tokenised here.
        """
        limit = self.lm.context_length - 8 - before
        for index, record in enumerate(self.dataset.records):
            prompts = [record.prompt, *record.paraphrases]
            texts = [(p, record.target) for p in prompts] + [(u.prompt, u.answer) for u in record.unrelated]
            if any(len(self.lm.text.joined(*text).encode()) > limit for text in texts):
                self[index]

    def traced_positions(self, token: str) -> np.ndarray:
        """Number of positions that ``EditableLM.trace`` returns for each record's edit, (records,) int64."""
        return np.concatenate([self._positions(start, token) for start in range(0, len(self.dataset), CHUNK)])

    def _positions(self, start: int, token: str) -> np.ndarray:
        records = list(self.dataset.records[start : start + CHUNK])
        passages = self.lm.tokenize_all(
            [r.prompt for r in records], [r.target for r in records], [r.subject_span for r in records],
            [r.origin for r in records],
        )
        return np.array([len(p.chosen_positions(token)) for p in passages])


def largest_batch(counts: Sequence[int] | np.ndarray, batch_size: int) -> int:
    """The largest number of positions in any batch of ``batch_size`` records."""
    return int(np.sort(np.asarray(counts))[::-1][:batch_size].sum())
