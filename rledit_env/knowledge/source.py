"""Finds a data set's rows in a file, a folder, a mapping, a list or on the hub, and reads them with their places."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rledit_env.knowledge import hub
from rledit_env.knowledge.content import (
    MORE_CELLS,
    PARQUET,
    parquet_values,
    table_rows,
    unpacked,
    yaml_values,
)
from rledit_env.knowledge.fields import SKIP, SKIP_ROWS, Row, row_of
from rledit_env.knowledge.record import KnowledgeError, shown

BUNDLED = Path(__file__).parent / "bundled"
PUBLISHED = {"zsre": "ZsRE", "counterfact": "CounterFact", "fever": "FEVER"}
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
SPLITS = {"train": "train", "eval": "eval", "test": "eval", "validation": "eval", "dev": "eval"}

Data = str | os.PathLike[str] | Mapping[str, object] | Iterable[Mapping[str, object]]
Rows = Iterator[Row | KnowledgeError]


def split_name(split: str) -> str:
    """The split's own name, "train" or "eval"; "test", "validation" and "dev" stand for "eval".

    Raises:
        ValueError: any other name.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; it is one of {', '.join(SPLITS)}")
    return SPLITS[split]


def find_rows(kind: str, data: Data, split: str) -> tuple[str, Rows]:
    """A description of the source of `split`'s rows, and the rows.

    In place of a row that cannot be read there is an error, which the caller raises or counts.

    Raises:
        KnowledgeError: `data` is not readable, or lacks the split.
    """
    if isinstance(data, Mapping):
        return find_rows(kind, _of_split(data, split), split)
    if isinstance(data, (str, os.PathLike)):
        return _find_named(kind, os.fspath(data), split)
    if not isinstance(data, Iterable):
        raise KnowledgeError(f"data is {shown(data)}; give a path, a hub id, a mapping of splits or a list of rows")
    rows = list(data)
    return f"list of {len(rows)} dictionaries", (row_of(value, f"list item {i}") for i, value in enumerate(rows))


def _find_named(kind: str, name: str, split: str) -> tuple[str, Rows]:
    if name == "bundled":
        path = _in_folder(BUNDLED, kind, split)
        if path is None:
            raise KnowledgeError(f"the bundled data {kind}_{split} is missing from {BUNDLED}; reinstall the package")
        return f"bundled sample (open fact tables; not the published {PUBLISHED[kind]})", read_file(path, "bundled ")
    path = Path(name).expanduser()
    if path.is_dir():
        file = _in_folder(path, kind, split)
        if file is not None:
            return f"file {file.name}", read_file(file)
        place, rows = hub.open_folder(path, split, hint=f"{kind}_{split}.jsonl")
    elif path.exists():
        return f"file {path.name}", read_file(path)
    elif name.endswith(SUFFIXES) or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise KnowledgeError(f"{name}: there is no such file or folder; check the path", reason="no such file")
    else:
        place, rows = hub.open_hub(kind, name, split)
    return place, (row_of(value, f"{place}, row {i}") for i, value in enumerate(rows))


def _of_split(data: Mapping[str, Any], split: str) -> Any:
    unknown = [name for name in data if name not in SPLITS]
    if unknown:
        raise KnowledgeError(
            f"data has the key {unknown[0]!r}, which is no split; its keys are among {', '.join(SPLITS)} "
            "(a single record goes in a list)"
        )
    for name in sorted(data, key=lambda name: name != split):  # the split's own name before its aliases
        if SPLITS[name] == split:
            return data[name]
    raise KnowledgeError(f"data has no split {split!r}, only {', '.join(data) or 'none'}; add it")


