"""The border between agents and the environment."""

from __future__ import annotations

import inspect

import gymnasium as gym
import pytest

from rledit_env.env import LifelongEditEnv
from rledit_env.interface import EditingEnv, editing_env

METHODS = ("current_batch", "edited_records", "evaluate", "presented_facts")


def test_the_environment_gives_what_agents_ask_for(make_env):
    env = make_env()
    assert isinstance(env, EditingEnv)
    assert editing_env(gym.wrappers.RecordEpisodeStatistics(env)) is env


@pytest.mark.parametrize("method", METHODS)
def test_the_environments_methods_have_the_interfaces_arguments(method):
    assert inspect.signature(getattr(LifelongEditEnv, method)) == inspect.signature(getattr(EditingEnv, method))


def test_another_environment_is_refused():
    with pytest.raises(TypeError, match="CartPole.* is no environment of this package; give one such as RLEdit-"):
        editing_env(gym.make("CartPole-v1"))
