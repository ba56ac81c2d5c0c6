"""The folders and files of saved agents. Files may come from anyone, so their content is checked before use."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rledit_env.evaluation.metrics import METRICS_VERSION
from rledit_env.files import MARKER, mark, read_marker
from rledit_env.type_aliases import JsonObject

MAX_DESCRIPTION_BYTES = 2**24
MAX_COUNT = 2**62
TRAINING_STATE = "training.safetensors"  # in a run's folder ``last``: the state that an interrupted run resumes from
AGENT_FILES = ("agent.json", "agent.safetensors", "memory.safetensors", TRAINING_STATE)
START_ANEW = "another log_dir, or resume=False to start anew"  # the advice when a run cannot be resumed
RUN = "training run"  # the kind of a run's folder in its marker
RUN_PARTS = ("best/", "last/", "steps/")  # the checkpoints in a run's folder, and TensorBoard's log of steps


def agent_folder(path: str | Path) -> Path:
    """The folder that an agent is saved in, created if it does not exist and marked as rledit's.

    Raises:
        FileExistsError: a file with the name of an agent's file exists that no agent wrote.
    """
    folder = Path(path)
    check_agent_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark(folder, "agent", files=AGENT_FILES)
    return folder


def check_agent_folder(path: str | Path) -> None:
    """Check that saving an agent in this folder overwrites nothing but an agent.

    Raises:
        FileExistsError: a file with the name of an agent's file exists that no agent wrote.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; name a folder for the agent")
    marker = read_marker(folder)
    if marker is not None and set(AGENT_FILES) <= set(marker.files):
        return
    existing = [folder / name for name in AGENT_FILES if (folder / name).exists()]
    if existing and not _contains_agent(folder):
        raise FileExistsError(f"{existing[0]} is there already, and no agent wrote it: it is not overwritten. Name "
                              "another folder, or move that file away")


def run_folder(log_dir: str | Path, command: str | None = None) -> Path:
    """The folder that training logs to, created if it does not exist and marked as rledit's.

    Raises:
        FileExistsError: a file with the name of a checkpoint's file exists that no agent wrote.
    """
    folder = Path(log_dir)
    for name in ("best", "last"):
        check_agent_folder(folder / name)
    folder.mkdir(parents=True, exist_ok=True)
    mark(folder, RUN, command=command)
    return folder


def remove_run(log_dir: str | Path) -> None:
    """Delete the files that training wrote into a folder, and nothing else."""
    folder = Path(log_dir)
    for checkpoint in (folder / "best", folder / "last"):
        for name in (*AGENT_FILES, MARKER):
            (checkpoint / name).unlink(missing_ok=True)
    for logs in (folder, folder / "steps"):
        for file in logs.glob("events.out.tfevents.*"):
            file.unlink()


def _contains_agent(folder: Path) -> bool:
    """Whether a folder without a marker contains an agent, or an interrupted training, of an earlier version."""
    with suppress(OSError, ValueError):
        return {"agent", "format"} <= set(read_description(folder))
    with suppress(OSError, SafetensorError), safe_open(folder / TRAINING_STATE, "pt") as file:
        return "training" in (file.metadata() or {})
    return False


def known_best(description: JsonObject) -> float:
    """The best held-out score in an interrupted training's description; −inf if there is none, or if it is of another
    version of the metrics, with which later scores are not comparable."""
    score = description["best_score"]
    return -math.inf if score is None or description.get("metrics_version", 1) != METRICS_VERSION else float(score)


def read_description(folder: str | Path) -> JsonObject:
    """The content of an agent's ``agent.json``.

    Raises:
        FileNotFoundError: the folder contains no agent.
        ValueError: the file is damaged or too large.
    """
    path = Path(folder) / "agent.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no agent (no agent.json); give the folder that save() wrote")
    if path.stat().st_size > MAX_DESCRIPTION_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than any agent's description; it is none")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); save the agent again") from error
    if not isinstance(description, dict) or not isinstance(description.get("environment") or {}, dict):
        raise ValueError(f"{path} is damaged (it is no description of an agent); save the agent again")
    return description


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file's tensors and metadata.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; copy the agent's folder whole")
    try:
        with safe_open(path, "pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error


def read_training_state(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """:func:`read_tensors` of an interrupted training's state.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged.
    """
    try:
        return read_tensors(path)
    except ValueError as error:
        raise ValueError(f"{error}; give {START_ANEW}") from error


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names have this prefix, named without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@contextmanager
def built_from(folder: str | Path) -> Iterator[None]:
    """Context that turns errors from a damaged description or its tensors into a ValueError that names the folder."""
    try:
        yield
    except (
        ArithmeticError, AttributeError, LookupError, RuntimeError, SafetensorError, TypeError, ValueError
    ) as error:
        if isinstance(error, ValueError) and str(folder) in str(error):
            raise
        reason = " ".join(str(error).split())[:500]
        raise ValueError(f"the agent in {folder} is damaged, or of another version ({type(error).__name__}: {reason}); "
                         "save it again") from error


def check_counters(description: JsonObject, *names: str) -> None:
    """Raise ValueError unless these entries are whole numbers from 0 on."""
    for name in names:
        value = description[name]
        if type(value) is not int or not 0 <= value < MAX_COUNT:
            raise ValueError(f"{name} is {value!r}; it must be a whole number")


def check_size(needed: int, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a description asks for more numbers than its file of tensors has."""
    available = sum(t.numel() for t in tensors.values())
    if needed > available:
        raise ValueError(f"its description asks for {needed:,} numbers, its tensors hold {available:,}")


def moments_of(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """An optimiser's moments, by the place of their parameter, from tensors named ``PLACE.NAME``.

    Raises:
        ValueError: a tensor's place is not that of a parameter, or its shape is not the parameter's.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        place, name = key.split(".", 1)
        shape = parameters[int(place)].shape if int(place) < len(parameters) else None
        if shape is None or (value.dim() and value.shape != shape):
            needed = "absent" if shape is None else tuple(shape)
            raise ValueError(f"the optimiser's {key} has shape {tuple(value.shape)}; it must be {needed}")
        moments.setdefault(int(place), {})[name] = value
    return moments
