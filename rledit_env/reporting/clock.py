"""Says what a long run does, how long it has taken and how much time is left, in a terminal and in a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable


class Clock:
    """The time of a run that must end by a limit.

    Args:
        seconds: the time from now until the run's end; :meth:`expect` corrects it.
        now: the time in seconds.
    """

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self.start = now()
        self.end = self.start + seconds

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._now() - self.start

    @property
    def left(self) -> float:
        """Seconds until the end; 0 after it."""
        return max(0.0, self.end - self._now())

    def expect(self, seconds: float) -> None:
        """Set the end: the rest of the run takes this many seconds from now."""
        self.end = self._now() + seconds

    def say(self, text: str) -> None:
        """Print what happens next, with the time gone and the time left. The line appears at once, in a file, too."""
        print(f"[{duration(self.elapsed)}, about {duration(self.left)} left] {text}", flush=True)


def duration(seconds: float) -> str:
    """A time as text: "48 s", or "7.5 min" from 100 seconds on."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def flush_lines() -> None:
    """Write every printed line at once, even where the output is a file and would be collected in blocks."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(line_buffering=True)
