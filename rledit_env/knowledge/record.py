"""EditRecord, one fact to edit, which every reader returns; and its validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rledit_env.knowledge.text import find_subject


class KnowledgeError(ValueError):
    """A row, a file or a data set cannot be used.

    The message reads "<place>, field '<field>': <problem> (<value>); <advice>".

    Attributes:
        reason: the problem without the place, by which skipped rows are counted.
    """

    def __init__(self, message: str, reason: str = "unusable data") -> None:
        super().__init__(message)
        self.reason = reason


def shown(value: object, limit: int = 80) -> str:
    """`repr(value)`, cut to `limit` characters, for error messages."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


@dataclass(frozen=True, slots=True)
class UnrelatedFact:
    """A fact that the edit must not change (x', y' of the paper), with the data set's answer.

    `group` is the data set's own name for facts of its kind, such as "Forgetfulness"; scores are also reported by it.
    """

    prompt: str
    answer: str
    group: str | None = None


@dataclass(frozen=True, slots=True)
class ImpliedFact:
    """A fact that follows from an edit, such as the answer for another name of its subject.

    Attributes:
        prompt, answer: the fact.
        group: the data set's own name for facts of its kind, such as "multi_hop"; scores are also reported by it.
        needs: prompts and targets of the other edits that it follows from together with this one. It is scored only
            where all of them are edited.
    """

    prompt: str
    answer: str
    group: str | None = None
    needs: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class EditRecord:
    """One fact to edit. Texts are unchanged; `TextEncoder` joins prompts and answers as the model needs it.

    Attributes:
        prompt: the edit prompt x.
        target: the new answer y*.
        paraphrases: x~, other wordings of the prompt that must give the target too; at least one.
        unrelated: (x', y'), facts that must not change; at least one.
        original: the answer before the edit, if the schema has it; CounterFact's metrics compare with it.
        subject: the subject of the fact, if the schema has it.
        subject_start: the subject's first character in the prompt, if the schema gives it (the place of its ``{}``).
        lead: number of characters of a chat template before the prompt's own words.
        origin: the record's place, such as "zsre_train.jsonl, line 17"; used in error messages.
        implied: facts that follow from the edit, if the schema has them (KnowEdit's portability); only for scores.
        variants: the fact itself, asked in a way that has a name, its group: a persona's, another language's; only for
            scores.
        lacks: "paraphrases" if the data set has none for this fact. Its own prompt stands in, and Generalization is not
            scored.

    Raises:
        KnowledgeError: a prompt or answer is not a non-empty string, or there is no paraphrase or no unrelated fact.
    """

    prompt: str
    target: str
    paraphrases: tuple[str, ...]
    unrelated: tuple[UnrelatedFact, ...]
    original: str | None = None
    subject: str | None = None
    origin: str = ""
    implied: tuple[ImpliedFact, ...] = ()
    subject_start: int | None = None
    lead: int = 0
    variants: tuple[ImpliedFact, ...] = ()
    lacks: tuple[str, ...] = ()

    @property
    def subject_span(self) -> tuple[int, int] | None:
        """The subject's first character in the prompt and the end of the subject, by the schema or else by
        `find_subject`; None if the prompt does not contain the subject."""
        if self.subject is None:
            return None
        start = find_subject(self.prompt, self.subject) if self.subject_start is None else self.subject_start
        return None if start is None else (start, start + len(self.subject))

    def __post_init__(self) -> None:
        _require(isinstance(self.paraphrases, tuple) and self.paraphrases, self.origin, "paraphrases", self.paraphrases)
        _require(isinstance(self.unrelated, tuple) and self.unrelated, self.origin, "unrelated", self.unrelated)
        texts = [("prompt", self.prompt), ("target", self.target)]
        texts += [("paraphrases", text) for text in self.paraphrases]
        texts += [("unrelated", text) for fact in self.unrelated for text in (fact.prompt, fact.answer)]
        texts += [("implied", text) for fact in self.implied for text in (fact.prompt, fact.answer)]
        texts += [("variants", text) for fact in self.variants for text in (fact.prompt, fact.answer)]
        for field, text in texts:
            _require(isinstance(text, str) and text.strip(), self.origin, field, text)


@dataclass(frozen=True, slots=True)
class LooseFact:
    """An edit from a schema without unrelated facts; `pairing.pair` gives it another row's.

    `truth` is the true answer to `prompt`, for use as another fact's unrelated fact; None if the schema does not say.
    The other attributes are those of `EditRecord`.
    """

    prompt: str
    target: str
    paraphrases: tuple[str, ...]
    truth: str | None
    original: str | None = None
    subject: str | None = None
    origin: str = ""
    implied: tuple[ImpliedFact, ...] = ()
    subject_start: int | None = None
    variants: tuple[ImpliedFact, ...] = ()
    lacks: tuple[str, ...] = ()

    def completed(self, unrelated: UnrelatedFact) -> EditRecord:
        """The record, with another row's fact as its unrelated one."""
        return EditRecord(
            self.prompt, self.target, self.paraphrases, (unrelated,), self.original, self.subject, self.origin,
            self.implied, self.subject_start, variants=self.variants, lacks=self.lacks,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row that the data set's published code leaves out, too; it is not an error, but counted under `reason`."""

    reason: str


def assembled(
    prompt: str, target: str, paraphrases: Sequence[str], unrelated: Sequence[UnrelatedFact], truth: str | None = None,
    **rest: Any,
) -> EditRecord | LooseFact:  # fmt: skip
    """A fact of a data set that may lack paraphrases or unrelated facts.

    Without paraphrases the fact's own prompt stands in. Without unrelated facts it is a loose fact, which borrows
    another row's; `truth` is what it lends itself. `rest`: further attributes of `EditRecord`.
    """
    if not paraphrases:
        rest["lacks"] = ("paraphrases",)
    wordings = tuple(paraphrases) or (prompt,)
    if unrelated:
        return EditRecord(prompt, target, wordings, tuple(unrelated), **rest)
    return LooseFact(prompt, target, wordings, truth, **rest)


def _require(condition: object, origin: str, field: str, value: object) -> None:
    if not condition:
        mend = "a tuple with at least one entry" if field in ("paraphrases", "unrelated") else "a non-empty string"
        raise KnowledgeError(
            f"{origin or 'edit record'}, field '{field}': empty or of the wrong type ({shown(value)}); give {mend}",
            reason=f"empty or wrong field '{field}'",
        )
