"""Reads JSON row by row from a file, without holding the file, and notes where each row lies in it."""

from __future__ import annotations

import codecs
import json
from array import array
from collections.abc import Iterator
from typing import BinaryIO

from rledit_env.knowledge.fields import SKIP, SKIP_ROWS, Row, row_of
from rledit_env.knowledge.record import KnowledgeError, shown

CHUNK = 1 << 20  # bytes that are read at a time
LONGEST_ROW = 1 << 24  # characters; what is longer and cannot be read is malformed


class Spans:
    """Where the rows of a file lie: each one's first byte, its number of bytes and its line. 16 bytes a row."""

    def __init__(self) -> None:
        self.starts, self.lengths, self.numbers = array("q"), array("i"), array("i")

    def __len__(self) -> int:
        return len(self.starts)

    def add(self, start: int, length: int, number: int) -> None:
        self.starts.append(start)
        self.lengths.append(length)
        self.numbers.append(number)


def scan_lines(file: BinaryIO, place: str, spans: Spans) -> Iterator[Row | KnowledgeError]:
    """The rows of JSON Lines; in place of a line that cannot be read there is an error. Blank lines are skipped."""
    at = 0
    for number, whole in enumerate(file, start=1):
        start, at = at, at + len(whole)
        line, where = whole.removesuffix(b"\n"), f"{place}, line {number}"
        if not line.strip():
            continue
        spans.add(start, len(line), number)
        try:
            yield row_of(json.loads(line.decode("utf-8")), where)
        except UnicodeDecodeError as error:
            yield _bad_utf8(where, error, SKIP)
        except (json.JSONDecodeError, RecursionError) as error:
            mend = SKIP
            if line.lstrip().startswith(b"{'"):
                mend = f"this is Python's spelling of a dictionary: write it with json.dumps, or {SKIP_ROWS}"
            yield KnowledgeError(f"{where}: malformed JSON ({error}: {shown(line)}); {mend}", reason="malformed JSON")


def scan_values(file: BinaryIO, place: str, spans: Spans) -> Iterator[Row | KnowledgeError]:
    """The entries of JSON lists and objects one after the other. Reading ends with an error at the first malformed
    one."""
    window = _Window(file, place)
    inside, separated = False, True
    while character := window.next_character():
        where = f"{place}, line {window.line}"
        if character == "[" and not inside:
            window.take(1)
            inside, separated = True, True
        elif character == "]" and inside:
            window.take(1)
            inside, separated = False, True
        elif character == "," and not separated:
            window.take(1)
            separated = True
        elif inside and not separated:
            raise KnowledgeError(f"{where}: malformed JSON (the list breaks off before this); correct the file",
                                 reason="malformed JSON")
        else:
            start, line = window.byte, window.line
            value = window.take_value()
            spans.add(start, window.byte - start, line)
            separated = False
            yield row_of(value, where)
    if inside:
        raise KnowledgeError(f"{place}, line {window.line}: malformed JSON (the list breaks off after this entry); "
                             "correct the file", reason="malformed JSON")


class _Window:
    """The part of a file's text that is being read.

    Attributes:
        byte, line: the position in the file: bytes before it, and its line.
    """

    def __init__(self, file: BinaryIO, place: str) -> None:
        self.byte, self.line = 0, 1
        self._file, self._place = file, place
        self._text, self._at, self._is_whole = "", 0, False
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()

    def next_character(self) -> str:
        """The next character that is no white space, at which the position then is; "" at the end of the file."""
        while True:
            end = self._at
            while end < len(self._text) and self._text[end].isspace():
                end += 1
            if end < len(self._text) or self._is_whole:
                line = self.line
                self.take(end - self._at)
                if end == len(self._text):
                    self.line = line  # an error after the last entry names that one's line
                return self._text[self._at : self._at + 1]
            self._fill(CHUNK)

    def take(self, count: int) -> None:
        """Move on by some characters."""
        passed = self._text[self._at : self._at + count]
        self.byte += len(passed.encode())
        self.line += passed.count("\n")
        self._at += count
        if self._at > CHUNK:
            self._text, self._at = self._text[self._at :], 0

    def take_value(self) -> object:
        """Read the value that begins here, and move on to its end."""
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except (json.JSONDecodeError, RecursionError) as error:
                rest = len(self._text) - self._at
                if self._is_whole or rest > LONGEST_ROW or isinstance(error, RecursionError):
                    message = f"{self._place}, line {self.line}: malformed JSON ({error}); correct the file"
                    raise KnowledgeError(message, reason="malformed JSON") from error
            else:
                if end < len(self._text) or self._is_whole:
                    self.take(end - self._at)
                    return value
                rest = end - self._at  # a number may go on in the next chunk
            self._fill(max(CHUNK, rest))

    def _fill(self, count: int) -> None:
        content = self._file.read(count)
        try:
            text = self._decoder.decode(content, final=not content)
        except UnicodeDecodeError as error:
            line = self.line + self._text.count("\n", self._at) + error.object.count(b"\n", 0, error.start)
            raise _bad_utf8(f"{self._place}, line {line}", error, "save the file as UTF-8") from error
        self._text, self._at = self._text[self._at :] + text, 0
        self._is_whole = not content


def _bad_utf8(where: str, error: UnicodeDecodeError, mend: str) -> KnowledgeError:
    byte = error.object[error.start]
    return KnowledgeError(f"{where}: bad UTF-8 (byte 0x{byte:02x}); {mend}", reason="bad UTF-8")
