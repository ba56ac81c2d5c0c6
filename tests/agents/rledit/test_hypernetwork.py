"""Tests of the hypernetwork."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agents.rledit.blocks import ResidualBlock
from agents.rledit.config import AGGREGATIONS, HypernetworkConfig
from agents.rledit.hypernetwork import Hypernetwork
from agents.rledit.normaliser import RunningNormaliser
from rledit_env.wrappers import ridge_keys

SHAPES = {"a": (6, 4), "b": (4, 6), "c": (6, 4)}


def batch(rows: int, seed: int = 0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return tuple({m: 3 + 2 * torch.randn(rows, s[side], generator=generator) for m, s in shapes.items()}
                 for side in (0, 1))


def network(seed: int = 0, **settings) -> Hypernetwork:
    return Hypernetwork(SHAPES, HypernetworkConfig(**{"rank": 3, "blocks": 2, "step_size": 0.1, **settings}), seed)


def moved(net: Hypernetwork) -> Hypernetwork:
    """With parameters away from their start."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return net


def standardised(keys, gradients, module) -> torch.Tensor:
    rows = torch.cat([keys[module], gradients[module]], dim=1)
    return (rows - rows.mean(0)) / rows.std(0)


# -- the normaliser


def test_running_moments_are_those_of_all_rows_seen():
    normaliser, rows = RunningNormaliser(5), 100 + 3 * torch.randn(57, 5, generator=torch.Generator().manual_seed(0))
    for piece in rows.split([1, 20, 3, 33]):
        normaliser.update(piece)
        normaliser.update(rows[:0])
    mean, scale = normaliser.moments()
    np.testing.assert_allclose(mean, rows.double().mean(0), rtol=1e-5)
    np.testing.assert_allclose(1 / scale, rows.double().std(0), rtol=1e-3)


def test_a_stream_normaliser_starts_anew_at_a_reset_and_a_lifetime_normaliser_does_not():
    for kind, expected in (("stream", 0), ("lifetime", 7)):
        net = network(normaliser=kind)
        net.observe(*batch(7))
        net.reset()
        assert {float(n.count) for n in net.normalisers.values()} == {expected}


def test_a_lifetime_normaliser_stays_as_it_is_outside_training_and_a_stream_normaliser_adapts():
    for kind, expected in (("stream", 10), ("lifetime", 7)):
        net = network(normaliser=kind)
        net.observe(*batch(7), adapt=True)
        net.observe(*batch(3, seed=1), adapt=False)
        assert {float(n.count) for n in net.normalisers.values()} == {expected}


# -- what it computes


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_untrained_network_is_the_identity(aggregation):
    with_blocks, without = (network(aggregation=aggregation, blocks=blocks) for blocks in (2, 0))
    factors = [net.factors(net.observe(*batch(5))) for net in (with_blocks, without)]
    for mine, plain in zip(*factors, strict=True):
        assert all(torch.equal(mine[m], plain[m]) for m in SHAPES)


@pytest.mark.parametrize("warm", [False, True])
def test_in_the_units_of_its_input_the_untrained_network_is_ridge_regression_on_the_gradient_itself(warm):
    net = network(aggregation="least_squares", damping=0.7, output_units="input")
    if warm:
        moments = {m: RunningNormaliser(sum(s)) for m, s in SHAPES.items()}
        for m, (keys, gradients) in {m: (batch(30, 4)[0][m], batch(30, 4)[1][m]) for m in SHAPES}.items():
            moments[m].update(torch.cat([keys, gradients], 1))
        net.start_from(moments)
    for seed in range(2):  # the moments of the stream change from batch to batch, and the rule does not
        keys, gradients = batch(5, seed)
        update_keys, values = net.factors(net.observe(keys, gradients))
        for m, u in keys.items():
            np.testing.assert_allclose(update_keys[m].detach(), ridge_keys(u, 0.7), rtol=1e-3, atol=1e-5)
            expected = -0.1 * u.square().sum(1, keepdim=True) * gradients[m]
            np.testing.assert_allclose(values[m].detach(), expected, rtol=1e-4, atol=1e-4)


