"""Recognises and reads files by their content, never by their name."""

from __future__ import annotations

import ast
import bz2
import csv
import gzip
import importlib
import io
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from rledit_env.knowledge import names
from rledit_env.knowledge.record import KnowledgeError, shown

PACKED = {b"\x1f\x8b": gzip.decompress, b"BZh": bz2.decompress, b"\xfd7zXZ\x00": lzma.decompress}
PARQUET = b"PAR1"
MORE_CELLS = "\0cells"  # key in a table's row: its number of cells, if it has more cells than there are columns
FOREIGN = {  # a file's first bytes → a description of the file, and the advice
    b"\xd0\xcf\x11\xe0": ("an old Excel or Word file", "save it as CSV"),
    b"%PDF": ("a PDF file", "write the facts as JSON Lines or CSV"),
    b"SQLite format 3": ("an SQLite database", "export the table as CSV"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "decompress it with: zstd -d FILE"),
    b"7z\xbc\xaf\x27\x1c": ("a 7-Zip archive", "unpack it and name the file inside"),
    b"Rar!": ("a RAR archive", "unpack it and name the file inside"),
    b"ARROW1": ("an Arrow file", "write it as Parquet or JSON Lines"),
    b"\xff\xff\xff\xff": ("an Arrow stream", "write it as Parquet or JSON Lines, such as by Dataset.to_json"),
    b"\x89HDF": ("an HDF5 file", "write the facts as JSON Lines or CSV"),
    b"\x93NUMPY": ("a NumPy array", "write the facts as JSON Lines or CSV"),
    b"version https://git-lfs": ("a Git LFS pointer, not the file itself", "fetch it with: git lfs pull"),
}
_DELIMITERS = ",\t;|"
_YAML = re.compile(r"\s*(#.*\n\s*)*(---\s|- +[\w\"'{]|[\w\"' -]+:(\s|$))")
_PARTS = {*names.USED, *names.UNUSED}


def readable_file(path: Path) -> Path:
    """The path of a file, or of the only file in a folder.

    Raises:
        KnowledgeError: the folder contains no file, or several.
    """
    if not path.is_dir():
        return path
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise KnowledgeError(f"{path}: is a data set that the datasets library saved; write it to a file with "
                             "load_from_disk(folder).to_json('facts.jsonl') and name that", reason="a folder")
    files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    if len(files) == 1:
        return files[0]
    inside = ", ".join(file.name for file in files[:8]) + (", …" if len(files) > 8 else "")
    raise KnowledgeError(f"{path}: is a folder, which holds {inside or 'no file'}; name one file", reason="a folder")


def unpacked(path: Path) -> bytes:
    """The file's content, decompressed and as UTF-8 without a byte order mark.

    Raises:
        KnowledgeError: the file cannot be read, or has an unsupported form (the message says what to do).
    """
    try:
        content = path.read_bytes()
        for start, unpack in PACKED.items():
            if content.startswith(start):
                content = unpack(content)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise KnowledgeError(f"{path}: cannot be read ({error}); check the file", reason="unreadable file") from error
    for start, (what, mend) in FOREIGN.items():
        if content.startswith(start):
            raise _foreign(path, what, mend)
    if content.startswith(b"PK\x03\x04"):
        raise _foreign(path, *_archive(content))
    if content[257:262] == b"ustar":
        raise _foreign(path, "a tar archive", "unpack it and name the file inside")
    if content[:1] == b"\x80" and content[1:2] in b"\x02\x03\x04\x05":
        raise _foreign(path, "a Python pickle, which runs code when it is read", "write the facts as JSON Lines")
    if content.lstrip()[:1] == b"<":
        raise _foreign(path, "HTML or XML, such as a web page that was saved in the place of a file",
                       "download the file itself")
    return _as_utf8(content, path)


def _foreign(path: Path, what: str, mend: str) -> KnowledgeError:
    return KnowledgeError(f"{path}: is {what}; {mend}", reason="another form of file")


def _archive(content: bytes) -> tuple[str, str]:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            inside = archive.namelist()
    except zipfile.BadZipFile:
        return "a broken zip archive", "check the file"
    if "xl/workbook.xml" in inside:
        return "an Excel workbook", "save it as CSV"
    if "content.xml" in inside or "word/document.xml" in inside:
        return "an office document", "save it as CSV"
    return f"a zip archive of {', '.join(inside[:4]) or 'nothing'}", "unpack it and name the file inside"


