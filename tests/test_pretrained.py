"""Tests of the agent that ships with the package."""

from __future__ import annotations

import gymnasium as gym
import pytest

from agents import agent_settings, edit_stream, find_agent, load_agent
from rledit_env.lm.registry import MODELS


def test_an_agent_of_less_than_20_megabytes_ships_for_the_default_model():
    folder = find_agent("default")
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 20e6
    environment = agent_settings(folder)["environment"]
    assert environment["model"] == "smollm2-135m"
    assert MODELS["smollm2-135m"].edit_modules == ("model.layers.[6-12].mlp.{gate,up}_proj",)
    assert {name.split(".", 3)[2] for name in environment["edit_modules"]} == {str(layer) for layer in range(6, 13)}


@pytest.mark.real
def test_the_shipped_agent_edits_facts_of_another_data_set_than_it_was_trained_on():
    settings = agent_settings(find_agent("default"))["environment"]
    env = gym.make(
        "rledit_env:RLEdit-CounterFact-v0", split="eval", num_batches=2, batch_size=10, reward="none",
        array_backend="torch", token=settings["token"], steps_per_batch=settings["steps_per_batch"],
        disable_env_checker=True,
    )  # fmt: skip
    agent = load_agent(find_agent("default"), env)
    agent.reset()
    log = edit_stream(env, agent, seed=0)
    scores = env.unwrapped.evaluate(generate=False)
    assert not log.diverged and log.drift < 0.3
    assert scores.efficacy >= 95 and scores.top1 >= 90 and scores.generalization >= 60 and scores.specificity >= 50
