"""Stable-Baselines3's algorithms for continuous actions as an agent on the low-dimensional view."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, SupportsFloat

import gymnasium as gym
import torch
from stable_baselines3.common.vec_env import VecEnv

from agents.base import Agent, Callback
from agents.files import (
    TRAINING_STATE,
    agent_folder,
    built_from,
    check_counters,
    read_description,
    read_tensors,
    run_folder,
)
from agents.sb3.callbacks import TrainingCallback
from agents.sb3.checkpoint import resume_run
from agents.sb3.config import ALGORITHMS, HYPERPARAMETERS, StandardConfig, standard_config
from agents.sb3.features import Standardised
from agents.settings import environment_settings
from rledit_env.evaluation.metrics import METRICS_VERSION
from rledit_env.files import write_tensors, write_text
from rledit_env.interface import Environment, editing_env
from rledit_env.nesting import environment_inside
from rledit_env.preservation import Multiplier
from rledit_env.spaces import Action, Observation
from rledit_env.type_aliases import JsonObject
from rledit_env.wrappers import GradientFeatures, RelativeReward, ScaledUpdate


class StandardAgent(Agent):
    """A standard reinforcement-learning algorithm as an editor: it sees features and scales a base rule's update.

    Args:
        env: a `LifelongEditEnv`, best with ``array_backend="torch"``. It is needed to predict, too, since the features
            depend on the LLM's weights.
        config: the algorithm and the view.
        seed: of the policy's initial weights, its exploration, and the training episodes.
    """

    name: ClassVar[str] = "standard"

    def __init__(self, env: Environment, config: StandardConfig | None = None, seed: int = 0) -> None:
        self.env, self.config, self.seed = env, config or StandardConfig(), seed
        self._training: VecEnv | None = None  # the vector environment that the model learns in
        self._look_at(env)
        settings = {**HYPERPARAMETERS[self.config.algorithm], **self.config.hyperparameters}
        policy = {"features_extractor_class": Standardised, **settings.pop("policy_kwargs", {})}
        algorithm: Any = ALGORITHMS[self.config.algorithm]
        # On the CPU: the policy is tiny, and the LLM may use all of the GPU's memory.
        self.model = algorithm(
            "MlpPolicy", self._training_view(), seed=seed, device="cpu", policy_kwargs=policy, **settings
        )
        self._training = self.model.env
        self.best_score = -math.inf
        self.earlier_timesteps = 0  # steps taken before ``timesteps`` was last counted from 0
        self.unfinished_in: Path | None = None  # the log_dir of a run that was interrupted in this process
        self.fitted = False  # whether the features' scale has been fitted; it is then kept

    def _look_at(self, env: Environment) -> None:
        environment_inside(env, "StandardAgent", agent=True)
        c = self.config
        self.env = env
        self.scaled = ScaledUpdate(env, c.rule, c.step_size, c.damping, c.span, c.rank, share=c.share)
        self.view = GradientFeatures(self.scaled, c.share)
        self.relative = RelativeReward(self.view, c.baseline_streams) if c.baseline_streams else None
        self._training = None

    def _training_view(self) -> gym.Env:
        """The environment that the algorithm learns in: the view with relative and scaled rewards."""
        training = self.relative or self.view
        return gym.wrappers.TransformReward(training, partial(_scaled, self.config.reward_scale))

    def set_env(self, env: Environment) -> None:
        """Edit and learn in this environment from now on; the zero action is measured there before learning.

        Raises:
            ValueError: it is not an environment of this package, or edits another number of modules; the agent is
                unchanged.
        """
        other = copy.copy(self)
        other._look_at(env)
        if len(other.scaled.shapes) != len(self.scaled.shapes):
            raise ValueError(f"the policy is for {len(self.scaled.shapes)} modules, the environment edits "
                             f"{len(other.scaled.shapes)}; make an agent for it: StandardAgent(env)")
        self.__dict__ |= vars(other)

    def __deepcopy__(self, memo: dict[int, object]) -> StandardAgent:
        # The last forward pass's distribution has tensors that cannot be copied; the next pass makes a new one.
        last = getattr(getattr(self.model.policy, "action_dist", None), "distribution", None)
        if last is not None:
            memo[id(last)] = None
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other.__dict__.update({name: copy.deepcopy(part, memo) for name, part in self.__dict__.items()})
        return other

    def memory(self) -> dict[str, torch.Tensor]:
        return {}

    def predict(self, observation: Observation, deterministic: bool = True) -> tuple[Action, None]:
        """Update factors for a raw observation in either array backend."""
        action, _ = self.model.predict(self.view.observation(observation), deterministic=deterministic)
        return self.scaled.factors(observation, action), None

    def learn(  # noqa: PLR0913  called as in Stable-Baselines3: its arguments are not gathered in one
        self,
        total_timesteps: int,
        callback: Callback | None = None,
        progress_bar: bool = True,
        reset_num_timesteps: bool = True,
        log_dir: str | Path | None = None,
        eval_env: Environment | None = None,
        eval_every: int = 10,
        eval_seed: int = 12345,
        resume: bool = True,
    ) -> StandardAgent:
        """Train for this many further environment steps.

        An interrupted run in ``log_dir`` is resumed, even after a kill; its steps count from its own start. It resumes
        from its last rollout (SAC and TD3: from its last ``eval_every`` episodes), at the start of an episode. If the
        run in ``log_dir`` is finished, the agent that finished it takes further steps, and a new agent loads its
        result.

        Args:
            total_timesteps: further environment steps, including those that measure the zero action; PPO and A2C
                round them up to whole rollouts (``n_steps``).
            callback: called after every episode with its numbers; training stops when it returns False.
            progress_bar: show a progress bar.
            reset_num_timesteps: count ``timesteps`` from 0 again; False counts on.
            log_dir: TensorBoard's folder; the best policy is saved in its folder ``best``.
            eval_env: an environment of held-out facts; its metrics choose the policy that the agent has at the end. It
                may share the LLM with the training environment.
            eval_every: episodes between two evaluations.
            eval_seed: the seed that ``eval_env`` is always reset with.
            resume: resume from ``last`` in ``log_dir``, if it exists; False starts anew.

        Raises:
            ValueError: there are not more steps than measuring the zero action takes, or ``log_dir`` contains an
                interrupted run with other settings.
            FileExistsError: ``log_dir`` contains a file that would be overwritten and that no training wrote.
        """
        folder = Path(log_dir) if log_dir is not None else None
        training = TrainingCallback(self, callback, progress_bar, folder, eval_env, eval_every, eval_seed)
        self._set_model_env()
        steps_before = self.earlier_timesteps + self.timesteps
        exists = folder is not None and resume and (folder / "last" / TRAINING_STATE).exists()
        if folder is not None and exists:
            training.run = resume_run(folder / "last", self)
        finished_here = training.run.finished and steps_before == self.earlier_timesteps + self.timesteps
        if not exists or finished_here:  # a new run
            self._check_steps(total_timesteps)
            training.begin(reset_num_timesteps)
        if folder is not None:
            run_folder(folder)
        self._train(training, training.run.begun + total_timesteps)
        if training.run.best is not None:
            self.model.policy.load_state_dict(training.run.best)
        return self

    def _train(self, training: TrainingCallback, until: int) -> None:
        """Learn until ``timesteps`` is ``until``."""
        try:
            if until > self.timesteps:
                self._prepare()
                self.model.learn(until - self.timesteps, callback=training, reset_num_timesteps=False)
                training.end()
        except BaseException:
            self.unfinished_in = training.folder
            raise
        finally:
            training.close()

    def _set_model_env(self) -> None:
        """Set the model's environment to this agent's, since copies of the agent share the model."""
        if self._training is None:
            self.model.set_env(self._training_view())
            self._training = self.model.env
        elif self.model.env is not self._training:
            self.model.set_env(self._training)

    def _check_steps(self, total_timesteps: int) -> None:
        """Raise ValueError if measuring the zero action would take all steps."""
        if self.relative is None or self.relative.baseline_steps or total_timesteps == 0:
            return
        needed = self.relative.streams * editing_env(self.scaled).episode_steps
        if total_timesteps <= needed:
            raise ValueError(
                f"total_timesteps is {total_timesteps}, but measuring the zero action takes {needed} steps "
                f"(baseline_streams={self.relative.streams}); give more steps or fewer streams"
            )

    def _prepare(self) -> None:
        """Before the first step in an environment, measure the zero action on the training episodes, which takes
        environment steps, and fit the features' scale."""
        if self.relative is None or self.relative.baseline_steps:
            return
        observations = self.relative.measure(self.seed)
        if not self.fitted:  # a trained policy keeps the scale that it was trained with
            for module in self.model.policy.modules():
                if isinstance(module, Standardised):
                    module.fit(observations)
        self.fitted = True
        self.model.num_timesteps += self.relative.baseline_steps

    @property
    def multiplier(self) -> Multiplier | None:
        """The multiplier of the reward's constraint; None if it has none."""
        return editing_env(self.scaled).multiplier

    @property
    def timesteps(self) -> int:  # type: ignore[override]
        """Environment steps that `learn` has taken since it last counted from 0."""
        return int(self.model.num_timesteps)

    def save(self, path: str | Path) -> None:
        """Write the policy's weights as safetensors and everything else as JSON; no pickle."""
        folder = agent_folder(path)
        # Cloned, since the state dict contains a features extractor once for each network that shares it.
        write_tensors(folder / "agent.safetensors", {k: v.clone() for k, v in self.model.policy.state_dict().items()})
        write_text(folder / "agent.json", json.dumps(self.description(), indent=1) + "\n")

    def description(self) -> JsonObject:
        """The content of agent.json."""
        return {
            "agent": self.name,
            "format": 1,
            "seed": self.seed,
            "config": {**asdict(self.config), "hyperparameters": dict(self.config.hyperparameters)},
            "timesteps": self.timesteps,
            "earlier_timesteps": self.earlier_timesteps,
            "best_score": self.best_score if math.isfinite(self.best_score) else None,
            "metrics_version": METRICS_VERSION,
            "environment": environment_settings(self.env),
        }

    @classmethod
    def load(cls, path: str | Path, env: Environment | None = None) -> StandardAgent:
        """Load the agent from a folder that :meth:`save` wrote.

        Raises:
            FileNotFoundError: the folder contains no agent.
            ValueError: no environment was given, or it edits another number of modules.
        """
        folder = Path(path)
        description = read_description(folder)
        if env is None:
            raise ValueError(f"the agent in {folder} sees features of the LLM's weights; give the environment: env=…")
        tensors, _ = read_tensors(folder / "agent.safetensors")
        with built_from(folder):
            check_counters(description, "seed", "timesteps")
            config = standard_config(description["config"], most=sum(t.numel() for t in tensors.values()))
            agent = cls(env, config, description["seed"])
            modules = len((description["environment"] or {}).get("edit_modules", []))
            if modules != len(agent.scaled.shapes):
                raise ValueError(
                    f"{folder} was trained for {modules} modules, the environment edits {len(agent.scaled.shapes)}; "
                    f"make the environment with the settings in {folder / 'agent.json'}"
                )
            agent.model.policy.load_state_dict(tensors)
            agent.model.num_timesteps = description["timesteps"]
            agent.earlier_timesteps = description.get("earlier_timesteps", 0)  # absent in earlier versions
            agent.fitted = agent.timesteps + agent.earlier_timesteps > 0
        return agent


def _scaled(scale: float, reward: SupportsFloat) -> float:
    return scale * float(reward)
