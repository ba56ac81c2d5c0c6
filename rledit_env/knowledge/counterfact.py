"""Reads CounterFact (Meng et al. 2022): cloze statements made counterfactual, in every published schema.

A target that is the original answer is an error, since CounterFact's metrics compare the two. MEMIT's multi_counterfact
has ROME's schema; the form for causal tracing has neither paraphrases nor unrelated facts.
"""

from __future__ import annotations

from rledit_env.knowledge.fields import Row, Schema, fill_in
from rledit_env.knowledge.record import EditRecord, LooseFact, UnrelatedFact, assembled


def _read_rome(row: Row) -> EditRecord:
    rewrite = row.inner("requested_rewrite")
    subject = rewrite.text("subject").strip()
    prompt, start = fill_in(rewrite, "prompt", rewrite.text("prompt"), subject)
    if start is None:
        raise rewrite.error("prompt", "has no {} for the subject", prompt)
    original = rewrite.inner("target_true").text("str")
    return EditRecord(
        prompt=prompt,
        target=_new_answer(rewrite.inner("target_new"), "str", original),
        paraphrases=row.texts("paraphrase_prompts"),
        # The neighbours share the edited relation and its original answer, which must stay their answer.
        unrelated=tuple(UnrelatedFact(prompt, original) for prompt in row.texts("neighborhood_prompts")),
        original=original,
        subject=subject,
        origin=row.where,
        subject_start=start,
    )


def _read_flat(row: Row) -> EditRecord:
    original = row.text("ground_truth")
    prompts, answers = row.texts("locality_prompt"), row.texts("locality_ground_truth")
    if len(prompts) != len(answers):
        raise row.error("locality_ground_truth", f"has {len(answers)} answers for {len(prompts)} locality prompts")
    return EditRecord(
        prompt=row.text("prompt"),
        target=_new_answer(row, "target_new", original),
        paraphrases=row.texts("rephrase_prompt"),
        unrelated=tuple(UnrelatedFact(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)),
        original=original,
        subject=row.subject(),
        origin=row.where,
    )


def _read_tracing(row: Row) -> EditRecord | LooseFact:
    original = row.text("target_true")
    return assembled(
        row.text("prompt"),
        _new_answer(row, "target_false", original),
        (),
        (),
        original,
        original=original,
        subject=row.subject(),
        origin=row.where,
    )


def _new_answer(row: Row, field: str, original: str) -> str:
    target = row.text(field)
    if target.strip().casefold() == original.strip().casefold():
        raise row.error(field, "is the same as the original answer", target)
    return target


SCHEMAS = (
    Schema("ROME's CounterFact", ("requested_rewrite", "paraphrase_prompts", "neighborhood_prompts"), _read_rome),
    Schema(
        "flat CounterFact",
        ("prompt", "target_new", "ground_truth", "rephrase_prompt", "locality_prompt", "locality_ground_truth"),
        _read_flat,
    ),
    Schema("CounterFact for tracing", ("prompt", "target_true", "target_false", "subject", "relation_prefix"),
           _read_tracing),
)
