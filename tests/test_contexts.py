"""Facts presented behind short texts that the LLM wrote, beside their plain prompts."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import rledit_env  # noqa: F401  (registers the environments)
from agents import DAFNetAgent, FTLAgent, MEMITAgent, MEMITConfig, UltraEditAgent
from agents.settings import environment_settings, setting_differences
from rledit_env.contexts import Contexts
from rledit_env.knowledge import load_knowledge
from rledit_env.vector import LifelongEditVectorEnv

SETTINGS = {"num_batches": 2, "batch_size": 3, "token": "subject", "reward": "none", "array_backend": "torch"}


@pytest.fixture
def env(tiny_lm, make_env, facts):
    return make_env(kind="counterfact", model=tiny_lm(), data=facts("counterfact", 12), contexts=2, **SETTINGS)


def led_passages(env):
    """Each fact of the batch behind its own texts, by another route than the environment's."""
    lm, contexts = env.lm, Contexts(env.lm, 2)
    passages = []
    for k in range(2):
        for place, record in enumerate(env.stream.batch(env.episode.batch), env.episode.batch * 3):
            text = contexts.texts[(2 * place + k) % 40]
            passages.append(lm.tokenize(text + record.prompt, record.target, record.subject))
    return passages


def test_a_state_is_the_gradient_over_plain_prompts_and_prompts_behind_texts(env):
    env.reset(seed=0)
    for _ in range(2):
        plain = [record.edit for record in env.current_batch()]
        observation = env.episode.observe(env.episode.trace())
        expected = env.lm.trace(plain + led_passages(env), "subject")
        assert len(plain) == 3 and len(observation["mask"]) == 9
        for name in env.lm.module_shapes:
            torch.testing.assert_close(observation["keys"][name], expected.keys[name])
            torch.testing.assert_close(observation["value_gradients"][name], expected.value_gradients[name])
        assert observation["edit_loss"].item() == pytest.approx(expected.loss, rel=1e-5)
        env.step({"updates": {}})


def test_the_texts_are_the_models_own_and_end_as_sentences_do(env):
    env.reset(seed=0)
    texts = env.episode.contexts.texts
    assert len(texts) == 40 and len(set(texts)) > 20 and all(text.endswith(". ") and "\n" not in text for text in texts)
    assert texts == Contexts(env.lm, 2).texts, "the same for the same model"
    env.step({"keys": {m: torch.ones(9, s[0]) for m, s in env.lm.module_shapes.items()},
              "values": {m: torch.ones(9, s[1]) for m, s in env.lm.module_shapes.items()}})
    assert texts == Contexts(env.lm, 2).texts, "written with the pre-trained weights"


def test_a_text_comes_after_the_words_of_a_chat_template(env):
    record = env.dataset.records[0]
    led = type(record)(**{f: getattr(record, f) for f in record.__slots__} | {
        "prompt": "<user>" + record.prompt, "lead": 6, "subject_start": record.subject_span[0] + 6})
    text = env.episode.contexts.texts[0]
    passage = env.episode.contexts.passages(led, 0)[0]
    expected = env.lm.tokenize("<user>" + text + record.prompt, record.target, record.subject)
    assert (passage.input_ids, passage.targets) == (expected.input_ids, expected.targets)
    assert passage.subject_position == expected.subject_position


def test_a_fact_has_taken_when_it_has_behind_every_text(tiny_lm, make_env, facts):
    env = make_env(kind="counterfact", model=tiny_lm(), data=facts("counterfact", 12), contexts=2, present_until=0.5,
                   steps_per_batch=4, **SETTINGS)  # fmt: skip
    env.reset(seed=0)
    trace = env.episode.trace()
    trace.hardest[:] = 0.1  # all have
    trace.hardest[6 + 1] = 1.0  # but the second fact behind its second text
    observation = env.episode.observe(trace)
    assert env.presented_facts() == [1] and len(env.current_batch()) == 1
    expected = trace.of(torch.arange(9) == 7)
    assert len(observation["mask"]) == 1
    for name in env.lm.module_shapes:
        torch.testing.assert_close(observation["keys"][name], expected.keys[name])
    trace.hardest[2] = 1.0
    env.episode.observe(trace)
    assert env.presented_facts() == [1, 2]
    trace.hardest[:] = 0.1
    assert len(env.episode.observe(trace)["mask"]) == 0 and env.presented_facts() == []


def test_an_environment_with_contexts_is_sound():
    settings = {"num_batches": 2, "batch_size": 2, "token": "subject", "contexts": 1}
    env = gym.make("RLEdit-CounterFact-v0", model="tiny-llama", **settings)
    assert env.observation_space["mask"].shape == (4,)
    check_env(env.unwrapped, skip_render_check=True)


def test_the_vector_environment_presents_contexts_too():
    settings = {"model": "tiny-llama", "data": load_knowledge("counterfact"), "num_batches": 2, "batch_size": 2,
                "token": "subject", "contexts": 1, "dtype": "float32"}  # fmt: skip
    single = gym.make("RLEdit-CounterFact-v0", **settings)
    many = LifelongEditVectorEnv("counterfact", num_envs=2, **settings)
    expected, _ = single.reset(seed=5)
    found, _ = many.reset(seed=[4, 5])
    for name in expected["keys"]:
        np.testing.assert_allclose(found["value_gradients"][name][1], expected["value_gradients"][name], atol=1e-6)


def test_contexts_are_a_whole_number_and_not_for_all_tokens(make_env):
    with pytest.raises(ValueError, match="contexts is -1; give a whole number from 0"):
        make_env(contexts=-1)
    with pytest.raises(ValueError, match="contexts is 2 and token is 'all'"):
        make_env(contexts=2, token="all")


def test_agents_that_need_each_facts_own_rows_say_so(env, tiny_lm, make_env, facts):
    observation, _ = env.reset(seed=0)
    agent = DAFNetAgent(env)
    with pytest.raises(ValueError, match="presents them behind 2 more contexts; make it with contexts=0"):
        agent.predict(observation)
    down = tiny_lm(modules="model.layers.1.mlp.down_proj")
    others = make_env(kind="counterfact", model=down, data=facts("counterfact", 12), contexts=2, **SETTINGS)
    observation_of_others, _ = others.reset(seed=0)
    for reads_facts in (FTLAgent(others), MEMITAgent(others, MEMITConfig(corpus_tokens=256))):
        with pytest.raises(ValueError, match="this agent reads the facts themselves"):
            reads_facts.predict(observation_of_others)
    observation, _ = env.reset(seed=0)
    UltraEditAgent(env).predict(observation)


def test_contexts_are_recorded_with_an_agent(env):
    settings = environment_settings(env)
    assert settings["contexts"] == 2
    earlier = {k: v for k, v in settings.items() if k != "contexts"}
    assert "contexts" in str(setting_differences({"environment": earlier}, {"environment": settings}))
    assert not setting_differences({"environment": earlier}, {"environment": {**settings, "contexts": 0}})
