"""Tests of benchmarks/learning.py, on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

LEARNING = Path(__file__).parents[2] / "benchmarks" / "learning.py"
SMALL = [
    "--data", "bundled", "--model", "tiny-llama", "--edit-modules", "model.layers.[1-2].mlp.up_proj", "--seeds", "1",
    "--num-batches", "2", "--batch-size", "2", "--longer", "3",
    "--steps-most", "2", "--rank", "4",
    *(
        f"--{kind}.{name}=1"
        for kind in ("recursive", "paper", "paper-repeated")
        for name in ("steps", "num-batches", "batch-stride", "trajectories", "select-batches")
    ),
    "--paper-repeated.steps=2",
]  # fmt: skip


def run(out: Path, *arguments: str) -> str:
    command = [sys.executable, str(LEARNING), *SMALL, "--out", str(out), *arguments]
    process = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_the_table_has_every_editor_and_nothing_is_computed_twice(tmp_path: Path) -> None:
    first = run(tmp_path, "--only", "RLEdit, recursive, 1 step")
    assert "test/RLEdit, recursive, 1 step/seed 0" in first and "no edit" not in first
    whole = run(tmp_path)
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
    again = run(tmp_path)
    assert "[" not in again.split("\n", 1)[1]
    assert again.splitlines()[1:] == [row for row in rows[1:] if not row.startswith("[") and "update" not in row]


def test_results_of_other_settings_are_not_mixed_with(tmp_path: Path) -> None:
    run(tmp_path, "--only", "no edit")
    process = subprocess.run(
        [sys.executable, str(LEARNING), *SMALL, "--out", str(tmp_path), "--rank", "5"],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert process.returncode != 0 and "other settings (rank)" in process.stderr
