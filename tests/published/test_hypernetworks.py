"""Hypernetwork editors beside their published code: values computed from the formulas, or given by the papers' code."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from agents import (
    DAFNetAgent,
    DAFNetConfig,
    DAFNetNetworkConfig,
    Hypernetwork,
    HypernetworkConfig,
    MALMENAgent,
    MALMENConfig,
    MENDAgent,
    MENDConfig,
    RLEditAgent,
    RLEditConfig,
    StableEditConfig,
    UltraEditAgent,
    UltraEditConfig,
    edit_facts,
    malmen_network,
    malmen_rledit,
    mend_network,
    mend_rledit,
    rledit_paper,
    rledit_paper_network,
)
from agents.base import run_stream
from agents.hypernetworks.dafnet_network import DAFNetwork
from agents.rledit.credit import CreditAccumulator
from agents.rledit.trainer import update_policy
from agents.rledit.trajectory import trajectory
from agents.running.editors import EDITORS, configured, find_configs, load_configs
from rledit_env.ledger import EditLedger
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.losses import kl_divergence
from rledit_env.reward import Locality, RewardConfig

SHAPES = {"a": (6, 4), "b": (4, 6), "c": (6, 4)}
MODULES = "model.layers.[2-3].mlp.{gate,up,down}_proj"
LAST = "model.layers.3.mlp.{gate,up,down}_proj"  # of the last decoder layer
SMALL = {"rank": 8, "feed_forward": 8, "attention": 4, "score_attention": 4}
RATES = {"learning_rate": 1e-5, "step_size_learning_rate": 1e-5}


def rows_of(rows: int, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Keys and value gradients of the modules in SHAPES."""
    generator = torch.Generator().manual_seed(seed)
    keys, gradients = ({m: 3 + 2 * torch.randn(rows, s[side], generator=generator) for m, s in SHAPES.items()}
                       for side in (0, 1))
    return keys, gradients


def moved(network: torch.nn.Module, by: float = 0.2) -> torch.nn.Module:
    """With parameters away from their start."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "step_size" not in name:
                parameter += by * torch.randn(parameter.shape, generator=generator)
    return network


def update(factors: tuple[dict[str, Tensor], dict[str, Tensor]], module: str) -> Tensor:
    """ΔW (d_out, d_in)."""
    return (factors[1][module].T @ factors[0][module]).detach()


@pytest.fixture
def double() -> Iterator[None]:
    """Everything in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# -- rates, starts, sizes


@pytest.mark.parametrize(
    "agent, rate",
    [
        (lambda: RLEditAgent(None, rledit_paper(rledit_paper_network(rank=2)), SHAPES), 1e-5),
        (lambda: RLEditAgent(None, malmen_rledit(malmen_network(rank=2)), SHAPES), 1e-5),
        (lambda: RLEditAgent(None, mend_rledit(mend_network(rank=2)), SHAPES), 1e-5),
        (lambda: MALMENAgent(None, MALMENConfig(network=malmen_network(rank=2)), SHAPES), 1e-5),
        (lambda: MENDAgent(None, MENDConfig(network=mend_network(rank=2)), SHAPES), 1e-4),
        (lambda: DAFNetAgent(None, DAFNetConfig(DAFNetNetworkConfig(**SMALL)), SHAPES), 1e-4),
    ],
    ids=["rledit-paper", "malmen+rledit", "mend+rledit", "malmen", "mend", "dafnet"],
)
def test_adam_moves_the_step_size_itself_by_its_rate(agent, rate):
    """From 1e-6, at 1e-5 with a gradient of +1: −9e-6."""
    agent = agent()
    parameter = agent.network.step_size_parameter
    with torch.no_grad():
        parameter.fill_(1e-6)
    update_policy(agent, [[torch.full_like(p, float(p is parameter)) for p in agent.network.learned_parameters()]])
    assert parameter.tolist() == pytest.approx([1e-6 - rate] * len(SHAPES), rel=1e-4)
    assert agent.network.step_sizes().tolist() == parameter.tolist()  # a negative one is taken as it is
    if rate == 1e-5:
        assert parameter.tolist() == pytest.approx([-9e-6] * len(SHAPES), rel=1e-4)


@pytest.mark.parametrize(
    "config, blocks",
    [(rledit_paper_network(), 4), (malmen_network(), 2), (mend_network(), 2)],
    ids=["rledit-paper", "malmen", "mend"],
)
def test_blocks_are_as_many_as_published_and_a_starts_as_a_standard_normal(config, blocks):
    network = Hypernetwork({"a": (60, 40), "b": (60, 40)}, dataclasses.replace(config, rank=200))
    (group,) = network.networks.values()
    assert len(group.down) == len(group.up) == blocks
    for down, up in zip(group.down, group.up, strict=True):
        assert float(down.std()) == pytest.approx(1.0, abs=0.02)
        assert abs(float(down.mean())) < 0.03
        assert not up.any()


