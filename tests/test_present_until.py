"""Tests of LifelongEditEnv(present_until=...): batches are presented until their facts have taken."""

from __future__ import annotations

import copy
import math
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from rledit_env import env as env_module
from rledit_env.env import DivergenceError
from rledit_env.reward import RewardConfig
from rledit_env.wrappers import GradientFeatures, RelativeReward, ScaledUpdate

UNTIL = 2e-4  # some facts reach it with a tiny model after some of these steps, some never do
STEP = 10.0


def tuned(observation, step_size: float = STEP):
    return {
        "keys": observation["keys"], "values": {m: -step_size * g for m, g in observation["value_gradients"].items()}
    }  # fmt: skip


@pytest.fixture
def until(make_env, facts):
    """Makes an environment that presents three batches of three facts six times at most."""

    def make(**arguments):
        settings = {
            "num_batches": 3, "batch_size": 3, "steps_per_batch": 6, "array_backend": "torch", "reward": "none",
            "present_until": UNTIL, "data": facts("counterfact"), **arguments,
        }  # fmt: skip
        return make_env("counterfact", **settings)

    return make


def episode(env, seed: int = 1, step_size: float = STEP):
    """All of an episode: (position, presented facts, observation, reward, info) of every step."""
    observation, _ = env.reset(seed=seed)
    steps, done = [], False
    while not done:
        before = env.position, env.presented_facts(), observation
        observation, reward, done, _, info = env.step(tuned(observation, step_size))
        steps.append((*before, reward, info))
    return steps


def same(a, b) -> bool:
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(a[k], b[k]) for k in a)
    return bool((torch.as_tensor(a) == torch.as_tensor(b)).all())


@pytest.mark.parametrize("token", ["answer", "subject", "all"])
def test_the_facts_that_have_taken_are_left_out_and_the_batch_ends_with_the_last(until, full_logits, token):
    env = until(token=token)
    observation, _ = env.reset(seed=1)
    done, early, left_out, came_back = False, 0, 0, 0
    closed: set[int] = set()
    while not done:
        batch = env.position // 6
        passages = [record.edit for record in env.episode.records(batch)]
        with torch.no_grad():
            least = [float(full_logits(env.lm, p).softmax(-1).gather(1, torch.tensor(p.targets)[:, None]).min())
                     for p in passages]
        open_ = [i for i, p in enumerate(least) if p < UNTIL]
        assert env.presented_facts() == open_
        assert [r.record for r in env.current_batch()] == [env.stream.batch(batch)[i] for i in open_]
        if open_:
            alone = env.lm.trace([passages[i] for i in open_], token)  # a batch of only these facts
            for m in env.lm.module_shapes:
                torch.testing.assert_close(observation["keys"][m], alone.keys[m])
                torch.testing.assert_close(observation["value_gradients"][m], alone.value_gradients[m])
            assert float(observation["edit_loss"]) == pytest.approx(alone.loss)
            shown = env.lm.trace(passages, token).of(torch.tensor([i in open_ for i in range(3)]))
            assert torch.equal(shown.owner, alone.owner) and len(shown.hardest) == len(open_)
        came_back += len(closed & set(open_))
        closed = set(range(3)) - set(open_)
        left_out += bool(closed) and bool(open_)
        before = env.position
        observation, _, done, _, info = env.step(tuned(observation))
        assert (info["batch"], info["presentation"], info["open_facts"]) == (batch, before % 6, len(open_))
        assert float(observation["progress"]) == pytest.approx(env.position / env.episode_steps)
        if env.position // 6 > batch and before % 6 < 5:
            losses = env.lm.trace(passages).hardest
            assert float(losses.max()) <= -math.log(UNTIL)
            early, closed = early + 1, set()
        else:
            assert env.position == before + 1
    assert left_out > 2 and came_back > 0 and (early > 0 or token == "all")
    assert len(env.edited_records()) == 9 and env.position == env.episode_steps == 18
    assert len(observation["mask"]) == 0


