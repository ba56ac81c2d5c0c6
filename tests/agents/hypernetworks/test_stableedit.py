"""Tests of StableEdit."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents import StableEditAgent, StableEditConfig, UltraEditAgent, UltraEditConfig, edit_facts, load_agent
from agents.running.editors import EDITORS
from rledit_env.evaluation.metrics import top_tokens

MODULES = "model.layers.[2-3].mlp.down_proj"
FLOOR = 1e-3


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RLEDIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def stream(tiny_lm, make_env):
    """Makes an environment, its agent, and the first observation of a stream that the agent edits."""

    def make(config: StableEditConfig | None = None, **arguments):
        env = make_env(**{"model": tiny_lm(modules=MODULES), "array_backend": "torch", "reward": "none", **arguments})
        agent = StableEditAgent(env, config)
        observation, _ = env.reset(seed=0)
        return env, agent, observation

    return make


class Formula:
    """StableEdit's rule as its code has it, in NumPy and float64, for modules of one shape."""

    def __init__(self, count: float, mean: np.ndarray, squares: np.ndarray, products: np.ndarray) -> None:
        self.count, self.mean, self.squares, self.products = count, mean, squares, products

    def add(self, rows: np.ndarray, d_in: int) -> None:
        """n ← n + N; mean, Σ(x − mean)² and Σ(δ − mean)(δ − mean)ᵀ of all rows."""
        n, total = len(rows), self.count + len(rows)
        shift = rows.mean(0) - self.mean
        self.squares = self.squares + n * rows.var(0) + self.count * n * shift**2 / total
        self.products = self.products + n * np.cov(rows[:, d_in:].T, bias=True)
        self.products = self.products + self.count * n * np.outer(shift[d_in:], shift[d_in:]) / total
        self.mean, self.count = self.mean + n * shift / total, total

    def values(self, rows: np.ndarray, d_in: int, step_size: float) -> np.ndarray:
        """v (N, d_out)."""
        std = np.sqrt(self.squares / (self.count - 1)) + 2.0**-23
        standardised = (rows - self.mean) / std
        keys, gradients = standardised[:, :d_in], standardised[:, d_in:]
        d_out = gradients.shape[1]
        if self.count > d_out + 1:
            values, vectors = np.linalg.eigh(self.products / (self.count - d_out - 1))
            root = vectors @ np.diag(np.maximum(values, FLOOR) ** -0.5) @ vectors.T
            gradients = (rows[:, d_in:] - self.mean[d_in:]) @ root
        return -step_size * (keys**2).sum(1, keepdims=True) * gradients


@pytest.mark.parametrize("warm_up", [True, False])
def test_updates_are_the_formula(stream, warm_up):
    config = StableEditConfig(step_size=1e-3, damping=2.0, warm_up=warm_up, warm_up_facts=40, eigenvalue_floor=FLOOR)
    env, agent, observation = stream(config, num_batches=4, batch_size=2 if warm_up else 1)
    agent.learn(0)
    (state,) = agent.network.normalisers.values()
    start = {k: v.double().numpy() for k, v in state.state().items()}
    formula = Formula(float(start["count"]), start["mean"], start["squares"], start["products"])
    assert (formula.count > 0) == warm_up
    whitened = []
    for _ in range(4):
        action, _ = agent.predict(observation)
        rows = {}
        for m, u in observation["keys"].items():
            scale = len(u) if warm_up else 1
            rows[m] = np.concatenate([u, scale * observation["value_gradients"][m]], 1).astype(np.float64)
            formula.add(rows[m], u.shape[1])
        (state,) = agent.network.normalisers.values()
        whitened.append(state.whitens)
        for m, u in observation["keys"].items():
            keys = u.double().numpy()
            v = formula.values(rows[m], u.shape[1], 1e-3)
            expected = np.linalg.solve(keys.T @ keys + 2.0 * np.eye(keys.shape[1]), keys.T @ v).T
            found = (action["values"][m].T @ action["keys"][m]).double().numpy()
            np.testing.assert_allclose(found, expected, rtol=2e-2, atol=5e-3 * np.abs(expected).max())
        observation, *_ = env.step(action)
    assert all(whitened) if warm_up else not whitened[0] and whitened[-1]


