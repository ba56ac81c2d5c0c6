"""Tests of rledit_env.reporting.tables: what a comparison's table says, in each of its forms."""

from __future__ import annotations

import csv
import io
import re

import pytest

from rledit_env.reporting import tables
from rledit_env.reporting.tables import COLUMNS, Row


def cell(efficacy: float, seconds: float = 1.0, once: float | None = 10.0, **more) -> dict:
    scores = {c.key: 50.0 for c in COLUMNS if "seconds" not in c.key}
    return {**scores, "efficacy": efficacy, "seconds_per_fact": seconds, "one_off_seconds": once, "facts": 20, **more}


ROWS = [
    Row("none", "no edit", [cell(99.0, 0.1), cell(99.0, 0.1)], compared=False),
    Row("mend*", "MEND*", [cell(60.0), cell(70.0)]),
    Row("rome", "ROME", [{"not_applicable": "no subject"}] * 2),
    Row("rledit", "RLEdit", [cell(90.0, 2.0, None), cell(92.0, 4.0, None)]),
]


def line_of(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if name in line)


def test_a_number_is_the_mean_with_the_sample_s_standard_deviation():
    assert tables.shown([60.0, 70.0], 1) == "65.0 ± 7.1"  # √((5² + 5²) / 1)
    assert tables.shown([1.0, 2.0, 6.0], 2) == "3.00 ± 2.65"  # √((4 + 1 + 9) / 2)
    assert tables.shown([65.04], 1) == "65.0"
    assert tables.shown([], 1) == "–"


def test_what_was_spent_once_is_shared_by_the_facts_of_a_stream():
    row = Row("a", "A", [cell(1.0, seconds=0.25, once=10.0)])
    assert row.values("seconds_per_fact_in_all") == [0.25 + 10.0 / 20]
    assert Row("a", "A", [cell(1.0, once=None)]).values("seconds_per_fact_in_all") == []


def test_the_best_is_the_highest_score_and_the_least_time_among_those_that_edit():
    columns = {c.key: c for c in COLUMNS}
    assert tables.best_of(ROWS, columns["efficacy"]) == {"rledit"}
    assert tables.best_of(ROWS, columns["seconds_per_fact"]) == {"mend*"}
    assert tables.best_of(ROWS, columns["generalization"]) == set()  # all alike
    tied = [Row(name, name, [cell(value)]) for name, value in (("a", 70.04), ("b", 70.0), ("c", 1.0))]
    assert tables.best_of(tied, columns["efficacy"]) == {"a", "b"}  # as the table shows them


def test_a_number_that_is_missing_or_not_finite_competes_with_none():
    rows = [Row("a", "A", [cell(float("nan"))]), Row("b", "B", [cell(3.0)]), Row("c", "C", [cell(1.0)])]
    assert tables.best_of(rows, COLUMNS[0]) == {"b"}
    assert tables.shown(rows[0].values("efficacy"), 1) == "–"


def test_cells_from_before_there_was_a_divergence_on_human_text_have_a_dash_there():
    old = {key: value for key, value in cell(60.0).items() if key not in ("kl_human", "kl_chat")}
    rows = [Row("old", "Old", [old, old]), Row("some", "Some", [old, cell(60.0)]), Row("new", "New", [cell(60.0)] * 2)]
    titles = [column.title for column in COLUMNS]
    places = [titles.index(title) for title in ("KL", "KL human", "KL chat")]
    lines = [line.strip(" |").split(" | ")[1:] for line in tables.as_markdown(rows).splitlines()[2:]]
    assert [[line[i] for i in places] for line in lines] == [
        ["50.00 ± 0.00", "–", "–"], ["50.00 ± 0.00", "–", "–"], ["50.00 ± 0.00"] * 3,
    ]  # fmt: skip
    (first, *_) = csv.DictReader(io.StringIO(tables.as_csv(rows)))
    assert first["kl_mean"] == "50.0" and first["kl_human_mean"] == first["kl_chat_mean"] == ""


