"""What the page's buttons do, each for the tab that they were pressed in."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from rledit_env.knowledge.facts import Facts, load_facts
from rledit_env.knowledge.fields import SKIP_ROWS
from rledit_env.lm.loading.registry import ModelError
from rledit_env.playground.choice import Choice
from rledit_env.playground.jobs import Job
from rledit_env.playground.session import Stopped
from rledit_env.playground.sessions import Sessions
from rledit_env.playground.tables import batch_label, facts_html, meter_html, status_html, waiting_html
from rledit_env.playground.typed import joined, typed_fact
from rledit_env.playground.view import View

SECONDS = 0.5  # between two looks at a job
FIELDS = 5  # of a typed fact
Work = Callable[[Callable[[str], None]], str]
ENDED = "(no answer: the model ends its text here)"


class Actions:
    """The buttons' functions. Gradio gives each the request of its tab, and shows the values that it returns or yields.

    Args:
        sessions: the sessions of the tabs.
    """

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    def load(self, request: gr.Request, *choice: Any) -> Iterator[list[Any]]:
        """Load the model; yields the message, the facts, the meter and the ledger."""
        tab = str(request.session_hash)

        def work(say: Callable[[str], None]) -> str:
            wanted = chosen(*choice)
            say(f"loading {wanted.model}")
            session = self._sessions.open(tab, wanted)
            return f"Loaded: {session.view.model}, to be edited by {session.view.editor}. Nothing is edited yet."

        job = Job(work)
        yield from _watched(job, lambda: self._view(tab))

    def add(self, waiting: list[Facts], *typed: str) -> list[Any]:
        """Let the typed fact wait; returns the message, the waiting facts, their list and the typed fields."""
        try:
            waiting = [*waiting, typed_fact(*typed)]
        except ValueError as error:
            return [_error(error), waiting, waiting_html(waiting), *typed]
        return ["", waiting, waiting_html(waiting), *[""] * FIELDS]

    def clear(self) -> list[Any]:
        """Forget the waiting and the typed facts; returns as :meth:`add`."""
        return ["", [], waiting_html([]), *[""] * FIELDS]

    def add_file(self, waiting: list[Facts], file: str | None) -> list[Any]:
        """Let the facts of a file wait; returns the message, the waiting facts, their list and the file."""
        try:
            loaded = load_facts(Path(str(file)))
        except (ValueError, OSError) as error:
            return [_error(error), waiting, waiting_html(waiting), None]
        waiting = [*waiting, loaded]
        return [status_html(f"Read: {len(loaded.dataset)} facts of {loaded.dataset.source}."), waiting,
                waiting_html(waiting), None]

    def edit(self, request: gr.Request, waiting: list[Facts], *fields: Any) -> Iterator[list[Any]]:
        """Edit the waiting and the typed facts; yields as :meth:`load`, then the waiting facts, their list and the
        typed fields."""
        tab, (*choice, prompt, target, subject, paraphrases, neighbours) = str(request.session_hash), fields
        typed = [prompt, target, subject, paraphrases, neighbours]

        def work(say: Callable[[str], None]) -> str:
            is_typed = bool(prompt.strip() or target.strip())
            parts = [*waiting, typed_fact(*typed)] if is_typed else waiting
            if not parts:
                raise ValueError("there is no fact to edit; type a prompt and its new answer, or load a file")
            session = self._sessions.get(tab)
            if session.choice != (wanted := chosen(*choice)):
                raise ValueError(f"loaded is {session.choice.model} with {session.choice.editor}, and the choice above "
                                 f"has changed ({_difference(session.choice, wanted)}); press Load, which starts "
                                 "afresh, or choose as before")
            return session.edit(joined(parts), say)

        job = Job(work)
        for shown in _watched(job, lambda: self._view(tab), lambda: self._stopping(tab)):
            yield [*shown, *[gr.skip()] * (2 + FIELDS)]
        if job.error is None:
            yield [*[gr.skip()] * 4, [], waiting_html([]), *[""] * FIELDS]

    def stop(self, request: gr.Request) -> str:
        """End an edit after its present batch; returns the message."""
        try:
            self._sessions.get(str(request.session_hash)).stop()
        except ValueError as error:
            return _error(error)
        return status_html("Stopping after the present batch …", "busy")

    def _stopping(self, tab: str) -> bool:
        try:
            return self._sessions.get(tab).is_stopping
        except ValueError:  # no model is loaded
            return False

    def undo(self, request: gr.Request, number: int | None) -> Iterator[list[Any]]:
        """Undo a batch; yields as :meth:`load`."""
        tab = str(request.session_hash)

        def work(say: Callable[[str], None]) -> str:
            session = self._sessions.get(tab)
            if number is None and session.view.batches:
                raise ValueError("no batch is chosen; choose one in the ledger's list")
            return session.undo(int(number or 0), say)

        yield from _watched(Job(work), lambda: self._view(tab))

    def ask(self, request: gr.Request, text: str, chat: bool, tokens: float) -> Iterator[list[Any]]:
        """Ask both models; yields the message and their answers."""
        answers: list[tuple[str, str]] = []

        def work(say: Callable[[str], None]) -> str:
            say("asking both models")
            unedited, edited = self._sessions.get(str(request.session_hash)).ask(text, chat, int(tokens))
            answers.append((unedited.strip() or ENDED, edited.strip() or ENDED))
            return "Asked."

        for shown in _watched(Job(work)):
            yield [shown[0], *(answers[0] if answers else [gr.skip()] * 2)]

    def save(self, request: gr.Request, form: str, folder: str) -> Iterator[Any]:
        """Save the model or its change; yields the message."""

        def work(say: Callable[[str], None]) -> str:
            say("saving")
            return self._sessions.get(str(request.session_hash)).save(form, folder)

        for shown in _watched(Job(work)):
            yield shown[0]

    def closed(self, request: gr.Request) -> None:
        """Free the session of a tab that was closed."""
        self._sessions.close(str(request.session_hash))

    def _view(self, tab: str) -> View | None:
        try:
            return self._sessions.get(tab).view
        except ValueError:  # no model is loaded
            return None


def chosen(model: str, editor: str, chat: str, batch_size: float | None, step_size: str) -> Choice:
    """The choice that the page's fields describe.

    Raises:
        ValueError: a field is empty, or no number.
    """
    if not (model or "").strip() or not (editor or "").strip():
        raise ValueError(f"no {'editor' if (model or '').strip() else 'model'} is chosen; choose one, and press Load")
    if batch_size is None:
        raise ValueError("facts a batch is empty; give a number, such as 10")
    try:
        step = float(step_size) if step_size.strip() else None
    except ValueError as error:
        raise ValueError(f"the step size {step_size!r} is no number; give one such as 0.01, or none") from error
    return Choice(model.strip(), editor.strip(), chat or None, int(batch_size), step)


def _difference(before: Choice, now: Choice) -> str:
    """The first setting that differs."""
    name = next(name for name, value in vars(before).items() if vars(now)[name] != value)
    return f"{name.replace('_', ' ')}: {vars(now)[name]}"


def _seen(view: View | None) -> list[Any]:
    """The facts, the meter and the ledger of a view; nothing new for None."""
    if view is None:
        return [gr.skip()] * 3
    batches = [(batch_label(batch), batch.number) for batch in view.batches]
    return [facts_html(view), meter_html(view), gr.Radio(choices=batches, value=None)]


def _watched(
    job: Job, view: Callable[[], View | None] = lambda: None, is_stopping: Callable[[], bool] = lambda: False
) -> Iterator[list[Any]]:
    """The message of a job and what :func:`_seen` gives, whenever one of them changes, until the job has ended."""
    said, seen = "", view()
    while not job.ended(SECONDS):
        stop = "; stopping after the present batch" if is_stopping() else ""
        now, message = view(), f"Working: {job.doing}{stop} … {job.seconds} s"
        if message != said or now is not seen:
            changed = now if now is not seen else None
            said, seen = message, now
            yield [status_html(message, "busy"), *_seen(changed)]
    yield [status_html(job.result) if job.error is None else _error(job.error), *_seen(view())]


def _error(error: BaseException) -> str:
    """An error as a message; one that the user cannot mend is printed with its traceback, too."""
    text = " ".join(str(error).split()).replace(f", or {SKIP_ROWS}", "")
    if not isinstance(error, (ValueError, OSError, ModelError, Stopped)):
        traceback.print_exception(error, file=sys.stderr)
        text = (f"{type(error).__name__}: {text or 'no message'}. That is an error of the program, or of its memory; "
                "the model holds whole batches only, and the terminal shows the traceback")
    return status_html(text[:1].upper() + text[1:], "error")
