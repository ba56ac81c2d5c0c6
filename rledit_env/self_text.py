"""Divergence without data: how well an edited LLM predicts text that it wrote itself before editing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage
from rledit_env.lm.losses import kl_divergence, negative_log_likelihood

OPENINGS = (
    "The history of", "In a small village", "Scientists have found", "My favourite recipe", "The main reason why",
    "Once upon a time", "To solve this equation", "The river flows", "Many people believe", "In the year 1900",
    "The company announced", "A good teacher", "The purpose of a heart", "When the war ended", "Learning a language",
    "The weather in spring", "An important invention", "Her first novel", "The function returns", "Plants need light",
    "The city council", "If you want to", "The moon and the", "Most birds can", "He opened the door",
    "Music has always", "The price of bread", "Children often ask", "The law requires", "Last summer we",
    "A computer stores", "The painting shows",
)  # fmt: skip
# Openings of texts for rewards; none of them begins like one of OPENINGS.
REWARD_OPENINGS = tuple(
    f"{beginning} {topic}"
    for topic in (
        "rivers", "taxes", "old houses", "the stars", "bread", "football", "a famous queen", "engines", "winter",
        "small towns", "the brain", "trains", "paper", "insects", "the theatre", "friendship",
    )
    for beginning in (
        "What we know about", "An essay on", "Some notes on", "Yesterday I read about", "There are many stories about",
        "This chapter is about", "Nobody wrote more about", "Ten questions about",
    )
)  # fmt: skip


@dataclass(frozen=True)
class SelfDrift:
    """The effect of editing on the LLM's predictions of its own earlier text.

    Attributes:
        perplexity: of the text, exp(mean −log p) over its tokens, under the current weights.
        original_perplexity: the same under the pre-trained weights.
        kl: mean KL(p_θ₀ ‖ p_θ) of the next token, over the text's positions, in nats.
    """

    perplexity: float
    original_perplexity: float
    kl: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@torch.no_grad()
def self_text(
    lm: EditableLM, openings: Sequence[str] = OPENINGS, tokens: int = 64, seed: int = 0
) -> list[Passage]:
    """Continuations of openings, sampled from the pre-trained LLM whatever its current weights.

    Args:
        lm: the LLM.
        openings: texts to continue; each gives a passage.
        tokens: most tokens of a continuation; the LLM may end it earlier.
        seed: seed of the sampling; torch's own random state is not changed.
    """
    rows = [lm.encode(text) for text in openings]
    devices = [lm.device] if lm.device.type == "cuda" else []
    passages = []
    with torch.random.fork_rng(devices=devices), lm.original_weights():
        torch.manual_seed(seed)
        for members in lm.decoded_together(rows):
            output = lm.decode([rows[i] for i in members], tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
            for i, continuation in zip(members, output.tolist(), strict=True):
                written = until_end(lm, continuation)
                if written:
                    passages.append(Passage(tuple(rows[i] + written[:-1]), tuple(written)))
    if not passages:
        raise ValueError(f"{lm.name or 'the model'} continues none of the {len(rows)} openings; give others")
    return passages


def until_end(lm: EditableLM, written: Sequence[int]) -> list[int]:
    """Generated token ids before the token with which the LLM ended the text, if there is one."""
    configured = getattr(lm.model.generation_config, "eos_token_id", None)
    ends = {lm.tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    first = next((i for i, token in enumerate(written) if token in ends), len(written))
    return list(written[:first])


@torch.no_grad()
def self_drift(lm: EditableLM, passages: Sequence[Passage]) -> SelfDrift:
    """Perplexity of the passages, and the divergence from the pre-trained LLM on them, at the current weights."""
    reference = torch.cat(lm.reference_states(passages))  # (P, d)
    states = lm.answer_states(passages)
    now, before = (
        float(negative_log_likelihood(lm.forward, hidden, states.targets).mean())
        for hidden in (states.hidden, reference)
    )
    kl = float(kl_divergence(lm.forward, states.hidden, reference).mean())
    return SelfDrift(_exp(now), _exp(before), kl)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
