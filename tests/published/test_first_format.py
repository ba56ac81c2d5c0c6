"""Hypernetwork agents and runs that the first version saved: they act as they were trained, or are refused.

The files in `hypernetworks_v1` are the first version's own, of two modules and a network of rank 2 (`run`: of a tiny
model, interrupted after one update); `expected.safetensors` holds an observation and what that version answered, or for
`run` the parameters after two updates without interruption.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from safetensors.torch import load_file

from agents import HypernetworkConfig, RLEditAgent, RLEditConfig, load_agent

FILES = Path(__file__).parent / "hypernetworks_v1"


@pytest.mark.parametrize("name", ["rledit", "mend", "malmen", "ultraedit"])
def test_an_agent_of_the_first_format_acts_as_it_was_trained(name):
    tensors = load_file(FILES / name / "expected.safetensors")

    def part(kind: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(f"{kind}."): v for k, v in tensors.items() if k.startswith(f"{kind}.")}

    keys = part("observation.keys")
    rows = len(next(iter(keys.values())))
    observation = {
        "keys": keys, "value_gradients": part("observation.value_gradients"), "mask": torch.ones(rows)
    }  # fmt: skip
    agent = load_agent(FILES / name)
    config = agent.network.config
    assert (config.normaliser_scope, config.normaliser_variance) == ("module", "exact")
    assert (config.step_size_parameter, config.initial_weights) == ("log", "scaled") and not config.drop_zero_rows
    action, _ = agent.predict(observation)
    for side in ("keys", "values"):
        for m, expected in part(f"action.{side}").items():
            torch.testing.assert_close(action[side][m].detach(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["rledit", "mend", "malmen", "ultraedit"])
def test_saved_again_it_is_still_the_same(name, tmp_path):
    agent = load_agent(FILES / name)
    agent.save(tmp_path)
    again = load_agent(tmp_path)
    assert again.config == agent.config
    one, other = agent.network.state_dict(), again.network.state_dict()
    assert set(one) == set(other) and all(torch.equal(one[k], other[k]) for k in one)


def test_a_dafnet_of_the_first_format_is_refused_with_the_mend():
    with pytest.raises(ValueError, match="every fact weighed 1; train it again"):
        load_agent(FILES / "dafnet")


@pytest.fixture
def run_env():
    """The environment that the run was trained in."""
    return gym.make(
        "rledit_env:RLEdit-ZsRE-v0", model="tiny-llama", edit_modules="model.layers.3.mlp.up_proj", num_batches=2,
        batch_size=2, array_backend="torch", reward_gradient=True, dtype="float32", device="cpu",
        disable_env_checker=True,
    )  # fmt: skip


def run_config(**network) -> RLEditConfig:
    settings = {"rank": 1, "blocks": 1, "step_size": 0.001, "prior": 0.0, "warm_up": False,
                "aggregation": "least_squares", **network}  # fmt: skip
    return RLEditConfig(network=HypernetworkConfig(**settings))


def test_a_run_of_the_first_format_goes_on(run_env, tmp_path):
    shutil.copytree(FILES / "run" / "last", tmp_path / "last")
    agent = RLEditAgent(run_env, run_config()).learn(4, progress_bar=False, log_dir=tmp_path)
    assert (agent.updates, agent.timesteps) == (2, 4)
    expected = load_file(FILES / "run" / "expected.safetensors")
    found = agent.network.state_dict()
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


def test_a_run_of_the_first_format_is_not_mixed_with_new_settings(run_env, tmp_path):
    shutil.copytree(FILES / "run" / "last", tmp_path / "last")
    agent = RLEditAgent(run_env, run_config(normaliser_scope="shape"))
    with pytest.raises(ValueError, match="config.network.normaliser_scope: 'module' there, 'shape' here"):
        agent.learn(4, progress_bar=False, log_dir=tmp_path)
