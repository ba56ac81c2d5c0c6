"""Job: long work in a thread of its own, watched from the page."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Job:
    """Runs a function in a thread.

    Args:
        work: the function. It is given a function to call with what it is doing, and returns what was done.

    Attributes:
        doing: what it is doing.
        result: what was done; None before the end, or after an error.
        error: the error that ended it.
    """

    def __init__(self, work: Callable[[Callable[[str], None]], str]) -> None:
        self.doing, self.result, self.error = "waiting for its turn", "", None  # type: str, str, BaseException | None
        self._work, self._began = work, time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self._work(self._say)
        except BaseException as error:  # shown on the page
            self.error = error

    def _say(self, doing: str) -> None:
        self.doing = doing

    @property
    def seconds(self) -> int:
        """Whole seconds since it began."""
        return int(time.monotonic() - self._began)

    def ended(self, seconds: float) -> bool:
        """Whether the work is done, after waiting for it for at most so long."""
        self._thread.join(seconds)
        return not self._thread.is_alive()
