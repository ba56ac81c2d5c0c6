"""The callback of a standard algorithm's training: logs, evaluations, the best policy, checkpoints."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from tqdm.auto import tqdm

from agents.base import Callback, run_stream
from agents.logs import log, summary_writer
from agents.sb3.checkpoint import Run, write_checkpoint
from agents.selection import divergence, within_bound
from rledit_env.interface import Environment, editing_env

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from agents.sb3.agent import StandardAgent



class TrainingCallback(BaseCallback):
    """Logs the environment's numbers after every episode, evaluates, keeps the best policy, and writes checkpoints.

    Args:
        agent: the agent that learns.
        callback, progress_bar, eval_env, eval_every, eval_seed: as for :meth:`StandardAgent.learn`.
        folder: its ``log_dir``.
    """

    def __init__(
        self,
        agent: StandardAgent,
        callback: Callback | None,
        progress_bar: bool,
        folder: Path | None,
        eval_env: Environment | None,
        eval_every: int,
        eval_seed: int,
    ) -> None:
        super().__init__()
        self.agent, self.user_callback, self.folder = agent, callback, folder
        self.show = progress_bar
        self.eval_env, self.eval_every, self.eval_seed = eval_env, eval_every, eval_seed
        self.run = Run(agent.timesteps)
        self._saved_streams = -1  # number of episodes at the last checkpoint; -1 before the first one
        self._numbers: dict[str, list[float]] = {}
        self._return = 0.0  # the environment's return of the episode so far
        self._writer: SummaryWriter | None = None
        self._bar: tqdm | None = None

    def begin(self, reset_num_timesteps: bool) -> None:
        """Start a run at a new episode. The best policy of the agent's previous run is kept for comparison."""
        model = self.agent.model
        if reset_num_timesteps:
            self.agent.earlier_timesteps += self.agent.timesteps
            model.num_timesteps = 0
        model._last_obs = None
        self.run, self._saved_streams = Run(self.agent.timesteps, best=self.run.best), -1

    def end(self) -> None:
        """Evaluate the last policy, and mark the run as finished on disk."""
        self.evaluate()
        self.run.finished = True
        self._write_checkpoint()

    def _on_training_start(self) -> None:
        done = self.num_timesteps - self.run.begun
        self._writer = summary_writer(self.folder, self.num_timesteps)
        total = self.locals["total_timesteps"] - self.run.begun
        self._bar = tqdm(total=total, initial=done, unit="step", disable=not self.show)
        if self.run.evaluated < 0:
            self.evaluate()

    def _on_rollout_start(self) -> None:
        due = isinstance(self.model, OnPolicyAlgorithm) or self.run.streams >= self._saved_streams + self.eval_every
        if due or self._saved_streams < 0:
            self._write_checkpoint()

    def _on_step(self) -> bool:
        bar = self._bar
        assert bar is not None
        bar.update(1)
        info = self.locals["infos"][0]
        self._return += info.get("reward", float(self.locals["rewards"][0]) / self.agent.config.reward_scale)
        for name, value in info.items():
            if isinstance(value, float):
                self._numbers.setdefault(name, []).append(value)
        if not self.locals["dones"][0]:
            return True
        self.run.streams += 1
        numbers = {name: sum(values) / len(values) for name, values in self._numbers.items()}
        numbers |= {"return": self._return, "drift": info["drift"]}
        if (multiplier := self.agent.multiplier) is not None:
            finite = filter(math.isfinite, self._numbers.get(multiplier.constraint.component, []))
            if values := list(finite):
                multiplier.update(values[-1])
        self._numbers, self._return = {}, 0.0
        bar.set_postfix({k: f"{numbers[k]:.3g}" for k in ("return", "drift")})
        self._log("train", numbers)
        if self.run.streams % self.eval_every == 0:
            self.evaluate()
        return self.user_callback is None or self.user_callback(numbers) is not False

    def evaluate(self) -> None:
        """Score the policy on held-out facts, and keep it if it is the best so far."""
        if self.eval_env is None or self.run.evaluated == self.num_timesteps:
            return
        self.run.evaluated = self.num_timesteps
        eval_agent = copy.copy(self.agent)
        eval_agent.set_env(self.eval_env)
        inner = editing_env(self.eval_env)
        with inner.lm.preserved():  # a training episode may be editing the same LLM
            total, info = run_stream(self.eval_env, eval_agent, seed=self.eval_seed)
            metrics = inner.evaluate(generate=False)
            score = -math.inf if info["diverged"] else metrics.mean
            numbers = {k: v for k, v in metrics.as_dict().items() if v is not None}
            if (bound := self.agent.config.kl_bound) is not None:
                numbers["kl"] = divergence(inner.lm)
                score = within_bound(score, numbers["kl"], bound)
        self._log("eval", numbers | {"return": total, "drift": info["drift"]})
        tqdm.write(f"step {self.num_timesteps}: held-out mean {metrics.mean:.1f}, return {total:.1f}")
        if score > self.agent.best_score or self.run.best is None:
            self.agent.best_score = score
            self.run.best = {k: v.clone() for k, v in self.agent.model.policy.state_dict().items()}
            if self.folder is not None:
                self.agent.save(self.folder / "best")

    def _write_checkpoint(self) -> None:
        if self.folder is not None:
            self._saved_streams = self.run.streams
            write_checkpoint(self.folder / "last", self.agent, self.run)

    def close(self) -> None:
        """Close TensorBoard's writer and the progress bar."""
        for output in (self._writer, self._bar):
            if output is not None:
                output.close()

    def _log(self, group: str, numbers: Mapping[str, float]) -> None:
        log(self._writer, group, numbers, self.num_timesteps)
