"""What an agent may ask of its environment beside Gymnasium's interface."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, runtime_checkable

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
from rledit_env.updates import Update

if TYPE_CHECKING:
    from rledit_env.env import LifelongEditEnv


@runtime_checkable
class EditingEnv(Protocol):
    """The environment inside its wrappers, as agents see it: they read it, and set only what is no property here.

    `LifelongEditEnv` fulfils it, and says there what each part is.

    Attributes:
        recorder: what is told of every update before it takes effect; None for nothing.
        action_noise_std: standard deviation of the noise that is added to actions.
    """

    recorder: Recorder | None
    action_noise_std: float

    # -- the LLM and the facts -----------------------------------------------------------------------------------

    @property
    def lm(self) -> EditableLM:
        """The LLM, for agents that need more of it than the observation shows; they leave its weights as they are."""

    @property
    def dataset(self) -> KnowledgeDataset:
        """The facts that streams are drawn from."""

    @property
    def stream(self) -> KnowledgeStream:
        """The episode's facts, batch by batch."""

    def current_batch(self) -> list[EncodedRecord]:
        """The facts now presented."""

    def presented_facts(self) -> list[int]:
        """Places of :meth:`current_batch`'s facts in their batch, from 0."""

    def edited_records(self) -> list[EditRecord]:
        """The facts edited so far, in order."""

    def evaluate(self, generate: bool = True, metrics: str = "paper") -> Metrics:
        """The metrics on all facts edited so far."""

    def accept(self, action: Any) -> Update:
        """The update that an action means; raises, with nothing changed, for what `step` rejects."""

    # -- the episode ---------------------------------------------------------------------------------------------

    @property
    def episode_steps(self) -> int:
        """The most steps that an episode can have."""

    @property
    def position(self) -> int:
        """The place in the episode, from 0."""

    @property
    def history(self) -> list[dict[str, float]]:
        """The reward and the numbers of each step taken."""

    @property
    def np_random(self) -> np.random.Generator:
        """The episode's random numbers."""

    # -- how it was made -----------------------------------------------------------------------------------------

    @property
    def spec(self) -> EnvSpec | None:
        """What `gymnasium.make` made it of."""

    @property
    def token(self) -> str:
        """The positions that are observed."""

    @property
    def array_backend(self) -> Literal["numpy", "torch"]:
        """The arrays of observations."""

    @property
    def steps_per_batch(self) -> int:
        """How often a batch is presented, at most."""

    @property
    def present_until(self) -> float | None:
        """The probability from which a fact has taken; None where batches are presented a fixed number of times."""

    @property
    def contexts(self) -> int:
        """Behind how many texts each fact is presented, beside its plain prompt."""

    @property
    def on_divergence(self) -> Literal["end", "skip", "raise"]:
        """What follows an update that broke the LLM."""

    @property
    def reward_gradient(self) -> bool:
        """Whether `info` holds the reward's gradient."""

    @property
    def reward_config(self) -> RewardConfig | None:
        """What the reward consists of; None where none is computed."""

    @property
    def multiplier(self) -> Multiplier | None:
        """Of the reward's constraint; None where it has none."""


def editing_env(env: gym.Env[Any, Any]) -> EditingEnv:
    """The environment inside wrappers.

    Raises:
        TypeError: it is no environment of this package.
    """
    inner: Any = env.unwrapped
    # Only looked for by one name: to look for all would make the random numbers of an environment not yet reset.
    if not hasattr(inner, "lm"):
        raise TypeError(f"{inner} is no environment of this package; give one such as RLEdit-CounterFact-v0")
    return cast(EditingEnv, inner)


if TYPE_CHECKING:

    def _fulfilled(env: LifelongEditEnv) -> EditingEnv:
        return env
