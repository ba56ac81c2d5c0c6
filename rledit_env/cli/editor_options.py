"""The options of `rledit edit` for the agent or editor and its presentations: their flags and their checks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rledit_env.cli.command import check_positive, probability

if TYPE_CHECKING:
    from agents.running.editors import Editor

DEFAULT_MODEL = "smollm2-135m"
PRESENT_UNTIL, MAX_PRESENTATIONS = 0.8, 16  # with 12 a few of fifty single facts do not take (benchmarks/lone_facts.py)


def editor_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --agent, --editor and the options of an editor's strength."""
    parser.add_argument("--agent", metavar="RUN",
                        help="a trained agent: a run's folder (its best agent is taken), an agent's folder, or "
                        "'default', the agent that ships with the package for smollm2-135m")
    parser.add_argument("--editor", metavar="NAME",
                        help="instead of an agent, an editor that needs no training, for any model: ultraedit, "
                        "recursion, ft-l, ft-m, rome, memit, alphaedit or another one of 'rledit compare'")
    group = parser.add_argument_group("an editor's strength")
    group.add_argument("--step-size", type=float, metavar="X",
                       help="step size of the editor (default: searched for in about a minute on a few of the facts, "
                       "so that most of them take and the model moves least, by at most --drift-bound or 0.1 nats a "
                       "token)")
    group.add_argument("--statistics-tokens", type=int, metavar="N",
                       help="tokens of text that the model writes for the second moments of a locate-then-edit method "
                       "(default: 65,536)")


def presentation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --present-until and --max-presentations."""
    group = parser.add_argument_group("presentations, if a batch may be presented more than once")
    group.add_argument("--present-until", type=probability, metavar="P",
                       help="present a batch until the model gives every token of its answers at least this "
                       f"probability, each time only the facts below it (default: {PRESENT_UNTIL}); 'none' or 0: a "
                       "fixed number of times, the agent's own or --steps-per-batch")
    group.add_argument("--max-presentations", type=int, metavar="N",
                       help=f"the largest number of presentations (default: {MAX_PRESENTATIONS}, or the number found "
                       "with an editor's step size)")


def check_editor(options: argparse.Namespace) -> None:
    """Raise ValueError for options that exclude each other, before anything is read."""
    if options.max_presentations is not None:
        check_positive(options, "max_presentations")
        if options.steps_per_batch is not None or options.present_until == 0:
            other = "--steps-per-batch" if options.steps_per_batch is not None else "--present-until none"
            raise ValueError(f"--max-presentations and {other} exclude each other: a batch is presented either until "
                             "its facts have taken or a fixed number of times")
    if (options.agent is None) == (options.editor is None):
        problem = "exclude each other" if options.agent else "are both missing"
        raise ValueError(f"--agent and --editor {problem}; give --agent with a trained agent ('default' is one for "
                         f"{DEFAULT_MODEL}), or --editor with one of {_choices()}")
    _check_mix_up(options)
    for name in ("step_size", "statistics_tokens"):
        if options.agent and getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for --editor; a trained agent has its own")
    if options.editor:
        named_editor(options)


def _check_mix_up(options: argparse.Namespace) -> None:
    """Raise ValueError if --agent is an editor's name, or --editor an agent."""
    from agents.running.editors import EDITORS, SHORT_NAMES

    if options.agent in (*EDITORS, *SHORT_NAMES) and not Path(options.agent).exists():
        raise ValueError(f"--agent {options.agent} is the name of an editor: give --editor {options.agent}")
    if options.editor and (options.editor == "default" or Path(options.editor).is_dir()):
        raise ValueError(f"--editor {options.editor} is a trained agent: give --agent {options.editor}")


def _choices() -> str:
    from agents.running.editors import SHORT_NAMES, training_free_editors

    return ", ".join([*training_free_editors(), *SHORT_NAMES])


def named_editor(options: argparse.Namespace) -> Editor:
    """The editor of --editor, with its published settings.

    Raises:
        ValueError: the editor is unknown, has to be trained, or does not have one of the other options.
    """
    from agents.running.editors import find_editor

    editor = find_editor(options.editor)
    if not editor.training_free:
        raise ValueError(f"--editor {options.editor} has to be trained before it edits: train an agent with 'rledit "
                         f"train' and name it with --agent, or take one that needs no training: {_choices()}")
    if options.step_size is not None:
        if not editor.step_size:
            raise ValueError(f"--step-size: {editor.name} has none; leave it out")
        if not 0 < options.step_size < float("inf"):
            raise ValueError(f"--step-size is {options.step_size:g}; give a positive number")
    if options.statistics_tokens is not None and editor.group != "locate":
        raise ValueError(f"--statistics-tokens: {editor.name} needs no text; leave it out")
    return editor
