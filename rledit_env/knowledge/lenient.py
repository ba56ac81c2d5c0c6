"""Reads a fact whose parts have any of the published names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rledit_env.knowledge import names
from rledit_env.knowledge.fields import SKIP, SKIP_ROWS, Row, fill_in, row_of
from rledit_env.knowledge.record import EditRecord, ImpliedFact, KnowledgeError, UnrelatedFact
from rledit_env.knowledge.text import with_question_mark

MEND = "give every row a prompt and a target, or a published schema of ZsRE, CounterFact or FEVER"
CHATS = "write a chat's question as prompt and its answer as target, to be put into the model's chat template"
_TEXT_KEYS = ("str", "text", "answer", "name", "label")  # keys of the text in an object, such as ROME's {"str": …}


@dataclass(frozen=True)
class LenientFact:
    """A record, and which of its parts the row has.

    Attributes:
        record: the fact.
        has_paraphrases, has_unrelated: whether the row has them; otherwise the record has stand-ins.
        ignored: the row's fields that are not used.
    """

    record: EditRecord
    has_paraphrases: bool
    has_unrelated: bool
    ignored: tuple[str, ...]


def read_fact(row: Row) -> LenientFact:
    """Read one row that has at least a prompt and a target.

    Raises:
        KnowledgeError: the prompt or the target is missing, or a field is empty, of the wrong type, or lacks its
            counterpart.
    """
    fields = _Fields(row)
    prompt_field, target_field = fields.first(names.PROMPT), fields.first(names.TARGET)
    if prompt_field is None or target_field is None:
        raise _missing(row, "prompt" if prompt_field is None else "target")
    wordings = fields.texts(prompt_field)
    if not wordings:
        raise row.error(prompt_field, "is empty", row.values[prompt_field])
    subject = fields.optional_text(names.SUBJECT)
    subject = None if subject is None else subject.strip()
    prompt, start = fill_in(row, prompt_field, wordings[0], subject)
    target = fields.text(target_field)
    original = fields.optional_text(names.ORIGINAL)
    paraphrases = [*wordings[1:], *(text for field in fields.all(names.PARAPHRASES) for text in fields.texts(field))]
    unrelated = [UnrelatedFact(with_question_mark(asked), answer) for asked, answer in fields.unrelated(original)]
    implied = tuple(ImpliedFact(asked, answer) for asked, answer in fields.facts(names.IMPLIED, names.IMPLIED_PAIRS))
    record = EditRecord(
        prompt=prompt,
        target=target,
        paraphrases=tuple(fill_in(row, "paraphrases", text, subject)[0] for text in paraphrases) or (prompt,),
        unrelated=tuple(unrelated) or (UnrelatedFact(prompt, target),),
        original=original,
        subject=subject,
        origin=row.where,
        implied=implied,
        subject_start=start,
    )
    return LenientFact(record, bool(paraphrases), bool(unrelated), fields.ignored())


def is_fact(values: Mapping[str, object]) -> bool:
    """Whether an object has fields for a prompt and a target, or is a fact of a published schema."""
    known = {names.plain(name) for name, value in values.items() if value is not None}
    plain = known.intersection(names.PROMPT) and known.intersection(names.TARGET)
    return bool(plain or names.REWRITE in known or {"claim", "label"} <= known)


def _missing(row: Row, part: str) -> KnowledgeError:
    known = names.PROMPT if part == "prompt" else names.TARGET
    near = ((name, names.did_you_mean(name, known)) for name in row.values if names.plain(name) not in names.USED)
    guess = next((f"; did you mean {meant!r} by {name!r}?" for name, meant in near if meant), "")
    has = ", ".join(str(name) for name, value in row.values.items() if value is not None) or "no fields"
    mend = CHATS if set(map(names.plain, row.values)) & {"messages", "conversations", "role"} else MEND
    return row.error(part, f"is missing among {has}{guess}", mend=mend)


class _Fields:
    """Access to a row's fields by published names in any spelling; remembers which fields have been used."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.spelled = {names.plain(name): name for name, value in row.values.items() if value is not None}
        self.used: set[str] = set()

    def first(self, candidates: Sequence[str]) -> str | None:
        """The first of these names that is an unused field of the row, in the row's spelling."""
        return next(iter(self.all(candidates, at_most=1)), None)

    def all(self, candidates: Sequence[str], at_most: int | None = None) -> list[str]:
        """All of these names that are unused fields of the row, in the row's spelling."""
        unused = [self.spelled[name] for name in candidates if self.spelled.get(name, None) not in (None, *self.used)]
        self.used.update(unused[:at_most])
        return unused[:at_most]

    def ignored(self) -> tuple[str, ...]:
        """The fields that were not used, except those that published code does not use either."""
        rest = {name: value for name, value in self.row.values.items() if name not in self.used and value}
        return tuple(str(name) for name in rest if names.plain(name) not in names.UNUSED)

    def optional_text(self, candidates: Sequence[str]) -> str | None:
        """:meth:`text` of the first of these names, or None if there is no such field or it is empty."""
        field = self.first(candidates)
        return self.text(field) if field is not None and _first(self.row.values[field]) else None

    def text(self, field: str) -> str:
        """The text of a field, or the first of a list or object of texts."""
        return _checked(self.row, field, _first(self.row.values[field]))

    def texts(self, field: str) -> list[str]:
        """All texts of a field; an object in a list counts as the text in it."""
        value = self.row.values[field]
        entries = value if isinstance(value, (list, tuple)) else [value]
        return [_checked(self.row, field, _first(entry)) for entry in entries]

    def unrelated(self, original: str | None) -> Iterator[tuple[str, str]]:
        """Prompts and answers that should not change, from all fields that can contain them."""
        yield from self.facts(names.UNRELATED, names.UNRELATED_PAIRS)
        for field in self.all([names.NEIGHBOURS]):
            if original is None:
                raise self.row.error(field, "have no answer, as the row does not say what was true before the edit")
            yield from ((prompt, original) for prompt in self.texts(field))

    def facts(self, groups: Sequence[str], pairs: Sequence[names.Pair]) -> Iterator[tuple[str, str]]:
        """Prompts and answers from the fields named in ``groups``, which contain objects, and from pairs of fields."""
        for field in self.all(groups):
            yield from _facts_in(self.row.values[field], self.row, field)
        for asked, answered in pairs:
            prompts, answers = self.first(asked), self.first(answered)
            if prompts is not None and answers is not None:
                yield from _paired(self.row, prompts, self.row.values[prompts], answers, self.row.values[answers])
            elif prompts is not None:
                raise self.row.error(answered[0], "is missing", mend=f"{prompts!r} needs it; {SKIP}")


