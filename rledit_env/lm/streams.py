"""Several environments' edited weights over one frozen model, and one pass that serves them all.

A pass takes rows of many passages. All rows meet the frozen weights together; at an edited module, each environment's
rows meet its own weight (`rledit_env.lm.routing`). Cached prefixes and θ₀'s states do not depend on the edits, so they
are shared.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from rledit_env.delegation import AttributeOf
from rledit_env.lm.decoding import Decoder
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.gradients import Gradients
from rledit_env.lm.passes import Passes
from rledit_env.lm.routing import BesideModules
from rledit_env.lm.weights import EditedWeights


class StreamLM(EditableLM):
    """An `EditableLM` composed of edited weights of its own and what another one has beside these: the frozen model,
    the tokenizer and the caches.

    What it adds in memory is its edited weights: a master copy in float32 and, where the model runs in less, the copy
    that it runs with (:attr:`nbytes`). It begins with the pre-trained weights and leaves ``shared``'s own alone.

    Args:
        shared: whose frozen weights, tokenizer and caches are used.
        sets: the sets of edited weights that its passes serve, its own first; None for a new one.
    """

    nbytes = AttributeOf[int]("weights")

    def __init__(self, shared: EditableLM, sets: Sequence[EditedWeights] | None = None) -> None:
        self.model, self.tokenizer, self.tokens = shared.model, shared.tokenizer, shared.tokens
        self.name, self.revision = shared.name, shared.revision
        self._changes = []  # the model is not its own to give back
        sets = [shared.weights.beside()] if sets is None else sets
        caches = shared.prefix_cache, shared.reference_cache
        self.text_cache = shared.text_cache
        self.weights = sets[0]
        self.passes = Passes(shared.forward, BesideModules(sets), shared.max_tokens_per_pass, *caches)
        self.gradients = Gradients(self.passes, self.weights, shared.gradients.overwritten)
        self.decoder = Decoder(self.passes, self.tokens)

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamLM:
        """Another one with the same edited weights, its own, over what this one shares."""
        other = memo[id(self)] = StreamLM(self)
        other.prefix_cache = copy.deepcopy(self.prefix_cache, memo)
        other.reference_cache = copy.deepcopy(self.reference_cache, memo)
        other.restore(self.snapshot())
        return other


def together(streams: Sequence[StreamLM]) -> EditableLM:
    """The LMs as one, to be given to :meth:`EditableLM.trace_batches` and `rledit_env.scoring.score_streams`.

    Their s-th batch or request then meets the weights of ``streams[s]``. Nothing is copied.

    Raises:
        ValueError: there are none, or they are not of one frozen model.
    """
    if len({id(stream.model) for stream in streams}) != 1:
        raise ValueError(f"the {len(streams)} streams share no frozen model; make them from one EditableLM")
    return StreamLM(streams[0], [stream.weights for stream in streams])
