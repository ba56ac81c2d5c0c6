"""The training loop: policy updates on whole trajectories, evaluation, early stopping and checkpoints."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from agents.base import Callback, run_stream
from agents.files import TRAINING_STATE, run_folder
from agents.logs import log, summary_writer
from agents.rledit.checkpoint import (
    TrainingState,
    load_training_state,
    multiplier_of,
    resume,
    training_state,
    write_checkpoint,
)
from agents.rledit.distributed import Processes, evaluate_sharded
from agents.rledit.policy import HypernetworkPolicy
from agents.rledit.trajectory import AT_END, forget_states, trajectory
from agents.rledit.warm_up import warm_up
from agents.selection import divergence, within_bound
from rledit_env.evaluation.metrics import score_text
from rledit_env.interface import Environment, editing_env

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter



@dataclass(frozen=True)
class TrainingRun:
    """The arguments of `RLEditAgent.learn`."""

    total_timesteps: int
    callback: Callback | None
    progress_bar: bool
    reset_num_timesteps: bool
    log_dir: str | Path | None
    eval_env: Environment | None
    eval_every: int
    patience: int
    eval_seed: int
    checkpoint_every: int
    resume: bool
    processes: Processes | None


class Trainer:
    """Trains an agent for one run.

    Args:
        agent: the agent; its policy, optimiser, counters and progress are changed.
        run: the arguments of the run.

    Raises:
        ValueError: the agent's environment does not give what training needs, or the configuration does not allow
            several processes.
    """

    def __init__(self, agent: HypernetworkPolicy, run: TrainingRun) -> None:
        self.agent, self.run = agent, run
        self.env = training_env(agent.env)
        agent.progress = replace(agent.progress, waited=0, evaluated=None)
        self.processes = run.processes or Processes()
        normaliser = agent.config.network.normaliser
        updates_within_episodes = agent.config.batches_per_update is not None
        if self.processes.count > 1 and updates_within_episodes:
            raise ValueError(f"batches_per_update is {agent.config.batches_per_update}, but each of several processes "
                             "would change the policy along a stream of its own; give batches_per_update=None, or "
                             "train in one process")
        self.learn = partial(improve_policy, agent) if updates_within_episodes else None
        if self.processes.count > 1 and not agent.config.network.by_stream:
            raise ValueError(f"normaliser is {normaliser!r}, but every process would have moments of its own streams; "
                             "give normaliser='stream', or train in one process")
        first = self.processes.first  # the others write no files and show nothing
        self.folder = Path(run.log_dir) if run.log_dir is not None and first else None
        self.shows = run.progress_bar and first

    def train(self) -> None:
        """Start or resume the run, and finish it; Ctrl-C writes the state after the last finished update.

        Raises:
            ValueError: the folder contains a run with other settings.
            FileExistsError: the folder contains a file that would be overwritten and that no training wrote.
        """
        agent, run = self.agent, self.run
        self._begin()
        try:
            self._prepare()
            self._evaluate_if_due()
            while agent.timesteps < self.end and not self._stops_early():
                numbers = self._update()
                self._evaluate_if_due()
                if agent.updates % run.checkpoint_every == 0:
                    self._write(self.state)
                stop = run.callback is not None and run.callback(numbers) is False
                if any(self.processes.gathered(stop)):
                    break
            self._evaluate_if_due(at_end=True)
        except KeyboardInterrupt:
            # An unfinished update is dropped: the state after the last finished one is kept.
            load_training_state(agent, *self.state)
            self._write(self.state)
            raise
        finally:
            self.bar.close()
            for writer in (self.writer, self.step_writer):
                if writer is not None:
                    writer.close()
        self._finish()

    def _begin(self) -> None:
        """Start a new run, or resume the one in the folder; open the logs."""
        agent, run = self.agent, self.run
        checkpoint_exists, starts_new_run = self._resume()
        if starts_new_run:
            agent.timesteps = 0 if run.reset_num_timesteps else agent.timesteps
            agent.progress.begun, agent.progress.mean = agent.timesteps, {}
        agent.progress.finished = False
        begun = agent.progress.begun
        self.end = begun + run.total_timesteps
        if self.folder is not None:
            run_folder(self.folder)
        self.writer = summary_writer(self.folder, agent.updates)
        self.step_writer = summary_writer(self.folder and self.folder / "steps", agent.timesteps)
        self.bar = tqdm(total=run.total_timesteps, initial=agent.timesteps - begun, unit="step", disable=not self.shows)
        self.state = training_state(agent)  # after the last finished update
        if starts_new_run and checkpoint_exists:
            # Otherwise, after a kill before the first checkpoint, the folder would still contain the finished run.
            self._write(self.state)

    def _write(self, state: TrainingState) -> None:
        write_checkpoint(self.agent, self.folder, state, self.run.eval_env)

    def _resume(self) -> tuple[bool, bool]:
        """Load the checkpoint in the folder, if there is one.

        Returns:
            Whether this process found a checkpoint, and whether a new run starts, because there is no checkpoint or
            the agent itself has finished that run.
        """
        agent, processes = self.agent, self.processes
        updates_before = agent.updates
        exists = False
        if self.folder is not None and self.run.resume:
            path = self.folder / "last" / TRAINING_STATE
            exists = path.exists()
            if exists:
                resume(agent, path)
        exists_for_first = processes.from_first(exists)
        if exists_for_first:
            state = processes.from_first(training_state(agent) if processes.first else None)
            if state is not None and not processes.first:
                load_training_state(agent, *state)
        return exists, not exists_for_first or (agent.progress.finished and updates_before == agent.updates)

    def _prepare(self) -> None:
        """Give the network the curvature, the prior and the moments that it needs and does not have yet."""
        agent, network = self.agent, self.agent.network
        if agent.wants_curvature:
            agent.take_curvature(self.shows)
        if network.wants_prior or network.wants_moments:
            warm_up(agent, self.env, network.wants_prior, network.wants_moments, self.shows)

    def _stops_early(self) -> bool:
        return self.run.eval_env is not None and self.agent.progress.waited >= self.run.patience

    def _update(self) -> dict[str, float]:
        """Run the trajectories of one policy update and apply it; return its numbers."""
        agent, processes = self.agent, self.processes
        inner = editing_env(self.env)
        gradients: list[list[Tensor]] = []
        constrained: list[float] = []  # the component under the reward's constraint, at the trajectories' ends
        numbers: dict[str, float] = {}
        remaining = math.ceil((self.end - agent.timesteps) / (inner.episode_steps * processes.count))
        count = min(agent.config.trajectories_per_update, remaining)
        first = processes.rank * count
        for place in range(first, first + count):
            gradient, numbers = trajectory(agent, self.env, agent.seed + agent.updates * 1000 + place, self.learn)
            gradients.append(gradient)
            constrained += [numbers[AT_END]] if AT_END in numbers else []
            self._count_steps()
        numbers = _mean_of_each(processes.gathered(numbers)) | update_policy(agent, gradients, processes)
        constrained = [value for values in processes.gathered(constrained) for value in values]
        multiplier = multiplier_of(agent)
        if multiplier is not None and constrained:  # dual ascent of the reward's constraint
            multiplier.update(float(np.mean(constrained)))
        self.state = training_state(agent)
        self.bar.set_postfix({k: f"{numbers[k]:.3g}" for k in ("return", "drift") if k in numbers})
        log(self.writer, "train", numbers, agent.updates)
        return numbers

    def _count_steps(self) -> None:
        """Log and count the steps of the latest trajectories of all processes."""
        inner = editing_env(self.env)
        for step, numbers in enumerate(inner.history):
            log(self.step_writer, "step", numbers, self.agent.timesteps + step + 1)
        if inner.present_until is not None:  # an episode's length is only known at its end
            steps = sum(self.processes.gathered(len(inner.history)))
        else:
            steps = inner.episode_steps * self.processes.count
        self.agent.timesteps += steps
        self.bar.update(steps)

    def _evaluate_if_due(self, at_end: bool = False) -> None:
        """Evaluate the policy if an evaluation is due, and write a checkpoint."""
        agent, run = self.agent, self.run
        due = at_end or agent.updates % run.eval_every == 0 or agent.progress.evaluated is None
        if run.eval_env is None or not due or agent.progress.evaluated == agent.updates:
            return
        with _mean_parameters(agent):
            better = evaluate_policy(agent, run.eval_env, run.eval_seed, self.writer, self.processes)
        progress = agent.progress
        progress.waited = 0 if better or progress.evaluated is None else progress.waited + 1
        progress.evaluated = agent.updates
        self.state = training_state(agent)
        self._write(self.state)

    def _finish(self) -> None:
        """Mark the run as finished on disk; give the agent the best policy, or else the mean of its policies."""
        agent = self.agent
        progress = agent.progress
        if self._stops_early():
            tqdm.write(f"stopped early at update {agent.updates}: no better score in {progress.waited} evaluations")
        progress.finished = True
        tensors, counters = self.state
        self._write((tensors, {**counters, "finished": True}))
        if progress.best is not None:
            agent.load_policy_state(progress.best)
        elif progress.mean:
            agent.load_policy_state(progress.with_mean(tensors))


def training_env(env: Environment | None) -> Environment:
    """The environment, checked for what training needs.

    Raises:
        ValueError: there is no environment, or it lacks tensors, reward gradients or a reward.
    """
    if env is None:
        raise ValueError("this agent has no environment to learn in; load it with env=…, or give it with "
                         "set_env(env)")
    inner = editing_env(env)
    if inner.array_backend != "torch" or not inner.reward_gradient:
        raise ValueError(
            "the environment must be made with array_backend='torch' and reward_gradient=True, so that a "
            "trajectory can be differentiated"
        )
    if inner.reward_config is None:
        raise ValueError("the environment was made with reward='none', which leaves nothing to learn from")
    return env


def update_policy(
    agent: HypernetworkPolicy, gradients: Sequence[Sequence[Tensor]], processes: Processes | None = None
) -> dict[str, float]:
    """One step of Adam on the mean of the gradients of all processes' trajectories."""
    local_mean = [torch.stack(pieces).mean(0) for pieces in zip(*gradients, strict=True)]
    norm = improve_policy(agent, (processes or Processes()).mean(local_mean))
    agent.updates += 1
    return {"gradient_norm": norm}


