"""Methods and attributes of an object that forward to one of its parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, overload

T = TypeVar("T")
P = ParamSpec("P")


def method_of(part: str, method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[object, P], T]:
    """A method that calls the part's method of the same name, for the class that has the part as an attribute."""
    name = getattr(method, "__name__", "")

    @wraps(method)
    def call(whole: object, /, *args: P.args, **kwargs: P.kwargs) -> T:
        result: T = getattr(getattr(whole, part), name)(*args, **kwargs)
        return result

    return call


class AttributeOf(Generic[T]):
    """A descriptor that reads and sets an attribute of a part, for the class that has the part as an attribute.

    Args:
        part: name of the part in the class.
        name: name of the attribute in the part; "" means its name in the class.
    """

    def __init__(self, part: str, name: str = "") -> None:
        self._part, self._name = part, name

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = self._name or name

    @overload
    def __get__(self, whole: None, owner: type) -> AttributeOf[T]: ...

    @overload
    def __get__(self, whole: object, owner: type) -> T: ...

    def __get__(self, whole: object, owner: type) -> AttributeOf[T] | T:
        return self if whole is None else getattr(getattr(whole, self._part), self._name)

    def __set__(self, whole: object, value: T) -> None:
        setattr(getattr(whole, self._part), self._name, value)
