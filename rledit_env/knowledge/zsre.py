"""Reads ZsRE (Levy et al. 2017): questions whose answer is edited, in every published schema.

The unrelated facts of MEND's split are Natural Questions that begin with `nq question: ` and have no question mark.
Like the code published with ROME, MALMEN and RLEdit, this reader keeps this prefix and adds the question mark:
`nq question: who wrote it` becomes `nq question: who wrote it?`.

A record whose target is also its original answer is kept, since the published splits have such records.
"""

from __future__ import annotations

from rledit_env.knowledge import knowedit
from rledit_env.knowledge.fields import Row, Schema
from rledit_env.knowledge.record import EditRecord, ImpliedFact, LeftOut, LooseFact, UnrelatedFact
from rledit_env.knowledge.text import with_question_mark


def read_mend_flat(row: Row) -> EditRecord:
    """Read a row of MEND's flat schema, which MzsRE has once for each language."""
    return _flat(row, target="alt", original=row.first_text("answers") if row.values.get("answers") else None)


def _read_rledit(row: Row) -> EditRecord:
    return _flat(row, target="ans", original=None)


def _flat(row: Row, target: str, original: str | None) -> EditRecord:
    return EditRecord(
        prompt=row.text("src"),
        target=row.text(target),
        paraphrases=row.texts("rephrase"),
        unrelated=(UnrelatedFact(with_question_mark(row.text("loc")), row.first_text("loc_ans")),),
        original=original,
        subject=row.subject(),
        origin=row.where,
        implied=_new_question(row),
    )


def _new_question(row: Row) -> tuple[ImpliedFact, ...]:
    """The portability of flat ZsRE (Yao et al. 2023): one question and its answer."""
    if not row.values.get("portability"):
        return ()
    portability = row.inner("portability")
    return (ImpliedFact(portability.text("New Question"), portability.first_text("New Answer")),)


def _read_mend(row: Row) -> LooseFact | LeftOut:
    if not row.get("alternatives") or not row.get("filtered_rephrases"):
        return LeftOut("no alternatives or no rephrases")  # MEND's own loader leaves these out
    prompt = row.text("input")
    paraphrases = tuple(text for text in row.texts("filtered_rephrases") if text != prompt)
    if not paraphrases:
        return LeftOut("no alternatives or no rephrases")
    answer = mend_answer(row)
    # MEND draws one of the alternatives each time; a record is constant, so the first is taken.
    target = row.texts("alternatives")[0]
    return LooseFact(prompt, target, paraphrases, truth=answer, original=answer, origin=row.where)


def mend_answer(row: Row) -> str:
    """The true answer of a row in MEND's schema: that of the first entry of `output` with an answer (some have only
    sources)."""
    outputs = row.inners("output")
    return next((entry for entry in outputs if entry.values.get("answer") is not None), outputs[0]).text("answer")


SCHEMAS = (
    Schema("MEND's flat ZsRE", ("src", "rephrase", "alt", "loc", "loc_ans"), read_mend_flat),
    Schema("RLEdit's ZsRE", ("src", "rephrase", "ans", "loc", "loc_ans"), _read_rledit),
    Schema("KnowEdit's ZsRE", ("prompt", "target_new", "rephrase_prompt", "locality"), knowedit.read),
    Schema("MEND's ZsRE", ("input", "alternatives", "filtered_rephrases", "output"), _read_mend),
)
