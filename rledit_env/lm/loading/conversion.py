"""Converts a GGUF file to a folder as ``save_pretrained`` writes it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(gguf: Path, folder: Path, progress: bool) -> None:
    """Write the GGUF model as float32 safetensors with its tokenizer into ``folder`` (about 30 s for 135M)."""
    arguments: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    weights = {**arguments, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # otherwise newer versions may keep the weights packed on a GPU
        weights["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with (
        tqdm(total=4, desc="converting", unit="stage", disable=not progress) as stages,
        quiet_transformers(),
        contextlib.redirect_stderr(io.StringIO()),  # one bar of transformers' GGUF reader cannot be switched off
    ):
        stages.set_description("converting: reading the weights")
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, **weights)
        stages.update()
        stages.set_description("converting: reading the tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **arguments)
        stages.update()
        # The weights are plain float32 by now, but transformers would still refuse to save them as quantized ones.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        stages.set_description("converting: writing the weights")
        model.save_pretrained(folder)
        stages.update()
        stages.set_description("converting: writing the tokenizer")
        tokenizer.save_pretrained(folder)
        stages.update()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Context in which transformers shows no progress bars."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
