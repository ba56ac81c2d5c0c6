"""LifelongEditVectorEnv: many environments on one copy of the frozen language model."""

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
from rledit_env.lm.weight_sets import WeightSetLM, together
from rledit_env.scoring import NO_SCORES, Scores, score_environments
from rledit_env.updates import Update


class LifelongEditVectorEnv(Copied, VectorEnv[Any, Any, np.ndarray]):
    """`num_envs` environments (`rledit_env.env.LifelongEditEnv`) that share one frozen LLM and its forward passes.

    Each environment owns its edited weights, facts and random state. The frozen weights, the tokenised facts and the
    caches are shared, so an environment takes only the memory of its edited weights (`envs[i].lm.nbytes`). All
    environments are traced and scored together. The results are those of separate environments with the same seeds, to
    float32 rounding.

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

    Observations and actions are the single environment's dictionaries; their arrays have an additional first axis, the
    environment. With ``array_backend="numpy"`` they are padded to `max_tokens` rows, as in the spaces. With "torch"
    they are tensors on the LLM's device, padded with zero rows to the largest number of rows in use; `mask`
    (num_envs, rows) is 1 for rows in use. Actions may have either number of rows; those beyond an environment's rows in
    use are ignored. Dense actions are (num_envs, d_out, d_in) by module. Each environment's action is checked as in the
    single environment; if one is rejected, no environment has changed.

    Episodes end independently: after the last batch, or when an update breaks the weights.

    Copies and pickles are as for the single environment (see "Copies" there): they have all environments, with their
    own weights, over the same frozen model.

    Args:
        kind: as in `LifelongEditEnv`, like every argument that is not named here; ``model`` may be an `EditableLM`,
            whose own edited weights then do not change.
        num_envs: number of environments.
        autoreset_mode: what happens when an environment's episode has ended (see `gymnasium.vector.AutoresetMode`).
            NEXT_STEP: its next action is ignored; that step begins a new episode, with reward 0.
            SAME_STEP: it is reset at once; the last observation and info are in ``infos["final_obs"]`` (an array of
            single observations) and ``infos["final_info"]``.
            DISABLED: the caller resets it, ``reset(options={"reset_mask": …})``.

    Attributes:
        envs: the single environments: `envs[i].evaluate()`, `envs[i].lm`, `envs[i].history`. Do not step one of them
            alone, since the others would not take that step.
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
            raise ValueError("on_divergence is 'raise', but no environment may stop the others; give 'end' or 'skip'")
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.arguments = SharedArguments(
            kind=kind, num_envs=num_envs, autoreset_mode=self.autoreset_mode, **arguments
        )
        template = LifelongEditEnv(kind, **arguments)
        self.num_envs = num_envs
        self.envs = [template.sibling(WeightSetLM(template.lm)) for _ in range(num_envs)]
        self.metadata = {**template.metadata, "autoreset_mode": self.autoreset_mode}
        self.render_mode = template.render_mode
        self.single_observation_space = template.observation_space
        self.single_action_space = template.action_space
        self.max_tokens, self.array_backend = template.max_tokens, template.array_backend
        reward_config = self.envs[0].reward_config
        if reward_config is not None and reward_config.looks_back:
            raise ValueError("a vectorised environment keeps no weights of before a step, which locality_reference="
                             "'previous' compares with; give 'original', or use a single environment")
        self._observations: list[dict[str, Any]] = [{}] * num_envs  # the latest ones, as tensors without padding
        self._ended = np.zeros(num_envs, dtype=np.bool_)

    def pickled_state(self) -> dict[str, Any]:
        latest = self._observations, self._ended
        return {"latest": latest, "environments": [env.pickled_state() for env in self.envs]}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self._observations, self._ended = state["latest"]
        for env, env_state in zip(self.envs, state["environments"], strict=True):
            env.__setstate__(env_state)

    # Made only when used: the spaces have bounds for every number of every environment.

    @cached_property
    def observation_space(self) -> gym.Space[Any]:  # type: ignore[override]
        """The space of the observations of all environments, padded."""
        return batch_space(self.single_observation_space, self.num_envs)

    @cached_property
    def action_space(self) -> gym.Space[Any]:  # type: ignore[override]
        """The space of the actions of all environments, padded."""
        return batch_space(self.single_action_space, self.num_envs)

    # -- the Markov decision processes ---------------------------------------------------------------------------

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Begin new episodes in all environments, or in those that ``options["reset_mask"]`` selects.

        Args:
            seed: environment i gets ``seed + i``, or ``seed[i]``.
            options: the single environment's options, for every environment; ``indices`` may also be (num_envs, T·n),
                one row per environment. ``reset_mask``: (num_envs,) bool; the other environments stay as they are.

        Raises:
            ValueError: an option is invalid, or the number of seeds is not `num_envs`.
        """
        options = dict(options or {})
        to_reset = self._reset_mask(options.pop("reset_mask", None))
        if seed is None or isinstance(seed, int | np.integer):
            seeds = [None if seed is None else int(seed) + i for i in range(self.num_envs)]
        else:
            seeds = list(seed)
        if len(seeds) != self.num_envs:
            raise ValueError(f"{len(seeds)} seeds were given for {self.num_envs} environments; give one for each")
        indices: Any = options.get("indices")
        has_rows = indices is not None and np.ndim(indices) == 2
        if has_rows and len(indices) != self.num_envs:
            raise ValueError(f"indices have {len(indices)} rows for {self.num_envs} environments; give one for each")
        infos: dict[str, Any] = {}
        for i in to_reset:
            env_options = {**options, "indices": indices[i]} if has_rows else options
            infos = self._add_info(infos, self.envs[i].begin(seeds[i], env_options), i)
            self._ended[i] = False
        for i, trace in self._traces(to_reset).items():
            self._observations[i] = self.envs[i].episode.observe(trace)
        return self._batch_observations(), infos

    def _reset_mask(self, mask: Any) -> list[int]:
        if mask is None:
            return list(range(self.num_envs))
        if not (isinstance(mask, np.ndarray) and mask.shape == (self.num_envs,) and mask.dtype == np.bool_):
            raise ValueError(f"options['reset_mask'] is {mask!r}; give a bool array of shape ({self.num_envs},)")
        if not mask.any():
            raise ValueError("options['reset_mask'] names no environment; set at least one to True")
        unbegun = [i for i in np.flatnonzero(~mask) if not self._observations[i]]
        if unbegun:
            raise ValueError(f"options['reset_mask'] leaves out environment {unbegun[0]}, never begun; reset all first")
        return [int(i) for i in np.flatnonzero(mask)]

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """A step of every environment: see `LifelongEditEnv.step` and ``autoreset_mode``.

        Returns:
            observations; rewards (num_envs,) float64; terminations and truncations (num_envs,) bool; infos: those of
            the single environments, gathered as in Gymnasium (arrays by key, with the mask ``_key``);
            ``action_gradient`` is padded as the action is.

        Raises:
            ValueError: an environment's action is rejected; no environment has changed.
            gymnasium.error.ResetNeeded: an episode was never begun, or has ended and autoreset is disabled.
        """
        mode = self.autoreset_mode
        restarting = [i for i in range(self.num_envs) if self._ended[i] and mode is AutoresetMode.NEXT_STEP]
        stepping = [i for i in range(self.num_envs) if i not in restarting]
        accepted = {i: self._accept(i, actions) for i in stepping}
        outcomes = self._apply_all(accepted)
        episodes = [env.episode for env in self.envs]

        infos: dict[str, Any] = {}
        begun = {i: self.envs[i].begin() for i in restarting}  # infos of new episodes
        rewards, ended = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=np.bool_)

        def conclude(i: int, trace: Trace | None) -> None:
            nonlocal infos
            observation, rewards[i], info = episodes[i].conclude(*outcomes[i], trace)
            if self.render_mode == "human":
                self.envs[i].render()
            episodes[i].forget_before()
            info = self._pad_info(info)
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
        while waiting:  # again where a trace shows that an update broke the model, and an episode restarts
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
        return self._batch_observations(), rewards, ended.copy(), np.zeros_like(ended), infos

    def _accept(self, i: int, actions: Any) -> Update:
        """Environment i's update; raises, with nothing changed, for what its `step` would reject."""
        try:
            return self.envs[i].accept(self._part_of(i, actions))
        except ValueError as error:
            raise ValueError(f"environment {i}: {error}") from error

    def _apply_all(self, accepted: Mapping[int, Update]) -> dict[int, tuple[float, dict[str, Any]]]:
        """Apply the updates of the environments that step; their rewards and infos."""
        episodes = {i: self.envs[i].episode for i in accepted}
        applied = {i: episodes[i].apply(update) for i, update in accepted.items()}
        for i, trace in self._traces([i for i, episode in episodes.items() if episode.may_repeat]).items():
            episodes[i].checked = trace
        scores = self._score(list(accepted))
        return {i: episode.reward(applied[i], scores[i]) for i, episode in episodes.items()}

    def _part_of(self, i: int, actions: Any) -> Any:
        """Environment i's part of the actions; anything but a dictionary by module is passed on, and rejected later."""
        if not isinstance(actions, Mapping):
            return actions
        padded_rows = max((len(o["mask"]) for o in self._observations if o), default=0)

        def row(part: str, module: str, value: Any) -> Any:
            try:
                array = value if isinstance(value, Tensor) else np.asarray(value)
            except ValueError as error:
                raise ValueError(f"action[{part!r}][{module!r}] is no array of numbers ({error})") from error
            if array.ndim < 1 or len(array) != self.num_envs:
                raise ValueError(
                    f"action[{part!r}][{module!r}] has shape {tuple(array.shape)}; its first axis must be the "
                    f"{self.num_envs} environments"
                )
            is_padded = part in ("keys", "values") and array.ndim == 3 and array.shape[1] == padded_rows
            return array[i][: self.envs[i].episode.rows] if is_padded else array[i]

        return {
            part: {m: row(part, m, value) for m, value in by.items()} if isinstance(by, Mapping) else by
            for part, by in actions.items()
        }

    def _traces(self, indices: Sequence[int]) -> dict[int, Trace]:
        """The traces of some environments' current batches, computed together."""
        if not indices:
            return {}
        joint = together([self._lm(i) for i in indices])
        episodes = [self.envs[i].episode for i in indices]
        edits, untaken = [e.edits() for e in episodes], [e.open_edits for e in episodes]
        env = self.envs[0]
        return dict(zip(indices, joint.trace_batches(edits, env.token, env.present_until, untaken), strict=True))

    def _score(self, indices: Sequence[int]) -> dict[int, Scores]:
        """The scores for the rewards of some environments, computed together."""
        config = self.envs[0].reward_config
        requests = {i: self.envs[i].episode.batches_to_score() for i in indices}
        by_index = dict.fromkeys(indices, NO_SCORES)
        scored = [i for i in indices if requests[i]]
        if scored and config is not None:
            joint = together([self._lm(i) for i in scored])
            gradient = self.envs[0].reward_gradient
            all_scores = score_environments(joint, [requests[i] for i in scored], config, gradient)
            by_index |= dict(zip(scored, all_scores, strict=True))
        return by_index

    def _lm(self, i: int) -> WeightSetLM:
        lm = self.envs[i].lm
        assert isinstance(lm, WeightSetLM)
        return lm

    def _pad_info(self, info: dict[str, Any]) -> dict[str, Any]:
        """The info with NumPy arrays of the same shapes in all environments, as gathering them requires."""
        if self.array_backend == "torch" or "keys" not in info.get("action_gradient", {}):
            return info

        def pad(array: np.ndarray) -> np.ndarray:
            return np.pad(array, ((0, self.max_tokens - len(array)), (0, 0)))

        by_part = info["action_gradient"].items()
        return {**info, "action_gradient": {part: {m: pad(g) for m, g in by.items()} for part, by in by_part}}

    def _batch_observations(self) -> Any:
        """The latest observations of all environments as one, in the array backend asked for."""
        latest = self._observations
        is_torch = self.array_backend == "torch"
        rows = max(len(o["mask"]) for o in latest) if is_torch else self.max_tokens

        def stack(parts: Sequence[Tensor], padded: bool = True) -> Any:
            shape = (self.num_envs, rows if padded else len(parts[0]), *parts[0].shape[1:])
            device = parts[0].device if is_torch else "cpu"
            batch = torch.zeros(shape, dtype=parts[0].dtype if is_torch else torch.float32, device=device)
            for row, part in zip(batch, parts, strict=True):
                row[: len(part)] = part
            return batch if is_torch else batch.numpy()

        modules = self.envs[0].lm.module_shapes
        factors = ("keys", "value_gradients")
        return {
            **{part: {m: stack([o[part][m] for o in latest]) for m in modules} for part in factors},
            "mask": stack([o["mask"] for o in latest]),
            "edit_loss": stack([o["edit_loss"] for o in latest], padded=False),
            "progress": stack([o["progress"] for o in latest], padded=False),
        }

    # -- inspecting ------------------------------------------------------------------------------------------------

    def render(self) -> tuple[Any, ...] | None:
        """The results of every environment's `render`; None without a mode, and with "human", which prints."""
        frames = tuple(env.render() for env in self.envs)
        return None if self.render_mode in (None, "human") else frames

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """A method's results, or an attribute, of every environment."""
        attributes = [getattr(env, name) for env in self.envs]
        return tuple(value(*args, **kwargs) if callable(value) else value for value in attributes)

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """An attribute of every environment."""
        return self.call(name)

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """The environments' random generators."""
        return tuple(env.np_random for env in self.envs)

    @property
    def np_random_seed(self) -> tuple[int | None, ...]:  # type: ignore[override]
        """The environments' seeds."""
        return tuple(env.np_random_seed for env in self.envs)

    def close_extras(self, **kwargs: Any) -> None:
        """Restore every environment's weights and clear the caches."""
        for env in self.envs:
            env.close()
