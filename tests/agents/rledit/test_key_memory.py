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


def present(memory: KeyMemory, u: Tensor, again: bool = False) -> Tensor:
    if not again:
        memory.end_batch()
    return memory.solved_keys("a", u, keep=True)


@pytest.mark.parametrize("weight", [1.0, 7.0])
def test_keys_of_earlier_batches_count_w_times_and_those_of_the_current_batch_once(weight):
    m = memory(weight)
    batches = [[keys_of(3, 1), keys_of(2, 2)], [keys_of(9, 3), keys_of(4, 4)], [keys_of(2, 5)]]
    earlier = DAMPING * torch.eye(6)
    for batch in batches:
        system = earlier
        for presentation, u in enumerate(batch):
            system = system + u.T @ u
            found = present(m, u, again=presentation > 0)
            torch.testing.assert_close(found, u @ torch.linalg.inv(system), atol=1e-4, rtol=1e-3)
        earlier = earlier + weight * sum(u.T @ u for u in batch)


def test_a_reset_forgets_the_batch_that_was_going_to_count_for_more():
    m, new = memory(7.0), memory(7.0)
    present(m, keys_of(3, 1))
    m.reset()
    for seed in (4, 5):
        assert torch.equal(present(m, keys_of(3, seed)), present(new, keys_of(3, seed)))


def test_a_memory_saved_between_two_presentations_goes_on_as_if_it_had_not_been():
    m, loaded = memory(7.0), memory(7.0)
    present(m, keys_of(3, 1))
    present(m, keys_of(2, 2), again=True)
    loaded.load_state(m.state())
    for again in (True, False, True):
        u = keys_of(4, 10)
        torch.testing.assert_close(present(m, u, again), present(loaded, u, again), atol=1e-6, rtol=1e-5)


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


def test_a_stream_that_continues_another_ends_its_batch(make_env):
    """Two streams of one batch, the second with the first one's weights, are edited as one stream of both batches."""
    both = make_env(num_batches=2, batch_size=2, array_backend="torch")
    at_once = changes(both, 1000.0)
    facts = [int(i) for i in both.stream.indices]
    each = make_env(num_batches=1, batch_size=2, array_backend="torch", model=both.lm)
    agent = agent_with(each, 1000.0)
    for part, kept in ((facts[:2], False), (facts[2:], True)):
        edit_stream(each, agent, seed=0, options={"indices": part, "keep_weights": kept})
    for m, change in at_once.items():
        torch.testing.assert_close(both.lm.weight(m) - both.lm.original_weight(m), change, atol=1e-6, rtol=1e-4)


def test_an_agent_without_an_environment_says_that_it_needs_one(make_env):
    env = make_env(num_batches=1, batch_size=2, array_backend="torch")
    observation, _ = env.reset(seed=0)
    agent = agent_with(env, 5.0)
    alone = RLEditAgent(config=agent.config, shapes=env.unwrapped.lm.module_shapes)
    with pytest.raises(ValueError, match="asks its environment which facts are presented"):
        alone.predict(observation)
