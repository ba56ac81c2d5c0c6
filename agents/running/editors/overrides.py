"""Changes values of frozen configurations by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from rledit_env.type_aliases import Options, Settings

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")


def changed(config: Config, values: Settings, place: str) -> Config:
    """A copy of a frozen configuration with some values changed, by name; nested dictionaries change nested
    configurations.

    Raises:
        ValueError: a name is unknown, or a value is refused.
    """
    check_known(values, [f.name for f in fields(config)], place)
    changes: Options = {}
    for name, value in values.items():
        current = getattr(config, name)
        if is_dataclass(current) and not isinstance(current, type) and isinstance(value, Mapping):
            value = changed(current, value, f"{place}.{name}")
        changes[name] = tuple(value) if isinstance(current, tuple) and isinstance(value, list) else value
    try:
        return replace(config, **changes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from error


def check_known(given: Settings, known: Sequence[str] | Settings, place: str) -> None:
    """Check that all names are known.

    Raises:
        ValueError: a name is unknown.
    """
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(f"{place}: {unknown[0]!r} is unknown; known are {', '.join(known) or 'none'}")


def merged(base: Settings, other: Settings) -> Options:
    """A copy of ``base`` with the values of ``other``; nested dictionaries are merged in the same way."""
    result = dict(base)
    for name, value in other.items():
        nested = isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
        result[name] = merged(result[name], value) if nested else value
    return result
