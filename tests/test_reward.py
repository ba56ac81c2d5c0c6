"""Tests of the reward, against a plain reference computed with the whole model."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rledit_env.encoding import encode
from rledit_env.reward import (
    Efficacy,
    Generalization,
    RewardConfig,
    backtracked,
    frobenius_penalty,
    pick,
    resolve_reward,
)
from rledit_env.scoring import ScoredBatch, score


def reference_losses(lm, original, full_logits, records) -> dict[str, torch.Tensor]:
    """The components of L(B, W), each a mean over answer tokens, from whole models; records have one choice each."""
    encoded = [encode(lm, record) for record in records]

    def likelihood(passages):
        return torch.cat([F.cross_entropy(full_logits(lm, p), torch.tensor(p.targets), reduction="none")
                          for p in passages])

    divergences = []
    for p in (e.unrelated[0] for e in encoded):
        with torch.no_grad():
            before = full_logits(original, p).log_softmax(-1)
        after = full_logits(lm, p).log_softmax(-1)
        divergences.append((before.exp() * (before - after)).sum(-1))
    return {
        "efficacy": likelihood([e.edit for e in encoded]).mean(),
        "generalization": likelihood([e.paraphrases[0] for e in encoded]).mean(),
        "locality": torch.cat(divergences).mean(),
    }


def reference_reward(env, original, full_logits, batch, action, used, decay, depth, regularisation, weights):
    """−(L(B_t, W_t) + Σ μ^i L(B_{t−i}, W_t) + η Σ ‖ΔW‖²), differentiable in the model's weights."""
    def loss(i):
        losses = reference_losses(env.lm, original, full_logits, env.stream.batch(i))
        return sum(weights[name] * losses[name] for name in weights)

    backtracking = sum((decay**i * loss(batch - i) for i in range(1, depth + 1) if batch - i >= 0), torch.zeros(()))
    updates = [torch.as_tensor(action["values"][m][:used]).T @ torch.as_tensor(action["keys"][m][:used])
               for m in env.lm.module_shapes]
    penalty = regularisation * sum(float((u**2).sum()) for u in updates)
    return -(loss(batch) + backtracking + penalty), backtracking, penalty


@pytest.fixture
def original_of():
    """Gives an untouched copy of a model that has not been edited yet."""

    def copied(lm):
        twin = copy.copy(lm)
        twin.model = copy.deepcopy(lm.model)
        return twin

    return copied


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma2", "tiny-gpt2"])
def test_every_part_of_the_papers_reward_is_the_plain_reference_and_so_is_the_gradient(
    tiny_lm, make_env, facts, random_action, full_logits, original_of, name
):
    lm = tiny_lm(name)
    original = original_of(lm)
    components = RewardConfig.paper(locality=0.8).components
    config = RewardConfig(components=components, backtracking_depth=2, backtracking_decay=0.7, regularisation=0.1)
    env = make_env(
        "counterfact", model=lm, data=facts("counterfact", 12, single=True), num_batches=4, reward=config,
        reward_gradient=True,
    )
    observation, _ = env.reset(seed=0)
    modules = dict(lm.model.named_modules())
    for t in range(4):
        action, used = random_action(env, seed=t), int(observation["mask"].sum())
        observation, reward, _, _, info = env.step(action)
        parameters = [modules[m].weight.requires_grad_() for m in lm.module_shapes]
        expected, backtracking, penalty = reference_reward(
            env, original, full_logits, t, action, used, 0.7, 2, 0.1, {"generalization": 1.0, "locality": 0.8}
        )
        gradient = torch.autograd.grad(expected, parameters)
        for parameter in parameters:
            parameter.requires_grad_(False)
        losses = reference_losses(lm, original, full_logits, env.stream.batch(t))
        assert reward == pytest.approx(expected.item(), rel=1e-5)
        assert info["generalization"] == pytest.approx(losses["generalization"].item(), rel=1e-5)
        assert info["locality"] == pytest.approx(losses["locality"].item(), rel=1e-4)
        assert info["backtracking"] == pytest.approx(backtracking.item(), rel=1e-5)
        assert info["regularisation"] == pytest.approx(penalty, rel=1e-4)
        assert "efficacy" not in info
        for m, g in zip(lm.module_shapes, gradient, strict=True):
            wanted = g.t() if name == "tiny-gpt2" else g
            found = torch.as_tensor(info["reward_gradient"][m])
            assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())
    assert info["backtracking"] > 0.5