def improve_policy(agent: HypernetworkPolicy, policy_gradient: Sequence[Tensor]) -> float:
    """One step of Adam and of the running mean of the policies; returns the gradient's norm before clipping."""
    parameters, norm_bound = agent.network.learned_parameters(), agent.config.max_gradient_norm
    for parameter, gradient in zip(parameters, policy_gradient, strict=True):
        parameter.grad = gradient
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, norm_bound))
    if math.isfinite(norm):
        agent.optimizer.step()
    else:
        warnings.warn(f"the policy gradient of update {agent.updates + 1} is not finite; this update is left out, "
                      "and the policy stays as it was", stacklevel=2)
    agent.optimizer.zero_grad()
    agent.progress.take_into_mean(agent.network, agent.config.policy_average)
    return norm


def evaluate_policy(
    agent: HypernetworkPolicy, eval_env: Environment, seed: int, writer: SummaryWriter | None, processes: Processes
) -> bool:
    """Score the policy on held-out facts, and keep it if it is the best so far; returns whether it is.

    Every process edits the whole episode, whose steps depend on each other, and scores its share of the facts.
    """
    forget_states(eval_env)
    with agent.presented.by(eval_env):
        _, info = run_stream(eval_env, agent, seed=seed)
    inner = editing_env(eval_env)
    metrics = evaluate_sharded(processes, inner.lm, inner.edited_records(), inner.dataset.kind)
    score = -math.inf if info["diverged"] else metrics.mean
    numbers = {k: v for k, v in metrics.as_dict().items() if v is not None} | {"drift": info["drift"]}
    if agent.config.kl_bound is not None:
        numbers["kl"] = divergence(inner.lm)
        score = within_bound(score, numbers["kl"], agent.config.kl_bound)
    log(writer, "eval", numbers, agent.updates)
    if processes.first:
        tqdm.write(
            f"update {agent.updates}: held-out efficacy {metrics.efficacy:.1f}, generalization "
            f"{score_text(metrics.generalization)}, specificity {metrics.specificity:.1f}, mean {metrics.mean:.1f}, "
            f"top-1 {metrics.top1:.1f}, drift {info['drift']:.3f}"
            + (f", KL {numbers['kl']:.3f}" if "kl" in numbers else "")
        )
    if score <= agent.best_score:
        return False
    agent.best_score = score
    agent.progress.best = agent.policy_state()
    return True


@contextmanager
def _mean_parameters(agent: HypernetworkPolicy) -> Iterator[None]:
    """Give the network the running mean of its parameters, if there is one, within the context."""
    if not agent.progress.mean:
        yield
        return
    state = agent.policy_state()
    agent.load_policy_state(agent.progress.with_mean(state))
    try:
        yield
    finally:
        agent.load_policy_state(state)


def _mean_of_each(numbers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each number over the mappings that have it."""
    names = {name for mapping in numbers for name in mapping}
    return {name: float(np.mean([n[name] for n in numbers if name in n])) for name in sorted(names)}
