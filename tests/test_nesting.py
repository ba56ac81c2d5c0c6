"""Wrappers, views and agents around what they can read, and around what they cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import wrappers
from gymnasium.wrappers import vector as vector_wrappers
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

import rledit_env  # noqa: F401 - registers the environments
from agents import (
    FineTuningAgent,
    FTLAgent,
    MEMITAgent,
    RandomSearchAgent,
    RLEditAgent,
    StandardAgent,
    StreamsVecEnv,
    UltraEditAgent,
)
from rledit_env.vector import VectorGradientFeatures, VectorScaledUpdate
from rledit_env.wrappers import FlattenFactors, GradientFeatures, RelativeReward, ScaledUpdate

SETTINGS: dict[str, Any] = {
    "model": "tiny-llama", "edit_modules": "model.layers.1.mlp.up_proj", "num_batches": 2, "batch_size": 2
}  # fmt: skip


def make(**arguments: Any) -> Any:
    return gym.make("RLEdit-ZsRE-v0", **{**SETTINGS, **arguments})


def make_vec(**arguments: Any) -> Any:
    return gym.make_vec("RLEdit-ZsRE-v0", 2, **{**SETTINGS, "autoreset_mode": "Disabled", **arguments})


@pytest.fixture(scope="module")
def env() -> Any:
    return make()


@pytest.fixture(scope="module")
def envs() -> Any:
    return make_vec()


ONE_OF_TWO = r"use one of the two: GradientFeatures\(ScaledUpdate\(env\)\), or FlattenFactors\(env\)"
WRONG_ORDERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a scaled update around features": (
        lambda e: ScaledUpdate(GradientFeatures(e)),
        r"ScaledUpdate reads the raw observations, which GradientFeatures has replaced; put it the other way round: "
        r"GradientFeatures\(ScaledUpdate\(env\)\)$",
    ),
    "with a wrapper of Gymnasium's between": (
        lambda e: ScaledUpdate(wrappers.RecordEpisodeStatistics(GradientFeatures(e))), "GradientFeatures has replaced",
    ),
    "features twice": (lambda e: GradientFeatures(GradientFeatures(e)), "leave out one GradientFeatures of the two"),
    "a scaled update twice": (lambda e: ScaledUpdate(ScaledUpdate(e)), "leave out one ScaledUpdate of the two"),
    "flat factors twice": (lambda e: FlattenFactors(FlattenFactors(e)), "leave out one FlattenFactors of the two"),
    "relative rewards twice": (
        lambda e: RelativeReward(GradientFeatures(RelativeReward(ScaledUpdate(e)))), "leave out one RelativeReward",
    ),
    "features of flat factors": (lambda e: GradientFeatures(FlattenFactors(e)), ONE_OF_TWO),
    "flat features": (lambda e: FlattenFactors(GradientFeatures(e)), ONE_OF_TWO),
    "flat scaled updates": (lambda e: FlattenFactors(ScaledUpdate(e)), ONE_OF_TWO),
    "relative rewards of factors": (
        lambda e: RelativeReward(GradientFeatures(e)), r"wrap GradientFeatures\(ScaledUpdate\(env\)\)",
    ),
    "features of a flat observation": (
        lambda e: GradientFeatures(wrappers.FlattenObservation(e)),
        r"other way round: FlattenObservation\(GradientFeatures\(env\)\), or leave FlattenObservation out",
    ),
    "features of a part": (
        lambda e: GradientFeatures(wrappers.FilterObservation(e, ["mask"])), "which FilterObservation has replaced",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_ORDERS)
def test_wrappers_in_an_order_that_cannot_work_name_the_right_one_in_a_line(case: str, env: Any) -> None:
    wrap, message = WRONG_ORDERS[case]
    with pytest.raises(ValueError, match=message) as raised:
        wrap(env)
    assert "\n" not in str(raised.value)


WRONG_VECTOR_ORDERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a scaled update around features": (
        lambda e: VectorScaledUpdate(VectorGradientFeatures(e)),
        r"way round: VectorGradientFeatures\(VectorScaledUpdate\(env\)\)$",
    ),
    "features twice": (lambda e: VectorGradientFeatures(VectorGradientFeatures(e)), "leave out one VectorGradientFeat"),
    "updates twice": (lambda e: VectorScaledUpdate(VectorScaledUpdate(e)), "leave out one VectorScaledUpdate"),
    "features of a flat observation": (
        lambda e: VectorGradientFeatures(vector_wrappers.FlattenObservation(e)), "FlattenObservation has replaced",
    ),
    "Stable-Baselines3 with factors": (
        StreamsVecEnv,
        r"observations of \w+ are dictionaries.* StreamsVecEnv\(VectorGradientFeatures\(VectorScaledUpdate\(envs\)\)\)",
    ),
    "Stable-Baselines3 with features alone": (
        lambda e: StreamsVecEnv(VectorGradientFeatures(e)), "the actions of VectorGradientFeatures are dictionaries",
    ),
    "one environment's view": (GradientFeatures, "LifelongEditVectorEnv is a vector env.*; use VectorGradientFeatures"),
    "one environment's flat view": (FlattenFactors, "is a vector environment; make it with gymnasium.make$"),
    "one environment's relative rewards": (RelativeReward, "is a vector environment; make it with gymnasium.make$"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_VECTOR_ORDERS)
def test_vector_views_in_an_order_that_cannot_work_name_the_right_one(case: str, envs: Any) -> None:
    wrap, message = WRONG_VECTOR_ORDERS[case]
    with pytest.raises(ValueError, match=message) as raised:
        wrap(envs)
    assert "\n" not in str(raised.value)


VIEWS = [GradientFeatures, ScaledUpdate, FlattenFactors]
VECTOR_VIEWS = [VectorGradientFeatures, VectorScaledUpdate]
AGENTS = [StandardAgent, RandomSearchAgent, RLEditAgent, UltraEditAgent, MEMITAgent, FTLAgent, FineTuningAgent]


@pytest.mark.parametrize("reader", [*VIEWS, *AGENTS])
def test_what_is_no_environment_of_this_package_is_named_by_every_view_and_agent(reader: Any, envs: Any) -> None:
    foreign = gym.make("CartPole-v1")
    for given, message in (
        (foreign, "CartPole.* is no environment of this package; give .* one such as RLEdit-CounterFact-v0"),
        (envs, "takes a single environment, but LifelongEditVectorEnv is a vector environment"),
        (DummyVecEnv([lambda: foreign]), "takes an environment, but was given a DummyVecEnv"),
        ("RLEdit-ZsRE-v0", "takes an environment, but was given a str; give what gymnasium.make returns"),
    ):
        with pytest.raises(ValueError, match=message):
            reader(given)


@pytest.mark.parametrize("view", [*VECTOR_VIEWS, StreamsVecEnv])
def test_what_is_no_vector_environment_is_named_by_every_vector_view(view: Any, env: Any) -> None:
    with pytest.raises(ValueError, match="takes a vector environment, but OrderEnforcing is a single one"):
        view(env)
    with pytest.raises(ValueError, match="takes a vector environment, but was given a NoneType"):
        view(None)
    if view in VECTOR_VIEWS:
        for foreign in (gym.make_vec("CartPole-v1", 2), gym.vector.SyncVectorEnv([lambda: env])):
            with pytest.raises(ValueError, match="is no vectorised environment of this package; make it with .*make_v"):
                view(foreign)


@pytest.mark.parametrize("agent", AGENTS)
def test_an_agent_names_the_view_that_it_cannot_read_through(agent: Any, env: Any) -> None:
    with pytest.raises(ValueError, match="which GradientFeatures has replaced; give it the env.* without GradientFeat"):
        agent(GradientFeatures(ScaledUpdate(env)))


# -- what works


INSIDE: dict[str, Callable[[Any], Any]] = {
    "TimeLimit": lambda e: wrappers.TimeLimit(e, 2),
    "RecordEpisodeStatistics": wrappers.RecordEpisodeStatistics,
    "TransformReward": lambda e: wrappers.TransformReward(e, lambda r: r / 10),
    "NormalizeReward": wrappers.NormalizeReward,
    "ClipReward": lambda e: wrappers.ClipReward(e, -100, 1),
    "OrderEnforcing": wrappers.OrderEnforcing,
    "PassiveEnvChecker": wrappers.PassiveEnvChecker,
    "Autoreset": wrappers.Autoreset,
    "StickyAction": lambda e: wrappers.StickyAction(e, 0.5),
    "DelayObservation": lambda e: wrappers.DelayObservation(e, 1),
    "Monitor": Monitor,
}
AROUND: dict[str, Callable[[Any], Any]] = {
    **INSIDE,
    "NormalizeObservation": wrappers.NormalizeObservation,
    "FlattenObservation": wrappers.FlattenObservation,
    "FrameStackObservation": lambda e: wrappers.FrameStackObservation(e, 2),
    "RescaleObservation": lambda e: wrappers.RescaleObservation(e, 0.0, 1.0),
    "TimeAwareObservation": lambda e: wrappers.TimeAwareObservation(wrappers.TimeLimit(e, 2)),
    "RescaleAction": lambda e: wrappers.RescaleAction(e, 0.0, 1.0),
    "ClipAction": wrappers.ClipAction,
}


def features(env: Any) -> Any:
    return GradientFeatures(ScaledUpdate(env))


def play(env: Any) -> None:
    env.reset(seed=0)
    action = np.full(env.action_space.shape, 0.3, np.float32)
    rewards = [float(np.mean(env.step(action)[1])) for _ in range(2)]
    assert all(np.isfinite(rewards)) and any(rewards)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", AROUND)
def test_gymnasium_s_wrappers_go_inside_and_around_the_views_where_they_can(name: str, env: Any) -> None:
    if name in INSIDE:
        play(features(INSIDE[name](env)))
        play(FlattenFactors(INSIDE[name](env)))
        play(RelativeReward(INSIDE[name](features(env)), streams=1))
    play(AROUND[name](features(env)))


@pytest.mark.parametrize(
    "wrap",
    [
        vector_wrappers.RecordEpisodeStatistics,
        vector_wrappers.NormalizeReward,
        lambda e: vector_wrappers.ClipReward(e, -1, 1),
    ],
)
def test_gymnasium_s_vector_wrappers_go_inside_and_around_the_views(wrap: Any, envs: Any) -> None:
    play(VectorGradientFeatures(VectorScaledUpdate(wrap(envs))))
    play(wrap(VectorGradientFeatures(VectorScaledUpdate(envs))))
