"""Turns: one computation at a time in this process, in the order in which they asked."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """A lock that is handed on in the order of asking.

    All sessions compute in turns: random states and caches of the libraries below are shared by a process's threads. A
    long computation passes its turn on between its parts, so that no other tab waits for the whole of it.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Event] = deque()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Context that is entered when it is this thread's turn."""
        self._take()
        try:
            yield
        finally:
            self._give_back()

    def pass_on(self) -> None:
        """Within a turn: let those who wait go first."""
        self._give_back()
        self._take()

    def _take(self) -> None:
        with self._mutex:
            if not self._taken:
                self._taken = True
                return
            mine = threading.Event()
            self._waiting.append(mine)
        mine.wait()

    def _give_back(self) -> None:
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().set()  # the lock stays taken, by the first who waits
            else:
                self._taken = False
