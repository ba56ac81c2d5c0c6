"""TensorBoard's logs of training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def summary_writer(folder: Path | None, done: int = 0) -> SummaryWriter | None:
    """TensorBoard's writer, or None without a folder. Entries that an interrupted run logged after its checkpoint at
    step ``done`` are dropped."""
    if folder is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=done + 1 if done else None)


def log(writer: SummaryWriter | None, group: str, numbers: Mapping[str, float], step: int) -> None:
    """Write ``numbers`` as ``group/name``; do nothing without a writer."""
    if writer is not None:
        for name, value in numbers.items():
            writer.add_scalar(f"{group}/{name}", value, step)
