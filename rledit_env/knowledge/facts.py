"""Reads a user's own facts: a JSON Lines file in any published schema, or of prompts and targets alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rledit_env.knowledge import counterfact, fever, zsre
from rledit_env.knowledge.fields import Row
from rledit_env.knowledge.record import EditRecord, KnowledgeError, LeftOut, LooseFact, UnrelatedFact
from rledit_env.knowledge.source import read_file
from rledit_env.knowledge.stream import READERS, KnowledgeDataset

PLAIN = "facts"  # the kind of a file that holds prompts and targets alone
KINDS = (PLAIN, *READERS)
SCHEMAS = {"counterfact": counterfact.SCHEMAS, "zsre": zsre.SCHEMAS, "fever": fever.SCHEMAS}


@dataclass(frozen=True)
class Facts:
    """Facts to edit, in file order, every one of them.

    Attributes:
        dataset: the records; its kind is "facts" for prompts and targets alone, which are scored as ZsRE's are.
        without_paraphrases: how many records had none, so that their own prompt stands in for one.
        without_unrelated: how many records had none, so that a stand-in says nothing about specificity.
        conflicts: prompts that are given more than one target, with the number of their targets.
    """

    dataset: KnowledgeDataset
    without_paraphrases: int
    without_unrelated: int
    conflicts: dict[str, int]


def load_facts(path: str | Path, kind: str | None = None) -> Facts:
    """Read facts to edit from a JSON or JSON Lines file (gzip too).

    Every row needs a `prompt` and a `target`, and may have `subject` (as it is written in the prompt), `paraphrases`
    (a string or a list), `unrelated` (a list of `{"prompt", "answer"}`) and `original`; or it follows one of the
    published schemas of ZsRE, CounterFact or FEVER.

    Args:
        path: the file.
        kind: "facts", "zsre", "counterfact" or "fever"; None tells it by the fields of the first row.

    Raises:
        KnowledgeError: a row cannot be used (with place, field and value), or there is none.
        FileNotFoundError: there is no such file.
        ValueError: the kind is unknown.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind {kind!r} is unknown; it is one of {', '.join(KINDS)}")
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file of facts; check the path")
    rows = []
    for row in read_file(path):
        if isinstance(row, KnowledgeError):
            raise row
        rows.append(row)
    if not rows:
        raise KnowledgeError(f"{path}: no fact in it; give one JSON object a line, such as "
                             '{"prompt": "The capital of Freedonia is", "target": "Sylvania"}')
    kind = kind or detect_kind(rows[0])
    skipped: Counter[str] = Counter()
    facts: list[EditRecord | LooseFact] = []
    for row in rows:
        fact = _read_plain(row) if kind == PLAIN else READERS[kind](row)
        if isinstance(fact, LeftOut):
            skipped[fact.reason] += 1
        else:
            facts.append(fact)
    if not facts:
        raise KnowledgeError(f"{path}: none of its {len(rows)} rows can be edited ({dict(skipped)}); check the file")
    records = tuple(_completed(facts, i) for i in range(len(facts)))
    loose = sum(isinstance(fact, LooseFact) for fact in facts)
    without = sum(kind == PLAIN and not row.values.get("paraphrases") for row in rows)
    lonely = sum(kind == PLAIN and not row.values.get("unrelated") for row in rows)
    dataset = KnowledgeDataset(kind, f"file {path.name}", "eval", records, dict(skipped))
    return Facts(dataset, without, loose + lonely, _conflicts(records))


def detect_kind(row: Row) -> str:
    """Which kind of facts a row belongs to: "facts" if it has a prompt and a target, else the best-fitting schema's.

    Raises:
        KnowledgeError: no schema fits.
    """
    found = {field for field, value in row.values.items() if value is not None}
    if {"prompt", "target"} <= found:
        return PLAIN
    shares = {
        kind: max(len(found.intersection(schema.fields)) / len(schema.fields) for schema in schemas)
        for kind, schemas in SCHEMAS.items()
    }
    best = max(shares, key=lambda kind: shares[kind])
    if shares[best] < 0.5:
        raise row.error(
            "prompt", f"is missing or alone among {', '.join(map(str, row.values)) or 'no fields'}",
            mend="give every row a prompt and a target, or a published schema of ZsRE, CounterFact or FEVER",
        )
    if {"input", "output"} <= found:  # MEND's schema serves ZsRE and FEVER alike; FEVER's answers are verdicts
        verdicts = {*fever.VERDICTS, fever.NOT_ENOUGH_INFO.casefold()}
        return "fever" if zsre.mend_answer(row).casefold() in verdicts else "zsre"
    return best


def _read_plain(row: Row) -> EditRecord:
    prompt, target = row.text("prompt"), row.text("target")
    subject = row.optional_text("subject")
    if subject is not None and subject not in prompt:
        raise row.error("subject", f"does not occur in the prompt {prompt!r}", subject,
                        "write it as in the prompt, or leave it out")
    unrelated = tuple(
        UnrelatedFact(one.text("prompt"), one.text("answer"))
        for one in (row.inners("unrelated") if row.values.get("unrelated") else ())
    )
    return EditRecord(
        prompt=prompt,
        target=target,
        paraphrases=row.texts("paraphrases") if row.values.get("paraphrases") else (prompt,),
        unrelated=unrelated or (UnrelatedFact(prompt, target),),
        original=row.optional_text("original"),
        subject=subject,
        origin=row.where,
    )


def _completed(facts: Sequence[EditRecord | LooseFact], index: int) -> EditRecord:
    """A loose fact with the next one's truth as its unrelated fact: here, unlike in a data set, none is set aside."""
    fact = facts[index]
    if isinstance(fact, EditRecord):
        return fact
    lender = facts[(index + 1) % len(facts)]
    truth = lender.truth if isinstance(lender, LooseFact) else lender.target
    return EditRecord(fact.prompt, fact.target, fact.paraphrases, (UnrelatedFact(lender.prompt, truth),),
                      fact.original, fact.subject, fact.origin)


def _conflicts(records: Sequence[EditRecord]) -> dict[str, int]:
    targets: dict[str, set[str]] = {}
    for record in records:
        targets.setdefault(record.prompt, set()).add(record.target)
    return {prompt: len(given) for prompt, given in targets.items() if len(given) > 1}
