"""What an environment tells of its updates before they take effect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from rledit_env.updates import Update


class Recorder(Protocol):
    """What `LifelongEditEnv.recorder` is told before anything takes effect."""

    def record(self, update: Update) -> Mapping[str, Tensor]:
        """An update is about to be applied; returns the weights that it leads to, which are then put in place."""

    def roll_back(self) -> None:
        """The last update is about to be taken back, since it broke the LLM."""
