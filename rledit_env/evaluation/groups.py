"""The questions of records in the groups that their data set names: which are asked, and their scores by group."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from statistics import fmean

from rledit_env.knowledge import EditRecord, ImpliedFact, UnrelatedFact

Questions = Sequence[Sequence[ImpliedFact | UnrelatedFact]]
Edits = Collection[tuple[str, str]]
"""Prompts and targets of edited facts."""


def edits_of(records: Iterable[EditRecord]) -> Edits:
    """The prompts and targets of some records."""
    return {(record.prompt, record.target) for record in records}


def that_follow(records: Sequence[EditRecord], edits: Edits) -> list[list[ImpliedFact]]:
    """For each record the implied facts that follow from these edits: all but those that need a further one."""
    return [[fact for fact in record.implied if all(edit in edits for edit in fact.needs)] for record in records]


def by_group(part: str, questions: Questions, shares: Sequence[float]) -> dict[str, list[float | None]]:
    """Each group's scores: "<part>/<group>" → for each record the mean over its questions of the group, None without.

    Args:
        part: what the groups are a part of, such as "portability".
        questions: for each record its questions; those without a group are left out.
        shares: the score of each question, in order over all records.
    """
    remaining: Iterator[float] = iter(shares)
    scored = [[(question.group, next(remaining)) for question in asked] for asked in questions]
    names = dict.fromkeys(group for record in scored for group, _ in record if group is not None)
    return {f"{part}/{name}": [_mean(share for group, share in record if group == name) for record in scored]
            for name in names}


def _mean(shares: Iterable[float]) -> float | None:
    known = list(shares)
    return fmean(known) if known else None
