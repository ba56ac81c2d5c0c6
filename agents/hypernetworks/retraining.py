"""Hypernetworks that are trained on single batches and, optionally, trained again while they edit (MEND*, MALMEN*)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from agents.rledit.agent import RLEditAgent
from agents.rledit.config import RLEditConfig
from agents.rledit.normaliser import moments_state
from agents.rledit.trainer import training_env, update_policy
from agents.rledit.trajectory import trajectory
from rledit_env.interface import EditingEnv, editing_env
from rledit_env.reward import Generalization, Locality, RewardConfig
from rledit_env.spaces import Action, Observation


@dataclass(frozen=True)
class BatchwiseConfig(RLEditConfig):
    """The settings of training on single batches, and of retraining.

    Attributes:
        retrain_every: number of batches after which, while editing, the network is trained again on the edited weights;
            0 means never. The starred baselines of the RLEdit paper (Appendix A.2) use 3.
        retrain_steps: policy updates at each retraining, of ``trajectories_per_update`` batches each.
    """

    retrain_every: int = 0
    retrain_steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("retrain_every", "retrain_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give 0 (never) or more")


def batchwise_reward(editing: float = 1.0, locality: float = 1.0) -> RewardConfig:
    """The reward −(c_e L_gen + c_loc L_loc) of the current batch, without earlier batches and regularisation."""
    return RewardConfig(
        components={"generalization": (editing, Generalization()), "locality": (locality, Locality())},
        backtracking_depth=0, regularisation=0.0,
    )  # fmt: skip


class BatchwiseAgent(RLEditAgent):
    """A hypernetwork trained on single batches: each trajectory is one batch, edited into θ₀, and its reward is minus
    the batch's editing loss. MEND and MALMEN are trained so, and in a stream they meet weights that they were not
    trained on. Make ``env`` with ``num_batches=1`` and :func:`batchwise_reward`.

    With ``retrain_every`` the network is trained again while it edits, on the training facts of ``env`` and the edited
    weights. Make the agent with the environment of the training facts, and name the one it edits in with
    :meth:`set_env`; both must share one `EditableLM`. Retraining leaves the LLM's weights unchanged, bit for bit.
    :meth:`reset` restores the trained parameters of the network.

    Attributes:
        retraining_env: the environment of the training facts, with which the agent was made or loaded.
    """

    config: BatchwiseConfig

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.retraining_env = self.env
        self._retrainings = 0  # retrainings that were due in the stream so far
        self._retrains = True  # False while the agent is trained and evaluated
        # The policy, the optimiser and the updates before the stream's first retraining.
        self._trained_state: tuple[dict[str, Tensor], torch.optim.Optimizer, int] | None = None

    def reset(self) -> None:
        if self._trained_state is not None:
            policy, self.optimizer, self.updates = self._trained_state
            self.load_policy_state(policy)
            self._trained_state = None
        self._retrainings = 0
        super().reset()

    def memory(self) -> dict[str, Tensor] | None:
        """None if the policy changes within a stream: an interrupted run is then repeated."""
        return None if self.config.retrain_every > 0 else super().memory()

    def predict(self, observation: Observation, deterministic: bool = True) -> tuple[Action, None]:
        """Update factors for an observation in either array backend, after a retraining if one is due.

        Raises:
            ValueError: a retraining is due, and the agent has no environment to learn in.
        """
        if self._retrains and self.config.retrain_every > 0:
            holder = editing_env(training_env(self.retraining_env)).lm.holder
            # The environment that edits the LLM.
            editing = None if holder is None else cast(EditingEnv | None, holder())
            due = 0 if editing is None else editing.position // editing.steps_per_batch // self.config.retrain_every
            if due > self._retrainings:
                self.retrain()
            self._retrainings = due
        return super().predict(observation, deterministic)

    def retrain(self) -> None:
        """Train the network for ``retrain_steps`` updates on the edited weights, and leave these as they are."""
        env = training_env(self.retraining_env)
        lm = editing_env(env).lm
        network = self.network
        if self._trained_state is None:
            self._trained_state = (self.policy_state(), self.optimizer, self.updates)
            self.optimizer = self.make_optimizer()
        memory, normalisers = network.key_memory.state(), network.normalisers
        kind = self.config.network.normaliser
        if kind == "continued":  # the moments continue from the stream to the training facts and back
            network.lifetime = moments_state(normalisers)
        try:
            for _ in range(self.config.retrain_steps):
                gradients = []
                for i in range(self.config.trajectories_per_update):
                    seed = self.seed + self.updates * 1000 + i
                    with lm.preserved():  # another environment's episode may be editing these weights
                        gradients.append(trajectory(self, env, seed, options={"keep_weights": True})[0])
                update_policy(self, gradients)
        finally:
            network.key_memory.load_state(memory)
            if self.config.network.by_stream:
                network.normalisers = normalisers
            elif kind == "continued":
                network.normalisers = network.first_normalisers()

    def learn(self, *args: Any, **options: Any) -> BatchwiseAgent:
        """As :meth:`RLEditAgent.learn`; the evaluations are without retraining."""
        with self._without_retraining():
            super().learn(*args, **options)
        return self

    def calibrate(self, *args: Any, **options: Any) -> dict[float, float]:
        """As :meth:`RLEditAgent.calibrate`, without retraining."""
        with self._without_retraining():
            return super().calibrate(*args, **options)

    @contextmanager
    def _without_retraining(self) -> Iterator[None]:
        """Reset the agent, and disable retraining within the context."""
        self.reset()
        self._retrains = False
        try:
            yield
        finally:
            self._retrains = True
