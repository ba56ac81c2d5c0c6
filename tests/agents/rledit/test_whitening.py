"""Whitened value gradients as a normaliser of the hypernetwork."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from agents import HypernetworkConfig, RLEditAgent, RLEditConfig, load_agent
from agents.rledit.hypernetwork import Hypernetwork
from agents.rledit.moments import start_warm, take, training_moments
from agents.rledit.normaliser import RunningNormaliser, moments_state
from agents.rledit.trainer import update_policy
from agents.rledit.trajectory import trajectory
from agents.rledit.whitening import WhiteningNormaliser

SHAPES = {"a": (6, 4), "b": (4, 6), "c": (6, 4)}
MODULES = "model.layers.[1-2].mlp.down_proj"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLEDIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def rows_of(count: int, seed: int = 0) -> torch.Tensor:
    """Rows of [u; δ] with 6 and 4 columns, whose δ are correlated."""
    generator = torch.Generator().manual_seed(seed)
    keys, gradients = (3 + 2 * torch.randn(count, width, generator=generator) for width in (6, 4))
    mixing = torch.tensor([[1.0, 0.9, 0.0, 0.0], [0.0, 0.5, 0.0, 0.3], [0.0, 0.0, 2.0, 0.0], [0.0, 0.0, 1.0, 0.1]])
    return torch.cat([keys, gradients @ mixing], 1)


def batch(rows: int, seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return tuple({m: 3 + 2 * torch.randn(rows, s[side], generator=generator) for m, s in SHAPES.items()}
                 for side in (0, 1))  # fmt: skip


def network(**settings: Any) -> Hypernetwork:
    rule = {"rank": 3, "blocks": 1, "step_size": 0.1, "normaliser": "whitened", "normaliser_scope": "shape"}
    return Hypernetwork(SHAPES, HypernetworkConfig(**rule | settings))


def whitened(rows: np.ndarray, of: np.ndarray, floor: float) -> np.ndarray:
    """StableEdit's formula, (rows − mean) Σ^(−1/2) with Σ = scatter / (n − d − 1), for value gradients (N, d)."""
    centred = of - of.mean(0)
    values, vectors = np.linalg.eigh(centred.T @ centred / (len(of) - of.shape[1] - 1))
    return (rows - of.mean(0)) @ vectors @ np.diag(np.maximum(values, floor) ** -0.5) @ vectors.T


# -- the moments


@pytest.mark.parametrize("floor", [1e-6, 2.0])
def test_keys_are_standardised_and_value_gradients_whitened_with_the_covariance_of_all_rows(floor):
    normaliser, rows = WhiteningNormaliser(6, 4, floor=floor), rows_of(50)
    for piece in rows.split([1, 20, 3, 26]):
        normaliser.update(piece)
        normaliser.update(rows[:0])
    found, every = normaliser.normalised(rows[:7]).double().numpy(), rows.double().numpy()
    keys = (every[:7, :6] - every[:, :6].mean(0)) / every[:, :6].std(0, ddof=1)
    np.testing.assert_allclose(found[:, :6], keys, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found[:, 6:], whitened(every[:7, 6:], every[:, 6:], floor), rtol=2e-3, atol=2e-4)


def test_whitened_rows_are_uncorrelated_and_of_unit_variance():
    normaliser, rows = WhiteningNormaliser(6, 4), rows_of(500)
    normaliser.update(rows)
    gradients = normaliser.normalised(rows)[:, 6:].double()
    np.testing.assert_allclose(np.cov(gradients.T.numpy()), np.eye(4) * (500 - 5) / 499, atol=2e-3)


def test_the_first_rows_are_standardised_until_there_are_more_than_the_covariance_needs():
    normaliser, plain, rows = WhiteningNormaliser(6, 4), RunningNormaliser(10), rows_of(8)
    for piece in (rows[:3], rows[3:5]):  # n = 5 is d_out + 1
        normaliser.update(piece)
        plain.update(piece)
        assert torch.equal(normaliser.normalised(rows), plain.normalised(rows))
    assert not normaliser.whitens
    normaliser.update(rows[5:6])
    plain.update(rows[5:6])
    assert normaliser.whitens
    assert torch.equal(normaliser.normalised(rows)[:, :6], plain.normalised(rows)[:, :6])
    assert not torch.allclose(normaliser.normalised(rows)[:, 6:], plain.normalised(rows)[:, 6:])


def test_merged_moments_are_those_of_all_rows_and_moments_without_a_covariance_are_refused():
    rows, whole, merged, other = rows_of(60), *(WhiteningNormaliser(6, 4) for _ in range(3))
    whole.update(rows)
    merged.update(rows[:21])
    other.update(rows[21:])
    merged.merge(other)
    for name, tensor in whole.state().items():
        torch.testing.assert_close(merged.state()[name], tensor, rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match="whitening needs those of a WhiteningNormaliser"):
        merged.merge(RunningNormaliser(10))


