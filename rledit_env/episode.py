"""EditEpisode: one episode of edits to one LLM, and the parts of its steps."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rledit_env import render, spaces
from rledit_env.contexts import Contexts
from rledit_env.encoding import EncodedDataset, EncodedRecord
from rledit_env.knowledge import KnowledgeStream
from rledit_env.ledger import Recorder
from rledit_env.lm.editable import EditableLM, Trace
from rledit_env.lm.forward import Passage
from rledit_env.lm.weights import NotFiniteError
from rledit_env.preservation import Multiplier
from rledit_env.reward import backtracked
from rledit_env.scoring import ScoredBatch, Scores, step_reward, with_texts
from rledit_env.settings import EpisodeSettings
from rledit_env.type_aliases import Info, Options
from rledit_env.updates import NOTHING, Update

# Attributes of an episode in a pickle; the LLM's weights, the order of the facts and the random state are in it, too.
KEPT = (
    "history", "position", "over", "rows", "refused", "answers_before", "scene", "choices", "first_scored", "open_edits"
)  # fmt: skip
GRADIENTS = ("reward_gradient", "action_gradient")  # the parts of `info` that are tensors


class DivergenceError(ArithmeticError):
    """An update broke the LLM, and ``on_divergence`` is "raise"; the message names the batch."""


class EditEpisode:
    """One episode: its batches, the position in it, and the step that is being taken.

    `rledit_env.env.LifelongEditEnv` runs one; `rledit_env.vector` runs many, with one trace and one score for all. A
    step is: :meth:`accept` the action; :meth:`apply` it; set ``checked`` if the batch :attr:`may_repeat`; score
    :meth:`batches_to_score`; :meth:`reward`; :meth:`conclude` with the trace of the next batch.

    Args:
        lm: the LLM.
        encoded: the data set's facts as passages of the LLM.
        stream: draws the facts and their order.
        settings: the environment's settings.
        max_tokens: rows of a padded observation.
        multiplier: multiplier of the reward's constraint, or None.
        contexts: texts behind which facts are presented, in addition to their plain prompts.

    Attributes:
        recorder: None, or an object that records every update before it takes effect.
        random: the environment's generator; None before the first episode.
        history: the reward and the numbers in ``info``, step by step.
        position: the place in the episode: index of the batch times ``steps_per_batch``, plus the presentation.
        over: whether no step can be taken: the episode has ended, or none was begun.
        rows: rows in use of the latest observation.
        open_edits: which of the batch's :meth:`edits` had not taken when last observed, bool; None where nobody looked.
        choices: for each fact, a number in [0, 1) that picks one of its paraphrases and unrelated pairs.
        first_scored: the first batch that is scored, with a ``batch_stride``.
        refused: whether the step's action was not finite, and is skipped.
        checked: the trace of the step's batch at the updated weights, which tells whether its facts have taken.
        weights_before: the weights before the step, where the reward compares with them.
        answers_before: the LLM's answers before the step, where they are rendered.
        scene: the last step, for rendering.
    """

    def __init__(
        self,
        lm: EditableLM,
        encoded: EncodedDataset,
        stream: KnowledgeStream,
        settings: EpisodeSettings,
        max_tokens: int,
        multiplier: Multiplier | None,
        contexts: Contexts,
    ) -> None:
        self.lm, self.encoded, self.stream = lm, encoded, stream
        self.settings, self.max_tokens, self.multiplier = settings, max_tokens, multiplier
        self.contexts = contexts
        self.recorder: Recorder | None = None
        self.random: np.random.Generator = None  # type: ignore[assignment]
        self.history: list[dict[str, float]] = []
        self.position = self.rows = self.first_scored = 0
        self.over, self.refused = True, False
        self.open_edits: np.ndarray | None = None
        self.choices = np.empty(0)
        self.checked: Trace | None = None
        self.weights_before: dict[str, Tensor] | None = None
        self.answers_before: list[str] | None = None
        self.scene: render.Scene | None = None
        self._step_position = 0  # position of the step that is being taken
        self._undo: Callable[[], None] | None = None  # undoes its update

    @property
    def steps(self) -> int:
        """Steps of a whole episode; with ``present_until``, the most that it can have."""
        return self.stream.num_batches * self.settings.steps_per_batch

    @property
    def batch(self) -> int:
        """Index of the batch that is presented."""
        return self.position // self.settings.steps_per_batch

    def sibling(self, lm: EditableLM) -> EditEpisode:
        """An episode with the same settings and facts, on another LLM with the same modules, that has not begun."""
        stream = KnowledgeStream(self.stream.dataset, self.stream.num_batches, self.stream.batch_size)
        return EditEpisode(lm, self.encoded, stream, self.settings, self.max_tokens, self.multiplier, self.contexts)

    # -- beginning -----------------------------------------------------------------------------------------------

    def checked_options(self, options: Mapping[str, object] | None) -> Options:
        """The options of `reset`, as :meth:`begin` takes them; raises, with nothing changed, for what it rejects."""
        options = dict(options or {})
        unknown = set(options) - {"indices", "keep_weights", "start"}
        if unknown:
            raise ValueError(
                f"reset option {min(unknown, key=str)!r} is unknown; options are 'indices', 'keep_weights' and 'start'"
            )
        start = options.get("start", 0)
        if isinstance(start, bool) or not isinstance(start, (int, np.integer)) or not 0 <= start < self.steps:
            raise ValueError(f"reset option 'start' is {start!r}; the episode has steps 0 to {self.steps - 1}")
        if options.get("indices") is not None:
            options["indices"] = self.stream.checked(options["indices"])
        return options

    def begin(
        self, random: np.random.Generator, start: int = 0, indices: np.ndarray | None = None, keep_weights: bool = False
    ) -> Info:
        """Begin a new episode, up to the first observation; returns the info of `reset`."""
        self.random = random
        self.stream.reset(random, indices)
        self.choices = random.random(len(self.stream.indices))
        stride = self.settings.batch_stride
        self.first_scored = int(random.integers(stride)) if stride > 1 else 0
        if not keep_weights:
            self.lm.restore()
        self.position, self.over, self.open_edits = int(start), False, None
        self.history, self.scene = [], None
        return {"indices": self.stream.indices.copy(), "source": self.stream.dataset.source}

    def state(self) -> dict[str, object]:
        """The state for a pickle, which :meth:`load_state` takes."""
        return {
            "episode": {name: getattr(self, name) for name in KEPT},
            "indices": self.stream.indices,
            "facts": self._fingerprint(),
            "weights": {m: w.cpu() for m, w in self.lm.snapshot().items()} if self.drift() > 0 else None,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue the episode that gave the state.

        Raises:
            UnpicklingError: its facts are no longer those of the data.
        """
        self.stream.reset(self.random, state["indices"])
        if self._fingerprint() != state["facts"]:
            raise UnpicklingError(
                f"the facts of the pickled episode are no longer those of {self.stream.dataset.source}; bring the data "
                "back as it was, or pickle the environment before its first reset"
            )
        self.__dict__.update(state["episode"])
        self.lm.restore(state["weights"])

    def _fingerprint(self) -> str:
        """A hash of the episode's facts."""
        records = [self.stream.dataset.records[i] for i in self.stream.indices]
        return hashlib.sha256(repr([(r.prompt, r.target) for r in records]).encode()).hexdigest()

    # -- the facts -----------------------------------------------------------------------------------------------

    def places(self, batch: int) -> slice:
        """Slice of a batch's facts among all of the episode."""
        return slice(batch * self.stream.batch_size, (batch + 1) * self.stream.batch_size)

    def records(self, batch: int) -> list[EncodedRecord]:
        """A batch's facts, as passages."""
        return [self.encoded[i] for i in self.stream.indices[self.places(batch)]]

    def edits(self) -> list[Passage]:
        """The passages of the current batch, whose gradient is observed: n edits with their plain prompts and, where
        there are contexts, n behind each of their K texts."""
        plain = [record.edit for record in self.records(self.batch)]
        if not self.settings.contexts:
            return plain
        first = self.places(self.batch).start
        records = enumerate(self.stream.batch(self.batch), first)
        by_fact = [self.contexts.passages(record, place) for place, record in records]
        return plain + [passage for edits in zip(*by_fact, strict=True) for passage in edits]

    def presented_facts(self) -> list[int]:
        """Indices of the presented facts in their batch."""
        return [i for i in range(self.stream.batch_size) if self.open_facts is None or self.open_facts[i]]

    @property
    def open_facts(self) -> np.ndarray | None:
        """Which facts of the batch are presented, (n,) bool: those of which an edit is open. None for all."""
        return None if self.open_edits is None else np.any(self.open_edits.reshape(-1, self.stream.batch_size), axis=0)

    def _answers(self, batch: int) -> list[str]:
        records = self.stream.batch(batch)
        return self.lm.generate([r.prompt for r in records], longest=[r.target for r in records])

    # -- the observation -----------------------------------------------------------------------------------------

    def trace(self) -> Trace:
        """Keys and value gradients of the current batch at the present weights."""
        return self.lm.trace(self.edits(), self.settings.token, self.settings.present_until, self.open_edits)

    def observe(self, trace: Trace | None) -> spaces.TensorObservation:
        """The observation at the current position as tensors, given its batch's trace (None after the last)."""
        progress = self.position / self.steps
        self.open_edits = None
        if trace is not None:
            if self.settings.present_until is not None:
                self.open_edits = self._untaken(trace)
                trace = trace if self.open_edits.all() else trace.of(torch.from_numpy(self.open_edits))
            observation = spaces.torch_observation(trace, progress)
        else:
            observation = spaces.empty_observation(self.lm.module_shapes, progress, self.lm.device)
        self.rows = len(observation["mask"])
        return observation

    def presented(self, observation: spaces.TensorObservation) -> spaces.Observation:
        """The observation in the array backend asked for."""
        if self.settings.array_backend == "torch":
            return observation
        return spaces.numpy_observation(observation, self.max_tokens)

    def _untaken(self, trace: Trace) -> np.ndarray:
        """Which of the traced :meth:`edits` have not taken, bool; all of them where the loss is not finite."""
        assert self.settings.present_until is not None
        taken = trace.hardest.cpu().double().numpy() <= -math.log(self.settings.present_until)
        return ~taken if math.isfinite(trace.loss) else np.ones_like(taken)

    # -- a step, in its order ------------------------------------------------------------------------------------

    @contextmanager
    def all_or_nothing(self) -> Iterator[EditEpisode]:
        """Context of one step; an error in it leaves the episode as it was before."""
        before = self.position, self.over, self.rows, self.open_edits, len(self.history)
        random = self.random.bit_generator.state
        try:
            yield self
        except BaseException as error:
            if self.recorder is None or isinstance(error, DivergenceError):  # which is recorded as undone
                if self._undo is not None:
                    self._undo()
                self.position, self.over, self.rows, self.open_edits, length = before
                self.random.bit_generator.state = random
                del self.history[length:]
            raise
        finally:
            self.forget_before()

    def forget_before(self) -> None:
        """Drop what would undo the step, so that what follows, such as training, can use the memory."""
        self._undo = self.weights_before = self.checked = None

    def accept(self, action: object) -> Update:
        """The update that the action means; raises, with nothing changed, for what `step` rejects."""
        self.refused = False
        try:
            return spaces.weight_update(action, self.lm, self.max_tokens, self.rows)
        except NotFiniteError:
            if self.settings.on_divergence != "skip":
                raise
            self.refused = True
            return NOTHING

    def apply(self, update: Update) -> Update:
        """Apply an accepted update: W_t = W_{t−1} + ΔW_t. Returns the update with its noise."""
        if (config := self.settings.reward_config) is not None and config.looks_back:
            self.weights_before = self.lm.snapshot()
        self.answers_before = self._answers(self.batch) if self.settings.shows_answers else None
        if self.settings.action_noise_std > 0:
            update = update.map(self._add_noise)
        if self.recorder is None:
            applied_update, self._undo = update.apply(self.lm)
            return applied_update
        before = self.lm.snapshot()
        self._undo = partial(self.lm.restore, before)
        self.lm.restore(self.recorder.record(update))
        return update.made(self.lm, before)

    def _add_noise(self, tensor: Tensor) -> Tensor:
        noise = self.random.normal(0.0, self.settings.action_noise_std, tuple(tensor.shape)).astype(np.float32)
        return tensor + torch.from_numpy(noise).to(tensor.device)

    @property
    def may_repeat(self) -> bool:
        """Whether the batch is presented again after the current step if some of its facts have not taken then."""
        return self.settings.present_until is not None and (self.position + 1) % self.settings.steps_per_batch != 0

    def _ends_batch(self) -> bool:
        """Whether the current step is its batch's last, judging by the trace in ``checked``."""
        if (self.position + 1) % self.settings.steps_per_batch == 0:
            return True
        return self.checked is not None and not self._untaken(self.checked).any()

    def batches_to_score(self) -> list[ScoredBatch]:
        """The batches that the current step's reward scores, the current one first; none where it scores none."""
        config, batch = self.settings.reward_config, self.batch
        if config is None:
            return []
        if batch % config.batch_stride != self.first_scored or not (config.every_step or self._ends_batch()):
            return []
        weights = {0: 1.0, **backtracked(batch, config, self.random)}
        batches = [self.scored(batch - i, weight * config.batch_stride) for i, weight in weights.items()]
        if self.multiplier is not None:  # the bound holds for the step's own batch
            batches[0] = replace(batches[0], extra={self.multiplier.constraint.component: self.multiplier.value})
        return [with_texts(self.lm, b, config, i > 0, self.random) for i, b in enumerate(batches)]

    def scored(self, batch: int, weight: float) -> ScoredBatch:
        """A batch as the reward scores it, without texts."""
        return ScoredBatch(self.records(batch), self.choices[self.places(batch)].tolist(), weight)

    def reward(self, made: Update, scores: Scores) -> tuple[float, Info]:
        """The reward at the updated weights and the step's info; moves on to the next step's position."""
        reward, info = step_reward(
            scores, made, self.drift(), self.settings.reward_config, self.multiplier, self.settings.reward_gradient
        )
        if self.settings.array_backend == "numpy":
            info |= {key: spaces.arrays(info[key]) for key in GRADIENTS if key in info}
        info["batch"] = self.batch
        if self.open_facts is not None:
            info["presentation"] = self.position % self.settings.steps_per_batch
            info["open_facts"] = int(self.open_facts.sum())
        if info["diverged"] or self.refused:
            reward, info = self._undo_broken_update(info)
            self.checked = None  # its trace is not at the weights as they are now
        self._step_position = self.position
        if self._ends_batch():
            self.position += self.settings.steps_per_batch - self.position % self.settings.steps_per_batch
            self.checked = self.open_edits = None
        else:
            self.position += 1
        self.over = self.position == self.steps or (info["diverged"] and self.settings.on_divergence == "end")
        return reward, info

    def take_checked(self) -> Trace | None:
        """The trace of the next observation, if the check whether the batch ends has computed it."""
        checked, self.checked = self.checked, None
        return checked

    def conclude(self, reward: float, info: Info, trace: Trace | None) -> tuple[spaces.TensorObservation, float, Info]:
        """The next observation as tensors, the reward and the info, given the next batch's trace (None at the end)."""
        observation = self.observe(trace)
        if not info["diverged"] and not spaces.is_finite(observation):
            self.position = self._step_position
            reward, info = self._undo_broken_update(info)
            self.position += 1
            if self.settings.on_divergence == "skip":
                observation = self.observe(self.trace())
        if not spaces.is_finite(observation) or (info["diverged"] and self.settings.on_divergence == "end"):
            self.over = True
            observation = self.observe(None)
        self.history.append({"reward": reward, **{k: v for k, v in info.items() if isinstance(v, float)}})
        if self.answers_before is not None:
            batch = info["batch"]
            records, after = self.stream.batch(batch), self._answers(batch)
            self.scene = render.Scene(batch, records, self.answers_before, after, info, reward)
        return observation, reward, info

    def _undo_broken_update(self, info: Info) -> tuple[float, Info]:
        """Undo an update that broke the LLM; returns the reward and info of its step.

        Raises:
            DivergenceError: ``on_divergence`` is "raise".
        """
        if self.recorder is not None:
            self.recorder.roll_back()
        assert self._undo is not None
        self._undo()
        self._undo = None
        batch = info["batch"]
        if self.settings.on_divergence == "raise":
            first = self.stream.batch(batch)[0]
            raise DivergenceError(
                f"the update of batch {batch} (its first fact: {first.origin}, {first.prompt!r}) broke the LLM: a "
                "loss, a gradient or a weight is no longer finite. The weights are those before it; lower the step "
                "size, or make the environment with on_divergence='skip'"
            )
        numbers = {k: v for k, v in info.items() if k not in GRADIENTS}
        return self.settings.floor, {**numbers, "drift": self.drift(), "diverged": True}

    def drift(self) -> float:
        """Mean of ‖W_t − W₀‖ / ‖W₀‖ over the modules."""
        return float(np.mean(list(self.lm.drift().values())))
