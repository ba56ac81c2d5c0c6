"""The edited weights of a model, and every way in which they change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pickle import PicklingError
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rledit_env.lm.forward import at_least_float32


class NotFiniteError(ValueError):
    """An update has the right form, but holds a number that is not finite."""


class EditedWeights:
    """The one owner of the edited weights.

    They are kept in float32 whatever precision the model runs in (in float64 for a float64 model); the model's own copy
    is refreshed from them after every update.

    Args:
        modules: the edited linear modules (``nn.Linear`` or GPT-2's ``Conv1D``) by name.

    Attributes:
        module_shapes: module → (d_in, d_out).
        holder: the environment whose episode the weights are those of; None before any.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.holder: ref[Any] | None = None
        self._modules: dict[str, Any] = dict(modules)
        self.module_shapes: dict[str, tuple[int, int]] = {}
        for n, module in self._modules.items():
            if module.weight.is_meta:
                raise ValueError(
                    f"the weight of {n} is offloaded to the host or the disk, where it cannot be edited; give a device "
                    "map that keeps the layers of edit_modules on a device"
                )
            d_out, d_in = self._oriented(module).shape
            self.module_shapes[n] = (d_in, d_out)
        self._take_masters()
        self._take_originals({n: m.weight.detach().clone() for n, m in self._modules.items()})
        self._norms = {n: float(w.norm()) for n, w in self._original.items()}

    def _take_masters(self) -> None:
        """Edit the modules' own tensors, or copies where their precision is not enough."""
        self._master = {n: at_least_float32(self._oriented(m).detach()) for n, m in self._modules.items()}

    def _take_originals(self, run: dict[str, Tensor]) -> None:
        """Let these, as the modules hold them, be the pre-trained weights."""
        self._original_run = run
        self._original = {  # the same tensor where the model's precision is enough
            n: at_least_float32(w.t() if isinstance(self._modules[n], Conv1D) else w) for n, w in run.items()
        }

    def leave_originals(self) -> None:
        """Edit copies from now on: the tensors that the modules came with become the pre-trained weights, which are
        never written."""
        given = {n: module.weight.data for n, module in self._modules.items()}
        for n, module in self._modules.items():
            module.weight.data = self._original_run[n]
        self._take_originals(given)
        self._take_masters()

    @property
    def device(self) -> torch.device:
        """Where updates are expected."""
        return next(iter(self._master.values())).device

    @property
    def edit_dtype(self) -> torch.dtype:
        """Precision of the edited weights and of updates: float32, or float64 for a float64 model."""
        return next(iter(self._master.values())).dtype

    @staticmethod
    def _oriented(module: Any) -> Tensor:
        """The module's weight as (d_out, d_in); a view."""
        return module.weight.t() if isinstance(module, Conv1D) else module.weight

    def weight(self, name: str) -> Tensor:
        """The edited weight W_t (d_out, d_in), float32; not a copy: read only."""
        return self._master[name]

    def original_weight(self, name: str) -> Tensor:
        """The pre-trained weight W₀ (d_out, d_in), float32; not a copy: read only."""
        return self._original[name]

    def apply(self, keys: Mapping[str, Tensor], values: Mapping[str, Tensor], sparing: bool = True) -> Undo:
        """Add ΔW = ṽᵀũ to each weight, from factors ũ (N, d_in) and ṽ (N, d_out).

        ``sparing``: whether what takes it back spares memory; a copy of the weights takes half the time.

        Returns:
            What takes it back, as long as no other change came after.

        Raises:
            RuntimeError: factors do not fit a weight; none has changed.
        """
        like = next(iter(self._master.values()))
        updates = {n: partial(_product, values[n].to(like), keys[n].to(like)) for n in self._modules}
        return self._add(updates, sparing)

    def add(self, updates: Mapping[str, Any], sparing: bool = True) -> Undo:
        """Add dense updates ΔW (d_out, d_in) to the modules named; the others stay as they are.

        ``sparing``: as for :meth:`apply`.

        Returns:
            What takes it back, as long as no other change came after.

        Raises:
            ValueError: as :meth:`matrices`; no weight has changed.
        """
        return self._add({n: partial(_same, u) for n, u in self.matrices(updates, "updates").items()}, sparing)

    @torch.no_grad()
    def _add(self, updates: Mapping[str, Callable[[], Tensor]], sparing: bool) -> Undo:
        changes: dict[str, _Change] = {}
        try:
            for name, update in updates.items():
                changes[name] = _Change.made(self._master[name], update, sparing)
                self._refresh(name, self._modules[name])
        except BaseException:  # such as Ctrl-C, or a device without memory for the next one
            self._take_back(changes)
            raise
        return Undo(self, changes)

    @torch.no_grad()
    def replace(self, accumulated: Mapping[str, Any]) -> None:
        """Make W = W₀ + A for the modules named, from accumulated changes A (d_out, d_in); the others stay as they are.

        Raises:
            ValueError: as :meth:`matrices`; no weight has changed.
        """
        for name, change in self.matrices(accumulated, "accumulated").items():
            self._master[name].copy_(self._original[name]).add_(change.to(self._master[name]))
            self._refresh(name, self._modules[name])

    def matrices(self, given: Any, place: str) -> dict[str, Tensor]:
        """Dense matrices for edited modules, as tensors (d_out, d_in) on the LLM's device in the edited weights'
        precision.

        Args:
            given: arrays or tensors by module; modules may be left out.
            place: what errors call them.

        Raises:
            ValueError: a module is not among the edited ones, or its matrix has a wrong shape or a number that is not
                finite.
        """
        if not isinstance(given, Mapping):
            raise ValueError(f"{place} is {type(given).__name__}; give a dictionary of (d_out, d_in) by module")
        unknown = sorted(map(str, set(given) - set(self.module_shapes)))
        if unknown:
            names = list(self.module_shapes)
            raise ValueError(
                f"{place} names {unknown[0]!r}, which is not edited; edited are {', '.join(names[:3])}"
                f"{f' … {names[-1]}' if len(names) > 3 else ''} (the environment's edit_modules)"
            )
        checked: dict[str, Tensor] = {}
        for name, value in given.items():
            wanted = self.module_shapes[name][::-1]
            try:
                matrix = torch.as_tensor(value, dtype=self.edit_dtype, device=self.device)
                if matrix.layout is not torch.strided:
                    raise TypeError("it is sparse")
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"{place}[{name!r}] is no array of numbers ({error}); give {wanted}") from error
            if matrix.shape != wanted:
                raise ValueError(f"{place}[{name!r}] has shape {tuple(matrix.shape)}; give (d_out, d_in) = {wanted}")
            if not torch.isfinite(matrix).all():
                row, column = (~torch.isfinite(matrix)).nonzero()[0].tolist()
                raise NotFiniteError(
                    f"{place}[{name!r}] holds {float(matrix[row, column])} at ({row}, {column}); give finite numbers "
                    f"that fit {str(self.edit_dtype).removeprefix('torch.')}. Nothing was applied"
                )
            checked[name] = matrix
        return checked

    @torch.no_grad()
    def _take_back(self, changes: Mapping[str, _Change]) -> None:
        for name, change in changes.items():
            change.take_back(self._master[name])
            self._refresh(name, self._modules[name])

    def _refresh(self, name: str, module: nn.Module) -> None:
        oriented = self._oriented(module)
        if oriented.data_ptr() != self._master[name].data_ptr():
            oriented.data.copy_(self._master[name])

    @torch.no_grad()
    def restore(self, snapshot: Mapping[str, Tensor] | None = None) -> None:
        """Put back a snapshot, or the pre-trained weights, bit for bit."""
        wanted = self._original if snapshot is None else snapshot
        for name, module in self._modules.items():
            self._master[name].copy_(wanted[name])
            self._refresh(name, module)

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of the edited weights, float32 (d_out, d_in)."""
        return {name: weight.clone() for name, weight in self._master.items()}

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Within it the weights may be changed, by another environment too; afterwards they are as before, and the same
        environment goes on with them."""
        weights, holder = self.snapshot(), self.holder
        try:
            yield
        finally:
            self.restore(weights)
            self.holder = holder

    def __copy__(self) -> EditedWeights:
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __reduce__(self) -> Any:
        raise PicklingError(
            f"an {type(self).__name__} is not pickled, since its model may take gigabytes; write it by "
            "save_pretrained(folder) and load it by the folder's name, or copy it in this process: copy.deepcopy(lm)"
        )

    @contextmanager
    def original_weights(self) -> Iterator[None]:
        """Within it the model runs with its pre-trained weights; no copying."""
        current = {name: module.weight.data for name, module in self._modules.items()}
        for name, module in self._modules.items():
            module.weight.data = self._original_run[name]
        try:
            yield
        finally:
            for name, module in self._modules.items():
                module.weight.data = current[name]

    def drift(self) -> dict[str, float]:
        """‖W_t − W₀‖ / ‖W₀‖ by module (Frobenius)."""
        return {n: float((self._master[n] - self._original[n]).norm()) / self._norms[n] for n in self._modules}


