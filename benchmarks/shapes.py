"""Models with the shape of a published one and random weights: speed and memory do not depend on what they know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from rledit_env.lm.editable import EditableLM
from rledit_env.lm.loading.fetching import fetch

# Name → configuration, and the modules that the paper edits (Appendix A).
SHAPES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "random-llama-3-8b": (
        {
            "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "bos_token_id": 128000, "eos_token_id": 128001,
        },
        ("model.layers.[11-15].mlp.gate_proj", "model.layers.[18-24].mlp.up_proj"),
    ),
}  # fmt: skip


def random_model(
    name: str, tokenizer: str, dtype: torch.dtype, device: torch.device, edit_modules: Sequence[str] = (),
    optimize: bool = True,
) -> EditableLM:
    """A Llama of a shape of :data:`SHAPES`, its weights drawn on the device itself from a seed.

    Args:
        name: of the shape.
        tokenizer: model name or folder whose tokenizer it reads with, which must not have more tokens.
        dtype: precision of the weights.
        device: where they are.
        edit_modules: instead of the shape's own.
        optimize: as for `EditableLM`.
    """
    numbers, modules = SHAPES[name]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**numbers), dtype=dtype)
    reader = AutoTokenizer.from_pretrained(fetch(tokenizer), local_files_only=True)
    if len(reader) > numbers["vocab_size"]:
        raise ValueError(f"the tokenizer of {tokenizer!r} has {len(reader)} tokens; {name} has fewer")
    return EditableLM(model, reader, edit_modules or modules, name, optimize=optimize)
