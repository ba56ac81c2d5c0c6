"""Makes an EditableLM of what a user gives: a model's name, a model with its tokenizer, or an EditableLM."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rledit_env.lm.editable import EditableLM
from rledit_env.lm.loading.registry import default_edit_modules
from rledit_env.lm.sharing import sharing_copy


def editable_lm(
    model: Any,
    tokenizer: Any = None,
    edit_modules: Sequence[str] | str | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> EditableLM:
    """The `EditableLM` of a model.

    Args:
        model: a name or folder, as in :meth:`EditableLM.load`; a causal LM of transformers, which is not changed (its
            weights are shared and never written); or an `EditableLM`, which is returned.
        tokenizer: the tokenizer of a model object; None for a name, whose tokenizer is loaded with it.
        edit_modules, dtype, device, revision, trust_remote_code: as in :meth:`EditableLM.load`; all but the first only
            for a name.

    Raises:
        ModelError: a named model cannot be found, fetched or used.
        ValueError: an argument is missing or does not go with this kind of model, or a pattern matches nothing.
    """
    check_given(model, tokenizer, edit_modules, dtype, device)
    if isinstance(model, EditableLM):
        return model
    if isinstance(model, str | os.PathLike):
        source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        return EditableLM.load(os.fspath(model), edit_modules, dtype=dtype, device=device, **source)
    name = getattr(model, "name_or_path", "") or type(model).__name__
    patterns = default_edit_modules(name, model) if edit_modules is None else edit_modules
    patterns = [patterns] if isinstance(patterns, str) else patterns
    lm = EditableLM(sharing_copy(model), tokenizer, patterns, name, optimize=True)  # nobody else uses the copy
    lm.weights.leave_originals()
    return lm


def check_given(
    model: Any, tokenizer: Any, edit_modules: Any, dtype: torch.dtype | str, device: torch.device | str
) -> None:
    """Raise ValueError as :func:`editable_lm` does, before anything is loaded."""
    if isinstance(model, str | os.PathLike):
        if tokenizer is not None:
            raise ValueError(
                f"tokenizer is {_shown(tokenizer)}, but model is the name {os.fspath(model)!r}, which brings its own; "
                "leave tokenizer out, or give the model as an object, too"
            )
        return
    for name, value in (("device", device), ("dtype", dtype)):
        if value != "auto":
            raise ValueError(f"{name} is {value!r}, but model is an object and has one; move it first: model.to(…)")
    if isinstance(model, EditableLM):
        for name, part in (("edit_modules", edit_modules), ("tokenizer", tokenizer)):
            if part is not None:
                raise ValueError(
                    f"{name} is {_shown(part)}; give None, since model is an EditableLM already, which has its own"
                )
        return
    _check_causal(model)
    _check_tokenizer(tokenizer, model)


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str | list | tuple) else f"a {type(value).__name__}"


def _check_causal(model: Any) -> None:
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        advice = "give a name, a folder, a causal LM of transformers with its tokenizer, or an EditableLM"
        if hasattr(model, "merge_and_unload"):
            advice = "give model.merge_and_unload(), the model with its adapter merged"
        elif isinstance(getattr(model, "model", None), PreTrainedModel):
            advice = "give its model=….model and tokenizer=….tokenizer"
        raise ValueError(f"model is a {kind}; {advice}")
    if model.get_output_embeddings() is None or model.config.is_encoder_decoder:
        raise ValueError(f"model is a {kind}, which is no causal language model; load it by AutoModelForCausalLM")


def _check_tokenizer(tokenizer: Any, model: PreTrainedModel) -> None:
    kind = type(model).__name__
    load = "AutoTokenizer.from_pretrained(…)"
    if tokenizer is None:
        raise ValueError(f"model is a {kind}, but there is no tokenizer; give its own: tokenizer={load}")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"tokenizer is {_shown(tokenizer)}; give a tokenizer of transformers: tokenizer={load}")
    rows = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"tokenizer has {tokenizer.vocab_size:,} tokens, the {kind} embeddings for {rows:,}; give the model's own"
        )
