"""Agent: the four verbs that every editor has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import gymnasium as gym


class NotApplicable(ValueError):
    """An editor cannot edit these facts: they lack something, such as a subject. Comparisons leave its row blank."""


class Agent(ABC):
    """Whatever proposes updates. It meets the environment through Gymnasium's interface only.

    An agent may carry memory from step to step of a stream; :meth:`reset` clears it and must be called whenever the
    environment is reset.
    """

    def reset(self) -> None:  # noqa: B027 - an agent without memory has nothing to forget
        """Forget the stream so far."""

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


def run_stream(env: gym.Env, agent: Agent, **reset: Any) -> tuple[float, dict[str, Any]]:
    """Let an agent edit one whole stream; returns the return and the last step's info."""
    observation, info = env.reset(**reset)
    agent.reset()
    total, done = 0.0, False
    while not done:
        action, _ = agent.predict(observation)
        observation, reward, terminated, truncated, info = env.step(action)
        total += float(reward)
        done = terminated or truncated
    return total, info
