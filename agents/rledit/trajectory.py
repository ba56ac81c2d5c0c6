"""One training stream: its trajectory, and the policy gradient of its return."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from agents.rledit.credit import CreditAccumulator
from agents.rledit.hypernetwork import StepRecord
from agents.rledit.policy import HypernetworkPolicy

Learn = Callable[[list[Tensor]], object]
AT_END = "constrained_at_end"  # a trajectory's number: the component under a bound, last scored


def trajectory(
    agent: HypernetworkPolicy, env: gym.Env, seed: int, learn: Learn | None = None, **reset: Any
) -> tuple[list[Tensor], dict[str, float]]:
    """One stream: the policy gradient (negative, for descent) and the trajectory's numbers.

    Args:
        agent: whose policy acts.
        env: an environment that gives the reward's gradient.
        seed, reset: for the environment's ``reset``.
        learn: takes the policy gradient of each `RLEditConfig.batches_per_update` batches but the stream's last ones,
            and may change the policy, which then goes on with the stream; None takes the stream as a whole.

    Returns:
        The gradient of the whole stream, or of its last batches; the numbers are always the whole stream's.
    """
    with agent.presented.by(env):
        return _differentiated(agent, env, seed, learn, **reset)


def _differentiated(
    agent: HypernetworkPolicy, env: gym.Env, seed: int, learn: Learn | None, **reset: Any
) -> tuple[list[Tensor], dict[str, float]]:
    network, config = agent.network, agent.config
    inner: Any = env.unwrapped
    forget_states(env)
    observation, _ = env.reset(seed=seed, **reset)
    network.reset()
    credit = CreditAccumulator(config.credit, network.learns_keys, network.shrinks)
    records: list[StepRecord] = []
    infos: list[dict[str, float]] = []
    steps_until_learning = inner.steps_per_batch * (config.batches_per_update or 0)
    total, done, kept = 0.0, False, 0
    while not done:
        record = agent.observe(observation, adapt=True)
        kept += network.graph_bytes(len(next(iter(record.keys.values()))))
        with torch.set_grad_enabled(kept <= config.graph_bytes):
            factors = network.factors(record)
        if kept <= config.graph_bytes:
            record = replace(record, factors=factors)
        keys, values = ({m: f.detach() for m, f in part.items()} for part in factors)
        action = agent.action(observation, record, keys, values)
        observation, reward, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        if info["diverged"]:
            warnings.warn(f"the LLM broke at step {len(infos)} of a training stream; that step is left out of "
                          "the gradient. Lower the step size or drift_limit", stacklevel=2)
            break
        credit.take(keys, values, info.pop("reward_gradient", None), info["action_gradient"],
                    config.discount ** len(records), record.retained)
        records.append(record)
        infos.append({k: v for k, v in info.items() if isinstance(v, float)} | {"reward": float(reward)})
        total += float(reward)
        if config.drift_limit is not None and info["drift"] > config.drift_limit and not done:
            warnings.warn(f"drift {info['drift']:.2f} passed drift_limit at step {len(infos)}: the trajectory is "
                          "cut here, before the LLM breaks", stacklevel=2)
            break
        if learn and steps_until_learning and inner.position % steps_until_learning == 0 and not done:
            learn(policy_gradient(agent, records, credit))
            records, kept = [], 0
    if not infos:
        return no_gradient(agent), {"return": float(reward), "steps": 0.0}
    numbers = _numbers(env, infos, total) | {"step_size": float(network.step_sizes().detach().mean())}
    return policy_gradient(agent, records, credit) if records else no_gradient(agent), numbers


def _numbers(env: gym.Env, infos: Sequence[dict[str, float]], total: float) -> dict[str, float]:
    """A trajectory's numbers, given its steps' and its return."""
    inner: Any = env.unwrapped
    numbers = {k: float(np.mean([i[k] for i in infos if k in i])) for k in infos[-1]}
    numbers |= {"return": total, "steps": float(len(infos)), "drift": infos[-1]["drift"]}
    if inner.multiplier is not None:
        component = inner.multiplier.constraint.component
        constrained = [i[component] for i in infos if component in i]
        numbers |= {AT_END: constrained[-1]} if constrained else {}
    return numbers


def policy_gradient(
    agent: HypernetworkPolicy, records: Sequence[StepRecord], credit: CreditAccumulator
) -> list[Tensor]:
    """−∂R/∂φ per step of the stream, or with `RLEditConfig.clipping` "running sum" of the whole stream: the
    network's graph, kept or made a second time, step by step, with the cotangents."""
    parameters, config = agent.network.learned_parameters(), agent.config
    running = config.clipping == "running sum"
    sign = -1.0 if running else -1 / len(records)
    agent.optimizer.zero_grad()
    for record, credited in zip(records, credit.finish(), strict=True):
        for_keys, for_values = ({m: g.mul_(sign) for m, g in part.items()} for part in credited)
        agent.network.accumulate(record, for_keys, for_values, config.graph_bytes)
        if running:
            torch.nn.utils.clip_grad_norm_(parameters, config.max_gradient_norm)
    gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    agent.optimizer.zero_grad()
    return gradient


def no_gradient(agent: HypernetworkPolicy) -> list[Tensor]:
    """The policy gradient of a trajectory of no steps."""
    return [torch.zeros_like(p) for p in agent.network.learned_parameters()]


def forget_states(env: gym.Env) -> None:
    """Drop the LLM's cached states: what a passage's were computed together with changes their last bits, and a run
    that is taken up from a checkpoint, with nothing cached, must end as the uninterrupted one, bit for bit."""
    lm = env.unwrapped.lm  # type: ignore[attr-defined]
    lm.prefix_cache.clear()
    lm.reference_cache.clear()
