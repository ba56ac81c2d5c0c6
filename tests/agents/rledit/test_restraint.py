"""RLEdit whose updates have no part along directions of high curvature (`HypernetworkConfig.crisp_energy`)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents import HypernetworkConfig, RLEditAgent, RLEditConfig, load_agent
from agents.curvature import low_curvature, text_curvature
from agents.running.comparison import Comparison, Setting, Views
from agents.running.editors import EDITORS, configured, find_configs, load_configs
from rledit_env.knowledge import load_knowledge
from rledit_env.lm.editable import EditableLM

MODULES = "model.layers.[1-2].mlp.up_proj"
TEXT = {"text_tokens": 1024}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLEDIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def make(tiny_lm: Callable[..., EditableLM], facts: Callable[..., Any]) -> Callable[..., Any]:
    def made(**settings: Any) -> Any:
        arguments = {"reward": "efficacy", "reward_gradient": True, "array_backend": "torch"} | settings
        return gym.make(
            "RLEdit-CounterFact-v0", model=tiny_lm(modules=MODULES), data=facts("counterfact", 12), num_batches=2,
            batch_size=2, token="subject", disable_env_checker=True, **arguments,
        )  # fmt: skip

    return made


def agent_in(env: Any, energy: float = 0.9, **settings: Any) -> RLEditAgent:
    network = HypernetworkConfig(rank=4, crisp_energy=energy, **TEXT, **settings)
    return RLEditAgent(env, RLEditConfig(network=network, prior_batches=2))


@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_an_update_is_the_projection_of_the_update_without_restraint(make: Any, backend: str) -> None:
    env = make(reward="none", reward_gradient=False, array_backend=backend)
    free, agent = agent_in(env, 0.0), agent_in(env)
    observation, _ = env.reset(seed=0)
    factors, action = free.predict(observation)[0], agent.predict(observation)[0]
    assert set(factors) == {"keys", "values"} and set(action) == {"updates"}
    lm = env.unwrapped.lm
    projections = low_curvature(text_curvature(lm, list(lm.module_shapes), tokens=1024, progress=False).by_module, 0.9)
    for m, update in action["updates"].items():
        assert isinstance(update, np.ndarray if backend == "numpy" else torch.Tensor)
        dense = torch.as_tensor(factors["values"][m]).T @ torch.as_tensor(factors["keys"][m])
        expected = projections[m].project(dense)
        torch.testing.assert_close(torch.as_tensor(update), expected, rtol=1e-4, atol=1e-6)
        assert float((dense - expected).norm() / dense.norm()) > 0.05
    env.step(action)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_projections_have_the_networks_precision_and_updates_are_not_rounded(make: Any, precision: str) -> None:
    env = make(reward="none", reward_gradient=False)
    agent = agent_in(env, precision=precision)
    action = agent.predict(env.reset(seed=0)[0])[0]
    assert {p.outputs.dtype for p in agent.projections.values()} == {getattr(torch, precision)}
    assert {update.dtype for update in action["updates"].values()} == {torch.float32}


def test_a_trained_agent_is_restrained_and_comes_back_from_its_folder(make: Any, tmp_path: Path) -> None:
    env = make()
    agent = agent_in(env)
    before = [p.detach().clone() for p in agent.network.learned_parameters()]
    agent.learn(4, progress_bar=False)
    after = agent.network.learned_parameters()
    assert any(not torch.equal(p, q) for p, q in zip(before, after, strict=True))
    agent.save(tmp_path)
    loaded: Any = load_agent(tmp_path, env)
    observation, _ = env.reset(seed=0)
    for one in (agent, loaded):
        one.reset()
    mine, theirs = (one.predict(observation)[0]["updates"] for one in (agent, loaded))
    assert all(torch.equal(theirs[m], u) for m, u in mine.items())
    with pytest.raises(ValueError, match="crisp_energy needs the environment's LLM"):
        load_agent(tmp_path).predict(observation)


def test_a_resumed_training_ends_as_the_whole_one(make: Any, tmp_path: Path) -> None:
    def learned(folder: str, steps: int) -> RLEditAgent:
        return agent_in(make()).learn(steps, progress_bar=False, log_dir=tmp_path / folder)

    whole = learned("whole", 4)
    learned("parts", 2)
    resumed = learned("parts", 4)
    assert resumed.timesteps == whole.timesteps == 4
    for name, value in whole.network.state_dict().items():
        torch.testing.assert_close(resumed.network.state_dict()[name], value, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="crisp_energy: 0.9 there, 0.5 here"):
        agent_in(make(), 0.5).learn(4, progress_bar=False, log_dir=tmp_path / "parts")


def test_a_loaded_agent_can_be_restrained_and_another_llm_has_another_curvature(make: Any) -> None:
    env = make()
    agent = agent_in(env, 0.0)
    observation, _ = env.reset(seed=0)
    free = agent.predict(observation)[0]
    agent.restrain(0.9)
    agent.reset()
    assert agent.wants_curvature and set(agent.predict(observation)[0]) == {"updates"} != set(free)
    assert agent.projections and not agent.wants_curvature
    agent.set_env(gym.make("RLEdit-CounterFact-v0", model=copy.deepcopy(env.unwrapped.lm), num_batches=1, batch_size=2,
                           array_backend="torch", token="subject", disable_env_checker=True))  # fmt: skip
    assert agent.wants_curvature
    agent.restrain(0.0)
    assert not agent.wants_curvature and set(agent.predict(observation)[0]) == {"keys", "values"}
    with pytest.raises(ValueError, match="crisp_energy is 1.0; give 0"):
        agent.restrain(1.0)


def test_a_comparison_restrains_the_trained_agent_that_is_loaded(make: Any, tmp_path: Path) -> None:
    free = agent_in(make(), 0.0)
    free.learn(4, progress_bar=False)
    free.save(tmp_path / "agent")
    test = load_knowledge("counterfact", split="eval")
    setting = Setting("RLEdit-CounterFact-v0", test, lambda: test, 2, 2, generate=False)
    comparison = Comparison(setting, Views("tiny-llama", "float32", "cpu"), tmp_path / "out", progress_bar=False)
    cells = {}
    for name in ("rledit", "rledit+crisp"):
        editor = dataclasses.replace(EDITORS[name], saved=str(tmp_path / "agent"), env={}, training=None)
        comparison.run(editor, [0])
        cells[name] = comparison.cell(editor, 0)
    drifts = [cell["drift"] for cell in cells.values() if cell]
    assert len(drifts) == 2 and 0 < drifts[1] < drifts[0]


def test_the_variants_are_their_editors_with_the_projection() -> None:
    entries = load_configs(find_configs("smollm2-135m"), "counterfact")
    for name in ("rledit", "rledit-untrained"):
        plain, crisp = (configured(EDITORS[n], entries) for n in (name, f"{name}+crisp"))
        network = dataclasses.replace(crisp.configuration().network, crisp_energy=0.0)
        assert crisp.configuration().network.crisp_energy > 0
        assert dataclasses.replace(crisp.configuration(), network=network) == plain.configuration()
        assert (crisp.env, crisp.saved, crisp.training) == (plain.env, plain.saved, plain.training)
