"""Edits any number of facts into an LLM with any agent."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypedDict

import numpy as np
import torch

from agents.base import Agent, act, begin_stream
from agents.running.recording import LedgerRecorder, Position, Taken
from rledit_env.encoding import EncodedDataset
from rledit_env.env import LifelongEditEnv
from rledit_env.interface import Environment, editing_env
from rledit_env.knowledge import KnowledgeDataset
from rledit_env.ledger import EditLedger
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.losses import negative_log_likelihood
from rledit_env.spaces import Action, Observation
from rledit_env.type_aliases import Info


class Guard(Protocol):
    """What may end a run after any batch, such as `rledit_env.evaluation.guard.DriftGuard`."""

    def exceeded(self, batch: int) -> bool:
        """Whether the run is to end after this batch, counted from 0."""
        ...


@dataclass
class EditLog:
    """The record of an edited stream.

    Attributes:
        batch_sizes: number of facts in each batch.
        update_norms: for each batch, √(Σ ‖ΔW‖_F²) over the modules and the batch's steps.
        drift: mean ‖W − W₀‖ / ‖W₀‖ over the modules at the end.
        seconds: time spent on editing, without any evaluation.
        diverged: whether an update broke the model; editing ended there, with the weights before that update.
        skipped: batches (from 0) with an update that broke the model and was taken back, once for each such update.
        stopped: whether a guard ended the run.
        presentations: for each fact, in the stream's order, how often it was presented.
        taken: for each fact, whether the LLM answers with it after all edits (see :func:`have_taken`); empty if facts
            were presented a fixed number of times.
    """

    batch_sizes: list[int] = field(default_factory=list)
    update_norms: list[float] = field(default_factory=list)
    drift: float = 0.0
    seconds: float = 0.0
    diverged: bool = False
    skipped: list[int] = field(default_factory=list)
    stopped: bool = False
    presentations: list[int] = field(default_factory=list)
    taken: list[bool] = field(default_factory=list)

    @property
    def facts(self) -> int:
        """Facts edited."""
        return sum(self.batch_sizes)

    @property
    def seconds_per_fact(self) -> float:
        return self.seconds / max(self.facts, 1)

    def batches(self) -> list[range]:
        """The range of each batch's facts in the stream."""
        ends = [sum(self.batch_sizes[: i + 1]) for i in range(len(self.batch_sizes))]
        return [range(end - size, end) for end, size in zip(ends, self.batch_sizes, strict=True)]


def edit_stream(
    env: Environment,
    agent: Agent,
    log: EditLog | None = None,
    progress: Callable[[int], object] | None = None,
    callbacks: Sequence[Callable[[int], object]] = (),
    ledger: EditLedger | None = None,
    guard: Guard | None = None,
    **reset: Any,
) -> EditLog:
    """Edit one stream of an environment made with ``array_backend="torch"``.

    Args:
        env: the environment.
        agent: the agent. It is reset, unless the weights are kept (``options={"keep_weights": True}``): then it keeps
            its memory of the stream.
        log: an earlier stream's log, to be continued.
        progress: called after every batch with the number of its facts.
        callbacks: called before the first batch with 0, and after every batch with the number of batches edited so
            far, such as `rledit_env.evaluation.retention.RetentionProbe`; their time does not count as editing.
        ledger: records every update before it takes effect. If it contains this stream or its beginning, the run
            resumes from there, and ends as it would have ended without the interruption.
        guard: checked after every batch; ends the run, for example if the LLM has drifted too far.
        reset: arguments of the environment's ``reset``.

    Raises:
        DivergenceError: an update broke the LLM, and the environment's ``on_divergence`` is "raise".
        LedgerError: the ledger contains another run.
    """
    log = log or EditLog()
    begin_stream(agent, reset)
    started = time.perf_counter()
    stream = _StreamEditor(env, agent, log, progress, ledger)
    inner, position = stream.inner, stream.resume()
    in_flight = position if position.update is not None else None
    done = position.step >= inner.episode_steps
    if position.step or in_flight is not None:
        reset["options"] = {**(reset.get("options") or {}), "keep_weights": True, "start": position.step}
    if not done:
        observation, _ = env.reset(**reset)
        if stream.first == position.step == 0 and in_flight is None:
            started += _call(callbacks, 0)
    inner.recorder = stream.recorder
    try:
        while not done:
            observation, info, batch_ended, done = stream.take_step(observation, in_flight)
            in_flight = None
            if info["diverged"]:
                log.diverged = inner.on_divergence == "end" or (done and stream.step < inner.episode_steps)
                warnings.warn(f"the update of batch {stream.first + info['batch']} ({_last_facts(log)}) broke the LLM "
                              "and was taken back", stacklevel=2)
            if batch_ended and not info["diverged"]:
                started += _call(callbacks, len(log.batch_sizes))
            if guard is not None and batch_ended and guard.exceeded(len(log.batch_sizes) - 1):
                log.stopped = done = True
    finally:
        inner.recorder = None
    log.drift = float(np.mean(list(inner.lm.drift().values())))
    log.seconds += time.perf_counter() - started
    return log


