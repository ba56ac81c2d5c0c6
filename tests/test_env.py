"""Tests of the environment: Gymnasium's interface, and what each of its arguments does."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env, data_equivalence

from rledit_env import env as env_module
from rledit_env.encoding import encode
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import TOKEN_CHOICES
from rledit_env.reward import RewardConfig

ROOT = Path(__file__).parents[1]
IDS = ["RLEdit-ZsRE-v0", "RLEdit-CounterFact-v0", "RLEdit-FEVER-v0"]
KINDS = {"RLEdit-ZsRE-v0": "zsre", "RLEdit-CounterFact-v0": "counterfact", "RLEdit-FEVER-v0": "fever"}
EXPECTED_WARNINGS = ("A Box observation space m", "For Box action spaces", "Box action space m", "render")


def fine_tuning(observation, step_size=0.1):
    """The action of plain fine-tuning, for either array backend."""
    return {
        "keys": observation["keys"],
        "values": {m: -step_size * g for m, g in observation["value_gradients"].items()},
    }


def whole_episode(env, step_size=0.1, **reset):
    """Rewards and infos of plain fine-tuning over an episode."""
    observation, _ = env.reset(**reset)
    rewards, infos, done = [], [], False
    while not done:
        observation, reward, terminated, truncated, info = env.step(fine_tuning(observation, step_size))
        rewards.append(reward)
        infos.append(info)
        done = terminated or truncated
    return rewards, infos


def checked(env) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(env.unwrapped)
    unexpected = [str(w.message) for w in caught if not any(known in str(w.message) for known in EXPECTED_WARNINGS)]
    assert unexpected == []


# -- Gymnasium's interface


@pytest.mark.parametrize("name", IDS)
def test_check_env_passes_with_a_tiny_model(name, facts):
    checked(gym.make(name, model="tiny-llama", data=facts(KINDS[name]), num_batches=3, batch_size=2, device="cpu"))


@pytest.mark.real
@pytest.mark.parametrize("name", IDS)
def test_check_env_passes_with_the_real_model(name, facts):
    checked(gym.make(name, data=facts(KINDS[name]), num_batches=2, batch_size=2))


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_a_made_environment_runs_without_a_warning(facts, backend):
    env = gym.make("RLEdit-ZsRE-v0", model="tiny-llama", data=facts(), num_batches=2, batch_size=2, device="cpu",
                   array_backend=backend)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        whole_episode(env, seed=0)
    assert [str(w.message) for w in caught] == []


MAKE = """
import json, sys
import gymnasium as gym
env = gym.make("rledit_env:RLEdit-ZsRE-v0", model="tiny-llama", num_batches=2, batch_size=2)
observation, info = env.reset(seed=0)
inside = observation in env.observation_space
action = {"keys": observation["keys"],
          "values": {m: -0.1 * g for m, g in observation["value_gradients"].items()}}
