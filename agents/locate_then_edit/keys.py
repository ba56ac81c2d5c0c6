"""Keys of facts, the modules' inputs at the subjects, and the contexts that precede prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from agents.corpus import sample_continuations
from agents.locate_then_edit.value_optimisation import Request
from rledit_env.lm.continued import subject_states
from rledit_env.lm.editable import EditableLM

CONTEXT_WORDS = ("The", "Therefore", "Because", "I", "You")


def write_contexts(lm: EditableLM, count: int, lengths: Sequence[int], seed: int) -> list[str]:
    """Short texts that the pre-trained LLM writes, to precede prompts; the same for the same seed.

    They begin with the five words of the published code, in turn. (ROME's first code began with the end-of-text token.)

    Args:
        lm: the LLM.
        count: the number of texts.
        lengths: numbers of tokens of a text, its first word included; the texts are divided equally among the lengths,
            and the first lengths get one more text each if ``count`` is not a multiple.
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
            # From the five likeliest tokens, as in the published code, which gives ordinary texts.
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
        modules: the modules in the layers' order.
        requests: the facts.
        kind: "balanced", "mean" or "prompt", see `LocateConfig.key`.
        updates: module → ΔW (d_out, d_in) to add to the weights.
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
    """One key (d_in,) from (1 + C, d_in): the plain prompt's key k₀, and the keys k₁ … k_C after C contexts.

    ``kind`` "balanced": ½ k₀ + ½ mean(k₁ … k_C), or k₀ if there is no context; "mean", "prompt": the mean of all.
    """
    if kind == "balanced" and len(keys) > 1:
        return (keys[0] + keys[1:].mean(0)) / 2
    return keys.mean(0)
