"""The plain path of benchmarks/reference.py and the package compute the same step; benchmarks/speed.py runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SPEED = Path(__file__).parents[2] / "benchmarks" / "speed.py"
MODULES = {
    "tiny-gpt2": "transformer.h.[1-2].mlp.c_{fc,proj}",
    **dict.fromkeys(
        ("tiny-llama", "tiny-mistral", "tiny-gemma2", "tiny-gemma3", "tiny-qwen2", "tiny-qwen3"),
        "model.layers.[1-2].mlp.{gate,down}_proj",
    ),
}


def run(out: Path, model: str, *sections: str) -> dict[str, dict[str, float]]:
    command = [
        sys.executable, str(SPEED), "--model", model, "--edit-modules", MODULES[model], "--batch-size", "2", "--depth",
        "2", "--samples", "1", "--rank", "8", "--blocks", "2", "--repeats", "1", "--edit-batch-size", "3", "--threads",
        "1", "--solve-widths", "2048", "--growth-edits", "24", "--device", "cpu", "--out", str(out), "--sections",
        *sections,
    ]  # fmt: skip
    process = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr
    return json.loads((out / "speed.json").read_text(encoding="utf-8"))["results"]


@pytest.mark.parametrize("model", MODULES)
def test_the_plain_path_gives_the_same_loss_update_and_gradients(tmp_path: Path, model: str) -> None:
    deviations = run(tmp_path, model, "step")["step"]["greatest relative deviation"]
    assert set(deviations) == {"loss", "ΔW", "gradient of the weights", "gradient of the network"}
    # float32, whose normal equations round more than the dual does; an omitted term or token would show at 1e-2.
    assert max(deviations.values()) < 1e-3, deviations


def test_every_section_writes_its_numbers(tmp_path: Path) -> None:
    results = run(tmp_path, "tiny-llama", "edit", "solve", "memory", "growth")
    assert {"editing, reference", "editing, bfloat16"} <= set(results["edit"])
    assert results["solve"]["2048"]["relative deviation"] < 1e-4
    assert results["memory"]["reference"] > 0 and results["memory"]["package"] > 0
    assert len(results["growth"]["seconds by edits so far"]) == 12
    assert (tmp_path / "growth.png").stat().st_size > 0
