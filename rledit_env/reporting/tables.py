"""Tables of editors' results, mean ± standard deviation over streams with the best marked: for a terminal, as Markdown,
LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Literal

from rledit_env.reporting.cells import text_table
from rledit_env.type_aliases import JsonObject

NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        key: the name of its number in a cell.
        title: its heading.
        digits: shown after the decimal point.
        best: whether the highest or the lowest number is best.
    """

    key: str
    title: str
    digits: int
    best: Literal["high", "low"]


# The columns of the paper's main table, and further ones: Specificity against the data set's answers, free-running
# exact match, the mean of the three metrics, the divergence from the unedited model (on its own text, on human text and
# on its answers in a chat), and the time including training and statistics.
COLUMNS = (
    Column("efficacy", "Eff.", 1, "high"),
    Column("generalization", "Gen.", 1, "high"),
    Column("specificity", "Spe.", 1, "high"),
    Column("specificity_answer", "Spe. (answer)", 1, "high"),
    Column("exact_match", "Exact", 1, "high"),
    Column("mean", "Mean", 1, "high"),
    Column("kl", "KL", 2, "low"),
    Column("kl_human", "KL human", 2, "low"),
    Column("kl_chat", "KL chat", 2, "low"),
    Column("seconds_per_fact", "s/fact", 3, "low"),
    Column("seconds_per_fact_in_all", "s/fact in all", 3, "low"),
)


@dataclass(frozen=True)
class Row:
    """An editor's row.

    Attributes:
        name: the editor's name on the command line.
        title: the editor's name in the table.
        cells: for each stream, numbers by the columns' keys; a number may be None. ``one_off_seconds`` and ``facts``
            give "seconds_per_fact_in_all". A cell with "not_applicable" has no numbers.
        compared: whether it may be marked as the best; "no edit" may not.
        instead: a text to show if there are no cells.
    """

    name: str
    title: str
    cells: Sequence[JsonObject]
    compared: bool = True
    instead: str = ""

    @property
    def not_applicable(self) -> bool:
        return any("not_applicable" in cell for cell in self.cells)

    @property
    def placeholder(self) -> str:
        """The text that is shown instead of numbers; empty if there are numbers."""
        return NOT_APPLICABLE if self.not_applicable else self.instead

    @property
    def diverged(self) -> bool:
        """Whether an update broke the model in some stream."""
        return any(cell.get("diverged") for cell in self.cells)

    def values(self, key: str) -> list[float]:
        """The numbers of a column, one for each stream; empty if any is missing or not finite."""
        numbers = [_number(cell, key) for cell in self.cells]
        finite = [number for number in numbers if number is not None and math.isfinite(number)]
        return finite if finite and len(finite) == len(numbers) else []


def _number(cell: JsonObject, key: str) -> float | None:
    if key != "seconds_per_fact_in_all":
        return cell.get(key)
    seconds, once = cell.get("seconds_per_fact"), cell.get("one_off_seconds")
    return None if seconds is None or once is None else seconds + once / cell["facts"]


def shown(values: Sequence[float], digits: int, plus_minus: str = "±") -> str:
    """Mean ± standard deviation (of the sample); for one value the mean alone, for none a dash."""
    if not values:
        return "–"
    text = f"{mean(values):.{digits}f}"
    return f"{text} {plus_minus} {stdev(values):.{digits}f}" if len(values) > 1 else text


def best_of(rows: Sequence[Row], column: Column) -> set[str]:
    """Names of the rows that are best in a column, compared by the digits shown; none if all are equal."""
    means = {row.name: round(mean(v), column.digits) for row in rows if row.compared and (v := row.values(column.key))}
    if len(set(means.values())) < 2:
        return set()
    best = (max if column.best == "high" else min)(means.values())
    return {name for name, value in means.items() if value == best}


def _cells(rows: Sequence[Row], plus_minus: str, bold: str) -> Iterable[tuple[Row, list[str]]]:
    """Each row with its cells as text; ``bold`` is the format of the best ones."""
    best = {column.key: best_of(rows, column) for column in COLUMNS}
    for row in rows:
        texts = [shown(row.values(c.key), c.digits, plus_minus) for c in COLUMNS]
        yield row, [
            bold.format(text) if row.name in best[c.key] else text for text, c in zip(texts, COLUMNS, strict=True)
        ]


def as_text(rows: Sequence[Row]) -> str:
    """A table for a terminal; the best numbers are marked with a star."""
    header = ["", *(column.title for column in COLUMNS)]
    lines = [
        [_title(row), row.placeholder, *[""] * (len(COLUMNS) - 1)] if row.placeholder else [_title(row), *cells]
        for row, cells in _cells(rows, "±", "{}*")
    ]
    return text_table(header, lines)


def as_markdown(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    lines = [["Editor", *(column.title for column in COLUMNS)], ["---", *["---:"] * len(COLUMNS)]]
    for row, cells in _cells(rows, "±", "**{}**"):
        empty = [row.placeholder, *[""] * (len(COLUMNS) - 1)]
        lines.append([_title(row).replace("*", "\\*").replace("|", "\\|"), *(empty if row.placeholder else cells)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def as_latex(rows: Sequence[Row], caption: str) -> str:
    """A LaTeX table for the booktabs package."""
    lines = [
        "\\begin{table}", "\\centering", f"\\caption{{{_escaped(caption)}}}",
        f"\\begin{{tabular}}{{l{'r' * len(COLUMNS)}}}", "\\toprule",
        " & ".join(["Editor", *(_escaped(column.title) for column in COLUMNS)]) + " \\\\", "\\midrule",
    ]  # fmt: skip
    for row, cells in _cells(rows, "$\\pm$", "\\textbf{{{}}}"):
        if row.placeholder:
            cells = [f"\\multicolumn{{{len(COLUMNS)}}}{{c}}{{{_escaped(row.placeholder)}}}"]
        lines.append(" & ".join([_escaped(_title(row)), *(cell.replace("–", "--") for cell in cells)]) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", "\\end{table}", ""])


def as_csv(rows: Sequence[Row], leading: Mapping[str, Sequence[object]] | None = None) -> str:
    """A CSV table: one line for each row, with means and standard deviations; missing numbers are empty.

    Args:
        rows: the lines.
        leading: further columns, which come first: name → a value for each row.
    """
    leading = leading or {}
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    pairs = [f"{column.key}_{part}" for column in COLUMNS for part in ("mean", "std")]
    writer.writerow([*leading, "editor", "title", "applicable", "diverged", "streams", *pairs])
    for i, row in enumerate(rows):
        numbers: list[float | str] = []
        for column in COLUMNS:
            values = row.values(column.key)
            numbers += [mean(values) if values else "", stdev(values) if len(values) > 1 else ""]
        first = [values[i] for values in leading.values()]
        counts = [int(not row.not_applicable), int(row.diverged), len(row.cells)]
        writer.writerow([*first, row.name, row.title, *counts, *numbers])
    return out.getvalue()


def _title(row: Row) -> str:
    return f"{row.title} (broke)" if row.diverged else row.title


def _escaped(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "×": r"$\times$"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)
