"""The edited weights of a model, and all changes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from weakref import ref

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rledit_env.lm.modules import LinearModule
from rledit_env.lm.precision import at_least_float32


class NotFiniteError(ValueError):
    """An update has the right form, but contains a number that is not finite."""


@dataclass(frozen=True)
class Originals:
    """The pre-trained weights of the edited modules, which are never written.

    Attributes:
        run: module → W₀ (d_out, d_in) in the model's precision.
        exact: the same at least in float32: the same tensor where the model's precision is enough.
    """

    run: dict[str, Tensor]
    exact: dict[str, Tensor]

    @classmethod
    def of(cls, run: dict[str, Tensor]) -> Originals:
        return cls(run, {name: at_least_float32(weight) for name, weight in run.items()})

    @cached_property
    def norms(self) -> dict[str, float]:
        """Module → ‖W₀‖_F."""
        return {name: float(weight.norm()) for name, weight in self.exact.items()}


class EditedWeights:
    """A set of edited weights. Nothing else changes them.

    A master copy is kept in float32 whatever precision the model runs in (in float64 for a float64 model). After every
    update, the tensors that the model runs with are refreshed from it. These are its modules' own weights or, where
    several sets share the modules, separate tensors (see `rledit_env.lm.routing`).

    Args:
        modules: the edited linear modules (``nn.Linear`` or GPT-2's ``Conv1D``) by name.

    Attributes:
        modules: the edited modules by name.
        module_shapes: module → (d_in, d_out).
        originals: the pre-trained weights.
        run: module → W (d_out, d_in) in the model's precision; the master copy itself where that is precise enough.
        holder: reference to the environment whose episode the weights belong to; None before any episode.
    """

    def __init__(self, modules: Mapping[str, LinearModule]) -> None:
        for name, module in modules.items():
            if module.weight.is_meta:
                raise ValueError(
                    f"the weight of {name} is offloaded to the host or the disk, where it cannot be edited; give a "
                    "device map that keeps the layers of edit_modules on a device"
                )
        run = {name: oriented(module, module.weight.data) for name, module in modules.items()}
        self._set_tensors(dict(modules), run, Originals.of({name: weight.clone() for name, weight in run.items()}))

    def _set_tensors(self, modules: dict[str, LinearModule], run: dict[str, Tensor], originals: Originals) -> None:
        self.modules, self.run, self.originals = modules, run, originals
        self._master = {name: at_least_float32(weight) for name, weight in run.items()}
        self.module_shapes = {name: (weight.shape[1], weight.shape[0]) for name, weight in run.items()}
        self.holder: ref[object] | None = None

    def beside(self) -> EditedWeights:
        """Another set for the same modules, in separate tensors; it begins with the pre-trained weights."""
        other = type(self).__new__(type(self))
        other._set_tensors(self.modules, {n: w.clone() for n, w in self.originals.run.items()}, self.originals)
        return other

    def copied(self, modules: Mapping[str, LinearModule]) -> EditedWeights:
        """The same weights in copies of the modules; the pre-trained weights are shared."""
        other = type(self).__new__(type(self))
        other._set_tensors(dict(modules), {n: oriented(m, m.weight.data) for n, m in modules.items()}, self.originals)
        other.restore(self._master)
        return other

    def leave_originals(self) -> None:
        """Edit copies from now on: the modules' present tensors become the pre-trained weights, which are never
        written."""
        originals, copies = self.run, self.originals.run
        for name, module in self.modules.items():
            module.weight.data = oriented(module, copies[name])
        self._set_tensors(self.modules, copies, Originals.of(originals))

    @property
    def device(self) -> torch.device:
        """The device on which updates are expected."""
        return next(iter(self._master.values())).device

    @property
    def edit_dtype(self) -> torch.dtype:
        """Precision of the edited weights and of updates: float32, or float64 for a float64 model."""
        return next(iter(self._master.values())).dtype

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the set takes, without the pre-trained weights."""
        sizes = {w.data_ptr(): w.nbytes for weights in (self._master, self.run) for w in weights.values()}
        return sum(sizes.values())

    def weight(self, name: str) -> Tensor:
        """The edited weight W_t (d_out, d_in), float32; not a copy: read only."""
        return self._master[name]

    def original_weight(self, name: str) -> Tensor:
        """The pre-trained weight W₀ (d_out, d_in), float32; not a copy: read only."""
        return self.originals.exact[name]

    def apply(self, keys: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Callable[[], None]:
        """Add ΔW = ṽᵀũ to each weight, from factors ũ (N, d_in) and ṽ (N, d_out).

        Returns:
            A function that undoes the update, as long as no other change came after it.

        Raises:
            RuntimeError: factors do not fit a weight; no weight has changed.
        """
        like = next(iter(self._master.values()))
        return self._add((n, values[n].to(like).t() @ keys[n].to(like)) for n in self.modules)

    def add(self, updates: Mapping[str, Tensor]) -> Callable[[], None]:
        """Add dense updates ΔW (d_out, d_in) to the modules named; the others stay as they are.

        Returns:
            A function that undoes the update, as long as no other change came after it.

        Raises:
            ValueError: as :meth:`matrices`; no weight has changed.
        """
        return self._add(self.matrices(updates, "updates").items())

    @torch.no_grad()
    def _add(self, updates: Iterable[tuple[str, Tensor]]) -> Callable[[], None]:
        before: dict[str, Tensor] = {}
        try:
            for name, update in updates:
                before[name] = self._master[name].clone()
                self._master[name] += update
                self._refresh(name)
        except BaseException:  # such as Ctrl-C, or no memory left on the device
            self._put_back(before)
            raise
        return partial(self._put_back, before)

    @torch.no_grad()
    def replace(self, accumulated: Mapping[str, Tensor]) -> None:
        """Set W = W₀ + A for the modules named, from accumulated changes A (d_out, d_in); the others stay as they are.

        Raises:
            ValueError: as :meth:`matrices`; no weight has changed.
        """
        for name, change in self.matrices(accumulated, "accumulated").items():
            self._master[name].copy_(self.originals.exact[name]).add_(change.to(self._master[name]))
            self._refresh(name)

    def matrices(self, given: object, place: str) -> dict[str, Tensor]:
        """Dense matrices for edited modules, as tensors (d_out, d_in) on the LLM's device in the edited weights'
        precision.

        Args:
            given: arrays or tensors by module; modules may be left out.
            place: name of ``given`` in errors.

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
            shape = self.module_shapes[name][::-1]
            try:
                matrix = torch.as_tensor(value, dtype=self.edit_dtype, device=self.device)
                if matrix.layout is not torch.strided:
                    raise TypeError("it is sparse")
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"{place}[{name!r}] is no array of numbers ({error}); give {shape}") from error
            if matrix.shape != shape:
                raise ValueError(f"{place}[{name!r}] has shape {tuple(matrix.shape)}; give (d_out, d_in) = {shape}")
            if not torch.isfinite(matrix).all():
                row, column = (~torch.isfinite(matrix)).nonzero()[0].tolist()
                raise NotFiniteError(
                    f"{place}[{name!r}] holds {float(matrix[row, column])} at ({row}, {column}); give finite numbers "
                    f"that fit {str(self.edit_dtype).removeprefix('torch.')}. Nothing was applied"
                )
            checked[name] = matrix
        return checked

    def _refresh(self, name: str) -> None:
        if self.run[name].data_ptr() != self._master[name].data_ptr():
            self.run[name].copy_(self._master[name])

    def restore(self, snapshot: Mapping[str, Tensor] | None = None) -> None:
        """Put back a snapshot, or the pre-trained weights, bit for bit."""
        weights = self.originals.exact if snapshot is None else snapshot
        self._put_back({name: weights[name] for name in self.modules})

    @torch.no_grad()
    def _put_back(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            self._master[name].copy_(weight)
            self._refresh(name)

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of the edited weights, float32 (d_out, d_in)."""
        return {name: weight.clone() for name, weight in self._master.items()}

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Context in which the weights may be changed, also by another environment; afterwards they and
        :attr:`holder` are as before."""
        weights, holder = self.snapshot(), self.holder
        try:
            yield
        finally:
            self.restore(weights)
            self.holder = holder

    def original_in_modules(self) -> AbstractContextManager[None]:
        """Context in which the modules hold the pre-trained weights; nothing is copied."""
        return self._in_modules(self.originals.run)

    def in_modules(self) -> AbstractContextManager[None]:
        """Context in which the modules hold these weights, also where they are separate tensors; nothing is copied."""
        return self._in_modules(self.run)

    @contextmanager
    def _in_modules(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        current = {name: module.weight.data for name, module in self.modules.items()}
        for name, module in self.modules.items():
            module.weight.data = oriented(module, weights[name])
        try:
            yield
        finally:
            for name, module in self.modules.items():
                module.weight.data = current[name]

    def drift(self) -> dict[str, float]:
        """‖W_t − W₀‖ / ‖W₀‖ by module (Frobenius)."""
        originals = self.originals
        return {n: float((w - originals.exact[n]).norm()) / originals.norms[n] for n, w in self._master.items()}


def oriented(module: nn.Module, weight: Tensor) -> Tensor:
    """Turn a module's weight into (d_out, d_in), or a matrix of that shape into the module's form; a view."""
    return weight.t() if isinstance(module, Conv1D) else weight
