"""Tests of UltraEdit."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents import UltraEditAgent, UltraEditConfig, load_agent
from rledit_env.evaluation.metrics import top_tokens

MODULES = "model.layers.[2-3].mlp.{gate,down}_proj"
OURS = {"normaliser_scope": "module", "normaliser_variance": "exact"}


@pytest.fixture
def stream(tiny_lm, make_env):
    """Makes an environment, its agent, and the first two observations of a stream that the agent edits."""

    def make(config: UltraEditConfig | None = None, **arguments):
        env = make_env(**{"model": tiny_lm(modules=MODULES), "array_backend": "torch", "reward": "none", **arguments})
        agent = UltraEditAgent(env, config)
        observation, _ = env.reset(seed=0)
        return env, agent, observation

    return make


def desired_outputs(seen: list[tuple[torch.Tensor, torch.Tensor]], step_size: float) -> torch.Tensor:
    """v (N, d_out) of the last of these (keys, gradients), by the paper's formula, row by row."""
    rows = torch.cat([torch.cat(pair, 1) for pair in seen]).double()
    u, gradient = seen[-1]
    mean, std = rows.mean(0), rows.std(0)
    v = []
    for i in range(len(u)):
        z = (torch.cat([u[i], gradient[i]]).double() - mean) / std
        v.append(-step_size * z[: len(u[i])].square().sum() * z[len(u[i]) :])
    return torch.stack(v)


def test_updates_satisfy_the_normal_equations_with_moments_over_the_whole_stream(stream):
    env, agent, observation = stream(UltraEditConfig(step_size=1e-4, damping=0.5, **OURS))
    seen = {m: [] for m in observation["keys"]}
    for _ in range(3):
        action, _ = agent.predict(observation)
        for m, u in observation["keys"].items():
            seen[m].append((u, observation["value_gradients"][m]))
            update = (action["values"][m].T @ action["keys"][m]).double()
            v, u = desired_outputs(seen[m], 1e-4), u.double()
            left = update @ (u.T @ u + 0.5 * torch.eye(u.shape[1], dtype=torch.float64))
            torch.testing.assert_close(left, v.T @ u, atol=2e-3 * float((v.T @ u).abs().max()), rtol=1e-3)
        observation, *_ = env.step(action)


def test_with_recursion_the_normal_equations_hold_the_keys_of_all_earlier_batches(stream):
    env, agent, observation = stream(UltraEditConfig(step_size=1e-4, damping=0.5, recursion=True, **OURS))
    seen = {m: [] for m in observation["keys"]}
    for _ in range(3):
        action, _ = agent.predict(observation)
        for m, u in observation["keys"].items():
            seen[m].append((u, observation["value_gradients"][m]))
            update = (action["values"][m].T @ action["keys"][m]).double()
            v, every = desired_outputs(seen[m], 1e-4), torch.cat([keys for keys, _ in seen[m]]).double()
            left = update @ (every.T @ every + 0.5 * torch.eye(u.shape[1], dtype=torch.float64))
            right = v.T @ u.double()
            torch.testing.assert_close(left, right, atol=5e-3 * float(right.abs().max()), rtol=1e-3)
        observation, *_ = env.step(action)


def test_the_default_numbers_are_the_papers():
    assert UltraEditConfig() == UltraEditConfig(step_size=1e-6, damping=1.0, recursion=False)


def test_learning_changes_nothing(stream):
    env, agent, observation = stream()
    before = agent.predict(observation)[0]
    agent.reset()
    assert agent.learn(100) is agent
    after = agent.predict(observation)[0]
    assert all(torch.equal(before["values"][m], after["values"][m]) for m in before["values"])


@pytest.mark.parametrize("recursion", [False, True])
def test_a_saved_agent_goes_on_with_the_stream(stream, tmp_path, recursion):
    env, agent, observation = stream(UltraEditConfig(step_size=1e-3, recursion=recursion))
    observation, *_ = env.step(agent.predict(observation)[0])
    agent.save(tmp_path)
    loaded = load_agent(tmp_path, env)
    assert isinstance(loaded, UltraEditAgent) and loaded.config == agent.config
    mine, theirs = agent.predict(observation)[0], loaded.predict(observation)[0]
    for part in ("keys", "values"):
        assert all(torch.equal(mine[part][m], theirs[part][m]) for m in mine[part])


def test_predictions_are_the_same_in_both_array_backends(stream):
    env, agent, observation = stream()
    padded_env, padded_agent, padded = stream(array_backend="numpy")
    action, arrays = agent.predict(observation)[0], padded_agent.predict(padded)[0]
    assert arrays in padded_env.action_space
    for m, values in action["values"].items():
        np.testing.assert_array_equal(arrays["values"][m][: len(values)], values.numpy())


def test_an_agent_of_other_modules_is_refused(stream, tiny_lm, make_env, tmp_path):
    _, agent, _ = stream()
    agent.save(tmp_path)
    with pytest.raises(ValueError, match="trained for 4 modules such as"):
        load_agent(tmp_path, make_env(model=tiny_lm(modules="model.layers.3.mlp.up_proj")))
    with pytest.raises(ValueError, match="give an environment or"):
        UltraEditAgent(None)


@pytest.mark.real
def test_a_single_edit_of_the_default_model_takes_after_some_presentations():
    """All tokens, since the moments of a single row would say nothing."""
    env = gym.make(
        "rledit_env:RLEdit-CounterFact-v0", num_batches=1, batch_size=1, reward="none", array_backend="torch",
        token="all", steps_per_batch=10, disable_env_checker=True,
    )  # fmt: skip
    taken = 0
    for seed in range(3):
        observation, _ = env.reset(seed=seed)
        fact = env.unwrapped.current_batch()[0].edit
        agent, done = UltraEditAgent(env, UltraEditConfig(step_size=1e-3)), False
        while not done:
            observation, _, done, _, _ = env.step(agent.predict(observation)[0])
        taken += top_tokens(env.unwrapped.lm, [fact])[0].tolist() == list(fact.targets)
    env.close()
    assert taken == 3
