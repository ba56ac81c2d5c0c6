"""The weights after an update, and after a ledger's entries one after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rledit_env.ledger.format import Entry, Update, weights_hash
from rledit_env.lm.editable import EditableLM


@torch.no_grad()
def updated(weights: Mapping[str, Tensor], original: Mapping[str, Tensor], update: Update) -> dict[str, Tensor]:
    """The weights (d_out, d_in) after an update: W + ṽᵀũ, W + ΔW, or W₀ + ΔW; new tensors where anything changes.

    The result does not depend on the tensors' memory layout: equal numbers give equal bits.
    """

    def placed(tensor: Tensor) -> Tensor:  # a product's last bits depend on its factors' strides and alignment
        return tensor.detach().clone(memory_format=torch.contiguous_format)

    after = dict(weights)
    for name, weight in weights.items():
        if name in update.get("keys", {}):
            values, keys = (placed(update[part][name].to(weight)) for part in ("values", "keys"))
            after[name] = torch.addmm(weight, values.t(), keys)
        elif name in update.get("updates", {}):
            after[name] = weight + update["updates"][name].to(weight)
        elif name in update.get("accumulated", {}):
            after[name] = original[name] + update["accumulated"][name].to(weight)
    return after


def change_norm(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """√(Σ ‖W′ − W‖_F²) over the modules."""
    return float(torch.stack([(after[n] - before[n]).norm().double() for n in before]).norm())

def original_weights(lm: EditableLM) -> dict[str, Tensor]:
    """W₀ of every edited module, (d_out, d_in)."""
    return {module: lm.original_weight(module) for module in lm.module_shapes}


def on_device(update: Update, device: torch.device) -> dict[str, dict[str, Tensor]]:
    """The same update with its tensors on a device."""
    return {part: {m: t.to(device) for m, t in by_module.items()} for part, by_module in update.items()}


class Replay:
    """Follows a ledger's entries from W₀ on and keeps the weights after them; the LLM itself is not changed.

    Attributes:
        original: W₀ by module.
        before: the weights before the last entry that was not a rollback.
        weights: the weights after the last entry.
    """

    def __init__(self, lm: EditableLM) -> None:
        self.device = lm.device
        self.original: Mapping[str, Tensor] = original_weights(lm)
        self.before = self.weights = self.original

    def follow(self, entry: Entry) -> bool:
        """Take the next entry; returns whether the weights are then those that it recorded."""
        if entry.kind == "rollback":
            self.weights = self.before
        else:
            update = on_device(entry.update, self.device)
            self.before, self.weights = self.weights, updated(self.weights, self.original, update)
        return weights_hash(self.weights) == entry.weights_after


def reverse(updates: Sequence[Update], change: Mapping[str, Tensor]) -> Update:
    """The update that takes others back: in factors if all of them are factors and that is smaller, else dense.

    Args:
        updates: those that are taken back.
        change: module → the sum of their changes, (d_out, d_in).
    """
    if updates and all("keys" in update for update in updates):
        keys = {m: torch.cat([update["keys"][m] for update in updates]) for m in updates[0]["keys"]}
        values = {m: -torch.cat([update["values"][m] for update in updates]) for m in updates[0]["values"]}
        if sum(t.numel() for t in (*keys.values(), *values.values())) < sum(t.numel() for t in change.values()):
            return {"keys": keys, "values": values}
    return {"updates": {m: -t for m, t in change.items()}}
