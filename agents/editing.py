"""Edits facts into an LLM with any agent, however many there are."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym

from agents.base import Agent
from rledit_env.env import LifelongEditEnv
from rledit_env.knowledge import KnowledgeDataset
from rledit_env.lm.editable import EditableLM
from rledit_env.reward import action_penalty, frobenius_penalty


@dataclass
class EditLog:
    """What happened while a stream was edited.

    Attributes:
        batch_sizes: facts of each batch.
        update_norms: for each batch, √(Σ ‖ΔW‖_F²) over the modules and the batch's steps.
        drift: mean ‖W − W₀‖ / ‖W₀‖ over the modules at the end.
        seconds: spent on editing, without any evaluation.
        diverged: whether an update broke the model; editing ended there.
    """

    batch_sizes: list[int] = field(default_factory=list)
    update_norms: list[float] = field(default_factory=list)
    drift: float = 0.0
    seconds: float = 0.0
    diverged: bool = False

    @property
    def facts(self) -> int:
        """Facts edited."""
        return sum(self.batch_sizes)

    @property
    def seconds_per_fact(self) -> float:
        return self.seconds / max(self.facts, 1)

    def batches(self) -> list[range]:
        """The facts of each batch, as positions in the stream."""
        ends = [sum(self.batch_sizes[: i + 1]) for i in range(len(self.batch_sizes))]
        return [range(end - size, end) for end, size in zip(ends, self.batch_sizes, strict=True)]


def edit_stream(
    env: gym.Env,
    agent: Agent,
    log: EditLog | None = None,
    progress: Callable[[int], Any] | None = None,
    callbacks: Sequence[Callable[[int], Any]] = (),
    **reset: Any,
) -> EditLog:
    """Let an agent edit one stream of an environment made with ``array_backend="torch"``.

    Args:
        env: the environment.
        agent: it goes on with its memory of the stream; reset it before a new one.
        log: an earlier stream's, to be continued.
        progress: called after every batch with the number of its facts.
        callbacks: each is called before the first batch with 0, and after every batch with the number of batches
            edited so far, such as `rledit_env.retention.RetentionProbe`; their time is not the editing's.
        reset: arguments of the environment's ``reset``.
    """
    log = log or EditLog()
    inner: Any = env.unwrapped
    started = time.perf_counter()
    observation, _ = env.reset(**reset)
    if not log.batch_sizes:
        started += _call(callbacks, 0)
    done, step = False, 0
    while not done:
        action, _ = agent.predict(observation)
        made = _change_of(action, inner.lm)
        observation, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        if step % inner.steps_per_batch == 0:
            log.batch_sizes.append(inner.stream.batch_size)
            log.update_norms.append(0.0)
        squared = max(float(action_penalty(frobenius_penalty, made)), 0.0)
        log.update_norms[-1] = math.hypot(log.update_norms[-1], math.sqrt(squared))
        step += 1
        if progress is not None and step % inner.steps_per_batch == 0:
            progress(inner.stream.batch_size)
        if step % inner.steps_per_batch == 0 and not info["diverged"]:
            started += _call(callbacks, len(log.batch_sizes))
    log.drift, log.diverged = info["drift"], info["diverged"]
    log.seconds += time.perf_counter() - started
    return log


def _call(callbacks: Sequence[Callable[[int], Any]], edited: int) -> float:
    """Call all of them; returns the seconds that took."""
    started = time.perf_counter()
    for callback in callbacks:
        callback(edited)
    return time.perf_counter() - started


def _change_of(action: Any, lm: EditableLM) -> Any:
    """The change that an action is about to make: itself, but for a replacement, whose change depends on the weights
    as they are."""
    if set(action) != {"accumulated"}:
        return action
    accumulated = lm.matrices(action["accumulated"], "action['accumulated']")
    return {"updates": {m: a - (lm.weight(m) - lm.original_weight(m)) for m, a in accumulated.items()}}


def edit_facts(
    lm: EditableLM,
    agent: Agent,
    facts: KnowledgeDataset,
    batch_size: int = 20,
    token: str = "answer",
    steps_per_batch: int = 1,
    progress: Callable[[int], Any] | None = None,
) -> EditLog:
    """Edit all facts into the LLM, in order; a last batch may be smaller.

    The LLM starts from its pre-trained weights and keeps the edited ones. No reward is computed.

    Args:
        lm: the LLM.
        agent: trained with the same modules, ``token`` and ``steps_per_batch``.
        facts: what to edit.
        batch_size: facts a batch.
        token: as in :class:`~rledit_env.env.LifelongEditEnv`.
        steps_per_batch: as there.
        progress: called after every batch with the number of its facts.
    """
    agent.reset()
    log = EditLog()
    whole = len(facts) // batch_size
    for start, batches, size in ((0, whole, batch_size), (whole * batch_size, 1, len(facts) % batch_size)):
        if batches * size == 0 or log.diverged:
            continue
        env = LifelongEditEnv(
            facts.kind, lm, data=facts, num_batches=batches, batch_size=size, token=token, reward="none",
            steps_per_batch=steps_per_batch, array_backend="torch",
        )
        options = {"indices": list(range(start, start + batches * size)), "keep_weights": start > 0}
        edit_stream(env, agent, log, progress, seed=0, options=options)
    return log
