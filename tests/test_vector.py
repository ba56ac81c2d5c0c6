"""Tests of rledit_env.vector: many environments on one frozen LLM are separate environments, and cost less."""

from __future__ import annotations

import doctest
import gc
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import rledit_env.vector.env
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.routing import BesideModules
from rledit_env.preservation import Constraint, Continuation, OwnText
from rledit_env.reward import RewardConfig
from rledit_env.vector import LifelongEditVectorEnv, VectorGradientFeatures, VectorScaledUpdate
from rledit_env.wrappers import GradientFeatures, ScaledUpdate

MODULES = "{model.layers,transformer.h}.[1-2].mlp.*"
STRIDE = RewardConfig(batch_stride=2, every_step=False)
PRESERVING = RewardConfig(constraint=Constraint(bound=0.05, start=2.0)).replace("continuation", 0.5, Continuation(2, 5))
PRESERVING = PRESERVING.replace("own_text", 1.0, OwnText(passages=2, tokens=6, pool=8))


@pytest.fixture
def both(facts):
    """Gives a vectorised environment and functions that make separate ones, each with an LLM of its own."""

    def make(num_envs: int = 3, model: str = "tiny-llama", autoreset_mode: Any = AutoresetMode.NEXT_STEP, **arguments):
        settings = {"num_batches": 2, "batch_size": 2, "data": facts("counterfact"), **arguments}

        def lm() -> EditableLM:
            return EditableLM.load(model, MODULES, dtype=torch.float32, device="cpu")

        vector: Any = gym.make_vec(
            "RLEdit-CounterFact-v0", num_envs, model=lm(), autoreset_mode=autoreset_mode, **settings
        )
        return vector, [lambda: gym.make("RLEdit-CounterFact-v0", model=lm(), **settings)] * num_envs

    return make


def fine_tuning(observation, step_size=0.1):
    return {
        "keys": observation["keys"],
        "values": {m: -step_size * g for m, g in observation["value_gradients"].items()},
    }


def of_environment(nested: Any, i: int) -> Any:
    """Stream i's part of gathered observations or infos."""
    if isinstance(nested, dict):
        own = {k: v for k, v in nested.items() if not k.startswith("_") and nested.get(f"_{k}", [True] * 9)[i]}
        return {k: of_environment(v, i) for k, v in own.items()}
    return nested[i]


def assert_same(a: Any, b: Any, place: str = "") -> None:
    """Equal to float32 rounding, arrays and tensors alike; rows that only one has must be padding."""
    if isinstance(a, dict):
        assert set(a) == set(b), place
        for key in a:
            assert_same(a[key], b[key], f"{place}/{key}")
    elif a is None or isinstance(a, str):
        assert a == b, place
    elif isinstance(a, np.ndarray) and a.dtype == object:
        for x, y in zip(a, b, strict=True):
            assert_same(x, y, place)
    else:
        a, b = (x.numpy() if isinstance(x, torch.Tensor) else np.asarray(x) for x in (a, b))
        if a.shape != b.shape:
            rows = min(len(a), len(b))
            assert not a[rows:].any() and not b[rows:].any(), place
            a, b = a[:rows], b[:rows]
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5, err_msg=place)


# -- the same as separate environments


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("tiny-llama", {"reward_gradient": True, "steps_per_batch": 2}),
        ("tiny-llama", {"reward": "efficacy", "token": "subject+answer", "num_batches": 4}),
        ("tiny-llama", {"reward": "none", "token": "all", "action_noise_std": 1e-2}),
        ("tiny-qwen3", {"reward": STRIDE, "steps_per_batch": 2, "num_batches": 4}),
        ("tiny-gpt2", {"reward_gradient": True, "token": "subject"}),
        ("tiny-llama", {"reward": PRESERVING, "reward_gradient": True, "num_batches": 3}),
        ("tiny-gemma2", {"reward_gradient": True, "num_batches": 3}),
    ],
)  # fmt: skip
def test_environments_are_separate_environments_with_the_same_seeds(both, backend, model, settings):
    vector, makers = both(model=model, array_backend=backend, **settings)
    separate = [make() for make in makers]
    observations, infos = vector.reset(seed=7)
    expected = [env.reset(seed=7 + i) for i, env in enumerate(separate)]
    over, changed = False, False
    while not over:
        for i, (observation, info) in enumerate(expected):
            assert_same(of_environment(observations, i), observation)
            assert_same(of_environment(infos, i), info)
        before = observations["edit_loss"]
        observations, rewards, terminations, truncations, infos = vector.step(fine_tuning(observations))
        steps = [env.step(fine_tuning(observation)) for env, (observation, _) in zip(separate, expected, strict=True)]
        np.testing.assert_allclose(rewards, [step[1] for step in steps], rtol=1e-4)
        assert terminations.tolist() == [step[2] for step in steps] and not truncations.any()
        expected = [(step[0], step[4]) for step in steps]
        over = terminations.all()
        changed |= len({float(x[0]) for x in before}) == 3
    assert changed  # each environment has facts of its own


