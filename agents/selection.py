"""Choosing by the right score: the best of several policies is the one that edits best among those that leave the rest
of the LLM alone."""

from __future__ import annotations

import math

from rledit_env.lm.editable import EditableLM
from rledit_env.preservation import OwnText
from rledit_env.self_text import self_drift

TEXT = OwnText(pool=32, seed=1)  # neither the texts that a reward draws, nor those that a result is reported on


def divergence(lm: EditableLM) -> float:
    """KL(p_θ₀ ‖ p_W) in nats a token on text of the LLM's own that is kept for choosing; written when first asked for.

    Args:
        lm: the LLM, edited.
    """
    return self_drift(lm, TEXT.texts(lm)).kl


def within_bound(score: float, kl: float, bound: float) -> float:
    """What to maximise: the score where the divergence is within the bound; else less than any score, and the less the
    further beyond.

    Args:
        score: 0 or more, in percent; −∞ where the LLM broke.
        kl: the divergence, in nats a token.
        bound: the most that it may be.
    """
    if score == -math.inf or math.isnan(kl):
        return -math.inf
    return score if kl <= bound else bound - kl
