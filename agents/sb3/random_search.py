"""Random search over constant actions on the low-dimensional view, the baseline of standard algorithms."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from tqdm.auto import tqdm

from agents.base import Agent, run_stream
from agents.files import agent_folder, built_from, check_counters, read_description
from agents.sb3.config import StandardConfig, standard_config
from agents.settings import environment_settings
from rledit_env.files import write_text
from rledit_env.interface import editing_env
from rledit_env.nesting import environment_inside
from rledit_env.wrappers import ScaledUpdate

Callback = Callable[[dict[str, float]], bool | None]


class RandomSearchAgent(Agent):
    """An agent with the same action at every step: the zero action, which is the base rule, and after `learn` the best
    action found.

    Args:
        env: a `LifelongEditEnv`.
        config: the view; the algorithm and its hyperparameters are ignored.
        seed: of the actions and of the episodes that they are tried in.
    """

    name: ClassVar[str] = "random search"

    def __init__(self, env: gym.Env[Any, Any], config: StandardConfig | None = None, seed: int = 0) -> None:
        environment_inside(env, "RandomSearchAgent", agent=True)
        self.env, self.config, self.seed = env, config or StandardConfig(), seed
        c = self.config
        self.scaled = ScaledUpdate(env, c.rule, c.step_size, c.damping, c.span, c.rank, share=c.share)
        self.action: np.ndarray = np.zeros(self.scaled.action_space.shape or (), np.float32)
        self.timesteps = 0
        self.searches = 0  # number of calls of learn; each tries other actions

    def set_env(self, env: gym.Env[Any, Any]) -> None:
        other = RandomSearchAgent(env, self.config, self.seed)
        if len(other.scaled.shapes) != len(self.scaled.shapes):
            raise ValueError(f"the action is for {len(self.scaled.shapes)} modules, the environment edits "
                             f"{len(other.scaled.shapes)}; make an agent for it: RandomSearchAgent(env)")
        self.env, self.scaled = env, other.scaled

    def memory(self) -> dict[str, torch.Tensor]:
        return {}

    def predict(self, observation: Any, deterministic: bool = True) -> tuple[Any, None]:
        """Update factors for a raw observation in either array backend."""
        return self.scaled.factors(observation, self.action), None

    def learn(
        self, total_timesteps: int, callback: Callback | None = None, progress_bar: bool = True,
        reset_num_timesteps: bool = True, rounds: int = 4,
    ) -> RandomSearchAgent:  # fmt: skip
        """Search by successive halving: after every round, the better half of the actions is tried in twice as many
        episodes.

        The first round has the present action and actions uniform on the space. Within a round all actions are tried
        in the same episodes, so that their returns do not differ by the facts.

        Args:
            total_timesteps: further environment steps to take, rounded up to whole episodes; at least two episodes, for
                one round of two actions. Episodes left over after the last round go to the best action, whose return is
                then the mean over more of them.
            callback: called after every round with its numbers; the search stops when it returns False.
            progress_bar: show one.
            reset_num_timesteps: count ``timesteps`` from 0 again; False counts on.
            rounds: how often to halve.

        Raises:
            ValueError: too few steps for two actions.
        """
        inner = editing_env(self.scaled)
        episodes = -(-total_timesteps // inner.episode_steps)
        if episodes < 2:
            raise ValueError(f"total_timesteps is {total_timesteps}; give {2 * inner.episode_steps} or more: an "
                             "episode for each of two actions")
        while rounds > 1 and episodes // rounds < 2**rounds:  # the last round needs two actions to compare, too
            rounds -= 1
        # Each call tries other actions.
        rng = np.random.default_rng([self.seed, self.searches] if self.searches else self.seed)
        self.searches += 1
        self.timesteps = 0 if reset_num_timesteps else self.timesteps
        shape = self.action.shape
        count = episodes // rounds
        candidates = [self.action, *rng.uniform(-1, 1, (count - 1, *shape)).astype(np.float32)]
        each, remaining = 1, episodes  # episodes an action, and episodes left
        with tqdm(total=episodes, unit="episode", desc="random search", disable=not progress_bar) as bar:
            for turn in range(rounds):
                seeds = rng.integers(2**31, size=each).tolist()
                means = []
                for action in candidates:
                    means.append(self._mean_return(action, seeds, bar))
                remaining -= each * len(candidates)
                order = np.argsort(means)[::-1]
                self.action, best = candidates[int(order[0])], max(means)
                if turn == rounds - 1 and remaining:
                    more = self._mean_return(self.action, rng.integers(2**31, size=remaining).tolist(), bar)
                    best = (each * best + remaining * more) / (each + remaining)
                numbers = {"round": float(turn), "candidates": float(len(candidates)), "return": best}
                if callback is not None and callback(numbers) is False:
                    break
                candidates = [candidates[int(i)] for i in order[: len(candidates) // 2]]
                each *= 2
        return self

    def _mean_return(self, action: np.ndarray, seeds: list[int], bar: Any) -> float:
        """The mean return of a constant action over the episodes of these seeds."""
        self.action = action
        inner = editing_env(self.scaled)
        returns = []
        for seed in seeds:
            returns.append(run_stream(self.scaled.env, self, seed=seed)[0])
            self.timesteps += len(inner.history)
            bar.update(1)
        return float(np.mean(returns))

    def save(self, path: str | Path) -> None:
        """Write the action and the view as JSON."""
        folder = agent_folder(path)
        description = {
            "agent": self.name,
            "format": 1,
            "seed": self.seed,
            "config": {**asdict(self.config), "hyperparameters": dict(self.config.hyperparameters)},
            "action": self.action.tolist(),
            "timesteps": self.timesteps,
            "searches": self.searches,
            "environment": environment_settings(self.env),
        }
        write_text(folder / "agent.json", json.dumps(description, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path, env: gym.Env[Any, Any] | None = None) -> RandomSearchAgent:
        """Load the agent from a folder that :meth:`save` wrote.

        Raises:
            FileNotFoundError: the folder contains no agent.
            ValueError: no environment was given, or it edits another number of modules.
        """
        folder = Path(path)
        description = read_description(folder)
        if env is None:
            raise ValueError(f"the agent in {folder} acts on a view of the environment; give the environment: env=…")
        with built_from(folder):
            check_counters(description, "seed", "timesteps")
            agent = cls(env, standard_config(description["config"]), description["seed"])
            modules = len((description["environment"] or {}).get("edit_modules", []))
            if modules != len(agent.scaled.shapes):
                raise ValueError(
                    f"{folder} was found for {modules} modules, the environment edits {len(agent.scaled.shapes)}; make "
                    f"the environment with the settings in {folder / 'agent.json'}"
                )
            action = np.asarray(description["action"], np.float32)
            if not agent.scaled.action_space.contains(action):
                raise ValueError(f"action has shape {action.shape}; it must be {agent.action.shape}, within ±1")
            agent.action, agent.timesteps = action, description["timesteps"]
            agent.searches = description.get("searches", 1)  # absent in earlier versions
        return agent