def test_our_own_default_starts_scaled_and_learns_the_logarithm():
    network = Hypernetwork({"a": (60, 40)}, HypernetworkConfig(rank=200, step_size=1e-3))
    assert float(network.networks["0"].down[0].std()) == pytest.approx(0.1, abs=0.002)
    assert float(network.step_size_parameter.detach()) == pytest.approx(math.log(1e-3))


@pytest.mark.parametrize("kind", ["log", "direct"])
def test_step_sizes_are_scaled_whatever_is_learned_of_them(kind):
    config = RLEditConfig(network=HypernetworkConfig(rank=2, step_size=0.2, step_size_parameter=kind))
    agent = RLEditAgent(None, config, SHAPES)
    agent.scale_step_sizes(0.5)
    assert agent.network.step_sizes().tolist() == pytest.approx([0.1] * 3)
    agent.network.scale_step_sizes(3.0, agent.network.step_size_parameter.detach().clone())
    assert agent.network.step_sizes(["b"]).tolist() == pytest.approx([0.3])


# -- tokens without a gradient


@pytest.mark.parametrize("normaliser", ["lifetime", "stream"])
def test_mend_drops_rows_without_gradient_before_the_normaliser(normaliser):
    full, short = (
        moved(Hypernetwork(SHAPES, mend_network(rank=3, step_size=0.1, normaliser=normaliser))) for _ in range(2)
    )
    keys, gradients = rows_of(10)
    for gradient in gradients.values():
        gradient[:6] = 0
    one = full.factors(full.observe(keys, gradients))
    other = short.factors(short.observe({m: u[6:] for m, u in keys.items()}, {m: v[6:] for m, v in gradients.items()}))
    for name in full.normalisers:
        for key, value in full.normalisers[name].state().items():
            assert torch.equal(value, short.normalisers[name].state()[key])
    for m in SHAPES:
        assert not one[1][m][:6].any()
        torch.testing.assert_close(one[1][m][6:], other[1][m])
        torch.testing.assert_close(one[0][m][6:], other[0][m])
        torch.testing.assert_close(update(one, m), update(other, m))
        assert update(one, m).any()


def test_mend_drops_other_rows_in_every_module():
    """As in a model, where only the last layer's tokens have no gradient."""
    network = moved(Hypernetwork(SHAPES, mend_network(rank=3, step_size=0.1)))
    keys, gradients = rows_of(8)
    gradients["a"][:5] = 0
    keys["c"][7] = 0
    network.observe(keys, gradients)
    assert {n: float(m.count) for n, m in network.normalisers.items()} == {"6x4": 3 + 7, "4x6": 8}


def test_dafnet_drops_rows_without_gradient_before_the_normaliser():
    full, short = (moved(DAFNetwork(SHAPES, DAFNetNetworkConfig(**SMALL, step_size=0.1))) for _ in range(2))
    keys, gradients = rows_of(12)
    for gradient in gradients.values():
        gradient[:6] = 0
    one = full.observe_facts(keys, gradients, [8, 4], True)
    rest = ({m: u[6:] for m, u in keys.items()}, {m: v[6:] for m, v in gradients.items()})
    other = short.observe_facts(*rest, [2, 4], True)
    for name in full.normalisers:
        for key, value in full.normalisers[name].state().items():
            assert torch.equal(value, short.normalisers[name].state()[key])
    for group, layers in full.earlier.items():
        for layer, same in zip(layers, short.earlier[group], strict=True):
            torch.testing.assert_close(layer, same)
    for m in SHAPES:
        assert not full.factors(one)[1][m][:6].any()
        torch.testing.assert_close(update(full.factors(one), m), update(short.factors(other), m))
        assert update(full.factors(one), m).any()


def test_a_fact_without_any_gradient_in_a_module_gets_no_update_there_and_keeps_its_place():
    network = moved(DAFNetwork(SHAPES, DAFNetNetworkConfig(**SMALL, step_size=0.1)))
    keys, gradients = rows_of(5)
    gradients["a"][:2] = 0
    values = network.factors(network.observe_facts(keys, gradients, [2, 3], True))[1]
    assert not values["a"][:2].any() and values["a"][2:].any() and values["c"][:2].any()
    assert all(torch.isfinite(v).all() for v in values.values())


def test_in_the_last_decoder_layer_only_answer_positions_are_taken_in(tiny_lm, make_env):
    env = make_env(model=tiny_lm(modules=LAST), token="all", array_backend="torch", reward="none", batch_size=1)
    agent = MENDAgent(env, MENDConfig(network=mend_network(rank=2)))
    observation, _ = env.reset(seed=0)
    fact = env.current_batch()[0].edit
    agent.observe(observation, adapt=True)
    assert len(observation["mask"]) == len(fact) > len(fact.targets)
    counts = {m: float(agent.network.normaliser_of(m).count) for m in agent.network.shapes}
    shared = {m: 2 if "down" not in m else 1 for m in counts}  # gate and up have one shape
    assert counts == {m: shared[m] * len(fact.targets) for m in counts}


# -- MEND in batches


