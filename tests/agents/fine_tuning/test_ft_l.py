"""Tests of FT-L and FT-M."""

from __future__ import annotations

import math

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents import FTLAgent, FTLConfig, FTMAgent, FTMConfig, load_agent
from agents.fine_tuning.ft_l import constrained_fine_tuning
from rledit_env.evaluation.metrics import sequence_losses, top_tokens

MODULES = "model.layers.[2-3].mlp.{gate,down}_proj"
DOWN = "model.layers.2.mlp.down_proj"


@pytest.fixture
def env(tiny_lm, make_env):
    return make_env(model=tiny_lm(modules=MODULES), array_backend="torch", reward="none")


def edits(env):
    return [record.edit for record in env.current_batch()]


@pytest.mark.parametrize("around", ["current", "original"])
def test_no_entry_leaves_the_box_and_most_steps_reach_its_walls(env, around):
    env.reset(seed=0)
    lm, epsilon = env.lm, 2e-3
    config = FTLConfig(DOWN, steps=8, learning_rate=1e-3, epsilon=epsilon, around=around, loss_goal=0.0)
    for _ in range(3):
        start = lm.weight(DOWN).clone()
        update = FTLAgent(env, config).predict(None)[0]["updates"][DOWN]
        middle = start if around == "current" else lm.original_weight(DOWN)
        distance = (start + update - middle).abs()
        assert float(distance.max()) <= epsilon * (1 + 1e-3)
        assert float((distance > 0.99 * epsilon).float().mean()) > 0.1
        env.step({"updates": {DOWN: update}})
    far = float((lm.weight(DOWN) - lm.original_weight(DOWN)).abs().max())
    assert far <= 1.001 * epsilon if around == "original" else far > 1.5 * epsilon


@pytest.mark.parametrize("objective", ["prompt_last", "target_new", "pooled"])
def test_without_a_wall_the_first_steps_are_adams_on_the_batchs_mean_loss(env, objective):
    env.reset(seed=0)
    lm = env.lm
    config = FTLConfig(DOWN, steps=3, learning_rate=1e-3, epsilon=math.inf, objective=objective)
    update = constrained_fine_tuning(lm, edits(env), [DOWN], config)[DOWN]
    weight = next(m for n, m in lm.model.named_modules() if n == DOWN).weight
    before = weight.detach().clone()
    optimizer = torch.optim.Adam([weight.requires_grad_()], lr=1e-3)
    for _ in range(3):
        losses = []
        for p in edits(env):
            logits = lm.model(input_ids=torch.tensor([p.input_ids])).logits[0, list(p.positions)]
            if objective == "prompt_last":
                logits = logits[:1].expand_as(logits)
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(p.targets), reduction="none"))
        optimizer.zero_grad()
        every = losses if objective == "pooled" else [loss.mean()[None] for loss in losses]
        torch.cat(every).mean().backward()
        optimizer.step()
    expected = (weight.detach() - before).clone()
    weight.requires_grad_(False)
    lm.restore()
    assert float(expected.abs().max()) > 2e-3
    # Entries whose gradient is about zero are of no matter; Adam makes much of the little that rounding leaves of them.
    assert float(((update - expected).abs() > 1e-4).float().mean()) < 0.01


def test_a_prediction_leaves_the_llm_bit_for_bit_and_the_update_lowers_the_loss(env):
    env.reset(seed=0)
    lm, passages = env.lm, edits(env)
    before, loss = lm.snapshot(), float(sequence_losses(lm, passages).mean())
    action, _ = FTMAgent(env, FTMConfig(DOWN, learning_rate=3e-3, epsilon=0.02)).predict(None)
    assert set(action["updates"]) == {DOWN}
    assert all(torch.equal(lm.weight(m), w) for m, w in before.items())
    assert not any(p.requires_grad for p in lm.model.parameters())
    env.step(action)
    assert float(sequence_losses(lm, passages).mean()) < loss - 0.5
    assert all(torch.equal(lm.weight(m), w) for m, w in before.items() if m != DOWN)


def test_an_interrupted_fine_tuning_leaves_the_llm_bit_for_bit(env, monkeypatch):
    env.reset(seed=0)
    lm, before = env.lm, env.lm.snapshot()
    chunks, calls = lm.answer_chunks, []

    def second_fails(*arguments):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return chunks(*arguments)

    monkeypatch.setattr(lm, "answer_chunks", second_fails)
    with pytest.raises(KeyboardInterrupt):
        FTLAgent(env).predict(None)
    assert all(torch.equal(lm.weight(m), w) for m, w in before.items())


def test_fine_tuning_stops_at_its_goal(env):
    env.reset(seed=0)
    update = constrained_fine_tuning(env.lm, edits(env), [DOWN], FTLConfig(loss_goal=1e9))[DOWN]
    assert not update.any()


def test_the_last_edited_module_is_tuned_unless_others_are_named(env):
    env.reset(seed=0)
    assert set(FTLAgent(env, FTLConfig(steps=1)).predict(None)[0]["updates"]) == {list(env.lm.module_shapes)[-1]}
    named = FTLAgent(env, FTLConfig("model.layers.[2-3].mlp.gate_proj", steps=1)).predict(None)[0]["updates"]
    assert set(named) == {"model.layers.2.mlp.gate_proj", "model.layers.3.mlp.gate_proj"}
    with pytest.raises(ValueError, match="matches no linear module"):
        FTLAgent(env, FTLConfig("model.layers.0.mlp.up_proj")).predict(None)


def test_wrong_numbers_are_refused():
    for wrong in ({"around": "here"}, {"epsilon": 0.0}, {"learning_rate": -1.0}, {"steps": -1}, {"batch_size": 0},
                  {"objective": "last"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            FTLConfig(**wrong)


@pytest.mark.parametrize("agent_class", [FTLAgent, FTMAgent])
def test_a_saved_agent_predicts_the_same_and_needs_its_environment(env, tmp_path, agent_class):
    agent = agent_class(env, agent_class.config_class(DOWN, steps=3, learning_rate=1e-3))
    agent.learn(10).save(tmp_path)
    assert type(load_agent(tmp_path, env)) is agent_class
    env.reset(seed=0)
    mine, theirs = agent.predict(None)[0], load_agent(tmp_path, env).predict(None)[0]
    assert torch.equal(mine["updates"][DOWN], theirs["updates"][DOWN])
    with pytest.raises(ValueError, match="load it with env"):
        load_agent(tmp_path).predict(None)


def test_for_numpy_environments_updates_are_arrays(tiny_lm, make_env):
    env = make_env(model=tiny_lm(modules=MODULES), reward="none")
    observation, _ = env.reset(seed=0)
    action, _ = FTLAgent(env, FTLConfig(steps=1)).predict(observation)
    assert all(isinstance(u, np.ndarray) for u in action["updates"].values())
    env.step(action)


@pytest.mark.real
def test_a_single_edit_of_the_default_model_takes():
    env = gym.make(
        "rledit_env:RLEdit-CounterFact-v0", num_batches=1, batch_size=1, reward="none", array_backend="torch",
        edit_modules="model.layers.12.mlp.down_proj", disable_env_checker=True,
    )  # fmt: skip
    agent = FTMAgent(env, FTMConfig(learning_rate=5e-3, epsilon=1e-2))
    taken = 0
    for seed in range(3):
        observation, _ = env.reset(seed=seed)
        fact = env.unwrapped.current_batch()[0].edit
        env.step(agent.predict(observation)[0])
        taken += top_tokens(env.unwrapped.lm, [fact])[0].tolist() == list(fact.targets)
    env.close()
    assert taken == 3
