"""Tests of agents.rledit.text_prior: least squares that start from the second moment of text's keys."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from torch import Tensor

import agents.key_statistics as key_statistics_module
import rledit_env  # noqa: F401 - registers the environments
from agents import (
    Hypernetwork,
    HypernetworkConfig,
    RLEditAgent,
    RLEditConfig,
    UltraEditAgent,
    UltraEditConfig,
    load_agent,
)
from agents.key_statistics import key_statistics, output_moments
from agents.running.editors import EDITORS, TEXT_PRIOR, configured

SHAPES = {"a": (5, 3), "b": (5, 3)}
MODULES = "model.layers.[1-2].mlp.up_proj"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLEDIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def moments_of_text(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = {m: torch.randn(40, 5, generator=generator, dtype=torch.float64) for m in SHAPES}
    return {m: r.T @ r / len(r) for m, r in rows.items()}


def network_of(aggregation: Any, **settings: Any) -> Hypernetwork:
    config = HypernetworkConfig(
        blocks=0, aggregation=aggregation, prior=30.0, prior_source="text", damping=0.7, warm_up=False, **settings
    )  # fmt: skip
    network = Hypernetwork(SHAPES, config).double()
    network.key_memory.start_from(moments_of_text())
    network.reset()
    for normaliser in network.normalisers.values():
        normaliser.load({k: v.double() for k, v in normaliser.state().items()})
    return network


def batch(seed: int, rows: int = 4) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    keys = {m: torch.randn(rows, 5, generator=generator, dtype=torch.float64) for m in SHAPES}
    return keys, {m: torch.randn(rows, 3, generator=generator, dtype=torch.float64) for m in SHAPES}


@pytest.mark.parametrize("aggregation", ["least_squares", "recursive"])
def test_updates_solve_the_least_squares_with_the_prior_in_the_system(aggregation: Any) -> None:
    """ΔW_t = v_tᵀ u_t S_t⁻¹ with S_t = λI + cC + u_tᵀu_t, and the recursion's earlier keys beside them."""
    network = network_of(aggregation)
    system = {m: 0.7 * torch.eye(5, dtype=torch.float64) + 30 * c for m, c in moments_of_text().items()}
    for step in range(3):
        keys, gradients = batch(step)
        update_keys, values = network.factors(network.observe(keys, gradients))
        for m, u in keys.items():
            s = system[m] + u.T @ u
            if aggregation == "recursive":
                system[m] = s
            expected = values[m].T @ u @ torch.linalg.inv(s)
            torch.testing.assert_close(values[m].T @ update_keys[m], expected, rtol=1e-9, atol=1e-12)


def test_the_update_is_the_ridge_solution_that_pays_for_what_it_does_to_text() -> None:
    """It minimises Σ‖ΔW u − v‖² + λ‖ΔW‖² + c E‖ΔW k‖²: its gradient there is 0."""
    network = network_of("least_squares")
    keys, gradients = batch(7)
    update_keys, values = network.factors(network.observe(keys, gradients))
    for m, u in keys.items():
        change = (values[m].T @ update_keys[m]).detach().requires_grad_()
        cost = (u @ change.T - values[m].detach()).square().sum() + 0.7 * change.square().sum()
        cost = cost + 30 * torch.trace(change @ moments_of_text()[m] @ change.T)
        (slope,) = torch.autograd.grad(cost, change)
        assert float(slope.abs().max()) < 1e-10


def test_the_gradient_reaches_the_values_and_not_the_keys_or_the_damping() -> None:
    network = network_of("least_squares", learn_damping=True)
    assert not network.learns_keys and not network.log_damping.requires_grad
    keys, values = network.factors(network.observe(*batch(1)))
    assert all(not k.requires_grad for k in keys.values()) and all(v.requires_grad for v in values.values())


@pytest.fixture
def make(tiny_lm: Any, facts: Any) -> Any:
    def made(**arguments: Any) -> Any:
        return gym.make(
            "RLEdit-CounterFact-v0", model=tiny_lm(modules=MODULES), data=facts("counterfact", 12), num_batches=3,
            batch_size=2, array_backend="torch", token="subject", disable_env_checker=True, **arguments,
        )  # fmt: skip

    return made


