"""Names of modules: matching them by patterns, and the layer and kind in a name."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence


class UnknownModules(ValueError):
    """A name or pattern of modules to edit matches none of the model's."""


def expand_globs(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """Module names matched by patterns with ``*``, ``{a,b}`` and numeric ranges ``[20-27]``, in the model's order.

    Raises:
        UnknownModules: a pattern matches nothing.
    """
    matched: set[str] = set()
    for pattern in patterns:
        expanded = [piece for braces in _expand_braces(pattern) for piece in _expand_ranges(braces)]
        matches = {name for piece in expanded for name in fnmatch.filter(names, piece)}
        if not matches:
            similar = [name for name in names if name.rsplit(".", 1)[-1] == pattern.rsplit(".", 1)[-1]] or list(names)
            raise UnknownModules(
                f"edit_modules: pattern {pattern!r} matches no linear module of the model; "
                f"names look like {', '.join(similar[:3])} … {similar[-1]}"
            )
        matched |= matches
    return [name for name in names if name in matched]


def _expand_braces(pattern: str) -> list[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [piece for option in match[1].split(",") for piece in _expand_braces(head + option + tail)]


def _expand_ranges(pattern: str) -> list[str]:
    match = re.search(r"\[(\d+)-(\d+)\]", pattern)
    if match is None:
        return [pattern]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    numbers = range(int(match[1]), int(match[2]) + 1)
    return [piece for number in numbers for piece in _expand_ranges(f"{head}{number}{tail}")]


def module_layer(name: str) -> int:
    """The layer a module is in: the first number of its dotted name."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def module_kind(name: str) -> str:
    """What a module is within its layer, such as "mlp.up_proj"."""
    parts = name.split(".")
    layer = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[layer + 1 :])
