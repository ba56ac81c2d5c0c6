"""`rledit compare`: every editor in one table, whatever happens on the way."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from agents.running.comparison import Comparison
from agents.running.editors import EDITORS
from rledit_env import cli
from rledit_env.evaluation.metrics import METRICS_VERSION

ROOT = Path(__file__).parents[2]
COMPARE = [
    "compare", "--model", "tiny-llama", "--batches", "2", "--batch-size", "2", "--dtype", "float32", "--device", "cpu",
]  # fmt: skip
COUNTERFACT, FEVER = ["--env", "RLEdit-CounterFact-v0"], ["--env", "RLEdit-FEVER-v0"]


def rows_of(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "table.csv").open(encoding="utf-8", newline="") as file:
        return {row["editor"]: row for row in csv.DictReader(file)}


def cells_of(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted((folder / "cells").rglob("*.json"))}


@pytest.mark.parametrize("env", [COUNTERFACT, FEVER], ids=["counterfact", "fever"])
def test_every_editor_has_a_row_in_every_form_of_the_table(env, tmp_path, capsys):
    out = tmp_path / "all"
    assert cli.main([*COMPARE, *env, "--editors", "all", "--seeds", "1", "--out", str(out)]) == 0
    rows = rows_of(out)
    assert list(rows) == list(EDITORS)
    edited = [row for row in rows.values() if row["applicable"] == "1"]
    assert {"none", "rledit", "mend*", "ultraedit"} <= {row["editor"] for row in edited}
    for row in edited:
        for key in ("efficacy", "generalization", "specificity", "specificity_answer", "exact_match", "mean"):
            assert 0 <= float(row[f"{key}_mean"]) <= 100
        assert 0 < float(row["seconds_per_fact_mean"]) <= float(row["seconds_per_fact_in_all_mean"])
    trained = [row for row in edited if EDITORS[row["editor"]].training or EDITORS[row["editor"]].trained_as]
    assert all(float(r["seconds_per_fact_in_all_mean"]) > float(r["seconds_per_fact_mean"]) for r in trained)
    markdown, latex = ((out / f"table.{form}").read_text(encoding="utf-8") for form in ("md", "tex"))
    shown = capsys.readouterr().out
    for editor in EDITORS.values():
        assert editor.title in shown and editor.title.replace("*", "\\*") in markdown and editor.title in latex
    assert "**" in markdown and "\\textbf{" in latex
    assert "2×2 facts of bundled sample" in shown and "1 stream" in shown
    if env is FEVER:
        assert all(row["specificity_mean"] for row in edited)


def test_a_killed_comparison_keeps_its_finished_cells_and_goes_on(tmp_path):
    out = tmp_path / "killed"
    command = [*COMPARE, *COUNTERFACT, "--editors", "none", "fine-tuning", "rledit", "--seeds", "2", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "rledit_env.cli", *command], cwd=ROOT, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while not (out / "cells" / "fine-tuning" / "seed-0.json").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = cells_of(out)
    assert 3 <= len(kept) < 6
    assert all(json.loads((out / name).read_text(encoding="utf-8"))["efficacy"] >= 0 for name in kept)
    assert cli.main(command) == 0
    after = cells_of(out)
    assert len(after) == 6 and kept.items() <= after.items()
    assert list(rows_of(out)) == ["none", "fine-tuning", "rledit"]


def test_what_is_finished_is_printed_again_without_loading_the_model_and_editors_join(tmp_path, capsys, monkeypatch):
    command = [*COMPARE, *COUNTERFACT, "--seeds", "1", "--out", str(tmp_path), "--editors"]
    assert cli.main([*command, "none"]) == 0
    assert cli.main([*command, "fine-tuning", "none"]) == 0
    first = capsys.readouterr().out
    assert "none, fine-tuning; 1 to run" in first
    monkeypatch.setattr("agents.running.comparison.EditableLM.load", lambda *a: pytest.fail("the model was loaded"))
    assert cli.main([*command, "fine-tuning", "none"]) == 0
    again = capsys.readouterr().out
    table = [line for line in first.splitlines() if line.startswith(("no edit", "gradient"))][-2:]
    assert all(line in again for line in table) and "0 to run" in again


def test_the_divergence_on_human_text_is_of_the_file_asked_for_and_another_one_is_refused(tmp_path, capsys):
    text, out = tmp_path / "book.txt", tmp_path / "compared"
    text.write_text("Nobody had seen the river so high since the old mill was built. " * 40, encoding="utf-8")
    arguments = [*COMPARE, *COUNTERFACT, "--editors", "fine-tuning", "--seeds", "1", "--no-generate", "--out", str(out)]
    assert cli.main([*arguments, "--text", str(text)]) == 0
    assert "on human text (file book.txt)" in capsys.readouterr().out
    row, (cell,) = rows_of(out)["fine-tuning"], [json.loads(p.read_text()) for p in out.rglob("seed-0.json")]
    assert float(row["kl_human_mean"]) == cell["kl_human"] != cell["kl"] and row["kl_chat_mean"] == ""
    assert cli.main(arguments) == 2
    assert f"holds a comparison with text '{text}', not None" in capsys.readouterr().err
    assert cli.main([*arguments[:-1], str(tmp_path / "two"), "--text", str(tmp_path / "none.txt")]) == 2
    assert "there is no text file" in capsys.readouterr().err
    configs = tmp_path / "configs.json"
    configs.write_text(json.dumps({"editors": {"memit": {"config": {"corpus": str(text)}}}}))
    learnt = [*arguments[:-1], str(tmp_path / "three"), "--configs", str(configs), "--text", str(text)]
    learnt[learnt.index("fine-tuning")] = "memit"
    assert cli.main(learnt) == 2
    assert f"--text {text} is the text that the editor's prior is made from" in capsys.readouterr().err
    # A folder from before there was such a text goes on, and its cells have a dash.
    settings = json.loads((out / "comparison.json").read_text())
    del settings["text"], cell["kl_human"], cell["kl_chat"]
    (out / "comparison.json").write_text(json.dumps(settings))
    next(out.rglob("seed-0.json")).write_text(json.dumps(cell))
    assert cli.main(arguments) == 0
    assert rows_of(out)["fine-tuning"]["kl_human_mean"] == "" != rows_of(out)["fine-tuning"]["kl_mean"]


def test_an_interruption_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    measure = Comparison._measure

    def interrupted(self: Any, editor: Any, *arguments: Any) -> Any:
        if editor.name == "fine-tuning":
            raise KeyboardInterrupt
        return measure(self, editor, *arguments)

    command = [*COMPARE, *COUNTERFACT, "--editors", "none", "fine-tuning", "--seeds", "1", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(Comparison, "_measure", interrupted)
        assert cli.main(command) == 130
    said = capsys.readouterr().err
    assert f"the finished cells are in {tmp_path}" in said and "rledit compare --model tiny-llama" in said
    assert list(rows_of(tmp_path)) == ["none"]
    assert cli.main(command) == 0


def test_an_editor_that_fails_is_named_and_the_others_have_their_rows(tmp_path, capsys, monkeypatch):
    def fail(self: Any, observation: Any, deterministic: bool = True) -> Any:
        raise ValueError("no such luck")

    monkeypatch.setattr("agents.fine_tuning.baselines.FineTuningAgent.predict", fail)
    editors = ["--editors", "none", "fine-tuning", "ultraedit"]
    assert cli.main([*COMPARE, *COUNTERFACT, *editors, "--seeds", "1", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "gradient failed: no such luck" in said and "failed: fine-tuning; the same command tries" in said
    assert list(rows_of(tmp_path)) == ["none", "ultraedit"]


def test_an_editor_that_is_not_applicable_says_so_in_the_table_and_why(tmp_path, capsys, monkeypatch):
    from agents import NotApplicable

    def refuse(self: Any, observation: Any, deterministic: bool = True) -> Any:
        raise NotApplicable("the facts name no subject")

    monkeypatch.setattr("agents.fine_tuning.baselines.FineTuningAgent.predict", refuse)
    command = [*COMPARE, *FEVER, "--editors", "none", "fine-tuning", "--seeds", "2", "--out", str(tmp_path)]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "gradient: not applicable, the facts name no subject" in said
    assert "| gradient | not applicable |" in (tmp_path / "table.md").read_text(encoding="utf-8")
    assert rows_of(tmp_path)["fine-tuning"]["applicable"] == "0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--editors", "romeo"], "editor 'romeo' is unknown; editors are none,"),
        (["--editors", "none", "--batches", "0"], "--batches is 0; give 1 or more"),
        (["--editors", "none", "--seeds", "0"], "--seeds is 0; give 1 or more"),
        (["--editors", "none", "--metrics", "rome"], "metrics 'rome' is unknown; give one of 'paper'"),
        (["--editors", "none", "--batches", "9999"], "9999 batches of 2 need 19998 records, but bundled"),
        (["--editors", "none", "--data", "./nowhere.jsonl"], "nowhere.jsonl: there is no such file"),
        (["--editors", "none", "--configs", "./nowhere.json"], "nowhere.json"),
        (["--editors", "none", "--model", "./nowhere"], "nowhere"),
        (["--editors", "none", "--edit-modules", "nothing"], "pattern 'nothing' matches no linear module"),
    ],
)
def test_bad_input_ends_with_2_and_one_line_before_anything_is_computed(arguments, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main([*COMPARE, *COUNTERFACT, "--seeds", "1", "--out", str(out), *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not out.exists()


def test_one_file_for_training_and_scoring_is_refused(tmp_path, capsys):
    from rledit_env.knowledge import source

    file = str(source.BUNDLED / "counterfact_eval.jsonl.gz")
    command = [*COMPARE, *COUNTERFACT, "--seeds", "1", "--data", file, "--out", str(tmp_path / "out"), "--editors"]
    assert cli.main([*command, "rledit"]) == 2
    assert "give the training facts with --train-data" in capsys.readouterr().err
    assert cli.main([*command, "none"]) == 0  # who learns nothing needs none


def test_a_folder_of_another_comparison_is_refused(tmp_path, capsys):
    command = [*COMPARE, *COUNTERFACT, "--editors", "none", "--seeds", "1", "--out", str(tmp_path)]
    assert cli.main(command) == 0
    capsys.readouterr()
    assert cli.main([*command, "--batches", "3"]) == 2
    assert f"{tmp_path} holds a comparison with batches 2, not 3; give another --out" in capsys.readouterr().err


def aged(out: Path, editor: str = "none", seed: int = 0) -> Path:
    """A cell as the first version of the metrics wrote it: without one."""
    path = out / "cells" / editor / f"seed-{seed}.json"
    cell = json.loads(path.read_text(encoding="utf-8"))
    assert cell.pop("metrics_version") == METRICS_VERSION and cell.pop("metrics") == "paper"
    path.write_text(json.dumps(cell), encoding="utf-8")
    settings = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    del settings["metrics"]
    (out / "comparison.json").write_text(json.dumps(settings), encoding="utf-8")
    return path


def test_cells_of_another_metrics_version_are_refused_before_anything_is_computed(tmp_path, capsys, monkeypatch):
    command = [*COMPARE, *COUNTERFACT, "--seeds", "2", "--out", str(tmp_path), "--no-generate", "--editors"]
    assert cli.main([*command, "none"]) == 0
    (tmp_path / "cells" / "none" / "seed-0.json").unlink()  # a missing cell before it does not hide the old one
    old = aged(tmp_path, seed=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    monkeypatch.setattr("agents.running.comparison.EditableLM.load", lambda *_, **__: pytest.fail("a model is loaded"))
    assert cli.main([*command, "none", "fine-tuning"]) == 2
    said = capsys.readouterr().err
    assert f"{old} holds scores of metrics version 1, which do not compare with those of version 2" in said
    assert f"delete {old} to compute it anew, or give another folder" in said and "Traceback" not in said
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_cell_without_scores_has_no_metrics_version(tmp_path, capsys, monkeypatch):
    from agents import NotApplicable

    def refuse(self: Any, observation: Any, deterministic: bool = True) -> Any:
        raise NotApplicable("the facts name no subject")

    monkeypatch.setattr("agents.fine_tuning.baselines.FineTuningAgent.predict", refuse)
    command = [*COMPARE, *FEVER, "--editors", "fine-tuning", "--seeds", "1", "--out", str(tmp_path)]
    assert cli.main(command) == cli.main(command) == 0


def test_scores_of_two_ways_to_score_are_not_mixed(tmp_path, capsys):
    command = [*COMPARE, *COUNTERFACT, "--editors", "none", "--seeds", "1", "--out", str(tmp_path), "--no-generate"]
    assert cli.main([*command, "--metrics", "rledit-code"]) == 0
    cell = json.loads((tmp_path / "cells" / "none" / "seed-0.json").read_text(encoding="utf-8"))
    assert (cell["metrics"], cell["metrics_version"]) == ("rledit-code", METRICS_VERSION)
    assert "with metrics 'rledit-code'" in capsys.readouterr().out
    assert cli.main(command) == 2
    assert "holds a comparison with metrics 'rledit-code', not 'paper'" in capsys.readouterr().err
    (tmp_path / "comparison.json").unlink()  # the cell itself says how it was scored, too
    assert cli.main(command) == 2
    assert "seed-0.json was scored with metrics 'rledit-code', not 'paper'; delete" in capsys.readouterr().err
