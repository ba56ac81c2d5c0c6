"""Copies and pickles of environments; copies share the model's frozen weights and the data."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterator, Mapping
from pickle import PicklingError
from typing import Any, TypeVar

import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

Self = TypeVar("Self", bound="Copied")

SHARED = ("model", "tokenizer", "data")  # arguments that may take gigabytes and are never written to


class SharedArguments(dict[str, Any]):
    """The arguments of an environment. A deep copy, such as Gymnasium makes for the ``spec`` of every wrapper, shares
    the model, the tokenizer and the data."""

    def __deepcopy__(self, memo: dict[int, object]) -> SharedArguments:
        return SharedArguments({k: v if k in SHARED else copy.deepcopy(v, memo) for k, v in self.items()})


class Copied:
    """Mixin for an environment: its copies, pickles and ``spec``.

    Attributes:
        arguments: the environment's arguments, by name.
    """

    arguments: Mapping[str, object]
    _spec: EnvSpec | None = None

    @property
    def spec(self) -> EnvSpec | None:
        """The specification that Gymnasium made the environment from."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        if spec is not None:
            spec = dataclasses.replace(spec, kwargs=SharedArguments(spec.kwargs))
        self._spec = spec

    def __copy__(self: Self) -> Self:
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __deepcopy__(self: Self, memo: dict[int, object]) -> Self:
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        self._share(memo)
        other.__dict__.update({name: copy.deepcopy(part, memo) for name, part in self.__dict__.items()})
        return other

    def _share(self, memo: dict[int, object]) -> None:
        """Put into a deep copy's memo the objects that the copy shares."""
        for space in self.__dict__.values():
            if isinstance(space, spaces.Space):
                memo |= {id(bound): bound for bound in _bounds(space)}

    def __reduce__(self) -> tuple[object, ...]:
        model = self.arguments.get("model", "")
        if not isinstance(model, str | os.PathLike):
            raise PicklingError(
                f"this environment was made with a model object ({type(model).__name__}), which is not pickled; make "
                "it with the model's name or folder, or copy it in this process: copy.deepcopy(env). An agent in it is "
                "written by its save(folder)"
            )
        return _made_again, (type(self), dict(self.arguments), self.spec), self.pickled_state()

    def pickled_state(self) -> dict[str, object]:
        """The state in a pickle in addition to the arguments, for ``__setstate__``."""
        raise NotImplementedError


def _made_again(kind: type[Self], arguments: Mapping[str, object], spec: EnvSpec | None) -> Self:
    env = kind(**arguments)
    env.spec = spec
    return env


def _bounds(space: spaces.Space[object]) -> Iterator[np.ndarray]:
    """The arrays of a space's bounds, which are as large as an observation or action, and never written to."""
    if isinstance(space, spaces.Dict):
        for part in space.values():
            yield from _bounds(part)
    elif isinstance(space, spaces.Box):
        yield from (space.low, space.high, space.bounded_below, space.bounded_above)
