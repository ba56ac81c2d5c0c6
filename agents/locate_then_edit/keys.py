"""Keys of facts, the modules' inputs at their subjects, and the contexts that are put before prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from agents.key_statistics import sample_continuations
from agents.locate_then_edit.value_optimisation import Request
from rledit_env.lm.continued import subject_states
from rledit_env.lm.editable import EditableLM

CONTEXT_WORDS = ("The", "Therefore", "Because", "I", "You")


def write_contexts(lm: EditableLM, count: int, lengths: Sequence[int], seed: int) -> list[str]:
    """Short texts that the pre-trained LLM writes, to be put before prompts; the same for the same seed.

    They begin with the five words of the published code, in turn. (ROME's first code began with the end-of-text token.)

    Args:
        lm: the LLM.
        count: the number of texts.
        lengths: tokens of a text, its first word included; each length gets an equal share of the texts, the first ones
            get one more where ``count`` is no multiple.
        seed: of the sampling.
    """
    if count == 0:
        return []
    rows = [lm.encode(word) for word in CONTEXT_WORDS]
    shortest = min(map(len, rows))
    generator = torch.Generator().manual_seed(seed)
    texts: list[str] = []
    for place, length in enumerate(lengths):
        share = count // len(lengths) + (place < count % len(lengths))
        if share == 0:
            continue
        starts = torch.tensor([rows[i % len(rows)][:shortest] for i in range(share)])
        with lm.original_weights():
            # Sampled from the five likeliest tokens, as in the published code, for ordinary texts.
            ids = sample_continuations(lm, starts, max(length - shortest, 0), generator, top_k=5)
        texts += lm.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts]


def subject_keys(
    lm: EditableLM,
    modules: Sequence[str],
    requests: Sequence[Request],
    kind: str,
    updates: dict[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Each fact's key, (F, d_in) by module, and the states (F, d) after the last module's layer, at the subject of the
    plain prompt.

    Args:
        lm: the LLM at its current weights.
        modules: in the layers' order.
        requests: the facts.
        kind: "balanced", "mean" or "prompt", see `LocateConfig.key`.
        updates: ΔW (d_out, d_in) by module that are added to the weights.
    """
    if kind == "prompt":
        requests = [replace(request, rewrites=request.rewrites[:1]) for request in requests]
    passages = [p for request in requests for p in request.rewrites]
    counts = torch.tensor([len(request.rewrites) for request in requests])
    states = subject_states(lm, modules, passages, updates)
    pieces = counts.tolist()
    keys = {m: torch.stack([averaged(part, kind) for part in k.split(pieces)]) for m, k in states.keys.items()}
    return keys, states.hidden[(counts.cumsum(0) - counts).to(states.hidden.device)]


def averaged(keys: Tensor, kind: str) -> Tensor:
    """One key (d_in,) from the plain prompt's, k₀, and those with C contexts before it: (1 + C, d_in).

    ``kind`` "balanced": ½ k₀ + ½ mean(k₁ … k_C), or k₀ where there is no context; "mean", "prompt": the mean of all.
    """
    if kind == "balanced" and len(keys) > 1:
        return (keys[0] + keys[1:].mean(0)) / 2
    return keys.mean(0)