def test_in_the_units_of_its_input_the_second_pass_of_some_modules_gives_what_the_first_gave():
    net = moved(network(aggregation="least_squares", output_units="input"))
    record = net.observe(*batch(5))
    whole, some = net.factors(record), net.factors(record, ["c"])
    for part, piece in zip(whole, some, strict=True):
        np.testing.assert_allclose(piece["c"].detach(), part["c"].detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("coefficient", ["key", "normalised"])
def test_without_blocks_least_squares_fits_the_normalised_gradients(coefficient):
    net = network(aggregation="least_squares", blocks=0, damping=0.7, coefficient=coefficient)
    keys, gradients = batch(5)
    update_keys, values = net.factors(net.observe(keys, gradients))
    for m, (d_in, _) in SHAPES.items():
        u, z = keys[m], standardised(keys, gradients, m)
        left = u if coefficient == "key" else z[:, :d_in]
        v = torch.stack([-0.1 * (left[i] @ z[i, :d_in]) * z[i, d_in:] for i in range(5)])
        expected = v.T @ u @ torch.linalg.inv(u.T @ u + 0.7 * torch.eye(d_in))
        torch.testing.assert_close(values[m].T @ update_keys[m], expected, atol=1e-4, rtol=1e-3)


def test_mend_takes_the_transformed_key_and_the_scaled_transformed_gradient():
    net = network(aggregation="mend", blocks=0)
    keys, gradients = batch(5)
    update_keys, values = net.factors(net.observe(keys, gradients))
    for m, (d_in, _) in SHAPES.items():
        z = standardised(keys, gradients, m)
        torch.testing.assert_close(update_keys[m], z[:, :d_in], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(values[m], -0.1 * z[:, d_in:], atol=1e-5, rtol=1e-4)


def test_a_residual_block_is_its_formula_with_scale_and_shift_by_module():
    net = moved(network(blocks=1))
    z = torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(0))
    block = net.networks[next(group for group, members in net.groups.items() if members == ["a", "c"])]
    result = block(z, [0, 1])
    for member in range(2):
        inner = torch.relu(z[member] @ block.down[0] @ block.up[0] + block.bias[0])
        expected = z[member] + block.scale[0][member] * inner + block.shift[0][member]
        torch.testing.assert_close(result[member], expected)
    assert list(net.groups.values()) == [["a", "c"], ["b"]]
    torch.testing.assert_close(block(z[1:], [1]), result[1:])
    torch.testing.assert_close(block(z.flip(0), [1, 0]).flip(0), result)
    assert not torch.equal(block(z.flip(0), [0, 1]).flip(0), result)


def test_a_residual_blocks_gradient_is_that_of_its_formula():
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 5, 6), (6, 3), (3, 6), (6,), (2, 6), (2, 6)]
    arguments = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(lambda *a: ResidualBlock.apply(*a, a[1].detach(), a[2].detach()), arguments)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_products_in_bfloat16_give_nearly_the_same_factors_and_gradients(aggregation):
    results = []
    for precision in ("float32", "bfloat16"):
        net = moved(network(aggregation=aggregation, precision=precision))
        factors = net.factors(net.observe(*batch(5)))
        learned = list(net.networks.parameters())
        gradients = torch.autograd.grad(sum(f[m].square().sum() for f in factors for m in SHAPES), learned)
        results.append([*[f[m].detach() for f in factors for m in SHAPES], *gradients])
        assert {r.dtype for r in results[-1]} == {torch.float32}
    differences = [float((a - b).norm() / a.norm()) for a, b in zip(*results, strict=True)]
    assert 1e-5 < max(differences) < 0.03


