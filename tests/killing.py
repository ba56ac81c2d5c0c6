"""Runs a task in processes that are killed just before chosen changes of its files, and once to its end.

The processes are forked from one that has imported all it needs, so that a kill costs no start of Python; that one has
run nothing, so that no thread is lost in the fork.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SERVER = """
import os, sys, traceback, torch
from pathlib import Path
torch.set_num_threads(1)
from {module} import {task} as task
print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        os.dup2(2, 1)  # what the task prints is none of the answers
        try:
            Path(line.strip() + ".result").write_text(task(Path(line.strip())))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Runner:
    """Starts the task's processes one after another."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self.server = server

    def run(self, folder: Path) -> tuple[int, str | None]:
        """The exit code, and what the task returned (None where it was killed)."""
        assert self.server.stdin is not None and self.server.stdout is not None
        print(folder, file=self.server.stdin, flush=True)
        code = int(self.server.stdout.readline())
        result = folder.with_name(folder.name + ".result")
        return code, result.read_text() if code == 0 else None


def import_paths() -> str:
    """PYTHONPATH with which another process can import what this one can: the packages, and the tests' folders."""
    return os.pathsep.join([str(ROOT), *sys.path])


@contextmanager
def forked(file: str, task: str) -> Iterator[Runner]:
    """Processes that run ``task(folder)`` of a test file, which returns a text."""
    code = SERVER.format(module=Path(file).stem, task=task)
    server = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": import_paths(), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert server.stdout is not None and server.stdout.readline() == "ready\n"
        yield Runner(server)
    finally:
        server.kill()
        server.wait()


def die_at(folder: Path, change: int) -> None:
    """Let this process die just before its change-th change of a file in the folder (from 1; 0 or less: never)."""
    left = change

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event == "open":
            changes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        else:
            changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
        if changes and str(folder) in str(arguments[0]):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def assert_killed_runs_end_alike(runner: Runner, folder: Path, moments: Iterable[int]) -> list[set[str]]:
    """Kill the task just before each of these changes of its files, then run it to its end: it returns what the
    uninterrupted run returns.

    The task is to call :func:`die_at` with the number in its folder's name, "at N".

    Returns:
        For each kill, the beginnings (up to the first hyphen) of the names that it left in the folder.
    """
    code, expected = runner.run(folder / "at 0")
    assert code == 0
    left = []
    for moment in moments:
        killed = folder / f"at {moment}"
        assert runner.run(killed)[0] == -signal.SIGKILL, f"the run has fewer than {moment} changes of files"
        left.append({path.name.split("-")[0] for path in killed.iterdir()})
        assert runner.run(killed.rename(folder / f"at -{moment}")) == (0, expected), f"killed before change {moment}"
    return left
