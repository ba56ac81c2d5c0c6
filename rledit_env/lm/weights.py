"""The edited weights of a model, and every way in which they change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
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

    def apply(self, keys: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Callable[[], None]:
        """Add ΔW = ṽᵀũ to each weight, from factors ũ (N, d_in) and ṽ (N, d_out).

        Returns:
            What takes it back, as long as no other change came after.

        Raises:
            RuntimeError: factors do not fit a weight; none has changed.
        """
        like = next(iter(self._master.values()))
        return self._add((n, values[n].to(like).t() @ keys[n].to(like)) for n in self._modules)

    def add(self, updates: Mapping[str, Any]) -> Callable[[], None]:
        """Add dense updates ΔW (d_out, d_in) to the modules named; the others stay as they are.

        Returns:
            What takes it back, as long as no other change came after.

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
                self._refresh(name, self._modules[name])
        except BaseException:  # such as Ctrl-C, or a device without memory for the next one
            self._put_back(before)
            raise
        return partial(self._put_back, before)

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

    def _refresh(self, name: str, module: nn.Module) -> None:
        oriented = self._oriented(module)
        if oriented.data_ptr() != self._master[name].data_ptr():
            oriented.data.copy_(self._master[name])

    def restore(self, snapshot: Mapping[str, Tensor] | None = None) -> None:
        """Put back a snapshot, or the pre-trained weights, bit for bit."""
        wanted = self._original if snapshot is None else snapshot
        self._put_back({name: wanted[name] for name in self._modules})

    @torch.no_grad()
    def _put_back(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            self._master[name].copy_(weight)
            self._refresh(name, self._modules[name])

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
