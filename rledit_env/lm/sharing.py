"""Copies of a model that share its frozen weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def frozen_weights(model: nn.Module, edited: Iterable[str] = ()) -> dict[int, object]:
    """A memo for ``copy.deepcopy`` of a model; the copy then shares all weights but those of the edited modules.

    The copy has its own parameters over the same memory, which may require gradients independently of the model's.
    """
    edited_ids = {id(model.get_submodule(name).weight) for name in edited}
    shared: dict[int, object] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        if id(parameter) not in edited_ids:
            is_plain = type(parameter) is nn.Parameter
            shared[id(parameter)] = nn.Parameter(parameter.data, requires_grad=False) if is_plain else parameter
    return shared


def sharing_copy(model: Model) -> Model:
    """A copy of a model over the same weights."""
    return copy.deepcopy(model, frozen_weights(model))
