"""Attributes of an environment that its episode or the episode's settings hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Generic, Literal, TypeVar, overload

import gymnasium as gym

from rledit_env.delegation import AttributeOf
from rledit_env.encoding import EncodedDataset, EncodedRecord
from rledit_env.episode import EditEpisode
from rledit_env.knowledge import EditRecord, KnowledgeStream
from rledit_env.ledger import Recorder
from rledit_env.lm.editable import EditableLM
from rledit_env.preservation import Multiplier
from rledit_env.reward import RewardConfig

T = TypeVar("T")


class OfSettings(Generic[T]):
    """An attribute of an environment that is read from its episode's settings; setting it replaces the settings."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, env: None, owner: type) -> OfSettings[T]: ...

    @overload
    def __get__(self, env: Any, owner: type) -> T: ...

    def __get__(self, env: Any, owner: type) -> OfSettings[T] | T:
        return self if env is None else getattr(env.episode.settings, self._name)

    def __set__(self, env: Any, value: T) -> None:
        env.episode.settings = replace(env.episode.settings, **{self._name: value})


class EpisodeAttributes:
    """Mixin for an environment: its episode, the episode's settings and the position in it as attributes.

    Attributes:
        episode: the current episode.
    """

    episode: EditEpisode

    lm = AttributeOf[EditableLM]("episode")
    encoded = AttributeOf[EncodedDataset]("episode")
    stream = AttributeOf[KnowledgeStream]("episode")
    max_tokens = AttributeOf[int]("episode")
    multiplier = AttributeOf[Multiplier | None]("episode")
    recorder = AttributeOf[Recorder | None]("episode")
    history = AttributeOf[list[dict[str, float]]]("episode")
    token = OfSettings[str]()
    array_backend = OfSettings[Literal["numpy", "torch"]]()
    on_divergence = OfSettings[Literal["end", "skip", "raise"]]()
    steps_per_batch = OfSettings[int]()
    present_until = OfSettings[float | None]()
    contexts = OfSettings[int]()
    action_noise_std = OfSettings[float]()
    render_mode = OfSettings[str | None]()
    reward_gradient = OfSettings[bool]()
    reward_config = OfSettings[RewardConfig | None]()

    @property
    def episode_steps(self) -> int:
        """Steps of a whole episode; with ``present_until``, the most that it can have."""
        return self.episode.steps

    def current_batch(self) -> list[EncodedRecord]:
        """The facts now presented, in the episode's order, as passages (with their text in `record`); with
        ``present_until``, those of the batch that have not taken.

        Raises:
            gymnasium.error.ResetNeeded: no facts are presented, since the episode is over or was never begun.
        """
        if self.episode.over:
            raise gym.error.ResetNeeded("no batch is presented: call reset() before current_batch()")
        records = self.episode.records(self.episode.batch)
        return [records[i] for i in self.presented_facts()]

    def presented_facts(self) -> list[int]:
        """Indices of :meth:`current_batch`'s facts in their batch."""
        return self.episode.presented_facts()

    @property
    def position(self) -> int:
        """The place in the episode: the batch's index times ``steps_per_batch``, plus the presentation, from 0.

        It is the number of steps taken, unless batches have ended early (``present_until``).
        """
        return self.episode.position

    def edited_records(self) -> list[EditRecord]:
        """The facts edited so far, in order."""
        batches = -(-self.position // self.steps_per_batch)
        return [record for batch in range(batches) for record in self.stream.batch(batch)]
