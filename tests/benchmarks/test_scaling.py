"""The scaling note's numbers are those of real objects, and it is what its script writes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from agents import Hypernetwork, HypernetworkConfig
from agents.rledit.normaliser import RunningNormaliser
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.loading.tiny import tiny_config

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import scaling


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2"])
def test_counts_without_memory_are_those_of_the_loaded_model(name: str) -> None:
    parameters, shapes = scaling.module_shapes(tiny_config(name))
    lm = EditableLM.load(name, list(shapes), dtype="float32", device="cpu")
    assert parameters == sum(p.numel() for p in lm.model.parameters())
    assert shapes == lm.module_shapes
    network = HypernetworkConfig(rank=3, blocks=2)
    built = Hypernetwork(shapes, network)
    normalisers = sum(
        t.numel() for s in shapes.values() for t in RunningNormaliser(sum(s)).state().values()
    )
    held = sum(p.numel() for p in built.parameters()) + normalisers
    assert Hypernetwork.parameter_count(shapes, network) == held


def test_efficiency_falls_with_processes_and_with_bytes_and_is_one_alone() -> None:
    t = scaling.Training()
    assert scaling.efficiency(1, 10.0, 1e9, t) == 1
    values = [scaling.efficiency(n, 10.0, 1e9, t) for n in (2, 8, 64)]
    assert values == sorted(values, reverse=True) and 0 < values[-1] < values[0] < 1
    assert scaling.efficiency(8, 10.0, 1e10, t) < scaling.efficiency(8, 10.0, 1e9, t)


def test_the_note_is_what_the_script_writes() -> None:
    note = Path(scaling.__file__).with_name("SCALING.md")
    assert note.read_text(encoding="utf-8") == scaling.report() + "\n"
