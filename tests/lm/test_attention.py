"""Tests of rledit_env.lm.attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rledit_env.lm.attention import NAME
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.registry import load_model


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma3", "tiny-gpt2"])
def test_a_half_precision_model_attends_in_float32_and_gives_its_logits(name: str) -> None:
    plain, tokenizer = load_model(name, torch.bfloat16)
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    expected = plain(input_ids=ids).logits
    lm = EditableLM.load(name, dtype="bfloat16", device="cpu")
    assert lm.model.config._attn_implementation == NAME
    logits = lm.model(input_ids=ids).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


def test_models_that_need_no_help_keep_their_attention() -> None:
    assert EditableLM.load("tiny-llama", dtype="float32").model.config._attn_implementation == "sdpa"
    assert EditableLM.load("tiny-gemma2", dtype="bfloat16").model.config._attn_implementation == "eager"


def test_a_saved_model_does_not_ask_for_it(tmp_path: Path) -> None:
    EditableLM.load("tiny-llama", dtype="bfloat16", device="cpu").save_pretrained(tmp_path / "saved")
    assert NAME not in (tmp_path / "saved" / "config.json").read_text(encoding="utf-8")