@pytest.mark.parametrize("recursion", [False, True])
def test_an_update_moves_text_less_for_what_it_does_to_the_facts(make: Any, recursion: bool) -> None:
    env = make(reward="none")
    lm = env.unwrapped.lm
    moments = key_statistics(lm, list(lm.module_shapes), tokens=4096, progress=False).second_moments
    observation, _ = env.reset(seed=0)
    ratios = []
    for prior in (0.0, 1e4):
        config = UltraEditConfig(step_size=0.3, recursion=recursion, text_prior=prior, text_tokens=4096)
        action, _ = UltraEditAgent(env, config).predict(observation)
        changes = {m: action["values"][m].T @ k for m, k in action["keys"].items()}
        text = sum(float(torch.trace(c @ moments[m] @ c.T)) for m, c in changes.items())
        facts = sum(float((observation["keys"][m] @ c.T).square().mean()) for m, c in changes.items())
        ratios.append(text / facts)
    assert 0 < ratios[1] < 0.6 * ratios[0], ratios


def test_the_prior_is_of_the_text_that_the_configuration_names(make: Any, tmp_path: Path) -> None:
    env = make(reward="none")
    file = tmp_path / "text.txt"
    file.write_text("The river flows past the old mill, and nobody knows why it was built there. " * 60, "utf-8")
    agent = UltraEditAgent(env, UltraEditConfig(text_prior=5.0, text=str(file), text_tokens=512)).learn(0)
    lm = env.unwrapped.lm
    expected = key_statistics(lm, list(lm.module_shapes), file, 512, progress=False).second_moments
    assert all(torch.equal(agent.network.key_memory.second_moments[m], c) for m, c in expected.items())
    with pytest.raises(FileNotFoundError):
        UltraEditAgent(env, UltraEditConfig(text_prior=5.0, text=str(tmp_path / "none.txt"))).learn(0)


def test_a_saved_agent_keeps_the_prior(make: Any, tmp_path: Path) -> None:
    env = make(reward="efficacy", reward_gradient=True)
    network = HypernetworkConfig(rank=4, prior=50.0, prior_source="text", text_tokens=2048)
    trained = RLEditAgent(env, RLEditConfig(network=network, prior_batches=2)).learn(3, progress_bar=False)
    untrained = UltraEditAgent(env, UltraEditConfig(step_size=1e-2, text_prior=50.0, text_tokens=2048)).learn(0)
    observation, _ = env.reset(seed=0)
    for name, agent in (("trained", trained), ("untrained", untrained)):
        agent.save(tmp_path / name)
        loaded: Any = load_agent(tmp_path / name, env)
        assert loaded.config == agent.config and not loaded.network.wants_prior
        for one in (agent, loaded):
            one.reset()
        mine, theirs = agent.predict(observation)[0], loaded.predict(observation)[0]
        for part in ("keys", "values"):
            assert all(torch.equal(f, theirs[part][m]) for m, f in mine[part].items())


def test_a_resumed_training_keeps_the_prior(make: Any, tmp_path: Path) -> None:
    def learned(folder: str, steps: int) -> RLEditAgent:
        env = make(reward="efficacy", reward_gradient=True)
        network = HypernetworkConfig(rank=4, prior=50.0, prior_source="text", text_tokens=2048)
        agent = RLEditAgent(env, RLEditConfig(network=network, prior_batches=2))
        return agent.learn(steps, progress_bar=False, log_dir=tmp_path / folder)

    whole = learned("whole", 6)
    learned("parts", 3)
    resumed = learned("parts", 6)
    assert resumed.timesteps == whole.timesteps == 6
    for name, value in whole.network.state_dict().items():
        torch.testing.assert_close(resumed.network.state_dict()[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in EDITORS if name.endswith("+text")])
def test_every_variant_is_its_editor_with_the_prior(name: str) -> None:
    plain = configured(EDITORS[name.removesuffix("+text")], {}).configuration()
    config = configured(EDITORS[name], {}).configuration()
    assert dataclasses.replace(config, text_prior=0.0).text_prior == plain.text_prior == 0
    network = config.network() if callable(config.network) else config.network
    assert network.has_text_prior and network.prior == TEXT_PRIOR


def test_what_cannot_have_a_prior_is_refused() -> None:
    with pytest.raises(ValueError, match=r"aggregation is 'mend', which solves no least squares"):
        HypernetworkConfig(aggregation="mend", prior_source="text")
    with pytest.raises(ValueError, match="prior_source is 'wiki'; give 'facts' or 'text'"):
        HypernetworkConfig(prior_source="wiki")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="text_tokens is 3; give a whole number from 64"):
        HypernetworkConfig(text_tokens=3)
    network = Hypernetwork(SHAPES, HypernetworkConfig(prior_source="text"))
    with pytest.raises(ValueError, match=r"the second moment of b has shape None; it must be \(5, 5\)"):
        network.key_memory.start_from({"a": torch.eye(5)})


