"""The simplest baselines: no edit at all, and one step along the gradient."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from agents.base import Agent, Callback
from agents.files import agent_folder, read_description
from agents.settings import environment_settings
from rledit_env.files import write_text
from rledit_env.interface import Environment
from rledit_env.nesting import environment_inside
from rledit_env.spaces import Action, Observation
from rledit_env.type_aliases import JsonObject


class NoEditAgent(Agent):
    """An agent that changes nothing; its scores are the unedited LLM's.

    Args:
        env: the environment.
        config, seed: unused.
    """

    name: ClassVar[str] = "none"

    def __init__(self, env: Environment | None = None, config: None = None, seed: int = 0) -> None:
        self.env, self.config, self.seed = env, config, seed

    def memory(self) -> dict[str, Tensor]:
        return {}

    def predict(self, observation: Observation, deterministic: bool = True) -> tuple[Action, None]:
        """The action without any update."""
        return {"updates": {}}, None

    def learn(
        self, total_timesteps: int = 0, callback: Callback | None = None, progress_bar: bool = True,
        reset_num_timesteps: bool = True,
    ) -> NoEditAgent:  # fmt: skip
        """Do nothing; there is nothing to train."""
        return self

    def save(self, path: str | Path) -> None:
        """Write the agent's name."""
        _write(path, self, {})

    @classmethod
    def load(cls, path: str | Path, env: Environment | None = None) -> NoEditAgent:
        """Load a saved agent."""
        return cls(env)


@dataclass(frozen=True)
class FineTuningConfig:
    """The settings of `FineTuningAgent`.

    Attributes:
        step_size: η.
    """

    step_size: float = 1.0

    def __post_init__(self) -> None:
        if not self.step_size > 0:
            raise ValueError(f"step_size is {self.step_size}; give a positive number")


class FineTuningAgent(Agent):
    """One step along the observed gradient: ΔW = −η δᵀu.

    Args:
        env: the environment.
        config: the step size.
        seed: unused, since nothing is random.
    """

    name: ClassVar[str] = "fine-tuning"

    def __init__(self, env: Environment | None = None, config: FineTuningConfig | None = None, seed: int = 0) -> None:
        if env is not None:
            environment_inside(env, "FineTuningAgent", agent=True)
        self.env, self.config, self.seed = env, config or FineTuningConfig(), seed

    def memory(self) -> dict[str, Tensor]:
        return {}

    def predict(self, observation: Observation, deterministic: bool = True) -> tuple[Action, None]:
        """Update factors ũ = u and ṽ = −η δ, in the observation's array backend."""
        values = {m: -self.config.step_size * g for m, g in observation["value_gradients"].items()}
        return {"keys": observation["keys"], "values": values}, None

    def learn(
        self, total_timesteps: int = 0, callback: Callback | None = None, progress_bar: bool = True,
        reset_num_timesteps: bool = True,
    ) -> FineTuningAgent:  # fmt: skip
        """Do nothing; there is nothing to train."""
        return self

    def save(self, path: str | Path) -> None:
        """Write the step size as JSON."""
        _write(path, self, asdict(self.config))

    @classmethod
    def load(cls, path: str | Path, env: Environment | None = None) -> FineTuningAgent:
        """Load a saved agent.

        Raises:
            FileNotFoundError: the folder contains no agent.
        """
        settings = read_description(path)
        return cls(env, FineTuningConfig(**settings["config"]), settings["seed"])


def _write(path: str | Path, agent: Agent, config: JsonObject) -> None:
    description = {
        "agent": agent.name, "format": 1, "seed": 0, "config": config, "environment": environment_settings(agent.env),
    }  # fmt: skip
    write_text(agent_folder(path) / "agent.json", json.dumps(description, indent=1) + "\n")
