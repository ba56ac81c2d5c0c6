"""Switches all kernels on for a model, and off again."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers import PreTrainedModel

from rledit_env.lm.kernels.gates import prefer_fast_gates
from rledit_env.lm.kernels.norms import prefer_fast_norms
from rledit_env.lm.kernels.products import prefer_fast_products
from rledit_env.lm.kernels.warning import shown, warn_once


class FastModules:
    """Puts faster modules into a model where they suit it; :meth:`undo` takes them out again.

    A kernel that fails with the installed torch or transformers is left out, with a warning.

    Args:
        model: a causal LM.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._attention = model.config._attn_implementation
        classes = _classes(model)
        for kernel, prefer in _kernels().items():
            classes_before = _classes(model)
            try:
                prefer(model)
            except Exception as error:  # with another release, a kernel may fail in any way
                _restore_classes(classes_before)
                warn_once(kernel, shown(error))
        self._classes = [(module, cls) for module, cls in classes if type(module) is not cls]

    def undo(self) -> None:
        """Restore the model's own modules."""
        _restore_classes(self._classes)
        if self._model.config._attn_implementation != self._attention:
            self._model.set_attn_implementation(self._attention)


def _kernels() -> dict[str, Callable[[PreTrainedModel], None]]:
    return {
        "attention": _prefer_fast_attention, "norm": prefer_fast_norms, "gated layer": prefer_fast_gates,
        "matrix product": prefer_fast_products,
    }  # fmt: skip


def _prefer_fast_attention(model: PreTrainedModel) -> None:
    from rledit_env.lm.kernels.attention import prefer_fast_attention  # its imports fail with some releases

    prefer_fast_attention(model)


def _classes(model: PreTrainedModel) -> list[tuple[nn.Module, type[nn.Module]]]:
    return [(module, type(module)) for module in model.modules()]


def _restore_classes(classes: list[tuple[nn.Module, type[nn.Module]]]) -> None:
    for module, cls in classes:
        module.__class__ = cls
