"""Renders a step's facts as text, and an episode's curves as a picture."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from gymnasium.error import DependencyNotInstalled

from rledit_env.answers import took
from rledit_env.knowledge import EditRecord
from rledit_env.type_aliases import Info

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PROMPT_WIDTH, ANSWER_WIDTH = 52, 20
TOOK, KNOWN, MISSED = "✓", "=", "✗"

DPI = 100
SIZE = (960, 544)  # pixels; multiples of 16, as video encoders require
PAPER_CURVES = ("generalization", "locality", "backtracking", "regularisation")
ORDER = ("reward", "efficacy", *PAPER_CURVES)
INK, MUTED, RULE = "#1f2430", "#6b7280", "#e3e6eb"
COLOURS = {"reward": "#2457a6", "drift": "#b4481e"}
COMPONENT_COLOUR = "#3d7f6e"


@dataclass(frozen=True)
class Scene:
    """The content of one rendered step.

    Attributes:
        batch: index of the batch in the episode.
        records: its facts.
        before, after: the LLM's greedy continuations of their prompts, before and after the update.
        info: the step's `info`.
        reward: the step's reward.
    """

    batch: int
    records: Sequence[EditRecord]
    before: Sequence[str]
    after: Sequence[str]
    info: Info
    reward: float


# -- text ----------------------------------------------------------------------------------------------------------


def text(scene: Scene | None, source: str) -> str:
    """The facts of a step with the LLM's answers before and after it, one line per fact.

    Args:
        scene: the step; None before any was taken.
        source: the origin of the facts, in words.
    """
    if scene is None:
        return f"No step taken yet: the answers appear after the first step(). Data: {source}"
    header = _row(" ", "prompt", "target", "before", "after")
    lines = [f"Batch {scene.batch + 1}, {_facts(len(scene.records))}, from {source}", header, "─" * _width(header)]
    marks = []
    for record, before, after in zip(scene.records, scene.before, scene.after, strict=True):
        marks.append(_mark(record.target, before, after))
        lines.append(_row(marks[-1], record.prompt, record.target, before, after))
    lines.append("─" * _width(header))
    new, known, missed = (marks.count(mark) for mark in (TOOK, KNOWN, MISSED))
    lines.append(f"{TOOK} took: {new}   {KNOWN} answered so before: {known}   {MISSED} did not take: {missed}")
    lines += _reward_lines(scene)
    if scene.info.get("diverged"):
        lines.append("The update broke the model (a loss is no longer finite); the episode is over.")
    return "\n".join(lines)


def _mark(target: str, before: str, after: str) -> str:
    if not took(after, target):
        return MISSED
    return KNOWN if took(before, target) else TOOK


def _reward_lines(scene: Scene) -> list[str]:
    parts = [
        f"{name} {_number(value)}"
        for name, value in scene.info.items()
        if isinstance(value, float) and name != "drift"
    ]
    line = f"reward {_number(scene.reward)}"
    if "drift" in scene.info:
        line += f"   drift so far {_number(scene.info['drift'])}"
    return [line, *([f"costs: {', '.join(parts)}"] if parts else [])]


def _row(mark: str, prompt: str, target: str, before: str, after: str) -> str:
    # The end of a prompt says what is asked, so a long prompt is cut in the middle, a long answer at its end.
    cells = [_fit(_one_line(prompt), PROMPT_WIDTH, keep_end=True)]
    cells += [_fit(_one_line(answer), ANSWER_WIDTH) for answer in (target, before, after)]
    return f"{mark} {'  '.join(cells)}".rstrip()


def _fit(string: str, columns: int, keep_end: bool = False) -> str:
    """The string cut or padded to so many columns."""
    if _width(string) > columns:
        tail = ""
        if keep_end:
            while _width(tail) < columns // 2 - 1:
                tail = string[len(string) - len(tail) - 1] + tail
        head = ""
        while _width(head + string[len(head)]) <= columns - 1 - _width(tail):
            head += string[len(head)]
        string = f"{head}…{tail}"
    return string + " " * (columns - _width(string))


def _width(string: str) -> int:
    """Terminal columns: wide East Asian characters take two, combining marks none."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in string
    )


