"""Makes an EditableLM of what a user gives: a model's name, a model with its tokenizer, or an EditableLM."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rledit_env.lm.editable import EditableLM
from rledit_env.lm.loading.registry import default_edit_modules
from rledit_env.lm.sharing import sharing_copy
from rledit_env.lm.tokens import embedded_tokens

Model = str | os.PathLike[str] | PreTrainedModel | EditableLM


def editable_lm(
    model: Model,
    tokenizer: PreTrainedTokenizerBase | None = None,
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
        return EditableLM.load(
            os.fspath(model), edit_modules, dtype, device, revision=revision, trust_remote_code=trust_remote_code
        )
    name = getattr(model, "name_or_path", "") or type(model).__name__
    patterns = default_edit_modules(name, model) if edit_modules is None else edit_modules
    patterns = [patterns] if isinstance(patterns, str) else patterns
    assert tokenizer is not None
    lm = EditableLM(sharing_copy(model), tokenizer, patterns, name, optimize=True)  # nobody else uses the copy
    lm.weights.leave_originals()
    return lm


def check_given(
    model: object, tokenizer: object, edit_modules: object, dtype: torch.dtype | str, device: torch.device | str
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
    _check_tokenizer(tokenizer, _causal(model))


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, str | list | tuple) else f"a {type(value).__name__}"


def _causal(model: object) -> PreTrainedModel:
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
    return model


def _check_tokenizer(tokenizer: object, model: PreTrainedModel) -> None:
    kind = type(model).__name__
    load = "AutoTokenizer.from_pretrained(…)"
    if tokenizer is None:
        raise ValueError(f"model is a {kind}, but there is no tokenizer; give its own: tokenizer={load}")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"tokenizer is {_shown(tokenizer)}; give a tokenizer of transformers: tokenizer={load}")
    rows = embedded_tokens(model)
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"tokenizer has {tokenizer.vocab_size:,} tokens, the {kind} embeddings for {rows:,}; give the model's own"
        )
