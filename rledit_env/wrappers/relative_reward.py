"""RelativeReward: the reward minus the zero action's, on a fixed set of episodes."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.core import ObsType
from gymnasium.utils import RecordConstructorArgs

from rledit_env.nesting import check_single
from rledit_env.type_aliases import Info, JsonObject, Options


class RelativeReward(gym.Wrapper[ObsType, np.ndarray, ObsType, np.ndarray], RecordConstructorArgs):
    """The reward minus the zero action's reward at the same step of the same episode; for training.

    Returns of short episodes differ mostly because their facts differ, which tells an algorithm nothing about its
    actions. Facts do not depend on actions, so neither does the zero action's reward: subtracting it keeps the order of
    all policies and removes that noise (an input-dependent baseline, Mao et al., ICLR 2019). To keep this cheap,
    episodes recur: `reset` goes through a fixed set of them, in a new order every time, and measures each with the zero
    action once, at its first use.

    `info["reward"]` is the environment's own reward; ``baseline_steps`` counts the steps of these measurements (they
    are environment steps and must be counted in every comparison of algorithms).

    Args:
        env: an environment whose actions are a Box, such as `GradientFeatures(ScaledUpdate(env))`.
        streams: number of episodes in the set.

    Raises:
        ValueError: the environment's actions are not a Box, it has such a wrapper already, or ``streams`` is not
            positive.
    """

    def __init__(self, env: gym.Env[ObsType, np.ndarray], streams: int = 32) -> None:
        check_single(env, "RelativeReward")
        if not isinstance(env.action_space, spaces.Box):
            kind = type(env.action_space).__name__
            raise ValueError(f"the actions are a {kind}, which has no zero; wrap GradientFeatures(ScaledUpdate(env))")
        if env.has_wrapper_attr("baseline_steps"):
            raise ValueError("the rewards are relative already; leave out one RelativeReward of the two")
        RecordConstructorArgs.__init__(self, streams=streams)
        gym.Wrapper.__init__(self, env)
        if streams < 1:
            raise ValueError(f"streams is {streams}; give 1 or more")
        if getattr(env.unwrapped, "present_until", None) is not None:
            raise ValueError(
                "the environment has present_until, so that a stream's steps are not those of the zero action; make it "
                "without, or leave RelativeReward out (an agent's baseline_streams=0)"
            )
        self.streams, self.baseline_steps = streams, 0
        self._zero = np.zeros(env.action_space.shape, np.float32)
        self._baselines: dict[int, list[float]] = {}  # seed of an episode → the zero action's rewards
        self._begin(0)

    def _begin(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._seeds = [int(s) for s in self._rng.choice(2**31, self.streams, replace=False)]
        self._queue: list[int] = []
        self._current: int | None = None

    def measure(self, seed: int | None = None) -> np.ndarray:
        """Run the zero action in all episodes of the set; returns the observations, one per row.

        Args:
            seed: draws another set first, the same as `reset` with this seed.
        """
        if seed is not None:
            self._begin(seed)
        return np.concatenate([self._measure(seed) for seed in self._seeds])

    def state(self) -> JsonObject:
        """The set of episodes, the queue of those still to come, and the measurements, for JSON; the episode that has
        begun is in the queue."""
        current = [] if self._current is None else [self._current]
        return {
            "rng": self._rng.bit_generator.state, "seeds": self._seeds, "queue": [*self._queue, *current],
            "baselines": [[seed, rewards] for seed, rewards in self._baselines.items()], "steps": self.baseline_steps,
        }  # fmt: skip

    def load_state(self, state: JsonObject) -> None:
        """Restore what :meth:`state` returned; the next `reset` continues from there."""
        self._rng.bit_generator.state = state["rng"]
        self._seeds, self._queue, self._current = list(state["seeds"]), list(state["queue"]), None
        self._baselines, self.baseline_steps = dict(state["baselines"]), state["steps"]

    def _measure(self, seed: int) -> np.ndarray:
        observation, _ = self.env.reset(seed=seed)
        observations, rewards, done = [], [], False
        while not done:
            observations.append(np.asarray(observation))
            observation, reward, terminated, truncated, _ = self.env.step(self._zero)
            rewards.append(float(reward))
            done = terminated or truncated
        self._baselines[seed] = rewards
        self.baseline_steps += len(rewards)
        return np.stack(observations)

    def reset(self, *, seed: int | None = None, options: Options | None = None) -> tuple[ObsType, Info]:
        """Begin the next episode of the set.

        Args:
            seed: draws another set (the same for the same seed) and begins with it.
            options: must be empty, since the facts are those of the set.

        Raises:
            ValueError: options were given.
        """
        if options:
            raise ValueError(f"reset options {sorted(options)} cannot be given: the streams are those of a fixed set")
        if seed is not None:
            self._begin(seed)
        if not self._queue:
            self._queue = [self._seeds[i] for i in self._rng.permutation(self.streams)]
        self._current = episode_seed = self._queue.pop()
        if episode_seed not in self._baselines:
            self._measure(episode_seed)
        self._baseline, self._step = self._baselines[episode_seed], 0
        return self.env.reset(seed=episode_seed)

    def step(self, action: np.ndarray) -> tuple[ObsType, float, bool, bool, Info]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        # Where the zero action broke the model, its episode ended early, and later steps have no baseline.
        baseline = self._baseline[self._step] if self._step < len(self._baseline) else 0.0
        self._step += 1
        return observation, float(reward) - baseline, terminated, truncated, {**info, "reward": float(reward)}
