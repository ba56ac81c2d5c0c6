"""Finds hyperparameters of editors for a model, on held-out training facts, and writes the best into the model's file.

    python benchmarks/sweep.py --data ../shared/data --editors ultraedit ft-l --write agents/configs/smollm2-135m.json

A grid (benchmarks/grids.json, or --grids) lists settings and values for each editor, such as
{"ultraedit": {"config.step_size": [0.0005, 0.001], "env.steps_per_batch": [1, 3]}}; every combination is a point. Each
point edits one stream from the last fifth of the training split, on which nothing is trained. It is scored by the mean
of Efficacy, Generalization and Specificity after the last edit. The scores of points are stored: a sweep that was
interrupted, or ended by --minutes, computes only the missing points when it is started again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

import rledit_env.own_agents  # noqa: F401 - checks that `agents` is this package
from agents.running.comparison import Comparison, Setting, Views
from agents.running.editors import EDITORS, Editor, configured, find_configs, load_configs, merged
from rledit_env.evaluation.metrics import METRICS_VERSION
from rledit_env.files import write_text
from rledit_env.knowledge import held_out, load_knowledge
from rledit_env.reporting import text_table

HERE = Path(__file__).parent
ENV_IDS = {"counterfact": "RLEdit-CounterFact-v0", "zsre": "RLEdit-ZsRE-v0", "fever": "RLEdit-FEVER-v0"}
SCORES = ("mean", "efficacy", "generalization", "specificity", "drift", "seconds_per_fact")


@dataclass(frozen=True)
class Args:
    """Sweeps the grids of some editors."""

    editors: tuple[str, ...]
    """Editors by name, as `rledit compare` knows them."""
    data: str = "bundled"
    """As for `rledit compare`; only the training split is read."""
    kind: Literal["counterfact", "zsre", "fever"] = "counterfact"
    """Form of the facts."""
    model: str = "smollm2-135m"
    """Registry name, hub id or folder of the model."""
    dtype: str = "auto"
    """Precision of the frozen weights."""
    batches: int = 10
    """Batches in the stream that is edited for a point."""
    batch_size: int = 20
    """Facts in a batch."""
    seed: int = 0
    """Seed of this stream."""
    grids: Path = HERE / "grids.json"
    """File with the grids."""
    out: Path = Path("runs/sweep")
    """Folder for the scores of the points."""
    results: Path = HERE / "results" / "sweeps.json"
    """File for the scores of all points, by model, kind and editor."""
    write: Path | None = None
    """File of hyperparameters into which the best point is written; if not given, none is written."""
    minutes: float = math.inf
    """No new point is started after this many minutes."""
    threads: int = 1
    """Number of torch's threads."""


