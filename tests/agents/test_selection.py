"""Tests of agents.selection: the best of several is the one with the highest score within a bound on the divergence."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch

import agents.rledit.trainer
import agents.sb3.callbacks
import rledit_env  # noqa: F401 - registers the environments
from agents import HypernetworkConfig, RLEditAgent, RLEditConfig, StandardAgent, StandardConfig
from agents.selection import TEXT, divergence, within_bound
from rledit_env.evaluation.metrics import Metrics
from rledit_env.preservation import OwnText
from rledit_env.self_text import self_text

MODULES = "model.layers.[1-2].mlp.up_proj"


@pytest.fixture
def make(tiny_lm: Any, facts: Any) -> Any:
    def made(**arguments: Any) -> Any:
        settings = {"reward": "none", **arguments}
        return gym.make(
            "RLEdit-CounterFact-v0", model=tiny_lm(modules=MODULES), data=facts("counterfact", 12), num_batches=2,
            batch_size=2, array_backend="torch", token="subject", disable_env_checker=True, **settings,
        )  # fmt: skip

    return made


def test_scores_within_the_bound_come_before_all_beyond_it_and_those_by_their_divergence() -> None:
    pairs = [(90.0, 0.3), (80.0, 0.1), (70.0, 0.05), (0.0, 0.1), (99.0, 5.0), (-math.inf, 0.0), (50.0, math.nan)]
    ranked = sorted(pairs, key=lambda pair: within_bound(*pair, bound=0.1), reverse=True)
    assert ranked[:5] == [(80.0, 0.1), (70.0, 0.05), (0.0, 0.1), (90.0, 0.3), (99.0, 5.0)]
    assert within_bound(-math.inf, 0.0, 0.1) == within_bound(50.0, math.nan, 0.1) == -math.inf


def test_the_divergence_is_of_text_that_nothing_else_reads(make: Any, random_action: Any) -> None:
    env = make()
    lm = env.unwrapped.lm
    env.reset(seed=0)
    assert divergence(lm) == 0
    env.step(random_action(env.unwrapped, scale=1.0))
    assert divergence(lm) > 0
    chosen = {p.input_ids for p in TEXT.texts(lm)}
    assert not chosen & {p.input_ids for p in OwnText().texts(lm)} and not chosen & {p.input_ids for p in self_text(lm)}


@pytest.mark.parametrize(("bound", "best"), [(None, 4), (0.2, 2), (0.01, 1)])
def test_the_best_checkpoint_is_the_best_within_the_bound(
    make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bound: float | None, best: int
) -> None:
    # Of the evaluations after 0, 1, 2, 3 and 4 updates: (mean score, divergence).
    seen = iter([(50.0, 0.4), (60.0, 0.1), (70.0, 0.2), (80.0, 0.3), (90.0, 0.5)])
    now: list[tuple[float, float]] = []

    def scored(*_: Any) -> Metrics:
        now[:] = [next(seen)]
        return Metrics(*[now[0][0]] * 4, exact_match=None, top1=0.0, taken=())

    monkeypatch.setattr(agents.rledit.trainer, "evaluate_sharded", scored)
    monkeypatch.setattr(agents.rledit.trainer, "divergence", lambda _: now[0][1])
    config = RLEditConfig(HypernetworkConfig(rank=4), learning_rate=0.05, prior_batches=2, kl_bound=bound)
    agent = RLEditAgent(make(reward="efficacy", reward_gradient=True), config)
    policies: list[dict[str, torch.Tensor]] = []

    def keep(_: Any) -> None:
        policies.append({k: v.detach().clone() for k, v in agent.network.state_dict().items()})

    keep(None)
    agent.learn(8, keep, progress_bar=False, eval_env=make(), eval_every=1, patience=99)
    held = agent.network.state_dict()
    assert [all(torch.equal(held[k], v) for k, v in policy.items()) for policy in policies].index(True) == best


@pytest.mark.parametrize(("bound", "best"), [(None, 3), (0.2, 1)])
def test_a_standard_algorithm_s_best_policy_is_the_best_within_the_bound(
    make: Any, monkeypatch: pytest.MonkeyPatch, bound: float | None, best: int
) -> None:
    # Of the evaluations after 0, 1, 2 and 3 streams.
    seen = iter([(50.0, 0.1), (60.0, 0.2), (70.0, 0.3), (80.0, 0.4)])
    now: list[tuple[float, float]] = []

    def scored(*_: Any, **__: Any) -> Metrics:
        now[:] = [next(seen, (0.0, 9.0))]
        return Metrics(*[now[0][0]] * 4, exact_match=None, top1=0.0, taken=())

    held_out = make(split="eval")
    monkeypatch.setattr(held_out.unwrapped, "evaluate", scored)
    monkeypatch.setattr(agents.sb3.callbacks, "divergence", lambda _: now[0][1])
    config = StandardConfig(
        baseline_streams=0, kl_bound=bound, hyperparameters={"n_steps": 2, "batch_size": 2, "n_epochs": 1}
    )
    agent = StandardAgent(make(reward="efficacy"), config)
    agent.learn(6, progress_bar=False, eval_env=held_out, eval_every=1)
    assert agent.best_score == [50.0, 60.0, 70.0, 80.0][best]


def test_calibration_takes_the_strongest_step_sizes_within_the_bound(make: Any) -> None:
    chosen = []
    for bound, given in ((None, None), (1e-3, None), (None, 1e-3)):
        config = RLEditConfig(HypernetworkConfig(rank=4, step_size=0.3), prior_batches=2, kl_bound=bound)
        agent = RLEditAgent(make(reward="efficacy", reward_gradient=True), config)
        agent.gather_moments(agent.env, progress_bar=False)  # type: ignore[arg-type]
        scores = agent.calibrate(make(), factors=(1.0, 1e-1, 1e-3), kl_bound=given)
        chosen.append((float(agent.network.step_sizes().mean().detach()) / 0.3, scores))
    assert chosen[0][0] == pytest.approx(1.0, rel=1e-4) or chosen[0][1][1.0] < max(chosen[0][1].values())
    factor, scores = chosen[1]
    assert chosen[1] == chosen[2]
    assert scores[1.0] < 0 and factor < 1 and scores[min(scores, key=lambda f: abs(f - factor))] == max(scores.values())


def test_a_bound_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="kl_bound is 0; give a positive number of nats"):
        RLEditConfig(kl_bound=0)
    with pytest.raises(ValueError, match="kl_bound is -1; give a positive number of nats"):
        StandardConfig(kl_bound=-1)
