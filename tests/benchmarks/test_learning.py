"""Tests of benchmarks/learning.py, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

from scripts import run_script

LEARNING = Path(__file__).parents[2] / "benchmarks" / "learning.py"
SMALL = [
    "--model", "tiny-llama", "--edit-modules", "model.layers.[1-2].mlp.up_proj", "--seeds", "1",
    "--num-batches", "2", "--batch-size", "2", "--longer", "3",
    "--steps-most", "2", "--rank", "4",
    *(
        f"--{kind}.{name}=1"
        for kind in ("recursive", "paper", "paper-repeated")
        for name in ("steps", "num-batches", "batch-stride", "trajectories", "select-batches")
    ),
    "--paper-repeated.steps=2",
]  # fmt: skip


def run(data: Path, out: Path, *arguments: str) -> str:
    process = run_script(LEARNING, *SMALL, "--data", str(data), "--out", str(out), *arguments)
    assert process.code == 0, process.stderr
    return process.stdout


def test_the_table_has_every_editor_and_nothing_is_computed_twice(tmp_path: Path, few_facts: Path) -> None:
    first = run(few_facts, tmp_path, "--only", "RLEdit, recursive, 1 step")
    assert "test/RLEdit, recursive, 1 step/seed 0" in first and "no edit" not in first
    whole = run(few_facts, tmp_path)
    cells = json.loads((tmp_path / "counterfact" / "results.json").read_text(encoding="utf-8"))["cells"]
    rows = whole.splitlines()
    for name in (
        "no edit", "fine-tuning gradient, 1 step", "per-batch least squares, 3 steps",
        "recursive least squares, 2 steps", "RLEdit, per-batch, 1 step", "RLEdit, recursive, 1 step, 3 batches",
    ):  # fmt: skip
        assert any(row.startswith(f"{name} ") for row in rows), name
    assert "test/RLEdit, recursive, 1 step/seed 0:" not in whole
    longer = "test, 3 batches/RLEdit, recursive, 2 steps, calibrated/seed 0"
    assert {"training/recursive 1 step/seed 0", longer} <= set(cells)
    again = run(few_facts, tmp_path)
    assert "[" not in again.split("\n", 1)[1]
    assert again.splitlines()[1:] == [row for row in rows[1:] if not row.startswith("[") and "update" not in row]


def test_results_of_other_settings_are_not_mixed_with(tmp_path: Path, few_facts: Path) -> None:
    run(few_facts, tmp_path, "--only", "no edit")
    process = run_script(LEARNING, *SMALL, "--data", str(few_facts), "--out", str(tmp_path), "--rank", "5")
    assert process.code != 0 and "other settings (rank)" in process.stderr
    path = tmp_path / "counterfact" / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    del results["settings"]["metrics_version"]  # as the first version of the metrics wrote it
    path.write_text(json.dumps(results), encoding="utf-8")
    process = run_script(LEARNING, *SMALL, "--data", str(few_facts), "--out", str(tmp_path))
    assert process.code != 0 and "other settings (metrics_version)" in process.stderr
