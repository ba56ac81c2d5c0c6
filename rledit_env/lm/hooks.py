"""Hooks on modules for the duration of a context."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

Hooks = Iterable[tuple[nn.Module, Callable[..., object]]]


@contextmanager
def module_hooks(after: Hooks = (), before: Hooks = ()) -> Iterator[None]:
    """Context in which modules call functions when they run.

    Args:
        after: modules with forward hooks, which get the module, its arguments and its output, and may return another.
        before: modules with forward pre-hooks, which get the module and its arguments.
    """
    with ExitStack() as stack:
        for module, hook in after:
            stack.callback(module.register_forward_hook(hook).remove)
        for module, hook in before:
            stack.callback(module.register_forward_pre_hook(hook).remove)
        yield
