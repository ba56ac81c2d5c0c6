"""PPO learns: on streams that it never saw it beats the zero action, and a random search in as many steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from agents import Agent, RandomSearchAgent, StandardAgent, StandardConfig
from agents.base import run_stream
from rledit_env.lm.editable import EditableLM
from rledit_env.reporting import bootstrap_interval

STEPS = 6304  # 160 to measure the zero action, 12 rollouts of 512
HELD_OUT = range(1000, 1150)


def make(lm: EditableLM, split: str) -> gym.Env[Any, Any]:
    return gym.make(
        "RLEdit-CounterFact-v0", model=lm, split=split, num_batches=5, batch_size=1, token="subject",
        reward="efficacy", array_backend="torch", disable_env_checker=True,
    )  # fmt: skip


def returns(agent: Agent, env: gym.Env[Any, Any], seeds: Iterable[int]) -> np.ndarray:
    """The agent's return on each of the environment's streams."""
    return np.array([run_stream(env, agent, seed=seed)[0] for seed in seeds])


def test_ppo_learns_that_its_base_rule_takes_too_small_steps() -> None:
    lm = EditableLM.load("tiny-llama")
    env, held_out = make(lm, "train"), make(lm, "eval")
    # A tenth of the tiny model's best step size: there is much to learn, and four rollouts show it.
    hyperparameters = {"n_steps": 64, "batch_size": 32, "learning_rate": 1e-2}
    config = StandardConfig("ppo", step_size=0.1, baseline_streams=16, hyperparameters=hyperparameters)
    agent = StandardAgent(env, config, seed=0).learn(80 + 4 * 64, progress_bar=False)
    zero, seeds = RandomSearchAgent(held_out, config), range(1000, 1020)
    agent.set_env(held_out)
    above = returns(agent, held_out, seeds) - returns(zero, held_out, seeds)
    low, _ = bootstrap_interval(above)
    assert low > 0, f"{above.mean():+.3f} above the zero action, 95 % interval from {low:+.3f}"


@pytest.mark.slow
def test_ppo_beats_the_zero_action_and_random_search_on_held_out_streams() -> None:
    lm = EditableLM.load("tiny-llama")
    env, held_out = make(lm, "train"), make(lm, "eval")
    # 1 is the tiny model's best fixed step size among 0.1, 1, 3, 10, …, so that the zero action is no straw man.
    # There is little to learn beside it: rollouts of 128 steps and three times the learning rate left it to the seed.
    hyperparameters = {"n_steps": 512, "batch_size": 128, "learning_rate": 1e-3}
    config = StandardConfig("ppo", step_size=1.0, hyperparameters=hyperparameters)
    zero = RandomSearchAgent(held_out, config)
    found = RandomSearchAgent(env, config, seed=0).learn(STEPS, progress_bar=False)
    agent = StandardAgent(env, config, seed=0).learn(STEPS, progress_bar=False)
    assert agent.timesteps == STEPS and found.timesteps == STEPS + 1  # whole streams of 5

    agent.set_env(held_out)
    found.set_env(held_out)
    learned = returns(agent, held_out, HELD_OUT)
    for rival in (zero, found):
        above = learned - returns(rival, held_out, HELD_OUT)
        low, _ = bootstrap_interval(above)
        assert low > 0, f"{above.mean():+.3f} above {rival.action}, 95 % interval from {low:+.3f}"
