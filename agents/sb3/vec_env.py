"""Stable-Baselines3's interface to the vectorised environment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.vec_env import VecEnv

from rledit_env.type_aliases import Info


class StreamsVecEnv(VecEnv):
    """A Gymnasium vector environment with flat spaces, as a vector environment of Stable-Baselines3.

    ```python
    >>> import gymnasium as gym
    >>> from stable_baselines3 import PPO
    >>> from stable_baselines3.common.vec_env import VecMonitor
    >>> from rledit_env.vector import VectorGradientFeatures, VectorScaledUpdate
    >>> envs = gym.make_vec("rledit_env:RLEdit-ZsRE-v0", num_envs=2, model="tiny-llama", num_batches=2, batch_size=2,
    ...                     array_backend="torch", autoreset_mode="Disabled")
    >>> vec_env = VecMonitor(StreamsVecEnv(VectorGradientFeatures(VectorScaledUpdate(envs))))
    >>> PPO("MlpPolicy", vec_env, n_steps=4, batch_size=8, device="cpu").learn(8).num_timesteps
    8

    ```

    An environment whose episode has ended is reset in the same step, as Stable-Baselines3 expects; its last observation
    is in its info under ``terminal_observation``.

    Args:
        env: a vector environment with ``autoreset_mode=AutoresetMode.DISABLED``, since this class resets its
            environments.

    Raises:
        ValueError: it is not a vector environment, its spaces are dictionaries of dictionaries, or it resets its
            environments itself.
    """

    def __init__(self, env: VectorEnv) -> None:
        _check_vector(env)
        mode = env.metadata.get("autoreset_mode")
        if mode is not AutoresetMode.DISABLED:
            raise ValueError(f"the environment's autoreset_mode is {mode}; make it with autoreset_mode='Disabled'")
        _check_flat(env)
        self.env = env
        self._actions: np.ndarray | None = None
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> np.ndarray:
        """Reset all environments with the seeds given to `seed`; returns their first observations."""
        observations: np.ndarray
        observations, infos = self.env.reset(seed=self._seeds)  # type: ignore[arg-type]
        self.reset_infos = [_info_of(infos, i) for i in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        return observations

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[Info]]:
        """Observations, rewards, dones and one info for each environment."""
        observations, rewards, terminations, truncations, vector_infos = self.env.step(self._actions)
        infos = [_info_of(vector_infos, i) for i in range(self.num_envs)]
        dones = terminations | truncations
        for i, info in enumerate(infos):
            info["TimeLimit.truncated"] = bool(truncations[i] and not terminations[i])
            if dones[i]:
                info["terminal_observation"] = observations[i]
        if dones.any():
            observations, vector_infos = self.env.reset(options={"reset_mask": dones})
            for k in np.flatnonzero(dones).tolist():
                self.reset_infos[k] = _info_of(vector_infos, k)
        return observations, rewards.astype(np.float32), dones, infos

    def close(self) -> None:
        self.env.close()

    # -- access to single environments -----------------------------------------------------------------------------

    def _envs_at(self, indices: None | int | Iterable[int]) -> list[gym.Env]:
        inner: Any = self.env.unwrapped
        return [inner.envs[i] for i in self._get_indices(indices)]

    def get_attr(self, attr_name: str, indices: None | int | Iterable[int] = None) -> list[Any]:
        return [getattr(env, attr_name) for env in self._envs_at(indices)]

    def set_attr(self, attr_name: str, value: object, indices: None | int | Iterable[int] = None) -> None:
        for env in self._envs_at(indices):
            setattr(env, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: None | int | Iterable[int] = None, **method_kwargs: Any
    ) -> list[Any]:
        return [getattr(env, method_name)(*method_args, **method_kwargs) for env in self._envs_at(indices)]

    def env_is_wrapped(self, wrapper_class: type, indices: None | int | Iterable[int] = None) -> list[bool]:
        return [False for _ in self._envs_at(indices)]

    def get_images(self) -> Sequence[np.ndarray | None]:
        frames = self.env.render()
        return [frame if isinstance(frame, np.ndarray) else None for frame in frames or [None] * self.num_envs]


def _check_vector(env: object) -> None:
    kind = type(env).__name__
    if isinstance(env, gym.Env):
        raise ValueError(
            f"StreamsVecEnv takes a vector environment, but {kind} is a single one; Stable-Baselines3 takes that as it "
            "is, and gymnasium.make_vec makes many"
        )
    if not isinstance(env, VectorEnv):
        raise ValueError(f"StreamsVecEnv takes a vector environment, but was given a {kind}; make one with make_vec")


def _check_flat(env: VectorEnv) -> None:
    kind = type(env).__name__
    observations, actions = env.single_observation_space, env.single_action_space
    nested = isinstance(observations, spaces.Dict) and any(isinstance(s, spaces.Dict) for s in observations.values())
    if nested or isinstance(actions, spaces.Dict):
        part = "observations" if nested else "actions"
        raise ValueError(
            f"the {part} of {kind} are dictionaries, which Stable-Baselines3 does not take; wrap it: "
            "StreamsVecEnv(VectorGradientFeatures(VectorScaledUpdate(envs)))"
        )


def _info_of(infos: Mapping[Any, Any], i: int) -> Info:
    """Environment i's info from the vector environment's, with Python numbers instead of NumPy's."""
    info: Info = {}
    for key, value in infos.items():
        if key.startswith("_") or not infos[f"_{key}"][i]:
            continue
        if isinstance(value, Mapping):
            info[key] = _info_of(value, i)
        else:
            info[key] = value[i].item() if isinstance(value[i], np.generic) else value[i]
    return info
