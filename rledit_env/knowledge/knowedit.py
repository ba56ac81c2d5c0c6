"""Reads KnowEdit's fact tasks (Zhang et al. 2024): ZsRE, wiki_recent, wiki_counterfact and WikiBio.

Its ConvSent and Sanitation edit no facts: an error says so.

The groups of its locality (Relation_Specificity, Forgetfulness) and portability (Reasoning, Subject_Aliasing,
Logical_Generalization) are scored under their own names, too. Of an answer with aliases the first is taken. A question
with a blank answer is left out, as in the published code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NoReturn

from rledit_env.knowledge.fields import Row, Schema, named
from rledit_env.knowledge.record import EditRecord, ImpliedFact, LooseFact, UnrelatedFact, assembled
from rledit_env.knowledge.text import with_question_mark

FACT_TASKS = "give one of KnowEdit's fact tasks: ZsRE, wiki_recent, wiki_counterfact or WikiBio"


def read(row: Row) -> EditRecord | LooseFact:
    """Read a row of ZsRE, wiki_recent or wiki_counterfact; the last two have no paraphrases."""
    truth = row.first_text("ground_truth") if row.has("ground_truth") else None
    kept, implied = _grouped(row, "locality"), _grouped(row, "portability")
    return assembled(
        row.text("prompt"),
        row.first_text("target_new"),
        row.texts("rephrase_prompt") if "rephrase_prompt" in row.values else (),
        tuple(UnrelatedFact(with_question_mark(asked), answer, name) for name, asked, answer in kept),
        truth,
        original=truth,
        subject=row.subject(),
        origin=row.where,
        implied=tuple(ImpliedFact(asked, answer, name) for name, asked, answer in implied),
    )


def _read_wikibio(row: Row) -> EditRecord | LooseFact:
    return assembled(
        row.text("text"),
        row.first_text("labels"),
        (),
        tuple(UnrelatedFact(asked, answer, name) for name, asked, answer in _grouped(row, "locality")),
        subject=row.subject("concept"),
        origin=row.where,
    )


def _grouped(row: Row, field: str) -> Iterator[tuple[str, str, str]]:
    """Each question in a field's groups: the group's name, the question and its answer. (In a table every row has all
    groups; absent ones are None.)"""
    groups = row.inner(field) if row.has(field) else Row({}, row.where)
    for name in groups.values:
        for fact in groups.inners(name) if groups.has(name) else ():
            if not _is_blank(fact.values.get("ground_truth")):
                yield name, fact.first_text("prompt"), fact.first_text("ground_truth")


def _is_blank(answer: object) -> bool:
    nested = False
    while isinstance(answer, (list, tuple)) and answer:
        answer, nested = answer[0], True
    return not answer.strip() if isinstance(answer, str) else nested and answer == []


def _refuse_convsent(row: Row) -> NoReturn:
    raise row.error("ent", "belongs to KnowEdit's ConvSent, which edits the sentiment on a topic and no fact",
                    mend=FACT_TASKS)


def _refuse_sanitation(row: Row) -> NoReturn:
    field = next(name for name in ("K_F", "success", "question") if name in row.values)
    raise row.error(field, "belongs to KnowEdit's Sanitation, which makes a model withhold answers and edits no fact",
                    mend=FACT_TASKS)


def _is_sanitation(row: Row) -> bool:
    names = row.values.keys()
    return names >= {"K_F", "K_R"} or names == {"success", "locality"} or names == {
        "question", "ground_truth", "target_new"
    }  # fmt: skip


def _has_groups(row: Row) -> bool:
    """Whether a row without paraphrases has its unrelated facts in named groups of lists; EasyEdit's requests have
    groups of columns."""
    groups = row.values.get("locality")
    columns = isinstance(groups, Mapping) and any(isinstance(group, Mapping) for group in groups.values())
    return named("prompt", "target_new", "locality")(row) and "rephrase_prompt" not in row.values and not columns


SCHEMAS = (
    Schema("KnowEdit's wiki_recent and wiki_counterfact", ("prompt", "target_new", "locality"), read,
           _has_groups),
    Schema("KnowEdit's WikiBio", ("text", "labels", "concept", "locality"), _read_wikibio,
           named("text", "labels", "concept")),
    Schema("KnowEdit's ConvSent", ("ent", "pos", "neg"), _refuse_convsent, named("ent", "pos", "neg")),
    Schema("KnowEdit's Sanitation", ("question", "ground_truth", "target_new"), _refuse_sanitation, _is_sanitation),
)  # fmt: skip