# -- in the network


def test_modules_of_a_shape_share_a_covariance_that_takes_all_of_them_in_first():
    net = network(warm_up=False)
    seen: list[torch.Tensor] = []
    for seed in range(3):
        keys, gradients = batch(6, seed)
        record = net.observe(keys, gradients)
        seen += [gradients["a"], gradients["c"]]
        for place, m in enumerate(("a", "c")):
            every = torch.cat(seen).double().numpy()
            expected = whitened(gradients[m].double().numpy(), every, 1e-6)
            np.testing.assert_allclose(record.inputs["0"][place][:, 6:], expected, rtol=5e-3, atol=1e-3)


def warm(net: Hypernetwork) -> list[torch.Tensor]:
    """Start the network from three batches of training facts; returns the rows of [u; N δ] of "a" and "c"."""
    moments: dict[str, RunningNormaliser] = {}
    rows = []
    for seed in (7, 8, 9):
        keys, gradients = batch(10, seed)
        take(moments, keys, gradients, net.whitened_names)
        rows += [torch.cat([keys[m], 10 * gradients[m]], 1) for m in ("a", "c")]
    net.start_from(moments)
    return rows


def test_every_stream_starts_from_all_rows_of_the_training_facts():
    net = network()
    rows = warm(net)
    first = None
    for _ in range(2):
        net.reset()
        assert {n: float(moments.count) for n, moments in net.normalisers.items()} == {"6x4": 60, "4x6": 30}
        keys, gradients = batch(1, 3)
        inputs = net.observe(keys, gradients).inputs["0"]
        both = [torch.cat([keys[m], gradients[m]], 1) for m in ("a", "c")]
        every = torch.cat(rows + both).double().numpy()
        expected = whitened(gradients["a"].double().numpy(), every[:, 6:], 1e-6)
        np.testing.assert_allclose(inputs[0][:, 6:], expected, rtol=5e-3, atol=1e-3)
        assert first is None or torch.equal(inputs, first)
        first = inputs


@pytest.mark.parametrize("scope", ["module", "shape", "shape in turn"])
def test_the_memory_of_a_stream_continues_in_another_network(scope):
    one, other = network(normaliser_scope=scope), network(normaliser_scope=scope)
    for net in (one, other):
        warm(net)
    one.observe(*batch(5))
    other.load_memory_state({k: v.clone() for k, v in one.memory_state().items()})
    results = [net.factors(net.observe(*batch(4, seed=1))) for net in (one, other)]
    assert all(torch.equal(a[m], b[m]) for a, b in zip(*results, strict=True) for m in SHAPES)


def test_the_size_of_a_network_counts_the_covariances():
    net = network()
    held = sum(p.numel() for p in net.parameters())
    held += sum(t.numel() for n in net.normalisers.values() for t in n.state().values())
    assert Hypernetwork.parameter_count(SHAPES, net.config) == held


