"""Single edits of the default model by hypernetworks that were trained for a minute."""

from __future__ import annotations

import gymnasium as gym
import pytest

from agents import (
    DAFNetAgent,
    DAFNetConfig,
    DAFNetNetworkConfig,
    MALMENAgent,
    MALMENConfig,
    MENDAgent,
    MENDConfig,
    malmen_network,
    mend_network,
)
from agents.running.editors import EDITORS
from rledit_env.evaluation.metrics import top_tokens

pytestmark = [pytest.mark.real, pytest.mark.slow]
COUNTERFACT = "rledit_env:RLEdit-CounterFact-v0"
OURS = {"initial_weights": "scaled", "step_size_parameter": "log"}  # as in the default model's configuration
COMMON = {"array_backend": "torch", "disable_env_checker": True}


def taken(agent, lm, presentations: int, token: str, facts: int = 5) -> int:
    """How many of some held-out facts, each edited alone into the pre-trained weights, the LLM answers first."""
    env = gym.make(COUNTERFACT, model=lm, split="eval", num_batches=1, batch_size=1, reward="none", token=token,
                   steps_per_batch=presentations, **COMMON)  # fmt: skip
    agent.set_env(env)
    count = 0
    for seed in range(facts):
        observation, _ = env.reset(seed=seed)
        fact, done = env.unwrapped.current_batch()[0].edit, False
        agent.reset()
        while not done:
            observation, _, done, _, _ = env.step(agent.predict(observation)[0])
        count += top_tokens(lm, [fact])[0].tolist() == list(fact.targets)
    env.close()
    return count


def trained(kind, config, trajectories: int, **training):
    editor = EDITORS[kind.name]
    settings = {**editor.env, "reward": editor.reward(), "num_batches": 1, "batch_size": 1, **training}
    env = gym.make(COUNTERFACT, reward_gradient=True, **settings, **COMMON)
    return kind(env, config).learn(trajectories * env.unwrapped.episode_steps, progress_bar=False), env.unwrapped.lm


def test_mends_edits_take():
    network = mend_network(rank=256, step_size=1e-3, **OURS)
    config = MENDConfig(network, learning_rate=3e-4, step_size_learning_rate=0.05)
    agent, lm = trained(MENDAgent, config, 200)
    assert taken(agent, lm, presentations=4, token="all") >= 3


def test_malmens_edits_take():
    network = malmen_network(rank=256, step_size=1e-3, **OURS)
    config = MALMENConfig(network, learning_rate=3e-4, step_size_learning_rate=0.05)
    agent, lm = trained(MALMENAgent, config, 60)
    assert taken(agent, lm, presentations=16, token="answer") >= 4


def test_dafnets_edits_take():
    network = DAFNetNetworkConfig(rank=128, feed_forward=256, attention=128, step_size=3e-3, step_size_parameter="log")
    config = DAFNetConfig(network, learning_rate=3e-4, step_size_learning_rate=0.05, max_gradient_norm=1.0)
    agent, lm = trained(DAFNetAgent, config, 12, token="subject+answer", num_batches=4)
    # Trained so briefly, 8 and 9 of 12 take with two seeds, and rounding decides over some of them.
    assert taken(agent, lm, presentations=8, token="subject+answer", facts=12) >= 6
