"""The text of table cells, and tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

Table = tuple[list[str], list[list[object]]]  # header and rows


def numeric_columns(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[bool]:
    """For each column, whether it contains only numbers and None; such columns are aligned to the right."""
    return [bool(rows) and all(_is_number(row[c]) for row in rows) for c in range(len(header))]


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def shown_cell(value: object) -> str:
    """A cell's text: a dash for None, "yes" or "no" for True and False, :func:`shown_number` for a float."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None else shown_number(value) if isinstance(value, float) else str(value)


def shown_number(value: float) -> str:
    """The text of a score or a time: one decimal, or two significant digits below 1."""
    return f"{value:.1f}" if abs(value) >= 1 or value == 0 else f"{value:.2g}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[object]], widest: int = 48) -> str:
    """A table for a terminal; cells longer than ``widest`` characters are cut with an ellipsis."""
    cells = [[_cut(shown_cell(value), widest) for value in row] for row in (header, *rows)]
    widths = [max(len(row[c]) for row in cells) for c in range(len(header))]
    right = numeric_columns(header, rows)
    lines = [
        "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "─" * max(map(len, lines)), *lines[1:]])


def _cut(text: str, widest: int) -> str:
    return text if len(text) <= widest else text[: widest - 1] + "…"
