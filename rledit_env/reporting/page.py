"""Report: an HTML page of text, tables and pictures in one file."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader

from rledit_env.files import GENERATOR, check_page, write_text
from rledit_env.reporting.cells import numeric_columns, shown_cell


class Cell(NamedTuple):
    """A table's cell: its text, and its class in the page's style sheet ("" for none)."""

    text: str
    css: str


def _escaped(value: object) -> str:
    """A value as HTML; only what the template marks as safe is not escaped."""
    return str(value) if hasattr(value, "__html__") else html.escape(str(value))


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), finalize=_escaped, trim_blocks=True, keep_trailing_newline=True
)


class Report:
    """An HTML page that is built from top to bottom and contains its pictures. All text is escaped.

    Args:
        title: the page's heading.
        lead: the sentence below it.
    """

    def __init__(self, title: str, lead: str = "") -> None:
        self.title, self.lead = title, lead
        self._parts: list[dict[str, object]] = []  # for page.html.jinja, which distinguishes them by "kind"

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._parts.append({"kind": "heading", "text": text})

    def paragraph(self, text: str) -> None:
        """Add a paragraph."""
        self._parts.append({"kind": "paragraph", "text": text})

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]], strong: Sequence[int] = ()) -> None:
        """Add a table. Numbers are aligned to the right, True and False become ✓ and ✗.

        Args:
            header: the columns' names.
            rows: the cells of each row, as many as the header has.
            strong: indices of the rows in bold.

        Raises:
            ValueError: a row has more or fewer cells than the header.
        """
        for i, row in enumerate(rows):
            if len(row) != len(header):
                raise ValueError(f"row {i} of the table has {len(row)} cells; give {len(header)}, as the header has")
        numeric = numeric_columns(header, rows)
        head, *body = ([_cell(*pair) for pair in zip(row, numeric, strict=True)] for row in (header, *rows))
        self._parts.append({"kind": "table", "header": head, "rows": body, "strong": strong})

    def code(self, text: str) -> None:
        """Add text in a fixed-width font, such as a command."""
        self._parts.append({"kind": "code", "text": text})

    def picture(self, png: bytes, caption: str) -> None:
        """Add a picture with its caption, which is also its alternative text."""
        self._parts.append({"kind": "picture", "png": base64.b64encode(png).decode(), "caption": caption})

    def html(self) -> str:
        """The whole page."""
        page = _TEMPLATES.get_template("page.html.jinja")
        return page.render(generator=GENERATOR, title=self.title, lead=self.lead, parts=self._parts)

    def write(self, path: str | Path) -> Path:
        """Write the page, and create its folder if it does not exist; returns its absolute path.

        Raises:
            FileExistsError: the path is a file that rledit did not write as a page.
        """
        path = Path(path).resolve()
        check_page(path)
        write_text(path, self.html())
        return path


def _cell(value: object, numeric: bool) -> Cell:
    if isinstance(value, bool):
        return Cell("✓", "yes") if value else Cell("✗", "no")
    return Cell(shown_cell(value), "number" if numeric else "")
