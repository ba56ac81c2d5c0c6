"""FrozenModels: loads each model once; all sessions share its frozen weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rledit_env.evaluation.general import scored_texts
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage
from rledit_env.lm.loading.loader import load_model, stored_dtype
from rledit_env.lm.loading.placement import resolve_device, resolve_dtype
from rledit_env.lm.loading.registry import default_edit_modules
from rledit_env.lm.sharing import sharing_copy

MOST_MODELS = 2  # kept in memory for further sessions
CACHE_BYTES = 2**28  # of a session's cached states
PASSAGES = 12  # passages of 64 tokens of each text that the divergence is measured on, as in `rledit edit`


class FrozenModels:
    """Models by name. Each is loaded once, and never changed."""

    def __init__(self) -> None:
        self._models: OrderedDict[Any, tuple[PreTrainedModel, PreTrainedTokenizerBase]] = OrderedDict()
        self._texts: dict[Any, dict[str, list[Passage]]] = {}

    def load(
        self, name: str, edit_modules: Sequence[str] | str | None = None, dtype: torch.dtype | str = "stored",
        device: torch.device | str = "auto", revision: str | None = None, trust_remote_code: bool = False,
    ) -> EditableLM:  # fmt: skip
        """An LM with its own edited weights over the model's frozen ones; arguments and errors are those of
        :meth:`EditableLM.load`."""
        source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        device = resolve_device(device)
        key = (name, str(dtype), str(device), revision)
        if key not in self._models:
            precision = stored_dtype(name, **source) if dtype == "stored" else resolve_dtype(dtype, device)
            self._models[key] = load_model(name, precision, device, **source)
            if len(self._models) > MOST_MODELS:
                self._models.popitem(last=False)
        self._models.move_to_end(key)
        model, tokenizer = self._models[key]
        patterns = default_edit_modules(name, model) if edit_modules is None else edit_modules
        lm = EditableLM(
            sharing_copy(model), tokenizer, [patterns] if isinstance(patterns, str) else patterns, name,
            cache_bytes=CACHE_BYTES, revision=revision, optimize=True,
        )  # fmt: skip
        lm.weights.leave_originals()
        return lm

    def texts(self, lm: EditableLM) -> dict[str, list[Passage]]:
        """The texts on which the divergence of this model is measured, see `scored_texts`; written once a model."""
        key = (lm.name, lm.revision, str(lm.dtype), str(lm.device))
        if key not in self._texts:
            self._texts[key] = scored_texts(lm, passages=PASSAGES)
        return self._texts[key]
