"""The edited weights of a model, and every way in which they change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

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
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules: dict[str, Any] = dict(modules)
        self.module_shapes: dict[str, tuple[int, int]] = {}
        self._master: dict[str, Tensor] = {}
        for n, module in self._modules.items():
            if module.weight.is_meta:
                raise ValueError(
                    f"the weight of {n} is offloaded to the host or the disk, where it cannot be edited; give a device "
                    "map that keeps the layers of edit_modules on a device"
                )
            weight = self._oriented(module).detach()
            self.module_shapes[n] = (weight.shape[1], weight.shape[0])
            self._master[n] = at_least_float32(weight)  # the model's own tensor where that is precise enough
        self._original_run = {n: m.weight.detach().clone() for n, m in self._modules.items()}
        self._original = {  # the same tensor where the model's precision is enough
            n: at_least_float32(w.t() if isinstance(self._modules[n], Conv1D) else w)
            for n, w in self._original_run.items()
        }
        self._norms = {n: float(w.norm()) for n, w in self._original.items()}

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

    @torch.no_grad()
    def apply(self, keys: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        """Add ΔW = ṽᵀũ to each weight, from factors ũ (N, d_in) and ṽ (N, d_out)."""
        for name, module in self._modules.items():
            weight = self._master[name]
            weight.addmm_(values[name].t().to(weight), keys[name].to(weight))
            self._refresh(name, module)

    @torch.no_grad()
    def add(self, updates: Mapping[str, Any]) -> None:
        """Add dense updates ΔW (d_out, d_in) to the modules named; the others stay as they are.

        Raises:
            ValueError: as :meth:`matrices`; no weight has changed.
        """
        for name, update in self.matrices(updates, "updates").items():
            self._master[name] += update.to(self._master[name])
            self._refresh(name, self._modules[name])

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