def test_the_components_are_exact_in_float64(tiny_lm, uneven_facts, full_logits, original_of):
    lm = tiny_lm("tiny-gpt2", dtype=torch.float64)
    original = original_of(lm)
    records = [encode(lm, r) for r in uneven_facts[:3]]
    generator = torch.Generator().manual_seed(0)
    lm.apply(*({m: 0.1 * torch.randn(2, s[side], generator=generator) for m, s in lm.module_shapes.items()}
               for side in (0, 1)))
    config = RewardConfig.with_efficacy()
    scores = score(lm, [ScoredBatch(records, [0.0] * 3, 1.0)], config, gradient=False)
    with torch.no_grad():
        expected = reference_losses(lm, original, full_logits, uneven_facts[:3])
    for name, value in expected.items():
        assert scores.basic[0][name] == pytest.approx(value.item(), rel=1e-10)
    total = sum(config.components[name][0] * value.item() for name, value in expected.items())
    assert scores.total == pytest.approx(total, rel=1e-10)
    assert scores.gradient is None


def test_a_loss_is_a_mean_over_answer_tokens_not_over_records(tiny_lm, uneven_facts):
    lm = tiny_lm()
    records = [encode(lm, r) for r in uneven_facts]
    alone = [score(lm, [ScoredBatch([r], [0.0], 1.0)], RewardConfig(), False).basic[0] for r in records]
    together = score(lm, [ScoredBatch(records, [0.0] * 4, 1.0)], RewardConfig(), False).basic[0]
    tokens = np.array([len(r.edit.targets) for r in records])
    assert len(set(tokens.tolist())) > 2
    by_token = np.average([a["generalization"] for a in alone], weights=tokens)
    assert together["generalization"] == pytest.approx(by_token, rel=1e-5)
    assert together["generalization"] != pytest.approx(np.mean([a["generalization"] for a in alone]), rel=1e-3)


def test_locality_is_zero_for_the_pre_trained_weights(tiny_lm, uneven_facts):
    lm = tiny_lm("tiny-gemma3")
    records = [encode(lm, r) for r in uneven_facts]
    scores = score(lm, [ScoredBatch(records, [0.5] * 4, 1.0)], RewardConfig(), False)
    assert abs(scores.basic[0]["locality"]) < 1e-5


def test_scores_and_gradient_do_not_depend_on_how_passages_are_chunked(tiny_lm, uneven_facts, monkeypatch):
    lm = tiny_lm("tiny-gpt2")
    batches = [ScoredBatch([encode(lm, r) for r in uneven_facts], [0.9] * 4, w) for w in (1.0, 0.5)]
    config = RewardConfig.with_efficacy()
    whole = score(lm, batches, config, True)
    monkeypatch.setattr(lm, "max_tokens_per_pass", 1)
    pieces = score(lm, batches, config, True)
    assert pieces.total == pytest.approx(whole.total, rel=1e-5)
    assert whole.weighted[1] == pytest.approx(0.5 * whole.weighted[0], rel=1e-6)
    for m, g in whole.gradient.items():
        torch.testing.assert_close(pieces.gradient[m], g, atol=1e-6, rtol=1e-3)


def test_one_of_several_paraphrases_is_picked_evenly():
    counts = Counter(pick("abc", choice)[0] for choice in np.linspace(0, 1, 300, endpoint=False))
    assert counts == {"a": 100, "b": 100, "c": 100}
    assert pick("abc", np.nextafter(1, 0)) == ["c"]


def test_a_step_is_scored_with_the_same_choices_throughout_an_episode(make_env, uneven_facts, monkeypatch):
    env = make_env("counterfact", data=uneven_facts, num_batches=4, batch_size=1)
    env.reset(seed=0)
    first = [env.episode.scored(b, 1.0).choices for b in range(4)]
    assert [env.episode.scored(b, 1.0).choices for b in range(4)] == first
    assert len({c for [c] in first}) == 4
    env.reset()
    assert [env.episode.scored(b, 1.0).choices for b in range(4)] != first


