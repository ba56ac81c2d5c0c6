"""Modules of a model that compute the same faster."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers import PreTrainedModel


def prefer(model: PreTrainedModel, faster: Callable[[nn.Module], type[nn.Module] | None]) -> None:
    """Give modules of a model on a CPU or a GPU another class, which keeps their weights and names.

    Args:
        model: the model; on other devices it stays as it is.
        faster: the class for a module, or None; asked once for each class of module.
    """
    if model.device.type not in ("cpu", "cuda"):
        return
    known: dict[type[nn.Module], type[nn.Module] | None] = {}
    for module in model.modules():
        cls = type(module)
        if hasattr(module, "_hf_hook"):
            continue  # the weight may rest elsewhere
        if cls not in known:
            known[cls] = faster(module)
        if (replacement := known[cls]) is not None:
            module.__class__ = replacement
