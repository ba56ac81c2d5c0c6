"""Checked access to the fields of a row, and the choice of the published schema that a row follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rledit_env.knowledge.record import EditRecord, KnowledgeError, LeftOut, LooseFact, shown

Facts = EditRecord | LooseFact | LeftOut | tuple[EditRecord | LooseFact, ...]
SKIP_ROWS = "pass on_error='skip' to leave such rows out"
SKIP = f"correct it, or {SKIP_ROWS}"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data set, or an object nested in one.

    Attributes:
        values: the row's fields; a field whose value is None or NaN counts as absent (JSON's null, a table's empty
            cell).
        where: the row's place, such as "zsre_train.jsonl, line 17".
        path: the nested object's own path within the row, such as "locality.".

    Every accessor raises `KnowledgeError` naming place, field and value. Texts are returned unchanged and never empty.
    """

    values: Mapping[str, object]
    where: str
    path: str = ""

    def error(self, field: str, problem: str, value: object = None, mend: str = SKIP) -> KnowledgeError:
        """The error to raise for `field`."""
        value_text = "" if value is None else f" ({shown(value)})"
        message = f"{self.where}, field '{self.path}{field}': {problem}{value_text}; {mend}"
        return KnowledgeError(message, reason=f"field '{self.path}{field}' {problem}")

    def has(self, field: str) -> bool:
        """Whether the field holds anything: not None, not NaN, no blank text and no empty list or object."""
        value = self.values.get(field)
        return bool(value.strip() if isinstance(value, str) else value) and value == value  # NaN differs from itself

    def get(self, field: str) -> object:
        """The raw value."""
        value = self.values.get(field)
        if value is None or value != value:
            raise self.error(field, "is missing")
        return value

    def text(self, field: str) -> str:
        """A string."""
        return self._checked(field, self.get(field))

    def optional_text(self, field: str) -> str | None:
        """A string, or None if the field is absent."""
        return None if self.values.get(field) is None else self.text(field)

    def subject(self, field: str = "subject") -> str | None:
        """The subject of the fact, without white space at the ends; None if the field is absent."""
        name = self.optional_text(field)
        return None if name is None else name.strip()

    def texts(self, field: str) -> tuple[str, ...]:
        """A string or a list of strings, as a tuple of at least one string."""
        value = self.get(field)
        if isinstance(value, str):
            return (self._checked(field, value),)
        return tuple(self._checked(field, entry) for entry in self._filled(field, value))

    def first_text(self, field: str) -> str:
        """A string, or the first string of a list (published answers are lists of aliases, at times nested)."""
        value = self.get(field)
        while not isinstance(value, str):
            value = self._filled(field, value)[0]
        return self._checked(field, value)

    def inner(self, field: str) -> Row:
        """A nested object."""
        value = self.get(field)
        if not isinstance(value, Mapping):
            raise self.error(field, "is not an object", value)
        return Row(value, self.where, f"{self.path}{field}.")

    def inners(self, field: str) -> tuple[Row, ...]:
        """A list of at least one nested object."""
        entries = self._filled(field, self.get(field))
        for entry in entries:
            if not isinstance(entry, Mapping):
                raise self.error(field, "holds something that is not an object", entry)
        return tuple(Row(entry, self.where, f"{self.path}{field}[{i}].") for i, entry in enumerate(entries))

    def _filled(self, field: str, value: object) -> Sequence[Any]:
        if not isinstance(value, (list, tuple)):
            raise self.error(field, f"has the wrong type {type(value).__name__}", value)
        if not value:
            raise self.error(field, "is empty", value)
        return value

    def _checked(self, field: str, value: object) -> str:
        if not isinstance(value, str):
            raise self.error(field, f"has the wrong type {type(value).__name__}", value, f"give a string, or {SKIP}")
        if not value.strip():
            raise self.error(field, "is empty", value)
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can contain half a surrogate pair, which no tokenizer accepts
            raise self.error(field, "is not valid Unicode text", value) from error
        return value


def row_of(value: object, where: str) -> Row | KnowledgeError:
    """An object as a row; for anything else an error, which the caller raises or counts."""
    if isinstance(value, Mapping):
        return Row(value, where)
    return KnowledgeError(f"{where}: not an object ({shown(value)}); {SKIP}", reason="not an object")


@dataclass(frozen=True, slots=True)
class Schema:
    """A published form of a data set.

    Attributes:
        name: the data set and the form.
        fields: the fields that a row must have.
        read: the function that reads a row.
        recognised: whether a row follows the form; None: it does if it has all the fields.
    """

    name: str
    fields: tuple[str, ...]
    read: Callable[[Row], Facts]
    recognised: Callable[[Row], bool] | None = None

    def fits(self, row: Row) -> bool:
        """Whether a row follows the form."""
        if self.recognised is not None:
            return self.recognised(row)
        return all(row.values.get(field) is not None for field in self.fields)


def named(*fields: str) -> Callable[[Row], bool]:
    """Recognises rows with all of these fields, of which some, but not all, may be null."""
    return lambda row: row.values.keys() >= set(fields) and any(row.has(field) for field in fields)


def read_by_schema(row: Row, schemas: Sequence[Schema], further: str = "") -> Facts:
    """Read a row by the schema with the largest share of its fields in the row (of equals, the first). `further`: what
    else could have been read, for the error message.

    Raises:
        KnowledgeError: the row has less than half of the fields of every schema, or lacks one of its schema's fields.
    """
    present = [field for field, value in row.values.items() if value is not None]

    def share(schema: Schema) -> float:
        return sum(field in present for field in schema.fields) / len(schema.fields)

    schema = max(schemas, key=share)
    if share(schema) < 0.5:
        known = "; ".join(f"{other.name}: {', '.join(other.fields)}" for other in schemas)
        raise KnowledgeError(
            f"{row.where}: unknown schema, with the fields {', '.join(map(str, present)) or '(none)'}; "
            f"the schemas known for this data set are {known}{further}",
            reason="unknown schema",
        )
    for field in schema.fields:
        if field not in present:
            guess = f"the row looks like {schema.name} ({', '.join(schema.fields)}) and has {', '.join(present)}"
            raise row.error(field, "is missing", mend=f"{guess}; {SKIP}")
    return schema.read(row)


def fill_in(row: Row, field: str, template: str, subject: str | None) -> tuple[str, int | None]:
    """A prompt with every ``{}`` replaced by the subject, and the subject's place, that of the first ``{}``. A prompt
    without ``{}`` is returned unchanged, with None.

    Raises:
        KnowledgeError: there is a ``{}``, but no subject.
    """
    place = template.find("{}")
    if place < 0:
        return template, None
    if subject is None:
        raise row.error(field, "has a {} for the subject, but the row names none", template)
    return template.replace("{}", subject), place