def _facts_in(value: object, row: Row, path: str) -> Iterator[tuple[str, str]]:
    """The facts in a list of objects, in one object, in an object of parallel lists, or in named groups of these."""
    if isinstance(value, (list, tuple)):
        for i, entry in enumerate(value):
            yield from _facts_in(entry, row, f"{path}[{i}]")
    elif isinstance(value, Mapping):
        spelled = {names.plain(name): name for name, inner in value.items() if inner is not None}
        asked = next((spelled[name] for name in names.INNER_PROMPT if name in spelled), None)
        answered = next((spelled[name] for name in names.INNER_ANSWER if spelled.get(name, asked) != asked), None)
        if asked is not None and not isinstance(value[asked], Mapping):
            if answered is None:
                raise row.error(f"{path}.answer", "is missing")
            yield from _paired(row, f"{path}.{asked}", value[asked], f"{path}.{answered}", value[answered])
        elif answered is not None and not isinstance(value[answered], Mapping):
            if not set(map(names.plain, value)).intersection(names.INNER_PROMPT):  # a prompt that is None means no fact
                raise row.error(f"{path}.prompt", "is missing")
        else:
            for name, group in value.items():
                yield from _facts_in(group, row, f"{path}.{name}")
    elif value is not None and value != "":
        raise row.error(path, "is not an object with a prompt and an answer", value)


def _paired(row: Row, asked: str, prompts: object, answered: str, answers: object) -> Iterator[tuple[str, str]]:
    """One prompt with its answer (the first of several), or a list of prompts with a list of answers. Entries without
    an answer are left out."""
    if not isinstance(prompts, (list, tuple)):
        prompts, answers = [prompts], [answers]
    elif len(prompts) == 1 and not (isinstance(answers, (list, tuple)) and len(answers) == 1):
        answers = [answers]
    elif not isinstance(answers, (list, tuple)) or len(answers) != len(prompts):
        count = len(answers) if isinstance(answers, (list, tuple)) else 1
        raise row.error(answered, f"has {count} answers for {len(prompts)} prompts")
    for prompt, answer in zip(prompts, answers, strict=True):
        if _first(prompt) and _first(answer):
            yield _checked(row, asked, _first(prompt)), _checked(row, answered, _first(answer))