class _StreamEditor:
    """Edits a stream step by step, and records the steps in the log and the ledger.

    Args:
        env, agent, log, progress, ledger: as for :func:`edit_stream`.
    """

    def __init__(
        self, env: Environment, agent: Agent, log: EditLog, progress: Callable[[int], object] | None,
        ledger: EditLedger | None,
    ) -> None:  # fmt: skip
        self.env, self.agent, self.log, self.progress = env, agent, log, progress
        self.inner = editing_env(env)
        self.first = len(log.batch_sizes)  # the number in the log of the stream's first batch
        self.recorder = LedgerRecorder(ledger, self.inner, agent, self.first) if ledger is not None else None
        self.step = 0  # the next step's place in the stream

    def resume(self) -> Position:
        """Log the steps that the ledger recorded, and return the position to continue from; without recorded steps, the
        stream's beginning."""
        position = self.recorder.take_up() if self.recorder is not None else Position([], 0, None)
        for step in position.taken:
            self._log_step(step)
        self.step = position.step
        self._report_progress(self.step // self.inner.steps_per_batch)
        return position

    def take_step(self, observation: Observation, in_flight: Position | None) -> tuple[Observation, Info, bool, bool]:
        """Present a batch once.

        Args:
            observation: the batch's observation.
            in_flight: the position with this step's recorded update, which is applied again; None: the agent acts.

        Returns:
            The next observation, the step's info, and whether the batch and the stream have ended.
        """
        inner, recorder = self.inner, self.recorder
        if in_flight is not None and in_flight.update is not None:
            action: Action = in_flight.update.parts()
            norm = in_flight.norm
        else:
            action = act(self.agent, observation)
            norm = inner.accept(action).norm(inner.lm)
        if recorder is not None:
            recorder.step, recorder.norm = self.step, norm
            # With present_until a batch may end before it has been presented so often.
            if inner.present_until is not None or (self.step + 1) % inner.steps_per_batch == 0:
                # The last bits of cached states depend on the passages computed with them. A run resumed at the next
                # batch must get the same states, so they must not depend on earlier batches.
                inner.lm.prefix_cache.clear()
        presented = inner.presented_facts()
        with recorder.again() if recorder is not None and in_flight is not None else nullcontext():
            observation, _, terminated, truncated, info = self.env.step(action)
        self.step = inner.position
        self._log_step(Taken(info["batch"], norm, info["diverged"], presented))
        batch_ended = self.step // inner.steps_per_batch > info["batch"]
        self._report_progress(int(batch_ended))
        return observation, info, batch_ended, terminated or truncated

    def _log_step(self, step: Taken) -> None:
        log, size = self.log, self.inner.stream.batch_size
        if self.first + step.batch == len(log.batch_sizes):
            log.batch_sizes.append(size)
            log.update_norms.append(0.0)
            log.presentations += [0] * size
        begin = len(log.presentations) - size
        for place in range(size) if step.presented is None else step.presented:
            log.presentations[begin + place] += 1
        if step.broke:
            log.skipped.append(self.first + step.batch)
        else:
            log.update_norms[-1] = math.hypot(log.update_norms[-1], step.norm)

    def _report_progress(self, batches: int) -> None:
        """Call ``progress`` once for each of these batches."""
        for _ in range(batches if self.progress is not None else 0):
            self.progress(self.inner.stream.batch_size)  # type: ignore[misc]


def _call(callbacks: Sequence[Callable[[int], object]], edited: int) -> float:
    """Call all callbacks; returns the seconds they took."""
    started = time.perf_counter()
    for callback in callbacks:
        callback(edited)
    return time.perf_counter() - started


def _last_facts(log: EditLog) -> str:
    last = log.batches()[-1]
    return f"facts {last.start + 1} to {last.stop}"


class StreamSettings(TypedDict, total=False):
    """How facts are presented: arguments of :func:`edit_facts`, for a run's report and ledger, too."""

    token: str
    steps_per_batch: int
    present_until: float
    contexts: int
    batch_size: int


@contextmanager
def keeping_env(agent: Agent) -> Iterator[None]:
    """Context in which an agent may be set to other environments; it gets its own back at the end."""
    former_env = agent.env
    try:
        yield
    finally:
        if former_env is None:
            agent.env = None
        else:
            agent.set_env(former_env)


def edit_facts(  # noqa: PLR0913  the environment's parameters by their own names
    lm: EditableLM,
    agent: Agent,
    facts: KnowledgeDataset,
    batch_size: int = 20,
    token: str = "answer",
    steps_per_batch: int = 1,
    progress: Callable[[int], object] | None = None,
    ledger: EditLedger | None = None,
    guard: Guard | None = None,
    on_divergence: Literal["end", "skip", "raise"] = "end",
    present_until: float | None = None,
    contexts: int = 0,
    log: EditLog | None = None,
) -> EditLog:
    """Edit all facts into the LLM, in order; the last batch may be smaller.

    The LLM starts from its pre-trained weights and keeps the edited ones. The agent is reset, and gets its former
    environment back at the end. No reward is computed. With the ``log`` of an earlier call, the LLM and the agent go on
    from where that call left them.

    Args:
        lm: the LLM.
        agent: an agent trained with the same modules, ``token`` and ``steps_per_batch``.
        facts: the facts to edit.
        batch_size: facts a batch.
        token, steps_per_batch: as in :class:`~rledit_env.env.LifelongEditEnv`.
        progress: called after every batch with the number of its facts.
        ledger, guard: as for :func:`edit_stream`.
        on_divergence, present_until, contexts: as in :class:`~rledit_env.env.LifelongEditEnv`.
        log: the log of the first facts of ``facts``, which have been edited already by this agent, and recorded in this
            ledger. It is continued with the other facts.
    """
    log = log or EditLog()
    log.diverged = log.stopped = False
    first = log.facts
    full, rest = divmod(len(facts) - first, batch_size)
    with keeping_env(agent):
        for start, batches, size in ((first, full, batch_size), (first + full * batch_size, 1, rest)):
            if batches * size == 0 or log.diverged or log.stopped:
                continue
            env = LifelongEditEnv(
                facts.kind, lm, data=facts, num_batches=batches, batch_size=size, token=token, reward="none",
                steps_per_batch=steps_per_batch, array_backend="torch", on_divergence=on_divergence,
                present_until=present_until, contexts=contexts,
            )
            options = {"indices": list(range(start, start + batches * size)), "keep_weights": start > 0}
            agent.set_env(env)  # for editors that read the facts from their environment
            edit_stream(env, agent, log, progress, ledger=ledger, guard=guard, seed=0, options=options)
    if present_until is not None:
        log.taken = have_taken(lm, facts, present_until)[: log.facts]
    return log


def have_taken(lm: EditableLM, facts: KnowledgeDataset, probability: float) -> list[bool]:
    """For each fact, whether the present LLM gives every token of the answer at least this probability, given the
    prompt and the answer's tokens before it."""
    encoded = EncodedDataset(lm, facts)
    passages = [encoded[i].edit for i in range(len(facts))]
    states = lm.answer_states(passages)
    with torch.no_grad():
        losses = negative_log_likelihood(lm.forward, states.hidden, states.targets)
    largest = losses.new_zeros(len(passages)).scatter_reduce_(0, states.owner, losses, "amax")  # by passage
    return (largest <= -math.log(probability)).tolist()
