"""Tests of MEND, MALMEN, and their starred and +RLEdit forms."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

from agents import (
    HypernetworkConfig,
    MALMENAgent,
    MALMENConfig,
    MENDAgent,
    MENDConfig,
    RLEditAgent,
    load_agent,
    malmen_network,
    malmen_rledit,
    mend_network,
    mend_rledit,
)
from agents.base import run_stream
from agents.hypernetworks.retraining import batchwise_reward
from agents.rledit.blocks import ResidualBlocks
from agents.rledit.trajectory import trajectory
from agents.running.editors import EDITORS
from rledit_env.knowledge import load_knowledge
from rledit_env.reward import Generalization, Locality, RewardConfig
from rledit_env.scoring import ScoredBatch, score

MODULES = "model.layers.[2-3].mlp.{gate,up}_proj"
MEND, MALMEN = EDITORS["mend"], EDITORS["malmen"]
TRAINING = {
    "mend": {**MEND.env, "num_batches": 1, "batch_size": MEND.training.batch_size, "reward": MEND.reward()},
    "malmen": {**MALMEN.env, "num_batches": 1, "reward": MALMEN.reward()},
}


@pytest.fixture
def training_env(tiny_lm, make_env):
    """Makes the environment that an editor is trained in."""

    def make(name: str = "mend", **arguments):
        return make_env(**{
            "model": tiny_lm(modules=MODULES), "array_backend": "torch", "reward_gradient": True, **TRAINING[name],
            **arguments,
        })  # fmt: skip

    return make


def config_of(name: str, step_size: float = 1e-3, **settings):
    kind, network = {"mend": (MENDConfig, mend_network), "malmen": (MALMENConfig, malmen_network)}[name]
    rates = {"learning_rate": 3e-3, "step_size_learning_rate": 0.05, "trajectories_per_update": 2}
    ours = {"initial_weights": "scaled", "step_size_parameter": "log"}  # which learn in a few updates
    return kind(network=network(rank=8, step_size=step_size, **ours), **rates | settings)


def agent_of(name: str, env, seed: int = 0, **settings):
    return {"mend": MENDAgent, "malmen": MALMENAgent}[name](env, config_of(name, **settings), seed=seed)


def trained(name: str, env, updates: int = 2, **settings):
    agent = agent_of(name, env, **settings)
    return agent.learn(updates * agent.config.trajectories_per_update, progress_bar=False)


def update_of(action, module) -> torch.Tensor:
    return action["values"][module].T @ action["keys"][module]


def parameters_of(agent) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in agent.network.parameters()])


# -- what they compute


def test_mends_block_has_scale_and_shift_inside_of_the_relu_and_trains_from_the_identity():
    generator = torch.Generator().manual_seed(0)
    block = ResidualBlocks(6, 3, 1, 2, inside=True)
    z = torch.randn(2, 5, 6, generator=generator)
    assert torch.equal(block(z, [0, 1]), z)
    block(z, [0, 1]).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in (*block.up, *block.bias, *block.shift))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    for member in range(2):
        inner = z[member] @ block.down[0] @ block.up[0] + block.bias[0]
        expected = z[member] + torch.relu(block.scale[0][member] * inner + block.shift[0][member])
        torch.testing.assert_close(block(z, [0, 1])[member], expected)


def test_mends_block_in_bfloat16_gives_nearly_the_same_and_its_parameters_get_gradients():
    results = []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        block = ResidualBlocks(6, 3, 1, 2, precision, inside=True)
        torch.nn.init.normal_(block.up[0])
        out = block(torch.ones(2, 5, 6), [0, 1])
        out.square().sum().backward()
        results.append((out.detach(), block.down[0].grad, block.up[0].grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=0.05 * float(one.abs().max()), rtol=0.05)


def test_mends_update_is_the_sum_of_rank_one_updates_over_all_tokens(training_env):
    env = training_env()
    agent = trained("mend", env)
    batch_env = training_env(batch_size=2)
    observation, _ = batch_env.reset(seed=1)
    agent.set_env(batch_env)
    action, _ = agent.predict(observation)
    facts = [record.edit for record in batch_env.current_batch()]
    assert len(observation["mask"]) == sum(map(len, facts))
    answers = sum(len(fact.targets) for fact in facts)
    factor = torch.tensor([[answers / len(fact.targets)] for fact in facts for _ in range(len(fact))])
    for m, (d_in, _) in agent.network.shapes.items():
        mean, scale = agent.network.normaliser_of(m).moments()
        kept = observation["value_gradients"][m].any(1)
        u, gradient = observation["keys"][m][kept], (factor * observation["value_gradients"][m])[kept]
        group = next(g for g, members in agent.network.groups.items() if m in members)
        place = agent.network.groups[group].index(m)
        z = (torch.cat([u, gradient], 1) - mean) * scale
        z = agent.network.networks[group](z[None], [place])[0].detach()
        eta = agent.network.log_step_size[agent.network.index[m]].exp().detach()
        expected = sum(-eta * torch.outer(row[d_in:], row[:d_in]) for row in z)
        torch.testing.assert_close(update_of(action, m), expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("recursion", [False, True])
def test_malmens_updates_satisfy_the_normal_equations(training_env, recursion):
    agent = trained("malmen", training_env("malmen"), recursion=recursion)
    assert agent.config.network.aggregation == ("recursive" if recursion else "least_squares")
    env = training_env("malmen", num_batches=3)
    observation, _ = env.reset(seed=1)
    agent.reset()
    earlier = {m: [] for m in observation["keys"]}
    for _ in range(3):
        action, _ = agent.predict(observation)
        for m, u in observation["keys"].items():
            earlier[m].append(u)
            keys = torch.cat(earlier[m] if recursion else [u])
            damping = agent.network.log_damping[agent.network.index[m]].exp().detach()
            left = update_of(action, m) @ (keys.T @ keys + damping * torch.eye(u.shape[1]))
            right = action["values"][m].T @ u
            torch.testing.assert_close(left, right, atol=2e-3 * float(right.abs().max()), rtol=1e-3)
        observation, *_ = env.step(action)


def test_the_defaults_are_the_papers():
    mend, malmen = MENDConfig(), MALMENConfig()
    assert (mend.network.rank, mend.network.step_size, mend.learning_rate) == (1920, 1e-4, 1e-6)
    assert (mend.trajectories_per_update, mend.max_gradient_norm) == (10, 100)
    assert (malmen.network.rank, malmen.network.step_size, malmen.learning_rate) == (1920, 1e-6, 1e-5)
    assert (mend.network.aggregation, malmen.network.aggregation) == ("mend", "least_squares")
    assert (mend.network.normaliser, malmen.network.normaliser) == ("lifetime", "continued")
    assert (mend.step_size_learning_rate, malmen.step_size_learning_rate) == (1e-4, 1e-5)
    assert mend.retrain_every == malmen.retrain_every == 0
    assert (TRAINING["mend"]["token"], TRAINING["mend"]["batch_size"]) == ("all", 1)
    with pytest.raises(ValueError, match="retrain_every is -1"):
        MENDConfig(retrain_every=-1)


def test_with_rledit_the_networks_are_the_same_and_the_trajectory_trains_them(training_env):
    for whole, single in ((mend_rledit(), MENDConfig()), (malmen_rledit(), MALMENConfig())):
        assert whole.network == single.network
        assert (type(whole).__name__, whole.credit) == ("RLEditConfig", "trajectory")
    network = mend_network(rank=8)
    agent = RLEditAgent(training_env(num_batches=3), mend_rledit(network, learning_rate=1e-2))
    before = parameters_of(agent)
    agent.learn(3, progress_bar=False)
    assert agent.updates == 1 and not torch.equal(before, parameters_of(agent))


# -- how they are trained


def test_the_training_reward_is_the_batchs_own_editing_loss_from_the_original_weights(training_env):
    config: RewardConfig = batchwise_reward(editing=0.1)
    env = training_env(batch_size=2)
    agent = trained("mend", env)
    observation, _ = env.reset(seed=3)
    assert all(torch.equal(env.lm.weight(m), env.lm.original_weight(m)) for m in env.lm.module_shapes)
    batch = ScoredBatch(env.current_batch(), env.episode.choices.tolist(), 1.0)
    _, reward, terminated, _, info = env.step(agent.predict(observation)[0])
    losses = score(env.lm, [batch], config, gradient=False).basic[0]
    assert terminated
    assert reward == pytest.approx(-(0.1 * losses["generalization"] + losses["locality"]))
    kinds = {name: (w, type(c)) for name, (w, c) in config.components.items()}
    assert kinds == {"generalization": (0.1, Generalization), "locality": (1.0, Locality)}


@pytest.mark.parametrize("name", ["mend", "malmen"])
def test_training_raises_the_reward_of_held_out_facts(training_env, name):
    dataset = load_knowledge("counterfact")
    train, held_out = (dataclasses.replace(dataset, records=dataset.records[part])
                       for part in (slice(0, 60), slice(100, 140)))
    reward = batchwise_reward(1.0, 0.1)
    env = training_env(name, kind="counterfact", data=train, reward=reward)
    test_env = training_env(name, kind="counterfact", data=held_out, reward=reward)
    agent = trained(name, env, updates=1, step_size=3e-4)

    def held_out_reward() -> float:
        editing = copy.copy(agent)
        editing.set_env(test_env)
        return float(np.mean([run_stream(test_env, editing, seed=seed)[0] for seed in range(6)]))

    before = held_out_reward()
    agent.learn(80, progress_bar=False)
    assert agent.updates == 41
    assert held_out_reward() > before + 0.5


# -- the starred forms


@pytest.fixture
def edited(training_env):
    """A starred agent that has edited some batches: the agent, the environment, and the observation that follows."""

    def make(name: str, batches: int, **settings):
        agent = trained(name, training_env(name), retrain_every=2, retrain_steps=2, **settings)
        env = training_env(name, num_batches=4, batch_size=2, reward="none", reward_gradient=False)
        agent.set_env(env)
        observation, _ = env.reset(seed=7)
        agent.reset()
        for _ in range(batches):
            observation, *_ = env.step(agent.predict(observation)[0])
        return agent, env, observation

    return make


@pytest.mark.parametrize("settings", [{}, {"recursion": True}], ids=["least squares", "recursion"])
@pytest.mark.parametrize("name", ["mend", "malmen"])
def test_retraining_leaves_the_weights_and_the_streams_memory_bit_for_bit(edited, name, settings):
    if name == "mend" and settings:
        pytest.skip("MEND solves no least squares")
    agent, env, observation = edited(name, 2, **settings)
    weights, parameters = env.lm.snapshot(), parameters_of(agent)
    memory = {m: t.clone() for m, t in agent.network.key_memory.inverses.items()}
    assert any(not torch.equal(env.lm.weight(m), env.lm.original_weight(m)) for m in weights)
    agent.retrain()
    assert all(torch.equal(env.lm.weight(m), w) for m, w in weights.items())
    assert not torch.equal(parameters_of(agent), parameters)
    assert bool(memory) == bool(settings)
    assert all(torch.equal(agent.network.key_memory.inverses[m], t) for m, t in memory.items())
    env.step(agent.predict(observation)[0])  # the stream goes on


def test_an_interrupted_retraining_leaves_the_weights_bit_for_bit(edited, monkeypatch):
    agent, env, _ = edited("mend", 2)
    weights = env.lm.snapshot()
    step = agent.retraining_env.step

    def interrupted(action):
        step(action)
        raise KeyboardInterrupt

    monkeypatch.setattr(agent.retraining_env, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        agent.retrain()
    assert all(torch.equal(env.lm.weight(m), w) for m, w in weights.items())


@pytest.mark.parametrize("steps_per_batch", [1, 2])
def test_the_network_is_retrained_on_the_current_weights_after_every_so_many_batches(
    training_env, monkeypatch, steps_per_batch
):
    agent = trained("malmen", training_env("malmen", steps_per_batch=steps_per_batch), retrain_every=2, retrain_steps=1)
    env = training_env("malmen", num_batches=5, steps_per_batch=steps_per_batch, reward="none", reward_gradient=False)
    met = []
    observation, _ = env.reset(seed=7)

    def watched(editor, train_env, seed, **reset):
        met.append((env.position, env.lm.snapshot()))
        return trajectory(editor, train_env, seed, **reset)

    monkeypatch.setattr("agents.hypernetworks.retraining.trajectory", watched)
    agent.reset()
    done = False
    while not done:
        before = env.lm.snapshot()
        action, _ = agent.predict(observation)
        for step, weights in met[-agent.config.trajectories_per_update :]:
            if step == env.position:
                assert all(torch.equal(weights[m], w) for m, w in before.items())
        observation, _, done, _, _ = env.step(action)
    per_update = agent.config.trajectories_per_update
    assert [step for step, _ in met] == [2 * steps_per_batch] * per_update + [4 * steps_per_batch] * per_update


def test_batches_that_end_early_are_counted_as_batches(training_env, monkeypatch):
    agent = trained("malmen", training_env("malmen"), retrain_every=2, retrain_steps=1)
    env = training_env(
        "malmen", num_batches=5, steps_per_batch=3, present_until=1e-4, reward="none", reward_gradient=False
    )
    batches = []
    monkeypatch.setattr(agent, "retrain", lambda: batches.append(env.position // 3))
    _, info = run_stream(env, agent, seed=7)
    assert len(env.history) < 15 and not info["diverged"]
    assert batches == [2, 4]


def test_a_new_stream_begins_with_the_trained_network(edited):
    agent, env, _ = edited("mend", 0)
    before, updates = parameters_of(agent), agent.updates
    first = [run_stream(env, agent, seed=7)[1]["drift"] for _ in range(2)]
    assert first[0] == pytest.approx(first[1], rel=1e-6)
    assert not torch.equal(parameters_of(agent), before)
    agent.reset()
    assert torch.equal(parameters_of(agent), before) and agent.updates == updates


def test_evaluations_within_training_do_not_retrain(training_env, monkeypatch):
    agent = agent_of("malmen", training_env("malmen"), retrain_every=1)
    eval_env = training_env("malmen", num_batches=3, reward="none", reward_gradient=False)
    monkeypatch.setattr(agent, "retrain", lambda: pytest.fail("retrained"))
    agent.learn(4, progress_bar=False, eval_env=eval_env, eval_every=1)
    agent.calibrate(eval_env, (1.0, 0.5))


def test_a_starred_agent_without_environment_says_what_it_lacks(edited, tmp_path):
    agent, _, observation = edited("mend", 0)
    agent.save(tmp_path)
    with pytest.raises(ValueError, match="no environment to learn in"):
        load_agent(tmp_path).predict(observation)


# -- files


@pytest.mark.parametrize("name", ["mend", "malmen"])
def test_a_saved_agent_predicts_the_same(training_env, tmp_path, name):
    agent = trained(name, training_env(name))
    agent.save(tmp_path)
    loaded = load_agent(tmp_path)
    assert type(loaded) is type(agent) and loaded.config == agent.config
    assert isinstance(loaded.config.network, HypernetworkConfig)
    env = training_env(name)
    observation, _ = env.reset(seed=5)
    agent.set_env(env)
    loaded.set_env(env)
    mine, theirs = agent.predict(observation)[0], loaded.predict(observation)[0]
    for part in ("keys", "values"):
        assert all(torch.equal(mine[part][m], theirs[part][m]) for m in mine[part])


# -- the default model
