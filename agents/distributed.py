"""Data-parallel training: every process edits its own streams, and one averaged update moves all policies alike.

Processes are started by ``accelerate launch`` or ``torchrun``, on one machine or several. What travels is the policy's
gradient, once an update, and the facts' scores, never the LLM's weights nor its updates.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rledit_env.knowledge import EditRecord
from rledit_env.lm.editable import EditableLM
from rledit_env.metrics import Metrics, evaluate


@dataclass(frozen=True)
class Processes:
    """The processes that train together; by default, and where there are no others, this one alone.

    Attributes:
        rank: this process's place, from 0.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def started(cls) -> Processes:
        """Those that ``accelerate launch`` or ``torchrun`` started together with this one.

        They are connected if they are not yet: by NCCL where every process has a GPU of its own, else by gloo.
        """
        distributed = torch.distributed
        if not distributed.is_available():
            return cls()
        if not distributed.is_initialized():
            if int(os.environ.get("WORLD_SIZE", "1")) == 1:
                return cls()
            from accelerate import PartialState

            # Accelerate reads the launcher's variables, sets this process's GPU, and chooses the backend.
            PartialState(cpu=not torch.cuda.is_available())
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this process writes the files and shows the progress."""
        return self.rank == 0

    @property
    def device(self) -> str:
        """Where this process's LLM belongs: ``"cuda:i"`` for the i-th process of a machine, or ``"cpu"``."""
        if not torch.cuda.is_available():
            return "cpu"
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The mean of each tensor over all processes, the same bits in each; one message for all of a type."""
        if self.count == 1:
            return list(tensors)
        flat = torch.cat([t.detach().reshape(-1) for t in tensors])
        torch.distributed.all_reduce(flat)
        flat /= self.count
        pieces = flat.split([t.numel() for t in tensors])
        return [p.view_as(t) for p, t in zip(pieces, tensors, strict=True)]

    def gathered(self, value: Any) -> list[Any]:
        """What every process gives, in their order; for numbers and small things."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """The first process's value, in all of them."""
        return self.gathered(value if self.first else None)[0]

    def share(self, items: Sequence[Any]) -> list[Any]:
        """This process's part of some items: every ``count``-th, beginning with its own rank."""
        return list(items[self.rank :: self.count])


def evaluate_sharded(processes: Processes, lm: EditableLM, records: Sequence[EditRecord], kind: str) -> Metrics:
    """:func:`rledit_env.metrics.evaluate` without generation, each process scoring its share of the records.

    Every process's LM must hold the same edited weights. The result is the same in all of them, and that of one process
    alone, to rounding.
    """
    mine = processes.share(records)
    metrics = evaluate(lm, mine, kind, generate=False) if mine else None
    parts = [p for p in processes.gathered((metrics, _scored_things(lm, mine, kind))) if p[0] is not None]
    if len(parts) == 1:
        return parts[0][0]

    def mean(name: str) -> float:
        total = sum(counts[name] for _, counts in parts)
        return float(sum(getattr(one, name) * counts[name] for one, counts in parts) / total)

    names = ("efficacy", "generalization", "specificity", "specificity_answer", "top1")
    return Metrics(**{name: mean(name) for name in names}, exact_match=None, taken=())


def _scored_things(lm: EditableLM, records: Sequence[EditRecord], kind: str) -> dict[str, int]:
    """What each score is the share of: prompts for CounterFact's comparisons, answer tokens otherwise."""
    tokens = [len(lm.tokenize(r.prompt, r.target, origin=r.origin).targets) for r in records]
    if kind == "counterfact":
        edits, general = len(records), sum(len(r.paraphrases) for r in records)
        specific = sum(len(r.unrelated) for r in records)
    else:
        edits = sum(tokens)
        general = sum(len(lm.tokenize(p, r.target).targets) for r in records for p in r.paraphrases)
        specific = sum(len(lm.tokenize(u.prompt, u.answer).targets) for r in records for u in r.unrelated)
    return {"efficacy": edits, "generalization": general, "specificity": specific, "specificity_answer": specific,
            "top1": sum(tokens)}