def test_in_a_batch_mends_facts_get_the_updates_that_they_get_alone(tiny_lm, make_env, double):
    """Facts of different answer lengths, with fixed moments: the batch's update is the sum."""
    lm = tiny_lm(modules=MODULES, dtype=torch.float64)
    settings = {"model": lm, "token": "all", "array_backend": "torch", "reward": "none", "num_batches": 1}
    single, several = make_env(**settings, batch_size=1), make_env(**settings, batch_size=4)
    agent = MENDAgent(several, MENDConfig(network=mend_network(rank=4, step_size=0.1)))
    moved(agent.network)
    observation, _ = several.reset(seed=3)
    agent.observe(observation, adapt=True)  # moments
    indices = several.stream.indices.tolist()
    assert len({len(record.edit.targets) for record in several.current_batch()}) > 1
    batch, _ = agent.predict(observation)
    alone = []
    for index in indices:
        seen, _ = single.reset(options={"indices": [index]})
        agent.set_env(single)
        alone.append(agent.predict(seen)[0])
    for m in lm.module_shapes:
        expected = sum(action["values"][m].T @ action["keys"][m] for action in alone)
        together = batch["values"][m].T @ batch["keys"][m]
        assert expected.dtype == torch.float64 and expected.abs().max() > 0
        torch.testing.assert_close(together, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))


def test_alone_a_facts_gradient_is_that_of_its_mean_answer_token(tiny_lm, make_env):
    """As MEND's loss is; a fact alone has A/A_i = 1."""
    env = make_env(model=tiny_lm(modules=MODULES), token="all", array_backend="torch", reward="none", batch_size=1)
    agent = MENDAgent(env, MENDConfig(network=mend_network(rank=2)))
    observation, _ = env.reset(seed=0)
    scaled = agent.of_loss(observation["value_gradients"])
    assert all(torch.equal(scaled[m], g) for m, g in observation["value_gradients"].items())


def test_dafnets_gradient_is_that_of_the_sum_over_answer_tokens(tiny_lm, make_env):
    env = make_env(model=tiny_lm(modules=MODULES), token="all", array_backend="torch", reward="none")
    agent = DAFNetAgent(env, DAFNetConfig(DAFNetNetworkConfig(**SMALL)))
    observation, _ = env.reset(seed=0)
    answers = sum(len(record.edit.targets) for record in env.current_batch())
    for m, scaled in agent.of_loss(observation["value_gradients"]).items():
        torch.testing.assert_close(scaled, answers * observation["value_gradients"][m])


@pytest.mark.parametrize("name", ["mend", "dafnet", "mend+rledit"])
def test_an_agent_says_where_it_cannot_know_the_facts(tiny_lm, make_env, name):
    lm = tiny_lm(modules=MODULES)
    env, other = (make_env(model=lm, token="all", array_backend="torch", reward="none") for _ in range(2))
    agent = {
        "mend": lambda e: MENDAgent(e, MENDConfig(network=mend_network(rank=2)), lm.module_shapes),
        "mend+rledit": lambda e: RLEditAgent(e, mend_rledit(mend_network(rank=2)), lm.module_shapes),
        "dafnet": lambda e: DAFNetAgent(e, DAFNetConfig(DAFNetNetworkConfig(**SMALL)), lm.module_shapes),
    }[name]
    env.reset(seed=0)
    observation, _ = other.reset(seed=0)  # as many rows, but the LLM is the other environment's now
    with pytest.raises(ValueError, match="another environment has begun an episode .*name the environment"):
        agent(env).predict(observation)
    with pytest.raises(ValueError, match="load it with env"):
        agent(None).predict(observation)
    over = make_env(model=lm, token="all", array_backend="torch", reward="none")
    lm.holder = None
    with pytest.raises(ValueError, match="presents no facts; name the environment"):
        agent(over).predict(observation)


# -- DAFNet's weights


def test_the_weights_of_forty_facts_over_two_batches_sum_to_one(tiny_lm, make_env, facts):
    """From W − W₀, by least squares over what each fact adds before it is weighed."""
    lm = tiny_lm(modules="model.layers.2.mlp.{gate,up}_proj")
    env = make_env(model=lm, data=facts("zsre", 48), token="answer", array_backend="torch", reward="none",
                   num_batches=2, batch_size=20)  # fmt: skip
    agent = DAFNetAgent(env, DAFNetConfig(DAFNetNetworkConfig(**SMALL, step_size=0.05)))
    moved(agent.network, 0.1)
    observation, _ = env.reset(seed=0)
    agent.observe(observation, adapt=True)  # moments
    agent.reset()
    added: dict[str, list[Tensor]] = {m: [] for m in lm.module_shapes}
    observe = agent.network.observe_facts

    def watched(keys, gradients, lengths, adapt):
        record = observe(keys, gradients, lengths, adapt)
        plain = dataclasses.replace(record, weights={m: torch.ones_like(w) for m, w in record.weights.items()})
        made, values = agent.network.factors(plain)
        for m, rows in added.items():
            pairs = zip(made[m].split(lengths), values[m].split(lengths), strict=True)
            rows += [(v.T @ k).flatten().detach().double() for k, v in pairs]
        return record

    agent.network.observe_facts = watched
    weights = []
    for batches in (1, 2):
        observation, *_ = env.step(agent.predict(observation)[0])
        for m, rows in added.items():
            change = (lm.weight(m) - lm.original_weight(m)).flatten().double()
            matrix = torch.stack(rows, 1)
            found = torch.linalg.lstsq(matrix, change[:, None]).solution[:, 0]
            assert len(found) == 20 * batches
            torch.testing.assert_close(matrix @ found, change, rtol=1e-3, atol=1e-4 * float(change.abs().max()))
            assert float(found.sum()) == pytest.approx(1.0, abs=2e-3)
            weights.append(found)
    first, both = weights[0], weights[2]
    assert (both > 0).all() and float(both.std()) > 1e-4  # they differ from fact to fact
    share = float(both[:20].sum())
    torch.testing.assert_close(both[:20], share * first, rtol=0.05, atol=1e-3)
    assert share < 0.7


