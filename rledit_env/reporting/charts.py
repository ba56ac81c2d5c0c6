"""The charts of runs: curves, bars and heat maps, each returned as the bytes of a picture file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rledit_env.lm.names import module_kind, module_layer
from rledit_env.reporting.drawing import (
    COLOURS,
    FAINT,
    INK,
    Form,
    colour_bar,
    drawn,
    heat_map,
    legend,
    new_axes,
    new_figure,
    plot_curve,
    write_values,
)
from rledit_env.reporting.run_tables import SCORES
from rledit_env.type_aliases import JsonObject

if TYPE_CHECKING:
    from rledit_env.evaluation.retention import Retention

Curve = Sequence[tuple[float, float]]

MARKERS = "osD^vPX"
LEAST_KL = 1e-3  # nats a token; the left end of the axis of :func:`tradeoff_curves`
RETENTION_CAPTION = "Efficacy of every batch (left to right) as the stream goes on (top to bottom)."
MEMORY_CAPTION = "What is left of the first batch as later ones are edited."
STREAM_CAPTION = "Scores along the stream, on some of the facts edited so far, and the change of the rest of the model."
LAYERS_CAPTION = "How far the edited weights moved: each layer's at the end, and each module's along the stream."


def learning_curves(curves: Mapping[str, Curve], form: Form = "png") -> bytes | None:
    """A picture of training over policy updates, with the losses of the training streams on the left and the scores of
    the held-out stream on the right; None if neither was logged.

    Args:
        curves: the result of :func:`read_curves`.
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
    figure = new_figure(4.6 * len(panels), 3.2)
    for i, (title, unit, group) in enumerate(panels):
        axes = new_axes(figure, (1, len(panels), i + 1), "policy updates", unit)
        for colour, (name, curve) in zip((COLOURS[2], COLOURS[1], COLOURS[3]), group.items(), strict=False):
            plot_curve(axes, curve, colour, name)
        axes.locator_params(axis="x", integer=True)
        axes.set_title(title, loc="left", fontsize=10, color=INK, pad=24)  # above the legend
        legend(axes, columns=3, above=True)
    return drawn(figure, form)