def _first(value: object) -> object:
    """The text in a value: the value itself, the first text of a list, or an object's text; None if there is none."""
    while isinstance(value, (list, tuple, Mapping)):
        if isinstance(value, Mapping):
            value = next((value[key] for key in _TEXT_KEYS if value.get(key) is not None), None)
        else:
            value = value[0] if value else None
    return value


def _checked(row: Row, field: str, value: object) -> str:
    if isinstance(value, bool):
        mend = f"write it as it is to be answered, in quotes, or {SKIP_ROWS}"
        raise row.error(field, f"is {str(value).lower()}, which is no text", mend=mend)
    if value is None:
        raise row.error(field, "is empty")
    return Row({field: value}, row.where, row.path).text(field)


# -- objects with several facts --------------------------------------------------------------------------------------


def facts_of(row: Row) -> Iterator[Row]:
    """The facts of a row, one row each: the row itself, its requested rewrites, or the entries of its parallel lists.

    Raises:
        KnowledgeError: columns of different lengths.
    """
    spelled = {names.plain(name): name for name, value in row.values.items() if value is not None}
    rewrites = row.values.get(spelled.get(names.REWRITE, ""))
    if rewrites:
        rest = {name: value for name, value in row.values.items() if names.plain(name) != names.REWRITE}
        for rewrite in rewrites if isinstance(rewrites, (list, tuple)) else [rewrites]:
            if not isinstance(rewrite, Mapping):
                raise row.error(names.REWRITE, "is not an object", rewrite)
            yield Row({**rest, **rewrite}, row.where)
        return
    asked = next((spelled[name] for name in names.PROMPT if name in spelled), "")
    answered = next((spelled[name] for name in names.TARGET if name in spelled and spelled[name] != asked), "")
    columns = {name: _column(value) for name, value in row.values.items()}
    prompts = columns.get(asked)
    if isinstance(prompts, list) and isinstance(columns.get(answered), list):
        count = len(prompts)
        for i in range(count):
            cells = {name: _cell(value, i, count, row, name) for name, value in columns.items()}
            yield Row(cells, f"{row.where}, entry {i}")
    else:
        yield row


def _column(value: object) -> object:
    """A column as a list; pandas writes a column as an object with one key for each row."""
    if isinstance(value, Mapping) and value and all(str(key).isdigit() for key in value):
        return list(value.values())
    return value


def _cell(value: object, index: int, count: int, row: Row, path: str) -> object:
    if isinstance(value, Mapping):
        return {name: _cell(inner, index, count, row, f"{path}.{name}") for name, inner in value.items()}
    if not isinstance(value, list):
        return value
    if len(value) != count:
        raise row.error(path, f"has {len(value)} entries for {count} prompts")
    return value[index]


def unwrapped(rows: Sequence[Row | KnowledgeError]) -> Sequence[Row | KnowledgeError]:
    """The rows. A single row that is not a fact, but contains a list or an object of facts, is replaced by these.

    Raises:
        KnowledgeError: the row contains several such lists.
    """
    (row, *others) = rows
    if others or isinstance(row, KnowledgeError) or is_fact(row.values):
        return rows
    values, where = row.values, row.where
    objects = {name: value for name, value in values.items() if isinstance(value, Mapping)}
    if len(objects) == len(values) and any(map(is_fact, objects.values())):
        return [Row(value, f"{where}, entry {name!r}") for name, value in objects.items()]
    lists = {name: entries for name, value in values.items() if (entries := _objects_in(value))}
    if not lists:
        return rows
    if len(lists) > 1:
        raise KnowledgeError(f"{where}: holds several lists of facts, {', '.join(lists)}; write the one that is meant "
                             "to a file of its own", reason="several lists of facts")
    ((name, entries),) = lists.items()
    return [row_of(entry, f"{where}, entry {i} of {name!r}") for i, entry in enumerate(entries)]


def _objects_in(value: object) -> list[object]:
    """The entries of a list that begins with an object, or the values of an object of facts; else an empty list."""
    if isinstance(value, Mapping):
        entries = list(value.values())
        return entries if entries and isinstance(entries[0], Mapping) and is_fact(entries[0]) else []
    return value if isinstance(value, list) and value and isinstance(value[0], Mapping) else []


def with_numbers_as_text(value: object) -> object:
    """The value with its numbers as text (an answer may be 1987); truth values are not changed, NaN becomes None."""
    if isinstance(value, Mapping):
        return {name: with_numbers_as_text(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [with_numbers_as_text(inner) for inner in value]
    if value != value:  # NaN: a table's empty cell
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return value