def test_untrained_all_facts_of_a_stream_weigh_the_same(tiny_lm, make_env):
    network = DAFNetwork(SHAPES, DAFNetNetworkConfig(**SMALL))
    for name, count in (("first", 3), ("second", 5)):
        keys, gradients = rows_of(2 * count, seed=count)
        record = network.observe_facts(keys, gradients, [2] * count, True)
        total = {"first": 3, "second": 8}[name]
        for m in SHAPES:
            torch.testing.assert_close(record.weights[m], torch.full((count,), 1 / total))
    assert float(record.share["a"]) == pytest.approx(3 / 8)


def test_dafnets_weights_are_the_formula_averaged_over_layers():
    network = moved(DAFNetwork(SHAPES, DAFNetNetworkConfig(**SMALL, blocks=2)), 0.5)
    for seed in (1, 2):
        keys, gradients = rows_of(7, seed)
        earlier = {g: [r.clone() for r in layers] for g, layers in network.earlier.items()}
        record = network.observe_facts(keys, gradients, [2, 3, 2], True)
    for group, members in network.groups.items():
        for place, m in enumerate(members):
            weights, shares = [], []
            for index, layer in enumerate(network.networks[group]):
                every = network.earlier[group][index][place].double()
                assert torch.equal(network.earlier[group][index][:, :3], earlier[group][index])
                own = []
                for f in range(3):
                    until = every[: 3 + f + 1].float()
                    query, key = layer.score_query(until[-1]).view(2, 4), layer.score_key(until).view(-1, 2, 4)
                    attention = torch.einsum("hd,fhd->hf", query, key).div(2).softmax(1)
                    own.append(float(attention[:, -1].mean()))
                s1, s2, s3 = own
                weights.append([s1 * (1 - s2) * (1 - s3), s2 * (1 - s3), s3])
                shares.append((1 - s1) * (1 - s2) * (1 - s3))
            torch.testing.assert_close(record.weights[m], torch.tensor(weights).mean(0))
            assert float(record.share[m]) == pytest.approx(sum(shares) / 2, rel=1e-4)


def test_dafnets_loss_weights_are_published():
    components = {name: weight for name, (weight, _) in EDITORS["dafnet"].reward().components.items()}
    assert components == {"efficacy": 0.5, "generalization": 0.5, "locality": 1.0}


