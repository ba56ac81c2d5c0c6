"""A run as one self-contained HTML page: tables and pictures, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import html
import io
import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rledit_env.answers import MEANING, answer_of, took
from rledit_env.evaluation.general.scored_text import NAMES
from rledit_env.files import GENERATOR, check_page, write_text
from rledit_env.knowledge import EditRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from rledit_env.evaluation.retention import Retention

Curve = Sequence[tuple[float, float]]
Form = Literal["png", "pdf", "svg"]

# Okabe and Ito's colours, which stay apart for colour-blind readers; grey stands for "nothing done".
COLOURS = ("#9aa3ad", "#e69f00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9")
INK, FAINT = "#1f2933", "#d9dee3"
SCORES = {
    "efficacy": "Efficacy",
    "generalization": "Generalization",
    "specificity": "Specificity",
    "exact_match": "Exact match",
}
PORTABILITY = "portability"  # tables show it where the data has it
PACKAGES = ("rledit-env", "torch", "transformers", "gymnasium", "numpy")


def versions() -> dict[str, str]:
    """Versions of what a result depends on: Python, the packages of ``PACKAGES``, and the machine."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["machine"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return found


def read_curves(log_dir: str | Path) -> dict[str, list[tuple[float, float]]]:
    """The scalars that a training run logged for TensorBoard: tag (such as "train/return") → (update, value) pairs.

    Empty if nothing was logged there.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(log_dir), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


# -------------------------------------------------------------------------------------------------------- pictures


def learning_curves(curves: Mapping[str, Curve], form: Form = "png") -> bytes | None:
    """What training changed, as a picture: losses of the training streams on the left, scores of the held-out one on
    the right, over policy updates; None if neither was logged.

    Args:
        curves: as :func:`read_curves` gives them.
    """
    losses = {name: curves.get(f"train/{name}", ()) for name in ("efficacy", "generalization", "locality")}
    scores = {name: curves.get(f"eval/{name}", ()) for name in ("efficacy", "generalization", "specificity")}
    panels = [
        (title, unit, {name: curve for name, curve in group.items() if curve})
        for title, unit, group in (
            ("Training streams: loss", "mean over answer tokens, nats", losses),
            ("Held-out stream: scores", "percent", scores),
        )
        if any(group.values())
    ]
    if not panels:
        return None
    figure = _figure(4.6 * len(panels), 3.2)
    for i, (title, unit, group) in enumerate(panels):
        axes = _axes(figure, (1, len(panels), i + 1), "policy updates", unit)
        for colour, (name, curve) in zip((COLOURS[2], COLOURS[1], COLOURS[3]), group.items(), strict=False):
            axes.plot(*zip(*curve, strict=True), color=colour, marker="o", markersize=3.5, linewidth=1.8, label=name)
        axes.locator_params(axis="x", integer=True)
        axes.set_title(title, loc="left", fontsize=10, color=INK, pad=24)  # above the legend
        _legend(axes, columns=3, above=True)
    return _drawn(figure, form)


def score_bars(results: Mapping[str, Mapping[str, Any]], form: Form = "png") -> bytes:
    """Scores in percent as grouped bars with their values, a picture.

    Args:
        results: editor's name → its scores by the names of ``SCORES``; a score that is None or absent has no bar.
    """
    figure = _figure(9.2, 3.4)
    axes = _axes(figure, (1, 1, 1), "", "percent")
    width = 0.8 / len(results)
    for i, (editor, scores) in enumerate(results.items()):
        places = [
            (group + (i - (len(results) - 1) / 2) * width, float(scores[name]))
            for group, name in enumerate(SCORES)
            if scores.get(name) is not None
        ]
        if not places:
            continue
        x, heights = zip(*places, strict=True)
        bars = axes.bar(x, heights, width * 0.92, color=COLOURS[i % len(COLOURS)], label=editor)
        axes.bar_label(bars, fmt="%.0f", fontsize=8, color=INK, padding=2)
    axes.set_xticks(range(len(SCORES)), list(SCORES.values()))
    axes.set_ylim(0, 112)
    axes.set_yticks(range(0, 101, 25))
    axes.tick_params(axis="x", length=0)
    _legend(axes, columns=len(results), above=True)
    return _drawn(figure, form)


def drift_curves(drifts: Mapping[str, Curve], form: Form = "png") -> bytes:
    """How far the edited weights moved along the stream, a picture.

    Args:
        drifts: editor's name → (facts edited, mean of ‖W − W₀‖ / ‖W₀‖ over the modules) pairs.
    """
    figure = _figure(9.2, 2.9)
    axes = _axes(figure, (1, 1, 1), "facts edited", "mean ‖W − W₀‖ / ‖W₀‖")
    for colour, (editor, curve) in zip(COLOURS[1:], drifts.items(), strict=False):
        axes.plot(*zip(*curve, strict=True), color=colour, linewidth=1.8, label=editor)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    _legend(axes)
    return _drawn(figure, form)


def return_curves(curves: Mapping[str, Curve], levels: Mapping[str, float], form: Form = "png") -> bytes:
    """Held-out returns while agents learned, a picture.

    Args:
        curves: agent's name → (environment steps so far, mean return) pairs.
        levels: what did not learn step by step, as dashed lines: name → mean return.
    """
    figure = _figure(9.2, 3.6)
    axes = _axes(figure, (1, 1, 1), "environment steps", "mean return, held-out streams")
    for colour, (name, value) in zip((COLOURS[0], COLOURS[4], COLOURS[5]), levels.items(), strict=False):
        axes.axhline(value, color=colour, linewidth=1.6, linestyle="--", label=name)
    for colour, (name, curve) in zip((COLOURS[2], COLOURS[1], COLOURS[3]), curves.items(), strict=False):
        axes.plot(*zip(*curve, strict=True), color=colour, marker="o", markersize=3.5, linewidth=1.8, label=name)
    axes.set_xlim(left=0)
    _legend(axes, columns=len(curves) + len(levels), above=True)
    return _drawn(figure, form)


MARKERS = "osD^vPX"
LEAST_KL = 1e-3  # nats a token: where the axis begins


def tradeoff_curves(
    curves: Mapping[str, Curve],
    levels: Mapping[str, float],
    bounds: Sequence[float] = (),
    broke: Mapping[str, Curve] | None = None,
    form: Form = "png",
) -> bytes:
    """Score against what else of the model has changed, a picture: one line an editor, from its weakest strength to its
    strongest. In an SVG each line is a group whose id is "editor-" and its number.

    Args:
        curves: editor's name → (KL in nats a token, score in percent) pairs, by strength; the axis of KL is
            logarithmic, and what is below ``LEAST_KL`` stands at its left end.
        levels: what has no strength, as dashed lines: name → score.
        bounds: values of KL to mark with thin vertical lines.
        broke: editor's name → the points where an update broke the model, as crosses.
    """
    figure = _figure(9.2, 4.8)
    axes = _axes(figure, (1, 1, 1), "KL from the unedited model on its own text, nats a token", "mean score, percent")
    axes.set_xscale("log")
    known = [kl for group in (curves, broke or {}) for curve in group.values() for kl, _ in curve if kl > 0]
    least = max(min([*known, *bounds, 1.0]) / 2, LEAST_KL)
    right = max([*known, *bounds, 1.0]) * 1.5
    axes.set_xlim(least * 0.9, right)
    for bound in bounds:
        axes.axvline(bound, color=FAINT, linewidth=1.0, zorder=0)
    colours = COLOURS[1:]
    for i, (name, score) in enumerate(levels.items()):
        line = axes.axhline(score, color=COLOURS[0], linewidth=1.4, linestyle="--", label=name)
        line.set_gid(f"editor-{i}")
    for i, name in enumerate(dict.fromkeys([*curves, *(broke or {})])):
        colour, style = colours[i % len(colours)], ("-", "-.", ":")[i // len(colours) % 3]
        places = [(max(kl, least), score) for kl, score in curves.get(name, ())]
        (line,) = axes.plot(
            [kl for kl, _ in places], [score for _, score in places], color=colour, linestyle=style, linewidth=1.6,
            marker=MARKERS[i % len(MARKERS)], markersize=4.5, label=name,
        )  # fmt: skip
        line.set_gid(f"editor-{len(levels) + i}")
        crosses = [(max(kl, least), score) for kl, score in (broke or {}).get(name, ())]
        axes.scatter([kl for kl, _ in crosses], [score for _, score in crosses], color=colour, marker="x", s=30)
    ticks = [10.0**power for power in range(math.floor(math.log10(least)), 3)]
    shown = sorted({tick for tick in (*ticks, *bounds) if least <= tick <= right})
    axes.set_xticks(shown, [f"{tick:g}" for tick in shown])
    axes.set_xticks([], minor=True)
    if levels or curves or broke:
        figure.legend(loc="outside right upper", frameon=False, fontsize=8.5, labelcolor=INK)
    return _drawn(figure, form)


def check_pictures() -> None:
    """Make sure that pictures can be drawn.

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        _figure(1, 1)
    except ImportError as error:
        raise ValueError(str(error)) from error


