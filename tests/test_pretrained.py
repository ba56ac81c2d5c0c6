"""Tests of the agent that ships with the package."""

from __future__ import annotations

from dataclasses import replace

import gymnasium as gym
import pytest

from agents import agent_settings, edit_facts, edit_stream, find_agent, load_agent
from rledit_env.answers import took
from rledit_env.knowledge import load_knowledge
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.registry import MODELS
from rledit_env.metrics import continuations, evaluate

EXAMPLE = {
    "prompt": "The mother tongue of Danielle Darrieux is", "target_new": "English", "ground_truth": "French",
    "subject": "Danielle Darrieux", "rephrase_prompt": "Danielle Darrieux, a native",
    "locality_prompt": "The native language of Montesquieu is", "locality_ground_truth": "French",
}  # fmt: skip


def test_the_shipped_agents_streams_start_from_moments_of_its_training_facts():
    network = load_agent(find_agent("default")).network
    assert network.config.warm_up and set(network.training_moments) == set(network.shapes)
    assert {float(n.count) for n in network.training_moments.values()} == {800.0}  # 40 batches of 20 facts
    assert {float(n.count) for n in network.normalisers.values()} == {0.0}


def test_an_agent_of_less_than_20_megabytes_ships_for_the_default_model():
    folder = find_agent("default")
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 20e6
    environment = agent_settings(folder)["environment"]
    assert environment["model"] == "smollm2-135m"
    assert MODELS["smollm2-135m"].edit_modules == ("model.layers.[6-12].mlp.{gate,up}_proj",)
    assert {name.split(".", 3)[2] for name in environment["edit_modules"]} == {str(layer) for layer in range(6, 13)}


@pytest.mark.real
def test_the_shipped_agent_teaches_more_than_it_costs_on_another_data_set_than_it_was_trained_on():
    settings = agent_settings(find_agent("default"))["environment"]
    env = gym.make(
        "rledit_env:RLEdit-CounterFact-v0", split="eval", num_batches=3, batch_size=20, reward="none",
        array_backend="torch", token=settings["token"], steps_per_batch=settings["steps_per_batch"],
        disable_env_checker=True,
    )  # fmt: skip
    agent = load_agent(find_agent("default"), env)
    agent.reset()
    log = edit_stream(env, agent, seed=0)
    edited, facts = env.unwrapped.evaluate(generate=False), env.unwrapped.edited_records()
    env.reset(seed=0)  # the weights are the pre-trained ones again
    before = evaluate(env.unwrapped.lm, facts, "counterfact", generate=False)
    assert not log.diverged
    assert edited.efficacy >= 95 and edited.top1 >= 90
    gained, lost = edited.generalization - before.generalization, before.specificity - edited.specificity
    assert gained >= 25 and gained >= 3 * lost, (before, edited)


@pytest.mark.real
def test_single_facts_take_each_alone_from_the_pretrained_weights():
    """A few of the fifty that `benchmarks/lone_facts.py` edits, with the settings of `rledit edit`."""
    settings = agent_settings(find_agent("default"))["environment"]
    lm = EditableLM.load(settings["model"], settings["edit_modules"], dtype="stored")
    agent = load_agent(find_agent("default"))
    taken = []
    for facts in (load_knowledge("counterfact", [EXAMPLE]), load_knowledge("counterfact", split="eval")):
        for record in facts.records[:5]:
            edit_facts(lm, agent, replace(facts, records=(record,)), 1, settings["token"], settings["steps_per_batch"])
            [answer] = continuations(lm, [record])
            taken.append(took(answer, record.target))
    assert len(taken) == 6 and taken[0] and sum(taken) >= 5
