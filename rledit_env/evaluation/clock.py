"""BatchClock: the time and the memory of every batch while a stream is edited."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch


def resident_bytes() -> int | None:
    """Anonymous resident memory of the process, in bytes; None where the system does not say it. Pages of files do not
    count, since the system may evict them."""
    if not sys.platform.startswith("linux"):
        return None
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    return None


class BatchClock:
    """Measures each batch of a stream: two callbacks of `agents.edit_stream`, :meth:`stop` before all others and
    :meth:`start` after them, so that the others' time does not count.

    Attributes:
        seconds: batch, counted from 1 → seconds of editing it; None for the batch in which a run was resumed.
        memory: batch → resident memory after it, in bytes (see :func:`resident_bytes`).
        device_memory: batch → the most memory of the CUDA device so far, in bytes; None without one.
    """

    def __init__(self) -> None:
        self.seconds: dict[int, float | None] = {}
        self.memory: dict[int, int | None] = {}
        self.device_memory: dict[int, int | None] = {}
        self._started: float | None = None

    def stop(self, edited: int) -> None:
        """Note the batch that has just been edited."""
        if edited:
            self.seconds[edited] = None if self._started is None else time.perf_counter() - self._started
            self.memory[edited] = resident_bytes()
            self.device_memory[edited] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None

    def start(self, edited: int) -> None:
        """Begin the next batch."""
        self._started = time.perf_counter()

    __call__ = stop

    def measured_at(self, edited: int) -> Sequence[float | None] | None:
        """Seconds, memory and device memory of a batch, for :meth:`take_up`."""
        if edited not in self.seconds:
            return None
        return [self.seconds[edited], self.memory[edited], self.device_memory[edited]]

    def take_up(self, edited: int, values: Sequence[float | None]) -> None:
        """Take over the batch of an interrupted run."""
        seconds, memory, device_memory = values
        self.seconds[edited] = seconds
        self.memory[edited] = None if memory is None else int(memory)
        self.device_memory[edited] = None if device_memory is None else int(device_memory)

    def seconds_of(self, first: int, last: int) -> float | None:
        """The mean seconds of the timed batches ``first`` to ``last``; None if none was timed."""
        known = [s for batch in range(first, last + 1) if (s := self.seconds.get(batch)) is not None]
        return sum(known) / len(known) if known else None