def _in_folder(folder: Path, kind: str, split: str) -> Path | None:
    paths = (folder / f"{kind}_{split}{suffix}" for suffix in SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def read_file(path: Path, label: str = "") -> Rows:
    """The rows of a file of any name: JSON Lines, a JSON list, JSON objects one after the other, a table with a heading
    (CSV), YAML or Parquet; uncompressed or compressed with gzip, bzip2 or xz; in UTF-8 or UTF-16.

    Blank lines are skipped. `label` precedes the file's name in every row's place.

    Raises:
        KnowledgeError: the file cannot be read or has another form, or it ends in the middle of a list.
    """
    place = label + path.name
    content = unpacked(path)
    if content.startswith(PARQUET):
        return (row_of(value, f"{place}, row {i}") for i, value in enumerate(parquet_values(path)))
    start = content.lstrip()[:1]
    if start == b"[" or (start == b"{" and _spans_lines(content)):
        return _read_values(content, place)
    if start != b"{":
        if (table := table_rows(content, path)) is not None:
            return (_table_row(values, f"{place}, line {line}") for values, line in table)
        if (values := yaml_values(content, path)) is not None:
            return (row_of(value, f"{place}, entry {i}") for i, value in enumerate(values))
    return _read_lines(content, place)


def _spans_lines(content: bytes) -> bool:
    """Whether the file's first object spans several lines."""
    text = content.lstrip().decode("utf-8", errors="replace")
    try:
        json.loads(text.split("\n", 1)[0])
        return False
    except (json.JSONDecodeError, RecursionError):
        pass
    try:
        json.JSONDecoder().raw_decode(text)
        return True
    except (json.JSONDecodeError, RecursionError):
        return False


def _table_row(values: dict[str, object], where: str) -> Row | KnowledgeError:
    count = values.pop(MORE_CELLS, None)
    if count is None:
        return Row(values, where)
    problem = f"has {count} cells for {len(values)} columns"
    return KnowledgeError(f"{where}: {problem}; put quotes around a text that holds the delimiter, or {SKIP}",
                          reason="more cells than columns")


def _read_lines(content: bytes, place: str) -> Rows:
    for number, line in enumerate(content.split(b"\n"), start=1):
        where = f"{place}, line {number}"
        if not line.strip():
            continue
        try:
            yield row_of(json.loads(line.decode("utf-8")), where)
        except UnicodeDecodeError as error:
            yield _bad_utf8(where, error, SKIP)
        except (json.JSONDecodeError, RecursionError) as error:
            mend = SKIP
            if line.lstrip().startswith(b"{'"):
                mend = f"this is Python's spelling of a dictionary: write it with json.dumps, or {SKIP_ROWS}"
            yield KnowledgeError(f"{where}: malformed JSON ({error}: {shown(line)}); {mend}", reason="malformed JSON")


def _read_values(content: bytes, place: str) -> Rows:
    """The entries of JSON lists and objects one after the other, each with its line. Reading ends with an error at the
    first malformed one."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _bad_utf8(f"{place}, line {line}", error, "save the file as UTF-8") from error
    decoder = json.JSONDecoder()
    at, line, line_at, inside, separated = 0, 1, 0, False, True  # line_at: the position to which lines are counted
    while True:
        at = _skip_space(text, at)
        if at == len(text):
            break
        line, line_at = line + text.count("\n", line_at, at), at
        where = f"{place}, line {line}"
        if text[at] == "[" and not inside:
            at, inside, separated = at + 1, True, True
        elif text[at] == "]" and inside:
            at, inside, separated = at + 1, False, True
        elif text[at] == "," and not separated:
            at, separated = at + 1, True
        elif inside and not separated:
            raise KnowledgeError(f"{where}: malformed JSON (the list breaks off before this); correct the file",
                                 reason="malformed JSON")
        else:
            try:
                value, at = decoder.raw_decode(text, at)
            except (json.JSONDecodeError, RecursionError) as error:
                message = f"{where}: malformed JSON ({error}); correct the file"
                raise KnowledgeError(message, reason="malformed JSON") from error
            separated = False
            yield row_of(value, where)
    if inside:
        raise KnowledgeError(f"{place}, line {line}: malformed JSON (the list breaks off after this entry); correct "
                             "the file", reason="malformed JSON")


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _bad_utf8(where: str, error: UnicodeDecodeError, mend: str) -> KnowledgeError:
    byte = error.object[error.start]
    return KnowledgeError(f"{where}: bad UTF-8 (byte 0x{byte:02x}); {mend}", reason="bad UTF-8")
