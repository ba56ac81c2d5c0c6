"""A training run's checkpoint: one file that an interrupted run resumes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from agents.files import (
    START_ANEW,
    TRAINING_STATE,
    agent_folder,
    built_from,
    known_best,
    read_training_state,
    under,
)
from agents.sb3.standard_state import load_training_state, training_state
from agents.settings import setting_differences
from rledit_env.files import write_tensors
from rledit_env.type_aliases import JsonObject

if TYPE_CHECKING:
    from agents.sb3.agent import StandardAgent


@dataclass
class Run:
    """The progress of a training run.

    Attributes:
        begun: the agent's timesteps at the start of the run.
        streams: number of training episodes that have ended.
        evaluated: the step of the last evaluation; -1 before the first one.
        finished: whether the run is finished.
        best: the policy with the best held-out score, as tensors by name; None before the first evaluation.
    """

    begun: int
    streams: int = 0
    evaluated: int = -1
    finished: bool = False
    best: dict[str, Tensor] | None = None


def write_checkpoint(folder: Path, agent: StandardAgent, run: Run) -> None:
    """Write the checkpoint for :func:`resume_run` as one file; a process killed at any moment leaves the earlier
    checkpoint or this one."""
    tensors, numbers = training_state(agent.model)
    numbers |= {
        "begun": run.begun, "finished": run.finished, "earlier": agent.earlier_timesteps, "streams": run.streams,
        "evaluated": run.evaluated,
    }  # fmt: skip
    if agent.multiplier is not None:
        numbers["multiplier"] = agent.multiplier.value
    if agent.relative is not None:
        numbers["relative"] = agent.relative.state()
    tensors |= {f"best/{k}": v for k, v in (run.best or {}).items()}
    agent_folder(folder)
    metadata = {"agent": json.dumps(agent.description()), "training": json.dumps(numbers)}
    write_tensors(folder / TRAINING_STATE, tensors, metadata)


def resume_run(folder: Path, agent: StandardAgent) -> Run:
    """Resume an interrupted run from its checkpoint.

    Raises:
        ValueError: the checkpoint is damaged or belongs to a run with other settings, or the agent has been trained
            elsewhere since. The agent is unchanged.
    """
    tensors, metadata = read_training_state(folder / TRAINING_STATE)
    with built_from(folder):
        description, numbers = json.loads(metadata["agent"]), json.loads(metadata["training"])
        # Checkpoints of earlier versions lack these two: they never counted from 0 again, nor marked a run as finished.
        numbers = {"earlier": 0, "finished": False, **numbers}
        if different := _differences(folder, agent, description, numbers):
            raise ValueError(f"{folder} holds an interrupted run with other settings ({'; '.join(different)}); "
                             f"give the same settings, give {START_ANEW}")
        best = under("best/", tensors) or None
        run = Run(numbers["begun"], numbers["streams"], numbers["evaluated"], numbers["finished"], best)
        _load(agent, run, tensors, numbers)
        agent.best_score = known_best(description)
        agent.earlier_timesteps, agent.fitted = numbers["earlier"], True
    tqdm.write(f"going on from {folder} (step {agent.timesteps})")
    return run


def _differences(
    folder: Path, agent: StandardAgent, description: JsonObject, numbers: JsonObject
) -> list[str]:
    """The differences, in words, between a checkpoint's run and a run that the agent could resume."""
    different = setting_differences(description, agent.description())
    steps_before_run = numbers["earlier"] + numbers["begun"]
    agent_steps = agent.earlier_timesteps + agent.timesteps
    interrupted_here = agent.unfinished_in == folder.parent
    if not interrupted_here and agent_steps not in (0, steps_before_run, numbers["earlier"] + numbers["timesteps"]):
        different.append(f"steps before it: {steps_before_run} there, {agent_steps} here")
    return different


def _load(agent: StandardAgent, run: Run, tensors: Mapping[str, Tensor], numbers: JsonObject) -> None:
    """Load the model, the multiplier and the zero action's rewards; if that fails, restore the agent."""
    model = agent.model
    model.env.reset()  # the first reset seeds the environment, which must come before loading
    multiplier = numbers["multiplier"] if agent.multiplier is not None else 0.0
    before = training_state(model), agent.relative.state() if agent.relative is not None else {}
    try:
        if run.best is not None:
            model.policy.load_state_dict(run.best)  # fails now, not at the end of the training, if it does not fit
        load_training_state(model, tensors, numbers)
        if agent.relative is not None:
            agent.relative.load_state(numbers["relative"])
    except BaseException:
        load_training_state(model, *before[0])
        if agent.relative is not None:
            agent.relative.load_state(before[1])
        raise
    if agent.multiplier is not None:
        agent.multiplier.value = multiplier
    model._last_obs = model.env.reset()
    model._last_episode_starts = np.ones((1,), dtype=bool)
