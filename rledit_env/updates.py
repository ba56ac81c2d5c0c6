"""The three kinds of weight update; each can apply, measure and serialise itself."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from rledit_env.lm.editable import EditableLM

Penalty = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]  # differentiable, of factors ũ and ṽ by module
Parts = dict[str, dict[str, Tensor]]  # part → module → tensor, as in an action or its gradient
SameKind = TypeVar("SameKind", bound="Update")


def frobenius_penalty(keys: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Tensor:
    """Σ_modules ‖ΔW‖_F² of ΔW = ṽᵀũ, from the factors' Gram matrices (no dense matrix)."""
    return torch.stack([((keys[m] @ keys[m].T) * (values[m] @ values[m].T)).sum() for m in keys]).sum()


class Update(ABC):
    """A change of edited weights. It is immutable, and nothing writes to its tensors.

    Attributes:
        PARTS: the names of its parts, each a field with tensors by module. They are the keys of the action for this
            update (see `rledit_env.env.LifelongEditEnv`).
    """

    PARTS: ClassVar[tuple[str, ...]]

    def parts(self) -> Parts:
        """Its tensors by part and module, as in an action."""
        return {part: dict(getattr(self, part)) for part in self.PARTS}

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by "part.module", as in a ledger's entry; :func:`from_tensors` reads them."""
        return {f"{part}.{module}": t for part, by_module in self.parts().items() for module, t in by_module.items()}

    def map(self: SameKind, function: Callable[[Tensor], Tensor]) -> SameKind:
        """The update with a function applied to each of its tensors, in order."""
        return replace(self, **{  # type: ignore[type-var]  # each kind is a dataclass
            part: {m: function(t) for m, t in by_module.items()} for part, by_module in self.parts().items()
        })  # fmt: skip

    def misfit(self, shapes: Mapping[str, tuple[int, int]]) -> str | None:
        """A description of a part that does not fit modules of these shapes (d_in, d_out); None if all parts fit.

        Raises:
            KeyError: the update is of other modules.
        """
        for part, by_module in self.parts().items():
            for m, tensor in by_module.items():
                if tuple(tensor.shape) != self._shape(part, *shapes[m]) or not tensor.is_floating_point():
                    return f"{part} of {m} has shape {tuple(tensor.shape)}"
        return None

    def _shape(self, part: str, d_in: int, d_out: int) -> tuple[int, int]:
        """Shape of a part's tensor for a module."""
        return d_out, d_in

    @abstractmethod
    def apply(self: SameKind, lm: EditableLM) -> tuple[SameKind, Callable[[], None]]:
        """Change an LLM's weights; if that fails, none has changed.

        Returns:
            The update as :meth:`made`, and a function that undoes it as long as no other change came after it.
        """

    def made(self: SameKind, lm: EditableLM, before: Mapping[str, Tensor]) -> SameKind:
        """The update after it was applied, with what :meth:`penalty` needs to know of the change that it made.

        Args:
            lm: the LLM, with the weights after the update.
            before: module → the weights before the update.
        """
        return self

    @abstractmethod
    def updated(self, weights: Mapping[str, Tensor], original: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights (d_out, d_in) after applying it to ``weights``, given W₀; new tensors where anything changes.

        The same numbers give the same bits, whatever their memory addresses and strides.
        """

    @abstractmethod
    def penalty(self, penalty: Penalty) -> Tensor:
        """A penalty of the change ΔW, written as factors; differentiable with respect to the parts."""

    @torch.no_grad()
    def norm(self, lm: EditableLM) -> float:
        """√(Σ_modules ‖ΔW‖_F²) of the change that it would make to the LLM's present weights."""
        return math.sqrt(max(float(self.penalty(frobenius_penalty)), 0.0))

    def penalty_gradient(self, penalty: Penalty, weight: float) -> tuple[float, Parts]:
        """``weight`` · :meth:`penalty`, and its gradient with respect to the parts (for a `Replacement`, to ΔW)."""
        leaves = self.map(lambda t: t.detach().requires_grad_())
        with torch.enable_grad():
            cost = weight * leaves.penalty(penalty)
        flat = list(leaves.tensors().values())
        pieces = iter(torch.autograd.grad(cost, flat, allow_unused=True, materialize_grads=True) if flat else ())
        return float(cost.detach()), leaves.map(lambda _: next(pieces)).parts()


@dataclass(frozen=True, eq=False)
class RankOne(Update):
    """Rank-1 factors: W + ΔW with ΔW = ṽᵀũ.

    Attributes:
        keys: module → ũ (N, d_in).
        values: module → ṽ (N, d_out).
    """

    PARTS = "keys", "values"
    keys: Mapping[str, Tensor]
    values: Mapping[str, Tensor]

    def misfit(self, shapes: Mapping[str, tuple[int, int]]) -> str | None:
        mismatch = "keys and values are of different modules" if set(self.keys) != set(self.values) else None
        return super().misfit(shapes) or mismatch

    def _shape(self, part: str, d_in: int, d_out: int) -> tuple[int, int]:
        return len(next(iter(self.keys.values()))), d_in if part == "keys" else d_out

    def apply(self, lm: EditableLM) -> tuple[RankOne, Callable[[], None]]:
        return self, lm.apply(self.keys, self.values)

    @torch.no_grad()
    def updated(self, weights: Mapping[str, Tensor], original: Mapping[str, Tensor]) -> dict[str, Tensor]:
        def contiguous(tensor: Tensor) -> Tensor:  # strides and alignment change a product's last bits
            return tensor.detach().clone(memory_format=torch.contiguous_format)

        after = dict(weights)
        for m in filter(self.keys.__contains__, weights):
            values, keys = contiguous(self.values[m].to(weights[m])), contiguous(self.keys[m].to(weights[m]))
            after[m] = torch.addmm(weights[m], values.t(), keys)
        return after

    def penalty(self, penalty: Penalty) -> Tensor:
        return penalty(self.keys, self.values)


@dataclass(frozen=True, eq=False)
class Dense(Update):
    """Dense changes of any rank: W + ΔW. Modules that are left out stay as they are.

    Attributes:
        updates: module → ΔW (d_out, d_in).
    """

    PARTS = ("updates",)
    updates: Mapping[str, Tensor]

    def apply(self, lm: EditableLM) -> tuple[Dense, Callable[[], None]]:
        return self, lm.add(self.updates)

    @torch.no_grad()
    def updated(self, weights: Mapping[str, Tensor], original: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {m: w + self.updates[m].to(w) if m in self.updates else w for m, w in weights.items()}

    def penalty(self, penalty: Penalty) -> Tensor:
        """ΔW is written as factors ũ = I and ṽ = ΔWᵀ."""
        changes = self.updates
        if not changes:
            return torch.zeros(())
        if penalty is frobenius_penalty:  # ‖ΔW‖_F² needs no identity
            return torch.stack([change.square().sum() for change in changes.values()]).sum()
        identities = {m: torch.eye(c.shape[1], dtype=c.dtype, device=c.device) for m, c in changes.items()}
        return penalty(identities, {m: c.T for m, c in changes.items()})


@dataclass(frozen=True, eq=False)
class Replacement(Update):
    """Replaces all changes since `reset`: W₀ + A. Modules that are left out stay as they are.

    Attributes:
        accumulated: module → A (d_out, d_in).
        change: the change ΔW that it made; None before it is applied.
    """

    PARTS = ("accumulated",)
    accumulated: Mapping[str, Tensor]
    change: Dense | None = None

    def apply(self, lm: EditableLM) -> tuple[Replacement, Callable[[], None]]:
        before = lm.snapshot()
        try:
            lm.replace(self.accumulated)
            return self.made(lm, before), partial(lm.restore, before)
        except BaseException:  # such as Ctrl-C
            lm.restore(before)
            raise

    def made(self, lm: EditableLM, before: Mapping[str, Tensor]) -> Replacement:
        return replace(self, change=Dense({m: lm.weight(m) - before[m] for m in self.accumulated}))

    @torch.no_grad()
    def updated(self, weights: Mapping[str, Tensor], original: Mapping[str, Tensor]) -> dict[str, Tensor]:
        changes = self.accumulated
        return {m: original[m] + changes[m].to(w) if m in changes else w for m, w in weights.items()}

    def penalty(self, penalty: Penalty) -> Tensor:
        assert self.change is not None, "what it changes depends on the weights: apply it first"
        return self.change.penalty(penalty)

    def norm(self, lm: EditableLM) -> float:
        added = {m: a - (lm.weight(m) - lm.original_weight(m)) for m, a in self.accumulated.items()}
        return Dense(added).norm(lm)

    def penalty_gradient(self, penalty: Penalty, weight: float) -> tuple[float, Parts]:
        assert self.change is not None, "what it changes depends on the weights: apply it first"
        cost, gradient = self.change.penalty_gradient(penalty, weight)
        return cost, {"accumulated": gradient["updates"]}


NOTHING = Dense({})  # the update that changes no weight


def from_tensors(tensors: Mapping[str, Tensor]) -> Update:
    """The update with these :meth:`Update.tensors`; `NOTHING` where there are none.

    Raises:
        ValueError: they are not the tensors of an update.
    """
    parts: Parts = {}
    for name, tensor in tensors.items():
        part, module = name.split(".", 1)
        parts.setdefault(part, {})[module] = tensor
    kinds: tuple[type[Update], ...] = (RankOne, Dense, Replacement)
    for kind in kinds:
        if set(parts) == set(kind.PARTS):
            return kind(**parts)
    if parts:
        raise ValueError(f"it holds {sorted(parts)}")
    return NOTHING
