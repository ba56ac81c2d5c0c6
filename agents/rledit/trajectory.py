"""One training episode: its trajectory, and the policy gradient of its return."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.rledit.credit import CreditAccumulator
from agents.rledit.hypernetwork import StepRecord
from agents.rledit.policy import HypernetworkPolicy
from rledit_env.interface import Environment, editing_env

Learn = Callable[[list[Tensor]], object]
AT_END = "constrained_at_end"  # name of a trajectory's number: the last value of the component under a bound


def trajectory(
    agent: HypernetworkPolicy, env: Environment, seed: int, learn: Learn | None = None, **reset: Any
) -> tuple[list[Tensor], dict[str, float]]:
    """Run one episode and differentiate its return.

    Args:
        agent: the agent whose policy acts.
        env: an environment that gives the reward's gradient.
        seed, reset: for the environment's ``reset``.
        learn: called with the policy gradient after each `RLEditConfig.batches_per_update` batches, except the
            episode's last ones; it may change the policy, which then continues the episode. None: not called.

    Returns:
        The policy gradient (negative, for descent) of the whole episode, or with ``learn`` of its last batches; and the
        numbers of the whole episode by name.
    """
    with agent.presented.by(env):
        return _differentiated(agent, env, seed, learn, **reset)


def _differentiated(
    agent: HypernetworkPolicy, env: Environment, seed: int, learn: Learn | None, **reset: Any
) -> tuple[list[Tensor], dict[str, float]]:
    network, config = agent.network, agent.config
    inner = editing_env(env)
    forget_states(env)
    observation, _ = env.reset(seed=seed, **reset)
    network.reset()
    credit = CreditAccumulator(config.credit, network.learns_keys, network.shrinks)
    records: list[StepRecord] = []
    infos: list[dict[str, float]] = []
    steps_until_learning = inner.steps_per_batch * (config.batches_per_update or 0)
    total, done, graph_bytes = 0.0, False, 0
    while not done:
        record = agent.observe(observation, adapt=True)
        graph_bytes += network.graph_bytes(len(next(iter(record.keys.values()))))
        with torch.set_grad_enabled(graph_bytes <= config.graph_bytes):
            factors = network.factors(record)
        if graph_bytes <= config.graph_bytes:
            record = replace(record, factors=factors)
        keys, values = ({m: f.detach() for m, f in part.items()} for part in factors)
        action = agent.restrained(agent.action(observation, record, keys, values))
        observation, reward, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        if info["diverged"]:
            warnings.warn(f"the LLM broke at step {len(infos)} of a training stream; that step is left out of "
                          "the gradient. Lower the step size or drift_limit", stacklevel=2)
            break
        of_action = info["action_gradient"]
        if "updates" in of_action:
            of_action = {"updates": agent.restrained_gradient(of_action["updates"])}
        credit.take(keys, values, agent.restrained_gradient(info.pop("reward_gradient", None) or {}), of_action,
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
            records, graph_bytes = [], 0
    if not infos:
        return no_gradient(agent), {"return": float(reward), "steps": 0.0}
    numbers = _numbers(env, infos, total) | {"step_size": float(network.step_sizes().detach().mean())}
    return policy_gradient(agent, records, credit) if records else no_gradient(agent), numbers


def _numbers(env: Environment, infos: Sequence[dict[str, float]], total: float) -> dict[str, float]:
    """A trajectory's numbers, from those of its steps and its return."""
    numbers = {k: float(np.mean([i[k] for i in infos if k in i])) for k in infos[-1]}
    numbers |= {"return": total, "steps": float(len(infos)), "drift": infos[-1]["drift"]}
    multiplier = editing_env(env).multiplier
    if multiplier is not None:
        component = multiplier.constraint.component
        constrained = [i[component] for i in infos if component in i]
        numbers |= {AT_END: constrained[-1]} if constrained else {}
    return numbers


def policy_gradient(
    agent: HypernetworkPolicy, records: Sequence[StepRecord], credit: CreditAccumulator
) -> list[Tensor]:
    """−∂R/∂φ, divided by the number of steps unless `RLEditConfig.clipping` is "running sum".

    Each step's credit is backpropagated through the network's graph, which was kept or is computed again.
    """
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


def forget_states(env: Environment) -> None:
    """Drop the LLM's cached states.

    The last bits of a passage's states depend on the passages computed with it. A run resumed from a checkpoint starts
    with nothing cached, and must end like the uninterrupted one bit for bit.
    """
    lm = editing_env(env).lm
    lm.prefix_cache.clear()
    lm.reference_cache.clear()
