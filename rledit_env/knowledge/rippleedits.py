"""Reads RippleEdits (Cohen et al. 2024): facts with six criteria of what follows from an edit and what does not.

An edit is published as a whole sentence ("The mother of A is B."), and no field holds its subject or its new answer.
The sentence is split after its verb: where a known answer of the edit begins, else where it differs from the sentence
of the original fact, else after its last verb. The subject is the part that the edit shares with its questions on the
same entity.

The facts of Relation_Specificity and Forgetfulness (which the paper calls Preservation) must not change; those of the
other criteria follow from the edit. All are scored under their own names. A criterion's conditions, by which the
published code leaves out what the model did not know before, are not applied. There are no paraphrases.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from rledit_env.knowledge.fields import Row, Schema
from rledit_env.knowledge.record import EditRecord, ImpliedFact, LooseFact, UnrelatedFact, assembled

IMPLIED = ("Logical_Generalization", "Compositionality_I", "Compositionality_II", "Subject_Aliasing")
KEPT = ("Relation_Specificity", "Forgetfulness", "Preservation")
MISSPELLED = {"Relation_Specifity": "Relation_Specificity"}  # in the published description
_VERB = re.compile(r" (?:is followed by|follows|is|are) ")
_AROUND_SUBJECT = {"the", "name", "names", "of", "which", "in", "is", "are", "has", "won", "plays", "a", "part"}


def _read(row: Row) -> EditRecord | LooseFact:
    edit = row.inner("edit")
    sentence = _sentence(edit)
    former = _sentence(edit.inner("original_fact")) if edit.has("original_fact") else None
    cut = _cut(sentence, former, _answers_of_edit(row))
    if cut is None or not sentence[cut:].strip():
        raise edit.error("prompt", "is no sentence of the form '<fact> is <answer>.'", sentence)
    original = None if former is None or former[:cut] != sentence[:cut] else former[cut:].strip() or None
    prompt = sentence[:cut].rstrip()
    kept, implied = _queries(row, KEPT), _queries(row, IMPLIED)
    return assembled(
        prompt,
        sentence[cut:].strip(),
        (),
        tuple(UnrelatedFact(query.text("prompt"), answer, name) for name, query, answer in kept),
        original,
        original=original,
        subject=_subject(row, edit, prompt),
        origin=row.where,
        implied=tuple(ImpliedFact(query.text("prompt"), answer, name) for name, query, answer in implied),
    )


def _sentence(fact: Row) -> str:
    return fact.text("prompt").strip().removesuffix(".")


def _cut(sentence: str, former: str | None, answers: set[str]) -> int | None:
    """Where the answer begins in the sentence; None if the sentence has no verb."""
    cuts = [found.end() for found in _VERB.finditer(f"{sentence} ")]
    known = [cut for cut in cuts if sentence[cut:] in answers]
    shared = [cut for cut in cuts if former is not None and former.startswith(sentence[:cut])]
    return next(iter([*known[-1:], *shared[-1:], *cuts[-1:]]), None)


def _answers_of_edit(row: Row) -> set[str]:
    """The answers to the edit's question on other names of its subject, which are its own answer's names."""
    found: set[str] = set()
    for _, query, answer in _queries(row, ("Subject_Aliasing",)):
        found.add(answer)
        for entry in query.inners("answers"):
            found.update(entry.texts("aliases") if entry.has("aliases") else ())
    return found


def _queries(row: Row, criteria: tuple[str, ...]) -> Iterator[tuple[str, Row, str]]:
    """Each question of some criteria with its criterion and its first answer; those without an answer are left out."""
    for field in row.values:
        name = MISSPELLED.get(field, field)
        for test in row.inners(field) if name in criteria and row.has(field) else ():
            for query in test.inners("test_queries") if test.has("test_queries") else ():
                answers = query.inners("answers") if query.has("answers") else ()
                answer = next((entry.text("value") for entry in answers if entry.has("value")), None)
                if answer is not None and query.has("prompt"):
                    yield name, query, answer


def _subject(row: Row, edit: Row, prompt: str) -> str | None:
    """The longest run of words that the prompt shares with every question on the same entity, without the words that
    stand around a subject; None if there is no such question."""
    entity = edit.values.get("subject_id")
    prompts = [
        query.text("prompt").split()
        for _, query, _ in _queries(row, ("Relation_Specificity",))
        if entity is not None and query.values.get("subject_id") == entity
    ]
    if not prompts:
        return None
    words = prompt.split()
    runs = (words[i : i + length] for length in range(len(words), 0, -1) for i in range(len(words) - length + 1))
    shared = (_trimmed(run) for run in runs if all(_contains(other, run) for other in prompts))
    subject = " ".join(next(filter(None, shared), []))
    return subject if subject and subject in prompt else None


def _contains(words: list[str], run: list[str]) -> bool:
    return any(words[i : i + len(run)] == run for i in range(len(words) - len(run) + 1))


def _trimmed(run: list[str]) -> list[str]:
    while run and run[0] in _AROUND_SUBJECT | {"The"}:
        run = run[1:]
    while run and run[-1] in _AROUND_SUBJECT:
        run = run[:-1]
    return run


def _has_edit(row: Row) -> bool:
    edit = row.values.get("edit")
    return isinstance(edit, Mapping) and "prompt" in edit


SCHEMA = Schema("RippleEdits", ("edit", *IMPLIED, *KEPT[:2]), _read, _has_edit)
