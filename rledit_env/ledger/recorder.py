"""Recorder: the object that an environment tells its updates before they take effect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from rledit_env.updates import Update


class Recorder(Protocol):
    """The interface of `LifelongEditEnv.recorder`, which is told each update before it takes effect."""

    def record(self, update: Update) -> Mapping[str, Tensor]:
        """An update is about to be applied. Returns the weights after it, which the environment then puts in place."""

    def roll_back(self) -> None:
        """The last update is about to be taken back, since it broke the LLM."""