def test_products_in_bfloat16_follow_the_parameters():
    net = moved(network(precision="bfloat16"))
    record = net.observe(*batch(5))
    before = net.factors(record)[1]["a"]
    moved(net)
    other = network(precision="bfloat16")
    other.load_state_dict(net.state_dict())
    assert torch.equal(net.factors(record)[1]["a"], other.factors(record)[1]["a"])
    assert not torch.equal(net.factors(record)[1]["a"], before)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_every_parameter_that_is_learned_takes_a_gradient_and_each_module_has_its_own_step_size(aggregation):
    net = moved(network(aggregation=aggregation))
    keys, values = net.factors(net.observe(*batch(5)))
    sum((values[m].T @ keys[m]).square().sum() for m in SHAPES).backward()
    learned = {n: p for n, p in net.named_parameters() if p.requires_grad}
    assert ("log_damping" in learned) == (aggregation == "least_squares")
    assert all(p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any() for p in learned.values())
    assert len(set(net.log_step_size.grad.tolist())) == 3


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_blocks_of_an_untrained_network_learn_from_the_first_update_on(aggregation):
    net = network(aggregation=aggregation)
    data, generator = batch(5), torch.Generator().manual_seed(0)
    cotangents = [{m: torch.randn(5, s[side], generator=generator) for m, s in SHAPES.items()} for side in (0, 1)]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    start = {n: p.detach().clone() for n, p in net.named_parameters() if p.requires_grad}
    for update in range(2):
        net.reset()
        factors = net.factors(net.observe(*data))
        optimizer.zero_grad()
        sum((f[m] * c[m]).sum() for f, c in zip(factors, cotangents, strict=True) for m in SHAPES).backward()
        optimizer.step()
        same = {n.split(".")[-2] for n, p in net.named_parameters() if n in start and torch.equal(p, start[n])}
        # A and the scales wait for B and b, which start at zero.
        assert same <= {"down", "scale"} if update == 0 else not same


def test_damping_may_be_held_fixed():
    assert not network(aggregation="least_squares", learn_damping=False).log_damping.requires_grad


def test_the_recursions_first_batch_is_plain_least_squares():
    data = batch(5)
    recursive, plain = (network(aggregation=a, damping=0.5) for a in ("recursive", "least_squares"))
    (k1, v1), (k2, v2) = (net.factors(net.observe(*data)) for net in (recursive, plain))
    for m in SHAPES:
        torch.testing.assert_close(v1[m].T @ k1[m], v2[m].T @ k2[m], atol=1e-4, rtol=1e-3)


def test_the_recursions_later_updates_avoid_the_directions_of_earlier_keys():
    shapes = {"a": (40, 8)}
    disturbance = {}
    for aggregation in ("recursive", "least_squares"):
        net = Hypernetwork(shapes, HypernetworkConfig(rank=3, blocks=0, aggregation=aggregation, damping=0.1))
        earlier, later = batch(5, seed=1, shapes=shapes), batch(5, seed=2, shapes=shapes)
        net.observe(*earlier)
        keys, values = net.factors(net.observe(*later))
        update = (values["a"].T @ keys["a"]).detach()
        effects = [float((u["a"] @ update.T).norm()) for u, _ in (earlier, later)]
        disturbance[aggregation] = effects[0] / effects[1]
    assert disturbance["recursive"] < 0.1 * disturbance["least_squares"]


def test_a_reset_clears_the_recursions_memory():
    net = network()
    first = net.factors(net.observe(*batch(5)))[0]
    assert not torch.equal(net.factors(net.observe(*batch(5)))[0]["a"], first["a"])
    net.reset()
    assert net.key_memory.inverses == {}
    assert torch.equal(net.factors(net.observe(*batch(5)))[0]["a"], first["a"])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_batch_without_rows_gives_no_rows_and_disturbs_nothing(aggregation):
    nets = [network(aggregation=aggregation) for _ in range(2)]
    for net in nets:
        net.observe(*batch(5))
    keys, values = nets[0].factors(nets[0].observe(*batch(0)))
    assert {m: (tuple(keys[m].shape), tuple(values[m].shape)) for m in SHAPES} == {
        m: ((0, s[0]), (0, s[1])) for m, s in SHAPES.items()
    }
    after = [net.factors(net.observe(*batch(4, seed=3))) for net in nets]
    for one, other in zip(*after, strict=True):
        assert all(torch.allclose(one[m], other[m], atol=1e-6) for m in SHAPES)


