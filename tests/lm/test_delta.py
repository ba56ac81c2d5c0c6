"""Only the change, written and loaded again, makes the model that was edited."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rledit_env.lm.delta import DELTA_FILE, changes, load_delta, low_rank, relative_error, save_delta, save_lora
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.loading.loader import load_model

IDS = torch.tensor([[70, 80, 90, 100, 110]])
MODULES = {"tiny-llama": "model.layers.[1-2].mlp.*", "tiny-gpt2": "transformer.h.[1-2].mlp.*"}  # gpt2: Conv1D


def edited(name: str = "tiny-llama", rank: int = 3, dtype: torch.dtype = torch.float32) -> EditableLM:
    """A tiny LM with an update of this rank in every edited module."""
    lm = EditableLM.load(name, MODULES[name], dtype=dtype, device="cpu")
    generator = torch.Generator().manual_seed(1)
    for _ in range(rank):
        lm.apply(
            {m: 0.2 * torch.randn(1, d_in, generator=generator) for m, (d_in, _) in lm.module_shapes.items()},
            {m: 0.2 * torch.randn(1, d_out, generator=generator) for m, (_, d_out) in lm.module_shapes.items()},
        )
    return lm


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits.float()


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("rank", [2, 40])  # few enough for factors, and too many
def test_a_loaded_delta_gives_the_edited_model_s_logits(tmp_path: Path, name: str, rank: int) -> None:
    lm = edited(name, rank)
    save_delta(lm, tmp_path / "delta")
    tensors = load_file(tmp_path / "delta" / DELTA_FILE)
    assert any(key.endswith(".up") for key in tensors) == (rank == 2)
    base, _ = load_model(name)
    assert not torch.allclose(logits(base), logits(lm.model), atol=1e-2)
    assert load_delta(base, tmp_path / "delta") is base
    torch.testing.assert_close(logits(base), logits(lm.model), atol=1e-4, rtol=1e-4)


def test_an_editable_lm_takes_a_delta_as_edits_that_reset_undoes(tmp_path: Path) -> None:
    lm = edited(dtype=torch.bfloat16)
    save_delta(lm, tmp_path / "delta")
    other = EditableLM.load("tiny-llama", MODULES["tiny-llama"], dtype="bfloat16", device="cpu")
    load_delta(other, tmp_path / "delta")
    for module in lm.module_shapes:
        torch.testing.assert_close(other.weight(module), lm.weight(module), atol=1e-6, rtol=1e-6)
    assert other.drift() == pytest.approx(lm.drift(), rel=1e-4)
    other.restore()
    assert all(torch.equal(other.weight(m), other.original_weight(m)) for m in lm.module_shapes)


def test_a_delta_is_not_added_to_another_model_nor_twice(tmp_path: Path) -> None:
    save_delta(edited(), tmp_path / "delta")
    base, _ = load_model("tiny-llama")
    load_delta(base, tmp_path / "delta")
    before = logits(base)
    with pytest.raises(ValueError, match=r"belongs to tiny-llama, as it was before any editing"):
        load_delta(base, tmp_path / "delta")
    assert torch.equal(logits(base), before)
    with pytest.raises(ValueError, match="which the model does not have; it was made for tiny-llama"):
        load_delta(load_model("tiny-gpt2")[0], tmp_path / "delta")
    with pytest.raises(ValueError, match=r"tiny-qwen2|other weights"):
        load_delta(load_model("tiny-qwen2")[0], tmp_path / "delta")
    other = EditableLM.load("tiny-llama", "model.layers.3.mlp.up_proj", dtype="float32", device="cpu")
    with pytest.raises(ValueError, match="not among the edited modules"):
        load_delta(other, tmp_path / "delta")


def test_a_base_in_another_precision_is_still_the_base(tmp_path: Path) -> None:
    save_delta(edited(), tmp_path / "delta")
    base, _ = load_model("tiny-llama", torch.bfloat16)
    load_delta(base, tmp_path / "delta")
    torch.testing.assert_close(logits(base), logits(edited().model), atol=0.3, rtol=0.1)


def test_a_damaged_or_missing_delta_raises(tmp_path: Path) -> None:
    base, _ = load_model("tiny-llama")
    with pytest.raises(FileNotFoundError, match="holds no delta.safetensors"):
        load_delta(base, tmp_path)
    (tmp_path / DELTA_FILE).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="is damaged"):
        load_delta(base, tmp_path)


@pytest.mark.parametrize("name", MODULES)
def test_peft_loads_an_exact_adapter_that_gives_the_same_logits(tmp_path: Path, name: str) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra rledit-env[peft]")
    lm = edited(name)
    factors = save_lora(lm, tmp_path / "adapter")
    assert {one.rank for one in factors.values()} == {3}
    assert all(one.exact for one in factors.values())
    assert relative_error(lm, factors) < 1e-5
    base, _ = load_model(name)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(adapted), logits(lm.model), atol=1e-4, rtol=1e-4)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(lm.model), atol=1e-4, rtol=1e-4)


def test_a_cut_adapter_has_the_error_it_names(tmp_path: Path) -> None:
    lm = edited(rank=6)
    factors = save_lora(lm, tmp_path / "adapter", rank=2)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 2
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    wrong, whole = 0.0, 0.0
    for module, change in changes(lm).items():
        name = f"base_model.model.{module}"
        kept = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        wrong, whole = wrong + float((change - kept).square().sum()), whole + float(change.square().sum())
        assert not factors[module].exact
    assert relative_error(lm, factors) == pytest.approx((wrong / whole) ** 0.5, rel=1e-4)
    assert relative_error(lm, factors) > 0.1


def test_no_other_factors_of_that_rank_come_closer() -> None:
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(12, 20, generator=generator)
    best = low_rank(change, 1.0, rank=3)
    errors = []
    for _ in range(20):
        up = best.up + 0.05 * torch.randn(best.up.shape, generator=generator)
        down = torch.linalg.lstsq(up, change).solution
        errors.append(float((change - up @ down).norm() / change.norm()))
    assert min(errors) > best.error
    assert best.error == pytest.approx(float((change - best.up @ best.down).norm() / change.norm()), rel=1e-4)


def test_no_change_is_an_exact_adapter_of_rank_one() -> None:
    nothing = low_rank(torch.zeros(4, 6), 1.0)
    assert (nothing.rank, nothing.error, nothing.exact) == (1, 0.0, True)


def test_a_rank_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rank is 0; give 1 or more"):
        save_lora(edited(), tmp_path / "adapter", rank=0)


@pytest.mark.real
def test_the_default_model_s_delta_and_adapter_give_the_edited_logits(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra rledit-env[peft]")
    lm = EditableLM.load("smollm2-135m", "model.layers.[6-8].mlp.up_proj", dtype="stored", device="cpu")
    generator = torch.Generator().manual_seed(1)
    lm.apply(
        {m: 0.1 * torch.randn(4, d_in, generator=generator) for m, (d_in, _) in lm.module_shapes.items()},
        {m: 0.1 * torch.randn(4, d_out, generator=generator) for m, (_, d_out) in lm.module_shapes.items()},
    )
    save_delta(lm, tmp_path / "delta")
    assert all(one.exact and one.rank == 4 for one in save_lora(lm, tmp_path / "adapter").values())
    dtype = lm.dtype
    changed = load_delta(load_model("smollm2-135m", dtype)[0], tmp_path / "delta")
    adapted = peft.PeftModel.from_pretrained(load_model("smollm2-135m", dtype)[0], tmp_path / "adapter")
    for model in (changed, adapted):
        torch.testing.assert_close(logits(model), logits(lm.model), atol=1e-3, rtol=1e-3)
