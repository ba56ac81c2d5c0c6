"""FlattenFactors: raw observations and factors as one Box each."""

from __future__ import annotations

import math
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

from rledit_env.nesting import environment_inside
from rledit_env.spaces import Action, ArrayObservation
from rledit_env.type_aliases import Info, Options


class FlattenFactors(gym.Wrapper[np.ndarray, np.ndarray, ArrayObservation, Action], RecordConstructorArgs):
    """The whole observation and action as one Box each, for policies over raw gradients of small models.

    The observation is keys and value gradients of every module (padded to N rows), the mask, the edit loss and the
    progress, one after the other. The action, Box(−1, 1), is update keys and values of every module, each row scaled to
    the size of the observed one: an action of ±1 everywhere has rows with ‖ũᵢ‖ = ‖uᵢ‖ and ‖ṽᵢ‖ = ``step_size`` · ‖δᵢ‖,
    as in a step of plain fine-tuning, and the zero action edits nothing. (For a module's row i, ũᵢ = ‖uᵢ‖/√d_in · aᵢ
    and ṽᵢ = step_size · ‖δᵢ‖/√d_out · bᵢ.)

    Observations are not scaled: put `gymnasium.wrappers.NormalizeObservation`, or Stable-Baselines3's `VecNormalize`,
    around it.

    Args:
        env: the environment with ``array_backend="numpy"``.
        limit: refuse spaces of more numbers than this, which standard libraries cannot train on.
        step_size: the size of updates; with None the action is the factors themselves, in a space without bounds, which
            some algorithms do not accept.

    Raises:
        ValueError: an argument is invalid, or the environment has no raw observations and actions.
    """

    env: gym.Env  # which Gymnasium takes to have the wrapper's observations and actions

    def __init__(self, env: gym.Env, limit: int = 10_000_000, step_size: float | None = 0.01) -> None:
        inner = environment_inside(env, "FlattenFactors")
        RecordConstructorArgs.__init__(self, limit=limit, step_size=step_size)
        gym.Wrapper.__init__(self, env)
        if inner.array_backend != "numpy":
            raise ValueError("the environment gives tensors without padding; make it with array_backend='numpy'")
        if step_size is not None and not 0 < step_size < math.inf:
            raise ValueError(f"step_size is {step_size}; give a number above 0, or None for factors as they are")
        for name in ("observation_space", "action_space"):
            size = spaces.flatdim(getattr(env, name))
            if size > limit:
                raise ValueError(
                    f"the {name.replace('_', ' ')} has {size:,} numbers, more than {limit:,}; edit fewer modules or "
                    "smaller batches, use GradientFeatures(ScaledUpdate(env)), or give a higher limit"
                )
        self.step_size = step_size
        observations, actions = spaces.flatten_space(env.observation_space), spaces.flatten_space(env.action_space)
        assert isinstance(observations, spaces.Box) and isinstance(actions, spaces.Box)
        self.observation_space = observations
        self.action_space = actions if step_size is None else spaces.Box(-1.0, 1.0, actions.shape, np.float32)
        self._sizes: dict[str, dict[str, np.ndarray]] | None = None  # of the rows of update factors, (N, 1) by module

    def _flatten(self, observation: ArrayObservation) -> np.ndarray:
        if self.step_size is not None:
            parts = {"keys": (observation["keys"], 1.0), "values": (observation["value_gradients"], self.step_size)}
            self._sizes = {
                part: {m: scale * np.sqrt(np.square(x).mean(1, keepdims=True)) for m, x in by_module.items()}
                for part, (by_module, scale) in parts.items()
            }
        flat = spaces.flatten(self.env.observation_space, observation)
        assert isinstance(flat, np.ndarray)
        return flat

    def reset(self, *, seed: int | None = None, options: Options | None = None) -> tuple[np.ndarray, Info]:
        observation, info = self.env.reset(seed=seed, options=options)
        return self._flatten(observation), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, SupportsFloat, bool, bool, Info]:
        """A step with the factors that the flat action stands for; it is clipped to ±1.

        Raises:
            ValueError: as the environment's `step`, or the action's length is not that of the space.
            gymnasium.error.ResetNeeded: no episode was begun.
        """
        action = np.asarray(action, dtype=np.float32)
        if action.shape != self.action_space.shape:
            raise ValueError(f"the action has shape {action.shape}; it must be {self.action_space.shape}")
        factors: Any = spaces.unflatten(self.env.action_space, action)
        if self._sizes is not None:
            factors = {
                part: {m: sizes[m] * np.clip(factor, -1.0, 1.0) for m, factor in factors[part].items()}
                for part, sizes in self._sizes.items()
            }
        observation, reward, terminated, truncated, info = self.env.step(factors)
        return self._flatten(observation), reward, terminated, truncated, info
