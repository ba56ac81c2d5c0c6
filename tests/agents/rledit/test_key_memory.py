"""Tests of the keys that the least squares remember, and of what earlier batches count as."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from agents import RLEditAgent, RLEditConfig, edit_stream
from agents.rledit.config import HypernetworkConfig
from agents.rledit.key_memory import KeyMemory

SHAPES = {"a": (6, 4)}
DAMPING = 0.5


def keys_of(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))


def memory(weight: float) -> KeyMemory:
    return KeyMemory(SHAPES, torch.tensor([DAMPING]).log(), prior=0.0, weight=weight)


def present(memory: KeyMemory, batch: int, u: Tensor) -> Tensor:
    memory.begin_batch(batch)
    return memory.solved_keys("a", u, keep=True)


@pytest.mark.parametrize("weight", [1.0, 7.0])
def test_keys_of_earlier_batches_count_w_times_and_those_of_the_current_batch_once(weight):
    m = memory(weight)
    steps = [(0, keys_of(3, 1)), (0, keys_of(2, 2)), (1, keys_of(9, 3)), (1, keys_of(4, 4)), (3, keys_of(2, 5))]
    for now, (batch, u) in enumerate(steps):
        system = DAMPING * torch.eye(6)
        for earlier, keys in steps[: now + 1]:
            system = system + (weight if earlier < batch else 1.0) * keys.T @ keys
        torch.testing.assert_close(present(m, batch, u), u @ torch.linalg.inv(system), atol=1e-4, rtol=1e-3)


def test_a_reset_forgets_the_batch_that_was_going_to_count_for_more():
    m, new = memory(7.0), memory(7.0)
    present(m, 0, keys_of(3, 1))
    m.reset()
    for batch in (4, 5):
        assert torch.equal(present(m, batch, keys_of(3, batch)), present(new, batch, keys_of(3, batch)))


def test_a_memory_saved_between_two_presentations_goes_on_as_if_it_had_not_been():
    m, loaded = memory(7.0), memory(7.0)
    present(m, 0, keys_of(3, 1))
    present(m, 0, keys_of(2, 2))
    loaded.load_state(m.state())
    for batch in (0, 1, 1):
        u = keys_of(4, 10 + batch)
        torch.testing.assert_close(present(m, batch, u), present(loaded, batch, u), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory_weight": 0.5}, "memory_weight is 0.5; give 1"),
        ({"memory_weight": float("nan")}, "memory_weight is nan; give 1"),
        ({"memory_weight": float("inf")}, "memory_weight is inf; give 1"),
        ({"memory_weight": 5.0, "aggregation": "mend"}, "aggregation is 'mend', which keeps no earlier keys"),
        ({"memory_weight": 5.0, "aggregation": "least_squares"}, "'least_squares', which keeps no earlier keys"),
    ],
)
def test_a_weight_that_makes_no_sense_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        HypernetworkConfig(**settings)


def agent_with(env: Any, weight: float) -> RLEditAgent:
    network = HypernetworkConfig(blocks=0, step_size=0.02, prior=0.0, warm_up=False, memory_weight=weight)
    return RLEditAgent(env, RLEditConfig(network=network))


def changes(env: Any, weight: float) -> dict[str, Tensor]:
    edit_stream(env, agent_with(env, weight), seed=0)
    lm = env.unwrapped.lm
    return {m: lm.weight(m) - lm.original_weight(m) for m in lm.module_shapes}


def test_an_agent_gives_the_weight_to_earlier_batches_not_to_presentations(make_env):
    """One batch at two presentations is edited alike with any weight; two batches are not."""
    one = make_env(num_batches=1, batch_size=2, steps_per_batch=2, array_backend="torch")
    two = make_env(num_batches=2, batch_size=2, steps_per_batch=1, array_backend="torch")
    for env, alike in ((one, True), (two, False)):
        plain, weighted = changes(env, 1.0), changes(env, 1000.0)
        assert all(torch.equal(plain[m], weighted[m]) for m in plain) is alike


def test_an_agent_without_an_environment_says_that_it_needs_one(make_env):
    env = make_env(num_batches=1, batch_size=2, array_backend="torch")
    observation, _ = env.reset(seed=0)
    agent = agent_with(env, 5.0)
    alone = RLEditAgent(config=agent.config, shapes=env.unwrapped.lm.module_shapes)
    with pytest.raises(ValueError, match="asks its environment which facts are presented"):
        alone.predict(observation)