def test_off_and_never_taken_are_the_same_bit_for_bit(until):
    off, never = (episode(until(present_until=p, reward="efficacy", reward_gradient=True)) for p in (None, 1 - 1e-12))
    assert len(off) == len(never) == 18
    for one, other in zip(off, never, strict=True):
        assert one[0] == other[0] and one[1] == other[1] == [0, 1, 2]
        assert same(one[2], other[2]) and one[3] == other[3]
        assert set(other[4]) - set(one[4]) == {"presentation", "open_facts"}
        assert same(one[4]["reward_gradient"], other[4]["reward_gradient"])


@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_a_batch_of_facts_that_have_taken_already_is_presented_once_without_rows(until, backend):
    env = until(present_until=1e-12, array_backend=backend, reward="paper")
    steps = episode(env)
    assert [s[0] for s in steps] == [0, 6, 12]
    for _, presented, observation, reward, info in steps:
        assert presented == [] and not observation["mask"].any() and reward < -1
        assert info["open_facts"] == 0 and not info["diverged"] and info["drift"] == 0.0


def test_only_the_last_presentation_is_scored_where_every_step_is_not(until):
    config = RewardConfig(every_step=False)
    steps = episode(until(reward=config))
    ends = [i for i, s in enumerate(steps) if i + 1 == len(steps) or steps[i + 1][4]["batch"] > s[4]["batch"]]
    assert len(ends) == 3 and len(steps) < 18
    assert [i for i, s in enumerate(steps) if "generalization" in s[4]] == ends
    every = episode(until(reward=RewardConfig()))
    assert [s[0] for s in every] == [s[0] for s in steps]
    for i in ends:
        assert steps[i][3] == pytest.approx(every[i][3], rel=1e-5)


def test_looking_costs_a_pass_only_where_a_batch_ends_early(until, monkeypatch):
    env = until()
    calls = []
    trace = env.lm.trace
    monkeypatch.setattr(env.lm, "trace", lambda *a: calls.append(1) or trace(*a))
    steps = episode(env)
    positions = [s[0] for s in steps] + [18]
    early = sum(b - a > 1 for a, b in zip(positions, positions[1:], strict=False))
    assert early > 0 and len(calls) == len(steps) + early


