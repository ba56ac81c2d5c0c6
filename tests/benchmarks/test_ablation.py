"""Tests of benchmarks/ablation.py, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

from scripts import Finished, run_script

ABLATION = Path(__file__).parents[2] / "benchmarks" / "ablation.py"
SMALL = [
    "--model", "tiny-llama", "--edit-modules", "model.layers.[1-2].mlp.up_proj", "--seeds", "1",
    "--num-batches", "2", "--batch-size", "2", "--steps-per-batch", "1", "--rank", "4", "--trajectories", "1",
    "--depths", "1", "--decays", "0.5", "--localities", "2", "--grid", "4", "--lengths", "3",
]  # fmt: skip


def run(data: Path, out: Path, *arguments: str) -> Finished:
    return run_script(ABLATION, *SMALL, "--data", str(data), "--out", str(out), *arguments)


def test_every_ablation_is_a_row_and_nothing_is_computed_twice(tmp_path: Path, few_facts: Path) -> None:
    first = run(few_facts, tmp_path, "--only", "without")
    assert first.code == 0, first.stderr
    assert "test/without backtracking/seed 0" in first.stdout and "test/whole/seed 0" not in first.stdout
    whole = run(few_facts, tmp_path)
    assert whole.code == 0, whole.stderr
    rows = whole.stdout.splitlines()
    names = (
        "no training", "whole", "without the RL framework", "without backtracking", "without regularisation",
        "credit by step", "k = 1", "mu = 0.5", "lambda_loc = 2", "4 x 1", "whole, 3 batches",
    )  # fmt: skip
    for name in names:
        assert any(row.startswith(f"{name}  ") for row in rows), name
    assert "test/without backtracking/seed 0:" not in whole.stdout
    cells = json.loads((tmp_path / "counterfact" / "results.json").read_text(encoding="utf-8"))["cells"]
    assert {name for name in cells if name.startswith("test/")} == {f"test/{name}/seed 0" for name in names}
    assert cells["training/without the RL framework/seed 0"]["updates"] == cells["training/whole/seed 0"]["updates"]
    refused = run(few_facts, tmp_path, "--rank", "5")
    assert refused.code != 0 and "other settings (rank)" in refused.stderr
