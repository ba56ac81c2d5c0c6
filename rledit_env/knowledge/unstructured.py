"""Reads unstructured facts, whose new answer is a paragraph: UnKE (Deng et al. 2025) and AKEW (Wu et al. 2024).

The questions on parts of the paragraph follow from the edit, as "sub_questions"; of AKEW's, the first five, as in the
published code. UnKE names no unrelated facts, so another row's question and paragraph are borrowed. AKEW's rows have a
short answer as well: CounterFact's environment, which compares two answers, edits that one.
"""

from __future__ import annotations

from collections.abc import Mapping

from rledit_env.knowledge.fields import Row, Schema, fill_in, named
from rledit_env.knowledge.record import EditRecord, ImpliedFact, LooseFact, UnrelatedFact, assembled

SUB_QUESTIONS, MOST_SUB_QUESTIONS = "sub_questions", 5
TEXT = "fact_new_uns"


def _read_unke(row: Row) -> EditRecord | LooseFact:
    text = row.text("answer")
    asked = row.texts("sub_question") if row.has("sub_question") else ()
    answers = row.texts("sub_answer") if asked else ()
    if len(answers) != len(asked):
        raise row.error("sub_answer", f"has {len(answers)} answers for {len(asked)} questions in 'sub_question'")
    return assembled(
        row.text("question"),
        text,
        row.texts("para_question") if row.has("para_question") else (),
        (),
        text,
        origin=row.where,
        implied=tuple(ImpliedFact(*pair, SUB_QUESTIONS) for pair in zip(asked, answers, strict=True)),
    )


def _read_akew(row: Row) -> tuple[EditRecord | LooseFact, ...]:
    several = isinstance(row.values.get("requested_rewrite"), (list, tuple))
    rewrites = row.inners("requested_rewrite") if several else (row.inner("requested_rewrite"),)
    return tuple(_read_rewrite(row, rewrite) for rewrite in rewrites)


def _read_rewrite(row: Row, rewrite: Row) -> EditRecord | LooseFact:
    subject = rewrite.subject()
    start = None
    if rewrite.has("prompt_full"):  # CounterFact's rows have the whole question
        prompt = rewrite.text("prompt_full")
        paraphrases = row.texts("paraphrase_prompts") if row.has("paraphrase_prompts") else ()
    else:
        filled, start = fill_in(rewrite, "prompt", rewrite.text("prompt"), subject)
        prompt = filled.rstrip() if filled.rstrip().endswith("?") else f"{filled.rstrip()}?"
        paraphrases = rewrite.texts("question") if rewrite.has("question") else ()
    text = rewrite.text(TEXT)
    triplets = rewrite.inners("unsfact_triplets_GPT") if rewrite.has("unsfact_triplets_GPT") else ()
    return assembled(
        prompt,
        text,
        tuple(wording for wording in paraphrases if wording != prompt),
        _unrelated(row, rewrite),
        text,
        subject=subject,
        subject_start=start,
        origin=row.where,
        implied=tuple(_sub_question(triplet) for triplet in triplets[:MOST_SUB_QUESTIONS]),
    )


def _sub_question(triplet: Row) -> ImpliedFact:
    asked, _ = fill_in(triplet, "prompt", triplet.text("prompt"), triplet.subject())
    return ImpliedFact(asked, triplet.first_text("target"), SUB_QUESTIONS)


def _unrelated(row: Row, rewrite: Row) -> tuple[UnrelatedFact, ...]:
    if row.has("neighborhood_prompts"):
        answer = rewrite.inner("target_true").text("str")
        return tuple(UnrelatedFact(asked, answer) for asked in row.texts("neighborhood_prompts"))
    if not row.has("loc"):
        return ()
    asked, answers = row.texts("loc"), row.texts("loc_ans")
    if len(asked) != len(answers):
        raise row.error("loc_ans", f"has {len(answers)} answers for {len(asked)} questions in 'loc'")
    return tuple(UnrelatedFact(*pair) for pair in zip(asked, answers, strict=True))


def _has_text(row: Row) -> bool:
    rewrites = row.values.get("requested_rewrite")
    first = rewrites[0] if isinstance(rewrites, (list, tuple)) and rewrites else rewrites
    return isinstance(first, Mapping) and TEXT in first


SCHEMAS = (
    Schema("UnKE", ("question", "para_question", "answer", "sub_question", "sub_answer"), _read_unke,
           named("question", "para_question", "answer", "sub_question")),
    Schema("AKEW", ("requested_rewrite",), _read_akew, _has_text),
)  # fmt: skip
