"""Data-parallel training: every process runs its own episodes, and one averaged update is applied to all policies.

Processes are started by ``accelerate launch`` or ``torchrun``, on one machine or several. They exchange the policy's
gradient, once an update, and the facts' scores, never the LLM's weights or its updates.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor

from rledit_env.evaluation.groups import edits_of
from rledit_env.evaluation.metrics import Metrics, averaged, score_records
from rledit_env.knowledge import EditRecord
from rledit_env.lm.editable import EditableLM

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes that train together; by default this one alone.

    Attributes:
        rank: this process's place, from 0.
        count: the number of processes.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def started(cls) -> Processes:
        """The processes that ``accelerate launch`` or ``torchrun`` started together with this one.

        They are connected if they are not yet: by NCCL if every process has its own GPU, else by gloo.
        """
        distributed = torch.distributed
        if not distributed.is_available():
            return cls()
        if not distributed.is_initialized():
            if int(os.environ.get("WORLD_SIZE", "1")) == 1:
                return cls()
            from accelerate import PartialState

            # It reads the launcher's variables, sets this process's GPU, and chooses the backend.
            PartialState(cpu=not torch.cuda.is_available())
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this process writes the files and shows the progress."""
        return self.rank == 0

    @property
    def device(self) -> str:
        """The device for this process's LLM: ``"cuda:i"`` for the i-th process of a machine, or ``"cpu"``."""
        if not torch.cuda.is_available():
            return "cpu"
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The mean of each tensor over all processes, bit for bit the same in each; all tensors in one message."""
        if self.count == 1:
            return list(tensors)
        flat = torch.cat([t.detach().reshape(-1) for t in tensors])
        torch.distributed.all_reduce(flat)
        flat /= self.count
        pieces = flat.split([t.numel() for t in tensors])
        return [p.view_as(t) for p, t in zip(pieces, tensors, strict=True)]

    def gathered(self, value: T) -> list[T]:
        """Every process's value, in the order of the ranks; for numbers and small objects."""
        if self.count == 1:
            return [value]
        values: list[T] = [value] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    def from_first(self, value: T) -> T:
        """The first process's value, in every process."""
        values: list[T | None] = self.gathered(value if self.first else None)
        return cast(T, values[0])

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of the items: every ``count``-th, beginning with the item at its rank."""
        return list(items[self.rank :: self.count])


def evaluate_sharded(
    processes: Processes, lm: EditableLM, records: Sequence[EditRecord], kind: str, metrics: str = "paper"
) -> Metrics:
    """:func:`rledit_env.evaluation.metrics.evaluate` without generation, each process scoring its share of the records.

    Every process's LLM must have the same edited weights. The processes exchange each record's scores, so the result is
    the same in all of them, and equals that of one process to rounding. Arguments and errors are those of `evaluate`.
    """
    if not records:
        raise ValueError("no fact has been edited yet; take at least one step first")
    shard_records = processes.share(records)
    edits = edits_of(records)
    shards = processes.gathered(score_records(lm, shard_records, kind, metrics, edits) if shard_records else {})
    names = dict.fromkeys(name for shard in shards for name in shard)  # a shard may lack another's groups
    scores: dict[str, list[float | None]] = {name: [None] * len(records) for name in names}
    for name, values in scores.items():
        for rank, shard in enumerate(shards):
            if name in shard:
                values[rank :: processes.count] = shard[name]
    return averaged(scores, metrics)