def test_with_recursion_the_normal_equations_hold_the_keys_of_all_earlier_batches(stream):
    config = StableEditConfig(step_size=1e-3, damping=0.5, recursion=True, warm_up_facts=40)
    env, agent, observation = stream(config)
    seen = {m: [] for m in observation["keys"]}
    for _ in range(3):
        action, _ = agent.predict(observation)
        for m, u in observation["keys"].items():
            seen[m].append(u)
            every = torch.cat(seen[m]).double()
            update = (action["values"][m].T @ action["keys"][m]).double()
            left = update @ (every.T @ every + 0.5 * torch.eye(u.shape[1], dtype=torch.float64))
            right = (action["values"][m].T @ u).double()
            torch.testing.assert_close(left, right, atol=5e-3 * float(right.abs().max()), rtol=1e-3)
        observation, *_ = env.step(action)


def test_the_default_numbers_are_those_of_the_published_commands():
    config = StableEditConfig()
    assert (config.step_size, config.damping, config.recursion, config.warm_up) == (1e-6, 10.0, False, True)
    assert (config.normaliser_scope, config.normaliser_variance) == ("shape", "exact")
    network = config.network()
    assert (network.blocks, network.coefficient, network.aggregation) == (0, "normalised", "least_squares")
    assert (network.normaliser, network.eigenvalue_floor) == ("whitened", config.eigenvalue_floor)


def test_a_warm_up_changes_nothing_in_the_llm_and_moments_start_with_it_without_a_call_of_learn(stream):
    env, agent, observation = stream(StableEditConfig(step_size=1e-3, warm_up_facts=40))
    before = {m: env.lm.weight(m).clone() for m in env.lm.module_shapes}
    first = agent.predict(observation)[0]
    assert all(torch.equal(env.lm.weight(m), w) for m, w in before.items())
    other = StableEditAgent(env, agent.config).learn(0)
    second = other.predict(observation)[0]
    assert all(torch.equal(first["values"][m], second["values"][m]) for m in first["values"])
    (moments,) = other.network.training_moments.values()
    assert moments.whitens and float(moments.count) >= 2 * 40  # two modules


def test_a_single_fact_is_edited_with_a_warm_up_and_not_at_all_without(stream, tiny_lm):
    one = {"batch_size": 1, "token": "subject", "model": tiny_lm(modules="model.layers.2.mlp.down_proj")}
    _, warm, observation = stream(StableEditConfig(step_size=1e-3, warm_up_facts=40), **one)
    _, cold, _ = stream(StableEditConfig(step_size=1e-3, warm_up=False), **one)
    assert all(v.any() for v in warm.predict(observation)[0]["values"].values())
    assert not any(v.any() for v in cold.predict(observation)[0]["values"].values())


@pytest.mark.parametrize("recursion", [False, True])
def test_a_saved_agent_goes_on_with_the_stream(stream, tmp_path, recursion):
    config = StableEditConfig(step_size=1e-3, recursion=recursion, warm_up_facts=40)
    env, agent, observation = stream(config)
    observation, *_ = env.step(agent.predict(observation)[0])
    agent.save(tmp_path / "agent")
    loaded = load_agent(tmp_path / "agent", env)
    assert isinstance(loaded, StableEditAgent) and loaded.config == agent.config
    mine, other = agent.predict(observation)[0], loaded.predict(observation)[0]
    for part in ("keys", "values"):
        assert all(torch.equal(mine[part][m], other[part][m]) for m in mine[part])


