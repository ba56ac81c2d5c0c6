"""Frozen configurations with some of their values changed by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any


def changed(config: Any, values: Mapping[str, Any], place: str) -> Any:
    """A frozen configuration with other values, by name; nested configurations by nested dictionaries.

    Raises:
        ValueError: a name is unknown, or a value is refused.
    """
    check_known(values, [f.name for f in fields(config)], place)
    others: dict[str, Any] = {}
    for name, value in values.items():
        current = getattr(config, name)
        if is_dataclass(current) and isinstance(value, Mapping):
            value = changed(current, value, f"{place}.{name}")
        others[name] = tuple(value) if isinstance(current, tuple) and isinstance(value, list) else value
    try:
        return replace(config, **others)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from error


def check_known(given: Mapping[str, Any], known: Sequence[str] | Mapping[str, Any], place: str) -> None:
    """Make sure that all names are known.

    Raises:
        ValueError: one is not.
    """
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(f"{place}: {unknown[0]!r} is unknown; known are {', '.join(known) or 'none'}")


def merged(base: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The base with the other's values, nested dictionaries merged likewise."""
    result = dict(base)
    for name, value in other.items():
        both = isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
        result[name] = merged(result[name], value) if both else value
    return result