# -- backtracking


def test_the_full_sum_weighs_each_existing_earlier_batch_by_its_power():
    config = RewardConfig(backtracking_depth=3, backtracking_decay=0.5)
    rng = np.random.default_rng(0)
    assert backtracked(0, config, rng) == {}
    assert backtracked(2, config, rng) == {1: 0.5, 2: 0.25}
    assert backtracked(9, config, rng) == {1: 0.5, 2: 0.25, 3: 0.125}
    assert backtracked(9, RewardConfig(backtracking_depth=0), rng) == {}


@pytest.mark.parametrize("samples", [1, 2])
def test_sampled_backtracking_is_the_full_sum_on_average(samples):
    config = RewardConfig(backtracking_depth=4, backtracking_decay=0.6, backtracking_samples=samples)
    rng, draws = np.random.default_rng(0), 20000
    mean = np.zeros(5)
    for _ in range(draws):
        weights = backtracked(7, config, rng)
        assert sum(weights.values()) == pytest.approx(0.6 + 0.36 + 0.216 + 0.1296)
        for i, weight in weights.items():
            mean[i] += weight / draws
    np.testing.assert_allclose(mean[1:], [0.6, 0.36, 0.216, 0.1296], rtol=0.05)


def test_sampling_as_many_as_there_are_takes_the_full_sum_and_draws_nothing():
    rng = np.random.default_rng(0)
    state = rng.bit_generator.state
    sampled = RewardConfig(backtracking_samples=5)
    assert backtracked(5, sampled, rng) == backtracked(5, RewardConfig(), rng)
    assert rng.bit_generator.state == state


def test_a_sampled_reward_scores_one_earlier_batch_with_the_whole_weight(make_env, facts, random_action):
    config = RewardConfig(backtracking_decay=0.9, regularisation=0.0)
    sampled = RewardConfig(backtracking_decay=0.9, regularisation=0.0, backtracking_samples=1)
    parts = {}
    for reward in (config, sampled):
        env = make_env("counterfact", data=facts("counterfact", 12, single=True), num_batches=3, reward=reward)
        env.reset(seed=0, options={"indices": range(6)})
        for step in range(3):
            *_, info = env.step(random_action(env, seed=step))
        parts[reward.backtracking_samples] = info["backtracking"]
        encoded = [score(env.lm, [env.episode.scored(b, 1.0)], reward, False).total for b in (1, 0)]
    assert parts[None] == pytest.approx(0.9 * encoded[0] + 0.81 * encoded[1], rel=1e-5)
    assert min(abs(parts[1] - 1.71 * loss) for loss in encoded) < 1e-4


# -- what may be replaced


class Confidence:
    """A user's own component: the probability of the target on all paraphrases."""

    needs_reference = False

    def passages(self, record, choice):
        return record.paraphrases

    def loss(self, lm, hidden, targets, reference):
        assert reference is None
        return lm.log_probabilities(hidden).gather(1, targets[:, None])[:, 0].exp()


class Nothing(Confidence):
    """A component that finds nothing to score."""

    def passages(self, record, choice):
        return []


class Distance:
    """A component on the final states themselves."""

    needs_reference = True

    def passages(self, record, choice):
        return [record.edit, *record.unrelated]

    def loss(self, lm, hidden, targets, reference):
        return (hidden - reference).square().sum(-1)


def test_a_users_own_component_takes_the_place_of_another(make_env, uneven_facts, random_action, full_logits):
    config = RewardConfig(backtracking_depth=0, regularisation=0.0).replace("locality", 3.0, Confidence())
    env = make_env("counterfact", data=uneven_facts, num_batches=1, batch_size=4, reward=config, reward_gradient=True)
    env.reset(seed=0)
    _, reward, _, _, info = env.step(random_action(env))
    with torch.no_grad():
        chances = [full_logits(env.lm, p).softmax(-1).gather(1, torch.tensor(p.targets)[:, None])
                   for r in env.stream.batch(0) for p in encode(env.lm, r).paraphrases]
    assert info["locality"] == pytest.approx(float(torch.cat(chances).mean()), rel=1e-4)
    assert reward == pytest.approx(-(info["generalization"] + 3.0 * info["locality"]), rel=1e-6)


