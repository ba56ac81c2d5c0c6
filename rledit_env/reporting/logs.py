"""Reads the TensorBoard logs of a training run."""

from __future__ import annotations

from pathlib import Path


def read_curves(log_dir: str | Path) -> dict[str, list[tuple[float, float]]]:
    """The scalars in a folder of TensorBoard logs: tag (such as "train/return") → (update, value) pairs; empty if there
    are none."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(log_dir), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