def test_an_update_is_credited_with_what_later_steps_leave_of_it():
    """Against autograd through W_τ = p_τ W_{τ−1} + ṽ_τᵀũ_τ, with a cost of each change, too."""
    generator = torch.Generator().manual_seed(0)
    shares = [1.0, 0.5, 0.3, 0.8]
    factors = [[torch.randn(3, d, generator=generator, dtype=torch.float64, requires_grad=True) for d in (6, 4)]
               for _ in shares]
    slopes = [torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in shares]
    weight = torch.zeros(4, 6, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    changes = []
    for t, ((keys, values), share) in enumerate(zip(factors, shares, strict=True)):
        changed = values.T @ keys - (1 - share) * weight
        weight = weight + changed
        total = total + 0.9**t * ((slopes[t] * weight).sum() - 0.1 * changed.square().sum())
        changes.append(changed)
    expected = torch.autograd.grad(total, [f for pair in factors for f in pair])
    accumulator = CreditAccumulator("trajectory", key_gradients=True, shrinking=True)
    for t, ((keys, values), share) in enumerate(zip(factors, shares, strict=True)):
        made = ({"a": keys.detach()}, {"a": values.detach()})
        retained = {"a": torch.tensor(share, dtype=torch.float64)} if t else None
        direct = {"updates": {"a": -0.2 * changes[t].detach()}}
        accumulator.take(*made, {"a": slopes[t].clone()}, direct, 0.9**t, retained)
    found = [gradient["a"] for pair in accumulator.finish() for gradient in pair]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_dafnet_goes_on_exactly_from_its_memory(tiny_lm, make_env):
    env = make_env(model=tiny_lm(modules=MODULES), token="all", array_backend="torch", reward="none")
    config = DAFNetConfig(DAFNetNetworkConfig(**SMALL, step_size=0.01))
    agent, other = (DAFNetAgent(env, config, seed=0) for _ in range(2))
    for one in (agent, other):
        moved(one.network)
    observation, _ = env.reset(seed=0)
    agent.observe(observation, adapt=True)
    agent.reset()
    observation, *_ = env.step(agent.predict(observation)[0])
    other.load_memory({k: v.clone() for k, v in agent.memory().items()})
    one, two = agent.predict(observation)[0], other.predict(observation)[0]
    assert set(one) == {"updates"} and all(torch.equal(u, two["updates"][m]) for m, u in one["updates"].items())


def test_an_interrupted_edit_with_dafnet_ends_as_it_would_have(tiny_lm, make_env, facts, tmp_path):
    """Seven facts in batches of two; the last, of one fact, comes in an environment of its own."""
    lm, data = tiny_lm(modules=MODULES), facts("zsre", 7)
    run = {"batch_size": 2, "token": "all"}

    def agent() -> DAFNetAgent:
        made = DAFNetAgent(None, DAFNetConfig(DAFNetNetworkConfig(**SMALL, step_size=0.05)), lm.module_shapes)
        moved(made.network)
        seen = tuple({m: torch.randn(9, s[side], generator=torch.Generator().manual_seed(side)) for m, s in
                      lm.module_shapes.items()} for side in (0, 1))  # fmt: skip
        made.network.observe(*seen, adapt=True)
        return made

    edit_facts(lm, agent(), data, ledger=EditLedger.create(tmp_path / "whole", lm), **run)
    whole = lm.snapshot()
    done = []

    def interrupted(size: int) -> None:
        done.append(size)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edit_facts(lm, agent(), data, progress=interrupted, ledger=EditLedger.create(tmp_path / "cut", lm), **run)
    assert any(not torch.equal(lm.weight(m), w) for m, w in whole.items())
    lm.restore()
    log = edit_facts(lm, agent(), data, ledger=EditLedger.resume(tmp_path / "cut", lm), **run)
    assert log.facts == 7
    assert all(torch.equal(lm.weight(m), w) for m, w in whole.items())
    assert any(not torch.equal(w, lm.original_weight(m)) for m, w in whole.items())


def test_dafnets_actions_are_the_same_in_both_array_backends(tiny_lm, make_env):
    steps = {}
    for backend in ("torch", "numpy"):
        env = make_env(model=tiny_lm(modules=MODULES), token="all", array_backend=backend, reward="none")
        agent = DAFNetAgent(env, DAFNetConfig(DAFNetNetworkConfig(**SMALL, step_size=0.01)))
        run_stream(env, agent, seed=0)
        steps[backend] = {m: env.lm.weight(m).clone() for m in env.lm.module_shapes}
    assert all(torch.equal(steps["torch"][m], steps["numpy"][m]) for m in steps["torch"])


# -- the normaliser


def batches_of(count: int = 3, rows: int = 5) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    return [rows_of(rows, seed) for seed in range(count)]


def joined(keys: dict[str, Tensor], gradients: dict[str, Tensor], module: str) -> Tensor:
    return torch.cat([keys[module], gradients[module]], 1).double()


@pytest.mark.parametrize("config", [malmen_network(rank=2), rledit_paper_network(rank=2),
                                    UltraEditConfig().network()], ids=["malmen", "rledit-paper", "ultraedit"])
def test_modules_of_a_shape_share_moments_that_take_all_of_them_in_first(config):
    """n ← n + N, δ = x̄ − mean, var ← var + N·Var_unbiased + n N δ²/(n + N), std = √(var/(n − 1)), module by module."""
    network = Hypernetwork(SHAPES, config)
    count, mean, var = 0, torch.zeros(10, dtype=torch.float64), torch.zeros(10, dtype=torch.float64)
    for keys, gradients in batches_of():
        record = network.observe(keys, gradients)
        for m in ("a", "c"):
            rows = joined(keys, gradients, m)
            total, shift = count + len(rows), rows.mean(0) - mean
            var = var + len(rows) * rows.var(0) + count * len(rows) * shift**2 / total
            mean = mean + len(rows) * shift / total
            count = total
        std = (var / (count - 1)).sqrt()
        for place, m in enumerate(("a", "c")):
            expected = (joined(keys, gradients, m) - mean) / (std + 2.0**-23)
            torch.testing.assert_close(record.inputs["0"][place].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["mend", "dafnet"])
def test_mends_and_dafnets_modules_share_moments_and_are_normalised_in_turn(kind):
    """Welford's update row by row; each module by the rows up to its own."""
    config = mend_network(rank=2) if kind == "mend" else DAFNetNetworkConfig(**SMALL)
    network = (Hypernetwork if kind == "mend" else DAFNetwork)(SHAPES, config)
    seen: list[Tensor] = []
    for keys, gradients in batches_of():
        record = network.observe(keys, gradients)
        for place, m in enumerate(("a", "c")):
            seen.append(joined(keys, gradients, m))
            rows = torch.cat(seen)
            expected = (seen[-1] - rows.mean(0)) / rows.std(0)
            torch.testing.assert_close(record.inputs["0"][place].double(), expected, rtol=1e-4, atol=1e-4)


def test_ours_is_one_a_module_with_the_variance_of_all_rows():
    settings = {"normaliser_scope": "module", "normaliser_variance": "exact"}
    network = Hypernetwork(SHAPES, malmen_network(rank=2, **settings))
    for keys, gradients in batches_of():
        record = network.observe(keys, gradients)
    rows = torch.cat([joined(k, g, "c") for k, g in batches_of()])
    expected = (joined(keys, gradients, "c") - rows.mean(0)) / rows.std(0)
    torch.testing.assert_close(record.inputs["0"][1].double(), expected, rtol=1e-4, atol=1e-4)


def test_the_published_variance_of_batches_of_twenty_is_too_large():
    """Twenty rows a batch: std is √(21/20) of the exact one, 2.5 % more, in the limit of many batches."""
    exact, published = (Hypernetwork(SHAPES, malmen_network(rank=2, normaliser_variance=v)) for v in
                        ("exact", "published"))  # fmt: skip
    for seed in range(100):
        batch = rows_of(20, seed)
        exact.observe(*batch)
        published.observe(*batch)
    ratio = exact.normalisers["6x4"].moments()[1] / published.normalisers["6x4"].moments()[1]
    torch.testing.assert_close(ratio, torch.full_like(ratio, math.sqrt(21 / 20)), rtol=2e-3, atol=0)


def test_a_continued_normaliser_goes_on_from_training_in_every_stream():
    network = Hypernetwork({"a": (6, 4)}, malmen_network(rank=2))
    trained, first = rows_of(5, 0), rows_of(4, 1)
    network.observe(*trained, adapt=True)
    for _ in range(2):
        network.reset()
        assert float(network.normalisers["6x4"].count) == 5
        network.observe(*first, adapt=False)
        assert float(network.normalisers["6x4"].count) == 9
        network.observe(*first, adapt=False)
        assert float(network.normalisers["6x4"].count) == 13
    network.reset()
    network.observe(*first, adapt=True)
    network.reset()
    assert float(network.normalisers["6x4"].count) == 9


def test_ultraedits_updates_are_the_formula_with_shared_moments(tiny_lm, make_env):
    lm = tiny_lm(modules="model.layers.[2-3].mlp.{gate,up}_proj")
    env = make_env(model=lm, array_backend="torch", reward="none", num_batches=2)
    agent = UltraEditAgent(env, UltraEditConfig(step_size=1e-4))
    observation, _ = env.reset(seed=0)
    count, mean, var = 0, 0.0, 0.0
    for _ in range(2):
        action, _ = agent.predict(observation)
        pairs = {m: (observation["keys"][m].double(), observation["value_gradients"][m].double())
                 for m in lm.module_shapes}
        for u, delta in pairs.values():  # all have one shape
            x = torch.cat([u, delta], 1)
            total, shift = count + len(x), x.mean(0) - mean
            var = var + len(x) * x.var(0) + count * len(x) * shift**2 / total
            mean, count = mean + len(x) * shift / total, total
        for m, (u, delta) in pairs.items():
            z = (torch.cat([u, delta], 1) - mean) / ((var / (count - 1)).sqrt() + 2.0**-23)
            k, g = z[:, : u.shape[1]], z[:, u.shape[1] :]
            v = -1e-4 * k.square().sum(1, keepdim=True) * g
            expected = torch.linalg.solve(u.T @ u + torch.eye(u.shape[1], dtype=torch.float64), u.T @ v).T
            found = (action["values"][m].T @ action["keys"][m]).double()
            torch.testing.assert_close(found, expected, rtol=1e-2, atol=2e-3 * float(expected.abs().max()))
        observation, *_ = env.step(action)


# -- RLEdit's training to the letter


@pytest.fixture
def paper_env(tiny_lm, make_env):
    """Makes the environment that `rledit-paper` is trained in."""

    def make(**arguments):
        lm = tiny_lm(modules="model.layers.[2-3].mlp.{gate,up}_proj")
        settings = {"array_backend": "torch", "reward_gradient": True, "reward": RewardConfig.published()}
        return make_env(**{"model": lm, **settings, **arguments})

    return make


def paper_agent(env, **settings) -> RLEditAgent:
    return RLEditAgent(env, rledit_paper(rledit_paper_network(rank=4), **settings))


def test_one_adam_step_a_trajectory_changes_the_policy(paper_env):
    env = paper_env()
    agent = paper_agent(env)
    before = {n: p.detach().clone() for n, p in agent.network.named_parameters()}
    observation, _ = env.reset(seed=0)
    agent.network.observe(observation["keys"], observation["value_gradients"], adapt=True)
    first = agent.network.factors(agent.observe(observation, adapt=False))
    agent.learn(env.episode_steps, progress_bar=False)
    assert agent.updates == 1
    steps = {n: (p.detach() - before[n]).abs() for n, p in agent.network.named_parameters()}
    assert steps["step_size"].tolist() == pytest.approx([1e-5] * 4, rel=1e-2)  # Adam's first step: the rate, or less
    assert all(float(step.max()) <= 1.01e-5 + 1e-7 for step in steps.values())  # A is of size 1: float32 rounds it
    for name in ("step_size", "log_damping", "networks.0.up.0", "networks.0.shift.3", "networks.0.bias.0"):
        assert steps[name].max() > 5e-6, name
    agent.reset()
    second = agent.network.factors(agent.observe(observation, adapt=False))
    for m in agent.network.shapes:
        # η went from 1e-6 to 1.1e-5 or −9e-6: another policy altogether
        ratio = float(update(second, m).norm() / update(first, m).norm())
        assert ratio > 3


def test_the_published_loss_compares_with_the_previous_weights_and_k_stays_ten_earlier_batches():
    reward, paper = RewardConfig.published(), RewardConfig.paper()
    assert reward.backtracking_depth == paper.backtracking_depth == 10
    assert (reward.locality_reference, paper.locality_reference) == ("previous", "original")
    assert (reward.regularisation_gradient, paper.regularisation_gradient) == (False, True)
    for field in ("backtracking_decay", "regularisation", "backtracking_samples", "batch_stride", "every_step"):
        assert getattr(reward, field) == getattr(paper, field)


def test_the_editor_rledit_paper_is_the_published_training():
    editor = EDITORS["rledit-paper"]
    config, reward = editor.configuration(), editor.reward()
    assert config == rledit_paper() and editor.env == {"token": "answer", "steps_per_batch": 1}
    assert (config.credit, config.clipping, config.max_gradient_norm) == ("step", "running sum", 1.0)
    assert (config.network.rank, config.network.blocks, config.network.step_size) == (1024, 4, 1e-6)
    assert (config.learning_rate, config.step_size_learning_rate, config.drift_limit) == (1e-5, 1e-5, None)
    published = RewardConfig.published()
    for field in dataclasses.fields(RewardConfig):
        if field.name != "components":
            assert getattr(reward, field.name) == getattr(published, field.name), field.name
    assert {n: w for n, (w, _) in reward.components.items()} == {"generalization": 1.0, "locality": 0.6}
    assert (editor.training.trajectories, editor.training.num_batches) == (1, None)  # as long as what is edited
    assert editor.training.select_batches == editor.training.calibrate_batches == 0


def test_the_running_sum_is_clipped_after_every_step(paper_env):
    env = paper_env(num_batches=3)
    single = []  # each step's own gradient
    free = paper_agent(env, max_gradient_norm=1e9)
    moved(free.network, 0.05)
    accumulate, parameters = free.network.accumulate, free.network.learned_parameters()

    def watched(*arguments):
        before = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        accumulate(*arguments)
        single.append(torch.cat([(p.grad - b).flatten() for p, b in zip(parameters, before, strict=True)]))

    free.network.accumulate = watched
    whole = torch.cat([g.flatten() for g in trajectory(free, env, seed=0)[0]])
    assert len(single) == 3
    torch.testing.assert_close(whole, sum(single), rtol=1e-4, atol=1e-5 * float(whole.abs().max()))  # a sum, no mean
    usual = paper_agent(env, max_gradient_norm=1e9, clipping="update")
    moved(usual.network, 0.05)
    mean = torch.cat([g.flatten() for g in trajectory(usual, env, seed=0)[0]])
    torch.testing.assert_close(whole, 3 * mean, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))
    bound = 0.7 * float(single[0].norm())
    clipped = paper_agent(env, max_gradient_norm=bound)
    moved(clipped.network, 0.05)
    found = torch.cat([g.flatten() for g in trajectory(clipped, env, seed=0)[0]])
    expected = torch.zeros_like(whole)
    for gradient in single:
        expected = expected + gradient
        expected = expected * min(1.0, bound / float(expected.norm()))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert not torch.allclose(expected, whole * min(1.0, bound / float(whole.norm())), rtol=0.01)


