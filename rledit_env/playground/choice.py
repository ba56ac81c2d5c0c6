"""What a tab has chosen, and the interface of what prepares the editor for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from agents import Agent
from agents.running.editing import StreamSettings
from rledit_env.knowledge.facts import Facts
from rledit_env.lm.editable import EditableLM
from rledit_env.type_aliases import JsonObject

BATCH_SIZE = 10


@dataclass(frozen=True)
class Choice:
    """A model, an editor, and how it edits.

    Attributes:
        model: registry name, hub id or folder.
        editor: "default", a trained agent's folder, or the name of an editor that needs no training.
        chat: None: facts are edited as plain text; "only": as chat questions; "also": both ways.
        batch_size: facts a batch.
        step_size: step size of an editor that needs no training; None: it is searched for.
    """

    model: str
    editor: str
    chat: str | None = None
    batch_size: int = BATCH_SIZE
    step_size: float | None = None


class Prepared(Protocol):
    """A model and an agent that is ready to edit it, such as `rledit_env.cli.editing.Editing`."""

    @property
    def lm(self) -> EditableLM: ...

    @property
    def agent(self) -> Agent: ...

    @property
    def settings(self) -> StreamSettings:
        """Arguments of `agents.edit_facts`."""
        ...

    @property
    def identity(self) -> JsonObject:
        """What else the ledger records of the editor."""
        ...

    @property
    def notes(self) -> Sequence[str]: ...


class Prepare(Protocol):
    """Prepares the editor of a choice, as `rledit edit` does."""

    def check(self, choice: Choice) -> None:
        """Check a choice before anything is loaded, and fetch its model if that is not on this computer yet.

        Raises:
            ValueError, OSError, ModelError: the model or the editor is unknown, an option does not go with it, or the
                model cannot be fetched.
        """

    def load(self, choice: Choice) -> EditableLM:
        """The unedited model."""
        ...

    def __call__(self, choice: Choice, facts: Facts, progress: Callable[[str], None]) -> Prepared:
        """The model and the editor, ready to edit.

        Args:
            choice: the choice.
            facts: the facts to be edited first.
            progress: called between parts of long work with what is done; may raise, to end it.

        Raises:
            ValueError, OSError: the editor does not fit the model or the facts.
        """
        ...
