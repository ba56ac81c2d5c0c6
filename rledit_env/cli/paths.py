"""The paths on a command line: what a command reads, and what it writes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rledit_env.outputs import Input, Output, PathError, try_outputs

# The options of all commands that name what is read, and what that is.
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
    """A path as an argument names it, to be written; ``~`` is the home folder, and ``..`` is worked out.

    Raises:
        PathError: it is empty, or of an unknown user's home folder.
    """
    if not text.strip():
        raise PathError("a path is empty; name a folder or a file")
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise PathError(f"{text} is of no user's home folder; write the folder out") from error
    return Path(os.path.realpath(path)) if ".." in path.parts else path


def file_or_dash(text: str) -> str:
    """A file to be written as :func:`written_path`, or "-" for the standard output."""
    return text if text == "-" else str(written_path(text))


def check_paths(options: argparse.Namespace, *outputs: Output, reads: Sequence[Input] = ()) -> None:
    """Try a command's outputs, and the cache of its model, before it does anything; see
    `rledit_env.outputs.try_outputs`.

    Args:
        options: the command's.
        outputs: what it writes.
        reads: what it reads beside the inputs that its options name.

    Raises:
        OSError: one cannot be written, or something would be lost by it.
    """
    try_outputs(outputs, [*inputs_of(options), *reads])
    model = getattr(options, "model", None) or _model_of_agent(options)
    if model:
        try_cache(str(model))


def try_cache(model: str) -> None:
    """Try the folder in the cache that a model of this name is to be fetched into, if it is.

    Raises:
        OSError: it cannot be written, or something in it would be lost.
    """
    from rledit_env.lm.loading.fetching import folder_to_write
    from rledit_env.lm.loading.wheel import check_replaceable

    folder = folder_to_write(model)
    if folder is not None:
        try_outputs([Output("the cache (RLEDIT_CACHE)", folder, check_replaceable, replaced=True)])


@contextmanager
def going_on(how: str = "the same command") -> Iterator[None]:
    """Within it, the message of an error in writing says how to go on from what was written."""
    try:
        yield
    except OSError as error:
        said = str(error)
        if error.errno is not None:  # the system's own words, as TensorBoard hands them on
            said = f"{error.filename or 'a file'} cannot be written ({error.strerror}); free some space"
        raise PathError(f"{said}; {how} then goes on from what was written") from error


def inputs_of(options: argparse.Namespace) -> list[Input]:
    """Everything on this machine that a command's options say it reads."""
    inputs: list[Input] = []
    for name, what in READ.items():
        given = getattr(options, name, None)
        for text in given if isinstance(given, list) else [] if given is None else [given]:
            named = f"{what} (--{name.replace('_', '-')} {text})"
            inputs += [Input(named, path) for path in _places(name, str(text))]
    if not getattr(options, "model", None) and (model := _model_of_agent(options)):
        inputs += model_inputs(f"the agent's model ({model})", model)
    return inputs


def _places(option: str, text: str) -> list[Path]:
    """Where on this machine something that is read is; several places for a run's folder and the agent in it."""
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
    except OSError:  # said where the agent is loaded
        return None


def _model_of_agent(options: argparse.Namespace) -> str | None:
    """The name of the model that the agent was trained with, if there is an agent and it knows."""
    from agents.running.saved import agent_settings

    folder = _agent(str(options.agent)) if getattr(options, "agent", None) else None
    try:
        model = agent_settings(folder)["environment"].get("model") if folder is not None else None
    except (OSError, ValueError):  # said where the agent is loaded
        return None
    return str(model) if model else None


def model_inputs(name: str, model: str) -> list[Input]:
    """Where on this machine a model is, with what to call it."""
    return [Input(name, path) for path in _places("model", model)]


def _model(name: str) -> Path | None:
    """The folder in a cache that a model of this name is loaded from."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    from rledit_env.lm.loading.registry import MODELS, cache_dir

    if name in MODELS:
        return cache_dir() / "models" / name
    if name.count("/") != 1:
        return None
    try:
        config = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # a path
        return None
    return Path(config).parent if isinstance(config, str) else None
