"""LifelongEditEnv: an LLM that must absorb a stream of new facts."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pickle import UnpicklingError
from typing import Any, Literal
from weakref import ref

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rledit_env import render, spaces
from rledit_env.copying import Copied, SharedArguments
from rledit_env.encoding import EncodedDataset, EncodedRecord, largest_batch
from rledit_env.evaluation.metrics import Metrics, evaluate
from rledit_env.knowledge import EditRecord, KnowledgeDataset, KnowledgeStream, load_knowledge
from rledit_env.ledger.store import Recorder
from rledit_env.lm.editable import EditableLM, Trace
from rledit_env.lm.forward import TOKEN_CHOICES, Passage
from rledit_env.lm.loading.given import check_given, editable_lm
from rledit_env.lm.weights import NotFiniteError
from rledit_env.preservation import Multiplier
from rledit_env.reward import (
    NO_SCORES,
    RewardConfig,
    ScoredBatch,
    Scores,
    action_penalty,
    backtracked,
    resolve_reward,
    score,
    with_texts,
)


class DivergenceError(ArithmeticError):
    """An update broke the LLM, and ``on_divergence`` is "raise"; the message names the batch."""


# What of an environment is its episode's, beside the LLM's weights, the stream's order and the random state.
EPISODE = (
    "history", "_step", "_over", "_rows", "_refused", "_before", "_scene", "_choices", "_first_scored", "_open",
)  # fmt: skip
Action = dict[str, dict[str, Tensor]]  # an accepted action: its parts, each by module


class LifelongEditEnv(Copied, gym.Env):
    """Lifelong knowledge editing of a language model as a Markov decision process (RLEdit, ICML 2025).

    ## Description

    An LLM meets a stream of T batches of n new facts. At each step the agent sees the fine-tuning gradient of the
    current batch, in factored form, and answers with rank-1 update factors for each edited weight. The update is
    added to the LLM, the reward says how well the LLM now knows the batch (on paraphrases), how little unrelated
    answers moved and how well earlier batches are remembered, and the next batch arrives. The environment knows
    nothing of any learning algorithm; the agent never touches the LLM.

    ## Action Space

    A dictionary; `module` runs over the dotted names of the edited modules, N is `max_tokens`.

    | Key                | Space            | Meaning                                  |
    |--------------------|------------------|------------------------------------------|
    | `keys[module]`     | `Box(N, d_in)`   | ũ, one row a traced token position       |
    | `values[module]`   | `Box(N, d_out)`  | ṽ, one row a traced token position       |

    The update is ΔW = Σᵢ ṽᵢ ũᵢᵀ over the rows in use; padded rows are ignored. Plain fine-tuning with step size η is
    `keys = obs["keys"]`, `values = −η · obs["value_gradients"]`. A wrong shape or a number that is not finite raises
    `ValueError` and changes nothing.

    Beside the space's factors, `step` takes dense changes (in either backend; modules that are left out stay as they
    are, so `{"updates": {}}` edits nothing):

    | Action                                     | Meaning                                                       |
    |--------------------------------------------|---------------------------------------------------------------|
    | `{"updates": {module: (d_out, d_in)}}`     | ΔW, added to W: any rank, such as a solved least squares      |
    | `{"accumulated": {module: (d_out, d_in)}}` | W becomes W₀ + this: replaces all that was added since `reset` |

    ## Observation Space

    | Key                       | Space            | Meaning                                                          |
    |---------------------------|------------------|------------------------------------------------------------------|
    | `keys[module]`            | `Box(N, d_in)`   | u, the module's inputs at the traced positions                   |
    | `value_gradients[module]` | `Box(N, d_out)`  | δ, gradient of the edit loss with respect to the module's outputs |
    | `mask`                    | `Box(N,)`        | 1 for rows in use, 0 for padding                                 |
    | `edit_loss`               | `Box(1,)`        | mean answer-token cross-entropy of the batch before the update   |
    | `progress`                | `Box(1,)`        | share of the episode's steps taken                               |

    `δᵀu` is the gradient ∂L/∂W restricted to the traced positions: with `token="all"` the whole gradient, exactly.
    With `array_backend="torch"` the same dictionaries hold float32 tensors on the LLM's device, with only the rows in
    use (the mask is then all ones), and the action is given likewise.

    ## Rewards

    r_t = −( L(B_t, W_t) + Σ_{i=1..k} μ^i L(B_{t−i}, W_t) + η Σ ‖ΔW_t‖_F² ), with L = L_gen + λ_loc · L_loc
    (Eq. 6–10) and ΔW_t the change that the step made. Every part is replaceable: see
    :class:`rledit_env.reward.RewardConfig`. `info` holds the unweighted means of the current batch under the
    components' names (`generalization`, `locality`), the weighted sums `backtracking` and `regularisation`, and
    `drift`, the mean of ‖W_t − W₀‖ / ‖W₀‖ over the modules. What becomes of the rest of the LLM is scored by the
    components of :mod:`rledit_env.preservation` (`own_text`, `continuation`), with a weight or under a bound
    (`RewardConfig(constraint=...)`; `multiplier` in `info` is then the bound's multiplier at that step). The reward is
    at least `RewardConfig.floor` (−1000).

    ## Starting State

    `reset` restores the pre-trained weights bit for bit and draws T·n facts of the split in a random order
    (`options={"indices": [...]}` gives them instead; `options={"keep_weights": True}` starts from the weights as they
    are, and `"start": s` with it at step s, as if the steps before had made the weights what they are; with
    `present_until` every earlier batch counts as `steps_per_batch` steps).
    Where a fact has several paraphrases or unrelated pairs, one of each is drawn for the reward.

    ## Episode End

    Terminated after T · `steps_per_batch` steps; the last observation has no rows in use. With `present_until` a batch
    is presented until its facts have taken, and `steps_per_batch` times at most: a fact has taken where the LLM, as it
    is, gives every token of its answer at least that probability, given the prompt and the answer's tokens before it.
    At every presentation all facts of the batch are looked at anew. Those that have taken have no rows in the
    observation and are not in `current_batch()`; the observation is what a batch of only the others would give. The
    batch ends with the step after which none of its facts is left to take;
    one that has none from the beginning is presented once, with no rows in use. `info` then says which `presentation`
    of its batch the step was, from 0, and how many `open_facts` it presented; `progress` goes on with each batch as
    with the most steps that it could have had. Looking costs no pass where the batch is presented again, and one where
    it ends early. When an update breaks the
    model (a loss, a gradient or a weight is no longer finite), the weights of before it are put back, bit for bit, the
    reward is the floor and `info["diverged"]` is True; then `on_divergence` decides. Never truncated.

    ## Arguments

    ```python
    >>> import gymnasium as gym
    >>> env = gym.make("rledit_env:RLEdit-ZsRE-v0", model="tiny-llama", num_batches=2, batch_size=2)
    >>> observation, info = env.reset(seed=0)
    >>> action = {"keys": observation["keys"],
    ...           "values": {m: -0.1 * g for m, g in observation["value_gradients"].items()}}
    >>> observation, reward, terminated, truncated, info = env.step(action)

    ```

    * `kind`: which data set's form: "zsre", "counterfact" or "fever"; set by the environment's id.
    * `model`: registry name, hub id or folder of a causal LM; a causal LM of transformers as an object, with its
      `tokenizer` (see "Copies"); or an `EditableLM`, which is edited as it is (`edit_modules` and `tokenizer` must be
      left out). With an object, leave out `device` and `dtype`, too.
    * `edit_modules`: names or globs of the modules to edit, such as `"model.layers.[6-12].mlp.{gate,up}_proj"`; None
      means the registry's default for the model.
    * `data`: "bundled", a file, a folder, a hub id, a list of dictionaries, a mapping from split to any of these (see
      :func:`rledit_env.knowledge.load_knowledge`), or a `KnowledgeDataset`.
    * `split`: "train" or "eval".
    * `num_batches`, `batch_size`: T and n.
    * `token`: the positions whose keys and value gradients are observed: "answer" (those that predict an answer
      token), "subject" (the subject's last token; answer positions for facts without a subject), "subject+answer", or
      "all".
    * `reward`: None or "paper" (the paper's), "efficacy" (with a term for the edit prompt and one sampled earlier
      batch), "none" (no reward computed: 0.0), or a `RewardConfig`.
    * `max_tokens`: N; None means the most that any batch of this data can need.
    * `steps_per_batch`: how often a batch is presented, its state recomputed each time.
    * `present_until`: a probability below 1: a batch is presented until all its facts have taken, and `steps_per_batch`
      times at most (see "Episode End"). None: always `steps_per_batch` times.
    * `array_backend`: "numpy" (padded) or "torch".
    * `reward_gradient`: put ∂r_t/∂W_t (d_out, d_in) by module into `info["reward_gradient"]`, and the direct gradient
      of r_t with respect to the action (regularisation only) into `info["action_gradient"]`, by the action's own keys:
      for factors with respect to them, for a dense action −2η ΔW of the change ΔW that it made.
    * `action_noise_std`: standard deviation of Gaussian noise added to the action's factors (Appendix E), or to the
      entries of a dense action.
    * `on_divergence`: what follows an update that broke the model: "end" terminates the episode, "skip" goes on with
      the next step (and then takes an action that is not finite for such an update, too), "raise" raises
      `DivergenceError`, which names the batch, and leaves the environment at the step, for another action.
    * `device`, `dtype`: where and in what precision the frozen weights run; "auto" chooses (edited weights are always
      kept in float32).
    * `revision`, `trust_remote_code`: of a model named by hub id, as `from_pretrained` takes them.
    * `on_error`: "raise" or "skip" unusable rows of the data.
    * `render_mode`: "ansi" or "human" (the step's facts with the LLM's answers before and after), or "rgb_array" (the
      curves so far).

    ## Copies

    What is large is shared, what an episode changes is not. `copy.deepcopy(env)` is an environment at the same step of
    the same episode, with the same random state and edited weights of its own, over the same frozen weights; only a
    `recorder` stays with the original. A model object that is passed in is never written: the environment has copies of
    its edited modules' weights, `env.unwrapped.lm.model` is the edited model, and any number of environments can be
    made over one object. Environments over one `EditableLM` (and `copy.copy(env)`) share its edited weights, too: they
    take turns, each with a `reset` first, and a step in an episode that another has ended raises `ResetNeeded`.

    A pickle holds the arguments, the episode with its edited weights and its random state, neither the model nor the
    data, which are loaded by their names again, nor a `recorder`. It goes on as the original does, to rounding. An
    environment that was made with a model object is not pickled.

    ## Attributes

    `lm` (the `EditableLM`), `dataset` (with `source`, which names the data in use), `evaluate()` (the metrics on all
    facts edited so far), `current_batch()` (the facts now presented), `multiplier` (of the reward's
    constraint, a :class:`rledit_env.preservation.Multiplier`, or None), `recorder` (None, or what is told of every
    update before it takes effect, such as an edit ledger's: see `rledit_env.ledger`). Agents that need more of the LLM
    than the observation shows, such as its states at a subject, ask `lm` and `current_batch()`; they read and never
    write.

    ## Version History

    * v0: first release. Since metrics version 2 (`rledit_env.evaluation.METRICS_VERSION`) `evaluate()` scores record by
      record and gives the mean over records, where it pooled answer tokens before; rewards and dynamics are the same.
    """

    metadata = {"render_modes": ["ansi", "human", "rgb_array"], "render_fps": 2}

    def __init__(
        self,
        kind: str,
        model: Any = "smollm2-135m",
        edit_modules: Sequence[str] | str | None = None,
        data: Any = "bundled",
        split: str = "train",
        num_batches: int = 20,
        batch_size: int = 20,
        token: str = "answer",
        reward: RewardConfig | str | None = None,
        max_tokens: int | None = None,
        steps_per_batch: int = 1,
        array_backend: Literal["numpy", "torch"] = "numpy",
        reward_gradient: bool = False,
        action_noise_std: float = 0.0,
        device: torch.device | str = "auto",
        dtype: torch.dtype | str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        render_mode: str | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        on_divergence: Literal["end", "skip", "raise"] = "end",
        tokenizer: PreTrainedTokenizerBase | None = None,
        present_until: float | None = None,
    ) -> None:
        self.arguments = SharedArguments({k: v for k, v in locals().items() if k not in ("self", "__class__")})
        _require(token in TOKEN_CHOICES, "token", token, f"one of {', '.join(TOKEN_CHOICES)}")
        _require(array_backend in ("numpy", "torch"), "array_backend", array_backend, "'numpy' or 'torch'")
        _require(on_divergence in ("end", "skip", "raise"), "on_divergence", on_divergence, "'end', 'skip' or 'raise'")
        _require(steps_per_batch >= 1, "steps_per_batch", steps_per_batch, "1 or more")
        _require(
            present_until is None or (not isinstance(present_until, bool) and 0 < present_until < 1), "present_until",
            present_until, "a probability above 0 and below 1, or None",
        )  # fmt: skip
        _require(action_noise_std >= 0, "action_noise_std", action_noise_std, "0 or more")
        modes = self.metadata["render_modes"]
        _require(render_mode is None or render_mode in modes, "render_mode", render_mode, f"None or one of {modes}")
        check_given(model, tokenizer, edit_modules, dtype, device)
        self.reward_config = resolve_reward(reward)
        constraint = self.reward_config.constraint if self.reward_config is not None else None
        self.multiplier = None if constraint is None else Multiplier(constraint)
        self.dataset = (
            data if isinstance(data, KnowledgeDataset) else load_knowledge(kind, data, split=split, on_error=on_error)
        )
        self.stream = KnowledgeStream(self.dataset, num_batches, batch_size)
        source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        self.lm = editable_lm(model, tokenizer, edit_modules, dtype, device, **source)
        self.encoded = EncodedDataset(self.lm, self.dataset)
        self.encoded.check_lengths()
        needed = largest_batch(self.encoded.traced_positions(token), batch_size)
        if max_tokens is not None and max_tokens < needed:
            raise ValueError(
                f"max_tokens is {max_tokens}, but a batch of {batch_size} facts of {self.dataset.source} can have "
                f"{needed} traced positions (token={token!r}); give max_tokens={needed} or None"
            )
        self.max_tokens = needed if max_tokens is None else max_tokens
        self.token, self.steps_per_batch, self.array_backend = token, steps_per_batch, array_backend
        self.reward_gradient, self.action_noise_std = reward_gradient, action_noise_std
        self.render_mode, self.on_divergence, self.present_until = render_mode, on_divergence, present_until
        self.recorder: Recorder | None = None
        self.observation_space = spaces.observation_space(self.lm.module_shapes, self.max_tokens)
        self.action_space = spaces.action_space(self.lm.module_shapes, self.max_tokens)
        self._before_any_episode()

    def _before_any_episode(self) -> None:
        self.history: list[dict[str, float]] = []
        self._step = 0  # the place in the episode: its batch's place times steps_per_batch, plus the presentation
        self._at = 0  # the place of the step that is being taken
        self._open: np.ndarray | None = None  # which facts of the batch are presented, (n,) bool; None for all
        self._checked: Trace | None = None  # of the batch that is presented, at the updated weights
        self._over = True  # an episode must be begun with reset
        self._rows = 0
        self._undo: Callable[[], None] | None = None  # takes the update back, while a step is being taken
        self._refused = False  # whether the action was not finite, and is skipped
        self._before: list[str] | None = None  # the LLM's answers before the step, where they are shown
        self._scene: render.Scene | None = None

    def _sibling(self, lm: EditableLM) -> LifelongEditEnv:
        """Another environment of the same settings and facts, on another LM of the same modules; nothing is read."""
        other = copy.copy(self)
        other.lm = lm
        other.stream = KnowledgeStream(self.dataset, self.stream.num_batches, self.stream.batch_size)
        other._np_random = other._np_random_seed = None
        other._before_any_episode()
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> LifelongEditEnv:
        other: LifelongEditEnv = super().__deepcopy__(memo)
        other.encoded.lm = other.lm
        other.recorder = None
        if self._holds():
            other.lm.holder = ref(other)
        return other

    def _share(self, memo: dict[int, Any]) -> None:
        super()._share(memo)
        memo |= {id(self.dataset): self.dataset, id(self.recorder): self.recorder}
        memo[id(self.encoded)] = copy.copy(self.encoded)  # the same passages

    def _state(self) -> dict[str, Any]:
        always: dict[str, Any] = {"random": (self._np_random, self._np_random_seed)}
        if self.multiplier is not None:
            always["multiplier"] = self.multiplier.value
        if not self._holds() or (self._over and not self.history):
            return always
        return {
            **always,
            "episode": {name: getattr(self, name) for name in EPISODE},
            "indices": self.stream.indices,
            "facts": self._fingerprint(),
            "weights": {m: w.cpu() for m, w in self.lm.snapshot().items()} if self._drift() > 0 else None,
        }

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self._np_random, self._np_random_seed = state["random"]
        if self.multiplier is not None:
            self.multiplier.value = state["multiplier"]
        if "episode" not in state:
            return
        self.stream.reset(self.np_random, state["indices"])
        if self._fingerprint() != state["facts"]:
            raise UnpicklingError(
                f"the facts of the pickled episode are no longer those of {self.dataset.source}; bring the data back "
                "as it was, or pickle the environment before its first reset"
            )
        self.__dict__.update(state["episode"])
        self.lm.restore(state["weights"])
        self.lm.holder = ref(self)

    def _fingerprint(self) -> str:
        """Of the episode's facts."""
        records = [self.dataset.records[i] for i in self.stream.indices]
        return hashlib.sha256(repr([(r.prompt, r.target) for r in records]).encode()).hexdigest()

    def _holds(self) -> bool:
        """Whether the LLM's edited weights are those of this environment's episode."""
        return self.lm.holder is not None and self.lm.holder() is self

    def _check_held(self) -> None:
        if self.lm.holder is not None and not self._holds():
            raise gym.error.ResetNeeded(
                "another environment has begun an episode on the same EditableLM since, so that its weights are no "
                "longer those of this one's: call reset(), or give each environment its own, model=copy.deepcopy(lm); "
                "gymnasium.make_vec without vectorization_mode does so for many"
            )

    @property
    def episode_steps(self) -> int:
        """Steps of a whole episode; with ``present_until``, the most that it can have."""
        return self.stream.num_batches * self.steps_per_batch

    # -- the Markov decision process -----------------------------------------------------------------------------

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Restore the LLM and draw a new stream; see "Starting State".

        Raises:
            ValueError: an unknown option, or indices that are not T·n different records.
        """
        info = self._begin(seed, options)
        return self._presented(self._observe(self.lm.trace(self._edits(), self.token))), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Apply the action to the LLM, compute the reward and present the next batch.

        Raises:
            ValueError: the action has a wrong shape or a number that is not finite; nothing has changed.
            DivergenceError: the update broke the LLM, with ``on_divergence="raise"``; nothing has changed.
            gymnasium.error.ResetNeeded: the episode is over or was never begun, or another environment has begun one on
                the same `EditableLM` since.
            Exception: whatever else ends a step before its end, such as Ctrl-C or a device without memory; nothing has
                changed, and the step can be taken again. (With a ledger the update is on the disk already: go on by
                resuming from it.)
        """
        accepted = self._accept(action)
        with self._all_or_nothing():
            config = self.reward_config
            before = self.lm.snapshot() if config is not None and config.looks_back else None
            made = self._transition(accepted)
            if self._may_repeat:
                self._checked = self.lm.trace(self._edits(), self.token)
            scored = self._scored_now()
            scores = NO_SCORES if config is None else score(self.lm, scored, config, self.reward_gradient, before)
            reward, info = self._rewarded(made, scores)
            trace = None if self._over else self._take_checked() or self.lm.trace(self._edits(), self.token)
            observation, reward, info = self._conclude(reward, info, trace)
            return self._presented(observation), reward, self._over, False, info

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Within it a step is taken; what ends it early leaves the environment as it was before."""
        before = self._step, self._over, self._rows, self._open, len(self.history)
        random = self.np_random.bit_generator.state
        try:
            yield
        except BaseException as error:
            if self.recorder is None or isinstance(error, DivergenceError):  # whose taking back has been recorded, too
                if self._undo is not None:
                    self._undo()
                self._step, self._over, self._rows, self._open, length = before
                self.np_random.bit_generator.state = random
                del self.history[length:]
            raise
        finally:
            self._undo = None  # nothing is taken back any more; what comes next, such as training, has the memory
            self._checked = None

    # What `reset` and `step` consist of. `rledit_env.vector` runs the same pieces for many streams, with one
    # `trace` and one `score` for all of them.

    def _begin(self, seed: int | None = None, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A new episode, up to its first observation; the info of `reset`."""
        options = dict(options or {})
        unknown = set(options) - {"indices", "keep_weights", "start"}
        if unknown:
            raise ValueError(
                f"reset option {min(unknown, key=str)!r} is unknown; options are 'indices', 'keep_weights' and 'start'"
            )
        start = options.get("start", 0)
        if isinstance(start, bool) or not isinstance(start, (int, np.integer)) or not 0 <= start < self.episode_steps:
            raise ValueError(f"reset option 'start' is {start!r}; the episode has steps 0 to {self.episode_steps - 1}")
        indices = options.get("indices")
        if indices is not None:
            indices = self.stream.checked(indices)  # before anything changes
        super().reset(seed=seed)
        self.stream.reset(self.np_random, indices)
        self._choices = self.np_random.random(len(self.stream.indices))
        stride = self.reward_config.batch_stride if self.reward_config is not None else 1
        self._first_scored = int(self.np_random.integers(stride)) if stride > 1 else 0
        if not options.get("keep_weights"):
            self.lm.restore()
        self.lm.holder = ref(self)
        self._step, self._over = int(start), False
        self.history = []
        self._scene = None
        return {"indices": self.stream.indices.copy(), "source": self.dataset.source}

    def _accept(self, action: Any) -> Action:
        """The action as tensors; raises, with nothing changed, for what `step` rejects."""
        if self._over:
            raise gym.error.ResetNeeded("the episode is over (or not begun): call reset() before step()")
        self._check_held()
        self._refused = False
        try:
            return self._unpacked(action)
        except NotFiniteError:
            if self.on_divergence != "skip":
                raise
            self._refused = True
            return {"updates": {}}

    def _unpacked(self, action: Any) -> Action:
        for form in ("updates", "accumulated"):
            if isinstance(action, Mapping) and set(action) == {form}:
                return {form: self.lm.matrices(action[form], f"action[{form!r}]")}
        keys, values = spaces.unpack_action(
            action, self.lm.module_shapes, self.max_tokens, self._rows, self.lm.device, self.lm.edit_dtype
        )
        return {"keys": keys, "values": values}

    def _transition(self, action: Action) -> Action:
        """Apply an accepted action; returns the change made, noise included: the factors, or, by the action's own key,
        the dense ΔW."""
        self._before = self._answers() if self.render_mode in ("ansi", "human") else None
        action = {part: self._with_noise(tensors) for part, tensors in action.items()}
        if self.recorder is None and "accumulated" not in action:
            change = self.lm.add if "updates" in action else self.lm.apply
            self._undo = change(**action)
            return action
        before = self.lm.snapshot()
        self._undo = partial(self.lm.restore, before)
        if self.recorder is not None:
            self.lm.restore(self.recorder.record(action))
        else:
            self.lm.replace(action["accumulated"])
        if "accumulated" in action:
            return {"accumulated": {m: self.lm.weight(m) - before[m] for m in action["accumulated"]}}
        return action

    def _broken(self, info: dict[str, Any]) -> tuple[float, dict[str, Any]]:
        """The reward and info of an update that broke the LLM, once the weights of before it have been put back.

        Raises:
            DivergenceError: if that is asked for.
        """
        if self.recorder is not None:
            self.recorder.roll_back()
        assert self._undo is not None
        self._undo()
        self._undo = None
        batch = info["batch"]
        if self.on_divergence == "raise":
            first = self.stream.batch(batch)[0]
            raise DivergenceError(
                f"the update of batch {batch} (its first fact: {first.origin}, {first.prompt!r}) broke the LLM: a "
                "loss, a gradient or a weight is no longer finite. The weights are those before it; lower the step "
                "size, or make the environment with on_divergence='skip'"
            )
        kept = {k: v for k, v in info.items() if k not in ("reward_gradient", "action_gradient")}
        return self._floor, {**kept, "drift": self._drift(), "diverged": True}

    def _drift(self) -> float:
        return float(np.mean(list(self.lm.drift().values())))

    def _edits(self) -> list[Passage]:
        """The current batch's edits, whose gradient is observed."""
        return [record.edit for record in self._records(self._step // self.steps_per_batch)]

    def _untaken(self, trace: Trace) -> np.ndarray:
        """Which facts of the traced batch have not taken, (n,) bool; where a loss is no number, none has."""
        assert self.present_until is not None
        taken = trace.hardest.cpu().double().numpy() <= -math.log(self.present_until)
        return ~taken if math.isfinite(trace.loss) else np.ones_like(taken)

    @property
    def _may_repeat(self) -> bool:
        """Whether the batch is presented again after the current step if some of its facts have not taken then."""
        return self.present_until is not None and (self._step + 1) % self.steps_per_batch != 0

    def _ends_batch(self) -> bool:
        """Whether the current step is its batch's last, given what :attr:`_checked` says of the updated weights."""
        if (self._step + 1) % self.steps_per_batch == 0:
            return True
        return self._checked is not None and not self._untaken(self._checked).any()

    def _take_checked(self) -> Trace | None:
        """The trace of the next observation, if it has been made to look whether the batch ends."""
        checked, self._checked = self._checked, None
        return checked

    def _scored_now(self) -> list[ScoredBatch]:
        """The batches that the current step's reward looks at, the current one first; none where it looks at none."""
        config = self.reward_config
        if config is None:
            return []
        batch = self._step // self.steps_per_batch
        if batch % config.batch_stride != self._first_scored or not (config.every_step or self._ends_batch()):
            return []
        weights = {0: 1.0, **backtracked(batch, config, self.np_random)}
        scored = [self._scored(batch - i, weight * config.batch_stride) for i, weight in weights.items()]
        if self.multiplier is not None:  # a bound is on the step's own batch
            scored[0] = replace(scored[0], extra={self.multiplier.constraint.component: self.multiplier.value})
        return [with_texts(self.lm, b, config, i > 0, self.np_random) for i, b in enumerate(scored)]

    def _rewarded(self, made: Action, scores: Scores) -> tuple[float, dict[str, Any]]:
        """The reward at the updated weights and the step's info; then the step is taken."""
        reward, info = self._reward(made, scores)
        info["batch"] = self._step // self.steps_per_batch
        if self._open is not None:
            info |= {"presentation": self._step % self.steps_per_batch, "open_facts": int(self._open.sum())}
        if info["diverged"] or self._refused:
            reward, info = self._broken(info)
            self._checked = None  # the weights are those of before the step
        self._at = self._step
        if self._ends_batch():
            self._step += self.steps_per_batch - self._step % self.steps_per_batch
            self._checked = None
        else:
            self._step += 1
        self._over = self._step == self.episode_steps or (info["diverged"] and self.on_divergence == "end")
        return reward, info

    def _conclude(
        self, reward: float, info: dict[str, Any], trace: Trace | None
    ) -> tuple[dict[str, Any], float, dict[str, Any]]:
        """The next observation as tensors, the reward and the info, given the next batch's trace (None at the end)."""
        observation = self._observe(trace)
        if not info["diverged"] and not spaces.is_finite(observation):
            self._step = self._at
            reward, info = self._broken(info)
            self._step += 1
            if self.on_divergence == "skip":
                observation = self._observe(self.lm.trace(self._edits(), self.token))
        if not spaces.is_finite(observation) or (info["diverged"] and self.on_divergence == "end"):
            self._over = True
            observation = self._observe(None)
        self.history.append({"reward": reward, **{k: v for k, v in info.items() if isinstance(v, float)}})
        if self._before is not None:
            batch = info["batch"]
            self._scene = render.Scene(
                batch, self.stream.batch(batch), self._before, self._answers(batch), info, reward
            )
            if self.render_mode == "human":
                self.render()
        return observation, reward, info

    def _observe(self, trace: Trace | None) -> dict[str, Any]:
        """The observation at the current step, as tensors: the gradient of its batch on the LLM as it is."""
        progress = self._step / self.episode_steps
        self._open = None
        if trace is not None:
            if self.present_until is not None:
                self._open = self._untaken(trace)
                trace = trace if self._open.all() else trace.of(torch.from_numpy(self._open))
            observation = spaces.torch_observation(trace, progress)
        else:
            observation = spaces.empty_observation(self.lm.module_shapes, progress, self.lm.device)
        self._rows = len(observation["mask"])
        return observation

    def _presented(self, observation: dict[str, Any]) -> Any:
        """The observation in the array backend asked for."""
        return observation if self.array_backend == "torch" else spaces.numpy_observation(observation, self.max_tokens)

    def _reward(self, made: Action, scores: Scores) -> tuple[float, dict[str, Any]]:
        """The reward of the current batch at the updated weights, and its parts."""
        drift = self._drift()
        config = self.reward_config
        if config is None:
            return 0.0, {"drift": drift, "diverged": not math.isfinite(drift)}
        penalty, action_gradient = self._penalty(made, config)
        basic = scores.basic[0] if scores.basic else {}
        reward = -(scores.total + penalty)
        if self.multiplier is not None and scores.basic:  # −μ (measured − bound); the measured part is in the total
            reward += self.multiplier.value * self.multiplier.constraint.bound * config.batch_stride
        largest = [torch.linalg.vector_norm(g, math.inf) for g in (scores.gradient or {}).values()]
        diverged = not (math.isfinite(reward) and all(map(math.isfinite, largest)))
        info: dict[str, Any] = {
            **basic,
            "backtracking": float(sum(scores.weighted[1:])) / config.batch_stride,
            "regularisation": penalty,
            "drift": drift,
            "diverged": diverged,
        }
        if self.multiplier is not None:
            info["multiplier"] = self.multiplier.value
        if self.reward_gradient and not diverged:
            if scores.gradient is not None:
                info["reward_gradient"] = self._arrays({m: g.neg_() for m, g in scores.gradient.items()})
            info["action_gradient"] = {part: self._arrays(g) for part, g in action_gradient.items()}
        return (self._floor if diverged else max(reward, self._floor)), info

    @property
    def _floor(self) -> float:
        return self.reward_config.floor if self.reward_config is not None else 0.0

    def _penalty(self, made: Action, config: RewardConfig) -> tuple[float, Action]:
        """The regularisation and the gradient of its negative with respect to the change made."""
        with torch.set_grad_enabled(self.reward_gradient):
            leaves = {
                part: {m: v.detach().requires_grad_(self.reward_gradient) for m, v in tensors.items()}
                for part, tensors in made.items()
            }
            penalty = config.regularisation * action_penalty(config.penalty, leaves)
        if not self.reward_gradient:
            return float(penalty), {}
        if not config.regularisation_gradient:
            zeros = {part: {m: torch.zeros_like(v) for m, v in tensors.items()} for part, tensors in made.items()}
            return float(penalty.detach()), zeros
        flat = [tensor for tensors in leaves.values() for tensor in tensors.values()]
        pieces = iter(torch.autograd.grad(penalty, flat, allow_unused=True, materialize_grads=True) if flat else ())
        gradient = {part: {m: -next(pieces) for m in tensors} for part, tensors in leaves.items()}
        return float(penalty.detach()), gradient

    def _arrays(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {m: t if self.array_backend == "torch" else t.cpu().numpy() for m, t in tensors.items()}

    def _with_noise(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.action_noise_std == 0:
            return tensors
        noisy = {}
        for module, tensor in tensors.items():
            noise = self.np_random.normal(0.0, self.action_noise_std, tuple(tensor.shape)).astype(np.float32)
            noisy[module] = tensor + torch.from_numpy(noise).to(tensor.device)
        return noisy

    def _indices(self, batch: int) -> slice:
        return slice(batch * self.stream.batch_size, (batch + 1) * self.stream.batch_size)

    def _records(self, batch: int) -> list[EncodedRecord]:
        return [self.encoded[i] for i in self.stream.indices[self._indices(batch)]]

    def _scored(self, batch: int, weight: float) -> ScoredBatch:
        return ScoredBatch(self._records(batch), self._choices[self._indices(batch)].tolist(), weight)

    # -- looking -------------------------------------------------------------------------------------------------

    def current_batch(self) -> list[EncodedRecord]:
        """The facts now presented, as passages (with their text in `record`), in the stream's order: with
        ``present_until``, those of the batch that have not taken.

        Raises:
            gymnasium.error.ResetNeeded: none are, since the episode is over or was never begun.
        """
        if self._over:
            raise gym.error.ResetNeeded("no batch is presented: call reset() before current_batch()")
        records = self._records(self._step // self.steps_per_batch)
        return [records[i] for i in self.presented_facts()]

    def presented_facts(self) -> list[int]:
        """Places of :meth:`current_batch`'s facts in their batch, from 0."""
        return list(range(self.stream.batch_size)) if self._open is None else np.flatnonzero(self._open).tolist()

    @property
    def position(self) -> int:
        """The place in the episode: that of the batch, times ``steps_per_batch``, plus the presentation, from 0. It is
        the number of steps taken, unless batches have ended early (``present_until``)."""
        return self._step

    def edited_records(self) -> list[EditRecord]:
        """The facts edited so far, in order."""
        batches = -(-self._step // self.steps_per_batch)
        return [record for batch in range(batches) for record in self.stream.batch(batch)]

    def evaluate(self, generate: bool = True, metrics: str = "paper") -> Metrics:
        """The metrics on all facts edited so far, at the current weights; printed in one line.

        Args:
            generate: also decode freely for ``exact_match`` (slower).
            metrics: "paper", or "rledit-code" for what the paper's released code computes (see
                `rledit_env.evaluation.metrics.evaluate`).

        Raises:
            ValueError: no fact has been edited yet, or there is no such ``metrics``.
            gymnasium.error.ResetNeeded: another environment has begun an episode on the same `EditableLM` since.
        """
        records = self.edited_records()
        if records:
            self._check_held()
        return evaluate(self.lm, records, self.dataset.kind, generate, metrics)

    def _answers(self, batch: int | None = None) -> list[str]:
        batch = self._step // self.steps_per_batch if batch is None else batch
        records = self.stream.batch(batch)
        return self.lm.generate([r.prompt for r in records], longest=[r.target for r in records])

    def render(self) -> str | np.ndarray | None:
        """The last step taken as `render_mode` says: "ansi" returns its text, "rgb_array" a picture (H, W, 3) of the
        episode so far, "human" prints the text, as every step does, and returns None; None without a mode."""
        if self.render_mode == "rgb_array":
            return render.curves(self.history, self.episode_steps)
        if self.render_mode is None:
            return None
        text = render.text(self._scene, self.dataset.source)
        if self.render_mode == "ansi":
            return text
        print(text)
        return None

    def close(self) -> None:
        """Restore the pre-trained weights, unless they are another environment's by now, and drop the caches."""
        if self.lm.holder is None or self.lm.holder() in (None, self):
            self.lm.restore()
        self._undo = None
        self.lm.prefix_cache.clear()
        self.lm.reference_cache.clear()
        self.lm.text_cache.clear()


def _require(holds: bool, name: str, value: Any, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}; give {wanted}")