def previous_kl(lm: EditableLM, env, before: dict[str, Tensor]) -> float:
    """Mean KL(p_{W_{t−1}} ‖ p_{W_t}) at the answer positions of the current batch's unrelated pairs."""
    batch = env.episode.batch - 1
    choices = env.episode.choices[env.episode.places(batch)]
    pairs = zip(env.episode.records(batch), choices, strict=True)
    passages = [p for record, choice in pairs for p in Locality().passages(record, choice)]
    now = lm.answer_states(passages).hidden
    with lm.preserved():
        lm.restore(before)
        old = lm.answer_states(passages).hidden
    return float(kl_divergence(lm.forward, now, old).mean())


def test_locality_is_measured_from_the_weights_of_before_the_step(paper_env):
    env, usual = paper_env(), paper_env(reward=RewardConfig.paper())
    lm = env.lm
    observation, _ = env.reset(seed=0)

    def action(seen, step_size):
        return {"keys": seen["keys"], "values": {m: -step_size * g for m, g in seen["value_gradients"].items()}}

    for step_size in (5.0, 2.0):
        before = lm.snapshot()
        observation, _, _, _, info = env.step(action(observation, step_size))
        assert info["locality"] == pytest.approx(previous_kl(lm, env, before), rel=1e-3) and info["locality"] > 1e-6
    _, _, _, _, info = env.step(action(observation, 0.0))
    assert info["locality"] == pytest.approx(0.0, abs=1e-7)  # though W is far from θ₀
    observation, _ = usual.reset(seed=0)
    for step_size in (5.0, 2.0, 0.0):
        observation, _, _, _, info = usual.step(action(observation, step_size))
    assert info["locality"] > 1e-6


