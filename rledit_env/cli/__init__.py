"""The `rledit` command: fetch a model, train an agent, edit facts, evaluate, compare editors.

The environment does not depend on any learning algorithm: commands that need agents import them when they run.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence

import gymnasium as gym

from rledit_env.cli import compare, edit, evaluate, fetch, ledger, playground, probe, report, train
from rledit_env.cli.command import FAILED, INTERRUPTED, USAGE, warn
from rledit_env.cli.config_flags import CommandParser
from rledit_env.outputs import PathError

COMMANDS = (
    fetch.COMMAND, probe.COMMAND, train.COMMAND, evaluate.COMMAND, edit.COMMAND, ledger.COMMAND, compare.COMMAND,
    report.COMMAND, playground.COMMAND,
)  # fmt: skip

DESCRIPTION = """\
Lifelong knowledge editing of language models.

  rledit fetch     get a model's weights ready
  rledit probe     find out which weights to edit
  rledit train     train an agent to edit, on a stream of facts
  rledit evaluate  score a trained agent on facts it never saw
  rledit edit      edit your own facts into a model and write it out
  rledit ledger    list, check, undo or replay what an edit recorded
  rledit compare   compare editors on the same streams of facts
  rledit report    show a run as one page, with pictures
  rledit playground  edit facts on a local page, and see what changed
"""
EXIT_CODES = """\
exit codes:
  0    done; a fact that did not take is named but is no failure
  1    the update broke the model, or an unexpected error (with its traceback)
  2    wrong usage or unusable input; one line on stderr says what and how to mend it
  130  interrupted; the last line says what was saved
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `rledit` with these arguments (the process's own by default) and return its exit code."""
    try:
        import rledit_env.own_agents  # noqa: F401 - commands import agents
    except ImportError as error:
        warn(f"rledit: error: {error}")
        return USAGE
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser(arguments[0] if arguments else None)
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:  # argparse or tyro has printed the reason
        return int(stop.code or 0)
    except PathError as error:  # an argument is not a path
        warn(f"rledit {arguments[0]}: error: {error}")
        return USAGE
    options.command_line = shlex.join(["rledit", *arguments])
    with _short_warnings():
        try:
            return int(options.run(options))
        except KeyboardInterrupt:
            warn(options.interrupted(options))
            return INTERRUPTED
        except (ValueError, OSError, RuntimeError, gym.error.Error) as error:
            if options.traceback or not _is_usage_error(error):
                traceback.print_exc()
                return USAGE if _is_usage_error(error) else FAILED
            warn(f"rledit {options.command}: error: {_as_options(' '.join(str(error).split()), options)}")
            return USAGE


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands, with only the arguments of ``command``: their defaults come from libraries that take
    seconds to import."""
    parser = argparse.ArgumentParser(
        prog="rledit", description=DESCRIPTION, epilog=EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"rledit-env {_own_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=CommandParser)
    for entry in COMMANDS:
        sub = commands.add_parser(
            entry.name, help=entry.summary, description=entry.description, epilog=f"{entry.examples}\n{EXIT_CODES}",
            formatter_class=_HelpFormatter,
        )
        if entry.name == command:
            entry.add_arguments(sub)
            if not any(isinstance(action, argparse._SubParsersAction) for action in sub._actions):
                sub.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
        sub.set_defaults(run=entry.run, interrupted=entry.interrupted, traceback=False)
    return parser


def _as_options(message: str, options: argparse.Namespace) -> str:
    """A library's error message with the command's options in place of Python's arguments, such as "--on-error skip"
    for "on_error='skip'"."""
    for name in vars(options):
        if "_" in name and name not in ("command_line", "run_folder"):  # these are not options
            option, alone = "--" + name.replace("_", "-"), rf"(?<![\w./\\'\"-]){name}"
            message = re.sub(rf"{alone}=(['\"]?)(\w+)\1(?!\w)", rf"{option} \2", message)
            message = re.sub(rf"{alone}(?![\w=/\\'\"]|\.\w)", option, message)
    return message


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of the examples, and adds each default except None and False."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def _is_usage_error(error: BaseException) -> bool:
    """Whether the user can mend the error; its message is then printed without a traceback."""
    from rledit_env.lm.loading.registry import ModelError

    return isinstance(error, (ValueError, OSError, ModelError, gym.error.Error))


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
    """Print warnings as one line, without their place in the code."""

    def short(message: Warning | str, *_: object, **__: object) -> str:
        return f"warning: {message}\n"

    full = warnings.formatwarning
    warnings.formatwarning = short
    try:
        yield
    finally:
        warnings.formatwarning = full


def _own_version() -> str:
    import rledit_env

    return rledit_env.__version__
