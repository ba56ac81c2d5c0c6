"""LifelongEditVectorEnv: many streams of edits on one copy of the frozen language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from rledit_env.copying import Copied, SharedArguments
from rledit_env.env import LifelongEditEnv
from rledit_env.lm.editable import Trace
from rledit_env.lm.streams import StreamLM, together
from rledit_env.scoring import NO_SCORES, Scores, score_streams
from rledit_env.updates import Update


class LifelongEditVectorEnv(Copied, VectorEnv[Any, Any, np.ndarray]):
    """`num_envs` environments (`rledit_env.env.LifelongEditEnv`) that share one frozen LLM and one pass of it.

    Each stream owns its edited weights, its facts and its random state, nothing else: the frozen weights, the tokenised
    facts and the caches are there once, and a stream adds to the memory what its edited weights take
    (`envs[i].lm.nbytes`). All streams are traced and scored together. What comes out is what separate environments
    with the same seeds give, to float32 rounding.

    ```python
    >>> import gymnasium as gym
    >>> envs = gym.make_vec("rledit_env:RLEdit-ZsRE-v0", num_envs=3, model="tiny-llama", num_batches=2, batch_size=2)
    >>> observations, infos = envs.reset(seed=0)
    >>> actions = {"keys": observations["keys"],
    ...            "values": {m: -0.1 * g for m, g in observations["value_gradients"].items()}}
    >>> observations, rewards, terminations, truncations, infos = envs.step(actions)
    >>> rewards.shape, observations["mask"].shape[0], infos["drift"].shape
    ((3,), 3, (3,))

    ```

    Observations and actions are the single environment's dictionaries whose arrays have a first axis more, the stream:
    with ``array_backend="numpy"`` padded to `max_tokens` rows, as the spaces say; with "torch" tensors on the LLM's
    device padded with zero rows to the most rows that any stream has in use, `mask` (num_envs, rows) telling which.
    Actions may have either number of rows; those beyond a stream's rows in use are ignored. Dense actions are
    (num_envs, d_out, d_in) by module. Stream i's own action is
    checked as the single environment checks it, and if any is rejected, no stream has changed.

    A stream ends alone: after its last batch, or when an update breaks its weights.

    Copies and pickles are as those of the single environment (see "Copies" there): of all streams, with weights of
    their own, over the same frozen model.

    Args:
        kind: as in `LifelongEditEnv`, like every argument that is not named here; ``model`` may be an `EditableLM`,
            whose own edited weights are then left alone.
        num_envs: streams.
        autoreset_mode: what happens to a stream that has ended (see `gymnasium.vector.AutoresetMode`).
            NEXT_STEP: its next action is ignored and answered with a new episode's first observation and reward 0.
            SAME_STEP: it is reset at once; the last observation and info are in ``infos["final_obs"]`` (an array of
            single observations) and ``infos["final_info"]``.
            DISABLED: the caller resets it, ``reset(options={"reset_mask": …})``.

    Attributes:
        envs: the streams as environments: `envs[i].evaluate()`, `envs[i].lm`, `envs[i].history`. To step one of them
            alone is to leave the others' step undone.
    """

    def __init__(
        self,
        kind: str,
        num_envs: int = 1,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        **arguments: Any,
    ) -> None:
        if isinstance(num_envs, bool) or not isinstance(num_envs, int) or num_envs < 1:
            raise ValueError(f"num_envs is {num_envs!r}; give a positive integer")
        if arguments.get("on_divergence") == "raise":
            raise ValueError("on_divergence is 'raise', but one stream must not stop the others; give 'end' or 'skip'")
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.arguments = SharedArguments(
            kind=kind, num_envs=num_envs, autoreset_mode=self.autoreset_mode, **arguments
        )
        template = LifelongEditEnv(kind, **arguments)
        self.num_envs = num_envs
        self.envs = [template.sibling(StreamLM(template.lm)) for _ in range(num_envs)]
        self.metadata = {**template.metadata, "autoreset_mode": self.autoreset_mode}
        self.render_mode = template.render_mode
        self.single_observation_space = template.observation_space
        self.single_action_space = template.action_space
        self.max_tokens, self.array_backend = template.max_tokens, template.array_backend
        reward_config = self.envs[0].reward_config
        if reward_config is not None and reward_config.looks_back:
            raise ValueError("a vectorised environment keeps no weights of before a step, which locality_reference="
                             "'previous' compares with; give 'original', or use a single environment")
        self._observations: list[dict[str, Any]] = [{}] * num_envs  # each stream's latest, as tensors without padding
        self._ended = np.zeros(num_envs, dtype=np.bool_)

    def pickled_state(self) -> dict[str, Any]:
        latest = self._observations, self._ended
        return {"latest": latest, "environments": [env.pickled_state() for env in self.envs]}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self._observations, self._ended = state["latest"]
        for env, own in zip(self.envs, state["environments"], strict=True):
            env.__setstate__(own)

    # The spaces hold bounds for every number of every stream, which nothing here needs.

    @cached_property
    def observation_space(self) -> gym.Space[Any]:  # type: ignore[override]
        """The observations of all streams, padded."""
        return batch_space(self.single_observation_space, self.num_envs)

    @cached_property
    def action_space(self) -> gym.Space[Any]:  # type: ignore[override]
        """The actions of all streams, padded."""
        return batch_space(self.single_action_space, self.num_envs)

    # -- the Markov decision processes ---------------------------------------------------------------------------

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Begin new episodes, in all streams or in those that ``options["reset_mask"]`` names.

        Args:
            seed: of stream i: ``seed + i``, or ``seed[i]``.
            options: as the single environment's, for every stream; ``indices`` may also be (num_envs, T·n), a row a
                stream. ``reset_mask``: (num_envs,) bool; the other streams stay as they are.

        Raises:
            ValueError: an option makes no sense, or there are not as many seeds as streams.
        """
        options = dict(options or {})
        chosen = self._reset_mask(options.pop("reset_mask", None))
        if seed is None or isinstance(seed, int | np.integer):
            seeds = [None if seed is None else int(seed) + i for i in range(self.num_envs)]
        else:
            seeds = list(seed)
        if len(seeds) != self.num_envs:
            raise ValueError(f"{len(seeds)} seeds were given for {self.num_envs} streams; give one a stream")
        indices: Any = options.get("indices")
        by_stream = indices is not None and np.ndim(indices) == 2
        if by_stream and len(indices) != self.num_envs:
            raise ValueError(f"indices have {len(indices)} rows for {self.num_envs} streams; give one a stream")
        infos: dict[str, Any] = {}
        for i in chosen:
            own = {**options, "indices": indices[i]} if by_stream else options
            infos = self._add_info(infos, self.envs[i].begin(seeds[i], own), i)
            self._ended[i] = False
        for i, trace in self._traces(chosen).items():
            self._observations[i] = self.envs[i].episode.observe(trace)
        return self._batched(), infos

    def _reset_mask(self, mask: Any) -> list[int]:
        if mask is None:
            return list(range(self.num_envs))
        if not (isinstance(mask, np.ndarray) and mask.shape == (self.num_envs,) and mask.dtype == np.bool_):
            raise ValueError(f"options['reset_mask'] is {mask!r}; give a bool array of shape ({self.num_envs},)")
        if not mask.any():
            raise ValueError("options['reset_mask'] names no stream; set at least one to True")
        unbegun = [i for i in np.flatnonzero(~mask) if not self._observations[i]]
        if unbegun:
            raise ValueError(f"options['reset_mask'] leaves out stream {unbegun[0]}, never begun; reset all first")
        return [int(i) for i in np.flatnonzero(mask)]

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """A step of every stream: see `LifelongEditEnv.step` and ``autoreset_mode``.

        Returns:
            observations; rewards (num_envs,) float64; terminations and truncations (num_envs,) bool; infos: the single
            environments', gathered as Gymnasium does it (arrays by key, with the mask ``_key``). ``action_gradient`` is
            padded as the action is.

        Raises:
            ValueError: some stream's action is rejected; nothing has changed in any stream.
            gymnasium.error.ResetNeeded: a stream was never begun, or has ended and autoreset is disabled.
        """
        mode = self.autoreset_mode
        renewed = [i for i in range(self.num_envs) if self._ended[i] and mode is AutoresetMode.NEXT_STEP]
        stepping = [i for i in range(self.num_envs) if i not in renewed]
        accepted = {i: self._accept(i, actions) for i in stepping}
        outcomes = self._outcomes(accepted)
        episodes = [env.episode for env in self.envs]

        infos: dict[str, Any] = {}
        begun = {i: self.envs[i].begin() for i in renewed}  # infos of new episodes
        rewards, ended = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=np.bool_)

        def conclude(i: int, trace: Trace | None) -> None:
            nonlocal infos
            observation, rewards[i], info = episodes[i].conclude(*outcomes[i], trace)
            if self.render_mode == "human":
                self.envs[i].render()
            episodes[i].forget_before()
            info = self._padded(info)
            ended[i] = episodes[i].over
            if ended[i] and mode is AutoresetMode.SAME_STEP:
                last = {"final_obs": episodes[i].presented(observation), "final_info": info}
                infos = self._add_info(infos, last, i)
                begun[i] = self.envs[i].begin()
            else:
                self._observations[i] = observation
                infos = self._add_info(infos, info, i)

        concluded: set[int] = set()
        for i in stepping:
            checked = episodes[i].take_checked()
            if episodes[i].over or checked is not None:
                conclude(i, None if episodes[i].over else checked)
                concluded.add(i)
        begun_or_left = [i for i in range(self.num_envs) if i in begun or i not in concluded]
        waiting = [i for i in begun_or_left if not episodes[i].over]
        while waiting:  # a second time where the next batch shows that an update broke the model, and all begins anew
            new = set(begun)
            for i, trace in self._traces(waiting).items():
                if i in new:
                    self._observations[i] = self.envs[i].episode.observe(trace)
                else:
                    conclude(i, trace)
            waiting = [i for i in begun if i not in new]
        for i, info in begun.items():
            infos = self._add_info(infos, info, i)
        self._ended = ended
        return self._batched(), rewards, ended.copy(), np.zeros_like(ended), infos

    def _accept(self, i: int, actions: Any) -> Update:
        """Stream i's update; raises, with nothing changed, for what its `step` would reject."""
        try:
            return self.envs[i].accept(self._own(i, actions))
        except ValueError as error:
            raise ValueError(f"stream {i}: {error}") from error

    def _outcomes(self, accepted: Mapping[int, Update]) -> dict[int, tuple[float, dict[str, Any]]]:
        """The rewards and infos of the streams that step, by the updates that they make."""
        episodes = {i: self.envs[i].episode for i in accepted}
        made = {i: episodes[i].apply(update) for i, update in accepted.items()}
        for i, trace in self._traces([i for i, episode in episodes.items() if episode.may_repeat]).items():
            episodes[i].checked = trace
        scores = self._scores(list(accepted))
        return {i: episode.reward(made[i], scores[i]) for i, episode in episodes.items()}

    def _own(self, i: int, actions: Any) -> Any:
        """Stream i's part of the actions; what is no dictionary by module is passed on, for the check to name."""
        if not isinstance(actions, Mapping):
            return actions
        shown = max((len(o["mask"]) for o in self._observations if o), default=0)

        def row(part: str, module: str, value: Any) -> Any:
            try:
                array = value if isinstance(value, Tensor) else np.asarray(value)
            except ValueError as error:
                raise ValueError(f"action[{part!r}][{module!r}] is no array of numbers ({error})") from error
            if array.ndim < 1 or len(array) != self.num_envs:
                raise ValueError(
                    f"action[{part!r}][{module!r}] has shape {tuple(array.shape)}; its first axis must be the "
                    f"{self.num_envs} streams"
                )
            padded = part in ("keys", "values") and array.ndim == 3 and array.shape[1] == shown
            return array[i][: self.envs[i].episode.rows] if padded else array[i]

        return {
            part: {m: row(part, m, value) for m, value in by.items()} if isinstance(by, Mapping) else by
            for part, by in actions.items()
        }

    def _traces(self, streams: Sequence[int]) -> dict[int, Trace]:
        """The current batches of some streams, traced in one pass."""
        if not streams:
            return {}
        joint = together([self._lm(i) for i in streams])
        edits = [self.envs[i].episode.edits() for i in streams]
        return dict(zip(streams, joint.trace_batches(edits, self.envs[0].token), strict=True))

    def _scores(self, streams: Sequence[int]) -> dict[int, Scores]:
        """What the rewards of some streams look at, scored in one pass."""
        config = self.envs[0].reward_config
        requests = {i: self.envs[i].episode.batches_to_score() for i in streams}
        scores = dict.fromkeys(streams, NO_SCORES)
        asked = [i for i in streams if requests[i]]
        if asked and config is not None:
            joint = together([self._lm(i) for i in asked])
            gradient = self.envs[0].reward_gradient
            found = score_streams(joint, [requests[i] for i in asked], config, gradient)
            scores |= dict(zip(asked, found, strict=True))
        return scores

    def _lm(self, i: int) -> StreamLM:
        lm = self.envs[i].lm
        assert isinstance(lm, StreamLM)
        return lm

    def _padded(self, info: dict[str, Any]) -> dict[str, Any]:
        """An info whose NumPy arrays have the same shapes in all streams, which gathering them asks for."""
        if self.array_backend == "torch" or "keys" not in info.get("action_gradient", {}):
            return info

        def padded(array: np.ndarray) -> np.ndarray:
            return np.pad(array, ((0, self.max_tokens - len(array)), (0, 0)))

        by_part = info["action_gradient"].items()
        return {**info, "action_gradient": {part: {m: padded(g) for m, g in by.items()} for part, by in by_part}}

    def _batched(self) -> Any:
        """The latest observations of all streams as one, in the array backend asked for."""
        latest = self._observations
        torch_wanted = self.array_backend == "torch"
        rows = max(len(o["mask"]) for o in latest) if torch_wanted else self.max_tokens

        def stacked(parts: Sequence[Tensor], padded: bool = True) -> Any:
            shape = (self.num_envs, rows if padded else len(parts[0]), *parts[0].shape[1:])
            device = parts[0].device if torch_wanted else "cpu"
            batch = torch.zeros(shape, dtype=parts[0].dtype if torch_wanted else torch.float32, device=device)
            for own, part in zip(batch, parts, strict=True):
                own[: len(part)] = part
            return batch if torch_wanted else batch.numpy()

        modules = self.envs[0].lm.module_shapes
        factors = ("keys", "value_gradients")
        return {
            **{part: {m: stacked([o[part][m] for o in latest]) for m in modules} for part in factors},
            "mask": stacked([o["mask"] for o in latest]),
            "edit_loss": stacked([o["edit_loss"] for o in latest], padded=False),
            "progress": stacked([o["progress"] for o in latest], padded=False),
        }

    # -- looking ---------------------------------------------------------------------------------------------------

    def render(self) -> tuple[Any, ...] | None:
        """What every stream's `render` gives; None without a mode, and with "human", which prints it."""
        frames = tuple(env.render() for env in self.envs)
        return None if self.render_mode in (None, "human") else frames

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """A method's results, or an attribute, of every stream."""
        found = [getattr(env, name) for env in self.envs]
        return tuple(value(*args, **kwargs) if callable(value) else value for value in found)

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """An attribute of every stream."""
        return self.call(name)

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """The streams' random generators."""
        return tuple(env.np_random for env in self.envs)

    @property
    def np_random_seed(self) -> tuple[int | None, ...]:  # type: ignore[override]
        """The streams' seeds."""
        return tuple(env.np_random_seed for env in self.envs)

    def close_extras(self, **kwargs: Any) -> None:
        """Restore every stream's weights and drop the caches."""
        for env in self.envs:
            env.close()
