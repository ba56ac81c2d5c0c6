"""How a module is called: its forward replaced for a while, and the device that it computes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Reached(Exception):
    """A module that was waited for has been called."""


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within it, calling the module calls this instead of its ``forward``."""
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
    """Where a module computes, wherever its weight rests."""
    hook = getattr(module, "_hf_hook", None)  # of a model loaded with a device map
    given = getattr(hook, "execution_device", None)
    return module.weight.device if given is None else torch.device(given)
