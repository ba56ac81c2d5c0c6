"""Fine-tuning in rounds over a batch's facts: the losses, the loop, and the base class of the editors that use it."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from agents.base import Agent, Callback
from agents.facts import facts_themselves
from agents.files import agent_folder
from agents.settings import environment_settings
from rledit_env.files import write_text
from rledit_env.interface import Environment, editing_env
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage
from rledit_env.lm.losses import negative_log_likelihood
from rledit_env.nesting import environment_inside
from rledit_env.spaces import Action, Observation

Objective = Literal["prompt_last", "target_new", "pooled"]
OBJECTIVES = ("prompt_last", "target_new", "pooled")
Self = TypeVar("Self", bound="FactTuningAgent")


class Rounds(Protocol):
    """The settings of :func:`fine_tune`; `agents.fine_tuning.FTLConfig` documents them."""

    @property
    def steps(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def loss_goal(self) -> float: ...
    @property
    def objective(self) -> Objective: ...
    @property
    def batch_size(self) -> int | None: ...


def check_rounds(rounds: Rounds) -> None:
    """Raise ValueError for a setting out of range."""
    if rounds.objective not in OBJECTIVES:
        raise ValueError(f"objective is {rounds.objective!r}; give {' or '.join(map(repr, OBJECTIVES))}")
    if not rounds.learning_rate > 0:
        raise ValueError(f"learning_rate is {rounds.learning_rate}; give a positive number")
    if rounds.steps < 0:
        raise ValueError(f"steps is {rounds.steps}; give 0 or more")
    if rounds.batch_size is not None and rounds.batch_size < 1:
        raise ValueError(f"batch_size is {rounds.batch_size}; give 1 or more, or None for all facts at once")


class FactTuningAgent(Agent):
    """Base class of editors that fine-tune weights on the facts of a batch.

    They read the LLM and the batch's facts from the environment, and leave the LLM unchanged, bit for bit; their action
    is the dense update.

    Args:
        env: the environment that it edits in.
        config: the settings.
        seed: unused, since nothing is random.
    """

    FORMAT: ClassVar[int]  # of agent.json
    config_class: ClassVar[type[Any]]

    def __init__(self, env: Environment | None, config: Any = None, seed: int = 0) -> None:
        if env is not None:
            environment_inside(env, type(self).__name__, agent=True)
        self.env, self.config, self.seed = env, config or self.config_class(), seed

    def predict(self, observation: Observation, deterministic: bool = True) -> tuple[Action, None]:
        """{"updates": module → ΔW (d_out, d_in)} for the environment's current batch.

        Raises:
            ValueError: the agent has no environment, or the environment does not edit ``config.module``.
        """
        if self.env is None:
            raise ValueError("this agent fine-tunes the environment's LLM; load it with env=…")
        inner = editing_env(self.env)
        passages = [record.edit for record in facts_themselves(inner)]
        numpy = inner.array_backend == "numpy"
        updates = self.fine_tuned(inner.lm, passages)
        return {"updates": {m: u.cpu().numpy() if numpy else u for m, u in updates.items()}}, None

    @abstractmethod
    def fine_tuned(self, lm: EditableLM, passages: Sequence[Passage]) -> dict[str, Tensor]:
        """ΔW (d_out, d_in) by module; the LLM's weights are restored, bit for bit."""

    def learn(
        self: Self, total_timesteps: int = 0, callback: Callback | None = None, progress_bar: bool = True,
        reset_num_timesteps: bool = True,
    ) -> Self:  # fmt: skip
        """Do nothing; there is nothing to train."""
        return self

    def save(self, path: str | Path) -> None:
        """Write the settings as JSON."""
        description = {
            "agent": self.name, "format": self.FORMAT, "seed": self.seed, "config": asdict(self.config),
            "environment": environment_settings(self.env),
        }  # fmt: skip
        write_text(agent_folder(path) / "agent.json", json.dumps(description, indent=1) + "\n")


def later_format(folder: str | Path, saved_format: object, known: str) -> ValueError:
    """The error for an agent in a format of a later version."""
    return ValueError(f"{folder} was saved by a later version of this package (format {saved_format}; {known}); "
                      "install that version, or save the agent again with this one")


def fine_tune(
    lm: EditableLM,
    passages: Sequence[Passage],
    rounds: Rounds,
    changes: Mapping[str, Tensor],
    step: Callable[[Mapping[str, Tensor]], None],
    at_end: Callable[[], None] = lambda: None,
) -> None:
    """Change weights in rounds over the facts; the LLM's weights are restored, bit for bit.

    Args:
        lm: the LLM.
        passages: the prompts and targets of the batch; if empty, nothing is changed.
        rounds: the settings.
        changes: module → the change ΔW (d_out, d_in) of its weight so far, zero at first.
        step: changes ΔW in place, given the gradients (d_out, d_in) of a part of the facts by module.
        at_end: called at the end, with the changed weights in the LLM.
    """
    start = lm.snapshot()
    size = rounds.batch_size or max(len(passages), 1)
    parts = [passages[first : first + size] for first in range(0, len(passages), size)]
    try:
        for _ in range(rounds.steps if passages else 0):
            total = 0.0
            for part in parts:
                loss, gradients = loss_and_gradients(lm, part, list(changes), rounds.objective)
                total += loss * len(part) / len(passages)
                if not loss >= rounds.loss_goal:  # the goal is reached, or the LLM broke (NaN)
                    continue
                step(gradients)
                lm.restore({**start, **{m: start[m] + change for m, change in changes.items()}})
            if not total >= rounds.loss_goal:
                break
        at_end()
    finally:
        lm.restore(start)


def loss_and_gradients(
    lm: EditableLM, passages: Sequence[Passage], modules: Sequence[str], objective: str
) -> tuple[float, dict[str, Tensor]]:
    """The loss of these facts (see `FTLConfig.objective`) and its gradient by module (d_out, d_in), in the weights'
    precision."""
    counts = [len(p.targets) for p in passages]
    if objective == "pooled":
        shares = [1 / sum(counts)] * len(passages)
    else:
        shares = [1 / (count * len(passages)) for count in counts]
    run = [prompt_of(p) for p in passages] if objective == "prompt_last" else list(passages)
    total = 0.0
    with lm.collecting() as (sums,):
        for chunk, states in lm.answer_chunks(run):
            hidden, lengths = states.hidden, torch.tensor([counts[i] for i in chunk], device=lm.device)
            if objective == "prompt_last":  # one state a fact, for all of its target tokens
                hidden = hidden.repeat_interleave(lengths, dim=0)
            targets = torch.tensor([t for i in chunk for t in passages[i].targets], device=lm.device)
            nll = negative_log_likelihood(lm.forward, hidden, targets)
            share = torch.tensor([shares[i] for i in chunk], device=lm.device, dtype=nll.dtype)
            loss = nll @ share.repeat_interleave(lengths)
            loss.backward()
            total += float(loss.detach())
    return total, {m: sums[m] for m in modules}


def prompt_of(passage: Passage) -> Passage:
    """The passage's prompt alone; its last position predicts the first target token."""
    end = passage.positions[0] + 1
    return Passage(passage.input_ids[:end], passage.targets[:1], passage.subject_position)
