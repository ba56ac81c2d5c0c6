"""Agent: the four verbs that every editor has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from rledit_env.nesting import environment_inside


class NotApplicable(ValueError):
    """An editor cannot edit these facts, such as facts that name no subject, or this model; the message says why."""


class Agent(ABC):
    """Whatever proposes updates. It meets the environment through Gymnasium's interface only.

    An agent may carry memory from step to step of a stream; :meth:`reset` clears it and must be called whenever the
    environment is reset.
    """

    def reset(self) -> None:  # noqa: B027 - an agent without memory has nothing to forget
        """Forget the stream so far."""

    def on(self, env: gym.Env[Any, Any]) -> Agent:
        """The agent for editing in this environment, of the same modules; itself, where it makes no difference."""
        return self

    def memory(self) -> dict[str, Tensor] | None:
        """What the agent remembers of the stream, for :meth:`load_memory` in another process: {} for nothing at all.

        None where that cannot be said: an interrupted editing run is then gone through again from its start, which
        gives the same, more slowly. An agent that knows overrides both methods.
        """
        return None

    def load_memory(self, memory: Mapping[str, Tensor]) -> None:
        """Take the tensors of :meth:`memory`.

        Raises:
            ValueError: they are not this agent's.
        """
        if memory:
            raise ValueError(f"{type(self).__name__} remembers nothing, but was given {sorted(memory)[:3]}")

    @abstractmethod
    def predict(self, observation: Any, deterministic: bool = True) -> tuple[Any, None]:
        """The action for an observation, and None (Stable-Baselines3's place for a recurrent state)."""

    @abstractmethod
    def learn(self, total_timesteps: int, callback: Any = None, progress_bar: bool = True) -> Agent:
        """Train for this many environment steps; returns itself."""

    @abstractmethod
    def save(self, path: str | Path) -> None:
        """Write everything that :meth:`load` needs into a folder."""

    @classmethod
    @abstractmethod
    def load(cls, path: str | Path, env: gym.Env | None = None) -> Agent:
        """The agent that was saved, ready to predict (and to learn, given an environment)."""


def act(agent: Agent, observation: Any) -> Any:
    """The agent's action; where the observation has no rows in use, since all its batch's facts have taken already (see
    `LifelongEditEnv`, ``present_until``), one that edits nothing, and the agent is not asked."""
    return agent.predict(observation)[0] if observation["mask"].any() else {"updates": {}}


def run_stream(env: gym.Env, agent: Agent, **reset: Any) -> tuple[float, dict[str, Any]]:
    """Let an agent edit one whole stream; returns the return and the last step's info."""
    observation, info = env.reset(**reset)
    agent.reset()
    total, done = 0.0, False
    while not done:
        observation, reward, terminated, truncated, info = env.step(act(agent, observation))
        total += float(reward)
        done = terminated or truncated
    return total, info


def module_shapes(env: gym.Env) -> dict[str, tuple[int, int]]:
    """Module → (d_in, d_out) of the edited modules, from the action space.

    Raises:
        ValueError: it is no environment of this package, or a wrapper has replaced its observations or actions.
    """
    environment_inside(env, "an agent", agent=True)
    space: Any = env.action_space
    return {m: (keys.shape[1], space["values"][m].shape[1]) for m, keys in space["keys"].items()}


def used_rows(observation: Any, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Keys (N, d_in) and value gradients (N, d_out) by module, of the rows in use of an observation in either array
    backend."""
    used = int(observation["mask"].sum())
    keys, gradients = (
        {m: torch.as_tensor(v[:used], device=device) for m, v in observation[part].items()}
        for part in ("keys", "value_gradients")
    )
    return keys, gradients


def factor_action(observation: Any, keys: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> dict[str, Any]:
    """The action of these factors in the array backend of the observation (padded with zero rows for NumPy)."""
    if not isinstance(observation["mask"], np.ndarray):
        return {"keys": dict(keys), "values": dict(values)}
    rows = len(observation["mask"])

    def padded(factor: Tensor) -> np.ndarray:
        array = np.zeros((rows, factor.shape[1]), dtype=np.float32)
        array[: len(factor)] = factor.cpu().numpy()
        return array

    return {"keys": {m: padded(f) for m, f in keys.items()}, "values": {m: padded(f) for m, f in values.items()}}
