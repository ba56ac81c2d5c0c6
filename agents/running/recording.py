"""Records what an agent does to an LLM in an edit ledger, and takes a recorded run up where it ended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from agents.base import Agent
from rledit_env.env import LifelongEditEnv
from rledit_env.ledger import (
    EditLedger,
    Entry,
    LedgerError,
    RunState,
    original_weights,
    weights_hash,
)
from rledit_env.updates import NOTHING, Update


@dataclass(frozen=True)
class Taken:
    """A step that a recorded stream has taken.

    Attributes:
        batch: of the stream, from 0.
        norm: its update's, √(Σ ‖ΔW‖_F²).
        broke: whether it was taken back, since it broke the LLM.
        presented: the facts that it presented, as places in the batch; None for all.
    """

    batch: int
    norm: float
    broke: bool
    presented: Sequence[int] | None = None


@dataclass(frozen=True)
class Position:
    """Where a recorded stream goes on.

    Attributes:
        taken: the stream's steps that need not be gone through again.
        step: the place in the stream to go on with, as `LifelongEditEnv.reset` takes its "start".
        update: what that step did, if it was in flight: it is taken again as it was.
        norm: that update's.
    """

    taken: list[Taken]
    step: int
    update: Update | None
    norm: float = 0.0


class LedgerRecorder:
    """The recorder of one stream.

    Each of the environment's updates is appended to the ledger. What the ledger holds already, since the run was
    interrupted there, is compared with it instead.

    Args:
        ledger: locked for writing.
        env: the stream's environment.
        agent: whose memory is kept with each update.
        first_batch: the number in the run of the stream's first batch.
    """

    def __init__(self, ledger: EditLedger, env: LifelongEditEnv, agent: Agent, first_batch: int = 0) -> None:
        self.ledger, self.env, self.agent, self.first_batch = ledger, env, agent, first_batch
        self.step, self.norm = 0, 0.0  # the place in the stream, and its next update's norm; set by who steps it
        self.cursor = len(ledger)  # the next entry; those before len(ledger) are compared with
        self._before: Mapping[str, Tensor] = {}
        self._last: Entry | None = None  # the step in flight

    # -- what the environment tells ----------------------------------------------------------------------------------

    def record(self, update: Update) -> Mapping[str, Tensor]:
        env, lm = self.env, self.env.lm
        before = {m: lm.weight(m) for m in lm.module_shapes}
        after = update.updated(before, original_weights(lm))
        batch, presentation = divmod(self.step, env.steps_per_batch)
        if self.cursor < len(self.ledger):
            self._compare("edit", after)
        else:
            size = env.stream.batch_size
            facts = env.stream.indices[batch * size : (batch + 1) * size].tolist()
            presented = None if env.present_until is None else env.presented_facts()
            state = RunState(presentation, presented, env.np_random.bit_generator.state, self.agent.memory())
            self.ledger.append("edit", update, after, self.first_batch + batch, facts, self.norm, state)
        self.cursor += 1
        self._before = {m: w.clone() for m, w in before.items()}
        return after

    def roll_back(self) -> None:
        if self.cursor < len(self.ledger):
            self._compare("rollback", self._before)
        else:
            last = self.ledger.summary(self.cursor - 1)
            self.ledger.append(
                "rollback", NOTHING, self._before, last.batch, last.facts, state=RunState(last.presentation)
            )
        self.cursor += 1

    def _compare(self, kind: str, after: Mapping[str, Tensor]) -> None:
        entry = self.ledger.summary(self.cursor)
        if entry.kind != kind or entry.weights_after != weights_hash(after):
            raise LedgerError(
                f"the run does not repeat what {self.ledger.folder} recorded: entry {self.cursor} ({entry.kind} of "
                f"batch {entry.batch}) led to other weights. Go on with the agent, device and number of threads that "
                "it was begun with, or begin a new ledger"
            )

    # -- taking up a run -----------------------------------------------------------------------------------------------

    def take_up(self) -> Position:
        """Where the stream goes on. The agent, and the LLM if the run ended in this stream, are then as they were.

        Raises:
            LedgerError: the agent's memory is damaged, or an undo stands in the way.
        """
        ledger, env = self.ledger, self.env
        entries = list(ledger.entries())
        edits = [e for e in entries if e.kind == "edit"]
        mine = [e for e in edits if self.first_batch <= e.batch < self.first_batch + env.stream.num_batches]
        if self.agent.memory() is None:
            if any(e.kind == "undo" for e in entries):
                raise LedgerError(
                    f"{type(self.agent).__name__} cannot say what it remembers, so that a run would have to be gone "
                    f"through again; but in {ledger.folder} batches were undone. Edit the rest with a new ledger"
                )
            self.cursor = mine[0].index if mine else len(ledger)
            return Position([], 0, None)
        if not mine:
            return Position([], 0, None)
        taken_back = {e.index - 1 for e in entries if e.kind == "rollback"}
        taken = [Taken(e.batch - self.first_batch, e.norm, e.index in taken_back, e.presented) for e in mine]
        if mine[-1] is not edits[-1]:  # the run went on after this stream
            return Position(taken, env.episode_steps, None)
        after_last = entries[mine[-1].index + 1 :]
        undone = any(e.kind == "undo" for e in after_last)
        memory = ledger.memory(mine[-1].index)
        if memory is None and not undone and len(mine) > 1 and ledger.memory(mine[-2].index) is not None:
            ledger.cut(mine[-1].index)  # its memory alone is damaged: take that step anew
            return self.take_up()
        if memory is None:
            raise LedgerError(f"{ledger.folder} no longer holds what the agent remembered at entry {mine[-1].index}; "
                              "the weights can be replayed, but the run cannot go on")
        self.agent.load_memory(memory)
        last = ledger.read(mine[-1].index)
        step = (last.batch - self.first_batch) * env.steps_per_batch + last.presentation
        if undone:
            ledger.replay(env.lm)
            self.cursor = len(ledger)
            if env.present_until is not None:  # what was undone has not taken, but is not to come again
                return Position(taken, (last.batch - self.first_batch + 1) * env.steps_per_batch, None)
            return Position(taken, step + 1, None)
        ledger.replay(env.lm, last.index)
        self.cursor = last.index
        self._last = last
        return Position(taken[:-1], step, last.update, last.norm)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Within it, the step in flight is taken as it was: with its random state, and no noise added anew."""
        last, env = self._last, self.env
        assert last is not None
        try:
            self.env.np_random.bit_generator.state = dict(last.random or {})
            if last.torch_random is not None:
                torch.set_rng_state(last.torch_random)
        except (TypeError, ValueError, KeyError, RuntimeError, OverflowError) as error:
            raise LedgerError(f"the random state of entry {last.index} of {self.ledger.folder} is damaged "
                              f"({error})") from error
        noise, env.action_noise_std = env.action_noise_std, 0.0
        try:
            yield
        finally:
            env.action_noise_std = noise
