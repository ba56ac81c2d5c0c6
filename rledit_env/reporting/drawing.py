"""The common look of all charts: figures, axes, curves, heat maps, and the finished picture."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from rledit_env.type_aliases import Options

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Form = Literal["png", "pdf", "svg"]

# Okabe and Ito's colours, which colour-blind readers can tell apart; grey is for "no edit".
COLOURS = ("#9aa3ad", "#e69f00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9")
INK, FAINT = "#1f2933", "#d9dee3"


def check_pictures() -> None:
    """Check that pictures can be drawn.

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        new_figure(1, 1)
    except ImportError as error:
        raise ValueError(str(error)) from error


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, without pyplot's global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib; install it with: pip install 'rledit-env[report]'") from error
    return Figure(figsize=(width, height), dpi=160, layout="constrained")


def new_axes(figure: Figure, place: tuple[int, int, int], x: str, y: str) -> Axes:
    """Axes at a place of the figure (rows, columns, number from 1), with their labels."""
    axes = figure.add_subplot(*place)
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    axes.tick_params(labelsize=8.5, colors=INK)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    return axes


def plot_curve(
    axes: Axes, points: Iterable[tuple[float, float]], colour: str, name: str, width: float = 1.8, marker: str = "o"
) -> None:
    """Plot a line through (x, y) points, each with the marker ("" for none)."""
    axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=3.5, linewidth=width, label=name)


def heat_map(
    axes: Axes, values: np.ndarray, columns: Sequence[str], rows: Sequence[str], most_columns: int = 20
) -> AxesImage:
    """Draw percentages (rows, columns) as colours; NaN stays empty. At most ``most_columns`` columns are named."""
    axes.grid(visible=False)
    image = axes.imshow(values, aspect="auto", cmap="cividis", vmin=0, vmax=100, interpolation="nearest")
    _name_ticks(axes.set_xticks, columns, most_columns)
    _name_ticks(axes.set_yticks, rows)
    return image


def _name_ticks(set_ticks: Callable[..., object], names: Sequence[str], most: int = 20) -> None:
    """Set ticks with these names, or with every second, third … of them if there are too many."""
    step = -(-len(names) // most)
    set_ticks(range(0, len(names), step), list(names[::step]))


def write_values(axes: Axes, values: np.ndarray) -> None:
    """Write the numbers into a heat map's cells, readable on their colours (of cividis, 0 to 100)."""
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            colour = INK if value > 55 else "white"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7.5, color=colour)


def colour_bar(figure: Figure, image: AxesImage, name: str) -> None:
    """Add the scale of a heat map's colours beside all axes of the figure."""
    bar = figure.colorbar(image, ax=figure.axes, shrink=0.9, pad=0.02)
    bar.set_label(name, fontsize=9, color=INK)
    bar.ax.tick_params(labelsize=8.5, colors=INK)
    bar.outline.set_visible(False)


def legend(axes: Axes, columns: int = 1, above: bool = False) -> None:
    """Add a legend above the axes, or inside them where there is room."""
    place: Options = {"loc": "lower left", "bbox_to_anchor": (0, 1.0)} if above else {"loc": "best"}
    axes.legend(frameon=False, fontsize=8.5, ncols=columns, labelcolor=INK, **place)


def drawn(figure: Figure, form: Form) -> bytes:
    """The finished picture, as the bytes of a file of this form."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form)
    return buffer.getvalue()
