"""Gives records from schemas without unrelated facts the fact of another row as their unrelated fact."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rledit_env.knowledge.record import EditRecord, KnowledgeError, LooseFact, UnrelatedFact

KEPT_EVERY = 10
DUPLICATE = "same prompt as an earlier row"
KEPT = "kept as an unrelated fact"


class Pairing:
    """Decides which facts are edited and which lends each loose one its unrelated fact, from a few bytes a fact.

    A fact that is edited in a stream cannot also be an unrelated fact of that stream. So of twenty loose facts or more
    every tenth that knows its true answer is never edited; the others get these in turn as unrelated facts, with their
    true answers. With fewer than twenty, each fact is edited and gets the next one. Where no other loose fact knows a
    true answer, those of records with unrelated facts are lent. FEVER is published with a row for each piece of
    evidence, so of loose facts with the same prompt only the first is used. `skipped` counts both.
    """

    def __init__(self, skipped: Counter[str]) -> None:
        self.skipped = skipped
        self._facts = 0
        self._loose, self._keys, self._lends = array("i"), array("q"), array("b")  # of the loose facts
        self._origin = ""

    def add(self, fact: EditRecord | LooseFact) -> None:
        """Add the next fact."""
        if isinstance(fact, LooseFact):
            digest = hashlib.blake2b(fact.prompt.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            self._loose.append(self._facts)
            self._keys.append(int.from_bytes(digest, "big", signed=True))
            self._lends.append(fact.truth is not None)
            self._origin = self._origin or fact.origin
        self._facts += 1

    def repeated(self) -> dict[int, int]:
        """The loose facts whose prompt an earlier one has → the first one with this prompt."""
        loose, firsts = np.asarray(self._loose), self._firsts()
        at = np.flatnonzero(firsts != np.arange(len(loose)))
        return dict(zip(loose[at].tolist(), loose[firsts[at]].tolist(), strict=True))

    def plan(self) -> tuple[np.ndarray, np.ndarray]:
        """The facts that are edited, in order, and each one's lender: (records,) int32 each; -1 for a fact with
        unrelated facts of its own.

        Raises:
            KnowledgeError: there is only one loose fact, and no other can lend it an unrelated one.
        """
        is_edited, lender_of = np.ones(self._facts, dtype=bool), np.full(self._facts, -1, dtype=np.int32)
        is_first = self._firsts() == np.arange(len(self._loose))
        is_edited[np.asarray(self._loose)[~is_first]] = False
        _count(self.skipped, DUPLICATE, int((~is_first).sum()))
        loose = np.asarray(self._loose)[is_first]
        lenders = loose[np.asarray(self._lends)[is_first] == 1]
        kept = lenders[KEPT_EVERY - 1 :: KEPT_EVERY] if len(loose) >= 2 * KEPT_EVERY else lenders[:0]
        if len(kept):
            _count(self.skipped, KEPT, len(kept))
            is_edited[kept] = False
            lenders, loose = kept, np.setdiff1d(loose, kept)
        elif len(lenders) < 2 and len(self._loose) < self._facts:
            lenders = np.setdiff1d(np.arange(self._facts, dtype=np.int32), self._loose)
        if len(loose):
            if not len(lenders) or (len(lenders) == 1 and lenders[0] in loose):
                raise KnowledgeError(
                    f"{self._origin}: no other row can serve as its unrelated fact; give at least two different rows",
                    reason="no unrelated fact",
                )
            turns = (np.arange(len(loose)) + 1) % len(lenders)
            next_ones = lenders[(turns + 1) % len(lenders)]
            lender_of[loose] = np.where(lenders[turns] == loose, next_ones, lenders[turns])
        return np.flatnonzero(is_edited).astype(np.int32), lender_of[is_edited]

    def _firsts(self) -> np.ndarray:
        """For each loose fact the place among them of the first one with its prompt, (loose facts,) int64."""
        _, first, inverse = np.unique(np.asarray(self._keys), return_index=True, return_inverse=True)
        return first[inverse]


def pair(facts: Sequence[EditRecord | LooseFact], skipped: Counter[str]) -> list[EditRecord]:
    """Complete the loose facts as `Pairing` says, and return them with the others, in order.

    What follows from a fact that another row repeats follows from the first one, if both have the same target.

    Raises:
        KnowledgeError: there is only one loose fact, and no other can be its unrelated fact.
    """
    facts = list(facts)
    pairing = Pairing(skipped)
    for fact in facts:
        pairing.add(fact)
    for number, first in pairing.repeated().items():
        repeated, kept = facts[number], facts[first]
        if repeated.implied and repeated.target == kept.target:
            facts[first] = replace(kept, implied=(*kept.implied, *repeated.implied))
    records: list[EditRecord] = []
    for number, lender in zip(*(column.tolist() for column in pairing.plan()), strict=True):
        fact = facts[number]
        records.append(fact.completed(as_unrelated(facts[lender])) if isinstance(fact, LooseFact) else fact)
    return records


def as_unrelated(lender: EditRecord | LooseFact) -> UnrelatedFact:
    """What a fact lends to another as its unrelated fact."""
    if isinstance(lender, EditRecord):
        return lender.unrelated[0]
    assert lender.truth is not None, "a fact without a true answer lends nothing"
    return UnrelatedFact(lender.prompt, lender.truth)


def _count(counts: Counter[str], reason: str, number: int) -> None:
    if number:
        counts[reason] += number
