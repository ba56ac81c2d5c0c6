"""A comparison's folder, and attempts to compute its cells."""

from __future__ import annotations

import argparse
import json
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from rledit_env.cli.command import say_loading, warn
from rledit_env.type_aliases import JsonObject

if TYPE_CHECKING:
    from agents.running.comparison import Comparison

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
    mark(options.out, COMPARISON, command=options.command_line)
    write_text(options.out / SETTINGS, json.dumps(settings, indent=1) + "\n")


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
