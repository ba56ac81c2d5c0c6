"""Every published form of a data set that is read, and the choice of the form that a row follows.

An environment's kind decides how its facts are scored, not which data it takes: a row is read by a form of the kind's
own data set if it has all of that form's fields, else by the form of another data set that recognises it.
"""

from __future__ import annotations

from rledit_env.knowledge import (
    counterfact,
    fever,
    knowedit,
    mquake,
    mzsre,
    rippleedits,
    ultraedit,
    unstructured,
    wikibigedit,
    zsre,
)
from rledit_env.knowledge.fields import SKIP_ROWS, Row, Schema, read_by_schema
from rledit_env.knowledge.record import EditRecord, KnowledgeError, LeftOut, LooseFact

OWN = {"zsre": zsre.SCHEMAS, "counterfact": counterfact.SCHEMAS, "fever": fever.SCHEMAS}
SHARED = (
    rippleedits.SCHEMA, mzsre.SCHEMA, wikibigedit.SCHEMA, ultraedit.SCHEMA, *knowedit.SCHEMAS, *unstructured.SCHEMAS,
    mquake.SCHEMA,
)  # fmt: skip
"""The forms that belong to no environment of their own, the more particular ones first."""
COMPARING = "counterfact"  # the kind whose scores compare the new answer with the original one

Fact = EditRecord | LooseFact | LeftOut


def read_row(row: Row, kind: str) -> tuple[Fact, ...]:
    """The facts of a row, in an environment of this kind; most forms have one a row.

    Raises:
        KnowledgeError: the form is unknown, a field is missing, empty or of the wrong type, or a fact of
            CounterFact's environment has no original answer that differs from its target.
    """
    schema = _form_of(row, kind)
    if schema is None:
        names = ", ".join(dict.fromkeys(other.name for other in SHARED))
        facts = read_by_schema(row, OWN[kind], f"; also read are {names}")
    else:
        facts = schema.read(row)
    several = facts if isinstance(facts, tuple) else (facts,)
    if kind == COMPARING:
        for fact in several:
            check_comparable(row, fact, "the row" if schema is None else schema.name)
    return several


def shared_form(row: Row) -> Schema | None:
    """The shared form that a row follows; None if it follows none."""
    return next((schema for schema in SHARED if schema.fits(row)), None)


def check_comparable(row: Row, fact: Fact, form: str) -> None:
    """Raise KnowledgeError for a fact whose two answers CounterFact's scores cannot compare."""
    if isinstance(fact, LeftOut):
        return
    if fact.original is None:
        raise KnowledgeError(
            f"{row.where}, field 'original answer': {form} does not say what was true before the edit, which "
            f"CounterFact's scores compare the new answer with; take RLEdit-ZsRE-v0 for it, or {SKIP_ROWS}",
            reason="no original answer to compare with",
        )
    if fact.original.strip().casefold() == fact.target.strip().casefold():
        raise row.error("target", "is the same as the original answer", fact.target)


def _form_of(row: Row, kind: str) -> Schema | None:
    """The form by which an environment of this kind reads a row; None if the row has all fields of none."""
    others = [schema for other, schemas in OWN.items() if other != kind for schema in schemas]
    shared = sorted(SHARED, key=lambda schema: kind == COMPARING and schema in unstructured.SCHEMAS)
    return next((schema for schema in (*OWN[kind], *shared, *others) if schema.fits(row)), None)
