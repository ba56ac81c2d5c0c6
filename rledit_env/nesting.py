"""Finds the environment inside wrappers, and checks that a view or an agent can read it through them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import gymnasium as gym
from gymnasium.vector import VectorEnv

from rledit_env.interface import EditingEnv, editing_env

Part = Literal["observation", "action"]
BOTH: tuple[Part, ...] = ("observation", "action")


def environment_inside(env: gym.Env, reader: str, reads: Sequence[Part] = BOTH, agent: bool = False) -> EditingEnv:
    """The `LifelongEditEnv` inside wrappers that do not change its observations and actions.

    Args:
        env: an environment, with or without wrappers.
        reader: name of the view or agent that reads the environment, for the message.
        reads: the parts that no wrapper may have replaced.
        agent: whether the reader is an agent, and not a wrapper.

    Raises:
        ValueError: ``env`` is something else, or a wrapper has replaced a part; the message says what to do.
    """
    check_single(env, reader)
    if not hasattr(env.unwrapped, "lm"):
        raise ValueError(
            f"{env.unwrapped} is no environment of this package; give {reader} one such as RLEdit-CounterFact-v0"
        )
    check_raw(env, reader, reads, agent=agent)
    return editing_env(env)


def check_single(env: object, reader: str) -> None:
    """Raise ValueError for anything but a single environment."""
    kind = type(env).__name__
    if isinstance(env, VectorEnv):
        has_vector_view = reader in ("GradientFeatures", "ScaledUpdate")
        advice = f"use Vector{reader}" if has_vector_view else "make it with gymnasium.make"
        raise ValueError(f"{reader} takes a single environment, but {kind} is a vector environment; {advice}")
    if not isinstance(env, gym.Env):
        raise ValueError(f"{reader} takes an environment, but was given a {kind}; give what gymnasium.make returns")


def check_raw(env: Any, reader: str, reads: Sequence[Part], prefix: str = "", agent: bool = False) -> None:
    """Raise ValueError where a wrapper has replaced the observations or actions that a reader reads.

    Args:
        env: the wrappers around the environment.
        prefix: prefix of the names of the spaces: "single_" for a vector environment.
        reader, reads, agent: as in :func:`environment_inside`.
    """
    for part in reads:
        name = f"{prefix}{part}_space"
        if _same(getattr(env, name), getattr(env.unwrapped, name)):
            continue
        layer = env
        while not _same(getattr(layer.env, name), getattr(env.unwrapped, name)):
            layer = layer.env
        advice = _advice(layer, reader, agent)
        raise ValueError(f"{reader} reads the raw {part}s, which {type(layer).__name__} has replaced; {advice}")


def _advice(layer: object, reader: str, agent: bool) -> str:
    name, is_ours = type(layer).__name__, type(layer).__module__.startswith("rledit_env.")
    if agent:
        return f"give it the environment without {name}"
    if name == reader:
        return f"leave out one {reader} of the two"
    if is_ours and "FlattenFactors" in (name, reader):
        return "use one of the two: GradientFeatures(ScaledUpdate(env)), or FlattenFactors(env)"
    swapped = f"put it the other way round: {name}({reader}(env))"
    return swapped if is_ours else f"{swapped}, or leave {name} out"


def _same(space: object, other: object) -> bool:
    return space is other or bool(space == other)