def retention_map(retention: Retention, form: Form = "png") -> bytes:
    """Efficacy of every batch after later ones as a heat map, a picture: batches from left to right, the stream's
    progress from top to bottom."""
    figure = _figure(6.4, 4.6)
    axes = _axes(figure, (1, 1, 1), "batch", "batches edited by then")
    axes.grid(visible=False)
    rows, batches = retention.efficacy.shape
    image = axes.imshow(retention.efficacy, aspect="auto", cmap="cividis", vmin=0, vmax=100, interpolation="nearest")
    _ticks(axes, "x", [str(batch + 1) for batch in range(batches)])
    _ticks(axes, "y", [str(edited) for edited in retention.edited])
    if rows * batches <= 150:
        _write_values(axes, retention.efficacy)
    _colour_bar(figure, image, "Efficacy, percent")
    return _drawn(figure, form)


def memory_curve(retention: Retention, form: Form = "png") -> bytes:
    """What the LLM still knows of the first batch as later ones are edited, a picture; a thin line is each batch's mean
    over all edited by then."""
    figure = _figure(9.2, 3.0)
    axes = _axes(figure, (1, 1, 1), "batches edited", "percent")
    lines = [
        ("first batch, Efficacy", retention.first_batch, COLOURS[2], 1.8),
        ("first batch, exact match (written freely)", retention.first_exact_match, COLOURS[1], 1.8),
        ("all batches so far, Efficacy", np.nanmean(retention.efficacy, axis=1), COLOURS[0], 1.2),
    ]
    for name, values, colour, width in lines:
        if not np.isnan(values).all():
            axes.plot(retention.edited, values, color=colour, marker="o", markersize=3.5, linewidth=width, label=name)
    axes.set_ylim(-3, 103)
    axes.locator_params(axis="x", integer=True)
    _legend(axes, columns=3, above=True)
    return _drawn(figure, form)


