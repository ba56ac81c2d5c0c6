"""Gives records from schemas without unrelated facts the fact of another row as their unrelated fact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from rledit_env.knowledge.record import EditRecord, KnowledgeError, LooseFact, UnrelatedFact

KEPT_EVERY = 10
DUPLICATE = "same prompt as an earlier row"
KEPT = "kept as an unrelated fact"


def pair(facts: Iterable[EditRecord | LooseFact], skipped: Counter[str]) -> list[EditRecord]:
    """Complete the loose facts and return them with the others, in order.

    A fact that is edited in a stream cannot also be an unrelated fact of that stream. So every tenth loose fact (of
    twenty or more) is never edited; the others get these in turn as unrelated facts, with their true answers. With
    fewer than twenty, each fact is edited and gets the next one. FEVER is published with a row for each piece of
    evidence, so of loose facts with the same prompt only the first is used. `skipped` counts both.

    Raises:
        KnowledgeError: there is only one loose fact, and no other can be its unrelated fact.
    """
    facts = list(facts)
    first: dict[str, LooseFact] = {}
    for fact in facts:
        if isinstance(fact, LooseFact) and first.setdefault(fact.prompt, fact) is not fact:
            skipped[DUPLICATE] += 1
    loose = list(first.values())
    if len(loose) == 1:
        raise KnowledgeError(
            f"{loose[0].origin}: no other row can serve as its unrelated fact; give at least two different rows",
            reason="no unrelated fact",
        )
    lenders = loose
    if len(loose) >= 2 * KEPT_EVERY:
        lenders = loose[KEPT_EVERY - 1 :: KEPT_EVERY]
        skipped[KEPT] += len(lenders)
        unedited = {fact.prompt for fact in lenders}
        loose = [fact for fact in loose if fact.prompt not in unedited]
    lender = {fact.prompt: lenders[(i + 1) % len(lenders)] for i, fact in enumerate(loose)}

    records: list[EditRecord] = []
    for fact in facts:
        if isinstance(fact, EditRecord):
            records.append(fact)
        elif fact.prompt in lender and first[fact.prompt] is fact:
            records.append(_completed(fact, lender[fact.prompt]))
    return records


def _completed(fact: LooseFact, lender: LooseFact) -> EditRecord:
    return EditRecord(
        prompt=fact.prompt,
        target=fact.target,
        paraphrases=fact.paraphrases,
        unrelated=(UnrelatedFact(lender.prompt, lender.truth),),
        original=fact.original,
        subject=fact.subject,
        origin=fact.origin,
    )
