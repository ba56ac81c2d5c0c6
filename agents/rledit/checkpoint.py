"""Training checkpoints: the state that an interrupted run resumes from, and the last and the best policy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path

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
from rledit_env.interface import Environment, editing_env
from rledit_env.preservation import Multiplier
from rledit_env.type_aliases import JsonObject, Options

POLICY = ("network.", "prior.", "moments.", "lifetime.", "stream.")  # prefixes of the names of a policy's tensors
TrainingState = tuple[dict[str, Tensor], JsonObject]  # tensors by name, and counters


def training_state(agent: HypernetworkPolicy) -> TrainingState:
    """Copies of everything that the rest of the training depends on: tensors and counters."""
    progress, tensors = agent.progress, agent.policy_state()
    parameters = [p for group in agent.optimizer.param_groups for p in group["params"]]
    for place, parameter in enumerate(parameters):  # numbered as in the optimiser's state_dict
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


def load_training_state(agent: HypernetworkPolicy, tensors: Mapping[str, Tensor], counters: JsonObject) -> None:
    """Load the state that :func:`training_state` returned.

    Raises:
        ValueError, LookupError, RuntimeError: the state does not fit; the agent is then in an undefined state.
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
    # Checkpoints of earlier versions lack some counters: their runs began at 0 and were never marked as finished.
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
    """Resume a run from a checkpoint's training state file.

    Raises:
        ValueError: the file is damaged or belongs to a run with other settings, or the agent has already made more
            updates. The agent is unchanged.
    """
    tensors, metadata = read_training_state(path)
    with built_from(path.parent):
        counters = _with_missing_settings(json.loads(metadata["training"]), agent)
        _check_run(agent, counters, path.parent)
        before = training_state(agent)
        try:
            load_training_state(agent, tensors, counters)
        except BaseException:
            load_training_state(agent, *before)
            raise
    tqdm.write(f"going on from {path.parent} (update {agent.updates}, step {agent.timesteps})")


def _with_missing_settings(counters: JsonObject, agent: HypernetworkPolicy) -> JsonObject:
    """Add the settings that did not exist yet in the version that wrote the counters."""
    network = counters["config"]["network"]
    if "warm_up" not in network:
        network["warm_up_rows"] = agent.config.network.warm_up_rows
    counters["config"] = _defaults(RLEditConfig) | counters["config"]
    counters["config"]["network"] = _defaults(HypernetworkConfig) | dict(agent.first_format) | network
    return counters


def _defaults(config: type) -> Options:
    """A configuration's default values by name, without those that a factory makes."""
    return {f.name: f.default for f in fields(config) if f.default is not MISSING}


def _check_run(agent: HypernetworkPolicy, counters: JsonObject, folder: Path) -> None:
    """Raise ValueError unless the agent can resume the run in a folder."""
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


def write_checkpoint(
    agent: HypernetworkPolicy, folder: Path | None, state: TrainingState, eval_env: Environment | None
) -> None:
    """Write ``last`` and ``best``; the best is to present facts as ``eval_env`` does, which chose it. The state to
    resume from is one file in ``last``, so that a process killed at any moment leaves either the earlier state or this
    one."""
    if folder is None:
        return
    tensors, counters = state
    agent.write(folder / "last", _with_new_stream(agent, agent.progress.with_mean(tensors)))
    if agent.progress.best is not None:
        agent.write(folder / "best", _with_new_stream(agent, agent.progress.best), eval_env)
    write_tensors(folder / "last" / TRAINING_STATE, tensors, {"training": json.dumps(counters)})


def _with_new_stream(agent: HypernetworkPolicy, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A policy's tensors, and the normalisers at the start of a stream, which :meth:`RLEditAgent.load` needs."""
    start = {f"stream.normaliser.{k}": v for k, v in moments_state(agent.network.first_normalisers()).items()}
    start |= {f"stream.normaliser.{k}": v.clone() for k, v in under("lifetime.", tensors).items()}
    return start | {k: v for k, v in tensors.items() if k.startswith(POLICY)}