def points(grid: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Every combination of the values of a grid, as setting → value."""
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def entry_of(point: Mapping[str, Any]) -> dict[str, Any]:
    """The point as nested dictionaries: {"config.network.rank": 8} gives {"config": {"network": {"rank": 8}}}."""
    entry: dict[str, Any] = {}
    for name, value in point.items():
        *parents, last = name.split(".")
        inner = entry
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return entry


def compact(value: Any, width: int = 118, indent: int = 0) -> str:
    """JSON in which a value is on one line if it fits, and has one line per member otherwise."""
    line = json.dumps(value, ensure_ascii=False)
    if len(line) <= width or not isinstance(value, dict | list):
        return line
    named = {f"{json.dumps(k)}: ": v for k, v in value.items()} if isinstance(value, dict) else None
    pairs = named.items() if named is not None else (("", v) for v in value)
    members = [name + compact(v, width - 1 - len(name), indent + 1) for name, v in pairs]
    opened, closed = "[]" if named is None else "{}"
    inner = "".join(f"\n{' ' * (indent + 1)}{member}," for member in members)
    return f"{opened}{inner[:-1]}\n{' ' * indent}{closed}"


def score_of(cell: Mapping[str, Any]) -> float:
    """The score by which points are compared: the mean, or −∞ if the model broke."""
    return -math.inf if cell.get("diverged") or "mean" not in cell else float(cell["mean"])


class Sweep:
    """The points of one editor."""

    def __init__(self, args: Args, name: str, views: Views) -> None:
        self.args, self.name = args, name
        self.configs = load_configs(find_configs(args.model), args.kind)
        self.grid: dict[str, list[Any]] = json.loads(args.grids.read_text(encoding="utf-8"))[name]
        facts, self.held_out = held_out(load_knowledge(args.kind, args.data, "train", on_error="skip"))
        self.setting = Setting(
            ENV_IDS[args.kind], self.held_out, lambda: facts, args.batches, args.batch_size, generate=False
        )
        self.views = views

    def editor(self, point: Mapping[str, Any]) -> Editor:
        """The editor with the settings of a point; a trained editor is trained anew, not loaded."""
        entries = {**self.configs, self.name: merged(self.configs.get(self.name, {}), entry_of(point))}
        return replace(configured(EDITORS[self.name], entries), saved=None)

    def cell(self, point: Mapping[str, Any], compute: bool) -> dict[str, Any] | None:
        """The scores of a point; None if they are missing and ``compute`` is False."""
        editor, args = self.editor(point), self.args
        stream = f"{args.model}, {args.kind}, {self.held_out.source}, {args.batches}x{args.batch_size}"
        key = json.dumps([stream, editor.description()], sort_keys=True)
        folder = args.out / self.name.replace("*", "-starred") / hashlib.sha256(key.encode()).hexdigest()[:16]
        comparison = Comparison(self.setting, self.views, folder, progress_bar=False)
        if compute:
            comparison.run(editor, [args.seed])
        return comparison.cell(editor, args.seed)

    def run(self, deadline: float) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Compute missing points until the deadline; return all computed points with their scores, best first."""
        scored = []
        for point in points(self.grid):
            is_new = self.cell(point, compute=False) is None
            started = time.monotonic()
            cell = self.cell(point, compute=is_new and started < deadline)
            if cell is None:
                continue
            scored.append((point, cell))
            if is_new:
                scores = cell.get("not_applicable") or f"mean {cell['mean']:.2f}{' (broke)' * cell['diverged']}"
                print(f"[{time.monotonic() - started:4.0f} s] {self.name} {json.dumps(point)}: {scores}", flush=True)
        return sorted(scored, key=lambda pair: -score_of(pair[1]))

    def at_edge(self, point: Mapping[str, Any]) -> list[str]:
        """Settings whose value is the first or last of several numbers; a better value may be outside the grid."""
        numbers = {n: v for n, v in self.grid.items() if len(v) > 1 and all(isinstance(x, float) for x in v)}
        return [name for name, values in numbers.items() if point[name] in (values[0], values[-1])]


def record(args: Args, sweep: Sweep, scored: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Write the scores of all points into the file of results, and the best settings into that of hyperparameters."""
    point, best = scored[0]
    results = json.loads(args.results.read_text(encoding="utf-8")) if args.results.exists() else {}
    results[f"{args.model}/{args.kind}/{sweep.name}"] = {
        "facts": f"{args.batches}×{args.batch_size} of {sweep.held_out.source}, stream {args.seed}",
        "metrics_version": METRICS_VERSION,
        "grid": sweep.grid,
        "complete": len(scored) == len(list(points(sweep.grid))),
        "best": point,
        "at_edge": sweep.at_edge(point),
        "points": [
            {**p, "diverged": c.get("diverged"), **{s: round(c[s], 4) for s in SCORES if c.get(s) is not None}}
            for p, c in scored
        ],
    }
    write_text(args.results, compact(dict(sorted(results.items()))) + "\n")
    if args.write is None:
        return
    file = {"models": [args.model], "editors": {}}
    if args.write.exists():
        file = json.loads(args.write.read_text(encoding="utf-8"))
    note = (f"{args.kind}: best of {len(scored)} points on {args.batches}×{args.batch_size} held-out training facts, "
            f"mean {best['mean']:.1f} (benchmarks/results/sweeps.json)")
    file["editors"][sweep.name] = merged(file["editors"].get(sweep.name, {}), {**entry_of(point), "note": note})
    write_text(args.write, compact(file) + "\n")


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    deadline = time.monotonic() + 60 * args.minutes
    views = Views(args.model, args.dtype)
    sweeps = [Sweep(args, name, views) for name in args.editors]
    for sweep in sweeps:
        scored = sweep.run(deadline)
        if not scored or score_of(scored[0][1]) == -math.inf:
            print(f"{sweep.name}: no point is there, or none whose model held")
            continue
        print(text_table([*sweep.grid, *SCORES], [[*p.values(), *(c.get(s) for s in SCORES)] for p, c in scored]))
        if edge := sweep.at_edge(scored[0][0]):
            print(f"{sweep.name}: the best {' and '.join(edge)} is at the edge of the grid; widen it")
        record(args, sweep, scored)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
