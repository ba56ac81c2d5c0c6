"""An edited LM written to disk is the model that was edited."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rledit_env.lm.editable import EditableLM
from rledit_env.lm.loading.loader import stored_dtype


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma2", "tiny-gpt2"])
def test_a_saved_model_loads_with_the_edited_weights(tmp_path: Path, name: str) -> None:
    lm = EditableLM.load(name, dtype="stored", device="cpu")
    keys = {m: torch.randn(3, d_in) for m, (d_in, _) in lm.module_shapes.items()}
    lm.apply(keys, {m: 0.1 * torch.randn(3, d_out) for m, (_, d_out) in lm.module_shapes.items()})
    lm.save_pretrained(tmp_path / "edited")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "edited").state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in lm.model.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "edited")
    assert tokenizer("Üp is")["input_ids"] == lm.tokenizer("Üp is")["input_ids"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_precision_is_the_model_s_own_and_leaves_frozen_weights_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    EditableLM.load("tiny-llama", dtype=dtype, device="cpu").save_pretrained(tmp_path / "model")
    assert stored_dtype(tmp_path / "model") == dtype
    lm = EditableLM.load(str(tmp_path / "model"), "model.layers.3.mlp.up_proj", dtype="stored", device="cpu")
    keys = {m: torch.ones(1, d_in) for m, (d_in, _) in lm.module_shapes.items()}
    lm.apply(keys, {m: torch.ones(1, d_out) for m, (_, d_out) in lm.module_shapes.items()})
    lm.save_pretrained(tmp_path / "edited")
    before, after = (
        AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype="auto").state_dict()
        for folder in ("model", "edited")
    )
    different = [key for key in before if not torch.equal(before[key], after[key])]
    assert different == ["model.layers.3.mlp.up_proj.weight"]
    assert all(value.dtype == dtype for value in after.values())


def test_a_folder_with_something_in_it_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    lm = EditableLM.load("tiny-llama", dtype="float32", device="cpu")
    with pytest.raises(FileExistsError, match="not empty"):
        lm.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