def test_the_regularisation_is_counted_without_a_gradient(paper_env):
    env, usual = paper_env(), paper_env(reward=RewardConfig.paper())
    for one, has_gradient in ((env, False), (usual, True)):
        observation, _ = one.reset(seed=0)
        values = {m: -2.0 * g for m, g in observation["value_gradients"].items()}
        info = one.step({"keys": observation["keys"], "values": values})[4]
        assert info["regularisation"] > 0
        parts = [g for part in info["action_gradient"].values() for g in part.values()]
        assert len(parts) == 2 * len(one.lm.module_shapes) and any(bool(g.any()) for g in parts) == has_gradient


def test_a_vectorised_environment_refuses_a_reward_that_looks_back(tiny_lm, facts):
    import gymnasium as gym

    with pytest.raises(ValueError, match="keeps no weights of before a step"):
        gym.make_vec("RLEdit-ZsRE-v0", num_envs=2, model=tiny_lm(), data=facts(), num_batches=2, batch_size=2,
                     reward=RewardConfig.published())  # fmt: skip


@pytest.mark.parametrize("kind", ["zsre", "counterfact", "fever"])
@pytest.mark.parametrize("model", ["llama-3-8b", "mistral-7b", "gemma-2-9b"])
def test_large_models_are_configured_with_the_published_numbers(model, kind):
    entries = load_configs(find_configs(model), kind)
    config = configured(EDITORS["rledit-paper"], entries).configuration()
    published = rledit_paper(rledit_paper_network(rank=config.network.rank))
    assert config == published and config.network.rank in (512, 1024)
    editor = configured(EDITORS["rledit-paper"], entries)
    reward = editor.reward()
    assert {n: w for n, (w, _) in reward.components.items() if n != "locality"} == {"generalization": 1.0}
    assert reward.components["locality"][0] in (0.6, 0.8)
    for field in ("backtracking_depth", "backtracking_decay", "locality_reference", "regularisation_gradient",
                  "regularisation", "batch_stride", "every_step"):  # fmt: skip
        assert getattr(reward, field) == getattr(RewardConfig.published(), field), field
    assert (editor.training.trajectories, editor.training.num_batches) == (1, None)
    for name, network in (("mend+rledit", mend_network()), ("malmen+rledit", malmen_network())):
        config = configured(EDITORS[name], entries).configuration()
        assert dataclasses.replace(config.network, rank=network.rank) == network
        assert (config.learning_rate, config.step_size_learning_rate) == (1e-5, 1e-5)
    assert configured(EDITORS["mend"], entries).configuration() == MENDConfig()
    assert configured(EDITORS["malmen"], entries).configuration() == MALMENConfig()
    assert configured(EDITORS["dafnet"], entries).configuration() == DAFNetConfig()
    assert configured(EDITORS["ultraedit"], entries).configuration() == UltraEditConfig()
    assert configured(EDITORS["stableedit"], entries).configuration() == StableEditConfig()


