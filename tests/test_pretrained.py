"""Tests of the agents that ship with the package."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from typing import Any

import gymnasium as gym
import pytest

from agents import agent_settings, edit_facts, edit_stream, find_agent, load_agent
from agents.running.saved import PRETRAINED
from agents.selection import divergence
from rledit_env.answers import took
from rledit_env.cli import build_parser
from rledit_env.evaluation.metrics import Metrics, continuations, evaluate
from rledit_env.knowledge import load_knowledge
from rledit_env.lm.editable import EditableLM
from rledit_env.reward import RewardConfig

LAYERS = {"zsre": range(2, 21), "counterfact": range(2, 21), "fever": range(4, 16)}
IDS = {"zsre": "RLEdit-ZsRE-v0", "counterfact": "RLEdit-CounterFact-v0", "fever": "RLEdit-FEVER-v0"}
EXAMPLE = {
    "prompt": "The mother tongue of Danielle Darrieux is", "target_new": "English", "ground_truth": "French",
    "subject": "Danielle Darrieux", "rephrase_prompt": "Danielle Darrieux, a native",
    "locality_prompt": "The native language of Montesquieu is", "locality_ground_truth": "French",
}  # fmt: skip
BEGINS_WITH_ITS_SUBJECT = {
    "prompt": "Russia is a country on the continent of", "target_new": "North America", "ground_truth": "Europe",
    "subject": "Russia", "rephrase_prompt": "Russia lies on the continent of", "locality_prompt": "Chile lies in",
    "locality_ground_truth": "South America",
}  # fmt: skip


@pytest.mark.parametrize("kind", IDS)
def test_an_agent_of_less_than_20_megabytes_ships_for_the_default_model_and_each_kind_of_facts(kind):
    folder = find_agent("default", kind)
    assert folder.name == kind and sum(path.stat().st_size for path in folder.rglob("*")) < 20e6
    environment = agent_settings(folder)["environment"]
    assert (environment["model"], environment["kind"], environment["id"]) == ("smollm2-135m", kind, IDS[kind])
    assert {name.split(".", 3)[2] for name in environment["edit_modules"]} == set(map(str, LAYERS[kind]))


@pytest.mark.parametrize("kind", IDS)
def test_the_shipped_agents_streams_start_from_moments_of_training_facts_and_keys_of_text(kind):
    network = load_agent(find_agent("default", kind)).network
    assert network.config.warm_up and set(network.training_moments) == set(network.shapes)
    assert min(float(n.count) for n in network.training_moments.values()) >= 800  # 40 batches of 20 facts
    assert {float(n.count) for n in network.normalisers.values()} == {0.0}
    assert network.config.prior_source == "text" and not network.wants_prior


def commands() -> list[list[str]]:
    """The commands that the agents' README says they come from, as words."""
    text = (PRETRAINED / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^    rledit train .*(?:\n        .*)*", text, re.MULTILINE)
    return [shlex.split(block.replace("\\\n", " ")) for block in blocks]


@pytest.mark.parametrize("words", commands(), ids=lambda words: words[3])
def test_the_command_that_a_shipped_agent_comes_from_says_how_it_was_trained(words):
    options = build_parser("train").parse_args(words[1:])
    kind = {value: key for key, value in IDS.items()}[options.env]
    settings = agent_settings(find_agent("default", kind))
    environment, network = settings["environment"], settings["config"]["network"]
    trained = {name: weight for name, (weight, _) in environment["reward"]["components"].items()}
    assert options.reward == "keeping"
    expected = {name: weight for name, (weight, _) in RewardConfig.keeping(kind).components.items()}
    given = {"own_text": options.own_text_weight} if options.own_text_weight is not None else {}
    assert trained == expected | given
    assert environment["reward"]["every_step"] is options.every_step
    for name in ("token", "num_batches", "batch_size"):
        assert environment[name] == getattr(options, name)
    assert environment["steps_per_batch"] == (options.edit_steps_per_batch or options.steps_per_batch)
    contexts = options.contexts if options.edit_contexts is None else options.edit_contexts
    assert environment.get("contexts", 0) == contexts
    assert environment["present_until"] == (options.edit_present_until or options.present_until)
    for name in ("prior", "prior_source", "precision", "rank", "blocks", "step_size"):
        assert network[name] == getattr(options, name)
    assert settings["config"]["step_size_learning_rate"] == options.step_size_learning_rate
    assert settings["config"]["learning_rate"] == options.learning_rate


def edited(kind: str, **settings: Any) -> tuple[Metrics, Metrics, float]:
    """Scores after and before 60 bundled facts, edited as the shipped agent was trained to, and the KL that it cost."""
    own = agent_settings(find_agent("default", kind))["environment"]
    shown = {name: own[name] for name in ("token", "steps_per_batch", "present_until", "contexts") if name in own}
    env = gym.make(
        f"rledit_env:{IDS[kind]}", split="eval", num_batches=3, batch_size=20, reward="none", array_backend="torch",
        edit_modules=own["edit_modules"], disable_env_checker=True, **shown | settings,
    )  # fmt: skip
    agent: Any = load_agent(find_agent("default", kind), env)
    agent.reset()
    log = edit_stream(env, agent, seed=0)
    inner: Any = env.unwrapped
    after, facts, kl = inner.evaluate(generate=False), inner.edited_records(), divergence(inner.lm)
    env.reset(seed=0)  # the weights are the pre-trained ones again
    assert not log.diverged
    return after, evaluate(inner.lm, facts, kind, generate=False), kl


@pytest.mark.real
@pytest.mark.parametrize("kind", IDS)
def test_a_shipped_agent_teaches_more_than_it_costs_on_other_facts_than_it_was_trained_on(kind):
    after, before, kl = edited(kind)
    assert after.efficacy >= 90 and after.top1 >= 90
    gained, lost = after.generalization - before.generalization, before.specificity - after.specificity
    # A claim has one of two verdicts: half hold before any edit, so that Generalization can gain no more than 50.
    assert gained >= 25 and (gained > lost or kind == "fever"), (before, after)
    assert after.mean >= before.mean + 10, (before, after)
    assert kl <= 0.1


@pytest.mark.real
def test_single_facts_take_each_alone_from_the_pretrained_weights():
    """A few of the fifty that `benchmarks/lone_facts.py` edits, with the settings of `rledit edit`."""
    settings = agent_settings(find_agent("default"))["environment"]
    lm = EditableLM.load(settings["model"], settings["edit_modules"], dtype="stored")
    agent = load_agent(find_agent("default"))
    taken = []
    own = load_knowledge("counterfact", [EXAMPLE, BEGINS_WITH_ITS_SUBJECT])
    for facts in (own, load_knowledge("counterfact", split="eval")):
        for record in facts.records[:5]:
            one = replace(facts, records=(record,))
            shown = {"token": settings["token"], "steps_per_batch": 40, "present_until": 0.8}
            edit_facts(lm, agent, one, 1, **shown, contexts=settings.get("contexts", 0))
            [answer] = continuations(lm, [record])
            taken.append(took(answer, record.target))
    assert len(taken) == 7 and all(taken[:2]) and sum(taken) >= 6
