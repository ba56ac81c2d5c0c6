"""What editors say they remember of a stream is all that they need to go on with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from agents import HypernetworkConfig, RLEditAgent, RLEditConfig
from agents.base import Agent
from agents.fine_tuning.baselines import FineTuningAgent, NoEditAgent
from agents.hypernetworks.retraining import BatchwiseAgent, BatchwiseConfig
from agents.hypernetworks.stableedit import StableEditAgent, StableEditConfig
from agents.hypernetworks.ultraedit import UltraEditAgent

MAKERS: dict[str, Any] = {
    "rledit": lambda env: RLEditAgent(env, RLEditConfig(network=HypernetworkConfig(rank=2))),
    "ultraedit": UltraEditAgent,
    "stableedit": lambda env: StableEditAgent(env, StableEditConfig(warm_up_facts=40)),
    "fine-tuning": FineTuningAgent,
    "none": NoEditAgent,
}


@pytest.mark.parametrize("name", MAKERS)
def test_an_agent_given_anothers_memory_goes_on_as_it_would(make_env: Any, name: str) -> None:
    env = make_env(array_backend="torch", reward="none")
    agent: Agent = MAKERS[name](env)
    observation, _ = env.reset(seed=0)
    agent.reset()
    observation, *_ = env.step(agent.predict(observation)[0])
    memory = agent.memory()
    assert memory is not None
    memory = {k: v.clone() for k, v in memory.items()}
    wanted, _ = agent.predict(observation)
    other: Agent = MAKERS[name](env)
    other.reset()
    other.load_memory(memory)
    found, _ = other.predict(observation)
    assert all(torch.equal(found[part][m], wanted[part][m]) for part in wanted for m in wanted[part])


def test_an_agent_whose_policy_changes_within_a_stream_does_not_claim_to_know_its_memory(make_env: Any) -> None:
    env = make_env(array_backend="torch", reward_gradient=True)
    for every, known in ((0, True), (3, False)):
        config = BatchwiseConfig(retrain_every=every)
        assert (BatchwiseAgent(env, config).memory() is not None) == known
