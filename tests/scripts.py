"""Runs a script as `python script.py …` does, but within this process: starting Python and importing torch takes longer
than most of what the tests run."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch


@dataclass(frozen=True)
class Finished:
    """What a script left behind.

    Attributes:
        code: its exit code.
        stdout: what it printed.
        stderr: what it printed there, with the traceback of an exception that ended it.
    """

    code: int
    stdout: str
    stderr: str


def run_script(path: Path, *arguments: str, folder: Path | None = None) -> Finished:
    """Run a script with these arguments, in ``folder`` (the current one by default)."""
    out, err = io.StringIO(), io.StringIO()
    with _as_main_script(path, arguments, folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(str(path), run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = _exit_code(stop)
        except Exception:
            traceback.print_exc()
            code = 1
    return Finished(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _as_main_script(path: Path, arguments: tuple[str, ...], folder: Path | None) -> Iterator[None]:
    """The state that Python gives a script, and afterwards the one that was there before."""
    before, threads = Path.cwd(), torch.get_num_threads()
    with (
        mock.patch.object(sys, "argv", [str(path), *arguments]),
        mock.patch.object(sys, "path", [str(path.parent), *sys.path]),
        warnings.catch_warnings(),
    ):
        os.chdir(folder or before)
        try:
            yield
        finally:
            os.chdir(before)
            torch.set_num_threads(threads)


def _exit_code(stop: SystemExit) -> int:
    """As the interpreter sees it: a text is printed, and is a failure."""
    if isinstance(stop.code, str):
        print(stop.code, file=sys.stderr)
        return 1
    return stop.code or 0