def layer_drift(drift: Mapping[str, Sequence[float]], form: Form = "png") -> bytes:
    """How far each layer's edited weights moved, a picture: by layer at the end, one line a kind of module, and all of
    them along the stream.

    Args:
        drift: module → ‖W_t − W₀‖ / ‖W₀‖ after each batch.
    """
    figure = _figure(9.2, 3.2)
    ends = _axes(figure, (1, 2, 1), "layer", "‖W − W₀‖ / ‖W₀‖ at the end")
    along = _axes(figure, (1, 2, 2), "batches edited", "‖W − W₀‖ / ‖W₀‖")
    for colour, kind in zip(COLOURS[1:] * 9, dict.fromkeys(module_kind(name) for name in drift), strict=False):
        members = {module_layer(name): values for name, values in drift.items() if module_kind(name) == kind}
        layers = sorted(members)
        ends.plot(layers, [members[i][-1] for i in layers], color=colour, marker="o", markersize=4, label=kind)
        for i in layers:
            along.plot(range(1, len(members[i]) + 1), members[i], color=colour, linewidth=0.9, alpha=0.6)
    for axes in (ends, along):
        axes.set_ylim(bottom=0)
        axes.locator_params(axis="x", integer=True)
    _legend(ends)
    return _drawn(figure, form)


def norm_curve(norms: Sequence[float], form: Form = "png") -> bytes:
    """The size of each batch's update, √(Σ ‖ΔW‖_F²), a picture."""
    figure = _figure(9.2, 2.6)
    axes = _axes(figure, (1, 1, 1), "batch", "norm of its update")
    axes.bar(range(1, len(norms) + 1), norms, color=COLOURS[5])
    axes.locator_params(axis="x", integer=True)
    return _drawn(figure, form)


