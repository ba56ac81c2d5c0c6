"""Sessions: the session of each tab, at most so many at a time."""

from __future__ import annotations

import threading

from rledit_env.playground.choice import Choice, Prepare
from rledit_env.playground.models import FrozenModels
from rledit_env.playground.session import Session
from rledit_env.playground.turns import Turns


class Sessions:
    """The sessions of the open tabs, by the tabs' names.

    Args:
        prepare: loads the model, and prepares the editor.
        models: the models that sessions share.
        most: the largest number of sessions.
    """

    def __init__(self, prepare: Prepare, models: FrozenModels, most: int) -> None:
        self._prepare, self._models, self._most = prepare, models, most
        self._turns, self._mutex = Turns(), threading.Lock()
        self._by_tab: dict[str, Session | None] = {}  # None: being loaded

    def get(self, tab: str) -> Session:
        """The tab's session.

        Raises:
            ValueError: the tab has loaded no model.
        """
        session = self._by_tab.get(tab)
        if session is None:
            raise ValueError("no model is loaded in this tab; choose a model and an editor, and press Load")
        return session

    def open(self, tab: str, choice: Choice) -> Session:
        """A new session for the tab, in place of the one that it had.

        Raises:
            ValueError: too many tabs have a session; or as for `Session`, and the tab keeps the one that it had.
        """
        with self._mutex:
            if tab in self._by_tab and self._by_tab[tab] is None:
                raise ValueError("this tab is loading a model already; wait until it is done")
            before = self._by_tab.get(tab)
            if tab not in self._by_tab and len(self._by_tab) >= self._most:
                raise ValueError(f"{len(self._by_tab)} tabs have a model, and no more may have one: each needs memory. "
                                 f"Close one of them, or start again with --max-tabs {self._most + 1}")
            self._by_tab[tab] = None
        session = None
        try:
            session = Session(choice, self._prepare, self._models, self._turns)
            return session
        finally:
            with self._mutex:
                closed = tab not in self._by_tab  # while the model was loaded
                if session is None and before is None or closed:
                    self._by_tab.pop(tab, None)
                else:
                    self._by_tab[tab] = session or before
            for ended in (session if closed else None, before if closed or session is not None else None):
                if ended is not None:
                    ended.close()

    def close(self, tab: str, seconds: float = 0.0) -> None:
        """Free the tab's session, if it has one; arguments as for :meth:`Session.close`."""
        with self._mutex:
            session = self._by_tab.pop(tab, None)
        if session is not None:
            session.close(seconds)

    def close_all(self) -> None:
        """Free all sessions, after a few seconds for what they are at work on."""
        for tab in list(self._by_tab):
            self.close(tab, seconds=5)

    def __len__(self) -> int:
        return len(self._by_tab)
