"""A training's checkpoints: the state that an interrupted run goes on from, and the last and the best policy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from agents.files import (
    START_ANEW,
    TRAINING_STATE,
    built_from,
    known_best,
    moments_of,
    read_training_state,
    under,
)
from agents.rledit.config import HypernetworkConfig, RLEditConfig
from agents.rledit.normaliser import moments_state
from agents.rledit.policy import HypernetworkPolicy
from agents.rledit.progress import Progress
from agents.settings import setting_differences
from rledit_env.files import write_tensors
from rledit_env.interface import editing_env
from rledit_env.preservation import Multiplier

POLICY = ("network.", "prior.", "moments.", "lifetime.", "stream.")  # what the names of a policy's tensors begin with
TrainingState = tuple[dict[str, Tensor], dict[str, Any]]  # tensors by name, and counters


def training_state(agent: HypernetworkPolicy) -> TrainingState:
    """Copies of all that the rest of the training depends on: tensors, and the counters."""
    progress, tensors = agent.progress, agent.policy_state()
    parameters = [p for group in agent.optimizer.param_groups for p in group["params"]]
    for place, parameter in enumerate(parameters):  # the optimiser's own numbering
        for name, value in agent.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{place}.{name}"] = value.detach().clone()
    tensors |= {f"best.{k}": v for k, v in (progress.best or {}).items()}
    tensors |= {f"mean.{k}": v.clone() for k, v in progress.mean.items()}
    counters = {
        **agent.description(), "begun": progress.begun, "finished": progress.finished, "waited": progress.waited,
        "evaluated": progress.evaluated, "mean_updates": progress.mean_updates,
    }  # fmt: skip
    if (multiplier := multiplier_of(agent)) is not None:
        counters["multiplier"] = multiplier.value
    return tensors, counters


def load_training_state(agent: HypernetworkPolicy, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
    """Take what :func:`training_state` gave.

    Raises:
        ValueError, LookupError, RuntimeError: it does not fit; what the agent then is, is not said.
    """
    policy = {k: v for k, v in tensors.items() if k.startswith(POLICY)}
    best = under("best.", tensors)
    if best and {k: v.shape for k, v in best.items()} != {k: v.shape for k, v in policy.items()}:
        raise ValueError("the best policy has other tensors than the last one")
    moments = moments_of(agent.optimizer, under("optimizer.", tensors))
    agent.load_policy_state(policy)
    agent.optimizer.load_state_dict({"state": moments, "param_groups": agent.optimizer.state_dict()["param_groups"]})
    agent.best_score = known_best(counters)
    agent.updates, agent.timesteps = counters["updates"], counters["timesteps"]
    # Earlier versions did not say some of these: their runs began at 0, and went on whenever they were short of the
    # total.
    agent.progress = Progress(
        counters.get("begun", 0), counters.get("finished", False), best or None, counters["waited"],
        counters["evaluated"], under("mean.", tensors), counters.get("mean_updates", 0),
    )  # fmt: skip
    if (multiplier := multiplier_of(agent)) is not None:
        multiplier.value = counters["multiplier"]


def multiplier_of(agent: HypernetworkPolicy) -> Multiplier | None:
    """The multiplier of the reward's constraint, if it has one."""
    return None if agent.env is None else editing_env(agent.env).multiplier


def resume(agent: HypernetworkPolicy, path: Path) -> None:
    """Go on from a checkpoint's file of the training state.

    Raises:
        ValueError: it is damaged, or of a run with other settings, or this agent has been trained further elsewhere;
            the agent is as it was.
    """
    tensors, metadata = read_training_state(path)
    with built_from(path.parent):
        counters = _today(json.loads(metadata["training"]), agent)
        _check_run(agent, counters, path.parent)
        before = training_state(agent)
        try:
            load_training_state(agent, tensors, counters)
        except BaseException:
            load_training_state(agent, *before)
            raise
    tqdm.write(f"going on from {path.parent} (update {agent.updates}, step {agent.timesteps})")


def _today(counters: dict[str, Any], agent: HypernetworkPolicy) -> dict[str, Any]:
    """The counters of a run of any version with all of today's settings: what was not a setting then is not in them."""
    network = counters["config"]["network"]
    if "warm_up" not in network:
        network["warm_up_rows"] = agent.config.network.warm_up_rows
    counters["config"] = _defaults(RLEditConfig) | counters["config"]
    counters["config"]["network"] = _defaults(HypernetworkConfig) | dict(agent.first_format) | network
    return counters


def _defaults(config: type) -> dict[str, Any]:
    """A configuration's plain default values by name."""
    return {f.name: f.default for f in fields(config) if f.default is not MISSING}


def _check_run(agent: HypernetworkPolicy, counters: Mapping[str, Any], folder: Path) -> None:
    """Raise ValueError where a run in a folder is not one that this agent can go on with."""
    mend = f"give the same settings, {START_ANEW}"
    run = folder.parent
    different = setting_differences(counters, agent.description())
    if different:
        raise ValueError(f"{run} holds a run with other settings ({'; '.join(different)}); {mend} ({folder})")
    if counters["updates"] < agent.updates:
        raise ValueError(
            f"{run} holds a run after update {counters['updates']}, but this agent has already made "
            f"{agent.updates}; {mend} ({folder})"
        )


def write_checkpoint(agent: HypernetworkPolicy, folder: Path | None, state: TrainingState) -> None:
    """Write ``last`` and ``best``; ``last`` also holds the state to go on from, in one file, so that a process
    killed at any moment leaves either the earlier state or this one."""
    if folder is None:
        return
    tensors, counters = state
    agent.write(folder / "last", _whole_policy(agent, agent.progress.with_mean(tensors)))
    if agent.progress.best is not None:
        agent.write(folder / "best", _whole_policy(agent, agent.progress.best))
    write_tensors(folder / "last" / TRAINING_STATE, tensors, {"training": json.dumps(counters)})


def _whole_policy(agent: HypernetworkPolicy, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A policy's tensors with those of a stream not yet begun, so that :meth:`RLEditAgent.load` finds all it needs."""
    fresh = {f"stream.normaliser.{k}": v for k, v in moments_state(agent.network.first_normalisers()).items()}
    fresh |= {f"stream.normaliser.{k}": v.clone() for k, v in under("lifetime.", tensors).items()}
    return fresh | {k: v for k, v in tensors.items() if k.startswith(POLICY)}
