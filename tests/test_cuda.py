"""Tests of the package on a GPU, which everything else runs without: a step is the CPU's, and every agent works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from torch import Tensor

from agents import RLEditAgent, RLEditConfig, StandardAgent, StandardConfig, edit_stream
from agents.running.editors import EDITORS
from rledit_env import cli
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.loading.tiny import TINY_NAMES
from rledit_env.reward import RewardConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, which this machine does not have")
DEVICE = "cuda"
MODULES = "{model.layers,transformer.h}.[1-2].mlp.*"
REWARD = RewardConfig(backtracking_depth=2)


def make(device: str = DEVICE, model: str = "tiny-llama", **arguments: Any) -> gym.Env[Any, Any]:
    lm = EditableLM.load(model, MODULES, arguments.pop("dtype", "float32"), device)
    settings: dict[str, Any] = {"num_batches": 3, "batch_size": 4, "array_backend": "torch", "reward": REWARD}
    return gym.make("RLEdit-CounterFact-v0", model=lm, disable_env_checker=True, **{**settings, **arguments})


def fine_tuning(observation: Any) -> dict[str, dict[str, Tensor]]:
    values = {m: -0.5 * g for m, g in observation["value_gradients"].items()}
    return {"keys": dict(observation["keys"]), "values": values}


def assert_close(mine: Any, theirs: Any, tolerance: float = 2e-3) -> None:
    for module, tensor in mine.items():
        other = theirs[module].to(tensor)
        assert float((tensor - other).norm()) <= tolerance * float(other.norm()) + 1e-6, module


@pytest.mark.parametrize("model", TINY_NAMES)
def test_a_stream_is_the_cpu_s(model: str) -> None:
    here, there = (make(device, model, reward_gradient=True) for device in (DEVICE, "cpu"))
    (mine, _), (theirs, _) = here.reset(seed=0), there.reset(seed=0)
    assert here.unwrapped.lm.device.type == DEVICE
    for _ in range(3):
        for part in ("keys", "value_gradients"):
            assert_close(mine[part], theirs[part])
        mine, reward, *_, info = here.step(fine_tuning(mine))
        theirs, wanted, *_, their_info = there.step(fine_tuning(theirs))
        assert reward == pytest.approx(wanted, rel=1e-3)
        assert_close(info["reward_gradient"], their_info["reward_gradient"])
    assert here.unwrapped.evaluate(generate=False).mean == pytest.approx(there.unwrapped.evaluate(generate=False).mean)


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-gemma2", "tiny-gpt2"])
def test_bfloat16_streams_end_with_metrics_and_start_anew_bit_for_bit(model: str) -> None:
    env: Any = make(model=model, dtype="auto", array_backend="numpy").unwrapped
    assert env.lm.dtype == torch.bfloat16
    before = env.lm.snapshot()
    observation, _ = env.reset(seed=0)
    over = False
    while not over:
        values = {m: -0.5 * g for m, g in observation["value_gradients"].items()}
        observation, _, over, *_ = env.step({"keys": observation["keys"], "values": values})
    assert 0 <= env.evaluate().mean <= 100
    env.reset(seed=1)
    assert all(torch.equal(weight, before[m]) for m, weight in env.lm.snapshot().items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_update_that_breaks_the_llm_is_taken_back_bit_for_bit(dtype: str) -> None:
    env = make(dtype=dtype)
    observation, _ = env.reset(seed=0)
    observation, *_ = env.step(fine_tuning(observation))
    before = env.unwrapped.lm.snapshot()
    action = fine_tuning(observation)
    for factor in action["values"].values():
        factor.mul_(1e18)
    *_, info = env.step(action)
    assert info["diverged"]
    assert all(torch.equal(weight, before[m]) for m, weight in env.unwrapped.lm.snapshot().items())
    undo = env.unwrapped.lm.apply(**fine_tuning(observation))
    undo()
    assert all(torch.equal(weight, before[m]) for m, weight in env.unwrapped.lm.snapshot().items())


def test_vectorised_streams_are_separate_ones() -> None:
    settings: dict[str, Any] = {"num_batches": 2, "batch_size": 2, "array_backend": "torch", "reward": REWARD}
    lm = EditableLM.load("tiny-llama", MODULES, "float32", DEVICE)
    vector: Any = gym.make_vec("RLEdit-CounterFact-v0", 3, model=lm, **settings)
    observation, _ = vector.reset(seed=[5, 6, 7])
    rewards = vector.step(fine_tuning(observation))[1]
    for i, seed in enumerate((5, 6, 7)):
        env = make(num_batches=2, batch_size=2)
        alone, _ = env.reset(seed=seed)
        assert float(rewards[i]) == pytest.approx(env.step(fine_tuning(alone))[1], rel=1e-3)


def test_the_agent_learns_saves_and_edits(tmp_path: Path) -> None:
    env = make(reward_gradient=True)
    agent = RLEditAgent(env, RLEditConfig(prior_batches=2))
    before = [p.clone() for p in agent.network.parameters()]
    agent.learn(6, progress_bar=False)
    assert any(not torch.equal(a, b) for a, b in zip(before, agent.network.parameters(), strict=True))
    agent.save(tmp_path)
    log = edit_stream(env, RLEditAgent.load(tmp_path, env), seed=1)
    assert log.facts == 12 and not log.diverged


def test_standard_algorithms_learn() -> None:
    env = make(num_batches=2, batch_size=2)
    small = {"n_steps": 4, "batch_size": 4, "n_epochs": 1}
    agent = StandardAgent(env, StandardConfig("ppo", baseline_streams=0, hyperparameters=small))
    agent.learn(8, progress_bar=False)
    assert edit_stream(env, agent, seed=0).facts == 4


def test_every_editor_has_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", "--model", "tiny-llama", "--batches", "2", "--batch-size", "2", "--device", DEVICE, "--dtype",
               "float32", "--env", "RLEdit-CounterFact-v0", "--editors", "all", "--seeds", "1", "--out",
               str(tmp_path)]  # fmt: skip
    assert cli.main(command) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert all(editor.title in shown for editor in EDITORS.values())
