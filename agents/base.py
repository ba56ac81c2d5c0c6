"""The base class of all agents, and functions that run them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from rledit_env.interface import Environment
from rledit_env.nesting import environment_inside
from rledit_env.spaces import Action, Observation
from rledit_env.type_aliases import Info, Settings

Callback = Callable[[dict[str, float]], bool | None]  # gets the numbers of an update, round or episode; False stops


class NotApplicable(ValueError):
    """An editor cannot edit these facts, such as facts that name no subject, or this model; the message says why."""


class Resettable(Protocol):
    """Anything with ``reset()``, such as an :class:`Agent`."""

    def reset(self) -> None: ...


class Agent(ABC):
    """Base class of everything that proposes updates. It uses the environment through Gymnasium's interface only.

    An agent may keep memory from step to step of a stream. :meth:`reset` clears it and must be called whenever the
    environment's weights are reset, as :func:`run_stream` and `agents.edit_stream` do.

    Attributes:
        name: the class's name in agent.json.
        env: the environment that the agent edits and learns in; None for an agent loaded without one.
        timesteps: environment steps that :meth:`learn` has taken since it last counted from 0.
    """

    name: ClassVar[str]
    env: Environment | None = None
    timesteps: int = 0

    def reset(self) -> None:  # noqa: B027 - an agent without memory has nothing to forget
        """Forget the stream so far."""

    def set_env(self, env: Environment) -> None:
        """Edit and learn in this environment from now on. The agent is changed in place.

        For an agent in each of two environments, set the environment of a copy (``copy.copy(agent)``); both share the
        learned parameters.

        Args:
            env: an environment of this package with the modules that the agent edits.

        Raises:
            ValueError: it is not an environment of this package, a wrapper has replaced its observations or actions, or
                it edits other modules; the agent is unchanged.
        """
        environment_inside(env, type(self).__name__, agent=True)
        self.env = env

    def memory(self) -> dict[str, Tensor] | None:
        """The agent's memory of the stream, for :meth:`load_memory` in another process; {} if it has none.

        None if the memory cannot be given as tensors: an interrupted editing run is then repeated from its start, which
        gives the same result, more slowly. Agents that can give it override both methods.
        """
        return None

    def load_memory(self, memory: Mapping[str, Tensor]) -> None:
        """Load the tensors of :meth:`memory`.

        Raises:
            ValueError: the tensors are not this agent's.
        """
        if memory:
            raise ValueError(f"{type(self).__name__} remembers nothing, but was given {sorted(memory)[:3]}")

    @abstractmethod
    def predict(self, observation: Observation, deterministic: bool = True) -> tuple[Action, None]:
        """The action for an observation, and None (in Stable-Baselines3, the recurrent state)."""

    @abstractmethod
    def learn(
        self, total_timesteps: int, callback: Callback | None = None, progress_bar: bool = True,
        reset_num_timesteps: bool = True,
    ) -> Agent:  # fmt: skip
        """Train for this many further environment steps; returns the agent.

        The arguments mean the same in every agent. An agent that learns from whole episodes rounds the steps up to
        whole episodes. An agent with nothing to train takes no steps, and computes what it needs once.

        Args:
            total_timesteps: environment steps to take in this call, whatever was taken before.
            callback: called with the numbers of each update, round or episode; training stops when it returns False.
            progress_bar: show a progress bar.
            reset_num_timesteps: count :attr:`timesteps` from 0 again, as in Stable-Baselines3; False counts on.
        """

    @abstractmethod
    def save(self, path: str | Path) -> None:
        """Write everything that :meth:`load` needs into a folder."""

    @classmethod
    @abstractmethod
    def load(cls, path: str | Path, env: Environment | None = None) -> Agent:
        """Load a saved agent, ready to predict (and, with an environment, to learn)."""


def act(agent: Agent, observation: Observation) -> Action:
    """The agent's action. For an observation without rows in use, the action without any update: all facts of its batch
    have taken already (see ``present_until`` of `LifelongEditEnv`)."""
    return agent.predict(observation)[0] if observation["mask"].any() else {"updates": {}}


def run_stream(env: Environment, agent: Agent, **reset: Any) -> tuple[float, Info]:
    """Run an agent for one episode; returns the return and the last step's info.

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


def begin_stream(agent: Resettable, reset: Settings) -> None:
    """Reset an agent before a stream, unless the stream continues with the weights, and so with the agent's memory, of
    the previous one.

    Every function that edits a stream follows this rule.

    Args:
        agent: the agent, or anything with ``reset()``.
        reset: the arguments of the environment's ``reset``; ``options={"keep_weights": True}`` keeps the weights.
    """
    if not (reset.get("options") or {}).get("keep_weights"):
        agent.reset()


def require_modules(env: Environment, shapes: Mapping[str, tuple[int, int]], owner: str, mend: str) -> None:
    """Check that an environment edits the modules that an agent was made for.

    Args:
        env: the environment.
        shapes: the agent's modules → (d_in, d_out).
        owner: the agent, or its folder, for the message.
        mend: the advice in the message.

    Raises:
        ValueError: the environment edits other modules, or modules of other shapes.
    """
    env_shapes = module_shapes(env)
    if env_shapes != dict(shapes):
        raise ValueError(
            f"{owner} was made for {len(shapes)} modules such as {next(iter(shapes.items()))}, the environment edits "
            f"{len(env_shapes)} such as {next(iter(env_shapes.items()))}; {mend}"
        )


def module_shapes(env: Environment) -> dict[str, tuple[int, int]]:
    """Module → (d_in, d_out) of the edited modules, from the action space.

    Raises:
        ValueError: it is not an environment of this package, or a wrapper has replaced its observations or actions.
    """
    environment_inside(env, "an agent", agent=True)
    space: Any = env.action_space
    return {m: (keys.shape[1], space["values"][m].shape[1]) for m, keys in space["keys"].items()}


def used_rows(observation: Observation, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Keys (N, d_in) and value gradients (N, d_out) by module, of an observation's rows in use, in either array
    backend."""
    used = int(observation["mask"].sum())
    keys, gradients = (
        {m: torch.as_tensor(v[:used], device=device) for m, v in observation[part].items()}
        for part in ("keys", "value_gradients")
    )
    return keys, gradients


def factor_action(observation: Observation, keys: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Action:
    """The action with these factors, in the observation's array backend (padded with zero rows for NumPy)."""
    if not isinstance(observation["mask"], np.ndarray):
        return {"keys": dict(keys), "values": dict(values)}
    rows = len(observation["mask"])

    def pad(factor: Tensor) -> np.ndarray:
        array = np.zeros((rows, factor.shape[1]), dtype=np.float32)
        array[: len(factor)] = factor.cpu().numpy()
        return array

    return {"keys": {m: pad(f) for m, f in keys.items()}, "values": {m: pad(f) for m, f in values.items()}}