def play(env, mode: AutoresetMode, steps: int) -> list[Any]:
    """What a vector environment returns while environment 1 breaks at its second step, and all episodes restart."""
    observations, infos = env.reset(seed=3)
    results: list[Any] = [(observations, infos)]
    for step in range(steps):
        actions = fine_tuning(observations)
        if step == 1:
            for factors in actions["values"].values():
                factors[1] = 1e30
        observations, rewards, terminations, truncations, infos = env.step(actions)
        results.append((observations, rewards, terminations, truncations, infos))
        ended = terminations | truncations
        if mode is AutoresetMode.DISABLED and ended.any():
            observations, infos = env.reset(options={"reset_mask": ended})
            results.append((observations, infos))
    return results


@pytest.mark.parametrize("mode", AutoresetMode)
@pytest.mark.parametrize("seed", [None, "list"])
def test_every_autoreset_mode_is_that_of_gymnasiums_vector_environments(both, mode, seed):
    vector, makers = both(autoreset_mode=mode, num_batches=3)
    separate = SyncVectorEnv(makers, autoreset_mode=mode)
    assert vector.metadata["autoreset_mode"] is separate.metadata["autoreset_mode"] is mode
    assert vector.observation_space == separate.observation_space
    assert vector.action_space == separate.action_space
    ended = []
    for ours, theirs in zip(play(vector, mode, 8), play(separate, mode, 8), strict=True):
        assert ours[0] in vector.observation_space
        assert len(ours) == len(theirs)
        for a, b in zip(ours[1:-1], theirs[1:-1], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4)
            assert a.dtype == b.dtype
        assert_same(ours[0], theirs[0])
        broken = {"generalization", "locality", "backtracking", "regularisation", "drift"}  # may be any large number
        assert_same(without(ours[-1], broken), without(theirs[-1], broken))
        if len(ours) == 5:
            ended.append(tuple(np.flatnonzero(ours[2])))
    assert (1,) in ended and (0, 2) in ended  # alone and together
    if mode is AutoresetMode.SAME_STEP:
        final = next(ours[-1] for ours in play(vector, mode, 3) if "final_obs" in ours[-1])
        assert final["final_obs"][0] is None and final["final_obs"][1] in vector.single_observation_space
        assert final["final_info"]["diverged"].tolist() == [False, True, False]


def without(infos: dict[str, Any], left_out: set[str]) -> dict[str, Any]:
    """Infos without what a broken environment 1 makes of some numbers."""
    kept = {}
    for key, value in infos.items():
        if isinstance(value, dict):
            kept[key] = without(value, left_out)
        elif key in left_out:
            kept[key] = value[[0, 2]]
        else:
            kept[key] = value
    return kept


def test_an_environment_whose_next_batch_shows_that_it_broke_ends_alone_and_begins_anew(both, monkeypatch):
    vector, _ = both(autoreset_mode=AutoresetMode.SAME_STEP, num_batches=3)
    observations, _ = vector.reset(seed=0)
    observe, calls = vector.envs[1].episode.observe, []

    def broken(trace):
        observation = observe(trace)
        calls.append(trace)
        if len(calls) == 1:
            observation["edit_loss"] = torch.full((1,), float("nan"))
        return observation

    monkeypatch.setattr(vector.envs[1].episode, "observe", broken)
    observations, rewards, terminations, _, infos = vector.step(fine_tuning(observations))
    assert terminations.tolist() == [False, True, False]
    assert rewards[1] == -1000 and (rewards[[0, 2]] > -1000).all()
    assert infos["final_info"]["diverged"][1] and "indices" in infos
    assert observations["progress"][:, 0].tolist() == [pytest.approx(1 / 3), 0.0, pytest.approx(1 / 3)]
    assert all(torch.equal(vector.envs[1].lm.weight(m), vector.envs[1].lm.original_weight(m))
               for m in vector.envs[1].lm.module_shapes)  # fmt: skip
    *_, terminations, _, _ = vector.step(fine_tuning(observations))
    assert not terminations.any()


