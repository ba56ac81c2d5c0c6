"""Replaces a module's forward temporarily, and finds the device that a module computes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Reached(Exception):
    """Stops a forward pass when it calls a certain module."""


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., object]) -> Iterator[None]:
    """Context in which calling ``module`` calls the given function instead of the module's ``forward``."""
    earlier = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if earlier is None:
            del module.forward
        else:
            module.forward = earlier


def execution_device(module: Any) -> torch.device:
    """The device that a module computes on; its weight may be kept elsewhere."""
    hook = getattr(module, "_hf_hook", None)  # of a model loaded with a device map
    device = getattr(hook, "execution_device", None)
    return module.weight.device if device is None else torch.device(device)
