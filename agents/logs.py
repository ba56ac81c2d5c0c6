"""TensorBoard's logs of training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def summary_writer(folder: Path | None, done: int = 0) -> Any:
    """TensorBoard's writer, or None without a folder; what an interrupted run logged beyond its checkpoint at ``done``
    is dropped."""
    if folder is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=done + 1 if done else None)


def log(writer: Any, group: str, numbers: Mapping[str, float], step: int) -> None:
    """Write ``numbers`` as ``group/name``, where there is a writer."""
    if writer is not None:
        for name, value in numbers.items():
            writer.add_scalar(f"{group}/{name}", value, step)
