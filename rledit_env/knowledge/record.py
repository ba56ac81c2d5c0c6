"""EditRecord, one fact to edit, as every reader makes it and all else uses it; and its validation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rledit_env.knowledge.text import find_subject


class KnowledgeError(ValueError):
    """A row, a file or a data set that cannot be used as it is.

    The message reads "<place>, field '<field>': <what is wrong> (<value>); <mend>".

    Attributes:
        reason: what is wrong without the place, so that skipped rows can be counted per reason.
    """

    def __init__(self, message: str, reason: str = "unusable data") -> None:
        super().__init__(message)
        self.reason = reason


def shown(value: Any, limit: int = 80) -> str:
    """`repr(value)`, cut to `limit` characters, for error messages."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


@dataclass(frozen=True, slots=True)
class UnrelatedFact:
    """A fact that the edit must leave alone (x', y' of the paper), with the data set's own answer."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class ImpliedFact:
    """What follows from an edit, such as the answer for another name of its subject: a prompt and its answer."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class EditRecord:
    """One fact to edit. Texts are as they were given; `TextEncoder` joins prompts and answers as the model needs it.

    Attributes:
        prompt: the edit prompt x.
        target: the new answer y*.
        paraphrases: x~, other wordings of the prompt that must give the target too; at least one.
        unrelated: (x', y'), facts that must not change; at least one.
        original: the answer before the edit, where the schema has it; CounterFact's metrics compare with it.
        subject: what the fact is about, where the schema has it.
        subject_start: where the subject begins in the prompt, if the schema says so (the place of its ``{}``).
        lead: how many characters of a chat template come before the prompt's own words.
        origin: where the record came from, such as "zsre_train.jsonl, line 17"; used in error messages.
        implied: what follows from the edit, where the schema has it (KnowEdit's portability); used in scores only.

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

    @property
    def subject_span(self) -> tuple[int, int] | None:
        """Where the subject begins in the prompt and where it ends: the place that the schema gives, or else that of
        `find_subject`; None where the prompt does not contain it."""
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
        for field, text in texts:
            _require(isinstance(text, str) and text.strip(), self.origin, field, text)


@dataclass(frozen=True, slots=True)
class LooseFact:
    """An edit from a schema without unrelated facts; `pairing.pair` gives it another row's.

    `truth` is the true answer to `prompt`, which is used when this fact serves as another's unrelated fact. The other
    attributes are `EditRecord`'s.
    """

    prompt: str
    target: str
    paraphrases: tuple[str, ...]
    truth: str
    original: str | None = None
    subject: str | None = None
    origin: str = ""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row that the data set's published code leaves out, too: no error, but counted under `reason`."""

    reason: str


def _require(holds: Any, origin: str, field: str, value: Any) -> None:
    if not holds:
        wanted = "a tuple with at least one entry" if field in ("paraphrases", "unrelated") else "a non-empty string"
        raise KnowledgeError(
            f"{origin or 'edit record'}, field '{field}': empty or of the wrong type ({shown(value)}); give {wanted}",
            reason=f"empty or wrong field '{field}'",
        )