def module_map(
    kinds: Sequence[str], layers: Sequence[int], maps: Mapping[str, np.ndarray], form: Form = "png"
) -> bytes:
    """Scores of editing each module alone, a picture: one heat map a score.

    Args:
        kinds: kinds of module, the rows.
        layers: the columns.
        maps: score → (kinds, layers) in percent; NaN stays empty. Those of ``SCORES`` are drawn.
    """
    drawn = {SCORES[score]: values for score, values in maps.items() if score in SCORES}
    figure = _figure(9.2, 0.7 + len(drawn) * (0.8 + 0.22 * len(kinds)))
    for i, (name, values) in enumerate(drawn.items()):
        axes = _axes(figure, (len(drawn), 1, i + 1), "layer" if i == len(drawn) - 1 else "", "")
        axes.grid(visible=False)
        image = axes.imshow(values, aspect="auto", cmap="cividis", vmin=0, vmax=100, interpolation="nearest")
        _ticks(axes, "x", [str(layer) for layer in layers], most=32)
        _ticks(axes, "y", kinds)
        axes.set_title(name, loc="left", fontsize=10, color=INK)
    _colour_bar(figure, image, "percent")
    return _drawn(figure, form)


def module_layer(name: str) -> int:
    """The layer a module is in: the first number of its dotted name."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def module_kind(name: str) -> str:
    """What a module is within its layer, such as "mlp.up_proj"."""
    parts = name.split(".")
    place = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[place + 1 :])


def _ticks(axes: Axes, axis: Literal["x", "y"], names: Sequence[str], most: int = 20) -> None:
    """Ticks with these names, or some of them."""
    step = -(-len(names) // most)
    set_ticks = axes.set_xticks if axis == "x" else axes.set_yticks
    set_ticks(range(0, len(names), step), list(names[::step]))


def _write_values(axes: Axes, values: np.ndarray) -> None:
    """Numbers in a heat map's cells, readable on their colours (of cividis, 0 to 100)."""
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            colour = INK if value > 55 else "white"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7.5, color=colour)


def _colour_bar(figure: Figure, image: Any, name: str) -> None:
    bar = figure.colorbar(image, ax=figure.axes, shrink=0.9, pad=0.02)
    bar.set_label(name, fontsize=9, color=INK)
    bar.ax.tick_params(labelsize=8.5, colors=INK)
    bar.outline.set_visible(False)


def _figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, outside pyplot's global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib; install it with: pip install 'rledit-env[report]'") from error
    return Figure(figsize=(width, height), dpi=160, layout="constrained")


def _axes(figure: Figure, place: tuple[int, int, int], x: str, y: str) -> Axes:
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


def _legend(axes: Axes, columns: int = 1, above: bool = False) -> None:
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1.0)} if above else {"loc": "best"}
    axes.legend(frameon=False, fontsize=8.5, ncols=columns, labelcolor=INK, **place)


def _drawn(figure: Figure, form: Form) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------------ pages


