"""Moments of training facts: normalised editors start from them, so that they can edit a single fact.

Hypernetworks and UltraEdit normalise [u; δ] with running moments. Moments that start empty add the stream's first batch
and subtract its mean, which leaves little of few facts and nothing of one. Here they start from facts that are not to
be edited: those that an agent was trained on (`RLEditAgent.gather_moments`), or bundled ones
(:func:`training_moments`), for any model and without training.

``python -m agents.running.add_moments FOLDER`` adds the moments to a saved agent that has none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from agents.base import Agent
from agents.key_statistics import cached_tensors, digest, fingerprint, keep_tensors
from agents.rledit.hypernetwork import Hypernetwork
from agents.rledit.normaliser import RunningNormaliser, moments_from, moments_state
from agents.rledit.whitening import WhiteningNormaliser
from rledit_env.knowledge import EditRecord, load_knowledge
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.loading.registry import cache_dir


class MissingMomentsWarning(UserWarning):
    """A saved agent has no moments of training facts, because an earlier version wrote it."""


Moments = dict[str, RunningNormaliser]  # module → moments of [u; N δ], (d_in + d_out,)
FACTS = 100  # number of bundled facts in the moments
WHITENING_FACTS = 400  # a covariance needs more rows than it has columns
BATCH = 20  # facts a forward pass
KIND = "counterfact"  # the bundled data set


def take(
    moments: Moments, keys: Mapping[str, Tensor], gradients: Mapping[str, Tensor],
    names: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Add a batch of facts to the moments.

    Args:
        moments: the moments so far; modules they lack are added.
        keys: module → u (N, d_in).
        gradients: module → δ (N, d_out), of the batch's mean loss.
        names: `Hypernetwork.whitened_names`. If given, the moments are by these names, with covariances.
    """
    for module, u in keys.items():
        rows = torch.cat([u, len(u) * gradients[module]], dim=1)
        name = module if names is None else names[module]
        if name not in moments:
            moments[name] = _no_rows(u.shape[1], gradients[module].shape[1], rows.device, names is not None)
        moments[name].update(rows)


def _no_rows(d_in: int, d_out: int, device: torch.device, whitened: bool) -> RunningNormaliser:
    return WhiteningNormaliser(d_in, d_out, device) if whitened else RunningNormaliser(d_in + d_out, device)


def training_moments(
    lm: EditableLM, token: str = "answer", facts: int = FACTS, cache: Path | None = None,
    names: Mapping[str, str] | None = None,
) -> Moments:  # fmt: skip
    """Moments of bundled training facts under the pre-trained weights, from the cache if they are there.

    Otherwise the facts take one forward and backward pass of the model, some seconds for a small one.

    Args:
        lm: the LLM, edited or not; it is not changed.
        token: the positions that the editor sees, as in :class:`~rledit_env.env.LifelongEditEnv`.
        facts: the number of facts, spread evenly over the bundled training facts.
        cache: a folder to use instead of the package's cache.
        names: as for :func:`take`.
    """
    records = load_knowledge(KIND, split="train").records
    chosen = records[:: max(1, len(records) // facts)][:facts]
    texts = hashlib.sha256(json.dumps([[r.prompt, r.target, r.subject] for r in chosen]).encode()).hexdigest()
    with lm.original_weights():
        what = [fingerprint(lm), sorted(lm.module_shapes), token, texts]
        name = digest(*what) if names is None else digest(*what, sorted(names.items()))
        path = (cache_dir() if cache is None else cache) / "moments" / f"{name}.safetensors"
        tensors = cached_tensors(path)
        if tensors:
            by_name = {m if names is None else names[m]: shape for m, shape in lm.module_shapes.items()}
            empty = {n: _no_rows(*shape, lm.device, names is not None) for n, shape in by_name.items()}
            return moments_from(tensors, "", empty)
        moments = _gathered(lm, chosen, token, names)
        keep_tensors(path, moments_state(moments))
    return moments


def start_warm(agent: Agent, lm: EditableLM, token: str) -> bool:
    """Give an agent whose moments start empty with each stream the moments of bundled training facts.

    Agents that have moments of training facts already, and those that normalise nothing, stay as they are.

    Args:
        agent: the agent, before it edits; it is reset.
        lm: the LLM that it edits.
        token: the positions that it sees.

    Returns:
        Whether the agent got these moments.
    """
    network = getattr(agent, "network", None)
    if not isinstance(network, Hypernetwork) or not network.config.by_stream or network.training_moments:
        return False
    if network.config.loss in ("fact", "sum"):  # bundled moments are of the gradients of the batch's loss
        return False
    names = network.whitened_names
    facts = FACTS if names is None else WHITENING_FACTS
    network.start_from(training_moments(lm, token, facts, names=names))
    return True


def _gathered(
    lm: EditableLM, records: Sequence[EditRecord], token: str, names: Mapping[str, str] | None
) -> Moments:
    moments: Moments = {}
    for start in range(0, len(records), BATCH):
        passages = [lm.tokenize(r.prompt, r.target, r.subject_span, r.origin) for r in records[start : start + BATCH]]
        trace = lm.trace(passages, token)
        take(moments, trace.keys, trace.value_gradients, names)
    return moments
