"""Finds a data set's rows in a file, a folder, a mapping, a list or on the hub, and reads them with their places."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
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
from rledit_env.knowledge.fields import SKIP, Row, row_of
from rledit_env.knowledge.record import KnowledgeError, shown
from rledit_env.knowledge.scanning import Spans, scan_lines, scan_values

BUNDLED = Path(__file__).parent / "bundled"
PUBLISHED = {"zsre": "ZsRE", "counterfact": "CounterFact", "fever": "FEVER"}
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
SPLITS = {"train": "train", "eval": "eval", "test": "eval", "validation": "eval", "dev": "eval"}

LARGE = 32 << 20  # bytes; a JSON file of this size is read row by row, a smaller one whole
HEAD = 1 << 16  # bytes at the beginning of a large file by which its form is recognised

Data = str | os.PathLike[str] | Mapping[str, object] | Iterable[Mapping[str, object]]
Rows = Iterator[Row | KnowledgeError]


@dataclass(frozen=True)
class Source:
    """Where a split's rows come from.

    Attributes:
        description: what it is, for logs and errors.
        rows: the rows. In place of a row that cannot be read there is an error, which the caller raises or counts.
        file: the path, place and spans of a large JSON file, in which the rows can be read again; the spans grow as
            the rows are read.
        is_held: whether the rows are in memory anyway, such as a list's.
    """

    description: str
    rows: Rows
    file: tuple[Path, str, Spans] | None = None
    is_held: bool = False


def split_name(split: str) -> str:
    """The split's own name, "train" or "eval"; "test", "validation" and "dev" stand for "eval".

    Raises:
        ValueError: any other name.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; it is one of {', '.join(SPLITS)}")
    return SPLITS[split]


def find_rows(kind: str, data: Data, split: str) -> Source:
    """The source of `split`'s rows.

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
    read = (row_of(value, f"list item {i}") for i, value in enumerate(rows))
    return Source(f"list of {len(rows)} dictionaries", read, is_held=True)


def _find_named(kind: str, name: str, split: str) -> Source:
    if name == "bundled":
        path = _in_folder(BUNDLED, kind, split)
        if path is None:
            raise KnowledgeError(f"the bundled data {kind}_{split} is missing from {BUNDLED}; reinstall the package")
        description = f"bundled sample (open fact tables; not the published {PUBLISHED[kind]})"
        return Source(description, read_file(path, "bundled "), is_held=True)
    path = Path(name).expanduser()
    if path.is_dir():
        file = _in_folder(path, kind, split)
        if file is not None:
            return _of_file(file)
        place, rows = hub.open_folder(path, split, hint=f"{kind}_{split}.jsonl")
    elif path.exists():
        return _of_file(path)
    elif name.endswith(SUFFIXES) or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise KnowledgeError(f"{name}: there is no such file or folder; check the path", reason="no such file")
    else:
        place, rows = hub.open_hub(kind, name, split)
    return Source(place, hub.rows_of(rows, place))


def _of_file(path: Path) -> Source:
    """The source of a file's rows; those of a large JSON file are read one by one."""
    description = f"file {path.name}"
    is_large = path.is_file() and path.stat().st_size >= LARGE
    scan = _scanner(path) if is_large else None
    if scan is None:
        return Source(description, read_file(path), is_held=not is_large)
    spans = Spans()

    def rows() -> Rows:
        with path.open("rb") as file:
            yield from scan(file, path.name, spans)

    return Source(description, rows(), (path, path.name, spans))


def _scanner(path: Path) -> Any:
    """How a large file is read row by row; None for one that is not plain JSON."""
    try:
        with path.open("rb") as file:
            start = file.read(HEAD).lstrip()
    except OSError:
        return None  # read_file says what is wrong
    if start[:1] == b"[":
        return scan_values
    if start[:1] != b"{":
        return None
    line, ends, _ = start.partition(b"\n")
    return scan_lines if not ends or _is_json(line.decode("utf-8", errors="replace")) else scan_values


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
        return scan_values(io.BytesIO(content), place, Spans())
    if start != b"{":
        if (table := table_rows(content, path)) is not None:
            return (_table_row(values, f"{place}, line {line}") for values, line in table)
        if (values := yaml_values(content, path)) is not None:
            return (row_of(value, f"{place}, entry {i}") for i, value in enumerate(values))
    return scan_lines(io.BytesIO(content), place, Spans())


def _spans_lines(content: bytes) -> bool:
    """Whether the file's first object spans several lines."""
    text = content.lstrip().decode("utf-8", errors="replace")
    if _is_json(text.split("\n", 1)[0]):
        return False
    try:
        json.JSONDecoder().raw_decode(text)
        return True
    except (json.JSONDecodeError, RecursionError):
        return False


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
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
