"""Observation and action spaces, and conversion between ragged tensors and padded, masked arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rledit_env.lm.editable import EditableLM, Trace
from rledit_env.lm.weights import NotFiniteError
from rledit_env.updates import Dense, RankOne, Replacement, Update

Shapes = Mapping[str, tuple[int, int]]  # module → (d_in, d_out)
Array = np.ndarray | Tensor


class TensorObservation(TypedDict):
    """An observation as tensors on the LLM's device, with as many rows as the batch has positions."""

    keys: Mapping[str, Tensor]
    value_gradients: Mapping[str, Tensor]
    mask: Tensor
    edit_loss: Tensor
    progress: Tensor


class ArrayObservation(TypedDict):
    """An observation as float32 arrays, padded with zero rows."""

    keys: Mapping[str, np.ndarray]
    value_gradients: Mapping[str, np.ndarray]
    mask: np.ndarray
    edit_loss: np.ndarray
    progress: np.ndarray


Observation = TensorObservation | ArrayObservation
Action = Mapping[str, Mapping[str, Array]]  # part → module → array, as in `action_space` or `Update.parts`


def _unbounded(*shape: int) -> spaces.Box:
    return spaces.Box(-np.inf, np.inf, shape, np.float32)


def observation_space(shapes: Shapes, rows: int) -> spaces.Dict:
    """Keys (N, d_in) and value gradients (N, d_out) by module, mask (N,), edit loss (1,), progress (1,)."""
    return spaces.Dict(
        {
            "keys": spaces.Dict({m: _unbounded(rows, d_in) for m, (d_in, _) in shapes.items()}),
            "value_gradients": spaces.Dict({m: _unbounded(rows, d_out) for m, (_, d_out) in shapes.items()}),
            "mask": spaces.Box(0.0, 1.0, (rows,), np.float32),
            "edit_loss": spaces.Box(0.0, np.inf, (1,), np.float32),
            "progress": spaces.Box(0.0, 1.0, (1,), np.float32),
        }
    )


def action_space(shapes: Shapes, rows: int) -> spaces.Dict:
    """Update factors by module: keys ũ (N, d_in) and values ṽ (N, d_out), ΔW = ṽᵀũ."""
    return spaces.Dict(
        {
            "keys": spaces.Dict({m: _unbounded(rows, d_in) for m, (d_in, _) in shapes.items()}),
            "values": spaces.Dict({m: _unbounded(rows, d_out) for m, (_, d_out) in shapes.items()}),
        }
    )


def torch_observation(trace: Trace, progress: float) -> TensorObservation:
    """The observation as tensors on the LLM's device, with as many rows as the batch has positions."""
    rows = len(trace.owner)
    device = trace.owner.device
    return {
        "keys": trace.keys,
        "value_gradients": trace.value_gradients,
        "mask": torch.ones(rows, device=device),
        "edit_loss": torch.tensor([trace.loss], device=device),
        "progress": torch.tensor([progress], device=device),
    }


def empty_observation(shapes: Shapes, progress: float, device: torch.device) -> TensorObservation:
    """The observation after the last batch, as tensors: no rows, no loss."""
    return {
        "keys": {m: torch.zeros(0, d_in, device=device) for m, (d_in, _) in shapes.items()},
        "value_gradients": {m: torch.zeros(0, d_out, device=device) for m, (_, d_out) in shapes.items()},
        "mask": torch.zeros(0, device=device),
        "edit_loss": torch.zeros(1, device=device),
        "progress": torch.tensor([progress], device=device),
    }


def is_finite(observation: Observation) -> bool:
    """Whether the loss, the keys and the value gradients of an observation, in either backend, are all finite."""
    parts = [observation["edit_loss"], *observation["keys"].values(), *observation["value_gradients"].values()]
    return all(bool(torch.isfinite(torch.as_tensor(part)).all()) for part in parts)


