"""Shared parts of the `rledit` commands: the `Command` class, common arguments and checks, and output."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import gymnasium as gym

from rledit_env.type_aliases import JsonObject

if TYPE_CHECKING:
    from tqdm import tqdm

    from rledit_env.cli.config_flags import CommandParser
    from rledit_env.knowledge import KnowledgeDataset
    from rledit_env.lm.editable import EditableLM
    from rledit_env.lm.loading.loader import ModelSource

T = TypeVar("T")
OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True)
class Command:
    """One subcommand: its help texts, its arguments, the function that runs it, and the message after Ctrl-C."""

    name: str
    summary: str
    description: str
    examples: str
    add_arguments: Callable[[CommandParser], None]
    run: Callable[[argparse.Namespace], int]
    interrupted: Callable[[argparse.Namespace], str]


def environment_arguments(parser: argparse.ArgumentParser, required: bool, env: str | None = None) -> None:
    """Add the environment's arguments.

    Args:
        parser: the command's parser.
        required: whether the environment must be given; otherwise the agent's settings are the defaults.
        env: a default of --env.
    """
    ids = ", ".join(environment_ids())
    parser.add_argument("--env", required=required and env is None, metavar="ID", default=env,
                        help=f"one of {ids}" + ("" if required else " (default: the agent's)"))
    parser.add_argument("--data", default="bundled", help="a file, a folder, a hub id, or 'bundled', a sample")
    on_error_argument(parser)
    if required:
        parser.add_argument("--model", default="smollm2-135m", help="registry name, hub id or folder")
        parser.add_argument("--edit-modules", nargs="+", metavar="GLOB",
                            help="modules to edit, such as 'model.layers.[6-12].mlp.{gate,up}_proj' "
                            "(default: the registry's for the model)")
        _hardware_arguments(parser)
    else:
        parser.add_argument("--model", help="registry name, hub id or folder (default: the agent's)")


def on_error_argument(parser: argparse.ArgumentParser) -> None:
    """Add --on-error, the handling of rows of the data that cannot be used."""
    parser.add_argument("--on-error", choices=("raise", "skip"), default="raise",
                        help="rows that cannot be used: end with the first one's error, or skip and count them")


def agent_argument(parser: argparse.ArgumentParser) -> None:
    """Add --agent, the agent that edits."""
    parser.add_argument("--agent", required=True, metavar="RUN",
                        help="a run's folder (its best agent is taken), an agent's folder, or 'default', the agent "
                        "that ships with the package for the kind of facts")


def override_arguments(parser: argparse.ArgumentParser, dtype: str = "auto") -> None:
    """Add the arguments that override an agent's own settings."""
    from rledit_env.lm.forward import TOKEN_CHOICES

    group = parser.add_argument_group("the agent's own settings, which need not be repeated")
    group.add_argument("--edit-modules", nargs="+", metavar="GLOB", help="modules to edit")
    group.add_argument("--token", choices=TOKEN_CHOICES, help="positions that the agent sees")
    group.add_argument("--steps-per-batch", type=int, help="how often a batch is presented")
    group.add_argument("--contexts", type=int, metavar="K",
                       help="present each fact behind K short texts, too, which the model writes (0: none)")
    _hardware_arguments(parser, dtype)


def probability(text: str) -> float:
    """Parse a probability below 1; "none" is 0."""
    value = 0.0 if text.lower() == "none" else float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is no probability below 1; give one such as 0.8, or 'none'")
    return value