class Report:
    """An HTML page that grows from top to bottom and holds its pictures itself. All text is escaped.

    Args:
        title: the page's heading.
        lead: the sentence below it.
    """

    def __init__(self, title: str, lead: str = "") -> None:
        self.title = title
        self._parts = [f"<h1>{html.escape(title)}</h1>"]
        if lead:
            self._parts.append(f'<p class="lead">{html.escape(lead)}</p>')

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        """Add a paragraph."""
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Any]], strong: Sequence[int] = ()) -> None:
        """Add a table. Numbers are set to the right, True and False become ✓ and ✗.

        Args:
            header: the columns' names.
            rows: cells of each row, as many as columns.
            strong: indices of the rows to set in bold.

        Raises:
            ValueError: a row has more or fewer cells than the header.
        """
        for i, row in enumerate(rows):
            if len(row) != len(header):
                raise ValueError(f"row {i} of the table has {len(row)} cells; give {len(header)}, as the header has")
        numeric = [bool(rows) and all(_is_number(row[c]) for row in rows) for c in range(len(header))]
        self._parts.append('<div class="wide"><table><thead><tr>')
        self._parts += [
            f'<th class="number">{html.escape(name)}</th>' if right else f"<th>{html.escape(name)}</th>"
            for name, right in zip(header, numeric, strict=True)
        ]
        self._parts.append("</tr></thead><tbody>")
        for i, row in enumerate(rows):
            self._parts.append('<tr class="strong">' if i in strong else "<tr>")
            self._parts += [_cell(value, right) for value, right in zip(row, numeric, strict=True)]
            self._parts.append("</tr>")
        self._parts.append("</tbody></table></div>")

    def code(self, text: str) -> None:
        """Add text to be read letter by letter, such as a command."""
        self._parts.append(f"<pre>{html.escape(text)}</pre>")

    def picture(self, png: bytes, caption: str) -> None:
        """Add a picture with its caption, which is its text for readers who do not see it, too."""
        data = base64.b64encode(png).decode()
        text = html.escape(caption)
        self._parts.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'
        )

    def html(self) -> str:
        """The whole page."""
        body = "\n".join(self._parts)
        return _PAGE.format(generator=GENERATOR, title=html.escape(self.title), style=_STYLE, body=body)

    def write(self, path: str | Path) -> Path:
        """Write the page, making its folder; returns its absolute path.

        Raises:
            FileExistsError: there is a file that is no such page.
        """
        path = Path(path).resolve()
        check_page(path)
        write_text(path, self.html())
        return path


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _cell(value: Any, right: bool) -> str:
    if isinstance(value, bool):
        return '<td class="yes">✓</td>' if value else '<td class="no">✗</td>'
    shown = "–" if value is None else shown_number(value) if isinstance(value, float) else html.escape(str(value))
    return f'<td class="number">{shown}</td>' if right else f"<td>{shown}</td>"


def shown_number(value: float) -> str:
    """A score or a time as tables show it: one decimal, or two significant digits below 1."""
    return f"{value:.1f}" if abs(value) >= 1 or value == 0 else f"{value:.2g}"


Table = tuple[list[str], list[list[Any]]]


def score_table(scores: Mapping[str, Mapping[str, Any]]) -> Table:
    """Header and rows of editors' scores.

    Args:
        scores: editor's name → its scores by the names of ``SCORES``, and "seconds" a fact (None if it edited none).
    """
    columns = SCORES | ({PORTABILITY: "Portability"} if any(PORTABILITY in s for s in scores.values()) else {})
    rows = [[name, *(s.get(key) for key in columns), s.get("seconds")] for name, s in scores.items()]
    return ["", *columns.values(), "Seconds a fact"], rows


def answer_table(facts: Sequence[EditRecord], before: Sequence[str], after: Sequence[str]) -> Table:
    """Header and rows of facts with the model's answers before and after editing, and whether the fact took.

    Args:
        facts: the facts.
        before, after: what `rledit_env.evaluation.metrics.continuations` gave; it is shown to the end of its phrase.
    """
    header = ["Prompt", "New fact", "Answer before", "Answer after", "Took"]
    return header, [
        [fact.prompt, fact.target, answer_of(b) or "(nothing)", answer_of(a) or "(nothing)", took(a, fact.target)]
        for fact, b, a in zip(facts, before, after, strict=True)
    ]


RETENTION_CAPTION = "Efficacy of every batch (left to right) as the stream goes on (top to bottom)."
MEMORY_CAPTION = "What is left of the first batch as later ones are edited."
LAYERS_CAPTION = "How far the edited weights moved: each layer's at the end, and each module's along the stream."
GENERAL = {  # scores of a task that tables show: key → name
    "perplexity": "perplexity", "kl": "KL from the unedited model, nats", "f1": "F1", "f1_calibrated": "F1, calibrated",
}  # fmt: skip


def general_table(scores: Mapping[int, Mapping[str, Mapping[str, float]]], most: int = 6) -> Table:
    """Header and rows of general ability, a column a measurement (the first, the last, and some between).

    Args:
        scores: batches edited → scores, as `rledit_env.evaluation.general.GeneralEvery` gives them.
        most: columns shown.
    """
    steps = sorted(scores)
    if len(steps) > most:
        steps = [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]
    rows: list[list[Any]] = []
    for task, first in scores[steps[0]].items():
        if "original_perplexity" in first:
            names = {key: f"{NAMES.get(task, task)}, {GENERAL[key]}" for key in ("perplexity", "kl")}
        elif "f1_calibrated" in first:
            names = {key: f"{task}, {GENERAL[key]}" for key in ("f1", "f1_calibrated")}
            names |= {"mcc": f"{task}, MCC"} if task == "cola" else {}
        else:
            names = {key: f"{task}, {key}" for key in first}
        rows += [[name, *(float(scores[step][task][key]) for step in steps)] for key, name in names.items()]
    return ["", *("before" if step == 0 else f"after {step}" for step in steps)], rows


