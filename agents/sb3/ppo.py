"""PPO, and Stable-Baselines3's other algorithms for continuous actions, on the low-dimensional view."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import A2C, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from tqdm.auto import tqdm

from agents.base import Agent, run_stream
from agents.files import (
    START_ANEW,
    TRAINING_STATE,
    agent_folder,
    built_from,
    check_counters,
    known_best,
    read_description,
    read_tensors,
    read_training_state,
    run_folder,
    under,
)
from agents.logs import log, summary_writer
from agents.sb3.standard_state import load_training_state, training_state
from agents.selection import divergence, within_bound
from agents.settings import environment_settings, setting_differences
from rledit_env.evaluation.metrics import METRICS_VERSION
from rledit_env.files import write_tensors, write_text
from rledit_env.nesting import environment_inside
from rledit_env.preservation import Multiplier
from rledit_env.wrappers import GradientFeatures, RelativeReward, Rule, ScaledUpdate, Share

ALGORITHMS: Mapping[str, type[BaseAlgorithm]] = {"ppo": PPO, "a2c": A2C, "sac": SAC, "td3": TD3}
SMALL_NETWORK: Mapping[str, Any] = {"net_arch": [32]}
# For some hundred steps, each of which takes a fraction of a second: small networks and rollouts, used well.
HYPERPARAMETERS: Mapping[str, Mapping[str, Any]] = {
    "ppo": {
        "n_steps": 80, "batch_size": 40, "n_epochs": 10, "learning_rate": 3e-3, "gamma": 1.0, "gae_lambda": 0.95,
        "policy_kwargs": {**SMALL_NETWORK, "log_std_init": -1.0},
    },
    "a2c": {
        "n_steps": 20, "learning_rate": 3e-3, "gamma": 1.0, "gae_lambda": 0.95, "normalize_advantage": True,
        "policy_kwargs": {**SMALL_NETWORK, "log_std_init": -1.0},
    },
    "sac": {"learning_starts": 40, "batch_size": 64, "learning_rate": 1e-3, "gamma": 0.99, "buffer_size": 100_000},
    "td3": {"learning_starts": 40, "batch_size": 64, "learning_rate": 1e-3, "gamma": 0.99, "buffer_size": 100_000},
}  # fmt: skip
MAX_SIZE = 10**7  # of buffers and the like, in what a saved agent asks for
Callback = Callable[[dict[str, float]], bool | None]


@dataclass(frozen=True)
class StandardConfig:
    """How a standard algorithm sees the environment, and its hyperparameters.

    Attributes:
        algorithm: of Stable-Baselines3.
        rule: the base rule that the actions scale (see `rledit_env.wrappers.ScaledUpdate`).
        step_size, damping, span, rank, share: as there; the features share as the actions do.
        baseline_streams: training goes through this many streams again and again, each step's reward less the zero
            action's (see `rledit_env.wrappers.RelativeReward`); features are standardised by what the zero action meets
            there. 0: new streams, their own rewards, and features as they come.
        reward_scale: rewards are multiplied by it for the algorithm, whose value function is best off near 1; returns
            that are logged are the environment's own.
        kl_bound: the best policy of a training is the best within this divergence (see `RLEditConfig.kl_bound`).
        hyperparameters: of the algorithm, over :data:`HYPERPARAMETERS`.
    """

    algorithm: Literal["ppo", "a2c", "sac", "td3"] = "ppo"
    rule: Rule = "least_squares"
    step_size: float = 1.0
    damping: float = 1.0
    span: float = 10.0
    rank: int = 0
    share: Share = "all"
    baseline_streams: int = 32
    reward_scale: float = 1.0
    kl_bound: float | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm is {self.algorithm!r}; give one of {', '.join(ALGORITHMS)}")
        if self.kl_bound is not None and not self.kl_bound > 0:
            raise ValueError(f"kl_bound is {self.kl_bound}; give a positive number of nats, or None for no bound")


class Standardised(BaseFeaturesExtractor):
    """Features less their mean, over their standard deviation, within ±5; part of the policy, and saved with it."""

    def __init__(self, observation_space: gym.spaces.Box) -> None:
        super().__init__(observation_space, observation_space.shape[0])
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", torch.zeros(self.features_dim))
        self.register_buffer("std", torch.ones(self.features_dim))

    def fit(self, observations: np.ndarray) -> None:
        """Take mean and deviation (F,) from observations (n, F); features that never change stay 0."""
        seen = torch.as_tensor(observations, dtype=torch.float32)
        self.mean.copy_(seen.mean(0))
        self.std.copy_(seen.std(0, correction=0).clamp(min=1e-3))

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return ((observations - self.mean) / self.std).clamp(-5.0, 5.0)


class StandardAgent(Agent):
    """A standard reinforcement-learning algorithm as an editor: it sees features and scales a base rule's update.

    Args:
        env: a `LifelongEditEnv`, best with ``array_backend="torch"``. It is needed to predict, too: the features speak
            of the LLM's weights.
        config: algorithm and view.
        seed: of the policy's initial weights, its exploration, and the training streams.
    """

    def __init__(self, env: gym.Env[Any, Any], config: StandardConfig | None = None, seed: int = 0) -> None:
        self.env, self.config, self.seed = env, config or StandardConfig(), seed
        self._training: Any = None  # the vector environment that the model learns in
        self._look_at(env)
        settings = {**HYPERPARAMETERS[self.config.algorithm], **self.config.hyperparameters}
        policy = {"features_extractor_class": Standardised, **settings.pop("policy_kwargs", {})}
        algorithm: Any = ALGORITHMS[self.config.algorithm]
        # On the CPU: the policy is tiny, and the LLM may fill the accelerator.
        self.model = algorithm(
            "MlpPolicy", self._training_view(), seed=seed, device="cpu", policy_kwargs=policy, **settings
        )
        self._training = self.model.env
        self.best_score = -math.inf
        self.earlier_timesteps = 0  # those that were taken before ``timesteps`` was last counted from 0
        self._unfinished_in: Path | None = None  # the log_dir of a run that was interrupted in this process
        self._fitted = False  # whether the features' scale is the policy's own, to be kept

    def _look_at(self, env: gym.Env[Any, Any]) -> None:
        environment_inside(env, "StandardAgent", agent=True)
        c = self.config
        self.env = env
        self.scaled = ScaledUpdate(env, c.rule, c.step_size, c.damping, c.span, c.rank, share=c.share)
        self.view = GradientFeatures(self.scaled, c.share)
        self.relative = RelativeReward(self.view, c.baseline_streams) if c.baseline_streams else None
        self._training = None

    def _training_view(self) -> Any:
        """What the algorithm learns in: the view with relative and scaled rewards."""
        training = self.relative or self.view
        return gym.wrappers.TransformReward(training, partial(_scaled, self.config.reward_scale))

    def set_env(self, env: gym.Env[Any, Any]) -> None:
        """Edit and learn in this environment from now on; the zero action is measured there before learning.

        Raises:
            ValueError: it is no environment of this package, or edits another number of modules; the agent is as it
                was.
        """
        other = copy.copy(self)
        other._look_at(env)
        if len(other.scaled.shapes) != len(self.scaled.shapes):
            raise ValueError(f"the policy is for {len(self.scaled.shapes)} modules, the environment edits "
                             f"{len(other.scaled.shapes)}; make an agent for it: StandardAgent(env)")
        self.__dict__ |= vars(other)

    def __deepcopy__(self, memo: dict[int, Any]) -> StandardAgent:
        # The last pass's distribution holds tensors that cannot be copied; the next pass makes its own.
        last = getattr(getattr(self.model.policy, "action_dist", None), "distribution", None)
        if last is not None:
            memo[id(last)] = None
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other.__dict__.update({name: copy.deepcopy(part, memo) for name, part in self.__dict__.items()})
        return other

    def memory(self) -> dict[str, torch.Tensor]:
        return {}

    def predict(self, observation: Any, deterministic: bool = True) -> tuple[Any, None]:
        """Update factors for a raw observation in either array backend."""
        action, _ = self.model.predict(self.view.observation(observation), deterministic=deterministic)
        return self.scaled.factors(observation, action), None

    def learn(
        self,
        total_timesteps: int,
        callback: Callback | None = None,
        progress_bar: bool = True,
        reset_num_timesteps: bool = True,
        log_dir: str | Path | None = None,
        eval_env: gym.Env[Any, Any] | None = None,
        eval_every: int = 10,
        eval_seed: int = 12345,
        resume: bool = True,
    ) -> StandardAgent:
        """Train for this many further environment steps.

        A run in ``log_dir`` that was interrupted, however roughly, is finished, counted from its own start: it goes on
        from its last rollout (SAC and TD3: from its last ``eval_every`` streams), and from the beginning of a stream.
        An agent that has finished it takes further steps; a new agent takes it as it is.

        Args:
            total_timesteps: further environment steps, those that measure the zero action among them; PPO and A2C
                round them up to whole rollouts (``n_steps``).
            callback: called after every stream with its numbers; training stops when it returns False.
            progress_bar: show one.
            reset_num_timesteps: count ``timesteps`` from 0 again; False counts on.
            log_dir: TensorBoard's folder; the best policy is kept in its folder ``best``.
            eval_env: a held-out stream; its metrics choose the policy that the agent holds at the end. It may share the
                LLM with the training environment.
            eval_every: streams between two evaluations.
            eval_seed: the seed that ``eval_env`` is always reset with.
            resume: go on from ``last`` in ``log_dir``, where a run has left it; False starts anew.

        Raises:
            ValueError: there are not more steps than measuring the zero action takes, or ``log_dir`` holds an
                interrupted run with other settings.
            FileExistsError: ``log_dir`` holds a file that would be overwritten and that no training wrote.
        """
        folder = Path(log_dir) if log_dir is not None else None
        watch = _Watch(self, callback, progress_bar, folder, eval_env, eval_every, eval_seed)
        self._learn_in_own_env()
        own = self.earlier_timesteps + self.timesteps  # before what the folder holds
        found = folder is not None and resume and (folder / "last" / TRAINING_STATE).exists()
        if folder is not None and found:
            watch.resume(folder / "last")
        begins = not found or (watch.finished and own == self.earlier_timesteps + self.timesteps)  # else it goes on
        if begins:
            self._check_steps(total_timesteps)
            watch.begin(reset_num_timesteps)
        if folder is not None:
            run_folder(folder)
        try:
            if watch.begun + total_timesteps > self.timesteps:
                self._prepare()
                left = watch.begun + total_timesteps - self.timesteps
                self.model.learn(left, callback=watch, reset_num_timesteps=False)
                watch.end()
        except BaseException:
            self._unfinished_in = folder
            raise
        finally:
            watch.close()
        if watch.best is not None:
            self.model.policy.load_state_dict(watch.best)
        return self

    def _learn_in_own_env(self) -> None:
        """Let the model, which copies of the agent share, learn in this one's environment."""
        if self._training is None:
            self.model.set_env(self._training_view())
            self._training = self.model.env
        elif self.model.env is not self._training:
            self.model.set_env(self._training)

    def _check_steps(self, total_timesteps: int) -> None:
        """Raise ValueError where measuring the zero action would take all steps."""
        if self.relative is None or self.relative.baseline_steps or total_timesteps == 0:
            return
        inner: Any = self.scaled.unwrapped
        needed = self.relative.streams * inner.episode_steps
        if total_timesteps <= needed:
            raise ValueError(
                f"total_timesteps is {total_timesteps}, but measuring the zero action takes {needed} steps "
                f"(baseline_streams={self.relative.streams}); give more steps or fewer streams"
            )

    def _prepare(self) -> None:
        """Measure the zero action on the training streams, which takes environment steps, and fit the features' scale,
        before the first step in an environment."""
        if self.relative is None or self.relative.baseline_steps:
            return
        observations = self.relative.measure(self.seed)
        if not self._fitted:  # a trained policy keeps the scale that it was trained with
            for module in self.model.policy.modules():
                if isinstance(module, Standardised):
                    module.fit(observations)
        self._fitted = True
        self.model.num_timesteps += self.relative.baseline_steps

    @property
    def timesteps(self) -> int:  # type: ignore[override]
        """Environment steps that `learn` has taken since it last counted from 0."""
        return int(self.model.num_timesteps)

    def save(self, path: str | Path) -> None:
        """Write the policy's weights as safetensors and everything else as JSON; no pickle."""
        folder = agent_folder(path)
        # Cloned, since Stable-Baselines3 lists a features extractor that several networks share once for each.
        write_tensors(folder / "agent.safetensors", {k: v.clone() for k, v in self.model.policy.state_dict().items()})
        write_text(folder / "agent.json", json.dumps(self._description(), indent=1) + "\n")

    def _description(self) -> dict[str, Any]:
        return {
            "agent": "standard",
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
    def load(cls, path: str | Path, env: gym.Env[Any, Any] | None = None) -> StandardAgent:
        """The agent in a folder that :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no agent there.
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
            trained = len((description["environment"] or {}).get("edit_modules", []))
            if trained != len(agent.scaled.shapes):
                raise ValueError(
                    f"{folder} was trained for {trained} modules, the environment edits {len(agent.scaled.shapes)}; "
                    f"make the environment with the settings in {folder / 'agent.json'}"
                )
            agent.model.policy.load_state_dict(tensors)
            agent.model.num_timesteps = description["timesteps"]
            agent.earlier_timesteps = description.get("earlier_timesteps", 0)  # which earlier versions did not have
            agent._fitted = agent.timesteps + agent.earlier_timesteps > 0
        return agent


def standard_config(saved: Mapping[str, Any], most: int = MAX_SIZE) -> StandardConfig:
    """The configuration in an agent's file.

    Raises:
        ValueError: a hyperparameter is no number or list of numbers, or would make something larger than ``most``
            numbers, or than :data:`MAX_SIZE`; or it says where files are to be written.
    """

    def check(name: str, value: Any, largest: int) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                check(f"{name}.{key}", inner, largest)
        elif isinstance(value, list):
            for inner in value:
                check(name, inner, largest)
        elif value is not None and (not isinstance(value, int | float) or not -largest <= value <= largest):
            raise ValueError(f"{name} is {value!r}; it must be a number up to {largest:,}")

    hyperparameters = saved["hyperparameters"]
    if forbidden := set(hyperparameters) & {"tensorboard_log", "verbose", "device", "env", "policy"}:
        raise ValueError(f"the hyperparameter {min(forbidden)!r} is not a saved agent's to set")
    for name, value in hyperparameters.items():
        check(name, value, most if name == "policy_kwargs" else MAX_SIZE)
    for name in ("rank", "baseline_streams"):
        check(name, saved[name], MAX_SIZE)
    return StandardConfig(**saved)


def _scaled(scale: float, reward: Any) -> float:
    return scale * float(reward)


class _Watch(BaseCallback):
    """Logs our numbers after every stream, evaluates, keeps the best policy, and writes down what to go on from."""

    def __init__(
        self,
        agent: StandardAgent,
        callback: Callback | None,
        progress_bar: bool,
        folder: Path | None,
        eval_env: gym.Env[Any, Any] | None,
        eval_every: int,
        eval_seed: int,
    ) -> None:
        super().__init__()
        self.agent, self.user_callback, self.folder = agent, callback, folder
        self.show = progress_bar
        self.eval_env, self.eval_every, self.eval_seed = eval_env, eval_every, eval_seed
        self.best: dict[str, torch.Tensor] | None = None
        self.begun = agent.timesteps  # environment steps before this run
        self.finished = False
        self.streams, self._evaluated, self._kept = 0, -1, -1
        self._numbers: dict[str, list[float]] = {}
        self._return = 0.0  # of the stream so far, the environment's own
        inner: Any = agent.scaled.unwrapped
        self._multiplier: Multiplier | None = inner.multiplier  # of the reward's constraint
        self._writer: Any = None
        self._bar: Any = None

    def begin(self, reset_num_timesteps: bool) -> None:
        """Begin a run, with a new stream."""
        model = self.agent.model
        if reset_num_timesteps:
            self.agent.earlier_timesteps += self.agent.timesteps
            model.num_timesteps = 0
        model._last_obs = None
        self.begun, self.finished = self.agent.timesteps, False
        self.streams, self._evaluated, self._kept = 0, -1, -1

    def end(self) -> None:
        """Score the last policy, and write down that the run is finished."""
        self.evaluate()
        self.finished = True
        if self.folder is not None:
            self._keep(self.folder / "last")

    def _on_training_start(self) -> None:
        done = self.num_timesteps - self.begun
        self._writer = summary_writer(self.folder, self.num_timesteps)
        total = self.locals["total_timesteps"] - self.begun
        self._bar = tqdm(total=total, initial=done, unit="step", disable=not self.show)
        if self._evaluated < 0:
            self.evaluate()

    def _on_rollout_start(self) -> None:
        due = isinstance(self.model, OnPolicyAlgorithm) or self.streams >= self._kept + self.eval_every
        if self.folder is not None and (due or self._kept < 0):
            self._keep(self.folder / "last")

    def _on_step(self) -> bool:
        self._bar.update(1)
        info = self.locals["infos"][0]
        self._return += info.get("reward", float(self.locals["rewards"][0]) / self.agent.config.reward_scale)
        for name, value in info.items():
            if isinstance(value, float):
                self._numbers.setdefault(name, []).append(value)
        if not self.locals["dones"][0]:
            return True
        self.streams += 1
        numbers = {name: sum(values) / len(values) for name, values in self._numbers.items()}
        numbers |= {"return": self._return, "drift": info["drift"]}
        if self._multiplier is not None:
            finite = filter(math.isfinite, self._numbers.get(self._multiplier.constraint.component, []))
            if measured := list(finite):
                self._multiplier.update(measured[-1])
        self._numbers, self._return = {}, 0.0
        self._bar.set_postfix({k: f"{numbers[k]:.3g}" for k in ("return", "drift")})
        self._log("train", numbers)
        if self.streams % self.eval_every == 0:
            self.evaluate()
        return self.user_callback is None or self.user_callback(numbers) is not False

    def evaluate(self) -> None:
        """Score the policy on the held-out stream and keep it if it is the best so far."""
        if self.eval_env is None or self._evaluated == self.num_timesteps:
            return
        self._evaluated = self.num_timesteps
        looking_on = copy.copy(self.agent)
        looking_on.set_env(self.eval_env)
        inner: Any = self.eval_env.unwrapped
        with inner.lm.preserved():  # a training stream may be under way on the same LLM
            total, info = run_stream(self.eval_env, looking_on, seed=self.eval_seed)
            metrics = inner.evaluate(generate=False)
            score = -math.inf if info["diverged"] else metrics.mean
            numbers = {k: v for k, v in metrics.as_dict().items() if v is not None}
            if (bound := self.agent.config.kl_bound) is not None:
                numbers["kl"] = divergence(inner.lm)
                score = within_bound(score, numbers["kl"], bound)
        self._log("eval", numbers | {"return": total, "drift": info["drift"]})
        tqdm.write(f"step {self.num_timesteps}: held-out mean {metrics.mean:.1f}, return {total:.1f}")
        if score > self.agent.best_score or self.best is None:
            self.agent.best_score = score
            self.best = {k: v.clone() for k, v in self.agent.model.policy.state_dict().items()}
            if self.folder is not None:
                self.agent.save(self.folder / "best")

    def _keep(self, folder: Path) -> None:
        """Write what :meth:`resume` goes on from, in one file: a process killed at any moment leaves the earlier or
        this one."""
        self._kept = self.streams
        tensors, numbers = training_state(self.model)
        numbers |= {
            "begun": self.begun, "finished": self.finished, "earlier": self.agent.earlier_timesteps,
            "streams": self.streams, "evaluated": self._evaluated,
        }  # fmt: skip
        if self._multiplier is not None:
            numbers["multiplier"] = self._multiplier.value
        if self.agent.relative is not None:
            numbers["relative"] = self.agent.relative.state()
        tensors |= {f"best/{k}": v for k, v in (self.best or {}).items()}
        agent_folder(folder)
        described = {"agent": json.dumps(self.agent._description()), "training": json.dumps(numbers)}
        write_tensors(folder / TRAINING_STATE, tensors, described)

    def resume(self, folder: Path) -> None:
        """Go on from what an interrupted run left.

        Raises:
            ValueError: it is damaged, or of a run with other settings, or this agent has been trained elsewhere since;
                the agent is as it was.
        """
        agent = self.agent
        tensors, metadata = read_training_state(folder / TRAINING_STATE)
        with built_from(folder):
            theirs, numbers = json.loads(metadata["agent"]), json.loads(metadata["training"])
            different = setting_differences(theirs, agent._description())
            # Earlier versions did not say the last two: they counted on, and left nothing of a finished run.
            earlier, finished = numbers.get("earlier", 0), numbers.get("finished", False)
            before_it, own = earlier + numbers["begun"], agent.earlier_timesteps + agent.timesteps
            same = agent._unfinished_in == self.folder
            if not same and own not in (0, before_it, earlier + numbers["timesteps"]):
                different.append(f"steps before it: {before_it} there, {own} here")
            if different:
                raise ValueError(f"{folder} holds an interrupted run with other settings ({'; '.join(different)}); "
                                 f"give the same settings, give {START_ANEW}")
            assert agent.model.env is not None
            agent.model.env.reset()  # the first one seeds the environment; what is loaded comes after it
            best = under("best/", tensors) or None
            streams, evaluated = numbers["streams"], numbers["evaluated"]
            multiplier = numbers["multiplier"] if self._multiplier is not None else 0.0
            before = training_state(agent.model), agent.relative.state() if agent.relative is not None else {}
            try:
                if best is not None:
                    agent.model.policy.load_state_dict(best)  # at the end of the training it must fit
                load_training_state(agent.model, tensors, numbers)
                if agent.relative is not None:
                    agent.relative.load_state(numbers["relative"])
            except BaseException:
                load_training_state(agent.model, *before[0])
                if agent.relative is not None:
                    agent.relative.load_state(before[1])
                raise
            if self._multiplier is not None:
                self._multiplier.value = multiplier
            agent.model._last_obs = agent.model.env.reset()
            agent.model._last_episode_starts = np.ones((1,), dtype=bool)
            agent.best_score = known_best(theirs)
            self.best = best
            agent.earlier_timesteps, agent._fitted = earlier, True
            self.begun, self.finished, self.streams, self._evaluated = numbers["begun"], finished, streams, evaluated
        tqdm.write(f"going on from {folder} (step {agent.timesteps})")

    def close(self) -> None:
        """Write out what TensorBoard still holds back."""
        for one in (self._writer, self._bar):
            if one is not None:
                one.close()

    def _log(self, group: str, numbers: Mapping[str, float]) -> None:
        log(self._writer, group, numbers, self.num_timesteps)
