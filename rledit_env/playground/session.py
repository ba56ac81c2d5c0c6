"""Session: one tab's model with its edits and their ledger."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rledit_env.evaluation.general import drifts
from rledit_env.files import whole_folder
from rledit_env.knowledge.facts import Facts
from rledit_env.lm.chat import ChatTemplate
from rledit_env.lm.forms import FORMS, save_forms
from rledit_env.outputs import try_outputs, whole
from rledit_env.playground.answers import Answers, answers_to, chat_template
from rledit_env.playground.choice import Choice, Prepare
from rledit_env.playground.models import FrozenModels
from rledit_env.playground.run import EditRun
from rledit_env.playground.turns import Turns
from rledit_env.playground.view import FactView, View

MOST_FACTS = 200  # of a tab; each is asked for after every edit
MOST_TOKENS = 400  # of an answer to a free question
Progress = Callable[[str], None]


class Busy(ValueError):
    """The session is editing, undoing or saving already."""


class Stopped(Exception):
    """The work was stopped, or its tab closed, before anything was changed."""


class Session:
    """A model that is edited, asked and saved from one tab. Every method may be called from any thread.

    Args:
        choice: the model, the editor, and how it edits.
        prepare: loads the model, and prepares the editor.
        models: the models that sessions share, and the texts that the divergence is measured on.
        turns: the turns in which all sessions compute.

    Raises:
        ValueError, OSError, ModelError: the choice cannot be used, or the model cannot be loaded.
    """

    def __init__(self, choice: Choice, prepare: Prepare, models: FrozenModels, turns: Turns) -> None:
        prepare.check(choice)
        self.choice, self._prepare, self._models, self._turns = choice, prepare, models, turns
        self._lock = threading.Lock()  # held by what changes or saves the model
        self._stop, self._closed = threading.Event(), threading.Event()
        self._run: EditRun | None = None  # from the first edit on
        self._before: list[Answers] = []  # the unedited model's answers, of all facts edited
        self._folder = Path(tempfile.mkdtemp(prefix="rledit-playground-"))
        try:
            with turns.turn():
                self._lm = prepare.load(choice)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        self.view = View(model=self._lm.name, editor=choice.editor, chat=chat_template(self._lm) is not None)

    # -- editing -----------------------------------------------------------------------------------------------------

    def edit(self, facts: Facts, progress: Progress) -> str:
        """Edit facts in batches, and ask for all facts again. A stop or an error leaves the last whole batch.

        Args:
            facts: the facts.
            progress: called with what is being done.

        Returns:
            What was done, in a sentence.

        Raises:
            Busy: the session is at work already.
            ValueError, OSError: the facts or the editor cannot be used; nothing was changed.
            Stopped: it was stopped before anything was changed.
        """
        records = facts.dataset.records
        with self._alone(), self._turns.turn():
            known = len(self._before)
            if known + len(records) > MOST_FACTS:
                raise ValueError(f"a tab takes {MOST_FACTS} facts; {known} were edited, and these are {len(records)}. "
                                 "Load the model again, or edit the file with: rledit edit --facts FILE --out DIR")
            run = self._run or self._begin(facts, progress)
            run.check(records)
            with run.lm.original_weights():
                before = answers_to(run.lm, records, self._parts(progress, "asking the unedited model", len(records)))
            progress(f"editing: 0 of {len(records)}")
            try:
                return run.edit(records, self._stop, self._parts(progress, "editing", len(records), False))
            finally:  # also after an error: the whole batches before it stay
                self._before += before[: len(run.records) - known]
                self._measure(progress)

    def stop(self) -> None:
        """End the edit after its present batch."""
        self._stop.set()

    @property
    def is_stopping(self) -> bool:
        """Whether an edit is to end after its present batch."""
        return self._stop.is_set() and self._lock.locked()

    def undo(self, number: int, progress: Progress) -> str:
        """Take a batch out again, counted from 1; returns what was done.

        Raises:
            Busy: the session is at work already.
            ValueError: there is no such batch, or it is undone already.
        """
        with self._alone(), self._turns.turn():
            self._edited("undo").undo(number)
            self._measure(progress)
            return f"Batch {number} is undone: its updates are out of the weights, to rounding."

    def _begin(self, facts: Facts, progress: Progress) -> EditRun:
        """Get the editor ready to edit the model."""
        progress("preparing the editor")

        def passing(message: str) -> None:
            progress(message)
            self._pass_on()

        prepared = self._prepare(self.choice, facts, passing)
        self._run = EditRun(prepared, self.choice, self._folder / "ledger")
        self._lm = prepared.lm
        return self._run

    # -- measuring -----------------------------------------------------------------------------------------------------

    def _measure(self, progress: Progress) -> None:
        """Ask for all facts at the present weights, measure the divergence, and show both in :attr:`view`."""
        run, lm = self._run, self._lm
        if run is None or self._closed.is_set():
            return
        records = run.records
        after = answers_to(lm, records, self._parts(progress, "asking the edited model", len(records), False))
        batches = run.batches()
        self.view = replace(
            self.view,
            facts=tuple(
                FactView(record, number, batches[number - 1].state == "edited", before, now)
                for record, number, before, now in zip(records, run.numbers(), self._before, after, strict=True)
            ),
            batches=tuple(batches), meter={}, notes=tuple(run.notes),
        )  # fmt: skip
        progress("measuring what else changed")
        self._turns.pass_on()
        self.view = replace(self.view, meter=drifts(lm, self._models.texts(lm)))

    def _parts(self, progress: Progress, what: str, of: int, may_stop: bool = True) -> Callable[[int], None]:
        """A function that is called between the parts of a long computation with the number of facts done."""

        def part(done: int) -> None:
            progress(f"{what}: {done} of {of}")
            self._pass_on(may_stop)

        return part

    def _pass_on(self, may_stop: bool = True) -> None:
        self._turns.pass_on()
        if may_stop and self._stop.is_set():
            raise Stopped("stopped before the first batch; the model was not changed")

    # -- asking and saving ---------------------------------------------------------------------------------------------

    def ask(self, prompt: str, chat: bool = False, tokens: int = 48) -> tuple[str, str]:
        """The greedy answers of the unedited and of the edited model to a text; also while the session edits, then
        between two batches.

        Raises:
            ValueError: the text is empty, too long, or does not go with the chat template, or the model has none.
        """
        if not prompt.strip():
            raise ValueError("there is no text to answer; write one")
        if not 1 <= tokens <= MOST_TOKENS:
            raise ValueError(f"{tokens} tokens were asked for; give 1 to {MOST_TOKENS}")
        with self._turns.turn():
            lm = self._lm
            text = ChatTemplate(lm.tokenizer, lm.name)(prompt) if chat else prompt
            length = len(lm.encode(text))
            if length + tokens > lm.context_length:
                raise ValueError(f"the text has {length} tokens, and {tokens} are to follow; {lm.name} takes "
                                 f"{lm.context_length} in all. Shorten the text")
            with lm.original_weights():
                before = lm.generate([text], extra=tokens)[0]
            return before, lm.generate([text], extra=tokens)[0]

    def save(self, form: str, folder: str) -> str:
        """Write the edited model ("model") or its change ("delta", "lora") into a new folder; returns what was written.

        Raises:
            Busy: the session is at work already.
            ValueError: nothing has been edited, or there is no such form.
            OSError: the folder cannot be written.
        """
        with self._alone(), self._turns.turn():
            self._edited("save")
            if form not in FORMS:
                raise ValueError(f"the form is {form!r}; choose one of {', '.join(FORMS)}")
            if not folder.strip():
                raise ValueError("no folder is named; write the path of a new folder")
            path = Path(folder.strip()).expanduser().absolute()
            try_outputs([whole("the folder", path)], [])
            with whole_folder(path, False, "edited model", "rledit playground") as work:
                saved = save_forms(self._lm, work, [form], None)
            return f"Written: {path}, {saved[form]['what']}."

    def _edited(self, what: str) -> EditRun:
        if self._run is None or not self._run.records:
            raise ValueError(f"nothing has been edited yet, so there is nothing to {what}; edit a fact first")
        return self._run

    # -- one at a time, and the end ------------------------------------------------------------------------------------

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Context of an action that changes or saves the model."""
        if not self._lock.acquire(blocking=False):
            raise Busy("this tab is at work already; wait until it is done, or press Stop")
        try:
            if self._closed.is_set():
                raise Stopped("the tab was closed")
            self._stop.clear()
            yield
        finally:
            self._lock.release()
            if self._closed.is_set():
                self._remove()

    def close(self, seconds: float = 0.0) -> None:
        """End what runs after its present batch; the session's files are freed when it has ended.

        Args:
            seconds: how long to wait for that.
        """
        self._closed.set()
        self._stop.set()
        if self._lock.acquire(timeout=seconds):
            try:
                self._remove()
            finally:
                self._lock.release()

    def _remove(self) -> None:
        if self._run is not None:
            self._run.close()
        shutil.rmtree(self._folder, ignore_errors=True)
