"""Tests of DAFNet."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from agents import DAFNetAgent, DAFNetConfig, DAFNetNetworkConfig, HypernetworkConfig, load_agent
from agents.base import run_stream
from agents.hypernetworks.dafnet_network import DAFNetwork, FusionLayer, softmax_by_fact
from agents.rledit.hypernetwork import Hypernetwork
from agents.rledit.trajectory import trajectory
from agents.running.editors import EDITORS
from rledit_env.knowledge import load_knowledge

SHAPES = {"a": (6, 4), "b": (4, 6), "c": (6, 4)}
SMALL = {"rank": 8, "feed_forward": 8, "attention": 4, "heads": 2, "score_attention": 4}
MODULES = "model.layers.[2-3].mlp.{gate,up}_proj"


def network(**settings) -> DAFNetwork:
    return DAFNetwork(SHAPES, DAFNetNetworkConfig(**{**SMALL, "step_size": 0.1, **settings}))


def moved(module: torch.nn.Module, by: float = 0.2) -> torch.nn.Module:
    """With parameters away from their start."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)
    return module


def batch(lengths: list[int], seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return tuple({m: 3 + 2 * torch.randn(sum(lengths), s[side], generator=generator) for m, s in SHAPES.items()}
                 for side in (0, 1))


def ready(net: DAFNetwork) -> DAFNetwork:
    """With moments of some tokens in its normalisers, and no facts remembered."""
    net.observe(*batch([40], seed=9))
    net.reset()
    return net


def factors(net: DAFNetwork, lengths: list[int], seed: int = 0, rows=None):
    """Of facts that weigh 1 each, which they do not in a batch."""
    keys, gradients = rows or batch(lengths, seed)
    record = net.observe_facts(keys, gradients, lengths, adapt=False)
    made, values = net.factors(record)
    counts = torch.tensor(lengths)
    return made, {m: v / record.weights[m].repeat_interleave(counts)[:, None] for m, v in values.items()}


# -- what it computes


def test_the_untrained_network_is_the_mean_rank_one_update_of_each_facts_normalised_tokens():
    net = ready(network())
    rule = {"normaliser": "lifetime", "normaliser_scope": "shape in turn", "step_size_parameter": "direct"}
    plain = Hypernetwork(SHAPES, HypernetworkConfig(blocks=0, aggregation="mend", step_size=0.1, **rule))
    plain.normalisers = net.normalisers
    keys, gradients = batch([2, 3])
    theirs, values = plain.factors(plain.observe(keys, gradients, adapt=False))
    mine = factors(net, [2, 3])
    for m in SHAPES:
        torch.testing.assert_close(mine[0][m], theirs[m])
        torch.testing.assert_close(mine[1][m][:2], values[m][:2] / 2)
        torch.testing.assert_close(mine[1][m][2:], values[m][2:] / 3)


def test_a_layer_is_its_formula():
    layer = moved(FusionLayer(5, 1, DAFNetNetworkConfig(rank=3, feed_forward=3, attention=4, heads=1)))
    generator = torch.Generator().manual_seed(0)
    z, earlier = (torch.randn(1, n, 5, generator=generator) for n in (5, 2))
    lengths = [2, 3]
    result, facts = layer(z, lengths, earlier)
    a = layer.token(layer.norms[0](z[0]))
    scores = layer.token_score(a)[:, 0]
    weights = torch.cat([scores[:2].softmax(0), scores[2:].softmax(0)])
    weighted = a * weights[:, None]
    representations = torch.stack([weighted[:2].sum(0), weighted[2:].sum(0)])
    torch.testing.assert_close(facts[0], representations)
    taken = []
    for f in range(2):
        until = layer.norms[1](torch.cat([earlier[0], representations[: f + 1]]))
        attention = (layer.key(until) @ layer.query(until[-1]) / math.sqrt(4)).softmax(0)
        taken.append(layer.across(attention @ layer.value(until)))
    x = z[0] + weighted + torch.stack([taken[0]] * 2 + [taken[1]] * 3)
    expected = x + layer.scale[0] * layer.feed_forward(layer.norms[2](x)) + layer.shift[0]
    torch.testing.assert_close(result[0], expected)


def test_token_weights_sum_to_one_within_each_fact():
    weights = softmax_by_fact(torch.randn(2, 6, 1, generator=torch.Generator().manual_seed(0)), [1, 2, 3])
    sums = [piece.sum(1) for piece in weights.split([1, 2, 3], 1)]
    torch.testing.assert_close(torch.cat(sums, 1), torch.ones(2, 3))


def test_a_later_fact_never_changes_an_earlier_facts_factors_and_an_earlier_one_changes_a_later_ones():
    net = moved(ready(network(step_size=1.0)))
    keys, gradients = batch([2, 3, 2])
    others = {m: g.clone() for m, g in gradients.items()}
    for g in others.values():
        g[2:5] += 1.0  # the second fact
    one = factors(net, [2, 3, 2], rows=(keys, gradients))
    net.reset()
    two = factors(net, [2, 3, 2], rows=(keys, others))
    for part in (0, 1):
        for m in SHAPES:
            torch.testing.assert_close(one[part][m][:2], two[part][m][:2], rtol=0, atol=1e-6)
            assert not torch.allclose(one[part][m][2:5], two[part][m][2:5], atol=1e-3)
            assert not torch.allclose(one[part][m][5:], two[part][m][5:], atol=1e-5)


def test_facts_one_batch_after_the_other_get_the_factors_that_they_get_in_one_batch():
    net = moved(ready(network()))
    keys, gradients = batch([2, 3, 2])
    whole = factors(net, [2, 3, 2], rows=(keys, gradients))
    net.reset()
    for rows, lengths in ((slice(0, 2), [2]), (slice(2, 7), [3, 2])):
        part = ({m: k[rows] for m, k in keys.items()}, {m: g[rows] for m, g in gradients.items()})
        pieces = factors(net, lengths, rows=part)
        for side in (0, 1):
            for m in SHAPES:
                torch.testing.assert_close(pieces[side][m], whole[side][m][rows], rtol=1e-4, atol=1e-5)


def test_attention_reaches_all_tokens_of_a_fact_and_the_facts_are_forgotten_at_a_reset():
    net = moved(ready(network()))
    keys, gradients = batch([3])
    alone = factors(net, [3], rows=(keys, gradients))
    factors(net, [2], seed=1)
    after_others = factors(net, [3], rows=(keys, gradients))
    net.reset()
    anew = factors(net, [3], rows=(keys, gradients))
    net.reset()
    apart = factors(net, [1, 1, 1], rows=(keys, gradients))
    for m in SHAPES:
        assert torch.equal(alone[0][m], anew[0][m])
        assert not torch.allclose(alone[0][m], after_others[0][m], atol=1e-5)
        assert not torch.allclose(alone[0][m][0], apart[0][m][0], atol=1e-5)


def test_every_parameter_gets_a_gradient_once_the_network_has_left_its_start():
    net = moved(ready(network()))
    factors(net, [2, 2], seed=1)
    keys, values = factors(net, [2, 3])
    sum(k.square().sum() for k in [*keys.values(), *values.values()]).backward()
    trained = [(n, p) for n, p in net.networks.named_parameters() if p.requires_grad]
    assert {n.split(".")[2] for n, p in net.networks.named_parameters() if not p.requires_grad} == {
        "score_query", "score_key"
    }  # fmt: skip
    without = [n for n, p in trained if p.grad is None or not p.grad.any()]
    assert all("key.bias" in n or "token_score.2.bias" in n for n in without), without  # a softmax does not see them


def test_another_aggregation_is_refused():
    with pytest.raises(ValueError, match="DAFNet's is 'mend'"):
        DAFNetNetworkConfig(aggregation="recursive")


# -- the agent


@pytest.fixture
def training_env(tiny_lm, make_env):
    """Makes an environment that an agent can learn in."""

    def make(**arguments):
        return make_env(**{"model": tiny_lm(modules=MODULES), "array_backend": "torch", "reward_gradient": True,
                           **EDITORS["dafnet"].env, "reward": EDITORS["dafnet"].reward(), **arguments})

    return make


def agent_of(env, step_size: float = 1e-3, **settings) -> DAFNetAgent:
    rates = {"learning_rate": 1e-3, "step_size_learning_rate": 0.1, "max_gradient_norm": 1.0}
    network = DAFNetNetworkConfig(**SMALL, step_size=step_size, step_size_parameter="log")  # ours learns sooner
    return DAFNetAgent(env, DAFNetConfig(network, **rates | settings))


def test_learning_improves_the_return_on_held_out_streams(training_env):
    dataset = load_knowledge("counterfact")
    train, held_out = (dataclasses.replace(dataset, records=dataset.records[part])
                       for part in (slice(0, 60), slice(100, 140)))
    env = training_env(kind="counterfact", data=train)
    test_env = training_env(kind="counterfact", data=held_out)
    agent = agent_of(env).learn(3, progress_bar=False)

    def held_out_return() -> float:
        agent.set_env(test_env)
        return float(np.mean([run_stream(test_env, agent, seed=seed)[0] for seed in range(3)]))

    before = held_out_return()
    agent.set_env(env)
    agent.learn(60, progress_bar=False)
    assert agent.updates == 21
    assert held_out_return() > before + 1.0


def test_the_gradient_does_not_depend_on_how_many_graphs_are_kept(training_env):
    results = []
    for graph_bytes in (2**28, 0):
        agent = agent_of(training_env(), graph_bytes=graph_bytes)
        moved(agent.network.networks, 0.05)
        results.append(torch.cat([g.flatten() for g in trajectory(agent, agent.env, seed=0)[0]]))
    assert results[0].abs().max() > 0
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6 * float(results[0].abs().max()))