# -- every preset trains and goes on


@pytest.mark.parametrize("name", ["mend", "malmen", "malmen+recursion", "dafnet", "mend+rledit", "malmen+rledit",
                                  "rledit-paper", "rledit"])  # fmt: skip
def test_every_preset_trains_moves_its_parameters_and_resumes_as_it_would_have_ended(
    tiny_lm, make_env, tmp_path, name
):
    editor = configured(EDITORS[name], load_configs(find_configs("tiny-llama"), "zsre"))
    lm = tiny_lm(modules="model.layers.[2-3].mlp.{gate,up}_proj")
    settings = {k: v for k, v in editor.env.items() if k != "edit_modules"}
    env = make_env(model=lm, array_backend="torch", reward_gradient=True, reward=editor.reward(),
                   **{"num_batches": 2, **settings})  # fmt: skip

    def agent() -> RLEditAgent:
        made: RLEditAgent = editor.agent_class()(env, editor.configuration(), seed=0)
        return made

    steps = env.episode_steps * agent().config.trajectories_per_update
    start = {n: p.detach().clone() for n, p in agent().network.named_parameters()}
    whole = agent().learn(2 * steps, progress_bar=False, log_dir=tmp_path / "whole")
    agent().learn(steps, progress_bar=False, log_dir=tmp_path / "run")
    resumed = agent().learn(2 * steps, progress_bar=False, log_dir=tmp_path / "run")
    assert whole.updates == resumed.updates == 2
    for (n, one), other in zip(whole.network.named_parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(one, other), n
        if "step_size" in n:
            assert not torch.equal(one.detach(), start[n])
    assert any(not torch.equal(p.detach(), start[n]) for n, p in whole.network.networks.named_parameters("networks"))
    one, other = whole.network.memory_state(), resumed.network.memory_state()
    assert set(one) == set(other) and all(torch.equal(one[k], other[k]) for k in one if k.startswith("normaliser"))
