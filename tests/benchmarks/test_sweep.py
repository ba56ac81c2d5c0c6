"""Tests of benchmarks/sweep.py: what is tried, on which facts, and what is kept and written."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from agents.running.comparison import Comparison
from agents.running.editors import EDITORS, configured
from rledit_env.evaluation.metrics import METRICS_VERSION
from rledit_env.knowledge import load_knowledge

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("sweep", ROOT / "benchmarks" / "sweep.py")
assert spec is not None and spec.loader is not None
sweep: Any = importlib.util.module_from_spec(spec)
sys.modules["sweep"] = sweep
spec.loader.exec_module(sweep)


@pytest.fixture
def args(tmp_path):
    grids = {"fine-tuning": {"config.step_size": [0.001, 0.1, 1e38], "env.token": ["answer"]},
             "none": {"env.token": ["answer", "all"]}}
    (tmp_path / "grids.json").write_text(json.dumps(grids), encoding="utf-8")
    return sweep.Args(
        editors=("fine-tuning",), model="tiny-llama", dtype="float32", batches=2, batch_size=2,
        grids=tmp_path / "grids.json", out=tmp_path / "out", results=tmp_path / "results.json",
        write=tmp_path / "model.json",
    )  # fmt: skip


def test_a_grid_s_points_are_all_combinations_and_nest_by_their_dots():
    found = list(sweep.points({"config.network.rank": [1, 2], "env.token": ["all"]}))
    assert found == [{"config.network.rank": 1, "env.token": "all"}, {"config.network.rank": 2, "env.token": "all"}]
    assert sweep.entry_of(found[0]) == {"config": {"network": {"rank": 1}}, "env": {"token": "all"}}


@pytest.mark.parametrize("name", json.loads((ROOT / "benchmarks" / "grids.json").read_text(encoding="utf-8")))
def test_every_point_of_the_grids_that_ship_is_a_configuration(name):
    for point in sweep.points(json.loads((ROOT / "benchmarks" / "grids.json").read_text(encoding="utf-8"))[name]):
        configured(EDITORS[name], {name: sweep.entry_of(point)})


def test_the_best_point_that_does_not_break_the_model_is_recorded_and_written(args, capsys):
    args.write.write_text(json.dumps({"models": ["x"], "editors": {"none": {"env": {"token": "all"}},
                          "fine-tuning": {"env": {"steps_per_batch": 2}, "note": "old"}}}), encoding="utf-8")
    sweep.main(args)
    result = json.loads(args.results.read_text(encoding="utf-8"))["tiny-llama/counterfact/fine-tuning"]
    means = {p["config.step_size"]: p["mean"] for p in result["points"]}
    assert len(means) == 3 and result["complete"] and result["metrics_version"] == METRICS_VERSION
    assert {p["config.step_size"]: p["diverged"] for p in result["points"]} == {0.001: False, 0.1: False, 1e38: True}
    best = result["best"]["config.step_size"]
    assert best != 1e38 and means[best] == max(means[0.001], means[0.1])
    assert result["at_edge"] == (["config.step_size"] if best == 0.001 else [])
    written = json.loads(args.write.read_text(encoding="utf-8"))
    assert written["models"] == ["x"] and written["editors"]["none"] == {"env": {"token": "all"}}
    entry = written["editors"]["fine-tuning"]
    assert entry["config"] == {"step_size": best} and entry["env"] == {"steps_per_batch": 2, "token": "answer"}
    assert "best of 3 points on 2×2 held-out training facts" in entry["note"]


def test_a_sweep_goes_on_with_the_points_that_are_missing(args, monkeypatch):
    measured = []
    measure = Comparison._measure

    def watched(self, editor, *rest):
        measured.append(editor.settings["step_size"])
        if len(measured) == 2:
            raise KeyboardInterrupt
        return measure(self, editor, *rest)

    monkeypatch.setattr(Comparison, "_measure", watched)
    with pytest.raises(KeyboardInterrupt):
        sweep.main(args)
    sweep.main(args)
    assert measured == [0.001, 0.1, 0.1, 1e38]
    sweep.main(args)
    assert len(measured) == 4


def test_no_point_is_begun_when_the_time_is_over(args, monkeypatch, capsys):
    monkeypatch.setattr(Comparison, "_measure", lambda *a: pytest.fail("a point was computed"))
    sweep.main(dataclasses.replace(args, minutes=0.0))
    assert "no point is there" in capsys.readouterr().out and not args.results.exists()


def test_points_are_scored_on_the_last_fifth_of_the_training_split_and_train_on_none_of_it(args):
    one = sweep.Sweep(args, "fine-tuning", None)
    whole = load_knowledge("counterfact", split="train").records
    cut = len(whole) - int(0.2 * len(whole))
    assert one.setting.test.records == whole[cut:] and one.setting.training().records == whole[:cut]


def test_json_is_spread_over_lines_only_where_it_does_not_fit():
    value = {"a": [1, {"b": "x" * 40}], "c": {"d": 1.5, "e": {"f": ["y" * 30, "z" * 30]}}, "g": {}}
    text = sweep.compact(value, width=50)
    assert json.loads(text) == value
    assert '"c": {' in text and '"a": [' in text and max(map(len, text.splitlines())) <= 50
    assert sweep.compact({"a": [1, 2]}) == '{"a": [1, 2]}'
