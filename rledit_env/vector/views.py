"""The low-dimensional views of `rledit_env.wrappers` for all environments of a vector environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv, VectorObservationWrapper, VectorWrapper
from gymnasium.vector.utils import batch_space

from rledit_env.env import LifelongEditEnv
from rledit_env.nesting import BOTH, Part, check_raw
from rledit_env.vector.env import LifelongEditVectorEnv
from rledit_env.wrappers import GradientFeatures, ScaledUpdate


def _environments(env: Any, reader: str, reads: Sequence[Part] = BOTH) -> list[LifelongEditEnv]:
    """The environments of a vector environment inside wrappers that do not change its observations and actions.

    Raises:
        ValueError: ``env`` is something else, or a wrapper has replaced a part that is read.
    """
    kind = type(env).__name__
    if isinstance(env, gym.Env):
        single = f"use rledit_env.wrappers.{reader.removeprefix('Vector')}"
        raise ValueError(f"{reader} takes a vector environment, but {kind} is a single one; {single}")
    if not isinstance(env, VectorEnv):
        advice = "give what gymnasium.make_vec returns"
        raise ValueError(f"{reader} takes a vector environment, but was given a {kind}; {advice}")
    inner: Any = env.unwrapped
    if not isinstance(inner, LifelongEditVectorEnv):
        raise ValueError(
            f"{type(inner).__name__} is no vectorised environment of this package; make it with gymnasium.make_vec, "
            "without vectorization_mode"
        )
    check_raw(env, reader, reads, prefix="single_")
    return inner.envs


class _VectorView:
    """Mixin for a view: a copy is a new view around the copied environment."""

    env: Any
    arguments: dict[str, Any]

    def __reduce__(self) -> Any:
        latest = {name: part for name, part in vars(self).items() if name == "_observations"}
        return _viewed, (type(self), self.env, self.arguments), latest


def _viewed(view: Any, env: Any, arguments: dict[str, Any]) -> Any:
    return view(env, **arguments)


def _of_environment(batch: Mapping[str, Any], i: int) -> dict[str, Any]:
    """Environment i's part of a dictionary of arrays, or of dictionaries of arrays, of all environments."""
    return {k: _of_environment(v, i) if isinstance(v, Mapping) else v[i] for k, v in batch.items()}


class VectorGradientFeatures(_VectorView, VectorObservationWrapper[Any, Any, Any, np.ndarray]):
    """`rledit_env.wrappers.GradientFeatures` of every environment: Box(−1, 1, (num_envs, F)).

    Args:
        env: the vector environment, or `VectorScaledUpdate` around it. Not with ``AutoresetMode.SAME_STEP``, where the
            weights that the last observation's features need are already replaced.
        arguments: arguments of `GradientFeatures`.

    Raises:
        ValueError: the environment resets in the same step, is not of this package, or has no raw observations.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], **arguments: Any) -> None:
        envs = _environments(env, "VectorGradientFeatures", ("observation",))
        super().__init__(env)
        self.arguments = arguments
        self.views = [GradientFeatures(inner, **arguments) for inner in envs]
        self.single_observation_space = self.views[0].observation_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)

    def observations(self, observations: Any) -> np.ndarray:
        """The features (num_envs, F) of the raw observations."""
        return np.stack([view.observation(_of_environment(observations, i)) for i, view in enumerate(self.views)])


class VectorScaledUpdate(_VectorView, VectorWrapper[Any, Any, Any, Any, np.ndarray]):
    """`rledit_env.wrappers.ScaledUpdate` of every environment: Box(−1, 1, (num_envs, A)).

    Args:
        env: the vector environment.
        arguments: arguments of `ScaledUpdate`.

    Raises:
        ValueError: as in `ScaledUpdate`.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], **arguments: Any) -> None:
        envs = _environments(env, "VectorScaledUpdate")
        super().__init__(env)
        self.arguments = arguments
        self.scaled = ScaledUpdate(envs[0], **arguments)
        self.single_action_space = self.scaled.action_space
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._observations: Any = None

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self._observations, infos = self.env.reset(seed=seed, options=options)
        return self._observations, infos

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """A step of every environment with the factors that its action stands for.

        Raises:
            ValueError: an action has a wrong shape or a number that is not finite; nothing has changed.
            gymnasium.error.ResetNeeded: no episode was begun.
        """
        if self._observations is None:
            raise gym.error.ResetNeeded("no episode was begun: call reset() before step()")
        self._observations, *outcome = self.env.step(self.factors(self._observations, actions))
        return self._observations, *outcome

    def factors(self, observations: Any, actions: Any) -> dict[str, dict[str, Any]]:
        """The raw environments' actions: update factors by module, padded as the observations are."""
        actions = np.asarray(actions, dtype=np.float32)
        if actions.shape != self.action_space.shape:
            raise ValueError(f"the actions have shape {actions.shape}; they must be {self.action_space.shape}")
        batch: dict[str, dict[str, Any]] = {"keys": {}, "values": {}}
        for part, like in (("keys", "keys"), ("values", "value_gradients")):
            batch[part] = {m: 0 * v for m, v in observations[like].items()}
        for i, action in enumerate(actions):
            try:
                factors = self.scaled.factors(_of_environment(observations, i), action)
            except ValueError as error:
                raise ValueError(f"environment {i}: {error}") from error
            for part, by_module in factors.items():
                for m, factor in by_module.items():
                    batch[part][m][i, : len(factor)] = factor
        return batch