def divergence_table(divergences: Mapping[str, Mapping[str, float | None]]) -> Table:
    """Header and rows of what editing did to an LLM on texts that it did not edit, a row a text.

    Args:
        divergences: text → `SelfDrift.as_dict`, as `rledit_env.evaluation.general.drifts` gives them; None where a
            number is not finite.
    """
    header = ["", GENERAL["kl"], "perplexity before", "perplexity after"]
    return header, [
        [NAMES.get(text, text), *(drift[key] for key in ("kl", "original_perplexity", "perplexity"))]
        for text, drift in divergences.items()
    ]


def editing_report(
    lead: str,
    scores: Mapping[str, Mapping[str, Any]],
    answers: Table,
    curves: Mapping[str, Curve],
    drifts: Mapping[str, Curve],
    settings: Mapping[str, Any],
    source: str,
    retention: Retention | None = None,
    module_drift: Mapping[str, Sequence[float]] | None = None,
    general: Mapping[int, Mapping[str, Mapping[str, float]]] | None = None,
) -> Report:
    """The page about one agent that learned to edit and then edited a stream; the last editor's row is set in bold.

    Args:
        lead: a sentence on what was done.
        scores: as in :func:`score_table`.
        answers: as :func:`answer_table` gives them.
        curves: as :func:`read_curves` gives them; may be empty.
        drifts: as in :func:`drift_curves`.
        settings: what the run was made with.
        source: where the facts came from, in words.
        retention: of the last editor's batches, if measured.
        module_drift: as in :func:`layer_drift`, of the last editor.
        general: as in :func:`general_table`, of the last editor.
    """
    page = Report("Lifelong editing of a language model", lead)
    page.table(*score_table(scores), strong=[len(scores) - 1])
    page.picture(score_bars(scores), "Scores on the edited facts after the whole stream.")
    page.paragraph(
        "Efficacy: edited prompts where the new answer is more probable than the old one. Generalization: the same on "
        "paraphrases. Specificity: neighbouring facts that still prefer their own answer. Exact match: the answer "
        "written freely begins with the new one and ends there."
    )
    page.heading("Facts of the stream")
    page.paragraph("Drawn evenly from the stream, whatever became of them; the new facts are false on purpose. "
                   f"{MEANING[0].upper()}{MEANING[1:]}.")
    page.table(*answers)
    if picture := learning_curves(curves):
        page.heading("Learning")
        page.picture(picture, "Losses on the training streams, and scores on facts kept back to choose the checkpoint.")
    if retention is not None:
        page.heading("Retention")
        page.picture(retention_map(retention), RETENTION_CAPTION)
        page.picture(memory_curve(retention), MEMORY_CAPTION)
    page.heading("Drift")
    page.picture(drift_curves(drifts), "How far the edited weights moved from the original ones along the stream.")
    if module_drift and all(module_drift.values()):
        page.picture(layer_drift(module_drift), LAYERS_CAPTION)
    if general:
        page.heading("General ability")
        page.paragraph("Text that the model wrote before any editing, that people wrote, and what the model answered "
                       "before in its chat template, if it has one: how it takes them by batches edited.")
        page.table(*general_table(general))
    page.heading("Data, settings and versions")
    page.paragraph(f"Data: {source}.")
    page.table(["Setting", "Value"], [[name, str(value)] for name, value in settings.items()])
    page.table(["Package", "Version"], list(versions().items()))
    return page


def return_table(returns: Mapping[str, Sequence[float]], steps: Mapping[str, int]) -> Table:
    """Header and rows of agents' returns on the same streams, compared stream by stream with the first agent's.

    Args:
        returns: agent's name → its return on every stream.
        steps: agent's name → environment steps it learned from.
    """
    header = ["", "Environment steps", "Mean return", "Above the first", "95 % from", "to"]
    first = next(iter(returns.values()))
    rows: list[list[Any]] = []
    for name, values in returns.items():
        above = np.subtract(values, first)
        low, high = bootstrap_interval(above)
        rows.append([name, steps.get(name, 0), float(np.mean(values)), float(above.mean()), low, high])
    return header, rows