def test_an_agent_given_a_streams_memory_goes_on_with_it(stream):
    config = StableEditConfig(step_size=1e-3, warm_up_facts=40)
    env, agent, observation = stream(config)
    observation, *_ = env.step(agent.predict(observation)[0])
    other = StableEditAgent(env, config)
    other.load_memory({k: v.clone() for k, v in agent.memory().items()})
    mine, found = agent.predict(observation)[0], other.predict(observation)[0]
    assert all(torch.equal(mine["values"][m], found["values"][m]) for m in mine["values"])


@pytest.mark.parametrize("facts", [0, 1, 2.5])
def test_a_number_of_facts_that_cannot_be_is_refused(facts):
    with pytest.raises(ValueError, match=f"warm_up_facts is {facts}; give a whole number from 2"):
        StableEditConfig(warm_up_facts=facts)


def test_it_is_an_editor_like_ultraedit_with_the_same_plug_ins():
    for plugin in ("", "+text", "+recursion", "+recursion+text"):
        ours, theirs = EDITORS[f"stableedit{plugin}"], EDITORS[f"ultraedit{plugin}"]
        assert ours.agent is StableEditAgent and ours.training_free
        assert (ours.group, ours.env, ours.settings) == (theirs.group, theirs.env, theirs.settings)
        assert ours.title == theirs.title.replace("UltraEdit", "StableEdit")
        assert isinstance(ours.configuration(), StableEditConfig)


def test_facts_are_edited_through_the_one_function_of_all_editors(tiny_lm, facts):
    lm = tiny_lm(modules=MODULES)
    agent = StableEditAgent(None, StableEditConfig(step_size=0.1, warm_up_facts=40), shapes=lm.module_shapes)
    with pytest.raises(ValueError, match="warm_up needs the environment's LLM"):
        agent.learn(0)
    env = gym.make("RLEdit-CounterFact-v0", model=lm, data=facts("counterfact"), num_batches=1, batch_size=2,
                   reward="none", array_backend="torch", disable_env_checker=True)  # fmt: skip
    agent = StableEditAgent(env, StableEditConfig(step_size=0.1, warm_up_facts=40)).learn(0)
    edit_facts(lm, agent, facts("counterfact", 4), batch_size=2)
    assert any((lm.weight(m) - lm.original_weight(m)).any() for m in lm.module_shapes)


@pytest.mark.real
def test_a_single_edit_of_the_default_model_takes_after_some_presentations():
    env = gym.make(
        "rledit_env:RLEdit-CounterFact-v0", num_batches=1, batch_size=1, reward="none", array_backend="torch",
        token="subject", steps_per_batch=10, edit_modules="model.layers.[4-8].mlp.down_proj", disable_env_checker=True,
    )  # fmt: skip
    taken = 0
    agent = StableEditAgent(env, StableEditConfig(step_size=3e-4)).learn(0)  # as configured for this model
    for seed in range(3):
        observation, _ = env.reset(seed=seed)
        agent.reset()
        fact, done = env.unwrapped.current_batch()[0].edit, False
        while not done:
            observation, _, done, _, _ = env.step(agent.predict(observation)[0])
        taken += top_tokens(env.unwrapped.lm, [fact])[0].tolist() == list(fact.targets)
    env.close()
    assert taken == 3


def test_without_whitening_it_would_be_ultraedit(stream):
    """With few rows of a wide value, gradients are standardised, as UltraEdit's with an exact variance."""
    settings = {"step_size": 1e-3, "damping": 2.0}
    env, agent, observation = stream(StableEditConfig(warm_up=False, **settings), batch_size=1)
    plain = UltraEditAgent(env, UltraEditConfig(normaliser_variance="exact", **settings))
    mine, other = agent.predict(observation)[0], plain.predict(observation)[0]
    (moments,) = agent.network.normalisers.values()
    assert not moments.whitens
    assert all(torch.equal(mine["values"][m], other["values"][m]) for m in mine["values"])