def test_a_broken_environment_spoils_no_other_environments_gradient(both):
    vector, makers = both(array_backend="torch", reward_gradient=True)
    observations, _ = vector.reset(seed=0)
    actions = fine_tuning(observations)
    for values in actions["values"].values():
        values[1] = 1e30
    _, rewards, terminations, _, infos = vector.step(actions)
    assert terminations.tolist() == [False, True, False] and rewards[1] == -1000
    for i in (0, 2):
        alone = makers[i]()
        observation, _ = alone.reset(seed=i)
        *_, info = alone.step(fine_tuning(observation))
        assert_same(of_environment(infos["reward_gradient"], i), info["reward_gradient"])
    assert not any(present[1] for key, present in infos["reward_gradient"].items() if key.startswith("_"))


def test_with_autoreset_disabled_an_ended_environment_asks_for_a_reset(both):
    vector, _ = both(autoreset_mode=AutoresetMode.DISABLED, num_batches=1)
    with pytest.raises(gym.error.ResetNeeded):
        vector.step(vector.action_space.sample())
    observations, _ = vector.reset(seed=0)
    vector.step(fine_tuning(observations))
    with pytest.raises(gym.error.ResetNeeded):
        vector.step(fine_tuning(observations))
    observations, infos = vector.reset(seed=5, options={"reset_mask": np.array([True, False, False])})
    assert infos["_indices"].tolist() == [True, False, False]
    assert observations["mask"].any(1).tolist() == [True, False, False]


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("form", ["updates", "accumulated"])
def test_dense_actions_of_environments_are_those_of_separate_environments(both, form, backend):
    vector, makers = both(array_backend=backend, reward_gradient=True)
    separate = [make() for make in makers]
    vector.reset(seed=7)
    for i, env in enumerate(separate):
        env.reset(seed=7 + i)
    rng = np.random.default_rng(0)
    terminations = np.zeros(3, dtype=bool)
    while not terminations.all():
        actions = {form: {m: (0.02 * rng.normal(size=(3, *shape[::-1]))).astype(np.float32)
                          for m, shape in vector.envs[0].lm.module_shapes.items()}}
        _, rewards, terminations, _, infos = vector.step(actions)
        steps = [env.step(of_environment(actions, i)) for i, env in enumerate(separate)]
        np.testing.assert_allclose(rewards, [step[1] for step in steps], rtol=1e-4)
        for i, step in enumerate(steps):
            assert_same(of_environment(infos["action_gradient"], i), step[4]["action_gradient"])
    for i, env in enumerate(separate):
        assert_same(vector.envs[i].lm.snapshot(), env.unwrapped.lm.snapshot())


def test_a_rejected_dense_action_of_one_environment_changes_no_environment(both):
    vector, _ = both()
    vector.reset(seed=0)
    m, (d_in, d_out) = next(iter(vector.envs[0].lm.module_shapes.items()))
    before = [env.lm.snapshot() for env in vector.envs]
    bad = np.ones((3, d_out, d_in), np.float32)
    bad[1, 2, 3] = np.nan
    with pytest.raises(ValueError, match=r"environment 1: action\['updates'\].* holds nan at \(2, 3\)"):
        vector.step({"updates": {m: bad}})
    with pytest.raises(ValueError, match="its first axis must be the 3 environments"):
        vector.step({"updates": {m: bad[0]}})
    for env, weights in zip(vector.envs, before, strict=True):
        assert all(torch.equal(weights[name], env.lm.weight(name)) for name in weights)


# -- what is rejected


def nan(value):
    value = value.copy()
    value[2, 0, -1] = np.nan
    return value