def test_a_networks_size_is_known_without_making_one(training_env):
    network = agent_of(training_env()).network
    held = sum(p.numel() for p in network.parameters())
    held += sum(t.numel() for n in network.normalisers.values() for t in n.state().values())
    assert network.parameter_count(network.shapes, network.config) == held


def test_a_saved_agent_goes_on_with_the_stream(training_env, tmp_path):
    env = training_env()
    agent = agent_of(env).learn(3, progress_bar=False)
    agent.reset()
    observation, _ = env.reset(seed=0)
    observation, *_ = env.step(agent.predict(observation)[0])
    agent.save(tmp_path)
    loaded = load_agent(tmp_path, env)
    assert isinstance(loaded, DAFNetAgent) and loaded.config == agent.config
    mine, theirs = agent.predict(observation)[0], loaded.predict(observation)[0]
    assert all(torch.equal(mine["updates"][m], theirs["updates"][m]) for m in agent.network.shapes)


def test_the_agent_must_know_the_environment_that_it_edits_in(training_env, tmp_path):
    agent = agent_of(training_env()).learn(3, progress_bar=False)
    other = training_env(batch_size=3, num_batches=2)
    agent.env.reset(seed=0)
    observation, _ = other.reset(seed=1)
    with pytest.raises(ValueError, match=r"name the environment that it edits in with set_env\(env\)"):
        agent.predict(observation)
    agent.set_env(other)
    observation, *_ = other.step(agent.predict(observation)[0])
    other.step(agent.predict(observation)[0])
    agent.save(tmp_path)
    with pytest.raises(ValueError, match="load it with env"):
        load_agent(tmp_path).predict(observation)
