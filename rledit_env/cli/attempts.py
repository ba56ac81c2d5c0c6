"""A comparison's folder, and attempts to compute its cells, alone or together with other processes."""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rledit_env.cli.command import say_loading, warn
from rledit_env.type_aliases import JsonObject

if TYPE_CHECKING:
    from agents.running.claims import Claims
    from agents.running.comparison import Comparison
    from agents.running.editors import Editor

TABLES_TURN = "tables"  # the claim of the process that writes the tables
COMPARISON = "comparison"  # the kind of its folder in the marker
SETTINGS = "comparison.json"


def begin(options: argparse.Namespace, comparison: Comparison) -> None:
    """Load the model and mark the folder, unless the model is loaded already."""
    from rledit_env.files import mark, write_text
    from rledit_env.reporting import versions

    if comparison.views.loaded:
        return
    say_loading(options.model)
    comparison.views.get(comparison.setting.edit_modules)
    settings = {**_settings(options, comparison.setting.test.source), "versions": versions()}
    options.out.mkdir(parents=True, exist_ok=True)
    with claims_of(comparison).turn(TABLES_TURN):
        mark(options.out, COMPARISON, command=options.command_line)
        write_text(options.out / SETTINGS, json.dumps(settings, indent=1) + "\n")


@dataclass(frozen=True)
class Job:
    """Cells that are computed one after another.

    Attributes:
        name: the editor's name, for the list of those that failed.
        title: its title.
        variants: the editor, or the editor at several strengths.
    """

    name: str
    title: str
    variants: Sequence[Editor]


def compute(
    options: argparse.Namespace, comparison: Comparison, jobs: Sequence[Job], seeds: Sequence[int],
    write: Callable[[], object], heading: str = "",
) -> list[str]:  # fmt: skip
    """Compute the missing cells together with the other processes that run the same command, until none is missing.

    A process takes a job that nobody works on before it helps with another one's cells. It waits for cells that others
    compute, and takes over those of a process that died.

    Args:
        options: the command's options.
        comparison: computes the cells.
        jobs: the cells by editor.
        seeds: the streams.
        write: writes the tables; called after every job.
        heading: what the jobs are, for the lines that say what is computed.

    Returns:
        The names of the jobs that failed in this process.
    """
    failed: list[str] = []
    waiting_for: dict[str, str] = {}
    while True:
        open_jobs = [job for job in jobs if job.name not in failed and _missing(comparison, job, seeds)]
        if not open_jobs:
            return failed
        others = claims_of(comparison).others()
        free = {job.name: [c for c in _missing(comparison, job, seeds) if c not in others] for job in open_jobs}
        untouched = [job for job in open_jobs if len(free[job.name]) == len(_missing(comparison, job, seeds))]
        helped = [job for job in open_jobs if free[job.name]]
        if not helped:
            if others != waiting_for:
                waiting_for = others
                warn(f"{_process(comparison)} waits for {_listed(others)}")
            time.sleep(_poll())
            continue
        job = (untouched or helped)[0]
        place = f"{len(jobs) - len(open_jobs) + 1}/{len(jobs)}"
        beside = f"; beside it {_listed(others)}" if others else ""
        warn(f"{heading}[{place}] {job.title} ({_process(comparison)}: {', '.join(free[job.name])}{beside})")
        if not attempt(options, job.title, lambda: _run(comparison, job, seeds)):  # noqa: B023
            failed.append(job.name)
        with claims_of(comparison).turn(TABLES_TURN):
            write()


def claims_of(comparison: Comparison) -> Claims:
    """The claims of a comparison that `rledit compare` made."""
    assert comparison.claims is not None
    return comparison.claims


def _run(comparison: Comparison, job: Job, seeds: Sequence[int]) -> None:
    for variant in job.variants:
        comparison.run(variant, seeds)


def _missing(comparison: Comparison, job: Job, seeds: Sequence[int]) -> list[str]:
    """The names of the job's cells that are not finished."""
    cells = [(variant, seed) for variant in job.variants for seed in seeds]
    return [comparison.claim_name(v, seed) for v, seed in cells if comparison.cell(v, seed) is None]


def _process(comparison: Comparison) -> str:
    """The name of this process in messages."""
    return f"process {claims_of(comparison).owner}"


def _listed(others: dict[str, str]) -> str:
    """Others' claims, by process."""
    by_owner: dict[str, list[str]] = {}
    for name, owner in others.items():
        by_owner.setdefault(owner, []).append(name)
    return "; ".join(f"{owner}: {', '.join(names)}" for owner, names in by_owner.items())


def _poll() -> float:
    from agents.running.claims import POLL

    return POLL


def own_device(device: str) -> str:
    """The device for this process: with "auto", the GPU of its number on the machine, if a launcher (torchrun,
    ``accelerate launch``) started one process for each."""
    import torch

    rank = os.environ.get("LOCAL_RANK")
    if device != "auto" or rank is None or not torch.cuda.is_available():
        return device
    return f"cuda:{int(rank) % torch.cuda.device_count()}"


def attempt(options: argparse.Namespace, title: str, work: Callable[[], object]) -> bool:
    """Call ``work``, and print the error if it fails; returns whether it succeeded."""
    try:
        work()
    except Exception as error:
        if options.traceback or not isinstance(error, (ValueError, OSError)):
            traceback.print_exc()
        warn(f"{title} failed: {' '.join(str(error).split())}")
        return False
    return True


def check_folder(options: argparse.Namespace, source: str) -> None:
    """Check that the cells in the folder belong to this comparison.

    Raises:
        ValueError: they belong to another one.
    """
    path = options.out / SETTINGS
    saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, value in _settings(options, source).items():
        if name in saved and saved[name] != value:
            raise ValueError(f"{options.out} holds a comparison with {name} {saved[name]!r}, not {value!r}; give "
                             "another --out, or the same settings")


def _settings(options: argparse.Namespace, source: str) -> JsonObject:
    """The settings that all cells of the folder share."""
    names = (
        "env", "model", "revision", "data", "train_data", "batches", "batch_size", "edit_modules", "dtype", "generate",
        "metrics", "text",
    )  # fmt: skip
    return {name: getattr(options, name) for name in names} | {"source": source}
