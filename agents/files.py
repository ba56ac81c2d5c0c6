"""Saved agents: their folders, and what is read from them: data from anyone, checked before anything is built of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rledit_env.evaluation.metrics import METRICS_VERSION
from rledit_env.files import MARKER, mark, read_marker

MAX_DESCRIPTION_BYTES = 2**24
MAX_COUNT = 2**62
TRAINING_STATE = "training.safetensors"  # in a run's folder ``last``: what an interrupted training goes on from
AGENT_FILES = ("agent.json", "agent.safetensors", "memory.safetensors", TRAINING_STATE)
START_ANEW = "another log_dir, or resume=False to start anew"  # what a run that cannot be gone on with leaves to give
RUN = "training run"  # what a run's folder is called in its marker
RUN_PARTS = ("best/", "last/", "steps/")  # the checkpoints in a run's folder, and TensorBoard's log of steps


def agent_folder(path: str | Path) -> Path:
    """The folder that an agent is saved in, made if need be and marked as rledit's.

    Raises:
        FileExistsError: a file of an agent's name is there that no agent wrote.
    """
    folder = Path(path)
    check_agent_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark(folder, "agent", files=AGENT_FILES)
    return folder


def check_agent_folder(path: str | Path) -> None:
    """Make sure that saving an agent there replaces nothing but an agent.

    Raises:
        FileExistsError: a file of an agent's name is there that no agent wrote.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; name a folder for the agent")
    marker = read_marker(folder)
    if marker is not None and set(AGENT_FILES) <= set(marker.files):
        return
    found = [folder / name for name in AGENT_FILES if (folder / name).exists()]
    if found and not _holds_agent(folder):
        raise FileExistsError(f"{found[0]} is there already, and no agent wrote it: it is not overwritten. Name "
                              "another folder, or move that file away")


def run_folder(log_dir: str | Path, command: str | None = None) -> Path:
    """The folder that training logs to, made if need be and marked as rledit's.

    Raises:
        FileExistsError: a checkpoint's file is there that no agent wrote.
    """
    folder = Path(log_dir)
    for name in ("best", "last"):
        check_agent_folder(folder / name)
    folder.mkdir(parents=True, exist_ok=True)
    mark(folder, RUN, command=command)
    return folder


def remove_run(log_dir: str | Path) -> None:
    """Delete what training wrote into a folder, and nothing else."""
    folder = Path(log_dir)
    for checkpoint in (folder / "best", folder / "last"):
        for name in (*AGENT_FILES, MARKER):
            (checkpoint / name).unlink(missing_ok=True)
    for logs in (folder, folder / "steps"):
        for file in logs.glob("events.out.tfevents.*"):
            file.unlink()


def _holds_agent(folder: Path) -> bool:
    """Whether a folder holds an agent, or an interrupted training, that was saved before there were markers."""
    with suppress(OSError, ValueError):
        return {"agent", "format"} <= set(read_description(folder))
    with suppress(OSError, SafetensorError), safe_open(folder / TRAINING_STATE, "pt") as file:
        return "training" in (file.metadata() or {})
    return False


def known_best(description: Mapping[str, Any]) -> float:
    """The best held-out score of an interrupted training's description, to go on from; −inf where there is none, and
    where it is of another version of the metrics, so that the next score is not compared with it."""
    score = description["best_score"]
    return -math.inf if score is None or description.get("metrics_version", 1) != METRICS_VERSION else float(score)


def read_description(folder: str | Path) -> dict[str, Any]:
    """The content of an agent's ``agent.json``.

    Raises:
        FileNotFoundError: there is no agent.
        ValueError: the file is damaged, or too large to be one.
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
        FileNotFoundError: there is none.
        ValueError: it is damaged.
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
    """:func:`read_tensors` of what an interrupted training goes on from.

    Raises:
        ValueError: the file is damaged; the message says what to do.
    """
    try:
        return read_tensors(path)
    except ValueError as error:
        raise ValueError(f"{error}; give {START_ANEW}") from error


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, without that beginning."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@contextmanager
def built_from(folder: str | Path) -> Iterator[None]:
    """Within it, whatever a description or its tensors make go wrong is a ValueError that names the folder."""
    try:
        yield
    except (
        ArithmeticError, AttributeError, LookupError, RuntimeError, SafetensorError, TypeError, ValueError
    ) as error:
        if isinstance(error, ValueError) and str(folder) in str(error):
            raise
        said = " ".join(str(error).split())[:500]
        raise ValueError(f"the agent in {folder} is damaged, or of another version ({type(error).__name__}: {said}); "
                         "save it again") from error


def check_counters(description: Mapping[str, Any], *names: str) -> None:
    """Raise ValueError unless these entries are whole numbers from 0."""
    for name in names:
        value = description[name]
        if type(value) is not int or not 0 <= value < MAX_COUNT:
            raise ValueError(f"{name} is {value!r}; it must be a whole number")


def check_size(needed: int, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError where a description asks for more numbers than its file of tensors holds."""
    held = sum(t.numel() for t in tensors.values())
    if needed > held:
        raise ValueError(f"its description asks for {needed:,} numbers, its tensors hold {held:,}")


def moments_of(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """An optimiser's moments, by the place of their parameter, from tensors named ``PLACE.NAME``.

    Raises:
        ValueError: one is of no parameter, or of another shape than its parameter.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        place, name = key.split(".", 1)
        wanted = parameters[int(place)].shape if int(place) < len(parameters) else None
        if wanted is None or (value.dim() and value.shape != wanted):
            needed = "absent" if wanted is None else tuple(wanted)
            raise ValueError(f"the optimiser's {key} has shape {tuple(value.shape)}; it must be {needed}")
        moments.setdefault(int(place), {})[name] = value
    return moments
