"""Reads a user's own facts from a file in any published form, or one with prompts and targets only."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from rledit_env.knowledge import fever, names, zsre
from rledit_env.knowledge.content import readable_file
from rledit_env.knowledge.fields import SKIP_ROWS, Row, Schema
from rledit_env.knowledge.forms import COMPARING, OWN, check_comparable, read_row, shared_form
from rledit_env.knowledge.lenient import LenientFact, facts_of, read_fact, unwrapped, with_numbers_as_text
from rledit_env.knowledge.record import EditRecord, KnowledgeError, LeftOut, LooseFact, UnrelatedFact
from rledit_env.knowledge.source import read_file
from rledit_env.knowledge.stream import KnowledgeDataset, check_on_error, reason_counts

PLAIN = "facts"  # the kind of a file with prompts and targets only
KINDS = (PLAIN, *OWN)
Fact = LenientFact | EditRecord | LooseFact | LeftOut
_PUBLISHED_FIELDS = {name for schemas in OWN.values() for schema in schemas for name in schema.fields}
_VERDICTS = {*fever.VERDICTS, fever.NOT_ENOUGH_INFO.casefold()}


@dataclass(frozen=True)
class Facts:
    """All facts of a file, in its order.

    Attributes:
        dataset: the records. Its kind is "facts" for prompts and targets only, which are scored like ZsRE's.
        without_paraphrases: number of records without a paraphrase; their own prompt is used as one.
        without_unrelated: number of records without an unrelated fact; a stand-in is used, on which specificity means
            nothing.
        conflicts: prompt → number of its targets, for prompts with several.
        ignored: fields that are not used → the name that was probably meant, or None.
    """

    dataset: KnowledgeDataset
    without_paraphrases: int
    without_unrelated: int
    conflicts: dict[str, int]
    ignored: Mapping[str, str | None] = field(default_factory=dict)


def load_facts(path: str | Path, kind: str | None = None, on_error: Literal["raise", "skip"] = "raise") -> Facts:
    """Read facts to edit from a file: JSON, JSON Lines, CSV, YAML or Parquet, recognised by its content.

    Every fact needs a prompt and a target, and may have a subject (as it is written in the prompt), paraphrases,
    unrelated facts, implied ones and its original answer, under the names of the plain schema (`prompt`, `target`,
    `subject`, `paraphrases`, `unrelated`, `original`) or any published ones: those of EasyEdit's, ROME's, MEMIT's and
    AlphaEdit's requests, and of every data set that `load_knowledge` reads. A ``{}`` in a prompt is the subject's
    place. Numbers become text as they are written; a truth value is an error, since it does not say which word is the
    answer.

    Args:
        path: the file, or a folder with a single file.
        kind: "facts", "zsre", "counterfact" or "fever"; None: the fields decide.
        on_error: "raise" at the first row that cannot be used, or "skip" such rows, count them per reason in the data
            set's `skipped` and warn once.

    Raises:
        KnowledgeError: a row cannot be used (the message has place, field and value), or there is no row.
        FileNotFoundError: the file does not exist.
        ValueError: the kind is unknown.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind {kind!r} is unknown; it is one of {', '.join(KINDS)}")
    check_on_error(on_error)
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file of facts; check the path")
    path = readable_file(path)
    rows = list(read_file(path))
    if not rows:
        raise KnowledgeError(f"{path}: no fact in it; give one JSON object a line, such as "
                             '{"prompt": "The capital of Freedonia is", "target": "Sylvania"}')
    faulty: Counter[str] = Counter()
    facts: list[tuple[Row, Fact]] = []
    for row in rows if _is_shared(rows[0]) else unwrapped(rows):
        try:
            facts += _facts(_row(row), kind)
        except KnowledgeError as error:
            if on_error == "raise":
                raise
            faulty[error.reason] += 1
    if faulty:
        message = f"file {path.name}: {faulty.total()} faulty rows skipped: {reason_counts(faulty)}"
        warnings.warn(message, stacklevel=2)
    return _as_dataset(path, facts, kind or _common_kind([row for row, _ in facts]), faulty)


def _is_shared(row: Row | KnowledgeError) -> bool:
    return isinstance(row, Row) and shared_form(row) is not None


def _facts(row: Row, kind: str | None) -> list[tuple[Row, Fact]]:
    """A row's facts, each with the row that it is read from."""
    form = None if kind in OWN and any(schema.fits(row) for schema in OWN[kind]) else shared_form(row)
    if form is None:
        return [(fact_row, _read(fact_row, kind)) for fact_row in facts_of(row)]
    read = form.read(row)
    facts = read if isinstance(read, tuple) else (read,)
    if kind == COMPARING:
        for fact in facts:
            check_comparable(row, fact, form.name)
    return [(row, fact) for fact in facts]


def _row(row: Row | KnowledgeError) -> Row:
    if isinstance(row, KnowledgeError):
        raise row
    return replace(row, values={name: with_numbers_as_text(value) for name, value in row.values.items()})