def test_check_env_finds_nothing(until):
    env = until(array_backend="numpy", num_batches=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(infinity|not within|render_mode|unwrapped).*")
        check_env(env, skip_render_check=True)


@pytest.mark.parametrize("p", [0, 1, 1.5, -0.1, math.nan, True])
def test_a_probability_that_makes_no_sense_is_refused(until, p):
    with pytest.raises(ValueError, match="present_until is .*; give a probability above 0 and below 1, or None"):
        until(present_until=p)


# -- copies, starts, interruptions


def at(env, steps: int):
    observation, _ = env.reset(seed=1)
    for _ in range(steps):
        observation, *_ = env.step(tuned(observation))
    return observation


def test_an_episode_goes_on_in_a_copy_and_from_its_position(until):
    whole = episode(until())
    middle = next(i for i, s in enumerate(whole) if 0 < len(s[1]) < 3)
    env = until()
    observation = at(env, middle)
    other = copy.deepcopy(env)
    assert other.presented_facts() == whole[middle][1] and other.position == whole[middle][0]
    indices = env.stream.indices.copy()
    again, _ = env.reset(seed=5, options={"keep_weights": True, "start": whole[middle][0], "indices": indices})
    assert env.presented_facts() == whole[middle][1] and same(again, observation)
    for one in (other, env):
        now, done, i = observation, False, middle
        while not done:
            assert same(now, whole[i][2])
            now, _, done, _, _ = one.step(tuned(now))
            i += 1
        assert i == len(whole)


def test_an_interrupted_step_leaves_the_presented_facts_as_they_were(until, monkeypatch):
    env = until(reward="paper")
    at(env, 2)
    before = env.position, env.presented_facts()
    observation = env.episode.observe(env.episode.trace())

    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(env_module, "score", interrupted)
        with pytest.raises(KeyboardInterrupt):
            env.step(tuned(observation))
    assert (env.position, env.presented_facts()) == before and env.episode.checked is None
    assert same(env.episode.observe(env.episode.trace()), observation)


@pytest.mark.parametrize("reward", ["none", "paper"])
@pytest.mark.parametrize("mode", ["skip", "end", "raise"])
def test_an_update_that_breaks_the_model_is_one_presentation(until, mode, reward):
    env = until(on_divergence=mode, reward=reward)
    observation = at(env, 2)
    position, presented = env.position, env.presented_facts()
    weights = env.lm.snapshot()
    broken = tuned(observation, 1e30)
    if mode == "raise":
        with pytest.raises(DivergenceError):
            env.step(broken)
        assert (env.position, env.presented_facts()) == (position, presented)
    else:
        after, _, terminated, _, info = env.step(broken)
        assert info["diverged"] and terminated == (mode == "end")
        if mode == "skip":
            assert (env.position, env.presented_facts()) == (position + 1, presented)
            assert same({k: v for k, v in after.items() if k != "progress"},
                        {k: v for k, v in observation.items() if k != "progress"})
    assert all(torch.equal(w, weights[m]) for m, w in env.lm.snapshot().items())


# -- many streams


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_streams_are_separate_environments_though_their_batches_end_at_different_times(facts, backend, mode):
    settings = {
        "model": "tiny-llama", "edit_modules": "model.layers.[1-3].*", "dtype": "float32", "num_batches": 2,
        "batch_size": 3, "steps_per_batch": 5, "present_until": UNTIL, "array_backend": backend,
        "reward": RewardConfig(every_step=False), "data": facts("counterfact"),
    }  # fmt: skip
    vector = gym.make_vec("RLEdit-CounterFact-v0", 3, autoreset_mode=mode, **settings)
    separate = [gym.make("RLEdit-CounterFact-v0", disable_env_checker=True, **settings).unwrapped for _ in range(3)]
    observations, _ = vector.reset(seed=1)
    mine = [env.reset(seed=1 + i)[0] for i, env in enumerate(separate)]
    ended, places = [False] * 3, set()
    for _ in range(14):
        places.add(tuple(env.position for env in separate))
        for i, env in enumerate(separate):
            assert vector.envs[i].position == env.position
            assert vector.envs[i].presented_facts() == env.presented_facts()
            for part in ("keys", "value_gradients"):
                for m, rows in mine[i][part].items():
                    theirs = np.asarray(observations[part][m][i])[: len(rows)]
                    np.testing.assert_allclose(theirs, rows, rtol=5e-3, atol=1e-4)
        actions = tuned(observations)
        observations, rewards, terminations, _, infos = vector.step(actions)
        for i, env in enumerate(separate):
            if ended[i] and mode is AutoresetMode.NEXT_STEP:
                mine[i], ended[i] = env.reset()[0], False
                assert rewards[i] == 0.0
                continue
            rows = len(mine[i]["mask"])
            same_action = {part: {m: v[i][:rows] for m, v in by.items()} for part, by in actions.items()}
            mine[i], reward, ended[i], _, info = env.step(same_action)
            own = infos["final_info"] if ended[i] and mode is AutoresetMode.SAME_STEP else infos
            assert rewards[i] == pytest.approx(reward, rel=1e-3)
            assert terminations[i] == ended[i]
            assert own["presentation"][i] == info["presentation"] and own["open_facts"][i] == info["open_facts"]
            if ended[i] and mode is AutoresetMode.SAME_STEP:
                mine[i], ended[i] = env.reset()[0], False
    assert any(len({p % 5 for p in place}) > 1 for place in places), "streams are at different presentations"


# -- views


@pytest.mark.parametrize("rule", ["gradient", "least_squares"])
def test_the_views_take_an_observation_without_rows(until, rule):
    env = GradientFeatures(ScaledUpdate(until(present_until=1e-12, reward="paper"), rule=rule))
    observation, _ = env.reset(seed=0)
    done = False
    while not done:
        assert np.isfinite(observation).all()
        observation, _, done, _, info = env.step(env.action_space.sample())
        assert info["drift"] == 0.0 and not info["diverged"]
    with pytest.raises(ValueError, match="present_until, so that a stream's steps are not those of the zero action"):
        RelativeReward(env)
