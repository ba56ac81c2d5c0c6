"""Recorder: the interface that records an environment's updates before they take effect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from rledit_env.updates import Update


class Recorder(Protocol):
    """The interface of `LifelongEditEnv.recorder`, which the environment calls before each update takes effect."""

    def record(self, update: Update) -> Mapping[str, Tensor]:
        """Record an update that is about to be applied; returns the weights after it, for the environment to set."""

    def roll_back(self) -> None:
        """Record that the last update is about to be taken back because it broke the LLM."""
