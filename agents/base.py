"""Agent: the four verbs that every editor has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

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
    environment's weights are reset, as :func:`run_stream` and `agents.edit_stream` do.

    Attributes:
        name: what agent.json calls the class.
        env: the environment that the agent edits and learns in; None for an agent that was loaded without one.
        timesteps: environment steps that :meth:`learn` has taken since it last counted from 0.
    """

    name: ClassVar[str]
    env: gym.Env[Any, Any] | None = None
    timesteps: int = 0

    def reset(self) -> None:  # noqa: B027 - an agent without memory has nothing to forget
        """Forget the stream so far."""

    def set_env(self, env: gym.Env[Any, Any]) -> None:
        """Edit and learn in this environment from now on. The agent itself changes, and nothing is returned.

        For an agent in each of two environments, set the environment of a copy (``copy.copy(agent)``); both share
        what was learned.

        Args:
            env: of this package, with the modules that the agent edits.

        Raises:
            ValueError: it is no environment of this package, a wrapper has replaced its observations or actions, or it
                edits other modules; the agent is as it was.
        """
        environment_inside(env, type(self).__name__, agent=True)
        self.env = env

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
    def learn(
        self, total_timesteps: int, callback: Any = None, progress_bar: bool = True, reset_num_timesteps: bool = True
    ) -> Agent:
        """Train for this many further environment steps; returns itself.

        Every agent reads the arguments alike. An agent that learns from whole episodes rounds the steps up to whole
        ones. One that has nothing to train takes none, and computes what it needs once.

        Args:
            total_timesteps: environment steps to take in this call, however many were taken before.
            callback: called with the numbers of each update, round or stream; training stops when it returns False.
            progress_bar: show one.
            reset_num_timesteps: count :attr:`timesteps` from 0 again, as in Stable-Baselines3; False counts on.
        """

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
    """Let an agent edit one whole stream; returns the return and the last step's info.

    The agent is reset, unless the weights are kept (see :func:`begin_stream`).
    """
    begin_stream(agent, reset)
    observation, info = env.reset(**reset)
    total, done = 0.0, False
    while not done:
        observation, reward, terminated, truncated, info = env.step(act(agent, observation))
        total += float(reward)
        done = terminated or truncated
    return total, info


def begin_stream(agent: Any, reset: Mapping[str, Any]) -> None:
    """Reset an agent before a stream, unless it goes on with the weights, and so with the memory, of the last one.

    Every function that edits a stream follows this rule.

    Args:
        agent: the agent, or anything with ``reset()``.
        reset: the arguments of the environment's ``reset``; with ``options={"keep_weights": True}`` it keeps them.
    """
    if not (reset.get("options") or {}).get("keep_weights"):
        agent.reset()


def require_modules(env: gym.Env, shapes: Mapping[str, tuple[int, int]], owner: str, mend: str) -> None:
    """Make sure that an environment edits the modules that an agent was made for.

    Args:
        env: the environment.
        shapes: module → (d_in, d_out) of the agent's.
        owner: the agent, or the folder that it is in, for the message.
        mend: what to do about it.

    Raises:
        ValueError: it edits others, or modules of other shapes.
    """
    wanted = module_shapes(env)
    if wanted != dict(shapes):
        raise ValueError(
            f"{owner} was made for {len(shapes)} modules such as {next(iter(shapes.items()))}, the environment edits "
            f"{len(wanted)} such as {next(iter(wanted.items()))}; {mend}"
        )


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