class Undo:
    """Takes an update of edited weights back, bit for bit, without a copy of what was before if it is to spare memory.

    Where W' − ΔW is W again, nothing is kept; for a typical update these are 98 of 100 numbers. The others, whose sum
    was rounded, are kept as they were.
    """

    def __init__(self, weights: EditedWeights, changes: Mapping[str, _Change]) -> None:
        self._weights, self._changes = weights, changes

    @property
    def nbytes(self) -> int:
        """Bytes that it keeps, beside the update itself."""
        return sum(change.nbytes for change in self._changes.values())

    def __call__(self) -> None:
        """Put the weights back.

        Raises:
            RuntimeError: the weights are not those that the update made, or this machine did not make the update again
                as it was.
        """
        self._weights._take_back(self._changes)


@dataclass(frozen=True)
class _Change:
    """One weight's part of an :class:`Undo`.

    Attributes:
        update: makes ΔW (d_out, d_in) once more.
        places: of the numbers kept, counted row by row; None if all are.
        numbers: the weights that were there.
        check: :func:`_checksum` of all that were.
    """

    update: Callable[[], Tensor]
    places: Tensor | None
    numbers: Tensor
    check: int

    @classmethod
    def made(cls, weight: Tensor, update: Callable[[], Tensor], sparing: bool) -> _Change:
        """Add ΔW to a weight (d_out, d_in); where that fails, the weight is as it was."""
        change, before = update(), weight.clone()
        try:
            weight += change
            if not sparing:
                return cls(update, None, before, 0)
            rows, columns = (_bits(weight - change) != _bits(before)).nonzero(as_tuple=True)
            if 3 * len(rows) > before.numel():  # a number that is kept takes three times its bytes, with its place
                return cls(update, None, before, 0)
            return cls(update, rows * weight.shape[1] + columns, before[rows, columns], _checksum(before))
        except BaseException:
            weight.copy_(before)
            raise

    def take_back(self, weight: Tensor) -> None:
        """Subtract it from a weight."""
        if self.places is None:
            weight.copy_(self.numbers)
            return
        weight -= self.update()
        width = weight.shape[1]
        weight[self.places // width, self.places % width] = self.numbers
        if _checksum(weight) != self.check:
            raise RuntimeError(
                "the weights before the update cannot be had again bit for bit: they were changed by something else "
                "since, or this machine does not repeat a matrix product (torch.use_deterministic_algorithms)"
            )

    @property
    def nbytes(self) -> int:
        return self.numbers.nbytes + (0 if self.places is None else self.places.nbytes)


def _product(values: Tensor, keys: Tensor) -> Tensor:
    """ṽᵀũ (d_out, d_in)."""
    return values.t() @ keys


def _same(update: Tensor) -> Tensor:
    return update


def _bits(numbers: Tensor) -> Tensor:
    """The same bits as whole numbers: −0 is not 0, and what is no number is itself."""
    return numbers.view(torch.int64 if numbers.dtype == torch.float64 else torch.int32)


def _checksum(numbers: Tensor) -> int:
    return int(_bits(numbers).sum(dtype=torch.int64))
