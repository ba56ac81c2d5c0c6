"""Replaces modules of a model by faster ones with the same results."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers import PreTrainedModel


def prefer(model: PreTrainedModel, faster: Callable[[nn.Module], type[nn.Module] | None]) -> None:
    """Change the class of modules of a model on a CPU or a GPU; their weights and names stay.

    Args:
        model: the model; it is left as it is on other devices.
        faster: returns a module's new class, or None to keep its own; called once for each class of module.
    """
    if model.device.type not in ("cpu", "cuda"):
        return
    replacements: dict[type[nn.Module], type[nn.Module] | None] = {}
    for module in model.modules():
        cls = type(module)
        if hasattr(module, "_hf_hook"):
            continue  # Accelerate may keep the weight elsewhere
        if cls not in replacements:
            replacements[cls] = faster(module)
        if (replacement := replacements[cls]) is not None:
            module.__class__ = replacement
