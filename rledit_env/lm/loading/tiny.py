"""Tiny, randomly initialised models of seven architectures, with a byte-level tokenizer: nothing to download.

They know nothing; they exist so that tests run over every architecture in seconds. Each has four layers and the
features of its architecture: grouped key-value heads, head sizes that do not divide the hidden size, sliding windows
short enough to matter on one sentence, soft-capped logits, biases, tied embeddings, ``Conv1D``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.pytorch_utils import Conv1D

__all__ = ["TINY_NAMES", "tiny_config", "tiny_model", "tiny_tokenizer"]

CONTEXT = 512
PAD, EOS, BOS = "<pad>", "<eos>", "<bos>"
_SPECIAL = [PAD, EOS, BOS]  # ids 0, 1, 2
_VOCABULARY = len(_SPECIAL) + 256

_SHARED: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_DECODER: dict[str, Any] = {
    **_SHARED,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2

_CONFIGS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "tiny-llama": (LlamaConfig, _DECODER),
    "tiny-mistral": (MistralConfig, {**_DECODER, "head_dim": 12, "sliding_window": 12}),
    "tiny-gemma2": (
        Gemma2Config,
        {
            **_DECODER,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 8,
            "layer_types": _ALTERNATING,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    "tiny-gemma3": (
        Gemma3TextConfig,
        {
            **_DECODER,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 8,
            "layer_types": _ALTERNATING,
        },
    ),
    "tiny-qwen2": (Qwen2Config, {**_DECODER, "num_key_value_heads": 1}),
    "tiny-qwen3": (Qwen3Config, {**_DECODER, "head_dim": 16}),
    "tiny-gpt2": (
        GPT2Config,
        {**_SHARED, "n_embd": 32, "n_inner": 64, "n_layer": 4, "n_head": 4, "n_positions": CONTEXT},
    ),
}
TINY_NAMES: tuple[str, ...] = tuple(_CONFIGS)


def tiny_config(name: str) -> PretrainedConfig:
    """A fresh configuration of the tiny model ``name``."""
    kind, arguments = _CONFIGS[name]
    return kind(**arguments)


def tiny_model(
    name: str, dtype: torch.dtype = torch.float32, seed: int = 0, config: PretrainedConfig | None = None
) -> PreTrainedModel:
    """The tiny model ``name`` on the CPU, in eval mode: the same weights for the same seed, on any machine.

    The weights are drawn in float32 and rounded to ``dtype``; the global random state of torch is left alone.
    ``config`` replaces the model's own configuration (to switch one property of the architecture off, say).
    """
    config = tiny_config(name) if config is None else config
    with torch.random.fork_rng(devices=[]):  # construction draws weights too, which are overwritten below
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for kind, parameter in module.named_parameters(recurse=False):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(_initial(module, kind, parameter.float(), noise))
    initialised: PreTrainedModel = model.eval()
    return initialised


def _initial(module: nn.Module, kind: str, built: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Values for one parameter (``kind`` is weight or bias), so that no two outputs are alike and none is uniform."""
    if isinstance(module, nn.Embedding):
        return 0.5 * noise
    if built.ndim == 1:
        # Gemma's norms multiply by 1 + weight. A factor of 2 lets its layers outweigh its large embeddings, which
        # through the tied output head would otherwise just repeat the input.
        gemma_norm = kind == "weight" and not built.any()
        return (1.0 if gemma_norm else built) + 0.1 * noise
    fan_in = built.shape[0] if isinstance(module, Conv1D) else built.shape[1]
    output_head = isinstance(module, nn.Linear) and built.shape[0] == _VOCABULARY
    return (2.0 if output_head else 1.0) / math.sqrt(fan_in) * noise  # logits a few units apart


def tiny_tokenizer(name: str = "tiny-llama") -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: one token for each byte of the UTF-8 text, ids 3 to 258 in the order of the bytes.

    It gives offset mappings (the bytes of one character share its offsets). Like the real ones, the tokenizers of the
    two Gemmas put ``<bos>`` first and the others do not, so that both cases are tested.
    """
    alphabet = _byte_alphabet()
    vocabulary = {token: index for index, token in enumerate([*_SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if "gemma" in name:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, vocabulary[BOS])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=BOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def _byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies, in the order of the bytes."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
