"""Selection of the best policy: the one that edits best among those within a bound on the divergence."""

from __future__ import annotations

import math

from rledit_env.lm.editable import EditableLM
from rledit_env.preservation import OwnText
from rledit_env.self_text import self_drift

TEXT = OwnText(pool=32, seed=1)  # different texts from those of the reward and of reported results


def divergence(lm: EditableLM) -> float:
    """KL(p_θ₀ ‖ p_W) in nats a token on the LLM's own text that is reserved for selection; the LLM writes the text at
    the first call.

    Args:
        lm: the edited LLM.
    """
    return self_drift(lm, TEXT.texts(lm)).kl


def within_bound(score: float, kl: float, bound: float) -> float:
    """The value to maximise: the score if the divergence is within the bound; else a negative number, the bound minus
    the divergence.

    Args:
        score: 0 or more, in percent; −∞ if the LLM broke.
        kl: the divergence, in nats a token.
        bound: the largest divergence allowed.
    """
    if score == -math.inf or math.isnan(kl):
        return -math.inf
    return score if kl <= bound else bound - kl
