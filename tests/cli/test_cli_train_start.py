"""`rledit train --start`: training that begins with a saved agent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from agents import HypernetworkConfig, RLEditAgent, RLEditConfig
from rledit_env import cli
from rledit_env.env import LifelongEditEnv

ENV = "RLEdit-CounterFact-v0"
TRAIN = [
    "train", "--env", ENV, "--model", "tiny-llama", "--num-batches", "2", "--batch-size", "2", "--steps-per-batch", "2",
    "--eval-every", "1", "--dtype", "float32", "--device", "cpu", "--trajectories", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An agent whose policy is not the one that its settings begin with."""
    folder = tmp_path_factory.mktemp("start") / "agent"
    env = LifelongEditEnv("counterfact", "tiny-llama", num_batches=1, batch_size=1, dtype="float32", device="cpu")
    agent = RLEditAgent(env, RLEditConfig(network=HypernetworkConfig(rank=4, step_size=2e-3)), seed=5)
    noise = torch.Generator().manual_seed(0)
    agent.load_policy_state({name: tensor + 0.1 * torch.rand(tensor.shape, generator=noise).to(tensor)
                             for name, tensor in agent.policy_state().items()})  # fmt: skip
    agent.save(folder)
    return folder


def policy(folder: Path) -> dict[str, torch.Tensor]:
    return RLEditAgent.load(folder).policy_state()


@pytest.mark.parametrize("factor", [None, 0.5])
def test_training_begins_with_exactly_the_saved_policy_times_the_factor(
    factor: float | None, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    begun: list[dict[str, torch.Tensor]] = []

    def learn(agent: RLEditAgent, *_: Any, **__: Any) -> None:
        begun.append({name: tensor.clone() for name, tensor in agent.policy_state().items()})

    monkeypatch.setattr(RLEditAgent, "learn", learn)
    scale = [] if factor is None else ["--start-scale", str(factor)]
    assert cli.main([*TRAIN, "--start", str(saved), *scale, "--out", str(tmp_path / "run")]) == 0
    assert f"start     {saved}, step sizes × {factor or 1:g}" in capsys.readouterr().out
    scaled = RLEditAgent.load(saved)
    scaled.scale_step_sizes(factor or 1)
    (state,) = begun
    assert state.keys() == scaled.policy_state().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in scaled.policy_state().items())
    changed = {name for name, tensor in policy(saved).items() if not torch.equal(state[name], tensor)}
    assert bool(changed) == (factor is not None) and all("step_size" in name for name in changed)


def test_training_goes_on_from_the_saved_policy_with_its_network(saved: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert cli.main([*TRAIN, "--start", str(saved), "--learning-rate", "1e-3", "--out", str(run)]) == 0
    settings, begun = (json.loads((folder / "agent.json").read_text()) for folder in (run / "last", saved))
    assert settings["updates"] == 1 and settings["config"]["learning_rate"] == 1e-3
    assert settings["config"]["network"] == begun["config"]["network"]
    before, after = policy(saved), policy(run / "last")
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(torch.allclose(after[name], tensor, atol=0.1) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--start-scale", "0.5"], "--start-scale is 0.5, but no agent is started from; give --start RUN"),
        (["--start", "SAVED", "--start-scale", "0"], "--start-scale is 0; give a positive number"),
        (["--start", "SAVED", "--rank", "4"], "--rank is 4, but the network is that of --start SAVED; leave --rank"),
        (["--start", "SAVED", "--block", "mend"], "--block is mend, but the network is that of --start SAVED"),
        (["--start", "SAVED", "--no-warm-up"], "--warm-up is False, but the network is that of --start SAVED"),
        (["--start", "nowhere"], "nowhere does not exist"),
    ],
)
def test_a_start_that_cannot_be_is_refused_in_one_line(
    arguments: list[str], message: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [argument.replace("SAVED", str(saved)) for argument in arguments]
    assert cli.main([*TRAIN, *arguments, "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"rledit train: error: {message.replace('SAVED', str(saved))}")
    assert not (tmp_path / "run").exists()