def _as_dataset(path: Path, facts: Sequence[tuple[Row, Fact]], kind: str, faulty: Counter[str]) -> Facts:
    """The facts as a data set, with counts of missing and conflicting parts and of ignored fields."""
    left_out = Counter(fact.reason for _, fact in facts if isinstance(fact, LeftOut))
    usable = [fact for _, fact in facts if not isinstance(fact, LeftOut)]
    skipped = dict(left_out + faulty)
    if not usable:
        raise KnowledgeError(f"{path}: none of its rows can be edited ({reason_counts(skipped)}); check the file")
    plain = [fact for fact in usable if isinstance(fact, LenientFact)]
    unwrapped_facts = [fact.record if isinstance(fact, LenientFact) else fact for fact in usable]
    records = tuple(_completed(unwrapped_facts, i) for i in range(len(unwrapped_facts)))
    ignored = [name for row, fact in facts for name in _ignored(row, fact)]
    return Facts(
        dataset=KnowledgeDataset(kind, f"file {path.name}", "eval", records, skipped),
        without_paraphrases=sum(not fact.has_paraphrases for fact in plain)
        + sum("paraphrases" in f.lacks for f in usable if not isinstance(f, LenientFact)),
        without_unrelated=sum(not f.has_unrelated for f in plain) + sum(isinstance(f, LooseFact) for f in usable),
        conflicts=_conflicts(records),
        ignored={name: names.did_you_mean(name) for name in dict.fromkeys(ignored)},
    )


def _read(row: Row, kind: str | None) -> Fact:
    """Read a row by its fields' names; FEVER's claims and rows in MEND's schema by their data set's reader."""
    row_kind = detect_kind(row) if kind is None else kind
    published = row_kind == "fever" or (row_kind == "zsre" and _follows(row, zsre.SCHEMAS[-1:]))
    fact = read_row(row, row_kind)[0] if published else read_fact(row)
    if isinstance(fact, LenientFact):
        _check(fact.record, row, row_kind)
    return fact


def _check(record: EditRecord, row: Row, kind: str) -> None:
    """Raise KnowledgeError for a subject that is not in the prompt, and for CounterFact records whose two answers
    cannot be compared."""
    if record.subject is not None and record.subject_span is None:
        raise row.error("subject", "does not occur in the prompt", record.subject,
                        f"write it as in {record.prompt!r}, leave it out, or {SKIP_ROWS}")
    if kind == "counterfact":
        if record.original is None:
            raise row.error("ground_truth", "is missing, which CounterFact's scores compare the target with")
        if record.original.strip().casefold() == record.target.strip().casefold():
            raise row.error("target_new", "is the same as the original answer", record.target)


def _follows(row: Row, schemas: Sequence[Schema]) -> bool:
    """Whether the row has every field of one of the schemas."""
    present = {name for name, value in row.values.items() if value is not None}
    return any(present.issuperset(schema.fields) for schema in schemas)


def detect_kind(row: Row) -> str:
    """The published data set one of whose schemas has all its fields in the row; "facts" if there is none.

    A row with a claim is FEVER's even if other fields are missing, since a claim is not a prompt.
    """
    for kind in ("counterfact", "zsre", "fever"):
        if _follows(row, OWN[kind]):
            # ZsRE and FEVER share MEND's schema; FEVER's answers are verdicts.
            is_verdict = kind == "zsre" and "output" in row.values and "input" in row.values and (
                zsre.mend_answer(row).casefold() in _VERDICTS
            )
            return "fever" if is_verdict else kind
    return "fever" if row.values.get("claim") is not None else PLAIN


def _common_kind(rows: Sequence[Row]) -> str:
    """The kind of all rows; if they differ, "facts", whose scores suit every row."""
    kinds = {detect_kind(row) for row in rows}
    return kinds.pop() if len(kinds) == 1 else PLAIN


def _ignored(row: Row, fact: Fact) -> Iterable[str]:
    if isinstance(fact, LenientFact):
        return fact.ignored
    if shared_form(row) is not None:
        return ()
    known = names.USED | names.UNUSED | _PUBLISHED_FIELDS
    return [str(name) for name in row.values if names.plain(name) not in known]


def _completed(facts: Sequence[EditRecord | LooseFact], index: int) -> EditRecord:
    """The record at an index. A loose fact gets the next fact as its unrelated one; unlike in a data set, no facts are
    reserved for that."""
    fact = facts[index]
    if isinstance(fact, EditRecord):
        return fact
    lender = facts[(index + 1) % len(facts)]
    truth = lender.truth if isinstance(lender, LooseFact) else None
    return fact.completed(UnrelatedFact(lender.prompt, truth or lender.target))


def _conflicts(records: Sequence[EditRecord]) -> dict[str, int]:
    targets: dict[str, set[str]] = {}
    for record in records:
        targets.setdefault(record.prompt, set()).add(record.target.strip())
    return {prompt: len(texts) for prompt, texts in targets.items() if len(texts) > 1}
