"""`rledit compare` shared by several processes: they divide the cells, and go on without one that is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import import_paths

from rledit_env import cli
from rledit_env.cli.attempts import own_device

COMPARE = [
    "compare", "--model", "tiny-llama", "--device", "cpu", "--dtype", "float32", "--env", "RLEdit-CounterFact-v0",
    "--batches", "2", "--batch-size", "2", "--no-generate", "--editors", "none", "fine-tuning", "ultraedit",
    "--seeds", "3",
]  # fmt: skip
CELLS = {f"{editor}/seed-{seed}.json" for editor in ("none", "fine-tuning", "ultraedit") for seed in range(3)}
TIMES = ("seconds_per_fact", "one_off_seconds")


def cells_of(out: Path) -> dict[str, dict[str, Any]]:
    """The finished cells without times, by their place."""
    cells = {}
    for path in sorted((out / "cells").rglob("*.json")):
        cell = json.loads(path.read_text(encoding="utf-8"))
        cells[path.relative_to(out / "cells").as_posix()] = {k: v for k, v in cell.items() if k not in TIMES}
    return cells


def holders_of(claims: Path) -> list[int]:
    """The processes that have claimed a cell."""
    pids = []
    for path in claims.glob("cells*"):
        try:
            pids.append(json.loads(path.read_text(encoding="utf-8").partition("\n")[0])["pid"])
        except (OSError, ValueError):  # given up meanwhile, or not written yet
            continue
    return pids


def start(command: list[str], errors: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "rledit_env.cli", *command], stdout=subprocess.DEVNULL, stderr=errors.open("wb"),
        env={**os.environ, "PYTHONPATH": import_paths(), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_two_processes_of_which_one_is_killed_give_the_cells_of_one_process_alone(tmp_path: Path) -> None:
    out, alone = tmp_path / "shared", tmp_path / "alone"
    processes = [start([*COMPARE, "--out", str(out)], tmp_path / f"errors-{i}") for i in range(2)]
    killed, deadline = None, time.monotonic() + 900
    while killed is None:  # until one has a cell, and something is finished
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.02)
        busy = [process for process in processes if process.pid in holders_of(out / "claims")]
        if len(busy) == 2 and list((out / "cells").rglob("*.json")):
            killed = busy[0]
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert 1 <= len(cells_of(out)) < len(CELLS)
    processes.append(start([*COMPARE, "--out", str(out)], tmp_path / "errors-2"))  # the same command again
    codes = [process.wait(timeout=900) for process in processes]
    assert sorted(codes) == [-signal.SIGKILL, 0, 0], [(tmp_path / f"errors-{i}").read_text() for i in range(3)]
    assert cli.main([*COMPARE, "--out", str(alone)]) == 0
    assert cells_of(out).keys() == CELLS
    assert cells_of(out) == cells_of(alone)
    assert not list((out / "claims").iterdir())
    lines = {i: (tmp_path / f"errors-{i}").read_text() for i in range(3)}
    for process, text in zip(processes, lines.values(), strict=True):
        for pid in re.findall(r"\(process \S+:(\d+): cells/", text):
            assert int(pid) == process.pid  # each says which cells it computes
    computed = [re.findall(r"(\S.*), stream (\d): efficacy", text) for text in lines.values()]
    assert len(CELLS) <= sum(map(len, computed)) <= len(CELLS) + 1  # at most the killed process's cell is there twice
    assert computed[1]  # the process that was not killed
    assert (out / "table.csv").read_text().count("\n") == (alone / "table.csv").read_text().count("\n") == 4


def test_an_editor_that_learns_is_trained_by_one_process_and_the_curve_is_divided_too(tmp_path: Path) -> None:
    command = [*COMPARE, "--curve", "--curve-batches", "2", "--strengths", "0.5", "1", "--seeds", "1"]
    command[command.index("--editors") + 1 : command.index("--seeds")] = ["none", "ultraedit", "rledit-untrained"]
    out, alone = tmp_path / "shared", tmp_path / "alone"
    processes = [start([*command, "--out", str(out)], tmp_path / f"errors-{i}") for i in range(2)]
    codes = [process.wait(timeout=900) for process in processes]
    assert codes == [0, 0], [(tmp_path / f"errors-{i}").read_text() for i in range(2)]
    assert cli.main([*command, "--out", str(alone)]) == 0
    assert cells_of(out / "curve") == cells_of(alone / "curve") and len(cells_of(out / "curve")) == 5
    assert cells_of(out) == cells_of(alone)
    assert not list((out / "claims").iterdir())


@pytest.mark.parametrize(
    ("device", "rank", "gpus", "expected"),
    [("auto", "5", 4, "cuda:1"), ("auto", "1", 2, "cuda:1"), ("auto", None, 2, "auto"), ("auto", "1", 0, "auto"),
     ("cuda:0", "1", 2, "cuda:0"), ("cpu", "1", 2, "cpu")],
)  # fmt: skip
def test_a_launcher_s_process_takes_the_gpu_of_its_number(
    device: str, rank: str | None, gpus: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert own_device(device) == expected
