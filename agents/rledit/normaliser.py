"""Running moments of rows, which normalise the network's inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeVar

import torch
from torch import Tensor

AnyNormaliser = TypeVar("AnyNormaliser", bound="RunningNormaliser")


class RunningNormaliser:
    """Running mean and variance of rows (Welford's update in batches).

    Args:
        width: of a row.
        device: of the tensors.
        start: moments that stand in for the rows missing to ``start_rows``.
        start_rows: the number of rows from which on ``start`` has no weight.
        variance, epsilon: see `HypernetworkConfig.normaliser_variance` and ``normaliser_epsilon`` there.
    """

    def __init__(
        self, width: int, device: torch.device | str = "cpu", start: RunningNormaliser | None = None,
        start_rows: float = 0.0, variance: Literal["exact", "published"] = "exact", epsilon: float = 1e-8,
    ) -> None:  # fmt: skip
        self.start, self.start_rows, self.variance, self.epsilon = start, start_rows, variance, epsilon
        self.count = torch.zeros((), device=device)
        self.mean = torch.zeros(width, device=device)
        self.squares = torch.zeros(width, device=device)

    def update(self, rows: Tensor) -> None:
        """Add rows (N, width)."""
        if not len(rows):
            return
        mean = rows.mean(0)
        squares = (rows - mean).square().sum(0)
        if self.variance == "published":
            squares = squares * (len(rows) / max(len(rows) - 1, 1))
        self.count, self.mean, self.squares = self._with(len(rows), mean, squares)

    def merge(self, other: RunningNormaliser) -> None:
        """Add the rows of other moments."""
        if float(other.count):
            self.count, self.mean, self.squares = self._with(other.count, other.mean, other.squares)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and reciprocal standard deviation, (width,) each, of the added rows and of ``start``."""
        count, mean, squares = self.count, self.mean, self.squares
        if self.start is not None:
            rows = (self.start_rows - count).clamp(min=0)
            weight = (rows - 1).clamp(min=0) / (self.start.count - 1)  # keeps the start's variance at this row count
            count, mean, squares = self._with(rows, self.start.mean, self.start.squares * weight)
        std = (squares / (count - 1).clamp(min=1)).sqrt()
        return mean, 1 / (std + self.epsilon)

    def normalised(self, rows: Tensor) -> Tensor:
        """Rows (N, width), standardised."""
        mean, scale = self.moments()
        return (rows - mean) * scale

    def begin(self, start: RunningNormaliser, start_rows: float) -> None:
        """Begin a stream with the moments of other rows, ``start``, which stand in for those missing to
        ``start_rows``."""
        self.start, self.start_rows = start, start_rows

    def _with(self, count: Tensor | int, mean: Tensor, squares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Count, mean and sum of squares of the added rows together with others."""
        total = self.count + count
        shift = mean - self.mean
        both = self.squares + squares + shift.square() * self.count * count / total
        return total, self.mean + shift * count / total, both

    def empty(self, device: torch.device) -> RunningNormaliser:
        """Moments of no rows, for rows of the same kind."""
        return RunningNormaliser(len(self.mean), device)

    def to(self, device: torch.device) -> RunningNormaliser:
        """The same moments on this device."""
        other = self.empty(device)
        other.load(self.state())
        return other

    def state(self) -> dict[str, Tensor]:
        """The count, the mean and the sum of squares, by name."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Load the tensors of :meth:`state`."""
        self.count, self.mean, self.squares = (state[k].to(self.mean.device) for k in ("count", "mean", "squares"))


def moments_state(normalisers: Mapping[str, RunningNormaliser]) -> dict[str, Tensor]:
    """The tensors of all moments, named "<name of the moments>.<name of the tensor>"."""
    return {f"{m}.{k}": v for m, n in normalisers.items() for k, v in n.state().items()}


def moments_from(
    state: Mapping[str, Tensor], prefix: str, empty: Mapping[str, AnyNormaliser]
) -> dict[str, AnyNormaliser]:
    """The moments in a :func:`moments_state`.

    Args:
        state: the tensors.
        prefix: what precedes the tensors' names in ``state``.
        empty: name of the moments → moments of no rows, which are filled.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    for module, normaliser in empty.items():
        for name, tensor in normaliser.state().items():
            check_shape(f"{prefix}{module}.{name}", state.get(f"{prefix}{module}.{name}"), tuple(tensor.shape))
        normaliser.load({name: state[f"{prefix}{module}.{name}"] for name in normaliser.state()})
    return dict(empty)


def shared_moments(
    moments: Mapping[str, RunningNormaliser], widths: Mapping[str, int], names: Mapping[str, str], device: torch.device
) -> dict[str, RunningNormaliser]:
    """Merge the moments of modules that share a name.

    Args:
        moments: module → its moments.
        widths: module → width of its rows, for all modules of the network.
        names: module → the name of its moments.
        device: of the result.

    Returns:
        Name → merged moments.

    Raises:
        ValueError: the moments are of other modules than ``widths``, or of fewer than two rows.
    """
    moment_widths = {m: len(n.mean) for m, n in moments.items()}
    if moment_widths != widths:
        raise ValueError(
            f"the moments are of {len(moment_widths)} modules such as {next(iter(moment_widths.items()), None)}, the "
            f"network edits {len(widths)} such as {next(iter(widths.items()))} (d_in + d_out); gather them for those"
        )
    fewest = min(float(n.count) for n in moments.values())
    if fewest < 2:
        raise ValueError(f"the moments are of {fewest:g} rows; gather those of two facts or more")
    merged: dict[str, RunningNormaliser] = {}
    for module, rows in moments.items():
        name = names[module]
        if name in merged:
            merged[name].merge(rows.to(device))
        else:
            merged[name] = rows.to(device)
    return merged


def check_shape(name: str, tensor: Tensor | None, wanted: tuple[int, ...]) -> None:
    """Raise ValueError unless the tensor exists and has this shape."""
    shape = None if tensor is None else tuple(tensor.shape)
    if shape != wanted:
        raise ValueError(f"{name} has shape {shape}; it must be {wanted}")
