"""Reads WikiBigEdit (Thede et al. 2025): questions on half a million changes of Wikidata over eight timesteps.

Few rows have a multi-hop question; it is null in the others. A persona's question is the edit's own question in another
tone, so it is a variant of the fact; a multi-hop question follows from the edit.
"""

from __future__ import annotations

from rledit_env.knowledge.fields import Row, Schema, named
from rledit_env.knowledge.record import EditRecord, ImpliedFact, LooseFact, UnrelatedFact, assembled

PERSONAS, MULTI_HOP = "personas", "multi_hop"


def _read(row: Row) -> EditRecord | LooseFact:
    target = row.text("ans")
    return assembled(
        row.text("update"),
        target,
        row.texts("rephrase") if row.has("rephrase") else (),
        (UnrelatedFact(row.text("loc"), row.first_text("loc_ans")),) if row.has("loc") else (),
        subject=row.subject(),
        origin=row.where,
        variants=tuple(ImpliedFact(asked, target, PERSONAS) for asked in row.texts("personas"))
        if row.has("personas")
        else (),
        implied=(ImpliedFact(row.text("mhop"), row.first_text("mhop_ans"), MULTI_HOP),) if row.has("mhop") else (),
    )


SCHEMA = Schema(
    "WikiBigEdit", ("update", "rephrase", "ans", "personas", "loc", "loc_ans", "mhop", "mhop_ans"), _read,
    named("update", "ans"),
)  # fmt: skip
