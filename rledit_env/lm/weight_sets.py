"""Several environments' edited weights over one frozen model, and forward passes that serve them all.

A pass runs passages of many environments. Frozen weights multiply all tokens at once; an edited module multiplies each
environment's tokens by that environment's weight (`rledit_env.lm.routing`). Cached prefix states and the unedited
model's states do not depend on the edits, so they are shared.
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


class WeightSetLM(EditableLM):
    """An `EditableLM` with its own edited weights, over another one's frozen model, tokenizer and caches.

    It takes memory only for its edited weights (:attr:`nbytes`): a master copy in float32 and, where the model runs in
    a lower precision, the copy that it runs with. It begins with the pre-trained weights and does not change the edited
    weights of ``shared``.

    Args:
        shared: the LM whose frozen model, tokenizer and caches are used.
        sets: the sets of edited weights that its passes serve, its own first; None means one new set.
    """

    nbytes = AttributeOf[int]("weights")

    def __init__(self, shared: EditableLM, sets: Sequence[EditedWeights] | None = None) -> None:
        self.model, self.tokenizer, self.tokens = shared.model, shared.tokenizer, shared.tokens
        self.name, self.revision = shared.name, shared.revision
        self._changes = []  # ``shared`` undoes its changes of the model
        sets = [shared.weights.beside()] if sets is None else sets
        caches = shared.prefix_cache, shared.reference_cache
        self.text_cache = shared.text_cache
        self.weights = sets[0]
        self.passes = Passes(shared.forward, BesideModules(sets), shared.max_tokens_per_pass, *caches)
        self.gradients = Gradients(self.passes, self.weights, shared.gradients.overwritten)
        self.decoder = Decoder(self.passes, self.tokens)

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightSetLM:
        """An LM with a copy of the edited weights, over the same frozen model and tokenizer."""
        other = memo[id(self)] = WeightSetLM(self)
        other.prefix_cache = copy.deepcopy(self.prefix_cache, memo)
        other.reference_cache = copy.deepcopy(self.reference_cache, memo)
        other.restore(self.snapshot())
        return other


def together(lms: Sequence[WeightSetLM]) -> EditableLM:
    """One LM with the edited weights of all the LMs, whose passes serve them together. Nothing is copied.

    :meth:`EditableLM.trace_batches` and `rledit_env.scoring.score_environments` then use the weights of ``lms[s]`` for
    batch or request s.

    Raises:
        ValueError: there are no LMs, or they do not share one frozen model.
    """
    if len({id(lm.model) for lm in lms}) != 1:
        raise ValueError(f"the {len(lms)} LMs share no frozen model; make them from one EditableLM")
    return WeightSetLM(lms[0], [lm.weights for lm in lms])
