"""From updates to weights: what a ledger's entries, one after another, lead to, and how they are taken back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rledit_env.ledger.format import Entry, weights_hash
from rledit_env.lm.editable import EditableLM
from rledit_env.updates import Dense, RankOne, Update


def change_norm(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """√(Σ ‖W′ − W‖_F²) over the modules."""
    return float(torch.stack([(after[n] - before[n]).norm().double() for n in before]).norm())


def original_weights(lm: EditableLM) -> dict[str, Tensor]:
    """W₀ of every edited module, (d_out, d_in)."""
    return {module: lm.original_weight(module) for module in lm.module_shapes}


class Replay:
    """An LLM's weights as a ledger's entries are followed, from W₀ on; the LLM is left as it is.

    Attributes:
        original: W₀ by module.
        before: the weights before the last entry that was not a rollback.
        weights: the weights after the last entry.
    """

    def __init__(self, lm: EditableLM) -> None:
        self.original: Mapping[str, Tensor] = original_weights(lm)
        self.before = self.weights = self.original

    def follow(self, entry: Entry) -> bool:
        """Go on to the weights after the next entry; returns whether they are those that it recorded."""
        if entry.kind == "rollback":
            self.weights = self.before
        else:
            self.before, self.weights = self.weights, entry.update.updated(self.weights, self.original)
        return weights_hash(self.weights) == entry.weights_after


def reverse(updates: Sequence[Update], change: Mapping[str, Tensor]) -> Update:
    """The update that takes updates back: as factors where all of them were and that is smaller, else as one matrix.

    Args:
        updates: what is taken back.
        change: module → what they changed in all, (d_out, d_in).
    """
    factors = [update for update in updates if isinstance(update, RankOne)]
    if updates and len(factors) == len(updates):
        keys = {m: torch.cat([update.keys[m] for update in factors]) for m in factors[0].keys}
        values = {m: -torch.cat([update.values[m] for update in factors]) for m in factors[0].values}
        if sum(t.numel() for t in (*keys.values(), *values.values())) < sum(t.numel() for t in change.values()):
            return RankOne(keys, values)
    return Dense({m: -t for m, t in change.items()})