def test_the_parameters_gradient_is_that_of_finite_differences():
    net = network(aggregation="least_squares").double()
    warm(net)
    record = net.observe(*batch(5))
    record = type(record)(
        {m: u.double() for m, u in record.keys.items()}, {g: z.double() for g, z in record.inputs.items()}, {}
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    def outcome() -> torch.Tensor:
        keys, values = net.factors(record)
        return sum((values[m].T @ keys[m]).sin().sum() for m in SHAPES)

    outcome().backward()
    for parameter in net.learned_parameters():
        place = tuple(0 for _ in parameter.shape)
        slope = parameter.grad[place]
        with torch.no_grad():
            parameter[place] += 1e-6
            above = outcome()
            parameter[place] -= 2e-6
            below = outcome()
            parameter[place] += 1e-6
        torch.testing.assert_close(slope, (above - below) / 2e-6, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("settings", "message"), [
    ({"output_units": "input", "aggregation": "least_squares"}, "normaliser is 'whitened' and output_units is 'input'"),
    ({"eigenvalue_floor": 0.0}, "eigenvalue_floor is 0.0; give a positive number"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        HypernetworkConfig(normaliser="whitened", **settings)


# -- in the agent


def environment(tiny_lm: Any, make_env: Any, **arguments: Any) -> gym.Env[Any, Any]:
    return make_env(
        "counterfact", model=tiny_lm(modules=MODULES), batch_size=4, array_backend="torch", reward="efficacy",
        reward_gradient=True, token="answer", **arguments,
    )  # fmt: skip


def config(**settings: Any) -> RLEditConfig:
    rule = HypernetworkConfig(rank=4, blocks=1, prior=0.0, normaliser="whitened", normaliser_scope="shape")
    return RLEditConfig(network=rule, prior_batches=20, **settings)


@pytest.fixture
def env(tiny_lm, make_env):
    return environment(tiny_lm, make_env)


def test_learning_gathers_covariances_and_moves_the_policy(env):
    agent = RLEditAgent(env, config())
    before = [p.detach().clone() for p in agent.network.learned_parameters()]
    agent.learn(6, progress_bar=False)
    (moments,) = agent.network.training_moments.values()
    assert isinstance(moments, WhiteningNormaliser) and moments.whitens
    assert agent.updates > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, agent.network.learned_parameters(), strict=True))


def test_a_saved_agent_has_its_covariances_and_goes_on_with_the_stream(env, tmp_path: Path):
    agent = RLEditAgent(env, config())
    agent.gather_moments(env, progress_bar=False)
    observation, _ = env.reset(seed=0)
    observation, *_ = env.step(agent.predict(observation)[0])
    agent.save(tmp_path)
    assert any(name.startswith("moments.") and name.endswith(".products") for name in
               load_file(tmp_path / "agent.safetensors"))
    loaded = load_agent(tmp_path, env)
    saved = moments_state(agent.network.training_moments)
    assert all(torch.equal(v, saved[k]) for k, v in moments_state(loaded.network.training_moments).items())
    mine, other = agent.predict(observation)[0], loaded.predict(observation)[0]
    for part in ("keys", "values"):
        assert all(torch.equal(mine[part][m], other[part][m]) for m in mine[part])


def test_a_resumed_run_ends_as_the_uninterrupted_one(env, tmp_path: Path):
    whole = RLEditAgent(env, config()).learn(12, progress_bar=False, log_dir=tmp_path / "whole")
    RLEditAgent(env, config()).learn(6, progress_bar=False, log_dir=tmp_path / "cut")
    resumed = RLEditAgent(env, config()).learn(12, progress_bar=False, log_dir=tmp_path / "cut")
    assert resumed.updates == whole.updates > 1
    for mine, other in zip(resumed.network.parameters(), whole.network.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


def test_streams_of_a_vector_environment_are_edited_as_alone(tiny_lm, facts):
    settings = {"model": tiny_lm(modules=MODULES), "data": facts("counterfact", 12), "num_batches": 3, "batch_size": 2,
                "reward": "efficacy", "token": "answer"}  # fmt: skip
    envs = gym.make_vec("RLEdit-CounterFact-v0", num_envs=2, **settings)
    alone = gym.make("RLEdit-CounterFact-v0", disable_env_checker=True, **settings)
    agents = [RLEditAgent(alone, config()) for _ in range(2)]
    for agent in agents:
        assert start_warm(agent, alone.unwrapped.lm, "answer")
    observations, _ = envs.reset(seed=[0, 1])
    together = []
    for _ in range(3):
        actions = [agent.predict(slice_of(observations, i))[0] for i, agent in enumerate(agents)]
        action = {part: {m: np.stack([a[part][m] for a in actions]) for m in actions[0][part]} for part in actions[0]}
        observations, rewards, *_ = envs.step(action)
        together.append(rewards)
    for i, agent in enumerate(agents):
        observation, _ = alone.reset(seed=i)
        agent.reset()
        for step in range(3):
            observation, reward, *_ = alone.step(agent.predict(observation)[0])
            assert reward == pytest.approx(together[step][i], rel=1e-3)


def slice_of(observations: Any, i: int) -> Any:
    """The observation of one environment of a vector environment."""
    return {k: slice_of(v, i) if isinstance(v, dict) else v[i] for k, v in observations.items()}


def test_bundled_facts_give_moments_with_covariances_and_cache_them_apart(tiny_lm, tmp_path, monkeypatch):
    monkeypatch.setenv("RLEDIT_CACHE", str(tmp_path))
    lm = tiny_lm(modules=MODULES)
    names = dict.fromkeys(lm.module_shapes, "both")
    plain = training_moments(lm, facts=40)
    first = training_moments(lm, facts=40, names=names)
    assert len(list((tmp_path / "moments").iterdir())) == 2
    again = training_moments(lm, facts=40, names=names)
    assert list(first) == ["both"] and set(plain) == set(lm.module_shapes)
    assert isinstance(again["both"], WhiteningNormaliser)
    assert all(torch.equal(v, first["both"].state()[k]) for k, v in again["both"].state().items())
    assert float(first["both"].count) == sum(float(n.count) for n in plain.values())


def test_a_policy_update_has_a_gradient_for_every_parameter(env):
    agent = RLEditAgent(env, config())
    agent.gather_moments(env, progress_bar=False)
    gradients, _ = trajectory(agent, env, 0)
    assert all(torch.isfinite(g).all() for g in gradients)
    update_policy(agent, [gradients])
    assert agent.updates == 1
