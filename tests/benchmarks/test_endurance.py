"""Thousands of edits in one process: memory stays flat, and the weights are what the ledger adds up to."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from rledit_env.evaluation.metrics import METRICS_VERSION

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import endurance


def test_flatness_is_zero_for_a_constant_and_sees_growth() -> None:
    assert endurance.flatness(np.full(100, 7.0), 0.2) == 0
    assert endurance.flatness(np.linspace(1, 2, 100), 0.2) > 0.1
    spiked = np.where(np.arange(100) % 10 == 0, 9.0, 1.0)
    assert endurance.flatness(spiked, 0.2) == 0, "single slow steps are no growth"


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("steps", [400, pytest.param(5000, marks=pytest.mark.slow)])
def test_many_steps_leave_memory_flat_and_the_weights_the_ledgers_sum(tmp_path: Path, steps: int) -> None:
    args = endurance.Args(
        model="tiny-llama", kind="zsre", edits=steps, batch_size=1, measure_every=steps // 2,
        measured_facts=steps // 50, distinct_facts=steps // 50, out=tmp_path,
    )  # fmt: skip
    result = endurance.run(args)
    assert result["updates"] == steps and result["edits"] == steps and not result["diverged"]
    assert result["metrics_version"] == METRICS_VERSION
    assert result["memory_deviation"] < 0.05
    assert result["memory_growth"] < 0.05
    assert result["weights_off_sum_in_roundings"] < steps**0.5
    assert result["ledger_damage"] is None
    assert [m["edits"] for m in result["metrics"]] == [0, steps // 2, steps // 2, steps, steps]
