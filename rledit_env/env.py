"""LifelongEditEnv: an LLM that must absorb a stream of new facts."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal
from weakref import ref

import gymnasium as gym
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rledit_env import render, spaces
from rledit_env.attributes import EpisodeAttributes
from rledit_env.contexts import LONGEST, Contexts
from rledit_env.copying import Copied, SharedArguments
from rledit_env.delegation import AttributeOf
from rledit_env.encoding import EncodedDataset, largest_batch
from rledit_env.episode import DivergenceError as DivergenceError
from rledit_env.episode import EditEpisode
from rledit_env.evaluation.metrics import Metrics, evaluate
from rledit_env.knowledge import KnowledgeDataset, KnowledgeStream, load_knowledge
from rledit_env.knowledge.source import Data
from rledit_env.lm.editable import EditableLM, Trace
from rledit_env.lm.given import Model, check_given, editable_lm
from rledit_env.preservation import Multiplier
from rledit_env.reward import RewardConfig, resolve_reward
from rledit_env.scoring import NO_SCORES, Scores, score
from rledit_env.settings import RENDER_MODES, EpisodeSettings
from rledit_env.type_aliases import Info, Options
from rledit_env.updates import Update


class LifelongEditEnv(Copied, EpisodeAttributes, gym.Env):
    """Lifelong knowledge editing of a language model as a Markov decision process (RLEdit, ICML 2025).

    ## Description

    An LLM meets a stream of T batches of n new facts. At each step the agent sees the fine-tuning gradient of the
    current batch, in factored form, and answers with rank-1 update factors for each edited weight. The update is
    added to the LLM, the reward says how well the LLM now knows the batch (on paraphrases), how little unrelated
    answers changed and how well earlier batches are remembered, and the next batch arrives. The environment knows
    nothing of any learning algorithm; the agent never changes the LLM itself.

    ## Action Space

    A dictionary; `module` runs over the dotted names of the edited modules, N is `max_tokens`.

    | Key                | Space            | Meaning                                  |
    |--------------------|------------------|------------------------------------------|
    | `keys[module]`     | `Box(N, d_in)`   | ũ, one row per traced token position     |
    | `values[module]`   | `Box(N, d_out)`  | ṽ, one row per traced token position     |

    The update is ΔW = Σᵢ ṽᵢ ũᵢᵀ over the rows in use; padded rows are ignored. Plain fine-tuning with step size η is
    `keys = obs["keys"]`, `values = −η · obs["value_gradients"]`. A wrong shape or a number that is not finite raises
    `ValueError` and changes nothing.

    `step` also takes dense changes, which are not in the space (in either backend; modules that are left out stay as
    they are, so `{"updates": {}}` edits nothing):

    | Action                                     | Meaning                                                       |
    |--------------------------------------------|---------------------------------------------------------------|
    | `{"updates": {module: (d_out, d_in)}}`     | ΔW, added to W: any rank, such as a least-squares solution    |
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
    `drift`, the mean of ‖W_t − W₀‖ / ‖W₀‖ over the modules. Components of :mod:`rledit_env.preservation` (`own_text`,
    `continuation`) score changes of the rest of the LLM, with a weight or under a bound
    (`RewardConfig(constraint=...)`; `multiplier` in `info` is then the bound's multiplier at that step). The reward is
    at least `RewardConfig.floor` (−1000).

    ## Starting State

    `reset` restores the pre-trained weights bit for bit and draws T·n facts of the split in a random order
    (`options={"indices": [...]}` gives them instead). `options={"keep_weights": True}` keeps the present weights; with
    `"start": s` in addition the episode begins at step s, as if the steps before had made these weights (with
    `present_until` every earlier batch counts as `steps_per_batch` steps).
    Where a fact has several paraphrases or unrelated pairs, one of each is drawn for the reward.

    ## Episode End

    Terminated after T · `steps_per_batch` steps; the last observation has no rows in use. Never truncated. When an
    update breaks the model (a loss, a gradient or a weight is no longer finite), the weights before it are restored bit
    for bit, the reward is the floor and `info["diverged"]` is True; `on_divergence` says what follows.

    With `present_until` a batch is presented until its facts have taken, at most `steps_per_batch` times. A fact has
    taken when the LLM gives every token of its answer at least that probability, given the prompt and the answer's
    tokens before it. All facts of the batch are checked at every presentation. Those that have taken have no rows in
    the observation, which is that of a batch of the others, and are not in `current_batch()`. The batch ends with the
    step after which all its facts have taken; if they have taken at the beginning, it is presented once, with no rows
    in use. `info` then has the step's `presentation` of its batch, from 0, and the number of `open_facts`; `progress`
    counts every earlier batch with `steps_per_batch` steps. The check takes one more pass where a batch ends early.

    ## Arguments

    ```python
    >>> import gymnasium as gym
    >>> env = gym.make("rledit_env:RLEdit-ZsRE-v0", model="tiny-llama", num_batches=2, batch_size=2)
    >>> observation, info = env.reset(seed=0)
    >>> action = {"keys": observation["keys"],
    ...           "values": {m: -0.1 * g for m, g in observation["value_gradients"].items()}}
    >>> observation, reward, terminated, truncated, info = env.step(action)

    ```

    * `kind`: how the facts are scored: like "zsre", "counterfact" or "fever"; set by the environment's id.
    * `model`: registry name, hub id or folder of a causal LM; a causal LM of transformers as an object, with its
      `tokenizer` (see "Copies"); or an `EditableLM`, which is edited as it is (`edit_modules` and `tokenizer` must be
      left out). With an object, leave out `device` and `dtype`, too.
    * `edit_modules`: names or globs of the modules to edit, such as `"model.layers.[6-12].mlp.{gate,up}_proj"`; None
      means the registry's default for the model.
    * `data`: "bundled", a file, a folder, a hub id, a list of dictionaries, a mapping from split to any of these, in
      the form of any published data set (see :func:`rledit_env.knowledge.load_knowledge`), or a `KnowledgeDataset`.
    * `split`: "train" or "eval".
    * `num_batches`, `batch_size`: T and n.
    * `token`: the positions whose keys and value gradients are observed: "answer" (those that predict an answer
      token), "subject" (the subject's last token; answer positions for facts that name no subject, or one that is the
      first token), "subject+answer", or "all".
    * `reward`: None or "paper" (the paper's), "efficacy" (with a term for the edit prompt and one sampled earlier
      batch), "none" (no reward computed: 0.0), or a `RewardConfig`.
    * `max_tokens`: N; None means the most that any batch of this data can need.
    * `steps_per_batch`: how often a batch is presented; its observation is recomputed each time.
    * `present_until`: a probability below 1: a batch is presented until all its facts have taken, at most
      `steps_per_batch` times (see "Episode End"). None: always `steps_per_batch` times.
    * `contexts`: K: each fact is presented with its plain prompt, and with the prompt behind each of K short texts that
      the LLM wrote before any edit (as in ROME). A fact has taken when all of these passages have.
    * `array_backend`: "numpy" (padded) or "torch".
    * `reward_gradient`: put ∂r_t/∂W_t (d_out, d_in) by module into `info["reward_gradient"]`, and the direct gradient
      of r_t with respect to the action (regularisation only) into `info["action_gradient"]`, by the action's keys; for
      a dense action it is −2η ΔW of the change ΔW that it made.
    * `action_noise_std`: standard deviation of Gaussian noise added to the action's factors (Appendix E), or to the
      entries of a dense action.
    * `on_divergence`: what follows an update that broke the model: "end" terminates the episode; "skip" continues
      with the next step (and treats an action that is not finite as such an update); "raise" raises `DivergenceError`,
      which names the batch, and leaves the environment at the step, for another action.
    * `device`, `dtype`: device and precision of the frozen weights; "auto" chooses (edited weights are always kept in
      float32).
    * `revision`, `trust_remote_code`: for a model named by hub id, as in `from_pretrained`.
    * `on_error`: "raise" or "skip" unusable rows of the data.
    * `render_mode`: "ansi" or "human" (the step's facts with the LLM's answers before and after), or "rgb_array" (the
      curves so far).

    ## Copies

    Copies share what is large, and have their own of what an episode changes. `copy.deepcopy(env)` is at the same step
    of the same episode, with its own random state and edited weights, equal to the original's, over the same frozen
    weights; only a `recorder` stays with the original. A model object that is passed in is never written: the
    environment has copies of its edited modules' weights, `env.unwrapped.lm.model` is the edited model, and any number
    of environments can be made over one object. Environments over one `EditableLM` (and `copy.copy(env)`) share its
    edited weights, too: a `reset` of one ends the others' episodes, whose next `step` raises `ResetNeeded`.

    A pickle has the arguments and the episode with its edited weights and random state. It has neither the model nor
    the data, which are loaded again by name, nor a `recorder`. The unpickled environment goes on as the original does,
    to rounding. An environment that was made with a model object cannot be pickled.

    ## Attributes

    `lm` (the `EditableLM`), `dataset` (with `source`, which names the data in use), `evaluate()` (the metrics on all
    facts edited so far), `current_batch()` (the facts now presented), `multiplier` (of the reward's
    constraint, a :class:`rledit_env.preservation.Multiplier`, or None), `recorder` (None, or an object that records
    every update before it takes effect, such as an edit ledger's: see `rledit_env.ledger`). Agents that need more of
    the LLM than the observation shows, such as its states at a subject, read `lm` and `current_batch()`, and change
    nothing there.

    ## Version History

    * v0: first release. Since metrics version 2 (`rledit_env.evaluation.METRICS_VERSION`) `evaluate()` scores record by
      record and gives the mean over records, where it pooled answer tokens before; rewards and dynamics are the same.
    """

    metadata = {"render_modes": RENDER_MODES, "render_fps": 2}
    _np_random = AttributeOf[np.random.Generator]("episode", "random")

    def __init__(  # noqa: PLR0913  they are the settings of `gym.make`
        self,
        kind: str,
        model: Model = "smollm2-135m",
        edit_modules: Sequence[str] | str | None = None,
        data: KnowledgeDataset | Data = "bundled",
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
        contexts: int = 0,
    ) -> None:
        self.arguments = SharedArguments({k: v for k, v in locals().items() if k not in ("self", "__class__")})
        settings = EpisodeSettings(
            token, array_backend, on_divergence, steps_per_batch, present_until, contexts, action_noise_std,
            render_mode, reward_gradient, resolve_reward(reward),
        )  # fmt: skip
        check_given(model, tokenizer, edit_modules, dtype, device)
        multiplier = None if settings.constraint is None else Multiplier(settings.constraint)
        self.dataset = (
            data if isinstance(data, KnowledgeDataset) else load_knowledge(kind, data, split=split, on_error=on_error)
        )
        stream = KnowledgeStream(self.dataset, num_batches, batch_size)
        lm = editable_lm(model, tokenizer, edit_modules, dtype, device, revision, trust_remote_code)
        encoded = EncodedDataset(lm, self.dataset)
        encoded.check_lengths(LONGEST if contexts else 0)
        needed_rows = (1 + contexts) * largest_batch(encoded.traced_positions(token), batch_size)
        rows = needed_rows if max_tokens is None else max_tokens
        if rows < needed_rows:
            raise ValueError(
                f"max_tokens is {max_tokens}, but a batch of {batch_size} facts of {self.dataset.source} can have "
                f"{needed_rows} traced positions (token={token!r}); give max_tokens={needed_rows} or None"
            )
        self.episode = EditEpisode(lm, encoded, stream, settings, rows, multiplier, Contexts(lm, contexts))
        self.observation_space = spaces.observation_space(lm.module_shapes, rows)
        self.action_space = spaces.action_space(lm.module_shapes, rows)

    # -- copies --------------------------------------------------------------------------------------------------

    def sibling(self, lm: EditableLM) -> LifelongEditEnv:
        """An environment with the same settings and facts, on another LM with the same edited modules."""
        other = copy.copy(self)
        other.episode = self.episode.sibling(lm)
        other._np_random_seed = None
        return other

    def __copy__(self) -> LifelongEditEnv:
        other: LifelongEditEnv = super().__copy__()
        other.episode = copy.copy(self.episode)
        return other

    def __deepcopy__(self, memo: dict[int, object]) -> LifelongEditEnv:
        other: LifelongEditEnv = super().__deepcopy__(memo)
        other.encoded.lm = other.lm
        other.recorder = None
        if self._owns_weights():
            other.lm.holder = ref(other)
        return other

    def _share(self, memo: dict[int, object]) -> None:
        super()._share(memo)
        memo |= {id(self.dataset): self.dataset, id(self.recorder): self.recorder}
        memo[id(self.encoded)] = copy.copy(self.encoded)  # shares the passages

    def pickled_state(self) -> dict[str, object]:
        state: dict[str, object] = {"random": (self._np_random, self._np_random_seed)}
        if self.multiplier is not None:
            state["multiplier"] = self.multiplier.value
        is_running = self._owns_weights() and (self.history or not self.episode.over)
        return {**state, **self.episode.state()} if is_running else state

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self._np_random, self._np_random_seed = state["random"]
        if self.multiplier is not None:
            self.multiplier.value = state["multiplier"]
        if "episode" in state:
            self.episode.load_state(state)
            self.lm.holder = ref(self)

    def _owns_weights(self) -> bool:
        """Whether the LLM's edited weights are those of this environment's episode."""
        return self.lm.holder is not None and self.lm.holder() is self

    def _check_owns_weights(self) -> None:
        if self.lm.holder is not None and not self._owns_weights():
            raise gym.error.ResetNeeded(
                "another environment has begun an episode on the same EditableLM since, so that its weights are no "
                "longer those of this one's: call reset(), or give each environment its own, model=copy.deepcopy(lm); "
                "gymnasium.make_vec without vectorization_mode does so for many"
            )

    # -- the Markov decision process -----------------------------------------------------------------------------

    def reset(self, *, seed: int | None = None, options: Options | None = None) -> tuple[spaces.Observation, Info]:
        """Restore the LLM and draw the facts of a new episode; see "Starting State".

        Raises:
            ValueError: an option is unknown, or the indices are not T·n different records.
        """
        info = self.begin(seed, options)
        return self.episode.presented(self.episode.observe(self.episode.trace())), info

    def step(self, action: spaces.Action) -> tuple[spaces.Observation, float, bool, bool, Info]:
        """Apply the action to the LLM, compute the reward and present the next batch.

        Raises:
            ValueError: the action has a wrong shape or a number that is not finite; nothing has changed.
            DivergenceError: the update broke the LLM, with ``on_divergence="raise"``; nothing has changed.
            gymnasium.error.ResetNeeded: the episode is over or was never begun, or another environment has begun one on
                the same `EditableLM` since.
            Exception: anything else that ends a step early, such as Ctrl-C or a device without memory; nothing has
                changed, and the step can be taken again (or, with a ledger, resumed from the update in it).
        """
        update = self.accept(action)
        with self.episode.all_or_nothing() as episode:
            applied_update = episode.apply(update)  # W_t = W_{t−1} + ΔW_t
            scores = self._score()  # L(B_t, W_t), L(B_{t−i}, W_t)
            reward, info = episode.reward(applied_update, scores)  # r_t
            observation, reward, info = episode.conclude(reward, info, self._next_trace())  # s_{t+1}
            if self.render_mode == "human":
                self.render()
            return episode.presented(observation), reward, episode.over, False, info

    def begin(self, seed: int | None = None, options: Mapping[str, object] | None = None) -> Info:
        """Begin an episode as `reset` does, up to the first observation; returns the info."""
        checked = self.episode.checked_options(options)
        super().reset(seed=seed)
        info = self.episode.begin(self.np_random, **checked)
        self.lm.holder = ref(self)
        return info

    def accept(self, action: object) -> Update:
        """The update that the action means; raises, with nothing changed, for what `step` rejects."""
        if self.episode.over:
            raise gym.error.ResetNeeded("the episode is over (or not begun): call reset() before step()")
        self._check_owns_weights()
        return self.episode.accept(action)

    def _score(self) -> Scores:
        """The losses that the reward consists of, at the updated weights."""
        episode, config = self.episode, self.reward_config
        if episode.may_repeat:
            episode.checked = episode.trace()
        batches = episode.batches_to_score()
        if config is None:
            return NO_SCORES
        return score(self.lm, batches, config, self.reward_gradient, episode.weights_before)

    def _next_trace(self) -> Trace | None:
        """The trace of the batch that is presented next, at the present weights; None at the end."""
        return None if self.episode.over else self.episode.take_checked() or self.episode.trace()

    # -- inspecting ----------------------------------------------------------------------------------------------

    def evaluate(self, generate: bool = True, metrics: str = "paper") -> Metrics:
        """The metrics on all facts edited so far, at the current weights; printed in one line.

        Args:
            generate: also decode freely for ``exact_match`` (slower).
            metrics: "paper", or "rledit-code" as the paper's released code computes them (see
                `rledit_env.evaluation.metrics.evaluate`).

        Raises:
            ValueError: no fact has been edited yet, or there is no such ``metrics``.
            gymnasium.error.ResetNeeded: another environment has begun an episode on the same `EditableLM` since.
        """
        records = self.edited_records()
        if records:
            self._check_owns_weights()
        return evaluate(self.lm, records, self.dataset.kind, generate, metrics)

    def render(self) -> str | np.ndarray | None:
        """Show the last step taken: "ansi" returns its text, "rgb_array" a picture (H, W, 3) of the episode so far, and
        "human" prints the text, as every step does, and returns None; without a mode, it returns None."""
        if self.render_mode == "rgb_array":
            return render.curves(self.history, self.episode_steps)
        text = render.text(self.episode.scene, self.dataset.source) if self.render_mode else None
        if self.render_mode != "human":
            return text
        print(text)
        return None

    def close(self) -> None:
        """Restore the weights, unless another environment uses them, and close an LLM that this one has made."""
        self.episode.forget_before()
        self.lm.clear_caches()
        if self.lm.holder is None or self.lm.holder() in (None, self):
            if isinstance(self.arguments["model"], EditableLM):
                self.lm.restore()
            else:
                self.lm.close()