def test_the_second_pass_gives_what_the_first_gave():
    net = moved(network())
    records = [net.observe(*batch(4, seed=s)) for s in range(3)]
    first = [net.factors(r) for r in records]
    assert all(torch.equal(a[m], b[m]) for f, r in zip(first, records, strict=True)
               for a, b in zip(f, net.factors(r), strict=True) for m in SHAPES)


# -- its state


def test_the_seed_decides_the_parameters_and_the_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    one, same, other = network(1).state_dict(), network(1).state_dict(), network(2).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not torch.equal(one["networks.0.down.0"], other["networks.0.down.0"])


@pytest.mark.parametrize("kind", ["stream", "lifetime"])
def test_memory_put_into_another_network_continues_the_stream(kind):
    one, other = moved(network(normaliser=kind)), moved(network(normaliser=kind))
    one.observe(*batch(5))
    other.load_memory_state({k: v.clone() for k, v in one.memory_state().items()})
    results = [net.factors(net.observe(*batch(4, seed=1))) for net in (one, other)]
    assert all(torch.equal(a[m], b[m]) for a, b in zip(*results, strict=True) for m in SHAPES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"aggregation": "mean"}, "aggregation is 'mean'; give one of mend, least_squares, recursive"),
        ({"normaliser": "none"}, "normaliser is 'none'"),
        ({"step_size": 0.0}, "step_size is 0.0; give a positive number"),
        ({"damping": -1.0}, "damping is -1.0"),
        ({"rank": 0}, "rank is 0"),
        ({"block": "relu"}, "block is 'relu'; give 'malmen' or 'mend'"),
        ({"coefficient": "one"}, "coefficient is 'one'; give 'key' or 'normalised'"),
        ({"precision": "half"}, "precision is 'half'; give 'float32' or 'bfloat16'"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        HypernetworkConfig(**settings)


# -- the prior


def test_the_recursion_starts_from_the_second_moment_of_the_keys_it_has_gathered():
    net = network(aggregation="recursive", blocks=0, damping=0.7, prior=9.0)
    seen = [batch(rows, seed=seed)[0] for rows, seed in ((5, 1), (12, 2))]
    for keys in seen:
        net.key_memory.gather(keys)
    streamed = [batch(4, seed=seed) for seed in (3, 4)]
    for _ in range(2):  # the second stream starts where the first did
        net.reset()
        records = [net.observe(*b) for b in streamed]
        for m, (d_in, _) in SHAPES.items():
            rows = torch.cat([keys[m] for keys in seen])
            system = 0.7 * torch.eye(d_in) + 9.0 * rows.T @ rows / 17
            for (keys, _), record in zip(streamed, records, strict=True):
                system = system + keys[m].T @ keys[m]
                expected = keys[m] @ torch.linalg.inv(system)
                torch.testing.assert_close(record.update_keys[m], expected, atol=1e-4, rtol=1e-3)


def test_without_a_prior_or_before_anything_is_gathered_the_recursion_starts_from_the_damping_alone():
    keys, gradients = batch(4)
    expected = network(aggregation="recursive", prior=0.0).observe(keys, gradients).update_keys
    not_yet = network(aggregation="recursive", prior=9.0)
    assert not_yet.wants_prior and not network(aggregation="recursive", prior=0.0).wants_prior
    assert not network(aggregation="least_squares", prior=9.0).wants_prior
    mine = not_yet.observe(keys, gradients).update_keys
    assert all(torch.equal(mine[m], expected[m]) for m in SHAPES)
    not_yet.key_memory.gather(keys)
    assert not not_yet.wants_prior


def test_a_prior_that_was_saved_is_the_same_when_loaded():
    net, other = (network(aggregation="recursive", prior=9.0) for _ in range(2))
    net.key_memory.gather(batch(20)[0])
    other.key_memory.load_prior_state(net.key_memory.prior_state())
    assert all(torch.equal(net.key_memory.second_moments[m], other.key_memory.second_moments[m]) for m in SHAPES)
    assert not other.wants_prior


def test_a_negative_prior_is_refused():
    with pytest.raises(ValueError, match="prior is -1"):
        HypernetworkConfig(prior=-1)