def numpy_observation(observation: TensorObservation, rows: int) -> ArrayObservation:
    """The observation as float32 arrays, padded with zero rows to ``rows``."""

    def padded(value: Tensor) -> np.ndarray:
        array = np.zeros((rows, *value.shape[1:]), dtype=np.float32)
        array[: len(value)] = value.cpu().numpy()
        return array

    return {
        "keys": {m: padded(v) for m, v in observation["keys"].items()},
        "value_gradients": {m: padded(v) for m, v in observation["value_gradients"].items()},
        "mask": padded(observation["mask"]),
        "edit_loss": observation["edit_loss"].cpu().numpy(),
        "progress": observation["progress"].cpu().numpy(),
    }


def arrays(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """A dictionary of tensors, or of such dictionaries, as NumPy arrays."""
    return {k: arrays(t) if isinstance(t, Mapping) else t.cpu().numpy() for k, t in tensors.items()}


def weight_update(action: object, lm: EditableLM, padded_rows: int, used_rows: int) -> Update:
    """The update that an action means, with tensors on the LLM's device in the edited weights' precision.

    Raises:
        ValueError: as :func:`unpack_action` and `EditableLM.matrices`.
    """
    if isinstance(action, Mapping) and set(action) == {"updates"}:
        return Dense(lm.matrices(action["updates"], "action['updates']"))
    if isinstance(action, Mapping) and set(action) == {"accumulated"}:
        return Replacement(lm.matrices(action["accumulated"], "action['accumulated']"))
    return RankOne(*unpack_action(action, lm.module_shapes, padded_rows, used_rows, lm.device, lm.edit_dtype))


def unpack_action(
    action: object,
    shapes: Shapes,
    padded_rows: int,
    used_rows: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The action's used rows as tensors of ``dtype``: keys and values by module.

    Rows beyond ``used_rows`` are padding and are ignored. NumPy arrays and tensors are accepted, with either
    ``padded_rows`` or ``used_rows`` rows.

    Raises:
        ValueError: a part is missing or unknown, has a wrong shape, or has a number that is not finite.
    """
    unpacked: dict[str, dict[str, Tensor]] = {}
    if not isinstance(action, Mapping) or set(action) != {"keys", "values"}:
        given = sorted(map(str, action)) if isinstance(action, Mapping) else type(action).__name__
        raise ValueError(
            f"the action is {given}; give a dictionary with 'keys' and 'values', each by module, or with 'updates' or "
            "'accumulated' alone"
        )
    for part, side in (("keys", 0), ("values", 1)):
        given = action[part]
        if not isinstance(given, Mapping) or set(given) != set(shapes):
            names = set(given) if isinstance(given, Mapping) else set()
            raise ValueError(
                f"action[{part!r}] must have exactly the edited modules; missing: {sorted(set(shapes) - names)}, "
                f"unknown: {sorted(map(str, names - set(shapes)))}"
            )
        unpacked[part] = {}
        for module, shape in shapes.items():
            width = shape[side]
            try:
                value = torch.as_tensor(given[module], dtype=dtype, device=device)
                if value.layout is not torch.strided:
                    raise TypeError("it is sparse")
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(
                    f"action[{part!r}][{module!r}] is no array of numbers ({error}); give one of shape "
                    f"({padded_rows}, {width})"
                ) from error
            if value.ndim != 2 or value.shape[1] != width or value.shape[0] not in (padded_rows, used_rows):
                raise ValueError(
                    f"action[{part!r}][{module!r}] has shape {tuple(value.shape)}; it must be ({padded_rows}, {width}) "
                    f"as in the action space, or ({used_rows}, {width}), the rows in use"
                )
            value = value[:used_rows]
            if not torch.isfinite(value).all():
                row = int((~torch.isfinite(value)).any(1).nonzero()[0])
                raise NotFiniteError(
                    f"action[{part!r}][{module!r}] holds a number that is not finite (first in row {row}); "
                    "nothing was applied"
                )
            unpacked[part][module] = value
    return unpacked["keys"], unpacked["values"]