BAD = {
    "not finite in the last environment": (lambda v: nan(v), "environment 2: .*not finite"),
    "an environment too few": (lambda v: v[:2], "first axis must be the 3 environments"),
    "one environment's": (lambda v: v[0], "first axis must be the 3 environments"),
    "too wide": (lambda v: np.pad(v, ((0, 0), (0, 0), (0, 1))), "environment 0: .*has shape"),
    "too many rows": (lambda v: np.pad(v, ((0, 0), (0, 1), (0, 0))), "environment 0: .*has shape"),
    "ragged": (lambda v: [v[0], v[1], v[2][:1]], "no array of numbers|has shape"),
    "missing": (lambda v: None, "first axis must be the 3 environments"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_rejected_action_of_any_environment_leaves_all_environments_as_they_were(both, bad):
    spoil, message = BAD[bad]
    results = []
    for spoiled in (False, True):
        vector, _ = both(action_noise_std=1e-3, reward="efficacy", num_batches=3)
        observations, _ = vector.reset(seed=0)
        observations, *_ = vector.step(fine_tuning(observations))
        good = fine_tuning(observations)
        if spoiled:
            weights = [env.lm.snapshot() for env in vector.envs]
            states = [env.np_random.bit_generator.state for env in vector.envs]
            module = list(good["values"])[-1]
            with pytest.raises(ValueError, match=message):
                vector.step({**good, "values": {**good["values"], module: spoil(good["values"][module])}})
            for env, weight, state in zip(vector.envs, weights, states, strict=True):
                assert all(torch.equal(w, env.lm.weight(m)) for m, w in weight.items())
                assert state == env.np_random.bit_generator.state
                assert len(env.history) == 1
        results.append(vector.step(good))
    assert_same(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])


@pytest.mark.parametrize("action", [None, [1, 2, 3], {"keys": None}, {}])
def test_what_is_no_dictionary_of_factors_is_rejected(both, action):
    vector, _ = both()
    vector.reset(seed=0)
    with pytest.raises(ValueError, match="environment 0: the action"):
        vector.step(action)


@pytest.mark.parametrize(
    ("reset", "message"),
    [
        ({"seed": [1, 2]}, "2 seeds were given for 3 environments"),
        ({"options": {"indizes": [1]}}, "reset option 'indizes' is unknown"),
        ({"options": {"indices": [[0, 1, 2, 3]] * 2}}, "indices have 2 rows for 3 environments"),
        ({"options": {"reset_mask": [True, False, False]}}, "give a bool array of shape"),
        ({"options": {"reset_mask": np.zeros(3, bool)}}, "names no environment"),
        ({"options": {"reset_mask": np.array([True, False, True])}}, "leaves out environment 1, never begun"),
    ],
)
def test_a_reset_that_makes_no_sense_is_a_clear_error(both, reset, message):
    vector, _ = both()
    with pytest.raises(ValueError, match=message):
        vector.reset(**reset)


@pytest.mark.parametrize("num_envs", [0, -1, 2.0, True])
def test_the_number_of_environments_is_a_positive_integer(num_envs):
    with pytest.raises(ValueError, match="give a positive integer"):
        LifelongEditVectorEnv("zsre", num_envs=num_envs, model="tiny-llama")


# -- seeds, options, attributes


def test_seeds_count_up_or_are_given_one_by_one(both):
    vector, _ = both()
    counted = vector.reset(seed=4)[1]["indices"]
    listed = vector.reset(seed=[4, 5, 6])[1]["indices"]
    single = vector.reset(seed=[4, 4, 4])[1]["indices"]
    np.testing.assert_array_equal(counted, listed)
    assert (single == single[0]).all() and not (counted == counted[0]).all()
    assert vector.np_random_seed == (4, 4, 4)
    assert not (vector.reset()[1]["indices"] == single).all()


def test_the_same_seed_gives_the_same_trajectory_bit_for_bit(both):
    rewards = []
    for seed in (5, 5, 6):
        vector, _ = both(action_noise_std=1e-3, reward="efficacy")
        observations, _ = vector.reset(seed=seed)
        for _ in range(2):
            observations, reward, *_ = vector.step(fine_tuning(observations))
        rewards.append(reward.tolist())
    assert rewards[0] == rewards[1] != rewards[2]


def test_options_hold_for_every_environment_or_a_row_of_indices_for_each(both):
    vector, _ = both()
    _, infos = vector.reset(seed=0, options={"indices": [3, 1, 2, 0]})
    assert infos["indices"].tolist() == [[3, 1, 2, 0]] * 3
    own = [[3, 1, 2, 0], [5, 6, 7, 8], [8, 7, 6, 5]]
    observations, infos = vector.reset(options={"indices": own})
    assert infos["indices"].tolist() == own
    vector.step(fine_tuning(observations))
    weights = [env.lm.snapshot() for env in vector.envs]
    vector.reset(options={"keep_weights": True})
    for env, weight in zip(vector.envs, weights, strict=True):
        assert all(torch.equal(w, env.lm.weight(m)) for m, w in weight.items())
        assert any(not torch.equal(w, env.lm.original_weight(m)) for m, w in weight.items())


def test_each_environment_is_evaluated_on_its_own_facts_and_rendered(both):
    vector, makers = both(render_mode="ansi")
    observations, _ = vector.reset(seed=0)
    assert vector.call("edited_records") == ([], [], [])
    vector.step(fine_tuning(observations, 0.5))
    scores = vector.call("evaluate", generate=False)
    assert len({s.top1 for s in scores} | {s.mean for s in scores}) > 1
    for i, text in enumerate(vector.render()):
        alone = makers[i]()
        observation, _ = alone.reset(seed=i)
        alone.step(fine_tuning(observation, 0.5))
        assert text == alone.render()
    assert vector.get_attr("steps_per_batch") == (1, 1, 1)
    assert both()[0].render() is None


def test_closing_restores_every_environment_and_may_be_done_twice(both):
    vector, _ = both()
    observations, _ = vector.reset(seed=0)
    vector.step(fine_tuning(observations))
    vector.close()
    vector.close()
    for env in vector.envs:
        assert all(torch.equal(env.lm.weight(m), env.lm.original_weight(m)) for m in env.lm.module_shapes)
    assert len(vector.envs[0].lm.prefix_cache) == 0


# -- what is shared


def tensor_bytes() -> int:
    gc.collect()
    storages = [t.untyped_storage() for t in gc.get_objects() if type(t) is torch.Tensor]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_environment_more_takes_the_memory_of_its_edited_weights(facts, dtype):
    lm = EditableLM.load("tiny-llama", MODULES, dtype=dtype, device="cpu")
    before, kept, grown = tensor_bytes(), [], []
    for num_envs in (1, 4):
        kept.append(gym.make_vec("RLEdit-ZsRE-v0", num_envs, model=lm, data=facts(), num_batches=2, batch_size=2))
        grown.append(tensor_bytes() - before)
    grown[1] -= grown[0]
    vector: Any = kept[1]
    shapes = vector.envs[0].lm.module_shapes.values()
    numbers = sum(d_in * d_out for d_in, d_out in shapes)
    assert grown[1] - grown[0] == 3 * numbers * (4 if dtype == "float32" else 6)
    first, *others = vector.envs
    for env in others:
        assert env.lm.model is first.lm.model and env.encoded is first.encoded
        assert env.lm.prefix_cache is first.lm.prefix_cache and env.lm.reference_cache is first.lm.reference_cache


def test_an_lm_that_is_handed_over_keeps_its_own_edits(tiny_lm, facts):
    lm = tiny_lm()
    name, (d_in, d_out) = next(iter(lm.module_shapes.items()))
    lm.apply(
        {m: torch.ones(1, i) for m, (i, _) in lm.module_shapes.items()},
        {m: torch.ones(1, o) for m, (_, o) in lm.module_shapes.items()},
    )
    before = lm.snapshot()
    vector: Any = gym.make_vec("RLEdit-ZsRE-v0", 2, model=lm, data=facts(), num_batches=2, batch_size=2)
    observations, _ = vector.reset(seed=0)
    vector.step(fine_tuning(observations))
    vector.close()
    assert all(torch.equal(w, lm.weight(m)) for m, w in before.items())


def test_passes_serve_several_environments_and_are_fewer_than_those_of_environments_alone(both, monkeypatch):
    served: list[set[int]] = []
    routed = BesideModules.routed
    monkeypatch.setattr(BesideModules, "routed", lambda self, s, *rest: served.append(set(s)) or routed(self, s, *rest))
    passes = {}
    for num_envs in (1, 3):
        vector, _ = both(num_envs=num_envs)
        served.clear()
        observations, _ = vector.reset(seed=0)
        vector.step(fine_tuning(observations))
        passes[num_envs] = len(served)
    assert {0, 1, 2} in served
    assert passes[3] < 3 * passes[1]


# -- views


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("rule", ["gradient", "least_squares"])
def test_the_views_are_those_of_separate_environments(both, backend, rule):
    vector, makers = both(array_backend=backend)
    views = VectorGradientFeatures(VectorScaledUpdate(vector, rule=rule, rank=1))
    separate = [GradientFeatures(ScaledUpdate(make(), rule=rule, rank=1)) for make in makers]
    assert views.single_observation_space == separate[0].observation_space
    assert views.single_action_space == separate[0].action_space
    observations, _ = views.reset(seed=1)
    expected = [env.reset(seed=1 + i)[0] for i, env in enumerate(separate)]
    views.action_space.seed(0)
    for _ in range(2):
        assert observations in views.observation_space
        np.testing.assert_allclose(observations, expected, rtol=1e-3, atol=1e-4)
        actions = views.action_space.sample()
        observations, rewards, terminations, _, _ = views.step(actions)
        steps = [env.step(action) for env, action in zip(separate, actions, strict=True)]
        expected = [step[0] for step in steps]
        np.testing.assert_allclose(rewards, [step[1] for step in steps], rtol=1e-3)
    np.testing.assert_allclose(observations, expected, rtol=1e-3, atol=1e-4)
    assert terminations.all()
    observations, rewards, terminations, _, _ = views.step(actions)  # which begins new episodes
    assert not terminations.any() and not rewards.any() and (observations[:, -1] == -1).all()


def test_views_reject_what_they_cannot_look_at(both):
    vector, _ = both(autoreset_mode=AutoresetMode.SAME_STEP)
    with pytest.raises(ValueError, match="NEXT_STEP or DISABLED"):
        VectorGradientFeatures(vector)
    with pytest.raises(ValueError, match=r"make it with gymnasium\.make_vec"):
        VectorGradientFeatures(gym.make_vec("CartPole-v1", 2))
    scaled = VectorScaledUpdate(vector)
    scaled.reset(seed=0)
    before = vector.envs[0].lm.snapshot()
    action = np.zeros(scaled.action_space.shape, np.float32)
    with pytest.raises(ValueError, match="must be"):
        scaled.step(action[:, :-1])
    action[2, 0] = np.nan
    with pytest.raises(ValueError, match="environment 2: .*not finite"):
        scaled.step(action)
    assert all(torch.equal(w, vector.envs[0].lm.weight(m)) for m, w in before.items())


@pytest.mark.parametrize("share", ["module", "kind", "all"])
def test_vector_views_share_numbers_as_the_views_do(both, share):
    vector, makers = both()
    views = VectorGradientFeatures(VectorScaledUpdate(vector, share=share), share=share)
    one = GradientFeatures(ScaledUpdate(makers[0](), share=share), share=share)
    assert views.single_action_space == one.action_space
    assert views.single_observation_space == one.observation_space
    observations, _ = views.reset(seed=2)
    expected, _ = one.reset(seed=2)
    actions = np.linspace(-0.5, 0.5, views.action_space.shape[1], dtype=np.float32)
    np.testing.assert_allclose(observations[0], expected, rtol=1e-3, atol=1e-4)
    rewards = views.step(np.tile(actions, (vector.num_envs, 1)))[1]
    np.testing.assert_allclose(rewards[0], one.step(actions)[1], rtol=1e-3)


def test_a_step_of_the_views_before_the_first_reset_asks_for_one(both):
    vector, _ = both()
    views = VectorGradientFeatures(VectorScaledUpdate(vector))
    with pytest.raises(gym.error.ResetNeeded):
        views.step(np.zeros(views.action_space.shape, np.float32))


def test_attributes_and_methods_of_all_environments_are_had_by_name(both):
    vector, _ = both(num_envs=2)
    vector.reset(seed=3)
    assert vector.call("steps_per_batch") == vector.get_attr("steps_per_batch") == (1, 1)
    assert vector.call("edited_records") == ([], [])
    assert vector.np_random_seed == (3, 4)
    assert [r.bit_generator.state for r in vector.np_random] == [e.np_random.bit_generator.state for e in vector.envs]


def test_the_examples_of_the_docstrings_run():
    results = doctest.testmod(rledit_env.vector.env)
    assert results.attempted >= 5 and results.failed == 0
