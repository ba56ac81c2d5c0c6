"""Loads frozen models by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypedDict

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rledit_env.lm.loading import tiny
from rledit_env.lm.loading.conversion import quiet_transformers
from rledit_env.lm.loading.fetching import fetch
from rledit_env.lm.loading.hub import first_line
from rledit_env.lm.loading.placement import Spread
from rledit_env.lm.loading.registry import ModelError

_NEEDS_CODE = (
    "model '{}' needs code that comes with it, which can do anything on this machine; if you trust its authors, pass "
    "trust_remote_code=True (--trust-remote-code on the command line)"
)


class ModelSource(TypedDict):
    """Where a model named by hub id is loaded from: arguments of :func:`load_model`."""

    revision: str | None
    trust_remote_code: bool


def load_model(
    name: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    progress: bool = True,
    cache: Path | None = None,
    spread: Spread | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model called ``name``, frozen (eval mode, no parameter requires a gradient), and its tokenizer.

    The tokenizer gives offset mappings. It is as it was saved, even without a pad token. Attention runs
    through PyTorch's scaled dot product where the architecture can; Gemma 2's soft-capped attention cannot, and runs
    eagerly.

    Args:
        name: registry name, local folder or hub id ``owner/name``; fetched first if needed.
        dtype: precision of the weights.
        device: where the weights go.
        progress: show progress bars when the model has to be fetched.
        cache: as in :func:`fetch`.
        spread: spreads the weights over several devices, the host and the disk instead (not for the tiny models, which
            are built in memory).
        revision: as in :func:`fetch`.
        trust_remote_code: run code that comes with the model, where it needs that.

    Raises:
        ModelError: as :func:`fetch`; or the model is quantised, is no decoder-only language model, or needs code of its
            own without ``trust_remote_code``; or the folder cannot be loaded, or the tokenizer gives no offsets.
    """
    name = os.fspath(name)
    model: Any  # mypy does not know the arguments of its `to`
    tokenizer: PreTrainedTokenizerBase
    if name in tiny.TINY_NAMES:
        model, tokenizer = tiny.tiny_model(name, dtype), tiny.tiny_tokenizer(name)
    else:
        folder = fetch(name, progress, cache=cache, revision=revision, trust_remote_code=trust_remote_code)
        _check_kind(name, folder, trust_remote_code)
        model, tokenizer = _from_folder(name, folder, dtype, trust_remote_code, spread or Spread())
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer of '{name}' ({type(tokenizer).__name__}) gives no character offsets; "
            f"convert it to a fast tokenizer (a tokenizer.json) and save it into the model's folder"
        )
    if getattr(model, "hf_device_map", None) is None:
        model = model.to(device)
    return model.requires_grad_(False).eval(), tokenizer


def _from_folder(
    name: str, folder: Path, dtype: torch.dtype, trust_remote_code: bool, spread: Spread
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer in a folder."""
    code = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        with quiet_transformers():
            # No attn_implementation: transformers then takes sdpa where the architecture supports it, else eager.
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **code, **spread.options())
            return model, AutoTokenizer.from_pretrained(folder, **code)
    except Exception as error:  # a broken folder fails in as many ways as there are loaders
        if not trust_remote_code and "trust_remote_code" in str(error):  # such as a tokenizer
            raise ModelError(_NEEDS_CODE.format(name)) from error
        raise ModelError(
            f"model '{name}' cannot be loaded from '{folder}': {first_line(error)}; "
            f"it must hold a causal language model and its tokenizer, as save_pretrained writes them"
        ) from error


def stored_dtype(
    name: str | os.PathLike[str],
    *,
    progress: bool = True,
    cache: Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> torch.dtype:
    """The precision that the weights called ``name`` are stored in; float32 for the tiny models.

    Raises:
        ModelError: as :func:`load_model`.
    """
    if (name := os.fspath(name)) in tiny.TINY_NAMES:
        return torch.float32
    folder = fetch(name, progress, cache=cache, revision=revision, trust_remote_code=trust_remote_code)
    _check_kind(name, folder, trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        dtype = config.get_text_config().dtype
    except Exception as error:  # a broken folder fails in as many ways as there are loaders
        raise ModelError(f"model '{name}' cannot be loaded from '{folder}': {first_line(error)}") from error
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _check_kind(name: str, folder: Path, trust_remote_code: bool) -> None:
    """Refuse, by its configuration, a model that cannot be edited or must not be loaded.

    Raises:
        ModelError: the model is quantised, is no decoder-only language model, or needs code that is not trusted.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # the loader says what is wrong with it
    if not isinstance(config, dict):
        return
    texts = [config, *(part for part in config.values() if isinstance(part, dict))]
    settings = (part.get(key) for part in texts for key in ("quantization_config", "compression_config"))
    quantised = next(filter(None, settings), None)
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise ModelError(
            f"model '{name}' is quantised ({method or 'by its config.json'}), and quantised weights cannot be edited; "
            "name the model that it was made from, or save it dequantised (model.dequantize()) first"
        )
    kind = config.get("model_type")
    if config.get("auto_map") and kind not in CONFIG_MAPPING_NAMES:
        if not trust_remote_code:
            raise ModelError(_NEEDS_CODE.format(name))
        return
    has_encoder = bool(config.get("is_encoder_decoder"))
    fills_gaps = any(str(architecture).endswith("ForMaskedLM") for architecture in config.get("architectures") or ())
    is_known = kind in CONFIG_MAPPING_NAMES
    if has_encoder or fills_gaps or (is_known and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        what = "an encoder-decoder model" if has_encoder else "no causal language model"
        raise ModelError(
            f"model '{name}' ({kind}) is {what}; rledit edits decoder-only language models, such as Llama or GPT-2: "
            "those that AutoModelForCausalLM loads"
        )