def score_bars(results: Mapping[str, Mapping[str, float | None]], form: Form = "png") -> bytes:
    """A picture of scores in percent, as grouped bars with their values.

    Args:
        results: editor's name → its scores by the names of ``SCORES``; a score that is None or absent has no bar.
    """
    figure = new_figure(9.2, 3.4)
    axes = new_axes(figure, (1, 1, 1), "", "percent")
    width = 0.8 / len(results)
    for i, (editor, scores) in enumerate(results.items()):
        places = [
            (group + (i - (len(results) - 1) / 2) * width, float(score))
            for group, name in enumerate(SCORES)
            if (score := scores.get(name)) is not None
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
    legend(axes, columns=len(results), above=True)
    return drawn(figure, form)


def drift_curves(drifts: Mapping[str, Curve], form: Form = "png") -> bytes:
    """A picture of how far the edited weights moved along the stream.

    Args:
        drifts: editor's name → (facts edited, mean of ‖W − W₀‖ / ‖W₀‖ over the modules) pairs.
    """
    figure = new_figure(9.2, 2.9)
    axes = new_axes(figure, (1, 1, 1), "facts edited", "mean ‖W − W₀‖ / ‖W₀‖")
    for colour, (editor, curve) in zip(COLOURS[1:], drifts.items(), strict=False):
        plot_curve(axes, curve, colour, editor, marker="")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    legend(axes)
    return drawn(figure, form)


def return_curves(curves: Mapping[str, Curve], levels: Mapping[str, float], form: Form = "png") -> bytes:
    """A picture of held-out returns while agents learned.

    Args:
        curves: agent's name → (environment steps so far, mean return) pairs.
        levels: agents that do not learn step by step, as dashed lines: name → mean return.
    """
    figure = new_figure(9.2, 3.6)
    axes = new_axes(figure, (1, 1, 1), "environment steps", "mean return, held-out streams")
    for colour, (name, value) in zip((COLOURS[0], COLOURS[4], COLOURS[5]), levels.items(), strict=False):
        axes.axhline(value, color=colour, linewidth=1.6, linestyle="--", label=name)
    for colour, (name, curve) in zip((COLOURS[2], COLOURS[1], COLOURS[3]), curves.items(), strict=False):
        plot_curve(axes, curve, colour, name)
    axes.set_xlim(left=0)
    legend(axes, columns=len(curves) + len(levels), above=True)
    return drawn(figure, form)


def tradeoff_curves(
    curves: Mapping[str, Curve],
    levels: Mapping[str, float],
    bounds: Sequence[float] = (),
    broke: Mapping[str, Curve] | None = None,
    form: Form = "png",
) -> bytes:
    """A picture of score against divergence: one line for each editor, from its weakest strength to its strongest. In
    an SVG each line is a group with the id "editor-" and its number.

    Args:
        curves: editor's name → (KL in nats a token, score in percent) pairs, by strength; the axis of KL is
            logarithmic, and values below ``LEAST_KL`` are drawn at its left end.
        levels: editors without a strength, as dashed lines: name → score.
        bounds: values of KL to mark with thin vertical lines.
        broke: editor's name → the points where an update broke the model, as crosses.
    """
    figure = new_figure(9.2, 4.8)
    kl_name = "KL from the unedited model on its own text, nats a token"
    axes = new_axes(figure, (1, 1, 1), kl_name, "mean score, percent")
    axes.set_xscale("log")
    positive = [kl for group in (curves, broke or {}) for curve in group.values() for kl, _ in curve if kl > 0]
    least = max(min([*positive, *bounds, 1.0]) / 2, LEAST_KL)
    right = max([*positive, *bounds, 1.0]) * 1.5
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
    return drawn(figure, form)


def stream_curves(streams: Mapping[str, Sequence[JsonObject]], form: Form = "png") -> bytes:
    """A picture of scores along long streams: the mean score, the exact match and the divergence against the facts
    edited so far, a line for each stream.

    Args:
        streams: editor's name → the points of `rledit_env.evaluation.points.ScoreProbe`.
    """
    panels = [
        ("mean", "Mean of the scores", "percent"), ("exact_match", "Exact match", "percent"),
        ("kl", "KL on the model's own text", "nats a token"),
    ]  # fmt: skip
    figure = new_figure(11.4, 3.6)
    for place, (key, title, unit) in enumerate(panels, start=1):
        axes = new_axes(figure, (1, len(panels), place), "facts edited", unit)
        for i, (name, points) in enumerate(streams.items()):
            curve = [(point["facts"], point[key]) for point in points if point.get(key) is not None]
            if curve:
                plot_curve(axes, curve, (COLOURS[1:] * len(streams))[i], name, marker=MARKERS[i % len(MARKERS)])
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.set_xlim(left=0)
        if unit == "percent":
            axes.set_ylim(0, 103)
        else:
            axes.set_ylim(bottom=0)
        if place == 1:
            lines, names = axes.get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=min(len(names), 5) or 1, frameon=False, fontsize=8.5,
                  labelcolor=INK)  # fmt: skip
    return drawn(figure, form)


def retention_map(retention: Retention, form: Form = "png") -> bytes:
    """A heat map of every batch's Efficacy after later batches: batches from left to right, the stream's progress from
    top to bottom."""
    figure = new_figure(6.4, 4.6)
    axes = new_axes(figure, (1, 1, 1), "batch", "batches edited by then")
    batches = [str(batch + 1) for batch in range(retention.efficacy.shape[1])]
    image = heat_map(axes, retention.efficacy, batches, [str(edited) for edited in retention.edited])
    if retention.efficacy.size <= 150:
        write_values(axes, retention.efficacy)
    colour_bar(figure, image, "Efficacy, percent")
    return drawn(figure, form)


