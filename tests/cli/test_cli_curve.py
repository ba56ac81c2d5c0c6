"""`rledit compare --curve`: editors at a few strengths, the curve of score against KL, and the picks for bounds."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from agents.running.comparison import Comparison
from agents.running.curve import BOUNDS, Curve, Point, best_picks, pick
from agents.running.editors import EDITORS, with_strength
from rledit_env import cli
from rledit_env.evaluation.metrics import METRICS_VERSION

CURVE = [
    "compare", "--curve", "--model", "tiny-llama", "--dtype", "float32", "--device", "cpu", "--env",
    "RLEdit-CounterFact-v0", "--batches", "2", "--batch-size", "2", "--curve-batches", "2", "--seeds", "1",
    "--no-generate",
]  # fmt: skip


def point(name: str, factor: float, score: float | None, kl: float | None, **more: Any) -> Point:
    return Point(with_strength(EDITORS[name], factor), {"mean": score, "selection_kl": kl, "kl": 9.0, **more})


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def cells_of(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*.json") if "cells" in p.parts}


def measured(monkeypatch: pytest.MonkeyPatch, numbers: dict[str, tuple[float, float]]) -> list[tuple[str, str, int]]:
    """Replaces editing and scoring by numbers: label → (mean, KL), whatever the stream; returns the list that grows
    with every (folder, label, seed) that is measured."""
    done: list[tuple[str, str, int]] = []

    def faked(self: Comparison, editor: Any, agent: Any, env: Any, seed: int) -> dict[str, Any]:
        done.append((self.out.name, editor.label, seed))
        mean, kl = numbers[editor.label]
        scores = dict.fromkeys(("efficacy", "generalization", "specificity", "specificity_answer", "mean"), mean)
        return {
            **scores, "exact_match": None, "metrics": "paper", "metrics_version": METRICS_VERSION, "kl": 2 * kl,
            "seconds_per_fact": 0.1, "drift": 0.0, "diverged": False, "facts": 4,
        }  # fmt: skip

    def diverged(lm: Any) -> float:
        return numbers[done[-1][1]][1]

    monkeypatch.setattr(Comparison, "_measure", faked)
    monkeypatch.setattr("agents.running.curve.divergence", diverged)
    return done


NUMBERS = {
    "none": (30.0, 0.0),
    "fine-tuning@0.5": (50.0, 0.04), "fine-tuning": (70.0, 0.2), "fine-tuning@2": (60.0, 0.9),
    "ft-l@0.5": (41.0, 1.5), "ft-l": (42.0, 3.0), "ft-l@2": (43.0, 4.0),
}  # fmt: skip


# -- choosing ------------------------------------------------------------------------------------------------------


def test_the_pick_is_the_highest_score_within_the_bound_on_the_text_kept_for_choosing():
    points = [point("ft-l", 0.5, 50.0, 0.04), point("ft-l", 1, 70.0, 0.2), point("ft-l", 2, 60.0, 0.9)]
    assert [p.editor.factor if (p := pick(points, bound)) else None for bound in BOUNDS] == [0.5, 0.5, 1, 1]
    assert pick(points, 0.03) is None
    assert pick(points, 0.04) is points[0]  # at the bound is within it


def test_of_equal_scores_the_one_that_diverges_least_is_picked():
    points = [point("ft-l", 1, 70.0, 0.2), point("ft-l", 0.5, 70.0, 0.1), point("ft-l", 2, 70.0, 0.3)]
    assert pick(points, 1.0) is points[1]


def test_what_broke_or_was_not_measured_is_never_picked():
    points = [
        point("ft-l", 0.5, 50.0, 0.04), point("ft-l", 1, 90.0, 0.2, diverged=True), point("ft-l", 2, 95.0, None),
        point("ft-l", 3, None, 0.1), point("ft-l", 4, 99.0, float("nan")),
    ]  # fmt: skip
    assert pick(points, 1.0) is points[0]


def test_the_best_editors_are_those_whose_picks_score_highest_on_the_training_stream():
    scores = {"fine-tuning": 50.0, "ft-l": 70.0, "ft-m": 60.0, "rome": 80.0}
    picks: dict[str, Point | None] = {name: point(name, 2, score, 0.1) for name, score in scores.items()}
    picks |= {"none": point("none", 1, 99.0, 0.0), "memit": None}
    assert best_picks(picks, 3) == ["rome", "ft-l", "ft-m"]
    assert best_picks(picks) == ["rome", "ft-l", "ft-m", "fine-tuning"]


# -- the command ---------------------------------------------------------------------------------------------------


def test_picks_alone_are_scored_on_the_evaluation_split_and_the_table_says_which_at_every_bound(
    tmp_path, capsys, monkeypatch
):
    done = measured(monkeypatch, NUMBERS)
    command = [*CURVE, "--editors", "none", "fine-tuning", "ft-l", "--then-batches", "3", "--out", str(tmp_path)]
    assert cli.main(command) == 0
    at = {folder: {label for name, label, _ in done if name == folder} for folder, _, _ in done}
    assert at["curve"] == set(NUMBERS)
    assert at[tmp_path.name] == {"none", "fine-tuning@0.5", "fine-tuning"}  # of the editors' seven points
    assert at["then-3"] == {"fine-tuning@0.5", "fine-tuning"}
    rows = read(tmp_path / "curve.csv")
    strengths = {(r["kl_bound"], r["editor"]): r["strength"] for r in rows if r["batches"] == "2"}
    assert [strengths[bound, "fine-tuning"] for bound in ("0.05", "0.1", "0.3", "1.0")] == ["0.5", "0.5", "1.0", "1.0"]
    by_editor = {(r["kl_bound"], r["editor"]): r for r in rows if r["batches"] == "2"}
    assert float(by_editor["0.3", "fine-tuning"]["mean_mean"]) == 70.0
    assert float(by_editor["0.3", "fine-tuning"]["kl_mean"]) == 0.4  # the text that is reported on
    assert all(by_editor[bound, "none"]["mean_mean"] == "30.0" for bound in ("0.05", "1.0"))
    missed = by_editor["1.0", "ft-l"]  # a bound that no strength meets
    assert (missed["strength"], missed["streams"], missed["mean_mean"]) == ("", "0", "")
    text, markdown = ((tmp_path / f"curve.{form}").read_text(encoding="utf-8") for form in ("txt", "md"))
    assert re.search(r"KL ≤ 1, 2×2 facts.*\n\n.*\n.*\n(.*\n)*FT-L +none", text) and "| FT-L | none |" in markdown
    assert "gradient ×0.5" in text and "![Score against KL](curve.png)" in markdown
    assert text.rstrip("\n") in capsys.readouterr().out
    latex = (tmp_path / "curve.tex").read_text(encoding="utf-8")
    assert latex.count("\\begin{table}") == latex.count("\\end{table}") == 8 and "{c}{none}" in latex


def test_points_are_computed_once_and_a_run_that_was_cut_off_goes_on(tmp_path, capsys, monkeypatch):
    done = measured(monkeypatch, NUMBERS)
    faked = Comparison._measure

    def cut_off(self: Comparison, editor: Any, *arguments: Any) -> Any:
        if editor.label == "fine-tuning@2":
            raise KeyboardInterrupt
        return faked(self, editor, *arguments)

    command = [*CURVE, "--editors", "none", "fine-tuning", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(Comparison, "_measure", cut_off)
        assert cli.main(command) == 130
    assert f"the finished cells are in {tmp_path}" in capsys.readouterr().err
    kept = cells_of(tmp_path)
    assert set(kept) == {f"curve/cells/{name}.json" for name in ("none", "fine-tuning@0.5", "fine-tuning")}
    assert cli.main(command) == 0
    assert kept.items() <= cells_of(tmp_path).items()
    assert sorted(label for folder, label, _ in done if folder == "curve") == sorted(
        ["none", "fine-tuning@0.5", "fine-tuning", "fine-tuning@2"]
    )
    table = (tmp_path / "curve.txt").read_bytes()
    monkeypatch.setattr("agents.running.comparison.EditableLM.load", lambda *_, **__: pytest.fail("a model is loaded"))
    assert cli.main(command) == 0
    assert (tmp_path / "curve.txt").read_bytes() == table


def test_a_real_run_trains_once_and_draws_a_line_an_editor(tmp_path, monkeypatch):
    from agents import RLEditAgent

    trainings: list[Any] = []
    learn = RLEditAgent.learn
    monkeypatch.setattr(RLEditAgent, "learn", lambda self, *a, **k: (trainings.append(self), learn(self, *a, **k))[1])
    out = tmp_path / "curve"
    editors = ["none", "fine-tuning", "malmen"]
    assert cli.main([*CURVE, "--editors", *editors, "--strengths", "3", "1", "--out", str(out)]) == 0
    assert len(trainings) == 1
    points = read(out / "curve_points.csv")
    assert [(p["editor"], p["strength"]) for p in points] == [
        ("none", ""), ("fine-tuning", "1.0"), ("fine-tuning", "3.0"), ("malmen", "1.0"), ("malmen", "3.0"),
    ]  # fmt: skip
    kl = [float(p["selection_kl"]) for p in points]
    assert kl[0] == 0 < kl[1] and 0 < kl[3] < kl[4]  # three times the trained step sizes move the model further
    assert all(p["selection_kl"] != p["kl"] for p in points[1:])  # two texts
    cell = json.loads((out / "curve" / "cells" / "malmen@3.json").read_text(encoding="utf-8"))
    assert cell["exact_match"] is None and cell["editor"]["factor"] == 3 and "held out" in cell["stream"]["source"]
    plain = json.loads((out / "cells" / "none" / "seed-0.json").read_text(encoding="utf-8"))
    assert "factor" not in plain["editor"] and "selection_kl" not in plain  # as a comparison without a curve has it
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    svg = (out / "curve.svg").read_text(encoding="utf-8")
    assert re.findall(r'id="(editor-\d+)"', svg) == ["editor-0", "editor-1", "editor-2"]


def test_an_editor_that_is_not_applicable_has_no_points_and_says_why(tmp_path, capsys, monkeypatch):
    from agents import NotApplicable

    def refuse(self: Any, observation: Any, deterministic: bool = True) -> Any:
        raise NotApplicable("the facts name no subject")

    monkeypatch.setattr("agents.fine_tuning.baselines.FineTuningAgent.predict", refuse)
    assert cli.main([*CURVE, "--editors", "none", "fine-tuning", "--out", str(tmp_path)]) == 0
    assert "gradient: not applicable, the facts name no subject" in capsys.readouterr().out
    assert [p["editor"] for p in read(tmp_path / "curve_points.csv")] == ["none"]
    assert "| gradient | not applicable |" in (tmp_path / "curve.md").read_text(encoding="utf-8")


def test_an_editor_that_fails_is_named_and_picked_by_no_half_of_its_points(tmp_path, capsys, monkeypatch):
    measured(monkeypatch, {k: v for k, v in NUMBERS.items() if k != "fine-tuning@2"})
    command = [*CURVE, "--editors", "none", "fine-tuning", "--out", str(tmp_path)]
    assert cli.main(command) == 1
    assert "failed: fine-tuning; the same command tries them again" in capsys.readouterr().err
    assert {row["editor"] for row in read(tmp_path / "curve.csv")} == {"none"}
    measured(monkeypatch, NUMBERS)
    assert cli.main(command) == 0
    assert {row["editor"] for row in read(tmp_path / "curve.csv")} == {"none", "fine-tuning"}


# -- what is refused -----------------------------------------------------------------------------------------------


def test_points_of_another_stream_or_version_of_the_metrics_are_refused(tmp_path, capsys, monkeypatch):
    measured(monkeypatch, NUMBERS)
    command = [*CURVE, "--editors", "none", "--out", str(tmp_path)]
    assert cli.main(command) == 0
    capsys.readouterr()
    assert cli.main([*command, "--curve-batches", "3"]) == 2
    said = capsys.readouterr().err
    assert "none.json was computed on another stream (2×2 of" in said and "not 3×2 of" in said
    assert f"delete {tmp_path / 'curve'} to compute the curve anew" in said
    path = tmp_path / "curve" / "cells" / "none.json"
    old = {**json.loads(path.read_text(encoding="utf-8")), "metrics_version": 1}
    path.write_text(json.dumps(old), encoding="utf-8")
    assert cli.main(command) == 2
    assert "none.json holds scores of metrics version 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strengths", "0"], "--strengths has 0; give positive numbers"),
        (["--strengths", "1", "nan"], "--strengths has nan; give positive numbers"),
        (["--curve-batches", "0"], "--curve-batches is 0; give 1 or more"),
        (["--then-batches", "0"], "--then-batches is 0; give 1 or more"),
        (["--curve-batches", "99999"], "its batches are --curve-batches"),
        (["--then-batches", "99999"], "99999 batches of 2 need 199998 records"),
    ],
)
def test_bad_input_ends_with_2_and_one_line_before_anything_is_computed(arguments, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main([*CURVE, "--editors", "fine-tuning", "--out", str(out), *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and not out.exists()


@pytest.mark.parametrize("option", ["--strengths", "--then-batches"])
def test_options_of_the_curve_are_refused_without_it(option, tmp_path, capsys):
    command = [argument for argument in CURVE if argument != "--curve"]
    assert cli.main([*command, "--editors", "none", "--out", str(tmp_path / "out"), option, "2"]) == 2
    assert f"{option} is for the curve; give --curve, too" in capsys.readouterr().err


def test_the_stream_is_of_held_out_training_facts(tmp_path):
    from agents.running.comparison import Setting, Views
    from rledit_env.knowledge import held_out, load_knowledge

    training, test = (load_knowledge("counterfact", split=split) for split in ("train", "eval"))
    setting = Setting("RLEdit-CounterFact-v0", test, lambda: training, 2, 2)
    curve = Curve(Comparison(setting, Views("tiny-llama"), tmp_path), 4)
    scored = {(r.prompt, r.target) for r in test}
    assert curve.setting.test.records == held_out(training)[1].records
    assert not scored & {(r.prompt, r.target) for r in curve.setting.test}
    assert (curve.setting.num_batches, curve.setting.generate) == (4, False)
