"""Tests of agents.sb3.vec_env: Stable-Baselines3 on the vectorised environment."""

from __future__ import annotations

import doctest
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecMonitor

import agents.sb3.vec_env
from agents import StreamsVecEnv
from rledit_env.vector import VectorGradientFeatures, VectorScaledUpdate


def make(**arguments: Any) -> Any:
    settings = {"model": "tiny-llama", "edit_modules": "model.layers.[1-2].mlp.up_proj", "num_batches": 2,
                "batch_size": 2, "array_backend": "torch", "autoreset_mode": "Disabled", **arguments}  # fmt: skip
    return gym.make_vec("RLEdit-ZsRE-v0", num_envs=3, **settings)


def view(**arguments: Any) -> Any:
    return VectorGradientFeatures(VectorScaledUpdate(make(**arguments)))


def test_ppo_learns_and_its_episodes_are_counted() -> None:
    env = VecMonitor(StreamsVecEnv(view()))
    model = PPO("MlpPolicy", env, n_steps=4, batch_size=6, n_epochs=2, device="cpu", seed=0)
    before = {k: v.clone() for k, v in model.policy.state_dict().items()}
    model.learn(36)
    assert model.num_timesteps == 36
    assert any(not torch.equal(before[k], v) for k, v in model.policy.state_dict().items())
    assert len(model.ep_info_buffer) == 36 / 2  # type: ignore[arg-type]
    assert {episode["l"] for episode in model.ep_info_buffer} == {2}  # type: ignore[union-attr]
    assert all(-1000 < episode["r"] < 0 for episode in model.ep_info_buffer)  # type: ignore[union-attr]


def test_an_ended_stream_is_reset_in_the_same_step_with_its_last_observation_in_the_info() -> None:
    env, other = StreamsVecEnv(view()), view()
    env.seed(5)
    first = env.reset()
    expected, _ = other.reset(seed=5)
    np.testing.assert_allclose(first, expected, rtol=1e-4, atol=1e-5)
    zero = np.zeros((3, *env.action_space.shape), np.float32)  # type: ignore[misc]
    for step in range(2):
        observations, rewards, dones, infos = env.step(zero)
        expected, expected_rewards, *_ = other.step(zero)
        np.testing.assert_allclose(rewards, expected_rewards, rtol=1e-4)
        assert dones.tolist() == [step == 1] * 3
        for info in infos:
            assert info["TimeLimit.truncated"] is False
            assert isinstance(info["drift"], float) and isinstance(info["batch"], int)
    np.testing.assert_allclose([info["terminal_observation"] for info in infos], expected, rtol=1e-3, atol=1e-4)
    assert (expected[:, -1] == 1).all() and (observations[:, -1] == -1).all()  # progress
    assert len({tuple(info["indices"]) for info in env.reset_infos}) == 3
    assert env.step(zero)[2].tolist() == [False] * 3


def test_streams_are_reached_as_stable_baselines3_reaches_them() -> None:
    env = StreamsVecEnv(view())
    env.reset()
    assert env.get_attr("steps_per_batch") == [1, 1, 1]
    assert env.env_method("edited_records", indices=[0, 2]) == [[], []]
    env.set_attr("mark", 7, indices=1)
    assert env.get_attr("mark", indices=1) == [7]
    assert env.env_is_wrapped(gym.Wrapper) == [False] * 3
    env.close()


def test_pictures_are_those_of_the_streams_and_none_without_a_render_mode() -> None:
    pytest.importorskip("matplotlib")
    env = StreamsVecEnv(view(render_mode="rgb_array"))
    env.reset()
    env.step(np.zeros((3, *env.action_space.shape), np.float32))  # type: ignore[misc]
    images = env.get_images()
    assert len(images) == 3 and all(image.ndim == 3 and image.dtype == np.uint8 for image in images)  # type: ignore[union-attr]
    assert list(StreamsVecEnv(view()).get_images()) == [None] * 3


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_an_environment_that_resets_itself_is_refused(mode: str) -> None:
    with pytest.raises(ValueError, match="make it with autoreset_mode='Disabled'"):
        StreamsVecEnv(make(autoreset_mode=mode))


def test_the_example_of_the_docstring_runs() -> None:
    results = doctest.testmod(agents.sb3.vec_env)
    assert results.attempted >= 6 and results.failed == 0