def test_a_component_may_compare_with_the_pre_trained_states(make_env, uneven_facts, random_action):
    config = RewardConfig(components={"distance": (2.0, Distance())}, regularisation=0.0)
    env = make_env("counterfact", data=uneven_facts, num_batches=1, batch_size=4, reward=config)
    env.reset(seed=0)
    _, reward, _, _, info = env.step(random_action(env))
    passages = [p for r in env.stream.batch(0) for e in [encode(env.lm, r)] for p in (e.edit, *e.unrelated)]
    edited, original = env.lm.answer_states(passages).hidden, torch.cat(env.lm.reference_states(passages))
    assert info["distance"] == pytest.approx(float((edited - original).square().sum(-1).mean()), rel=1e-4)
    assert reward == pytest.approx(-2.0 * info["distance"], rel=1e-6)


def test_a_component_that_finds_nothing_to_score_costs_nothing(make_env, random_action):
    only = RewardConfig(components={"nothing": (1.0, Nothing())}, regularisation=0.0)
    both = RewardConfig().replace("nothing", 1.0, Nothing())
    for config, gradient in ((both, True), (both, False), (only, True), (only, False)):
        env = make_env(reward=config, reward_gradient=gradient)
        env.reset(seed=0)
        _, reward, terminated, _, info = env.step(random_action(env))
        assert not terminated and not info["diverged"]
        assert info["nothing"] == 0.0
        assert reward == pytest.approx(-(info.get("generalization", 0) + 0.6 * info.get("locality", 0)
                                         + info["regularisation"]), rel=1e-6)


def test_the_penalty_is_the_squared_norm_of_the_update_without_a_dense_matrix():
    generator = torch.Generator().manual_seed(0)
    keys, values = ({m: torch.randn(5, w, generator=generator) for m, w in (("a", wa), ("b", wb))}
                    for wa, wb in ((4, 7), (6, 3)))
    dense = sum(float((values[m].T @ keys[m]).square().sum()) for m in "ab")
    assert float(frobenius_penalty(keys, values)) == pytest.approx(dense, rel=1e-5)


@pytest.mark.parametrize(
    "penalty",
    [frobenius_penalty, lambda keys, values: sum(v.square().sum() for v in values.values())],
    ids=["frobenius", "own, of the values only"],
)
def test_the_actions_own_gradient_is_that_of_the_regularisation(make_env, random_action, penalty):
    config = RewardConfig(regularisation=0.3, penalty=penalty)
    env = make_env(reward=config, reward_gradient=True, array_backend="torch")
    observation, _ = env.reset(seed=0)
    used = len(observation["mask"])
    action = {p: {m: torch.as_tensor(f[:used]).requires_grad_() for m, f in fs.items()}
              for p, fs in random_action(env).items()}
    *_, info = env.step(action)
    loss = 0.3 * penalty(action["keys"], action["values"])
    assert info["regularisation"] == pytest.approx(float(loss.detach()), rel=1e-5)
    leaves = [f for fs in action.values() for f in fs.values()]
    expected = iter(torch.autograd.grad(-loss, leaves, materialize_grads=True))
    for part in ("keys", "values"):
        for m in action[part]:
            torch.testing.assert_close(info["action_gradient"][part][m], next(expected))


def test_the_reward_is_never_below_its_floor(make_env, random_action):
    env = make_env(reward=RewardConfig(floor=-1.5))
    env.reset(seed=0)
    _, reward, _, _, info = env.step(random_action(env))
    assert reward == -1.5
    assert info["generalization"] > 1.5 and not info["diverged"]


def test_without_scoring_every_step_only_the_last_presentation_of_a_batch_is_scored(make_env, random_action):
    rewards = {}
    for every_step in (True, False):
        config = RewardConfig(every_step=every_step)
        env = make_env(steps_per_batch=3, num_batches=2, reward=config, reward_gradient=True)
        env.reset(seed=0)
        results = [env.step(random_action(env, seed=step)) for step in range(6)]
        rewards[every_step] = [r[1] for r in results]
        scored = ["generalization" in r[4] for r in results]
        assert scored == ["reward_gradient" in r[4] for r in results]
        assert scored == ([True] * 6 if every_step else [False, False, True] * 2)
        for r in results:
            if "generalization" not in r[4]:
                assert r[1] == -r[4]["regularisation"] < 0
    assert [rewards[False][i] for i in (2, 5)] == pytest.approx([rewards[True][i] for i in (2, 5)], rel=1e-5)


