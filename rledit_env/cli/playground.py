"""`rledit playground`: a local page to edit facts on, and to look at what changed."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from rledit_env.cli.command import OK, Command, check_positive, say_loading
from rledit_env.cli.config_flags import CommandParser
from rledit_env.cli.editor_options import DEFAULT_MODEL, check_editor

if TYPE_CHECKING:
    from agents.running.strength import Trial
    from rledit_env.cli.editing import Editing
    from rledit_env.knowledge.facts import Facts
    from rledit_env.lm.editable import EditableLM
    from rledit_env.playground.choice import Choice
    from rledit_env.playground.models import FrozenModels

PORT, MAX_TABS = 7860, 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=DEFAULT_MODEL, help="the model that the page proposes: a registry name, a "
                        "hub id or a folder")
    parser.add_argument("--editor", default="default", metavar="NAME",
                        help="the editor that the page proposes: 'default', the agent that ships with the package for "
                        f"{DEFAULT_MODEL}; a trained agent's folder; or an editor that needs no training, such as "
                        "ultraedit, ft-m or memit")
    parser.add_argument("--port", type=int, default=PORT, help="port of the page; 0 takes a free one")
    parser.add_argument("--max-tabs", type=int, default=MAX_TABS, metavar="N",
                        help="the largest number of browser tabs with a model; each needs memory for its weights")
    parser.add_argument("--device", default="auto", help="such as 'cpu' or 'cuda:0'; 'auto' takes an accelerator")
    parser.add_argument("--dtype", default="stored",
                        help="precision of the frozen weights: a torch dtype, 'auto', or 'stored', the model's own")


def run(options: argparse.Namespace) -> int:
    check_positive(options, "max_tabs")
    if not 0 <= options.port <= 65535:
        raise ValueError(f"--port is {options.port}; give 0 (any free one) to 65535")
    check_gradio()
    from rledit_env.playground.models import FrozenModels
    from rledit_env.playground.server import serve
    from rledit_env.playground.sessions import Sessions

    models = FrozenModels()
    sessions = Sessions(Preparation(models, options.dtype, options.device), models, options.max_tabs)
    with serve(sessions, options.model, options.editor, options.port) as server:
        print(f"rledit playground: {server.address}", flush=True)
        print("Only this computer can reach it. Ctrl-C ends it.", flush=True)
        server.wait()
    return OK


def check_gradio() -> None:
    """Raise ValueError with the mend if Gradio is missing."""
    import importlib.util

    if importlib.util.find_spec("gradio") is None:
        raise ValueError('the page needs Gradio: pip install "rledit-env[playground]"')


class Preparation:
    """Prepares the editor that a tab has chosen, in the way of `rledit edit` and with its defaults.

    Args:
        models: loads the models.
        dtype, device: of the frozen weights.
    """

    def __init__(self, models: FrozenModels, dtype: str = "stored", device: str = "auto") -> None:
        self.models, self.dtype, self.device = models, dtype, device

    def check(self, choice: Choice) -> None:
        from agents.running.saved import find_agent
        from rledit_env.lm.loading.fetching import fetch
        from rledit_env.lm.loading.tiny import TINY_NAMES

        options = self._options(choice)
        try:
            check_editor(options)
        except ValueError as error:  # the page has no flags
            raise ValueError(re.sub(r"--([a-z-]+)", lambda m: "the " + m[1].replace("-", " "), str(error))) from error
        if options.agent is not None:
            find_agent(options.agent)
        if choice.batch_size < 1:
            raise ValueError(f"{choice.batch_size} facts a batch were chosen; give 1 or more")
        if choice.model not in TINY_NAMES:
            fetch(choice.model)

    def load(self, choice: Choice) -> EditableLM:
        say_loading(choice.model)
        return self.models.load(choice.model, None, self.dtype, self.device)

    def __call__(self, choice: Choice, facts: Facts, progress: Callable[[str], None]) -> Editing:
        from rledit_env.cli.editing import trained_agent, training_free

        options = self._options(choice)

        def tried(trial: Trial) -> None:
            progress(f"searching for the step size: {trial.step_size:.3g} was tried")

        if options.editor is None:
            return trained_agent(options, facts, self.models.load)
        editing = training_free(options, facts, self.models.load, tried)
        probe = editing.report["editor"]["probe"]
        if probe is None:
            return editing
        note = f"the step size {probe['chosen']['step_size']:.3g} was found on {probe['facts']} of the first facts: "
        return replace(editing, notes=(*editing.notes, note + probe["reason"]))

    def _options(self, choice: Choice) -> argparse.Namespace:
        """The options of `rledit edit` for this choice."""
        from agents.running.editors import EDITORS, SHORT_NAMES
        from rledit_env.cli.edit import COMMAND as EDIT

        parser = CommandParser()
        EDIT.add_arguments(parser)
        options = parser.parse_args(["--facts", "typed", "--out", "nowhere", "--model", choice.model])
        name = choice.editor.strip()
        is_editor = name in (*EDITORS, *SHORT_NAMES)
        options.agent, options.editor = (None, name) if is_editor else (name or None, None)
        options.dtype, options.device, options.chat = self.dtype, self.device, choice.chat
        options.step_size = choice.step_size
        return options


COMMAND = Command(
    "playground",
    "a local page to edit facts on and see what changed",
    "Serve a page on this computer: choose a model and an editor, type or load facts, edit, and see for each fact\n"
    "the answers before and after, what should stay, and what it cost the model; undo, ask, save. Every browser tab\n"
    "has a model of its own. Nothing is sent to other computers.",
    """\
examples:
  pip install "rledit-env[playground]"
  rledit playground
  rledit playground --model owner/name --editor ultraedit --port 8000
""",
    add_arguments,
    run,
    lambda options: "the playground has ended",
)