def _one_line(string: str) -> str:
    """The string on one line, without control characters (a continuation may contain escape sequences)."""
    spaced = re.sub(r"\s+", " ", string).strip()
    return "".join("�" if unicodedata.category(c) == "Cc" else c for c in spaced)


def _number(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    return f"{value:.3f}" if 0.01 <= abs(value) < 1000 or value == 0 else f"{value:.1e}"


def _facts(count: int) -> str:
    return f"{count} fact{'s' if count != 1 else ''}"


# -- curves --------------------------------------------------------------------------------------------------------


def curves(history: Sequence[Mapping[str, float]], episode_steps: int) -> np.ndarray:
    """The episode so far as small multiples: the reward, its parts and the drift, over the steps.

    Args:
        history: the numbers of each step taken, by name; a number may be missing at some steps, or not be finite.
        episode_steps: steps of a whole episode, the width of every panel.

    Returns:
        (544, 960, 3) uint8, whatever the history.

    Raises:
        DependencyNotInstalled: there is no matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure  # not pyplot, whose global state is the user's
    except ImportError as error:
        raise DependencyNotInstalled(
            f"render_mode 'rgb_array' draws with matplotlib, which cannot be imported ({error}); "
            "install it with: pip install matplotlib"
        ) from error

    names = list(dict.fromkeys(name for step in history for name in step)) or ["reward", *PAPER_CURVES, "drift"]
    names.sort(key=lambda name: len(ORDER) + (name == "drift") if name not in ORDER else ORDER.index(name))
    columns = min(3, len(names)) if len(names) <= 6 else 4
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(SIZE[0] / DPI, SIZE[1] / DPI), dpi=DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    figure.text(0.033, 0.952, "Lifelong editing", color=INK, fontsize=13, fontweight="bold", va="center")
    figure.text(
        0.967, 0.952, f"step {len(history)} of {episode_steps}", color=MUTED, fontsize=10.5, va="center", ha="right"
    )
    grid = figure.add_gridspec(
        rows, columns, left=0.07, right=0.967, top=0.845, bottom=0.085, wspace=0.34, hspace=0.25 + 0.15 * rows
    )
    for index, name in enumerate(names):
        axes = figure.add_subplot(grid[index // columns, index % columns])
        values = [step.get(name, math.nan) for step in history]
        _draw_panel(axes, name, values, episode_steps, index // columns == rows - 1)
    canvas.draw()
    picture: np.ndarray = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    return picture


def _draw_panel(axes: Axes, name: str, values: Sequence[float], episode_steps: int, lowest: bool) -> None:
    """Plot one number over the steps, with its latest value beside the title."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    colour = COLOURS.get(name, COMPONENT_COLOUR)
    finite = [(step, value) for step, value in enumerate(values, start=1) if math.isfinite(value)]
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=8.5, length=0, pad=4)
    axes.set_title(name.replace("_", " "), loc="left", fontsize=10.5, color=INK, pad=9)
    axes.set_xlim(0.5, max(episode_steps, 1) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, min_n_ticks=3))
    # Every label in full: matplotlib's common factor above the axis would overlap the title.
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}".replace("e-0", "e-")))
    if lowest:
        axes.set_xlabel("step", fontsize=8.5, color=MUTED, labelpad=2)
    if not finite:
        axes.set_ylim(0, 1)
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no value yet" if not values else "not finite", transform=axes.transAxes, color=MUTED,
                  fontsize=9, ha="center", va="center")
        return
    steps, numbers = zip(*finite, strict=True)
    axes.plot(steps, numbers, color=colour, linewidth=1.8, solid_capstyle="round", solid_joinstyle="round")
    axes.plot(steps[-1:], numbers[-1:], "o", color=colour, markersize=5, clip_on=False)
    low, high = min(numbers), max(numbers)
    margin = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)
    axes.set_title(_number(numbers[-1]), loc="right", fontsize=10, color=colour, fontweight="bold", pad=9)
