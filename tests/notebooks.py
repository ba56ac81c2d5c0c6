"""Runs the notebooks in examples/: on the default model to keep their outputs, or in a test's process on a tiny model.

    python tests/notebooks.py                                   # all of them, in Jupyter's kernel; minutes
    python tests/notebooks.py examples/first_steps.ipynb

Outputs are kept without progress bars, and with a digest of the code that they belong to.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
PARAMETERS = "parameters"  # the tag of the cell whose values a test replaces
DIGEST = "code_sha256"  # in the notebook's metadata
KEPT_DATA = ("text/plain", "image/png")
WIDGET = "application/vnd.jupyter.widget-view+json"  # a progress bar
Notebook = dict[str, Any]


def read(path: Path) -> Notebook:
    notebook: Notebook = json.loads(path.read_text(encoding="utf-8"))
    return notebook


def write(path: Path, notebook: Notebook) -> None:
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def code_cells(notebook: Notebook) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def code_digest(notebook: Notebook) -> str:
    """SHA-256 of the code cells, by which the outputs belong to them."""
    return hashlib.sha256("\0".join(map(source, code_cells(notebook))).encode()).hexdigest()


def printed(notebook: Notebook) -> str:
    """All text in the notebook's outputs."""
    parts = []
    for output in [output for cell in code_cells(notebook) for output in cell["outputs"]]:
        parts += [output.get("text", ""), output.get("data", {}).get("text/plain", "")]
    return "".join("".join(part) for part in parts)


# -- in this process


@dataclass(frozen=True)
class Ran:
    """What a notebook left behind: its variables, and what it printed."""

    variables: dict[str, Any]
    output: str


def run(path: Path, folder: Path, **parameters: Any) -> Ran:
    """Run a notebook's cells, one after another, in ``folder``.

    Args:
        path: the notebook.
        folder: the current folder of its code.
        parameters: values for variables that its cell of parameters sets.

    Raises:
        ValueError: the cell of parameters sets no such variable.
    """
    variables: dict[str, Any] = {"__name__": "__main__"}
    out = io.StringIO()
    with _current_folder(folder), contextlib.redirect_stdout(out):
        for number, cell in enumerate(code_cells(read(path)), start=1):
            exec(compile(source(cell), f"{path.name}, code cell {number}", "exec"), variables)
            if PARAMETERS in cell["metadata"].get("tags", ()):
                unknown = sorted(parameters.keys() - variables.keys())
                if unknown:
                    raise ValueError(f"{path.name} has no parameter {', '.join(unknown)}")
                variables |= parameters
    return Ran(variables, out.getvalue())


@contextlib.contextmanager
def _current_folder(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


# -- in Jupyter's kernel


def execute(notebook: Notebook) -> Notebook:
    """The notebook with the outputs of a run in Jupyter's kernel, in an empty folder."""
    import nbformat
    from nbclient import NotebookClient

    node = nbformat.reads(json.dumps(notebook), as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(node, timeout=3600, kernel_name="python3", resources=resources, record_timing=False).execute()
    nbformat.validate(node)
    executed: Notebook = json.loads(nbformat.writes(node))
    return executed


def cleaned(notebook: Notebook) -> Notebook:
    """The notebook without progress bars, warnings and other noise, and with the digest of its code."""
    cells = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell = {**cell, "outputs": _joined([kept for output in cell["outputs"] if (kept := _kept(output))])}
        cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {**notebook, "cells": cells, "metadata": {
        "kernelspec": kernel, "language_info": {"name": "python"}, DIGEST: code_digest(notebook),
    }}  # fmt: skip


def _kept(output: dict[str, Any]) -> dict[str, Any] | None:
    if output["output_type"] == "stream":
        return output if output["name"] == "stdout" else None
    if "data" not in output:
        return output
    if WIDGET in output["data"]:
        return None
    data = {kind: value for kind, value in output["data"].items() if kind in KEPT_DATA}
    return {**output, "data": data, "metadata": {}}


def _joined(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The outputs, with texts printed one after another as one output, whenever they arrived."""
    joined: list[dict[str, Any]] = []
    for output in outputs:
        if output["output_type"] == "stream" and joined and joined[-1]["output_type"] == "stream":
            text = "".join(joined[-1]["text"]) + "".join(output["text"])
            joined[-1] = {**joined[-1], "text": text.splitlines(keepends=True)}
        else:
            joined.append(output)
    return joined


def main() -> None:
    for path in [Path(name) for name in sys.argv[1:]] or NOTEBOOKS:
        print(f"running {path.name}", flush=True)
        write(path, cleaned(execute(read(path))))


if __name__ == "__main__":
    main()