def test_markdown_has_the_best_in_bold_and_says_what_is_not_applicable():
    text = tables.as_markdown(ROWS)
    assert "**91.0 ± 1.4**" in line_of(text, "RLEdit") and "**99.0" not in text
    assert line_of(text, "MEND").startswith("| MEND\\* | 65.0 ± 7.1 |")
    assert "not applicable" in line_of(text, "ROME")
    assert {line.count(" | ") for line in text.splitlines()} == {len(COLUMNS)}


def test_text_marks_the_best_with_a_star_and_names_who_broke_the_model():
    broke = Row("ft", "FT", [cell(1.0, diverged=True)])
    text = tables.as_text([*ROWS, broke])
    assert "91.0 ± 1.4*" in line_of(text, "RLEdit")
    assert "FT (broke)" in text and "MEND* (broke)" not in text


def test_latex_is_a_table_of_as_many_columns_in_every_row_with_special_characters_escaped():
    text = tables.as_latex([*ROWS, Row("x", "50%_of & $#", [cell(1.0), cell(1.0)])], "20×20 facts of a_b")
    assert text.count("\\begin{") == text.count("\\end{") == 2
    assert f"\\begin{{tabular}}{{l{'r' * len(COLUMNS)}}}\n" in text
    body = text.split("\\midrule\n")[1].split("\\bottomrule")[0].strip().splitlines()
    assert len(body) == 5
    for line in body:
        assert line.endswith(" \\\\")
        cells = len(re.findall(r"(?<!\\)&", line))
        assert cells == len(COLUMNS) or (cells == 1 and f"\\multicolumn{{{len(COLUMNS)}}}" in line)
        assert line.count("{") == line.count("}") and line.count("$") % 2 == (1 if "\\$" in line else 0)
    assert "\\textbf{91.0 $\\pm$ 1.4}" in line_of(text, "RLEdit")
    assert "50\\%\\_of \\& \\$\\#" in text and "20$\\times$20 facts of a\\_b" in text
    assert text.isascii()


def test_csv_holds_the_numbers_unrounded():
    rows = {row["editor"]: row for row in csv.DictReader(io.StringIO(tables.as_csv(ROWS)))}
    assert list(rows) == ["none", "mend*", "rome", "rledit"]
    assert float(rows["mend*"]["efficacy_mean"]) == 65.0
    assert float(rows["mend*"]["efficacy_std"]) == pytest.approx(50**0.5)
    assert rows["rome"]["applicable"] == "0" and rows["rome"]["efficacy_mean"] == ""
    assert float(rows["mend*"]["seconds_per_fact_in_all_mean"]) == 1.5
    assert rows["rledit"]["seconds_per_fact_in_all_mean"] == ""
    assert {row["streams"] for row in rows.values()} == {"2"}


def test_a_row_without_cells_says_what_stands_in_its_place_and_competes_with_none():
    rows = [Row("a", "A", [], instead="none_&"), Row("b", "B", [cell(3.0)]), Row("c", "C", [cell(1.0)])]
    assert line_of(tables.as_text(rows), "A").split() == ["A", "none_&"]
    assert "| A | none_& |" in tables.as_markdown(rows)
    assert f"A & \\multicolumn{{{len(COLUMNS)}}}{{c}}{{none\\_\\&}} \\\\" in tables.as_latex(rows, "caption")
    assert tables.best_of(rows, COLUMNS[0]) == {"b"}


def test_further_columns_come_first_in_the_csv():
    text = tables.as_csv(ROWS, {"bound": [0.1, 0.2, 0.3, 0.4], "strength": ["", 1, 2, 3]})
    lines = list(csv.DictReader(io.StringIO(text)))
    assert [(r["bound"], r["strength"], r["editor"]) for r in lines][:2] == [("0.1", "", "none"), ("0.2", "1", "mend*")]
    assert text.startswith("bound,strength,editor,")