def metrics_argument(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add --metrics, the way the facts are scored."""
    parser.add_argument("--metrics", default="paper", metavar="NAME",
                        help="'paper' (Appendix A.3), or 'rledit-code' for what the paper's released code computes")


def option_or(option: T | None, otherwise: T) -> T:
    """An option's value, or ``otherwise`` if it was not given."""
    return otherwise if option is None else option


def chat_argument(parser: argparse.ArgumentParser | argparse._ArgumentGroup, what: str) -> None:
    """Add --chat, which asks facts in the model's chat template."""
    from rledit_env.lm.chat import CHAT_FORMS

    parser.add_argument("--chat", nargs="?", const="only", choices=CHAT_FORMS,
                        help=f"put {what} into the model's chat template, as a user's message ('only', the meaning of "
                        "--chat alone), or edit it both plain and in the template ('also'), for a model that is asked "
                        "both ways")


def text_argument(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add --text, the human-written text on which the divergence is measured."""
    parser.add_argument("--text", metavar="FILE",
                        help="human-written text in UTF-8, on which the divergence from the unedited model is "
                        "measured, too (default: the help topics of Python's standard library)")


def check_text(options: argparse.Namespace) -> None:
    """Raise an error if --text cannot be read, before anything is computed."""
    from rledit_env.evaluation.general.scored_text import read_text

    if options.text is not None:
        read_text(options.text)


def check_text_is_no_prior(options: argparse.Namespace, config: object) -> None:
    """Check that --text is not the text of an editor's prior, which protects just that text.

    Raises:
        ValueError: the editor's configuration names the same file.
    """
    if options.text is None or not is_dataclass(config) or isinstance(config, type):
        return
    text = os.path.expanduser(options.text)
    for value in asdict(config).values():
        parts = value.values() if isinstance(value, dict) else [value]
        for part in parts:
            path = os.path.expanduser(part) if isinstance(part, (str, Path)) else None
            if path is not None and os.path.exists(path) and os.path.samefile(path, text):
                raise ValueError(f"--text {options.text} is the text that the editor's prior is made from, on which a "
                                 "divergence says nothing; give another one")


def _hardware_arguments(parser: argparse.ArgumentParser, dtype: str = "auto") -> None:
    parser.add_argument("--device", default="auto", help="such as 'cpu' or 'cuda:0'; 'auto' takes an accelerator")
    parser.add_argument("--dtype", default=dtype,
                        help="precision of the frozen weights: a torch dtype, 'auto', or 'stored', the model's own")
    source_arguments(parser)


def source_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a model's revision and of its own code."""
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit, for a model named by hub id")
    parser.add_argument("--trust-remote-code", action="store_true",
                        help="run the code that comes with the model, if it needs it; such code can do anything")


def model_source(options: argparse.Namespace, trained: JsonObject | None = None) -> ModelSource:
    """The values of :func:`source_arguments` as arguments of `EditableLM.load`. Without ``--model`` and ``--revision``,
    the revision is that of the ``trained`` settings."""
    revision = options.revision
    if revision is None and options.model is None and trained is not None:
        revision = trained.get("revision")
    return {"revision": revision, "trust_remote_code": options.trust_remote_code}


def environment_ids() -> list[str]:
    """The ids of this package's registered environments."""
    return [name for name in gym.registry if name.startswith("RLEdit-")]


def kind_of(env_id: str) -> str:
    """The kind of facts that an environment edits."""
    spec = gym.spec(env_id)
    if "kind" not in spec.kwargs:
        ids = ", ".join(environment_ids())
        raise ValueError(f"--env {env_id} is no environment of this package; give one of {ids}")
    return str(spec.kwargs["kind"])


def model_name(options: argparse.Namespace, trained: Mapping[str, object], folder: Path) -> str:
    """The model of --model, or else the one that the agent in ``folder`` was trained with."""
    name = options.model or trained.get("model")
    if not name:
        raise ValueError(f"{folder} does not say which model it was trained on; name it with --model")
    return str(name)


def check_positive(options: argparse.Namespace, *names: str) -> None:
    """Raise ValueError for options below 1."""
    for name in names:
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}; give 1 or more")


def check_contexts(contexts: int, token: str, flag: str = "--contexts") -> None:
    """Raise ValueError for a number of contexts that the environment would refuse, before a model is loaded."""
    if contexts < 0:
        raise ValueError(f"{flag} is {contexts}; give 0 (none) or more")
    if contexts and token == "all":
        raise ValueError(f"{flag} is {contexts} and the token is 'all', which would take the contexts' tokens, too; "
                         f"give {flag} 0, or --token subject, answer or subject+answer")


def skipped_rows(dataset: KnowledgeDataset) -> list[str]:
    """The number of unused rows of the data by reason, and of records that lack something, to be printed; empty if all
    rows are used and nothing is lacking."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in dataset.skipped.items())
    lacks = [f"({count} without {part})" for part, count in dataset.lacks.items()]
    return [f"(not used: {reasons})", *lacks] if reasons else lacks


def dtype_name(lm: EditableLM) -> str:
    return str(lm.dtype).removeprefix("torch.")


def progress_bar(total: int | None, what: str, unit: str = "fact") -> tqdm:
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit=unit)


def say_loading(model: str) -> None:
    to_stderr(f"loading {model} …")


def to_stderr(*parts: object) -> None:
    print(*parts, file=sys.stderr)


def warn(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
