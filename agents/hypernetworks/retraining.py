"""Hypernetworks that are trained one batch at a time and, if asked for, again while they edit (MEND*, MALMEN*)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agents.rledit.agent import RLEditAgent
from agents.rledit.config import RLEditConfig
from agents.rledit.normaliser import moments_state
from agents.rledit.trainer import training_env, update_policy
from agents.rledit.trajectory import trajectory
from rledit_env.interface import EditingEnv, editing_env
from rledit_env.reward import Generalization, Locality, RewardConfig


@dataclass(frozen=True)
class BatchwiseConfig(RLEditConfig):
    """How a hypernetwork is trained batch by batch, and when again.

    Attributes:
        retrain_every: while editing, the network is trained on the weights as they are after every so many batches; 0
            is never. The starred baselines of the RLEdit paper (Appendix A.2) use 3.
        retrain_steps: updates of the network at each retraining, of ``trajectories_per_update`` batches each.
    """

    retrain_every: int = 0
    retrain_steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("retrain_every", "retrain_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give 0 (never) or more")


def batchwise_reward(editing: float = 1.0, locality: float = 1.0) -> RewardConfig:
    """Minus the batch's own editing loss, c_e L_gen + c_loc L_loc: no earlier batch, no regularisation."""
    return RewardConfig(
        components={"generalization": (editing, Generalization()), "locality": (locality, Locality())},
        backtracking_depth=0, regularisation=0.0,
    )  # fmt: skip


class BatchwiseAgent(RLEditAgent):
    """A hypernetwork trained on single batches: each trajectory is one batch, edited into θ₀, and its reward is minus
    the batch's editing loss. That is the earlier methods' training (MEND, MALMEN): in a stream they meet weights that
    they never saw. ``env`` is therefore best made with ``num_batches=1`` and :func:`batchwise_reward`.

    With ``retrain_every`` the network is trained again while it edits, on training facts (those of ``env``) and the
    weights as the stream has left them. The agent is then made with the environment of the training facts and told with
    :meth:`set_env` where it edits; both must share one `EditableLM`. The weights are put back bit for bit; the
    network's own parameters are again the trained ones after :meth:`reset`.

    Attributes:
        retraining_env: the environment of the training facts: the one that the agent was made or loaded with.
    """

    config: BatchwiseConfig

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.retraining_env = self.env
        self._retrained = 0  # how often it has been due in the stream so far
        self._editing = True  # whether predictions are edits, not a training's evaluations
        # What there was before the first retraining of the stream: the policy, its optimiser, its updates.
        self._trained: tuple[dict[str, Tensor], torch.optim.Optimizer, int] | None = None

    def reset(self) -> None:
        if self._trained is not None:
            policy, self.optimizer, self.updates = self._trained
            self.load_policy_state(policy)
            self._trained = None
        self._retrained = 0
        super().reset()

    def memory(self) -> dict[str, Tensor] | None:
        """None where the policy itself changes within a stream: an interrupted run is then gone through again."""
        return None if self.config.retrain_every > 0 else super().memory()

    def predict(self, observation: Any, deterministic: bool = True) -> tuple[Any, None]:
        """Update factors for an observation in either array backend, after a retraining where one is due.

        Raises:
            ValueError: a retraining is due, and the agent has no environment to learn in.
        """
        if self._editing and self.config.retrain_every > 0:
            holder = editing_env(training_env(self.retraining_env)).lm.holder
            edited: EditingEnv | None = None if holder is None else holder()  # whose stream is under way
            due = 0 if edited is None else edited.position // edited.steps_per_batch // self.config.retrain_every
            if due > self._retrained:
                self.retrain()
            self._retrained = due
        return super().predict(observation, deterministic)

    def retrain(self) -> None:
        """Train the network for ``retrain_steps`` updates on the LLM's weights as they are; they stay as they are."""
        env = training_env(self.retraining_env)
        lm = editing_env(env).lm
        network = self.network
        if self._trained is None:
            self._trained = (self.policy_state(), self.optimizer, self.updates)
            self.optimizer = self.make_optimizer()
        inverses, normalisers = network.key_memory.inverses, network.normalisers
        kind = self.config.network.normaliser
        if kind == "continued":  # the stream's rows and the training facts' are rows of one run
            network.lifetime = moments_state(normalisers)
        try:
            for _ in range(self.config.retrain_steps):
                gradients = []
                for i in range(self.config.trajectories_per_update):
                    seed = self.seed + self.updates * 1000 + i
                    with lm.preserved():  # they may be those of another environment's episode
                        gradients.append(trajectory(self, env, seed, options={"keep_weights": True})[0])
                update_policy(self, gradients)
        finally:
            network.key_memory.inverses = inverses
            if kind == "stream":
                network.normalisers = normalisers
            elif kind == "continued":
                network.normalisers = network.first_normalisers()

    def learn(self, *args: Any, **options: Any) -> BatchwiseAgent:
        """As :meth:`RLEditAgent.learn`; its evaluations are made without retraining."""
        with self._trained_policy():
            super().learn(*args, **options)
        return self

    def calibrate(self, *args: Any, **options: Any) -> dict[float, float]:
        """As :meth:`RLEditAgent.calibrate`, without retraining."""
        with self._trained_policy():
            return super().calibrate(*args, **options)

    @contextmanager
    def _trained_policy(self) -> Iterator[None]:
        """Within it, what is trained or tried is the policy between two streams."""
        self.reset()
        self._editing = False
        try:
            yield
        finally:
            self._editing = True