# -- the outputs' curvature


def test_values_are_turned_by_the_curvature_and_keep_their_norm() -> None:
    """v ← (G + γ·mean(diag G)·I)⁻¹ v, rescaled to ‖v‖."""
    plain, turning = (network_of("recursive", output_curvature=g) for g in (0.0, 0.25))
    generator = torch.Generator().manual_seed(3)
    rows = {m: torch.randn(9, 3, generator=generator, dtype=torch.float64) for m in SHAPES}
    moments = {m: r.T @ r / len(r) for m, r in rows.items()}
    assert turning.wants_curvature and not plain.wants_curvature
    turning.turn_by(moments)
    assert not turning.wants_curvature
    (keys, values), (turned_keys, turned) = (n.factors(n.observe(*batch(2))) for n in (plain, turning))
    for m, g in moments.items():
        assert torch.equal(keys[m], turned_keys[m])
        natural = values[m] @ torch.linalg.inv(g + 0.25 * g.diagonal().mean() * torch.eye(3, dtype=torch.float64))
        expected = natural * (values[m].norm(dim=1) / natural.norm(dim=1))[:, None]
        torch.testing.assert_close(turned[m], expected, rtol=1e-5, atol=1e-9)


def test_the_output_moments_are_those_of_autograd(make: Any) -> None:
    lm = make(reward="none").unwrapped.lm
    modules = list(lm.module_shapes)
    ids = key_statistics_module.generated_corpus(lm, 128, seed=0)
    sums, rows = dict.fromkeys(modules, 0.0), 0
    for row in ids.tolist():
        outputs: dict[str, Tensor] = {}

        def keep(name: str, seen: dict[str, Tensor] = outputs) -> Any:
            def hook(_module: Any, _args: Any, output: Tensor) -> Tensor:
                seen[name] = output.requires_grad_()
                return output

            return hook

        handles = [lm.model.get_submodule(m).register_forward_hook(keep(m)) for m in modules]
        with torch.enable_grad():
            logits = lm.model(input_ids=torch.tensor([row[:-1]], device=lm.device)).logits[0]
            places = torch.arange(key_statistics_module.GIVEN - 1, len(row) - 1)
            loss = -logits.log_softmax(-1)[places, torch.tensor(row[key_statistics_module.GIVEN :])].sum()
            gradients = torch.autograd.grad(loss, [outputs[m] for m in modules])
        for handle in handles:
            handle.remove()
        rows += len(row) - 1
        for m, g in zip(modules, gradients, strict=True):
            sums[m] = sums[m] + g[0].T @ g[0]
    found = output_moments(lm, modules, tokens=128, progress=False)
    for m in modules:
        torch.testing.assert_close(found[m], sums[m] / rows, rtol=1e-3, atol=1e-6 * float((sums[m] / rows).abs().max()))
    assert all(torch.equal(found[m], g) for m, g in output_moments(lm, modules, tokens=128, progress=False).items())


@pytest.mark.parametrize("kind", ["ultraedit", "rledit"])
def test_an_agent_reads_the_curvature_from_its_environment_s_llm(make: Any, tmp_path: Path, kind: str) -> None:
    env = make(reward="efficacy", reward_gradient=True)
    settings = {"output_curvature": 0.1, "text_tokens": 1024}
    agent: Any = (
        UltraEditAgent(env, UltraEditConfig(step_size=1e-2, **settings))
        if kind == "ultraedit"
        else RLEditAgent(env, RLEditConfig(HypernetworkConfig(rank=4, **settings), prior_batches=2))
    )
    agent.learn(3, progress_bar=False)
    observation, _ = env.reset(seed=0)
    agent.save(tmp_path)
    loaded: Any = load_agent(tmp_path, env)
    for one in (agent, loaded):
        one.reset()
    mine, theirs = agent.predict(observation)[0], loaded.predict(observation)[0]
    assert all(torch.equal(f, theirs[part][m]) for part in ("keys", "values") for m, f in mine[part].items())
    with pytest.raises(ValueError, match="output_curvature needs the environment's LLM"):
        load_agent(tmp_path).predict(observation)


def test_curvature_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="output_curvature is -1; give 0"):
        HypernetworkConfig(output_curvature=-1)
    with pytest.raises(ValueError, match="output_curvature is 0.1 and aggregation is 'mend'"):
        HypernetworkConfig(output_curvature=0.1, aggregation="mend")
