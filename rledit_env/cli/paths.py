"""The paths on a command line: a command's inputs and outputs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rledit_env.outputs import Input, Output, PathError, try_outputs

# Options of all commands that name an input → the input.
READ = {
    "facts": "the facts",
    "agent": "the agent",
    "model": "the model",
    "data": "the data",
    "train_data": "the training data",
    "configs": "the hyperparameters",
    "wheel": "the wheel",
    "general": "a task of general ability",
    "text": "the human-written text",
}


def written_path(text: str) -> Path:
    """The path of an output that an argument names; ``~`` is the home folder, and ``..`` is resolved.

    Raises:
        PathError: the path is empty, or in the home folder of an unknown user.
    """
    if not text.strip():
        raise PathError("a path is empty; name a folder or a file")
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise PathError(f"{text} is of no user's home folder; write the folder out") from error
    return Path(os.path.realpath(path)) if ".." in path.parts else path


def file_or_dash(text: str) -> str:
    """An output file as in :func:`written_path`, or "-" for the standard output."""
    return text if text == "-" else str(written_path(text))


def check_paths(options: argparse.Namespace, *outputs: Output, reads: Sequence[Input] = ()) -> None:
    """Check a command's outputs, and the cache of its model, before it does anything; see
    `rledit_env.outputs.try_outputs`.

    Args:
        options: the command's options.
        outputs: the command's outputs.
        reads: its inputs beside those that its options name.

    Raises:
        OSError: an output cannot be written, or writing it would destroy something.
    """
    try_outputs(outputs, [*inputs_of(options), *reads])
    model = getattr(options, "model", None) or _model_of_agent(options)
    if model:
        try_cache(str(model))


def try_cache(model: str) -> None:
    """Check the folder in the cache that a model of this name would be fetched into, if it has to be fetched.

    Raises:
        OSError: the folder cannot be written, or writing it would destroy something.
    """
    from rledit_env.lm.loading.fetching import folder_to_write
    from rledit_env.lm.loading.wheel import check_replaceable

    folder = folder_to_write(model)
    if folder is not None:
        try_outputs([Output("the cache (RLEDIT_CACHE)", folder, check_replaceable, replaced=True)])


@contextmanager
def going_on(how: str = "the same command") -> Iterator[None]:
    """Context in which the message of a failed write also says how to resume.

    Args:
        how: the command that resumes.
    """
    try:
        yield
    except OSError as error:
        message = str(error)
        if error.errno is not None:  # an error of the system, which TensorBoard passes on
            message = f"{error.filename or 'a file'} cannot be written ({error.strerror}); free some space"
        raise PathError(f"{message}; {how} then goes on from what was written") from error


def inputs_of(options: argparse.Namespace) -> list[Input]:
    """The inputs on this machine that a command's options name."""
    inputs: list[Input] = []
    for name, what in READ.items():
        value = getattr(options, name, None)
        for text in value if isinstance(value, list) else [] if value is None else [value]:
            title = f"{what} (--{name.replace('_', '-')} {text})"
            inputs += [Input(title, path) for path in _places(name, str(text))]
    if not getattr(options, "model", None) and (model := _model_of_agent(options)):
        inputs += model_inputs(f"the agent's model ({model})", model)
    return inputs


def _places(option: str, text: str) -> list[Path]:
    """The paths of an input on this machine; several for a run's folder and the agent in it."""
    from agents.running.saved import DEFAULT
    from rledit_env.lm.loading.registry import MODELS

    places: list[Path | None] = []
    if (option, text) not in (("agent", DEFAULT), ("data", "bundled")) and text not in MODELS:
        places.append(Path(os.path.expanduser(text)))
    if option == "agent":
        places.append(_agent(text))
    if option == "model":
        places.append(_model(text))
    return [place for place in places if place is not None and os.path.exists(place)]


def _agent(name: str) -> Path | None:
    from agents.running.saved import find_agent

    try:
        return find_agent(name)
    except OSError:  # reported when the agent is loaded
        return None


def _model_of_agent(options: argparse.Namespace) -> str | None:
    """The name of the model that the agent was trained with; None without an agent or a recorded model."""
    from agents.running.saved import agent_settings

    folder = _agent(str(options.agent)) if getattr(options, "agent", None) else None
    try:
        model = agent_settings(folder)["environment"].get("model") if folder is not None else None
    except (OSError, ValueError):  # reported when the agent is loaded
        return None
    return str(model) if model else None


def model_inputs(name: str, model: str) -> list[Input]:
    """The paths of a model on this machine, as inputs of this name."""
    return [Input(name, path) for path in _places("model", model)]


def _model(name: str) -> Path | None:
    """The folder in a cache from which a model of this name is loaded; None if it is not cached."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    from rledit_env.lm.loading.registry import MODELS, cache_dir

    if name in MODELS:
        return cache_dir() / "models" / name
    if name.count("/") != 1:
        return None
    try:
        config = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # the name is a path
        return None
    return Path(config).parent if isinstance(config, str) else None
