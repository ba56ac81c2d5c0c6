"""DriftGuard: watches how far editing moves the LLM on text that is unrelated to the edits."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import torch

from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage
from rledit_env.lm.losses import kl_divergence

# Plain sentences without facts that a data set asks for.
HELD_TEXTS: tuple[str, ...] = (
    "She put the kettle on, opened the window and waited for the rain to stop.",
    "If you want bread to rise well, keep the dough in a warm place and do not hurry it.",
    "The children ran down to the river, where the water was shallow enough to walk across.",
    "To save the file under another name, choose the second item of the menu.",
    "He had read the letter twice before he understood what it meant for both of them.",
    "A good tool should be easy to hold, easy to clean and hard to break.",
    "In winter the days are short, and people tend to stay at home in the evening.",
    "Please let me know whether the meeting can be moved to Thursday morning.",
    "We tried three ways to solve the problem, and the simplest one turned out to be the best.",
    "Most of the time the train is on time, but today it was twenty minutes late.",
    "First wash the vegetables, then cut them into small pieces and fry them gently in oil.",
    "When the music stopped, nobody in the room dared to be the first to speak.",
)


class DriftGuard:
    """Measures KL(p_θ₀ ‖ p_W) on held text, and warns or stops the run if it exceeds a bound.

    Args:
        lm: the LLM that is edited.
        bound: the largest KL allowed, in nats a token.
        on_excess: "warn" (once) or "stop".
        every: batches between two measurements.
        texts: the held text; every token but the first of each is predicted.

    Raises:
        ValueError: an argument has a wrong value, or a text has less than two tokens or more than the context.
    """

    def __init__(
        self,
        lm: EditableLM,
        bound: float = 0.5,
        on_excess: Literal["warn", "stop"] = "warn",
        every: int = 1,
        texts: Sequence[str] = HELD_TEXTS,
    ) -> None:
        if not bound > 0:
            raise ValueError(f"bound is {bound}; give a positive number of nats a token")
        if on_excess not in ("warn", "stop"):
            raise ValueError(f"on_excess is {on_excess!r}; give 'warn' or 'stop'")
        if every < 1:
            raise ValueError(f"every is {every}; give 1 or more")
        if not texts:
            raise ValueError("texts are empty; give some text to hold the LLM to")
        self.lm, self.bound, self.on_excess, self.every = lm, bound, on_excess, every
        self.passages: list[Passage] = []
        for text in texts:
            ids = lm.encode(text)
            if not 2 <= len(ids) <= lm.context_length:
                raise ValueError(f"held text {text[:60]!r} has {len(ids)} tokens; give 2 to {lm.context_length}")
            self.passages.append(Passage(tuple(ids[:-1]), tuple(ids[1:])))
        self.history: list[tuple[int, float]] = []  # batch, nats a token

    @torch.no_grad()
    def divergence(self) -> float:
        """KL(p_θ₀ ‖ p_W), the mean over all predicted tokens of the held text, in nats."""
        reference = torch.cat(self.lm.reference_states(self.passages))
        hidden = self.lm.answer_states(self.passages).hidden
        return float(kl_divergence(self.lm.forward, hidden, reference).mean())

    def exceeded(self, batch: int) -> bool:
        """Measure after this batch (from 0), and return whether the run must stop. With ``on_excess="warn"`` it warns
        when the bound is first exceeded, and returns False."""
        if (batch + 1) % self.every:
            return False
        kl = self.divergence()
        exceeded_before = any(not earlier <= self.bound for _, earlier in self.history)
        self.history.append((batch, kl))
        if kl <= self.bound:  # False for NaN
            return False
        if self.on_excess == "stop":
            return True
        if not exceeded_before:
            warnings.warn(f"after batch {batch} the LLM differs from the original by {kl:.3f} nats a token on held "
                          f"text, more than the bound of {self.bound:g}", stacklevel=2)
        return False