def memory_curve(retention: Retention, form: Form = "png") -> bytes:
    """A picture of the first batch's scores as later batches are edited; a thin line is the mean over all batches
    edited by then."""
    figure = new_figure(9.2, 3.0)
    axes = new_axes(figure, (1, 1, 1), "batches edited", "percent")
    lines = [
        ("first batch, Efficacy", retention.first_batch, COLOURS[2], 1.8),
        ("first batch, exact match (written freely)", retention.first_exact_match, COLOURS[1], 1.8),
        ("all batches so far, Efficacy", np.nanmean(retention.efficacy, axis=1), COLOURS[0], 1.2),
    ]
    for name, values, colour, width in lines:
        if not np.isnan(values).all():
            plot_curve(axes, zip(retention.edited, values, strict=True), colour, name, width)
    axes.set_ylim(-3, 103)
    axes.locator_params(axis="x", integer=True)
    legend(axes, columns=3, above=True)
    return drawn(figure, form)


def layer_drift(drift: Mapping[str, Sequence[float]], form: Form = "png") -> bytes:
    """A picture of how far each edited weight moved: by layer at the end, with one line for each kind of module, and
    along the stream.

    Args:
        drift: module → ‖W_t − W₀‖ / ‖W₀‖ after each batch.
    """
    figure = new_figure(9.2, 3.2)
    ends = new_axes(figure, (1, 2, 1), "layer", "‖W − W₀‖ / ‖W₀‖ at the end")
    along = new_axes(figure, (1, 2, 2), "batches edited", "‖W − W₀‖ / ‖W₀‖")
    for colour, kind in zip(COLOURS[1:] * 9, dict.fromkeys(module_kind(name) for name in drift), strict=False):
        members = {module_layer(name): values for name, values in drift.items() if module_kind(name) == kind}
        layers = sorted(members)
        plot_curve(ends, [(i, members[i][-1]) for i in layers], colour, kind)
        for i in layers:
            along.plot(range(1, len(members[i]) + 1), members[i], color=colour, linewidth=0.9, alpha=0.6)
    for axes in (ends, along):
        axes.set_ylim(bottom=0)
        axes.locator_params(axis="x", integer=True)
    legend(ends)
    return drawn(figure, form)


def norm_curve(norms: Sequence[float], form: Form = "png") -> bytes:
    """A picture of the size of each batch's update, √(Σ ‖ΔW‖_F²)."""
    figure = new_figure(9.2, 2.6)
    axes = new_axes(figure, (1, 1, 1), "batch", "norm of its update")
    axes.bar(range(1, len(norms) + 1), norms, color=COLOURS[5])
    axes.locator_params(axis="x", integer=True)
    return drawn(figure, form)


def module_map(
    kinds: Sequence[str], layers: Sequence[int], maps: Mapping[str, np.ndarray], form: Form = "png"
) -> bytes:
    """A picture of the scores of editing each module alone: one heat map for each score.

    Args:
        kinds: kinds of module, the rows.
        layers: the columns.
        maps: score → (kinds, layers) in percent; NaN stays empty. Only scores of ``SCORES`` are drawn.
    """
    by_title = {SCORES[score]: values for score, values in maps.items() if score in SCORES}
    figure = new_figure(9.2, 0.7 + len(by_title) * (0.8 + 0.22 * len(kinds)))
    for i, (title, values) in enumerate(by_title.items()):
        axes = new_axes(figure, (len(by_title), 1, i + 1), "layer" if i == len(by_title) - 1 else "", "")
        image = heat_map(axes, values, [str(layer) for layer in layers], kinds, most_columns=32)
        axes.set_title(title, loc="left", fontsize=10, color=INK)
    colour_bar(figure, image, "percent")
    return drawn(figure, form)
