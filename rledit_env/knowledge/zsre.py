"""Reads ZsRE (Levy et al. 2017): questions whose answer is edited, in every published schema.

The unrelated facts of MEND's split are Natural Questions that begin with `nq question: ` and have no question mark.
Like the code published with ROME, MALMEN and RLEdit, this reader keeps this prefix and adds the question mark:
`nq question: who wrote it` becomes `nq question: who wrote it?`.
"""

from __future__ import annotations

from rledit_env.knowledge.fields import Row, Schema, read_by_schema
from rledit_env.knowledge.record import EditRecord, ImpliedFact, LeftOut, LooseFact, UnrelatedFact

NQ_PREFIX = "nq question: "


def read_record(row: Row) -> EditRecord | LooseFact | LeftOut:
    """Read one row; its fields decide which schema it follows.

    A record whose target is also its original answer is kept, since the published splits have such records.

    Raises:
        KnowledgeError: the schema is unknown, or a field is missing, empty or of the wrong type.
    """
    return read_by_schema(row, SCHEMAS)


def _read_mend_flat(row: Row) -> EditRecord:
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


def _read_knowedit(row: Row) -> EditRecord:
    groups = row.inner("locality")
    unrelated = tuple(
        UnrelatedFact(with_question_mark(fact.text("prompt")), fact.first_text("ground_truth"))
        for name in _present(groups)
        for fact in groups.inners(name)
    )
    if not unrelated:
        raise row.error("locality", "is empty", groups.values)
    portability = row.inner("portability") if row.values.get("portability") else Row({}, row.where)
    return EditRecord(
        prompt=row.text("prompt"),
        target=row.first_text("target_new"),
        paraphrases=row.texts("rephrase_prompt"),
        unrelated=unrelated,
        original=row.first_text("ground_truth") if row.values.get("ground_truth") else None,
        subject=row.subject(),
        origin=row.where,
        implied=tuple(
            ImpliedFact(fact.text("prompt"), fact.first_text("ground_truth"))
            for name in _present(portability)
            if portability.get(name)  # an empty group implies nothing
            for fact in portability.inners(name)
        ),
    )


def _present(groups: Row) -> list[str]:
    """The names of the groups that a row has. (In a table every row has all groups; absent ones are None.)"""
    return [name for name, group in groups.values.items() if group is not None]


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


def with_question_mark(prompt: str) -> str:
    """A prompt of Natural Questions with a question mark; any other prompt unchanged."""
    return prompt + "?" if prompt.startswith(NQ_PREFIX) and not prompt.endswith("?") else prompt


SCHEMAS = (
    Schema("MEND's flat ZsRE", ("src", "rephrase", "alt", "loc", "loc_ans"), _read_mend_flat),
    Schema("RLEdit's ZsRE", ("src", "rephrase", "ans", "loc", "loc_ans"), _read_rledit),
    Schema("KnowEdit's ZsRE", ("prompt", "target_new", "rephrase_prompt", "locality"), _read_knowedit),
    Schema("MEND's ZsRE", ("input", "alternatives", "filtered_rephrases", "output"), _read_mend),
)
