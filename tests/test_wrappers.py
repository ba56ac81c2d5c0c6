"""Tests of rledit_env.wrappers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import (
    NormalizeObservation,
    RecordEpisodeStatistics,
    RecordVideo,
    TimeLimit,
    TransformReward,
)
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import rledit_env  # noqa: F401 - registers the environments
from rledit_env.wrappers import FlattenFactors, GradientFeatures, RelativeReward, ScaledUpdate, module_groups

MODULES = "model.layers.[1-2].mlp.{up,down}_proj"


def make(**arguments: Any) -> gym.Env[Any, Any]:
    settings = {"model": "tiny-llama", "edit_modules": MODULES, "num_batches": 3, "batch_size": 2, **arguments}
    return gym.make("RLEdit-ZsRE-v0", **settings)


VIEWS = {
    "features": lambda **a: GradientFeatures(make(**a)),
    "scaled gradient": lambda **a: GradientFeatures(ScaledUpdate(make(**a), "gradient", rank=2)),
    "scaled least squares": lambda **a: GradientFeatures(ScaledUpdate(make(**a))),
    "shared": lambda **a: GradientFeatures(ScaledUpdate(make(**a), rank=1, share="kind"), "all"),
    "relative": lambda **a: RelativeReward(GradientFeatures(ScaledUpdate(make(**a))), streams=2),
    "flat": lambda **a: FlattenFactors(make(**a)),
}
VIEWS_OF_BOXES = ["scaled gradient", "scaled least squares", "shared", "relative", "flat"]


@pytest.mark.filterwarnings("error:.*(action|Stable|SB3|symmetric)")
@pytest.mark.parametrize("view", VIEWS_OF_BOXES)
def test_every_view_passes_gymnasium_s_and_stable_baselines3_s_checks(view: str) -> None:
    env = VIEWS[view](edit_modules="model.layers.1.mlp.up_proj", num_batches=2)
    check_env(env, skip_render_check=True)
    sb3_check_env(env)


def test_an_observation_view_passes_gymnasium_s_check() -> None:
    check_env(VIEWS["features"](edit_modules="model.layers.1.mlp.up_proj"), skip_render_check=True)


@pytest.mark.parametrize("view", VIEWS_OF_BOXES)
def test_gymnasium_s_own_wrappers_work_on_every_view(view: str) -> None:
    env: Any = VIEWS[view](edit_modules="model.layers.1.mlp.up_proj")
    env = TransformReward(NormalizeObservation(RecordEpisodeStatistics(TimeLimit(env, 2))), lambda r: r / 10)
    env.reset(seed=0)
    zero = np.zeros(env.action_space.shape, np.float32)
    _, first, _, truncated, _ = env.step(zero)
    assert not truncated
    _, second, terminated, truncated, info = env.step(zero)
    assert truncated and not terminated
    assert info["episode"]["l"] == 2
    assert info["episode"]["r"] == pytest.approx(10 * (first + second), rel=1e-4, abs=1e-6)


def test_gymnasium_s_own_wrappers_work_on_the_raw_environment() -> None:
    """All but NormalizeObservation, which Gymnasium does not define for observations that are dictionaries."""
    env: Any = make()
    env = TransformReward(RecordEpisodeStatistics(TimeLimit(env, 2)), lambda r: r / 10)
    observation, _ = env.reset(seed=0)
    rewards = []
    for _ in range(2):
        values = {m: -0.1 * g for m, g in observation["value_gradients"].items()}
        observation, reward, _, truncated, info = env.step({"keys": observation["keys"], "values": values})
        assert env.observation_space.contains(observation)
        rewards.append(reward)
    assert truncated and info["episode"]["l"] == 2
    assert info["episode"]["r"] == pytest.approx(10 * sum(rewards), rel=1e-4)


@pytest.mark.parametrize("view", ["raw", *VIEWS_OF_BOXES])
@pytest.mark.filterwarnings("ignore:.*Overwriting existing videos:UserWarning")
def test_a_video_is_recorded_of_every_view(view: str, tmp_path: Path) -> None:
    pytest.importorskip("moviepy")
    pytest.importorskip("matplotlib")
    arguments = {"edit_modules": "model.layers.1.mlp.up_proj", "num_batches": 2, "render_mode": "rgb_array"}
    env: Any = RecordVideo(VIEWS[view](**arguments) if view in VIEWS else make(**arguments), str(tmp_path))
    observation, _ = env.reset(seed=0)
    done = False
    while not done:
        if view == "raw":
            action: Any = {"keys": observation["keys"], "values": observation["value_gradients"]}
        else:
            action = np.zeros(env.action_space.shape, np.float32)
        observation, _, done, _, _ = env.step(action)
    env.close()
    assert [path.stat().st_size > 0 for path in tmp_path.glob("*.mp4")] == [True]


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_features_are_what_the_table_says(backend: str) -> None:
    raw: Any = make(array_backend=backend)
    env = GradientFeatures(ScaledUpdate(raw, "gradient", step_size=0.5))
    seen, _ = env.reset(seed=0)
    assert np.all(seen[[2, 3, 6, 7, 10, 11, 14, 15]] == 0) and seen[-1] == -1  # nothing edited, nothing done
    seen, *_ = env.step(np.zeros(4, np.float32))
    inner: Any = raw.unwrapped
    observation = env.get_wrapper_attr("_observation")
    rows = int(observation["mask"].sum())
    for i, m in enumerate(inner.lm.module_shapes):
        u, delta = (torch.as_tensor(observation[part][m])[:rows] for part in ("keys", "value_gradients"))
        change = inner.lm.weight(m) - inner.lm.original_weight(m)
        gradient = delta.T @ u
        expected = [
            torch.log10(u.norm() / rows**0.5) / 6,
            torch.log10(delta.norm() / rows**0.5) / 6,
            (gradient * change).sum() / gradient.norm() / change.norm(),
            torch.tanh(change.norm() / inner.lm.original_weight(m).norm()),
        ]
        np.testing.assert_allclose(seen[4 * i : 4 * i + 4], torch.stack(expected), rtol=1e-3, atol=1e-5)
    loss = float(observation["edit_loss"][0])
    np.testing.assert_allclose(seen[-2:], [loss / (1 + loss), 2 / 3 - 1], rtol=1e-5)


def test_features_stay_in_bounds_when_the_weights_explode() -> None:
    env = GradientFeatures(ScaledUpdate(make(), "gradient", step_size=1e4))
    seen, _ = env.reset(seed=0)
    for _ in range(3):
        seen, _, terminated, _, _ = env.step(np.ones(4, np.float32))
        assert env.observation_space.contains(seen)
        if terminated:
            break


# The norms in the model keep its losses finite for a while, however large its weights are.
@pytest.mark.parametrize(("step_size", "breaks"), [(1e12, False), (1e20, True), (1e30, True)])
@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_features_are_numbers_in_bounds_even_of_a_model_that_broke(
    step_size: float, breaks: bool, backend: str
) -> None:
    env = GradientFeatures(ScaledUpdate(make(array_backend=backend), "gradient", step_size=step_size))
    env.reset(seed=0)
    seen, reward, terminated, _, info = env.step(np.ones(env.action_space.shape, np.float32))
    assert np.isfinite(seen).all() and env.observation_space.contains(seen) and np.isfinite(reward)
    assert (terminated, info["diverged"]) == (breaks, breaks)


def test_features_of_what_follows_the_last_batch_speak_of_the_weights_alone() -> None:
    env: Any = GradientFeatures(ScaledUpdate(make(num_batches=1), "gradient", step_size=0.5))
    env.reset(seed=0)
    seen, _, terminated, _, _ = env.step(np.zeros(env.action_space.shape, np.float32))
    by_module = seen[:-2].reshape(-1, 4)
    assert terminated and env.observation_space.contains(seen)
    assert (by_module[:, :2] == -1).all() and (by_module[:, 2] == 0).all()  # no rows: the least norms, no direction
    assert (by_module[:, 3] > 0).all() and seen[-2:].tolist() == [0, 1]


def test_features_of_modules_that_hold_their_weights_transposed_are_the_same_formula() -> None:
    raw: Any = make(model="tiny-gpt2", edit_modules="transformer.h.[1-2].mlp.c_fc", array_backend="torch")
    env = GradientFeatures(ScaledUpdate(raw, "gradient", step_size=0.5))
    env.reset(seed=0)
    seen, *_ = env.step(np.zeros(env.action_space.shape, np.float32))
    observation, lm = env.get_wrapper_attr("_observation"), raw.unwrapped.lm
    for i, m in enumerate(lm.module_shapes):
        gradient = observation["value_gradients"][m].T @ observation["keys"][m]
        change = lm.weight(m) - lm.original_weight(m)
        assert gradient.shape == change.shape and change.norm() > 0
        cosine = float((gradient * change).sum() / gradient.norm() / change.norm())
        assert seen[4 * i + 2] == pytest.approx(cosine, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("rule", ["gradient", "least_squares"])
def test_actions_beyond_their_bounds_are_taken_as_the_bounds(rule: Any) -> None:
    env = ScaledUpdate(make(array_backend="torch"), rule, rank=1)
    observation, _ = env.reset(seed=0)
    pattern = np.resize(np.array([1, -1], np.float32), env.action_space.shape)
    beyond, bound = env.factors(observation, 5 * pattern), env.factors(observation, pattern)
    assert all(torch.equal(f, bound[part][m]) for part, by in beyond.items() for m, f in by.items())


@pytest.mark.parametrize("view", VIEWS_OF_BOXES)
def test_a_step_before_the_first_reset_and_one_after_the_end_ask_for_a_reset(view: str) -> None:
    env: Any = VIEWS[view](edit_modules="model.layers.1.mlp.up_proj", num_batches=1)
    zero = np.zeros(env.action_space.shape, np.float32)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(zero)
    env.reset(seed=0)
    assert env.step(zero)[2]
    before = env.unwrapped.lm.snapshot()
    with pytest.raises(gym.error.ResetNeeded):
        env.step(zero)
    assert all(torch.equal(before[m], w) for m, w in env.unwrapped.lm.snapshot().items())


@pytest.mark.parametrize("view", VIEWS_OF_BOXES)
def test_a_view_made_again_from_its_spec_is_the_same_view(view: str) -> None:
    env: Any = VIEWS[view](edit_modules="model.layers.1.mlp.up_proj", num_batches=1)
    again: Any = gym.make(env.spec)
    assert type(again) is type(env)
    assert (again.action_space, again.observation_space) == (env.action_space, env.observation_space)
    action = np.full(env.action_space.shape, 0.01, np.float32)
    results = []
    for one in (env, again):
        first, _ = one.reset(seed=0)
        results.append((first, one.step(action)[:2]))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert results[0][1][1] == results[1][1][1]


def test_the_basis_is_orthonormal_and_is_the_seed_s() -> None:
    one, same, other = (ScaledUpdate(make(), rank=3, seed=seed) for seed in (1, 1, 2))
    for m, basis in one.basis.items():
        torch.testing.assert_close(basis.T @ basis, torch.eye(3), atol=1e-5, rtol=0)
        assert torch.equal(basis, same.basis[m]) and not torch.equal(basis, other.basis[m])


def test_the_zero_action_is_the_base_rule() -> None:
    for rule in ("gradient", "least_squares"):
        env = ScaledUpdate(make(array_backend="torch"), rule, step_size=0.3, damping=0.7, rank=2)  # type: ignore[arg-type]
        observation, _ = env.reset(seed=0)
        factors = env.factors(observation, np.zeros(env.action_space.shape, np.float32))
        for m, u in observation["keys"].items():
            delta = observation["value_gradients"][m]
            update = factors["values"][m].T @ factors["keys"][m]
            if rule == "gradient":
                expected = -0.3 * delta.T @ u
            else:  # the normal equations of the ridge regression
                targets = -0.3 * u.square().sum(1, keepdim=True) * delta
                expected = torch.linalg.solve(u.T @ u + 0.7 * torch.eye(u.shape[1]), u.T @ targets).T
            torch.testing.assert_close(update, expected, rtol=1e-3, atol=1e-6)


def test_an_action_scales_its_own_module_s_step_damping_and_basis_directions() -> None:
    env = ScaledUpdate(make(array_backend="torch"), span=10.0, rank=1)
    observation, _ = env.reset(seed=0)
    modules = list(env.shapes)
    zero = np.zeros(env.action_space.shape, np.float32)
    base = env.factors(observation, zero)
    for part, place in (("step", 0), ("damping", 1), ("basis", 2)):
        action = zero.reshape(3, len(modules)).copy()
        action[place, 1] = 1.0
        changed = env.factors(observation, action.ravel())
        for i, m in enumerate(modules):
            same = torch.equal(changed["values"][m], base["values"][m])
            same_keys = torch.equal(changed["keys"][m], base["keys"][m])
            assert (same, same_keys) == ((part == "damping" or i != 1), (part != "damping" or i != 1))
        v, new = base["values"][modules[1]], changed["values"][modules[1]]
        if part == "step":
            torch.testing.assert_close(new, 10 * v)
        if part == "basis":
            p = env.basis[modules[1]]
            torch.testing.assert_close(new @ p, 2 * v @ p)
            torch.testing.assert_close(new - new @ p @ p.T, v - v @ p @ p.T)


def test_flat_factors_are_the_raw_ones_in_order() -> None:
    raw, flat = make(edit_modules="model.layers.1.mlp.up_proj"), FlattenFactors(
        make(edit_modules="model.layers.1.mlp.up_proj"), step_size=None
    )
    observation, _ = raw.reset(seed=0)
    seen, _ = flat.reset(seed=0)
    np.testing.assert_array_equal(seen, gym.spaces.flatten(raw.observation_space, observation))
    action = raw.action_space.sample()
    scaled = {part: {m: 0.01 * v for m, v in by.items()} for part, by in action.items()}
    expected = raw.step(scaled)
    got = flat.step(gym.spaces.flatten(raw.action_space, scaled))
    assert got[1] == expected[1]
    np.testing.assert_array_equal(got[0], gym.spaces.flatten(raw.observation_space, expected[0]))


def one_module(**arguments: Any) -> gym.Env[Any, Any]:
    return make(edit_modules="model.layers.1.mlp.up_proj", **arguments)


def test_the_rows_of_a_flat_action_are_as_long_as_those_observed_times_the_step_size() -> None:
    env: Any = FlattenFactors(one_module(), step_size=0.3)
    observation, _ = env.env.reset(seed=0)
    env.reset(seed=0)
    given: list[Any] = []
    env.env.step = lambda action: given.append(action) or (observation, 0.0, False, False, {})
    rng = np.random.default_rng(0)
    env.step(rng.choice([-1.0, 1.0], env.action_space.shape))
    env.step(rng.choice([-5.0, 5.0], env.action_space.shape))  # beyond the bounds
    for action in given:
        for part, source, scale in (("keys", "keys", 1.0), ("values", "value_gradients", 0.3)):
            for m, rows in observation[source].items():
                lengths = np.linalg.norm(action[part][m], axis=1)
                np.testing.assert_allclose(lengths, scale * np.linalg.norm(rows, axis=1), rtol=1e-5)
                assert action[part][m].dtype == np.float32


def test_the_zero_flat_action_edits_nothing_and_one_along_the_gradient_beats_its_opposite() -> None:
    env: Any = FlattenFactors(one_module(num_batches=1), step_size=0.3)
    losses = []
    for sign in (-1.0, 0.0, 1.0):
        env.reset(seed=0)
        episode = env.unwrapped.episode
        observation = episode.presented(episode.observe(episode.trace()))
        rows = {"keys": observation["keys"], "values": observation["value_gradients"]}
        factors = {
            part: {m: f / np.maximum(np.abs(f).max(), 1e-9) for m, f in by.items()} for part, by in rows.items()
        }
        factors["values"] = {m: sign * f for m, f in factors["values"].items()}
        *_, info = env.step(gym.spaces.flatten(env.env.action_space, factors))
        losses.append(info["generalization"])
        assert (info["drift"] == 0) == (sign == 0)
    assert losses[0] < losses[1] < losses[2]


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        (PPO, {"n_steps": 4, "batch_size": 4, "n_epochs": 2}),
        (SAC, {"learning_starts": 2, "batch_size": 4, "buffer_size": 20}),
    ],
)
@pytest.mark.parametrize("normalised", [False, True])
def test_stable_baselines3_trains_on_flat_factors(algorithm: Any, settings: Any, normalised: bool) -> None:
    env: Any = FlattenFactors(one_module(num_batches=2))
    env = NormalizeObservation(env) if normalised else env
    network = {"net_arch": [8]}
    model = algorithm("MlpPolicy", env, seed=0, device="cpu", policy_kwargs=network, **settings)
    before = {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}
    model.learn(8)
    after = model.policy.state_dict()
    assert model.num_timesteps == 8
    assert any(not torch.equal(before[name], tensor) for name, tensor in after.items())
    assert all(torch.isfinite(tensor).all() for tensor in after.values())


def test_stable_baselines3_names_what_it_does_not_take_of_the_raw_environment() -> None:
    with pytest.raises(NotImplementedError, match="Nested observation spaces are not supported"):
        PPO("MultiInputPolicy", one_module())


def test_modules_of_a_group_share_their_numbers() -> None:
    modules = ["layers.1.up_proj", "layers.1.down_proj", "layers.2.up_proj", "layers.2.down_proj"]
    assert [module_groups(modules, share) for share in ("module", "kind", "all")] == [  # type: ignore[arg-type]
        [0, 1, 2, 3], [0, 1, 0, 1], [0, 0, 0, 0]
    ]  # fmt: skip
    apart = ScaledUpdate(make(array_backend="torch"), rank=1)
    observation, _ = apart.reset(seed=0)
    kinds = [m.rsplit(".", 1)[-1] for m in apart.shapes]
    together = ScaledUpdate(make(array_backend="torch"), rank=1, share="kind")
    assert together.action_space.shape == (6,)
    action = np.linspace(-1, 1, 6, dtype=np.float32)
    of_each = action.reshape(3, 2)[:, [list(dict.fromkeys(kinds)).index(kind) for kind in kinds]]
    one, other = together.factors(observation, action), apart.factors(observation, of_each.ravel())
    for part, by_module in one.items():
        assert all(torch.equal(f, other[part][m]) for m, f in by_module.items())


def test_a_group_s_features_are_the_means_of_its_modules() -> None:
    views = {share: GradientFeatures(make(), share) for share in ("module", "kind", "all")}  # type: ignore[arg-type]
    seen = {share: view.reset(seed=0)[0] for share, view in views.items()}
    by_module = seen["module"][:-2].reshape(-1, 4)
    groups = views["kind"].groups
    np.testing.assert_allclose(seen["all"][:-2], by_module.mean(0), rtol=1e-5)
    expected = np.stack([by_module[np.asarray(groups) == g].mean(0) for g in (0, 1)])
    np.testing.assert_allclose(seen["kind"][:-2], expected.ravel(), rtol=1e-5)
    assert all(np.array_equal(one[-2:], seen["module"][-2:]) for one in seen.values())


def relative(streams: int = 3) -> RelativeReward:
    return RelativeReward(GradientFeatures(ScaledUpdate(make(array_backend="torch"), step_size=1.0)), streams)


def test_the_zero_action_has_no_relative_reward() -> None:
    env = relative()
    env.reset(seed=0)
    for _ in range(2):
        done = False
        while not done:
            _, reward, done, _, info = env.step(np.zeros(env.action_space.shape, np.float32))
            assert reward == 0 and info["reward"] < 0
        env.reset()


def test_a_relative_reward_is_the_environment_s_own_less_the_zero_action_s() -> None:
    env = relative()
    zero, action = (np.full(env.action_space.shape, a, np.float32) for a in (0.0, 0.7))
    env.reset(seed=0)
    seed = env.unwrapped.np_random_seed
    got = [env.step(action) for _ in range(3)]
    env.env.reset(seed=seed)
    baseline = [float(env.env.step(zero)[1]) for _ in range(3)]
    env.env.reset(seed=seed)
    own = [float(env.env.step(action)[1]) for _ in range(3)]
    assert [info["reward"] for *_, info in got] == own
    assert [reward for _, reward, *_ in got] == [mine - theirs for mine, theirs in zip(own, baseline, strict=True)]


def test_relative_rewards_measure_every_stream_of_the_set_once_and_come_back_to_all() -> None:
    env = relative(streams=3)
    env.reset(seed=4)
    seeds = [env.unwrapped.np_random_seed]
    for _ in range(5):
        env.reset()
        seeds.append(env.unwrapped.np_random_seed)
    assert len(set(seeds[:3])) == 3 and set(seeds[:3]) == set(seeds[3:])
    assert env.baseline_steps == 9
    assert env.measure().shape == (9, env.observation_space.shape[0])  # type: ignore[index]
    env.reset(seed=5)
    assert env.unwrapped.np_random_seed not in seeds


def test_the_set_of_streams_is_the_seed_s() -> None:
    orders = []
    for seed in (4, 4, 5):
        env = relative(streams=3)
        env.reset(seed=seed)
        order = [env.unwrapped.np_random_seed]
        for _ in range(2):
            env.reset()
            order.append(env.unwrapped.np_random_seed)
        orders.append(order)
    assert orders[0] == orders[1] and not set(orders[0]) & set(orders[2])


def test_measuring_a_set_first_gives_the_rewards_that_training_would_have_measured() -> None:
    first, second = relative(streams=2), relative(streams=2)
    first.measure(seed=9)
    action = np.full(first.action_space.shape, 0.5, np.float32)
    rewards = []
    for env in (first, second):
        env.reset(seed=9)
        rewards.append([env.step(action)[1] for _ in range(3)])
    assert rewards[0] == rewards[1] and any(rewards[0])
    assert (first.baseline_steps, second.baseline_steps) == (6, 3)  # the second has met one stream


def test_relative_rewards_leave_the_order_of_two_policies_on_a_stream_as_it_is() -> None:
    env = relative(streams=1)
    returns = []
    for a in (-0.5, 0.0, 0.4):
        env.reset(seed=3)
        steps = [env.step(np.full(env.action_space.shape, a, np.float32)) for _ in range(3)]
        returns.append((sum(reward for _, reward, *_ in steps), sum(info["reward"] for *_, info in steps)))
    relatives, own = zip(*returns, strict=True)
    np.testing.assert_allclose(np.subtract(relatives, relatives[1]), np.subtract(own, own[1]), rtol=1e-4, atol=1e-6)
    assert len(set(relatives)) == 3 and relatives[1] == 0


def test_where_the_zero_action_broke_the_model_rewards_are_the_environment_s_own() -> None:
    env = relative(streams=1)
    env.reset(seed=0)
    (stream,) = env._baselines
    env._baselines[stream] = env._baselines[stream][:1]  # as if it had ended after one step
    env.reset()
    zero = np.zeros(env.action_space.shape, np.float32)
    got = [env.step(zero) for _ in range(3)]
    assert got[0][1] == 0
    assert [reward for _, reward, *_ in got[1:]] == [info["reward"] for *_, info in got[1:]]


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda: ScaledUpdate(make(), "adam"), "rule is 'adam'; give 'gradient' or 'least_squares'"),  # type: ignore[arg-type]
        (lambda: ScaledUpdate(make(), step_size=0), "step_size is 0; give a number above 0"),
        (lambda: ScaledUpdate(make(), span=1), "span is 1; give a number above 1"),
        (lambda: ScaledUpdate(make(), rank=10_000), "rank is 10000; give 0"),
        (lambda: FlattenFactors(make(array_backend="torch")), "array_backend='numpy'"),
        (lambda: FlattenFactors(make(), step_size=0), "step_size is 0; give a number above 0, or None"),
        (lambda: FlattenFactors(make(), limit=10), "has .* numbers, more than 10"),
        (lambda: ScaledUpdate(make(), share="layer"), "share is 'layer'; give 'module', 'kind' or 'all'"),  # type: ignore[arg-type]
        (lambda: RelativeReward(make()), "the actions are a Dict, which has no zero"),
        (lambda: relative(streams=0), "streams is 0; give 1 or more"),
        (lambda: relative().reset(options={"keep_weights": True}), "cannot be given: the streams are those of a fixed"),
        (lambda: GradientFeatures(gym.make("CartPole-v1")), "no environment of this package"),
    ],
)
def test_what_cannot_be_wrapped_is_a_clear_error(wrap: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrap()


@pytest.mark.parametrize("view", ["scaled gradient", "flat"])
@pytest.mark.parametrize("bad", ["shape", "nan"])
def test_a_bad_action_changes_nothing(view: str, bad: str) -> None:
    env: Any = VIEWS[view](edit_modules="model.layers.1.mlp.up_proj")
    env.reset(seed=0)
    before = env.unwrapped.lm.snapshot()
    action = np.zeros(env.action_space.shape[0] + (bad == "shape"), np.float32)
    action[0] = np.nan if bad == "nan" else 0.0
    with pytest.raises(ValueError, match="it must be" if bad == "shape" else "not finite"):
        env.step(action)
    assert all(torch.equal(before[m], w) for m, w in env.unwrapped.lm.snapshot().items())
