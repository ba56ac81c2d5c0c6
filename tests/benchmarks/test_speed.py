"""The plain path of benchmarks/reference.py and the package compute the same step; benchmarks/speed.py runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rledit_env.lm.editable import EditableLM

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import speed

MODULES = {
    "tiny-gpt2": "transformer.h.[1-2].mlp.c_{fc,proj}",
    **dict.fromkeys(
        ("tiny-llama", "tiny-mistral", "tiny-gemma2", "tiny-gemma3", "tiny-qwen2", "tiny-qwen3"),
        "model.layers.[1-2].mlp.{gate,down}_proj",
    ),
}


SMALL: dict[str, Any] = {
    "batch_size": 2, "depth": 2, "samples": 1, "rank": 8, "blocks": 2, "repeats": 1, "threads": 1, "device": "cpu",
}  # fmt: skip


@pytest.mark.parametrize("model", MODULES)
def test_the_plain_path_gives_the_same_loss_update_and_gradients(model: str) -> None:
    # The comparison is of float32; bfloat16 beside it is timed only, and emulated on older processors.
    args = speed.Args(model=model, edit_modules=(MODULES[model],), dtypes=("float32",), **SMALL)
    deviations = speed.Benchmark(args).step()["greatest relative deviation"]
    assert set(deviations) == {"loss", "ΔW", "gradient of the weights", "gradient of the network"}
    # float32, whose normal equations round more than the dual does; an omitted term or token would show at 1e-2.
    assert max(deviations.values()) < 1e-3, deviations


def test_every_section_writes_its_numbers(tmp_path: Path) -> None:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    command = [
        sys.executable, speed.__file__, "--model", "tiny-llama", "--edit-modules", MODULES["tiny-llama"], *options,
        "--edit-batch-size", "3", "--solve-widths", "1024", "--growth-edits", "24", "--growth-batch-sizes", "2", "3",
        "--growth-depths", "0", "1", "--out", str(tmp_path), "--sections", "step", "edit", "solve", "memory", "growth",
    ]  # fmt: skip
    process = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr
    results = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))["results"]
    assert "bfloat16, exact" in results["step"]["rows"]
    assert {"editing, reference", "editing, bfloat16"} <= set(results["edit"])
    assert results["solve"]["1024"]["relative deviation"] < 1e-4
    assert results["memory"]["reference"] > 0 and results["memory"]["package"] > 0
    assert len(results["growth"]["seconds by edits so far"]) == 12
    assert [*results["growth"]["seconds by n"]] == ["2", "3"] and [*results["growth"]["seconds by k"]] == ["0", "1"]
    assert (tmp_path / "growth.png").stat().st_size > 0


def test_a_shape_s_model_is_the_same_every_time_and_reads_with_a_tokenizer_it_has_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(speed.__file__).parent))
    import shapes

    numbers, _ = shapes.SHAPES["random-llama-3-8b"]
    assert numbers["num_hidden_layers"] == 32
    small = {**numbers, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 300, "bos_token_id": 2, "eos_token_id": 1}  # fmt: skip
    monkeypatch.setitem(shapes.SHAPES, "small", (small, ("model.layers.[1-2].mlp.up_proj",)))
    folder = str(EditableLM.load("tiny-llama", device="cpu").save_pretrained(tmp_path / "tiny"))
    state = torch.random.get_rng_state()
    first, second = (shapes.random_model("small", folder, torch.bfloat16, torch.device("cpu")) for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert first.dtype == torch.bfloat16 and set(first.module_shapes.values()) == {(32, 48)}
    other = shapes.random_model("small", folder, torch.bfloat16, torch.device("cpu"), ["model.layers.0.mlp.gate_proj"])
    assert list(other.module_shapes) == ["model.layers.0.mlp.gate_proj"]
    weights = second.model.state_dict()
    assert all(torch.equal(weight, weights[n]) for n, weight in first.model.state_dict().items())
    assert first.trace([first.tokenize("Rome is in", "Peru")]).loss > 0
    monkeypatch.setitem(shapes.SHAPES, "small", ({**small, "vocab_size": 200}, ("model.layers.1.mlp.up_proj",)))
    with pytest.raises(ValueError, match="has 259 tokens; small has fewer"):
        shapes.random_model("small", folder, torch.bfloat16, torch.device("cpu"))