def test_with_a_stride_every_batch_is_scored_as_often_and_weighs_the_more_for_it(make_env, random_action):
    stride, firsts = 3, set()
    for seed in range(12):
        results = {}
        for batch_stride in (1, stride):
            env = make_env(num_batches=4, reward=RewardConfig(batch_stride=batch_stride), reward_gradient=True)
            env.reset(seed=seed)
            results[batch_stride] = [env.step(random_action(env, seed=step)) for step in range(4)]
        scored = [step for step, result in enumerate(results[stride]) if "generalization" in result[4]]
        firsts.add(scored[0])
        assert scored == list(range(scored[0], 4, stride))
        for step, (one, every) in enumerate(zip(results[stride], results[1], strict=True)):
            penalty = every[4]["regularisation"]
            factor = stride if step in scored else 0
            assert one[1] == pytest.approx(factor * (every[1] + penalty) - penalty, rel=1e-5)
            if step in scored:
                assert one[4]["backtracking"] == pytest.approx(every[4]["backtracking"], rel=1e-5)
                for m, gradient in one[4]["reward_gradient"].items():
                    np.testing.assert_allclose(gradient, stride * every[4]["reward_gradient"][m], rtol=1e-4, atol=1e-6)
    assert firsts == set(range(stride))


def test_the_names_of_rewards_are_known():
    assert set(resolve_reward(None).components) == {"generalization", "locality"}
    assert set(resolve_reward("paper").components) == {"generalization", "locality"}
    assert set(resolve_reward("efficacy").components) == {"efficacy", "generalization", "locality"}
    assert isinstance(resolve_reward("efficacy").components["efficacy"][1], Efficacy)
    assert resolve_reward("none") is None
    own = RewardConfig(floor=-5)
    assert resolve_reward(own) is own
    with pytest.raises(ValueError, match="reward is 'papier'; give None or 'paper'"):
        resolve_reward("papier")


def test_the_papers_values_are_the_defaults():
    config = RewardConfig()
    assert {n: w for n, (w, _) in config.components.items()} == {"generalization": 1.0, "locality": 0.6}
    assert (config.backtracking_depth, config.backtracking_decay, config.regularisation) == (10, 0.95, 1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backtracking_depth": -1}, "backtracking_depth is -1"),
        ({"backtracking_samples": 0}, "backtracking_samples is 0"),
        ({"batch_stride": 0}, "batch_stride is 0"),
        ({"floor": 0.0}, "floor is 0.0; give a negative reward"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        RewardConfig(**arguments)


def test_an_interrupted_gradient_leaves_nothing_behind_for_the_next(tiny_lm, facts, monkeypatch):
    lm = tiny_lm(modules="model.layers.[1-2].mlp.*")
    records = [encode(lm, record) for record in facts("counterfact", 4).records]
    batches = [ScoredBatch(records, [0.0] * len(records), 1.0)]
    expected = score(lm, batches, RewardConfig(), gradient=True).gradient
    passes = []

    class Interrupted(Generalization):
        def loss(self, lm, hidden, targets, reference):
            if hidden.requires_grad:
                hidden.register_hook(lambda _: self.interrupt())
            return super().loss(lm, hidden, targets, reference)

        def interrupt(self):
            passes.append(1)
            if len(passes) == 2:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lm, "max_tokens_per_pass", 1)  # several passes: the first is added up, the second interrupted
        with pytest.raises(KeyboardInterrupt):
            score(lm, batches, RewardConfig().replace("generalization", 1.0, Interrupted()), gradient=True)
    assert len(passes) == 2
    assert all(p.grad is None and not p.requires_grad for p in lm.model.parameters())
    again = score(lm, batches, RewardConfig(), gradient=True).gradient
    assert all(torch.equal(g, expected[m]) for m, g in again.items())
