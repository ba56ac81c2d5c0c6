"""Tests of agents.sb3.agent: standard algorithms as editors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents import RandomSearchAgent, StandardAgent, StandardConfig, edit_stream, load_agent
from agents.files import read_tensors
from agents.sb3.features import Standardised
from agents.sb3.standard_state import training_state
from rledit_env.files import write_tensors
from rledit_env.lm.editable import EditableLM
from rledit_env.preservation import Constraint, OwnText
from rledit_env.reward import RewardConfig

SMALL: dict[str, dict[str, Any]] = {
    "ppo": {"n_steps": 4, "batch_size": 4, "n_epochs": 2},
    "a2c": {"n_steps": 4},
    "sac": {"learning_starts": 2, "batch_size": 2},
    "td3": {"learning_starts": 2, "batch_size": 2},
}


def make(lm: Any = "tiny-llama", **arguments: Any) -> gym.Env[Any, Any]:
    settings: dict[str, Any] = {"num_batches": 2, "batch_size": 2, "array_backend": "torch", **arguments}
    if lm == "tiny-llama":
        settings["edit_modules"] = "model.layers.[1-2].mlp.up_proj"
    return gym.make("RLEdit-CounterFact-v0", model=lm, disable_env_checker=True, **settings)


def config_of(algorithm: Any, baseline_streams: int = 0) -> StandardConfig:
    return StandardConfig(algorithm, baseline_streams=baseline_streams, hyperparameters=SMALL[algorithm])


def agent_of(algorithm: str, env: gym.Env[Any, Any]) -> StandardAgent:
    return StandardAgent(env, config_of(algorithm))


@pytest.mark.parametrize("algorithm", SMALL)
def test_every_algorithm_learns_edits_and_comes_back_from_its_folder(algorithm: str, tmp_path: Path) -> None:
    env = make()
    agent = agent_of(algorithm, env)
    before = {k: v.clone() for k, v in agent.model.policy.state_dict().items()}
    agent.learn(8, progress_bar=False)
    after = agent.model.policy.state_dict()
    assert any(not torch.equal(before[k], v) for k, v in after.items())
    agent.save(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.suffix not in (".json", ".safetensors")]
    loaded = load_agent(tmp_path, env)
    assert isinstance(loaded, StandardAgent) and loaded.config == agent.config and loaded.timesteps == 8
    observation, _ = env.reset(seed=3)
    mine, theirs = agent.predict(observation)[0], loaded.predict(observation)[0]
    for part in ("keys", "values"):
        assert all(torch.equal(f, theirs[part][m]) for m, f in mine[part].items())
    log = edit_stream(env, loaded, seed=0)
    assert log.facts == 4 and not log.diverged


def scales_of(agent: StandardAgent) -> list[Standardised]:
    return [m for m in agent.model.policy.modules() if isinstance(m, Standardised)]


@pytest.mark.parametrize("algorithm", SMALL)
def test_every_algorithm_learns_from_rewards_relative_to_the_zero_action_s(algorithm: str, tmp_path: Path) -> None:
    env = make()
    config = config_of(algorithm, baseline_streams=3)
    agent = StandardAgent(env, config)
    seen: list[float] = []
    agent.learn(6 + 8, callback=lambda n: seen.append(n["return"]), progress_bar=False)
    assert agent.timesteps == 6 + 8 and len(seen) == 4 and max(seen) < -1  # the environment's own returns
    scales = scales_of(agent)
    assert scales and all(m.mean.any() and not torch.equal(m.std, torch.ones_like(m.std)) for m in scales)
    agent.learn(4, progress_bar=False, reset_num_timesteps=False)  # measured once
    assert agent.timesteps == 6 + 8 + 4
    agent.save(tmp_path)
    loaded = StandardAgent.load(tmp_path, env).learn(6 + 4, progress_bar=False)
    assert loaded.timesteps == 6 + 4 and loaded.earlier_timesteps == 6 + 8 + 4
    assert all(torch.equal(a.mean, b.mean) for a, b in zip(scales, scales_of(loaded), strict=True))


def test_random_search_keeps_the_best_constant_action_and_its_steps(tmp_path: Path) -> None:
    env = make()
    agent = RandomSearchAgent(env, StandardConfig(step_size=0.5))
    assert not agent.action.any()
    rounds: list[dict[str, float]] = []
    # 30 streams: 10, 5 and 2 actions on 1, 2 and 4 each, and the best one on two more.
    agent.learn(59, callback=rounds.append, progress_bar=False)
    assert [r["candidates"] for r in rounds] == [10, 5, 2]
    assert agent.timesteps == 2 * (10 + 5 * 2 + 2 * 4 + 2) == 60 and agent.action.shape == (2,)
    agent.save(tmp_path)
    loaded = load_agent(tmp_path, env)
    assert isinstance(loaded, RandomSearchAgent) and loaded.timesteps == agent.timesteps
    np.testing.assert_array_equal(loaded.action, agent.action)
    with pytest.raises(ValueError, match="total_timesteps is 2; give 4 or more"):
        agent.learn(2)
    with pytest.raises(ValueError, match="give the environment"):
        RandomSearchAgent.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no agent"):
        RandomSearchAgent.load(tmp_path / "nowhere", env)
    with pytest.raises(ValueError, match="found for 2 modules, the environment edits 1"):
        RandomSearchAgent.load(tmp_path, make(EditableLM.load("tiny-llama", "model.layers.1.mlp.up_proj")))


def test_random_search_finds_the_action_that_a_reward_prefers() -> None:
    """The reward prefers small updates to large ones: of random step sizes a small one wins."""
    env = make(reward=RewardConfig(components={}, regularisation=1.0))
    agent = RandomSearchAgent(env, StandardConfig(step_size=0.5)).learn(120, progress_bar=False)
    assert agent.action[0] < -0.5


def test_the_policy_acts_in_the_numpy_backend_too() -> None:
    agent = agent_of("ppo", make())
    numpy_env = make(array_backend="numpy")
    observation, _ = numpy_env.reset(seed=0)
    agent.set_env(numpy_env)
    action, _ = agent.predict(observation)
    assert all(isinstance(f, np.ndarray) for by in action.values() for f in by.values())
    numpy_env.step(action)


def test_evaluation_on_a_shared_llm_leaves_the_training_stream_as_it_was(tmp_path: Path) -> None:
    returns: list[list[float]] = []
    for evaluated in (False, True):
        lm = EditableLM.load("tiny-llama", "model.layers.[1-2].mlp.up_proj")
        agent = agent_of("ppo", make(lm))
        numbers: list[float] = []
        eval_env = make(lm, split="eval", reward="efficacy") if evaluated else None
        agent.learn(
            8, callback=lambda n, to=numbers: to.append(n["return"]), progress_bar=False, eval_env=eval_env,
            eval_every=1, log_dir=tmp_path / str(evaluated),
        )  # fmt: skip
        returns.append(numbers)
    assert len(returns[0]) == 4 and returns[0] == returns[1]
    assert agent.best_score > 0
    assert json.loads((tmp_path / "True" / "best" / "agent.json").read_text())["best_score"] == agent.best_score
    assert list((tmp_path / "True").glob("events.out.tfevents.*"))


def test_the_logged_return_is_the_environment_s_own() -> None:
    env = make()
    agent = agent_of("ppo", env)
    seen: list[float] = []
    agent.learn(4, callback=lambda n: seen.append(n["return"]), progress_bar=False)
    assert -1000 < seen[0] < -1  # nats, not scaled for the algorithm


def test_a_callback_can_end_the_training() -> None:
    agent = agent_of("ppo", make())
    streams: list[Any] = []

    def stop(numbers: dict[str, float]) -> bool:
        streams.append(numbers)
        return len(streams) < 2

    agent.learn(100, callback=stop, progress_bar=False)
    assert len(streams) == 2


def test_what_does_not_fit_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="algorithm is 'dqn'; give one of ppo, a2c, sac, td3"):
        StandardConfig("dqn")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="measuring the zero action takes 64 steps"):
        StandardAgent(make(), StandardConfig(baseline_streams=32)).learn(64, progress_bar=False)
    agent_of("ppo", make()).save(tmp_path)
    with pytest.raises(ValueError, match="give the environment"):
        StandardAgent.load(tmp_path)
    other = make(EditableLM.load("tiny-llama", "model.layers.1.mlp.up_proj"))
    with pytest.raises(ValueError, match="trained for 2 modules, the environment edits 1"):
        StandardAgent.load(tmp_path, other)
    with pytest.raises(FileNotFoundError, match="holds no agent"):
        StandardAgent.load(tmp_path / "nowhere", other)


def interrupted_at(stream: int) -> Any:
    """A callback that is Ctrl-C at the end of a stream."""
    left = [stream]

    def callback(_numbers: dict[str, float]) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    return callback


def test_a_bound_is_held_between_streams_and_survives_an_interruption(tmp_path: Path) -> None:
    reward = RewardConfig(constraint=Constraint(bound=1e-5, rate=1e5)).replace("own_text", 0.0, OwnText(1, 4, 8))

    def learned(folder: str, callback: Any = None) -> StandardAgent:
        agent = StandardAgent(make(reward=reward), config_of("ppo", baseline_streams=3), seed=5)
        return agent.learn(6 + 16, callback, progress_bar=False, log_dir=tmp_path / folder)

    def multiplier(agent: StandardAgent) -> float:
        inner: Any = agent.env.unwrapped
        return float(inner.multiplier.value)

    seen: list[dict[str, float]] = []
    whole = learned("whole", seen.append)
    used = [numbers["multiplier"] for numbers in seen]
    assert used[0] == 0.0, "the zero action's streams do not count"
    assert len(set(used)) > 2 and multiplier(whole) > 0
    with pytest.raises(KeyboardInterrupt):
        learned("cut", interrupted_at(5))
    again: list[float] = []
    going_on = learned("cut", lambda numbers: again.append(numbers["multiplier"]))
    assert 0 < len(again) < len(used)
    assert again == pytest.approx(used[-len(again) :], rel=1e-4)
    assert multiplier(going_on) == pytest.approx(multiplier(whole), rel=1e-4)


@pytest.mark.parametrize("algorithm", SMALL)
def test_an_interrupted_run_goes_on_and_ends_as_the_uninterrupted_one(algorithm: str, tmp_path: Path) -> None:
    config = config_of(algorithm, baseline_streams=3)

    def learned(folder: str, callback: Any = None) -> StandardAgent:
        env = make()
        inner: Any = env.unwrapped
        held_out = make(inner.lm, split="eval", reward="none")
        agent = StandardAgent(env, config, seed=5)
        return agent.learn(
            6 + 16, callback, progress_bar=False, log_dir=tmp_path / folder, eval_env=held_out, eval_every=2
        )

    returns: list[float] = []
    whole = learned("whole", lambda numbers: returns.append(numbers["return"]))
    with pytest.raises(KeyboardInterrupt):
        learned("cut", interrupted_at(5))
    unfinished = tmp_path / "cut" / "last" / "training.safetensors"
    assert unfinished.exists()
    (unfinished.parent / "another's").touch()
    seen: list[float] = []
    going_on = learned("cut", lambda numbers: seen.append(numbers["return"]))
    assert 0 < len(seen) < len(returns) == 8, "it goes on, and does not start anew"
    assert seen == pytest.approx(returns[-len(seen) :], rel=1e-4)
    assert going_on.timesteps == whole.timesteps == 22
    assert going_on.best_score == pytest.approx(whole.best_score)
    for name, value in whole.model.policy.state_dict().items():
        torch.testing.assert_close(going_on.model.policy.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)
    again = learned("cut", interrupted_at(0))  # a new agent takes the finished run as it is
    assert again.timesteps == 22 and again.best_score == going_on.best_score
    assert (unfinished.parent / "another's").exists(), "files that are not its own stay"


def test_an_interrupted_run_is_gone_on_with_under_its_own_settings_only(tmp_path: Path) -> None:
    config = config_of("ppo")
    with pytest.raises(KeyboardInterrupt):
        StandardAgent(make(), config).learn(16, interrupted_at(4), progress_bar=False, log_dir=tmp_path)
    other = StandardAgent(make(), config, seed=1)
    with pytest.raises(ValueError, match=r"other settings \(seed: 0 there, 1 here\).*resume=False"):
        other.learn(16, progress_bar=False, log_dir=tmp_path)
    assert other.timesteps == 0
    trained = StandardAgent(make(), config).learn(20, progress_bar=False)
    with pytest.raises(ValueError, match="steps before it: 0 there, 20 here"):
        trained.learn(16, progress_bar=False, log_dir=tmp_path)
    path = tmp_path / "last" / "training.safetensors"
    tensors, metadata = read_tensors(path)
    for name in ("policy/", "policy.optimizer/", "random/numpy", "streams"):  # readable, but not the model's
        if name == "streams":
            numbers = {k: v for k, v in json.loads(metadata["training"]).items() if k != name}
            write_tensors(path, tensors, {**metadata, "training": json.dumps(numbers)})
        else:
            spoilt = next(k for k, v in reversed(tensors.items()) if k.startswith(name) and v.dim())
            write_tensors(path, {**tensors, spoilt: tensors[spoilt][1:].contiguous()}, metadata)
        fresh = StandardAgent(make(), config)
        before = training_state(fresh.model)
        with pytest.raises(ValueError, match="is damaged, or of another version"):
            fresh.learn(16, progress_bar=False, log_dir=tmp_path)
        after = training_state(fresh.model)
        assert before[1] == after[1] and before[0].keys() == after[0].keys()
        assert all(torch.equal(tensor, after[0][key]) for key, tensor in before[0].items())
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"damaged.*resume=False"):
        StandardAgent(make(), config).learn(16, progress_bar=False, log_dir=tmp_path)
    anew = StandardAgent(make(), config).learn(16, progress_bar=False, log_dir=tmp_path, resume=False)
    assert anew.timesteps == 16
