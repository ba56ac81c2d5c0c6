"""The part of an environment that agents may use in addition to Gymnasium's interface."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol, cast, runtime_checkable

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec

from rledit_env.encoding import EncodedRecord
from rledit_env.evaluation.metrics import Metrics
from rledit_env.knowledge import EditRecord, KnowledgeDataset, KnowledgeStream
from rledit_env.ledger import Recorder
from rledit_env.lm.editable import EditableLM
from rledit_env.preservation import Multiplier
from rledit_env.reward import RewardConfig
from rledit_env.spaces import Action, Observation
from rledit_env.updates import Update

if TYPE_CHECKING:
    from rledit_env.env import LifelongEditEnv

Environment = gym.Env[Observation, Action]  # of this package, inside wrappers that leave both as they are


@runtime_checkable
class EditingEnv(Protocol):
    """The environment inside its wrappers, as agents use it. They may set the attributes, and only read the properties.

    `LifelongEditEnv` implements it and documents its parts.

    Attributes:
        recorder: an object that records every update before it takes effect, or None.
        action_noise_std: standard deviation of the noise that is added to actions.
    """

    recorder: Recorder | None
    action_noise_std: float

    # -- the LLM and the facts -----------------------------------------------------------------------------------

    @property
    def lm(self) -> EditableLM:
        """The LLM, for agents that need more of it than the observation; they must not change its weights."""

    @property
    def dataset(self) -> KnowledgeDataset:
        """The facts that episodes are drawn from."""

    @property
    def stream(self) -> KnowledgeStream:
        """The episode's facts, batch by batch."""

    def current_batch(self) -> list[EncodedRecord]:
        """The facts now presented."""

    def presented_facts(self) -> list[int]:
        """Indices of :meth:`current_batch`'s facts in their batch."""

    def edited_records(self) -> list[EditRecord]:
        """The facts edited so far, in order."""

    def evaluate(self, generate: bool = True, metrics: str = "paper") -> Metrics:
        """The metrics on all facts edited so far."""

    def accept(self, action: object) -> Update:
        """The update that an action means; raises, with nothing changed, for what `step` rejects."""

    # -- the episode ---------------------------------------------------------------------------------------------

    @property
    def episode_steps(self) -> int:
        """The largest number of steps of an episode."""

    @property
    def position(self) -> int:
        """The place in the episode, from 0."""

    @property
    def history(self) -> list[dict[str, float]]:
        """The reward and the numbers of each step taken."""

    @property
    def np_random(self) -> np.random.Generator:
        """The generator of the episode's random numbers."""

    # -- the settings --------------------------------------------------------------------------------------------

    @property
    def spec(self) -> EnvSpec | None:
        """The specification that `gymnasium.make` made the environment from."""

    @property
    def token(self) -> str:
        """The positions that are observed."""

    @property
    def array_backend(self) -> Literal["numpy", "torch"]:
        """The type of arrays in observations."""

    @property
    def steps_per_batch(self) -> int:
        """Most presentations of a batch."""

    @property
    def present_until(self) -> float | None:
        """The probability at which a fact has taken; None where batches are presented a fixed number of times."""

    @property
    def contexts(self) -> int:
        """Number of texts behind which each fact is presented, in addition to its plain prompt."""

    @property
    def on_divergence(self) -> Literal["end", "skip", "raise"]:
        """What happens after an update that broke the LLM."""

    @property
    def reward_gradient(self) -> bool:
        """Whether `info` holds the reward's gradient."""

    @property
    def reward_config(self) -> RewardConfig | None:
        """What the reward consists of; None where none is computed."""

    @property
    def multiplier(self) -> Multiplier | None:
        """The multiplier of the reward's constraint; None where it has none."""


def editing_env(env: gym.Env) -> EditingEnv:
    """The environment inside wrappers.

    Raises:
        TypeError: the environment is not one of this package.
    """
    inner = env.unwrapped
    # Only one name is checked: checking all would create the random generator of an environment before its reset.
    if not hasattr(inner, "lm"):
        raise TypeError(f"{inner} is no environment of this package; give one such as RLEdit-CounterFact-v0")
    return cast(EditingEnv, inner)


if TYPE_CHECKING:

    def _implements_interface(env: LifelongEditEnv) -> EditingEnv:
        return env
