"""Tests of reports."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from rledit_env import reporting
from rledit_env.knowledge import EditRecord, UnrelatedFact

PNG = b"\x89PNG\r\n\x1a\n"


def test_page_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    page = reporting.Report("A run", "What came of it.")
    page.picture(reporting.score_bars({"no edit": {"efficacy": 29.5, "exact_match": None}}), "Scores.")
    text = page.write(tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'(?:src|href)="(?!data:image/png;base64,)', text) == []
    assert "http" not in text


def test_text_of_a_page_is_escaped() -> None:
    page = reporting.Report("<script>", "a & b")
    page.heading("<i>")
    page.paragraph("<b>")
    page.table(["<u>"], [["<td>"]])
    assert {"<script>", "<i>", "<b>", "<u>", "a & b"} & set(re.findall(r"<\w+>|a & b", page.html())) == set()


def test_table_sets_numbers_right_and_shows_what_is_missing_as_a_dash() -> None:
    page = reporting.Report("t")
    page.table(["name", "score"], [["a", 29.54], ["b", None]])
    assert '<td class="number">29.5</td>' in page.html()
    assert '<td class="number">–</td>' in page.html()


def test_table_with_a_short_row_raises() -> None:
    with pytest.raises(ValueError, match=r"row 1 .* 1 cells; give 2"):
        reporting.Report("t").table(["a", "b"], [[1, 2], [3]])


def test_text_table_aligns_columns_and_cuts_long_cells() -> None:
    lines = reporting.text_table(["name", "score"], [["x" * 60, 29.54], ["b", None]], widest=10).splitlines()
    assert lines[2] == "xxxxxxxxx…   29.5"
    assert lines[3] == "b               –"


@pytest.mark.parametrize("curves", [{"train/locality": [(1, 0.5), (2, 0.4)]}, {"eval/efficacy": [(0, 30.0)]}])
def test_learning_curves_are_drawn_from_whatever_was_logged(curves: dict[str, list[tuple[float, float]]]) -> None:
    picture = reporting.learning_curves(curves)
    assert picture is not None
    assert picture.startswith(PNG)


def test_learning_curves_of_nothing_are_none() -> None:
    assert reporting.learning_curves({"train/unknown": [(0, 1.0)]}) is None


def test_drift_curves_are_a_png() -> None:
    assert reporting.drift_curves({"agent": [(0, 0.0), (20, 0.1)]}).startswith(PNG)


def test_logged_curves_are_read_back(tmp_path: Path) -> None:
    writer = SummaryWriter(str(tmp_path))
    for update, value in ((1, 5.5), (2, 4.25)):
        writer.add_scalar("train/generalization", value, update)
    writer.close()
    assert reporting.read_curves(tmp_path) == {"train/generalization": [(1, 5.5), (2, 4.25)]}


def test_no_log_gives_no_curves(tmp_path: Path) -> None:
    assert reporting.read_curves(tmp_path) == {}


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"rledit-env\[report\]"):
        reporting.drift_curves({})


def test_versions_name_what_a_result_depends_on() -> None:
    assert {"python", "torch", "transformers", "rledit-env"} <= set(reporting.versions())


def test_answers_say_whether_a_fact_took_and_leave_no_cell_empty() -> None:
    fact = EditRecord("Rome is in", "Peru", ("One finds Rome in",), (UnrelatedFact("Bananas are", "yellow"),))
    _, rows = reporting.answer_table([fact, fact], [" Italy. It", ""], [" Peru and more", ""])
    assert rows[0] == ["Rome is in", "Peru", "Italy", "Peru and more", True]
    assert rows[1] == ["Rome is in", "Peru", "(nothing)", "(nothing)", False]


def test_returns_are_compared_stream_by_stream() -> None:
    returns = {"zero action": [-10.0, -30.0, -20.0], "PPO": [-9.0, -29.0, -19.0]}
    header, rows = reporting.return_table(returns, {"PPO": 100})
    assert rows[0] == ["zero action", 0, -20.0, 0.0, 0.0, 0.0]
    assert rows[1] == ["PPO", 100, -19.0, 1.0, 1.0, 1.0]
    curves = {"PPO": [(0.0, -20.0), (50.0, -19.5), (100.0, -19.0)]}
    levels = {"zero action": -20.0}
    page = reporting.returns_report("Lead.", returns, {"PPO": 100}, curves, levels, {"seed": 0}, "a table")
    assert all(name in page.html() for name in header) and page.html().count("data:image/png;base64") == 1


def test_a_bootstrap_interval_covers_the_mean_and_narrows_with_the_number_of_values() -> None:
    values = np.random.default_rng(0).normal(1.0, 1.0, 400)
    low, high = reporting.bootstrap_interval(values)
    assert low < 1.0 < high and high - low == pytest.approx(4 / 20, rel=0.2)
    assert reporting.bootstrap_interval(values) == (low, high)
    assert high - low < np.subtract(*reporting.bootstrap_interval(values[:50])[::-1])


@pytest.mark.filterwarnings("error")
def test_a_curve_of_score_against_kl_has_a_line_an_editor_whatever_is_known_of_it() -> None:
    curves = {"one": [(0.0, 40.0), (0.2, 50.0)], "two": [(1e-9, 30.0)]}
    svg = reporting.tradeoff_curves(curves, {"no edit": 29.0}, (0.1, 1.0), {"three": [(30.0, 20.0)]}, "svg").decode()
    assert re.findall(r'id="(editor-\d+)"', svg) == [f"editor-{i}" for i in range(4)]
    many = {f"editor {i}": [(0.1 * 2**j, 50.0 + i) for j in range(3)] for i in range(24)}
    assert reporting.tradeoff_curves(many, {}).startswith(PNG)
    assert reporting.tradeoff_curves({}, {}, (0.1,)).startswith(PNG)


def test_without_matplotlib_pictures_are_refused_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    reporting.check_pictures()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="pictures need matplotlib"):
        reporting.check_pictures()
