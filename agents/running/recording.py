"""Records an agent's updates in an edit ledger, and resumes a recorded run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from agents.base import Agent
from rledit_env.interface import EditingEnv
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
    """A step that a stream has taken.

    Attributes:
        batch: the batch's place in the stream, from 0.
        norm: norm of the update, √(Σ ‖ΔW‖_F²).
        broke: whether the update broke the LLM and was taken back.
        presented: the presented facts, as places in the batch; None for all.
    """

    batch: int
    norm: float
    broke: bool
    presented: Sequence[int] | None = None


@dataclass(frozen=True)
class Position:
    """The position from which a recorded stream continues.

    Attributes:
        taken: the stream's steps that need not be repeated.
        step: the next step, as for "start" of `LifelongEditEnv.reset`.
        update: the next step's recorded update, if the run was interrupted during that step; it is applied again.
        norm: norm of that update.
    """

    taken: list[Taken]
    step: int
    update: Update | None
    norm: float = 0.0


class LedgerRecorder:
    """The recorder of one stream.

    It appends each of the environment's updates to the ledger. When an interrupted run is repeated, updates that the
    ledger contains already are compared with the recorded ones instead.

    Args:
        ledger: the ledger, locked for writing.
        env: the stream's environment.
        agent: the agent; its memory is recorded with each update.
        first_batch: the number in the run of the stream's first batch.
    """

    def __init__(self, ledger: EditLedger, env: EditingEnv, agent: Agent, first_batch: int = 0) -> None:
        self.ledger, self.env, self.agent, self.first_batch = ledger, env, agent, first_batch
        self.step, self.norm = 0, 0.0  # the next step and its update's norm, set by the caller before each step
        self.cursor = len(ledger)  # the next entry; if it exists already, it is compared
        self._before: Mapping[str, Tensor] = {}
        self._last: Entry | None = None  # the step during which the run was interrupted

    # -- called by the environment -----------------------------------------------------------------------------------

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

    # -- resuming a run ------------------------------------------------------------------------------------------------

    def take_up(self) -> Position:
        """Find the position to continue from, and restore the agent's memory, and the weights if the run ended in this
        stream.

        Raises:
            LedgerError: the agent's recorded memory is damaged, or the run has to be repeated but batches were undone.
        """
        ledger, env = self.ledger, self.env
        entries = list(ledger.entries())
        edits = [e for e in entries if e.kind == "edit"]
        stream_edits = [e for e in edits if self.first_batch <= e.batch < self.first_batch + env.stream.num_batches]
        if self.agent.memory() is None:
            if stream_edits and any(e.kind == "undo" for e in entries):
                raise LedgerError(
                    f"{type(self.agent).__name__} cannot say what it remembers, so that a run would have to be gone "
                    f"through again; but in {ledger.folder} batches were undone. Edit the rest with a new ledger"
                )
            self.cursor = stream_edits[0].index if stream_edits else len(ledger)
            return Position([], 0, None)
        if not stream_edits:
            return Position([], 0, None)
        rolled_back = {e.index - 1 for e in entries if e.kind == "rollback"}
        steps = [Taken(e.batch - self.first_batch, e.norm, e.index in rolled_back, e.presented) for e in stream_edits]
        latest = stream_edits[-1].index
        if stream_edits[-1] is not edits[-1]:  # the run continued after this stream
            return Position(steps, env.episode_steps, None)
        undone = any(e.kind == "undo" for e in entries[latest + 1 :])
        memory = ledger.memory(latest)
        before = stream_edits[-2].index if len(stream_edits) > 1 else None
        if memory is None and not undone and before is not None and ledger.memory(before) is not None:
            ledger.cut(latest)  # only this step's memory is damaged: repeat the step
            return self.take_up()
        if memory is None:
            raise LedgerError(f"{ledger.folder} no longer holds what the agent remembered at entry {latest}; "
                              "the weights can be replayed, but the run cannot go on")
        self.agent.load_memory(memory)
        last = ledger.read(latest)
        step = (last.batch - self.first_batch) * env.steps_per_batch + last.presentation
        if undone:
            ledger.replay(env.lm)
            self.cursor = len(ledger)
            if env.present_until is not None:  # undone facts are not answered, but must not be presented again
                return Position(steps, (last.batch - self.first_batch + 1) * env.steps_per_batch, None)
            return Position(steps, step + 1, None)
        ledger.replay(env.lm, last.index)
        self.cursor = last.index
        self._last = last
        return Position(steps[:-1], step, last.update, last.norm)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Repeat the recorded step within the context: with its random state, and without adding action noise again."""
        last, env = self._last, self.env
        assert last is not None
        try:
            env.np_random.bit_generator.state = dict(last.random or {})
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