observation, reward, terminated, truncated, info = env.step(action)
print(json.dumps([inside, type(reward).__name__, terminated, truncated, env.unwrapped.dataset.source]))
"""


def test_the_docstrings_snippet_runs_in_a_fresh_process_without_importing_anything_of_ours():
    result = subprocess.run([sys.executable, "-c", MAKE], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    inside, kind, terminated, truncated, source = json.loads(result.stdout)
    assert (inside, kind, terminated, truncated) == (True, "float", False, False)
    assert "bundled" in source


def test_observations_are_in_the_space_and_progress_counts_the_steps(make_env):
    env = make_env(steps_per_batch=2)
    observation, info = env.reset(seed=0)
    assert set(info) == {"indices", "source"}
    for step in range(6):
        assert observation in env.observation_space
        assert float(observation["progress"][0]) == pytest.approx(step / 6)
        assert observation["mask"].any() and observation["edit_loss"][0] > 0
        observation, reward, terminated, truncated, info = env.step(fine_tuning(observation))
        assert isinstance(reward, float) and truncated is False
        assert terminated == (step == 5)
        assert info["batch"] == step // 2
    assert observation in env.observation_space
    assert float(observation["progress"][0]) == 1.0
    assert not observation["mask"].any()


def test_a_step_outside_an_episode_asks_for_a_reset(make_env):
    env = make_env(num_batches=1)
    action = env.action_space.sample()
    with pytest.raises(gym.error.ResetNeeded, match="call reset"):
        env.step(action)
    observation, _ = env.reset(seed=0)
    env.step(fine_tuning(observation))
    with pytest.raises(gym.error.ResetNeeded, match="call reset"):
        env.step(action)


def test_the_edit_loss_is_the_batchs_before_the_update_and_fine_tuning_lowers_it(make_env):
    env = make_env(steps_per_batch=4, num_batches=1)
    observation, _ = env.reset(seed=0)
    losses = []
    for _ in range(4):
        losses.append(float(observation["edit_loss"][0]))
        passages = [encode(env.lm, r).edit for r in env.stream.batch(0)]
        assert losses[-1] == pytest.approx(env.lm.trace(passages).loss, rel=1e-5)
        observation, *_ = env.step(fine_tuning(observation, 0.02))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e10, 1e18, 1e30])
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma2", "tiny-gpt2"])
def test_a_random_action_of_any_size_never_crashes_and_what_is_observed_is_finite(tiny_lm, make_env, name, scale):
    env = make_env(model=tiny_lm(name), reward_gradient=True, num_batches=2)
    env.action_space.seed(0)
    env.reset(seed=0)
    terminated = False
    while not terminated:
        sample = env.action_space.sample()
        action = {p: {m: np.float32(scale) * f for m, f in fs.items()} for p, fs in sample.items()}
        observation, reward, terminated, _, info = env.step(action)
        assert observation in env.observation_space
        assert all(np.isfinite(a).all() for part in ("keys", "value_gradients") for a in observation[part].values())
        assert -1000 <= reward <= 0
        assert reward == -1000 or not info["diverged"]
        assert info["diverged"] or all(np.isfinite(g).all() for g in info["reward_gradient"].values())
    assert env.reset(seed=0)[0]["edit_loss"][0] < 100


def test_an_action_that_breaks_the_model_ends_the_episode_at_the_floor_and_the_next_reset_is_clean(make_env):
    env = make_env(reward=RewardConfig(floor=-77.0), array_backend="torch", reward_gradient=True)
    begun, _ = env.reset(seed=0)
    action = {part: {m: torch.full_like(t, 1e30) for m, t in fs.items()} for part, fs in fine_tuning(begun).items()}
    observation, reward, terminated, truncated, info = env.step(action)
    assert (reward, terminated, truncated, info["diverged"]) == (-77.0, True, False, True)
    assert "reward_gradient" not in info
    assert len(observation["mask"]) == 0
    with pytest.raises(gym.error.ResetNeeded):
        env.step(action)
    assert len(env.edited_records()) == 2
    again, _ = env.reset(seed=0)
    for part in ("keys", "value_gradients"):
        assert all(torch.equal(begun[part][m], again[part][m]) for m in begun[part])
    _, reward, terminated, _, info = env.step(fine_tuning(again))
    assert not info["diverged"] and not terminated and reward > -77


def test_a_model_that_breaks_only_on_the_next_batch_ends_the_episode_too(make_env, monkeypatch):
    env = make_env()
    observation, _ = env.reset(seed=0)
    trace = env.lm.trace
    monkeypatch.setattr(env.lm, "trace", lambda *a: dataclasses.replace(trace(*a), loss=float("nan")))
    observation, reward, terminated, _, info = env.step(fine_tuning(observation))
    assert (reward, terminated, info["diverged"]) == (-1000.0, True, True)
    assert observation in env.observation_space and not observation["mask"].any()


@pytest.mark.parametrize("gradient", [True, False])
def test_the_weights_of_before_a_breaking_update_are_there_again_bit_for_bit(make_env, monkeypatch, gradient):
    env = make_env(reward_gradient=gradient)
    observation, _ = env.reset(seed=0)
    observation, *_ = env.step(fine_tuning(observation))
    before, trace = env.lm.snapshot(), env.lm.trace
    monkeypatch.setattr(env.lm, "trace", lambda *a: dataclasses.replace(trace(*a), loss=float("nan")))
    *_, info = env.step(fine_tuning(observation, 1e-3))
    assert info["diverged"]
    assert all(torch.equal(weight, before[m]) for m, weight in env.lm.snapshot().items())


def test_what_takes_an_update_back_is_gone_after_the_step(make_env, monkeypatch):
    env = make_env()
    observation, _ = env.reset(seed=0)
    apply, made = env.lm.apply, []

    def watched(*args, **options):
        undo = apply(*args, **options)
        made.append(weakref.ref(undo))
        return undo

    monkeypatch.setattr(env.lm, "apply", watched)
    env.step(fine_tuning(observation))
    assert made and not any(undo() is not None for undo in made)


def dense_update(observation):
    factors = fine_tuning(observation)
    return {"updates": {m: factors["values"][m].T @ u for m, u in factors["keys"].items()}}


def accumulated_change(observation):
    return {"accumulated": dense_update(observation)["updates"]}


def interrupt_at(monkeypatch, owner, name, call):
    """Let Ctrl-C come when a function or method is called for the call-th time."""
    real, left = getattr(owner, name), [call]

    def interrupted(*args, **options):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize("action_of", [fine_tuning, dense_update, accumulated_change])
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("where", ["score", "trace", "presented"])
def test_a_step_that_is_interrupted_changes_nothing_and_can_be_taken_again(
    make_env, monkeypatch, where, gradient, action_of
):
    env = make_env(reward_gradient=gradient, action_noise_std=1e-3)
    owner = {"score": env_module, "trace": env.lm, "presented": env.episode}[where]
    steps = []
    for interrupted in (False, False, True):  # the first time nothing is cached, which changes last bits
        observation, _ = env.reset(seed=0)
        observation, *_ = env.step(fine_tuning(observation))
        action, before = action_of(observation), env.lm.snapshot()
        if interrupted:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                interrupt_at(patch, owner, where, call=1)
                env.step(action)
            assert len(env.history) == 1
            for m, weight in env.lm.snapshot().items():
                assert torch.equal(weight, before[m])
                assert torch.equal(env.lm.model.get_submodule(m).weight, weight)
        observation, reward, terminated, _, info = env.step(action)
        weights = {m: w.numpy() for m, w in env.lm.snapshot().items()}
        steps.append((observation, reward, terminated, info, weights, env.np_random.bit_generator.state))
    assert data_equivalence(steps[1], steps[2], exact=True)


def test_closing_restores_the_weights_and_may_be_done_twice(make_env):
    env = make_env()
    weights = env.lm.snapshot()
    whole_episode(env, seed=0)
    env.close()
    env.close()
    assert all(torch.equal(weights[m], env.lm.weight(m)) for m in weights)
    assert len(env.lm.prefix_cache) == len(env.lm.reference_cache) == 0


# -- reset


def test_the_same_seed_draws_the_same_facts_and_no_seed_draws_others(make_env):
    env = make_env()
    drawn = [env.reset(seed=seed)[1]["indices"].tolist() for seed in (3, None, 3, None)]
    assert drawn[:2] == drawn[2:] and drawn[0] != drawn[1]


def test_given_indices_are_edited_in_their_order(make_env):
    env = make_env()
    _, info = env.reset(seed=0, options={"indices": [5, 0, 3, 1, 11, 2]})
    assert info["indices"].tolist() == [5, 0, 3, 1, 11, 2]
    observation, _ = env.reset(options={"indices": [5, 0, 3, 1, 11, 2]})
    env.step(fine_tuning(observation))
    assert env.edited_records() == [env.dataset[5], env.dataset[0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"indizes": [1]}, "reset option 'indizes' is unknown; options are 'indices', 'keep_weights' and 'start'"),
        ({"indices": [0, 1]}, "there are 2 indices; 3 batches of 2 take 6"),
        ({"indices": [0, 1, 2, 3, 4, 99]}, "index 99 is out of range"),
        ({"indices": [0, 1, 2, 3, 4, 4]}, "index 4 is given more than once"),
    ],
)
def test_an_option_that_makes_no_sense_is_named(make_env, options, message):
    with pytest.raises(ValueError, match=message):
        make_env().reset(seed=0, options=options)


def test_kept_weights_carry_over_to_the_next_stream(make_env):
    env = make_env()
    whole_episode(env, seed=0)
    weights = env.lm.snapshot()
    observation, _ = env.reset(seed=1, options={"keep_weights": True})
    assert all(torch.equal(weights[m], env.lm.weight(m)) for m in weights)
    fresh, _ = env.reset(seed=1)
    assert float(observation["edit_loss"][0]) != float(fresh["edit_loss"][0])


# -- dense actions


def dense(env, seed=0, scale=0.02, modules=slice(None)):
    """A random matrix (d_out, d_in) for some of the edited modules."""
    rng = np.random.default_rng(seed)
    chosen = list(env.lm.module_shapes.items())[modules]
    return {m: (scale * rng.normal(size=(d_out, d_in))).astype(np.float32) for m, (d_in, d_out) in chosen}


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
def test_updates_are_added_and_an_accumulated_change_replaces_what_was_added(make_env, tiny_lm, name, backend):
    env = make_env(model=tiny_lm(name), array_backend=backend, reward="none")
    first, *others = env.lm.module_shapes
    env.reset(seed=0)
    for seed in (1, 2):
        env.step({"updates": dense(env, seed)})
    for m in env.lm.module_shapes:
        expected = dense(env, 1)[m] + dense(env, 2)[m]
        torch.testing.assert_close(env.lm.weight(m) - env.lm.original_weight(m), torch.from_numpy(expected),
                                   atol=1e-6, rtol=1e-4)
    kept = env.lm.snapshot()
    env.step({"accumulated": dense(env, 3, modules=slice(1))})
    assert torch.equal(env.lm.weight(first), env.lm.original_weight(first) + torch.from_numpy(dense(env, 3)[first]))
    assert others and all(torch.equal(env.lm.weight(m), kept[m]) for m in others)
    modules = dict(env.lm.model.named_modules())
    for m in env.lm.module_shapes:  # the model runs with what was written
        run = modules[m].weight.t() if name == "tiny-gpt2" else modules[m].weight
        assert torch.equal(run, env.lm.weight(m))


def test_modules_that_a_dense_action_leaves_out_stay_and_an_empty_one_edits_nothing(make_env):
    env = make_env()
    env.reset(seed=0)
    before = env.lm.snapshot()
    *_, info = env.step({"updates": {}})
    assert all(torch.equal(before[m], env.lm.weight(m)) for m in before)
    assert info["regularisation"] == 0.0 == info["drift"]
    *_, info = env.step({"accumulated": {}})
    assert info["regularisation"] == 0.0
    chosen = dense(env, modules=slice(1, 2))
    env.step({"updates": chosen})
    assert [m for m in before if not torch.equal(before[m], env.lm.weight(m))] == list(chosen)


def test_a_reset_after_dense_actions_restores_the_weights_bit_for_bit(make_env):
    env = make_env()
    state = {n: p.clone() for n, p in env.lm.model.state_dict().items()}
    for form in ("updates", "accumulated"):
        env.reset(seed=0)
        env.step({form: dense(env, scale=1e3)})
        env.reset(seed=0)
        assert all(torch.equal(state[n], p) for n, p in env.lm.model.state_dict().items())


@pytest.mark.parametrize("form", ["updates", "accumulated"])
def test_the_regularisation_of_a_dense_action_is_that_of_the_change_really_made(make_env, form):
    env = make_env(reward=RewardConfig(regularisation=0.5), reward_gradient=True, array_backend="torch")
    env.reset(seed=0)
    env.step({"updates": dense(env, 1)})
    before = env.lm.snapshot()
    *_, info = env.step({form: dense(env, 2)})
    changes = {m: env.lm.weight(m) - w for m, w in before.items()}
    squares = sum(float(c.double().square().sum()) for c in changes.values())
    assert info["regularisation"] == pytest.approx(0.5 * squares, rel=1e-5)
    assert set(info["action_gradient"]) == {form}
    for m, change in changes.items():
        torch.testing.assert_close(info["action_gradient"][form][m], -change, atol=1e-6, rtol=1e-3)


def test_a_penalty_of_ones_own_sees_a_dense_change_as_factors_that_give_it(make_env):
    def penalty(keys, values):
        return sum((values[m].T @ keys[m]).abs().sum() for m in keys)

    env = make_env(reward=RewardConfig(regularisation=1.0, penalty=penalty))
    env.reset(seed=0)
    *_, info = env.step({"updates": dense(env)})
    expected = sum(float(np.abs(d).sum()) for d in dense(env).values())
    assert info["regularisation"] == pytest.approx(expected, rel=1e-4)


def test_noise_on_a_dense_action_is_on_its_entries_and_counts_in_the_regularisation(make_env):
    env = make_env(action_noise_std=0.1, reward=RewardConfig(regularisation=1.0))
    env.reset(seed=0)
    m = next(iter(env.lm.module_shapes))
    *_, info = env.step({"updates": {m: np.zeros(env.lm.module_shapes[m][::-1], np.float32)}})
    change = env.lm.weight(m) - env.lm.original_weight(m)
    assert float(change.std()) == pytest.approx(0.1, rel=0.1)
    assert info["regularisation"] == pytest.approx(float(change.square().sum()), rel=1e-4)


@pytest.mark.parametrize("form", ["updates", "accumulated"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, m: 3, "is int; give a dictionary"),
        (lambda a, m: {**a, "model.layers.0.mlp": a[m]}, "names 'model.layers.0.mlp', which is not edited; edited are"),
        (lambda a, m: {**a, m: a[m][:-1]}, r"{m}'\] has shape .*; give \(d_out, d_in\) = \("),
        (lambda a, m: {**a, m: a[m][None]}, r"{m}'\] has shape \(1, "),
        (lambda a, m: {**a, m: np.where(np.arange(a[m].shape[1]) == 3, np.nan, a[m])}, r"{m}'\] holds nan at \(0, 3\)"),
        (lambda a, m: {**a, m: np.full_like(a[m], -np.inf)}, r"{m}'\] holds -inf at \(0, 0\)"),
        (lambda a, m: {**a, m: np.full(a[m].shape, 1e300)}, r"{m}'\] holds inf at \(0, 0\); give finite .*float32"),
        (lambda a, m: {**a, m: "x"}, r"{m}'\] is no array of numbers"),
    ],
)
def test_a_rejected_dense_action_is_named_and_changes_neither_weights_nor_stream_nor_random_state(
    make_env, form, change, message
):
    env = make_env(action_noise_std=0.1)
    env.reset(seed=0)
    env.step({"updates": dense(env)})
    last = list(env.lm.module_shapes)[-1]
    weights, state, step = env.lm.snapshot(), env.np_random.bit_generator.state, env.position
    pattern = rf"action\['{form}'\].*" + message.replace("{m}", last.replace(".", r"\."))
    with pytest.raises(ValueError, match=pattern):
        env.step({form: change(dense(env), last)})
    assert all(torch.equal(weights[m], env.lm.weight(m)) for m in weights)
    assert env.np_random.bit_generator.state == state and env.position == step
    write = env.lm.add if form == "updates" else env.lm.replace
    with pytest.raises(ValueError, match=form):
        write(change(dense(env), last))
    assert all(torch.equal(weights[m], env.lm.weight(m)) for m in weights)


@pytest.mark.parametrize("parts", [("updates", "accumulated"), ("updates", "keys", "values"), ("update",)])
def test_an_action_of_mixed_or_unknown_parts_says_what_an_action_is(make_env, parts):
    env = make_env()
    env.reset(seed=0)
    with pytest.raises(ValueError, match="'keys' and 'values', each by module, or with 'updates' or 'accumulated'"):
        env.step({part: dense(env) for part in parts})


def test_the_current_batch_is_what_the_step_edits(make_env):
    env = make_env(steps_per_batch=2)
    with pytest.raises(gym.error.ResetNeeded, match="no batch is presented"):
        env.current_batch()
    env.reset(seed=0)
    for step in range(6):
        assert [r.record for r in env.current_batch()] == list(env.stream.batch(step // 2))
        expected = [encode(env.lm, r).edit.input_ids for r in env.stream.batch(step // 2)]
        assert [r.edit.input_ids for r in env.current_batch()] == expected
        env.step({"updates": {}})
    with pytest.raises(gym.error.ResetNeeded, match="no batch is presented"):
        env.current_batch()


# -- arguments


def test_numpy_and_torch_backends_give_the_same_rewards_and_infos(make_env):
    results = {}
    for backend in ("numpy", "torch"):
        env = make_env(array_backend=backend, reward_gradient=True, reward="efficacy")
        results[backend] = whole_episode(env, seed=0)
        assert isinstance(results[backend][1][0]["reward_gradient"][next(iter(env.lm.module_shapes))],
                          np.ndarray if backend == "numpy" else torch.Tensor)
        env.close()
    assert results["numpy"][0] == results["torch"][0]
    for one, other in zip(results["numpy"][1], results["torch"][1], strict=True):
        assert {k: v for k, v in one.items() if "gradient" not in k} == {
            k: v for k, v in other.items() if "gradient" not in k
        }
        for m, gradient in one["reward_gradient"].items():
            np.testing.assert_array_equal(gradient, other["reward_gradient"][m].numpy())


def test_the_torch_backend_hands_over_only_the_rows_in_use(make_env):
    env = make_env(array_backend="torch")
    numpy_env = make_env()
    observation, padded = env.reset(seed=0)[0], numpy_env.reset(seed=0)[0]
    used = len(observation["mask"])
    assert used == padded["mask"].sum() < env.max_tokens
    for part in ("keys", "value_gradients"):
        for m, rows in observation[part].items():
            assert rows.dtype == torch.float32
            np.testing.assert_allclose(rows.numpy(), padded[part][m][:used], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("token", TOKEN_CHOICES)
def test_too_few_max_tokens_name_the_number_that_would_do_and_that_number_does(make_env, facts, token):
    data = facts("counterfact", 8)
    needed = make_env("counterfact", data=data, token=token).max_tokens
    message = f"max_tokens is {needed - 1}, .*2 facts of .*bundled.* can have {needed} .*max_tokens={needed} or None"
    with pytest.raises(ValueError, match=message):
        make_env("counterfact", data=data, token=token, max_tokens=needed - 1)
    env = make_env("counterfact", data=data, token=token, max_tokens=needed, num_batches=1)
    counts = env.encoded.traced_positions(token)
    worst = np.argsort(counts)[-2:]
    observation, _ = env.reset(options={"indices": worst})
    assert observation["mask"].all()
    env.step(fine_tuning(observation))


def test_more_steps_a_batch_present_it_again_with_its_state_recomputed(make_env):
    env = make_env(steps_per_batch=2, num_batches=2)
    observation, _ = env.reset(seed=0)
    seen = [observation]
    for _ in range(3):
        observation, *_ = env.step(fine_tuning(observation))
        seen.append(observation)
    counts = [int(o["mask"].sum()) for o in seen]
    assert counts[0] == counts[1] and counts[2] == counts[3]
    first = next(iter(env.lm.module_shapes))
    np.testing.assert_allclose(seen[0]["keys"][first], seen[1]["keys"][first], rtol=1e-3, atol=1e-4)
    assert not np.array_equal(seen[0]["value_gradients"][first], seen[1]["value_gradients"][first])
    assert seen[1]["edit_loss"] != seen[0]["edit_loss"]
    assert not np.array_equal(seen[2]["keys"][first], seen[1]["keys"][first])


def test_action_noise_changes_the_update_and_is_seeded(make_env, random_action):
    def updated(std, seed):
        env = make_env(action_noise_std=std)
        env.reset(seed=seed, options={"indices": range(6)})
        env.step(random_action(env))
        m = next(iter(env.lm.module_shapes))
        return (env.lm.weight(m) - env.lm.original_weight(m)).clone()

    exact, noisy = updated(0.0, 1), updated(0.01, 1)
    assert torch.equal(noisy, updated(0.01, 1))
    assert not torch.equal(noisy, updated(0.01, 2))
    assert torch.equal(exact, updated(0.0, 2))
    assert 0 < float((noisy - exact).norm()) < float((updated(0.1, 1) - exact).norm())


def test_without_a_reward_nothing_is_computed_and_the_reward_is_zero(make_env, monkeypatch):
    env = make_env(reward="none")
    monkeypatch.setattr("rledit_env.env.score", lambda *a, **k: pytest.fail("the reward was computed"))
    rewards, infos = whole_episode(env, seed=0)
    assert rewards == [0.0] * 3
    assert all(set(info) == {"drift", "diverged", "batch"} for info in infos)


def test_the_infos_parts_add_up_to_the_reward(make_env):
    rewards, infos = whole_episode(make_env(), seed=0)
    for reward, info in zip(rewards, infos, strict=True):
        parts = info["generalization"] + 0.6 * info["locality"] + info["backtracking"] + info["regularisation"]
        assert reward == pytest.approx(-parts, rel=1e-6)
    assert infos[0]["backtracking"] == 0.0 < infos[1]["backtracking"]
    assert [info["drift"] for info in infos] == sorted(info["drift"] for info in infos)


def test_evaluating_before_any_step_is_an_error_and_afterwards_covers_the_facts_edited_so_far(make_env):
    env = make_env(steps_per_batch=2)
    for prepare in (lambda: None, lambda: env.reset(seed=0)):
        prepare()
        with pytest.raises(ValueError, match="no fact has been edited yet"):
            env.evaluate()
    observation, _ = env.reset(seed=0)
    for step in range(6):
        observation, *_ = env.step(fine_tuning(observation))
        assert len(env.evaluate().taken) == 2 * (step // 2 + 1)


def test_evaluating_during_an_episode_changes_no_later_reward(make_env):
    expected, _ = whole_episode(make_env(action_noise_std=1e-3, reward="efficacy"), seed=0)
    env = make_env(action_noise_std=1e-3, reward="efficacy")
    observation, _ = env.reset(seed=0)
    rewards = []
    for _ in range(3):
        observation, reward, *_ = env.step(fine_tuning(observation))
        env.evaluate()
        rewards.append(reward)
    assert rewards == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"token": "last"}, "token is 'last'; give one of answer, subject"),
        ({"array_backend": "jax"}, "array_backend is 'jax'"),
        ({"steps_per_batch": 0}, "steps_per_batch is 0; give 1 or more"),
        ({"action_noise_std": -1.0}, "action_noise_std is -1.0"),
        ({"render_mode": "html"}, "render_mode is 'html'"),
        ({"reward": "best"}, "reward is 'best'"),
        ({"num_batches": 7}, "7 batches of 2 need 14 records, but .* has 12"),
        ({"edit_modules": "*"}, "edit_modules is '\\*'; give None, since model is an EditableLM already"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*render_mode")
def test_an_argument_that_makes_no_sense_is_named(make_env, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_env(**arguments)


def test_a_passage_beyond_the_models_context_is_named_by_file_and_line(tmp_path):
    rows = [
        {"src": f"question {i}?", "rephrase": "x" * (600 if i == 2 else 6), "ans": "yes",
         "loc": "nq question: who wrote hamlet", "loc_ans": "Shakespeare"}
        for i in range(4)
    ]
    file = tmp_path / "long.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"long.jsonl, line 3.*tokens, but the context of tiny-llama holds 512"):
        gym.make("RLEdit-ZsRE-v0", model="tiny-llama", data=str(file), num_batches=2, batch_size=2, device="cpu")


def test_a_shared_model_is_used_as_it_is(facts):
    lm = EditableLM.load("tiny-gpt2", "transformer.h.3.mlp.c_fc", dtype="float32", device="cpu")
    env = gym.make("RLEdit-FEVER-v0", model=lm, data=facts("fever"), num_batches=2, batch_size=2).unwrapped
    assert env.lm is lm
    assert list(env.action_space["keys"]) == ["transformer.h.3.mlp.c_fc"]


def test_other_modules_may_be_edited_by_glob(facts):
    env = gym.make("RLEdit-ZsRE-v0", model="tiny-qwen2", edit_modules="model.layers.{1,3}.mlp.down_proj", data=facts(),
                   num_batches=2, batch_size=2, device="cpu").unwrapped
    assert set(env.lm.module_shapes) == {"model.layers.1.mlp.down_proj", "model.layers.3.mlp.down_proj"}
    assert len(whole_episode(env, seed=0)[0]) == 2


def test_an_environment_in_bfloat16_gives_nearly_the_same_rewards(tiny_lm, make_env):
    exact, _ = whole_episode(make_env(model=tiny_lm(dtype=torch.float32)), seed=0)
    rounded, _ = whole_episode(make_env(model=tiny_lm(dtype=torch.bfloat16)), seed=0)
    assert rounded == pytest.approx(exact, rel=0.03)
    assert rounded != exact
