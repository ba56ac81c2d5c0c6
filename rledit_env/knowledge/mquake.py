"""Reads MQuAKE (Zhong et al. 2023): CF, CF-3k, CF-3k-v2 and T, chains of facts with multi-hop questions.

Every rewrite of a case is one fact. The case's multi-hop questions follow from all of its rewrites together: they are
kept with the first one, and are scored where all of them are edited. MQuAKE has no unrelated facts, so another row's
are borrowed. The question form of a rewrite is its paraphrase.
"""

from __future__ import annotations

from rledit_env.knowledge.fields import Row, Schema, fill_in, named
from rledit_env.knowledge.record import EditRecord, ImpliedFact, LooseFact, assembled

MULTI_HOP = "multi_hop"


def _read(row: Row) -> tuple[EditRecord | LooseFact, ...]:
    rewrites = row.inners("requested_rewrite")
    edits = [(_prompt(rewrite)[0], rewrite.inner("target_new").text("str")) for rewrite in rewrites]
    answer = row.text("new_answer")
    questions = tuple(ImpliedFact(asked, answer, MULTI_HOP, tuple(edits[1:])) for asked in row.texts("questions"))
    return tuple(_fact(rewrite, questions if i == 0 else ()) for i, rewrite in enumerate(rewrites))


def _fact(rewrite: Row, questions: tuple[ImpliedFact, ...]) -> EditRecord | LooseFact:
    prompt, start = _prompt(rewrite)
    truth = rewrite.inner("target_true").text("str") if rewrite.has("target_true") else None
    return assembled(
        prompt,
        rewrite.inner("target_new").text("str"),
        rewrite.texts("question") if rewrite.has("question") else (),
        (),
        truth,
        original=truth,
        subject=rewrite.subject(),
        subject_start=start,
        origin=rewrite.where,
        implied=questions,
    )


def _prompt(rewrite: Row) -> tuple[str, int | None]:
    return fill_in(rewrite, "prompt", rewrite.text("prompt"), rewrite.subject())


SCHEMA = Schema(
    "MQuAKE", ("requested_rewrite", "questions", "new_answer"), _read,
    named("requested_rewrite", "questions", "new_answer"),
)  # fmt: skip