def bootstrap_interval(values: Sequence[float] | np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    """The 95 % interval of a mean: quantiles of the means of samples drawn with replacement, the same at every call."""
    drawn = np.random.default_rng(0).choice(np.asarray(values, float), (draws, len(values))).mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def returns_report(
    lead: str,
    returns: Mapping[str, Sequence[float]],
    steps: Mapping[str, int],
    curves: Mapping[str, Curve],
    levels: Mapping[str, float],
    settings: Mapping[str, Any],
    source: str,
) -> Report:
    """The page about algorithms that learned to edit, compared by their returns on the same held-out streams.

    Args:
        lead: a sentence on what was done.
        returns, steps: as in :func:`return_table`.
        curves, levels: as in :func:`return_curves`.
        settings: what the run was made with.
        source: where the facts came from, in words.
    """
    page = Report("Standard algorithms as editors", lead)
    page.table(*return_table(returns, steps))
    count = len(next(iter(returns.values())))
    page.paragraph(
        f"Mean returns over {count} held-out streams, the same for all; a return is minus the losses that the reward "
        "weighs, so that more is better. The interval is a bootstrap's over the streams, of the difference from the "
        "first row stream by stream."
    )
    page.heading("Learning")
    page.picture(
        return_curves(curves, levels),
        "Mean return on held-out streams, others than the table's, over the environment steps learned from. Dashed: "
        "what does not learn step by step, on the same streams.",
    )
    page.heading("Data, settings and versions")
    page.paragraph(f"Data: {source}.")
    page.table(["Setting", "Value"], [[name, str(value)] for name, value in settings.items()])
    page.table(["Package", "Version"], list(versions().items()))
    return page


def text_table(header: Sequence[str], rows: Sequence[Sequence[Any]], widest: int = 48) -> str:
    """The same table for a terminal; cells longer than ``widest`` characters are cut with an ellipsis."""
    cells = [[_text(value, widest) for value in row] for row in (header, *rows)]
    widths = [max(len(row[c]) for row in cells) for c in range(len(header))]
    right = [bool(rows) and all(_is_number(row[c]) for row in rows) for c in range(len(header))]
    lines = [
        "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "─" * max(map(len, lines)), *lines[1:]])


def _text(value: Any, widest: int) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = "–" if value is None else shown_number(value) if isinstance(value, float) else str(value)
    return text if len(text) <= widest else text[: widest - 1] + "…"


_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width">{generator}
<title>{title}</title>
<style>{style}</style></head>
<body>
{body}
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, "Segoe UI", "Helvetica Neue", sans-serif; color: #1f2933; background: #fff;
       max-width: 60rem; margin: 3rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-top: 1rem; border-top: 1px solid #d9dee3; }
.lead { font-size: 1.1rem; color: #52606d; margin: 0 0 1.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; margin: .8rem 0; }
th, td { text-align: left; padding: .45rem .8rem .45rem 0; border-bottom: 1px solid #e9edf0; vertical-align: top;
         overflow-wrap: break-word; }
th { font-weight: 600; color: #52606d; border-bottom: 2px solid #d9dee3; overflow-wrap: normal; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.strong td { font-weight: 650; }
.yes { color: #00795a; font-weight: 700; } .no { color: #b3402a; font-weight: 700; }
pre { background: #f4f6f8; padding: .8rem 1rem; font-size: .88rem; white-space: pre-wrap; overflow-wrap: anywhere; }
figure { margin: 1rem 0 1.4rem; } img { width: 100%; height: auto; }
figcaption { font-size: .88rem; color: #52606d; }
@media (max-width: 40rem) {
  body { margin: 1.2rem auto; padding: 0 .9rem; }
  h1 { font-size: 1.5rem; }
  table { font-size: .82rem; } th, td { padding-right: .5rem; }
  figure { overflow-x: auto; } img { min-width: 36rem; }
}
@media print {
  body { font-size: 11pt; max-width: none; margin: 0; padding: 0; }
  .wide { overflow: visible; }
  h2 { break-after: avoid; } figure, tr { break-inside: avoid; }
}
"""
