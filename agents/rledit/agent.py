"""RLEdit: a hypernetwork trained by the gradient of the whole trajectory's return (ICML 2025)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

from agents.base import Callback, require_modules, run_stream
from agents.files import built_from, check_counters, check_size, read_description, read_tensors
from agents.rledit.distributed import Processes
from agents.rledit.moments import MissingMomentsWarning
from agents.rledit.policy import HypernetworkPolicy
from agents.rledit.trainer import Trainer, TrainingRun
from agents.rledit.warm_up import warm_up
from agents.selection import divergence, within_bound
from rledit_env.interface import Environment, editing_env


class RLEditAgent(HypernetworkPolicy):
    """The RLEdit agent.

    With ``loss="fact"`` or ``"sum"`` in `HypernetworkConfig`, the agent asks its environment which facts are presented.
    If it edits in another environment than ``env``, name that one with :meth:`set_env`.

    Args:
        env: a `LifelongEditEnv` made with ``array_backend="torch"`` (and ``reward_gradient=True`` to learn); None for
            an agent that only predicts, given ``shapes``.
        config: the network and its training.
        shapes: module → (d_in, d_out), if there is no ``env``.
        seed: of the initial parameters and of the training episodes.
    """

    def learn(  # noqa: PLR0913  called as in Stable-Baselines3: its arguments are not gathered in one
        self,
        total_timesteps: int,
        callback: Callback | None = None,
        progress_bar: bool = True,
        reset_num_timesteps: bool = True,
        log_dir: str | Path | None = None,
        eval_env: Environment | None = None,
        eval_every: int = 5,
        patience: int = 4,
        eval_seed: int = 12345,
        checkpoint_every: int = 5,
        resume: bool = True,
        processes: Processes | None = None,
    ) -> RLEditAgent:
        """Train by whole trajectories: each policy update is one step of Adam on the gradient of the return.

        An interrupted run in ``log_dir`` is resumed from its last checkpoint, even after a kill, and ends as it would
        have ended without the interruption; its steps count from its own start. If the run in ``log_dir`` is finished,
        the agent that finished it takes further steps, and a new agent loads its result. Ctrl-C writes a checkpoint of
        the last finished update first.

        Args:
            total_timesteps: further environment steps to take, rounded up to whole trajectories (the same number for
                each process).
            callback: called after every update with its numbers; training stops when it returns False.
            progress_bar: show a progress bar.
            reset_num_timesteps: count ``timesteps`` from 0 again; False counts on.
            log_dir: TensorBoard's folder, with the numbers of each update, and in ``steps`` those of each environment
                step, such as the drift. The checkpoints ``last`` and ``best`` are written there too, and training
                resumes from ``last`` if it exists.
            eval_env: an environment of held-out facts, best with a longer episode than in training: a policy trained on
                one horizon need not be stable beyond it. Its metrics choose the best checkpoint, which the agent has
                at the end. It may share the LLM with the training environment.
            eval_every: updates between two evaluations; the untrained policy and the last one are evaluated too.
            patience: evaluations without a better score before training stops early.
            eval_seed: the seed that ``eval_env`` is always reset with.
            checkpoint_every: updates between two checkpoints; one is written at every evaluation as well.
            resume: resume from ``last``; False starts anew and overwrites it.
            processes: the processes that train together (`Processes.started()`), each with its own environment of the
                same settings. For an update, each runs ``trajectories_per_update`` episodes of its own, and the
                gradient is the mean over all of them. The first process writes the files. One process with as many
                trajectories does the same.

        Raises:
            ValueError: the environment does not give tensors and reward gradients, or ``log_dir`` contains a run with
                other settings.
            FileExistsError: ``log_dir`` contains a file that would be overwritten and that no training wrote.
        """
        run = TrainingRun(
            total_timesteps, callback, progress_bar, reset_num_timesteps, log_dir, eval_env, eval_every, patience,
            eval_seed, checkpoint_every, resume, processes,
        )  # fmt: skip
        Trainer(self, run).train()
        return self

    def scale_step_sizes(self, factor: float) -> None:
        """Multiply every module's η_l."""
        if not factor > 0:
            raise ValueError(f"factor is {factor}; give a positive number")
        self.network.scale_step_sizes(factor)

    def calibrate(
        self, env: Environment, factors: Sequence[float] = (1.0, 0.85, 0.7, 0.6, 0.5, 0.35), seed: int = 12345,
        kl_bound: float | None = None,
    ) -> dict[float, float]:  # fmt: skip
        """Scale the step sizes by the factor that scores best on held-out facts.

        Training on short episodes favours steps that are too large for long ones: each step changes weights that all
        later batches share. The factors are tried from the largest down, until the score falls. With a bound on the
        divergence, a factor beyond it counts less than any score.

        Args:
            env: an environment of held-out facts, its episode best as long as the streams that will be edited;
                ``steps_per_batch`` may differ from training's.
            factors: the factors to try.
            seed: ``env`` is reset with it.
            kl_bound: the largest divergence of the LLM on its own text, in nats a token; None takes the
                configuration's.

        Returns:
            Factor → score, for the factors that were tried: the mean of Efficacy, Generalization and Specificity; −∞
            if the LLM broke; and a negative number, the excess over ``kl_bound``, if the divergence is beyond it.
        """
        bound = self.config.kl_bound if kl_bound is None else kl_bound
        inner = editing_env(env)
        start = self.network.step_size_parameter.detach().clone()
        scores: dict[float, float] = {}
        best = 1.0
        try:
            for factor in sorted(factors, reverse=True):
                self.network.scale_step_sizes(factor, start)
                with self.presented.by(env):
                    _, info = run_stream(env, self, seed=seed)
                score = -math.inf if info["diverged"] else inner.evaluate(generate=False).mean
                if bound is not None:
                    score = within_bound(score, divergence(inner.lm), bound)
                scores[factor] = score
                if -math.inf < scores[factor] < max(scores.values()):
                    break
            if max(scores.values()) == -math.inf:
                tried = ", ".join(f"{factor:g}" for factor in scores)
                warnings.warn(f"the LLM broke with every factor ({tried}); the step sizes stay as they were. Give "
                              "smaller factors", stacklevel=2)
            else:
                best = max(scores, key=scores.__getitem__)
        finally:  # an interruption leaves the step sizes unchanged, too
            self.network.scale_step_sizes(best, start)
            self.reset()
        return scores

    def gather_moments(self, env: Environment, progress_bar: bool = True) -> None:
        """Gather the moments that streams start from (see `HypernetworkConfig.warm_up`), as :meth:`learn` does before
        its first update: from the first batches of ``prior_batches`` episodes, under the pre-trained weights. The agent
        is reset.

        Args:
            env: an environment of training facts, made with the agent's modules and token; no reward is needed.
            progress_bar: show a progress bar.
        """
        warm_up(self, env, prior=False, moments=True, progress_bar=progress_bar)

    @classmethod
    def load(cls, path: str | Path, env: Environment | None = None) -> RLEditAgent:
        """Load the agent from a folder that :meth:`save` wrote.

        Raises:
            FileNotFoundError: the folder contains no agent.
            ValueError: the agent was trained for other modules than the environment's.
        """
        folder = Path(path)
        description = read_description(folder)
        tensors, _ = read_tensors(folder / "agent.safetensors")
        with built_from(folder):
            lacks_moments = "warm_up" not in description["config"]["network"]  # as agents of earlier versions do
            network = type(cls.config_type().network)(**cls.first_format | description["config"]["network"])
            config = cls.config_type(**description["config"] | {"network": network})
            check_counters(description, "seed", "updates", "timesteps")
            shapes = {m: (s[0], s[1]) for m, s in description["shapes"].items()}
            check_size(cls.network_type.parameter_count(shapes, network), tensors)
            if env is not None:
                require_modules(env, shapes, str(folder), "make the environment with the settings in "
                                f"{folder / 'agent.json'}")
            agent = cls(env, config, shapes, description["seed"])
            agent.load_policy_state(tensors)
            if lacks_moments and network.normaliser == "stream" and not agent.network.training_moments:
                warnings.warn(f"the agent in {folder} was saved without moments of training facts, and a batch of one "
                              "or few facts will hardly take; add them with: python -m agents.running.add_moments "
                              f"{folder}",
                              MissingMomentsWarning, stacklevel=2)
            agent.updates, agent.timesteps = description["updates"], description["timesteps"]
        return agent