def _as_utf8(content: bytes, path: Path) -> bytes:
    marks = {b"\xff\xfe\x00\x00": "utf-32", b"\x00\x00\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
    encoding = next((name for mark, name in marks.items() if content.startswith(mark)), None)
    if encoding is None and content[:2].count(0) == 1:  # UTF-16 without a mark: one byte of an ASCII character is zero
        encoding = "utf-16-be" if content[0] == 0 else "utf-16-le"
    if encoding is not None:
        try:
            content = content.decode(encoding).encode("utf-8")
        except UnicodeError as error:
            message = f"{path}: is not whole {encoding.upper()} text ({error}); save it as UTF-8"
            raise KnowledgeError(message, reason="bad UTF-16") from error
    return content.removeprefix(b"\xef\xbb\xbf")


# -- forms beside JSON -----------------------------------------------------------------------------------------------


def _decoded(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        message = f"{path}, line {line}: bad UTF-8 (byte 0x{content[error.start]:02x}); save the file as UTF-8"
        raise KnowledgeError(message, reason="bad UTF-8") from error


def table_rows(content: bytes, path: Path) -> Iterator[tuple[dict[str, object], int]] | None:
    """The rows of a table (CSV, TSV, semicolons) and the lines on which they begin; None if the file is not a table.

    Raises:
        KnowledgeError: the file is a table without a heading that names a prompt or target, or it is not UTF-8.
    """
    whole = _decoded(content, path)
    text = whole.lstrip("\r\n")
    lines = text.split("\n", 20)[:20]
    headings = {mark: next(csv.reader([lines[0]], delimiter=mark), []) for mark in _DELIMITERS}
    known = {mark: len({names.plain(cell) for cell in cells} & _PARTS) for mark, cells in headings.items()}
    best = max(_DELIMITERS, key=lambda mark: (len(headings[mark]) > 1 and known[mark], len(headings[mark])))
    if len(headings[best]) < 2:
        return None
    if not known[best]:
        full = [line for line in lines if line.strip()]
        if len(full) > 1 and all(line.count(best) >= 1 for line in full[:-1]) and not _YAML.match(text):
            raise KnowledgeError(
                f"{path}: looks like a table, but its first line names no prompt and no target ({shown(lines[0])}); "
                f"begin it with a line such as prompt{best}target", reason="no heading"
            )
        return None
    return _cells(text, best, 1 + whole[: len(whole) - len(text)].count("\n"))


def _cells(text: str, delimiter: str, first_line: int) -> Iterator[tuple[dict[str, object], int]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    heading = [cell.strip() for cell in next(reader)]
    line = reader.line_num + first_line
    for cells in reader:
        if any(cell.strip() for cell in cells):
            row: dict[str, object] = {name: _cell(cell) for name, cell in zip(heading, cells, strict=False) if name}
            if any(cell.strip() for cell in cells[len(heading) :]):
                row[MORE_CELLS] = len(cells)
            yield row, line
        line = reader.line_num + first_line


def _cell(cell: str) -> object:
    """A cell's value: the list or object written in it, else its text; None if it is empty."""
    if not cell.strip():
        return None
    if cell.lstrip()[:1] in "[{":
        for read in (json.loads, ast.literal_eval):
            try:
                value = read(cell.strip())
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(value, (list, dict)):
                return value
    return cell


def yaml_values(content: bytes, path: Path) -> list[object] | None:
    """The entries of a YAML list, a single object or several documents; None if the file is not such YAML."""
    text = _decoded(content, path)
    if not _YAML.match(text):
        return None
    yaml = importlib.import_module("yaml")  # transformers needs it, too
    try:
        documents = [document for document in yaml.safe_load_all(text) if document is not None]
    except yaml.YAMLError as error:
        message = f"{path}: looks like YAML, but cannot be read ({' '.join(str(error).split())}); correct it"
        raise KnowledgeError(message, reason="malformed YAML") from error
    entries = [entry for part in documents for entry in (part if isinstance(part, list) else [part])]
    return entries if any(isinstance(entry, dict) for entry in entries) else None


def parquet_values(path: Path) -> list[dict[str, object]]:
    """The rows of a Parquet file."""
    parquet = importlib.import_module("pyarrow.parquet")  # the datasets library needs it, too
    try:
        rows: list[dict[str, object]] = parquet.read_table(path).to_pylist()
    except Exception as error:  # pyarrow raises errors of its own and of other modules
        raise KnowledgeError(f"{path}: cannot be read as Parquet ({error}); check the file") from error
    return rows
