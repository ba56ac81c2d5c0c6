"""Reads UltraEditBench (Gu et al. 2025): two million questions, each with one rephrasing and one unrelated question."""

from __future__ import annotations

from rledit_env.knowledge.fields import Row, Schema, named
from rledit_env.knowledge.record import EditRecord, LooseFact, UnrelatedFact, assembled

FIELDS = ("prompt", "rephrase_prompt", "ans", "loc", "loc_ans")


def _read(row: Row) -> EditRecord | LooseFact:
    return assembled(
        row.text("prompt"),
        row.text("ans"),
        row.texts("rephrase_prompt"),
        (UnrelatedFact(row.text("loc"), row.first_text("loc_ans")),),
        subject=row.subject(),
        origin=row.where,
    )


SCHEMA = Schema("UltraEditBench", FIELDS, _read, named(*FIELDS))
