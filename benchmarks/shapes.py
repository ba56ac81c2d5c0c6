"""Models with the shape of a published model and random weights, for measuring speed and memory."""

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
    """A Llama with a shape of :data:`SHAPES`; its weights are drawn on the device with a fixed seed.

    Args:
        name: name of the shape.
        tokenizer: model name or folder of the tokenizer, which must not have more tokens than the shape.
        dtype: precision of the weights.
        device: device of the weights.
        edit_modules: modules to edit; by default those of the shape.
        optimize: as for `EditableLM`.

    Raises:
        ValueError: the tokenizer has more tokens than the shape.
    """
    settings, modules = SHAPES[name]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**settings), dtype=dtype)
    loaded_tokenizer = AutoTokenizer.from_pretrained(fetch(tokenizer), local_files_only=True)
    if len(loaded_tokenizer) > settings["vocab_size"]:
        raise ValueError(f"the tokenizer of {tokenizer!r} has {len(loaded_tokenizer)} tokens; {name} has fewer")
    return EditableLM(model, loaded_tokenizer, edit_modules or modules, name, optimize=optimize)
