"""From updates to weights: applies a ledger's entries one after another, and reverses them."""

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
    """Applies a ledger's entries to a copy of W₀, one after another; the LLM itself is not changed.

    Attributes:
        original: W₀ by module.
        before: the weights before the last entry that was not a rollback.
        weights: the weights after the last entry.
    """

    def __init__(self, lm: EditableLM) -> None:
        self.original: Mapping[str, Tensor] = original_weights(lm)
        self.before = self.weights = self.original

    def follow(self, entry: Entry) -> bool:
        """Apply the next entry; returns whether the weights are then those that it recorded."""
        if entry.kind == "rollback":
            self.weights = self.before
        else:
            self.before, self.weights = self.weights, entry.update.updated(self.weights, self.original)
        return weights_hash(self.weights) == entry.weights_after


def reverse(updates: Sequence[Update], change: Mapping[str, Tensor]) -> Update:
    """The update that takes others back: as factors if all of them are factors and that is smaller, else dense.

    Args:
        updates: the updates to take back.
        change: module → the sum of their changes, (d_out, d_in).
    """
    factors = [update for update in updates if isinstance(update, RankOne)]
    if updates and len(factors) == len(updates):
        keys = {m: torch.cat([update.keys[m] for update in factors]) for m in factors[0].keys}
        values = {m: -torch.cat([update.values[m] for update in factors]) for m in factors[0].values}
        if sum(t.numel() for t in (*keys.values(), *values.values())) < sum(t.numel() for t in change.values()):
            return RankOne(keys, values)
    return Dense({m: -t for m, t in change.items()})
