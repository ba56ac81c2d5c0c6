"""Views by module: features of the gradient as observation, and scales of a base rule's update as action."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, SupportsFloat

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from gymnasium.core import ActType
from gymnasium.utils import RecordConstructorArgs
from torch import Tensor

from rledit_env.interface import editing_env
from rledit_env.lm.editable import EditableLM
from rledit_env.nesting import environment_inside
from rledit_env.spaces import Action, Observation
from rledit_env.type_aliases import Info, Options

Rule = Literal["gradient", "least_squares"]
Share = Literal["module", "kind", "all"]
DECADES = 6.0  # of norms, which log₁₀ / DECADES maps to 1


# ------------------------------------------------------------------------- the mathematics, which needs no environment


def module_groups(modules: Iterable[str], share: Share) -> list[int]:
    """The index of each module's group; the modules of a group share a view's numbers.

    Args:
        modules: dotted names.
        share: "module": every module is its own group; "kind": modules of the same last name (all ``gate_proj``, …) are
            one group; "all": all modules are one group.

    Raises:
        ValueError: ``share`` is something else.
    """
    names = list(modules)
    if share not in ("module", "kind", "all"):
        raise ValueError(f"share is {share!r}; give 'module', 'kind' or 'all'")
    labels = {"module": names, "kind": [m.rsplit(".", 1)[-1] for m in names], "all": [""] * len(names)}[share]
    places = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return [places[label] for label in labels]


def module_features(u: Tensor, delta: Tensor, change: Tensor, original_norm: float) -> list[float]:
    """The four features of one module that :class:`GradientFeatures` lists.

    Args:
        u: keys (N, d_in).
        delta: value gradients (N, d_out).
        change: W_t − W₀, (d_out, d_in).
        original_norm: ‖W₀‖.
    """
    drift = change.norm()
    return [_decades(u), _decades(delta), _alignment(u, delta, change, drift), math.tanh(float(drift) / original_norm)]


def state_features(
    by_module: Sequence[Sequence[float]], groups: Sequence[int], loss: float, progress: float
) -> np.ndarray:
    """The features (4 G + 2,) of a state.

    Args:
        by_module: for each module, its :func:`module_features`.
        groups: for each module, the index of its group; the features are the means over each group's modules.
        loss: the edit loss.
        progress: share of the episode, 0 to 1.
    """
    values, group_of = np.asarray(by_module), np.asarray(groups)
    means = np.stack([values[group_of == g].mean(0) for g in range(max(groups) + 1)])  # (G, 4)
    features = [*means.ravel(), loss / (1 + loss), 2 * progress - 1]
    return np.clip(np.asarray(features, dtype=np.float32), -1.0, 1.0)


def ridge_keys(u: Tensor, damping: float) -> Tensor:
    """ũ = (u uᵀ + λI)⁻¹ u for keys u (N, d_in): with values v, ΔW = vᵀũ is the ridge regression of v on u."""
    gram = u @ u.T + damping * torch.eye(len(u), device=u.device)  # (N, N)
    return torch.cholesky_solve(u, torch.linalg.cholesky(gram))


def _decades(rows: Tensor) -> float:
    """log₁₀ of the root mean square of the rows' norms, divided by ``DECADES``."""
    mean = float(rows.square().sum(1).mean()) if len(rows) else 0.0
    return math.log10(max(mean, 1e-30)) / 2 / DECADES


def _alignment(u: Tensor, delta: Tensor, change: Tensor, change_norm: Tensor) -> float:
    """cos(δᵀu, W_t − W₀), from the factors."""
    product = ((delta @ change) * u).sum()
    norm = ((u @ u.T) * (delta @ delta.T)).sum().clamp(min=0).sqrt() * change_norm
    return float(product / norm) if norm > 0 else 0.0


# --------------------------------------------------------------------------------------------------------- the views


def _rows_in_use(observation: Observation, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Keys and value gradients of the rows in use, as tensors, whatever the array backend."""
    rows = int(observation["mask"].sum())
    keys, gradients = (
        {m: torch.as_tensor(v[:rows], device=device) for m, v in observation[part].items()}
        for part in ("keys", "value_gradients")
    )
    return keys, gradients


class GradientFeatures(gym.ObservationWrapper[np.ndarray, ActType, Observation], RecordConstructorArgs):
    """Features of the fine-tuning gradient as observations: Box(−1, 1, (4 G + 2,)) for G groups of modules.

    | index | feature | scaled by |
    |---|---|---|
    | 4 g | root mean square norm of a module's keys | log₁₀, six decades to 1 |
    | 4 g + 1 | root mean square norm of its value gradients | log₁₀, six decades to 1 |
    | 4 g + 2 | cosine of its new gradient δᵀu and its accumulated update W_t − W₀; 0 before the first | itself |
    | 4 g + 3 | ‖W_t − W₀‖ / ‖W₀‖ | tanh |
    | 4 G | the edit loss | x / (1 + x) |
    | 4 G + 1 | progress in the episode | 2 x − 1 |

    A group's features are the means over its modules; by default every module is a group. Everything is clipped to
    [−1, 1]. All features depend on the state alone. None is a running statistic;
    `gymnasium.wrappers.NormalizeObservation` can be put around it for these.

    Args:
        env: the environment, or `ScaledUpdate` around it (which needs the raw observations).
        share: which modules are a group (see :func:`module_groups`). With fewer features, learning takes fewer steps.

    Raises:
        ValueError: the environment has no raw observations; the message names the right order of wrappers.
    """

    def __init__(self, env: gym.Env, share: Share = "module") -> None:
        environment_inside(env, "GradientFeatures", ("observation",))
        RecordConstructorArgs.__init__(self, share=share)
        gym.ObservationWrapper.__init__(self, env)
        self.groups = module_groups(self.lm.module_shapes, share)
        self._original_norms = {m: float(self.lm.original_weight(m).norm()) for m in self.lm.module_shapes}
        self.observation_space = spaces.Box(-1.0, 1.0, (4 * (max(self.groups) + 1) + 2,), np.float32)

    @property
    def lm(self) -> EditableLM:
        """The LLM whose weights the features describe."""
        return editing_env(self).lm

    @torch.no_grad()
    def observation(self, observation: Observation) -> np.ndarray:
        """The features (4 G + 2,) of a raw observation."""
        keys, gradients = _rows_in_use(observation, self.lm.device)
        by_module = [
            module_features(u, gradients[m], self.lm.weight(m) - self.lm.original_weight(m), self._original_norms[m])
            for m, u in keys.items()
        ]
        loss, progress = float(observation["edit_loss"][0]), float(observation["progress"][0])
        return state_features(by_module, self.groups, loss, progress)


class ScaledUpdate(gym.Wrapper[Observation, np.ndarray, Observation, Action], RecordConstructorArgs):
    """Actions scale a base rule's update: Box(−1, 1, (G,)), (2 G,) or more for G groups of modules.

    The zero action is the base rule itself. For the modules of group g:

    | numbers | meaning |
    |---|---|
    | G | a_g: their step size is ``step_size`` · ``span``^a_g |
    | G ("least_squares" only) | b_g: their damping is ``damping`` · ``span``^b_g |
    | G · ``rank`` | c_gj: the part of the values along a module's basis vector p_j is multiplied by 1 + c_gj |

    Rules, with keys u (N, d_in) and value gradients δ (N, d_out): "gradient" is plain fine-tuning, ΔW = −η δᵀu;
    "least_squares" asks every key's output to move as a gradient step on that row alone would move it,
    ΔW uᵢ = −η ‖uᵢ‖² δᵢ, by ridge regression: ΔW = vᵀ (u uᵀ + λI)⁻¹ u with vᵢ = −η ‖uᵢ‖² δᵢ (MALMEN's rule with û = u).

    Args:
        env: the environment, in either array backend ("torch" saves copies).
        rule: the base rule.
        step_size: η of the zero action; 1 suits single facts and the default model.
        damping: λ of the zero action.
        span: factor by which an action of ±1 scales.
        rank: number of basis vectors; 0 for none.
        seed: seed of the basis, the orthonormal part of a random matrix (d_out, rank) for each module.
        share: which modules are a group (see :func:`module_groups`); by default every module is one.

    Raises:
        ValueError: an argument is invalid, or the environment has no raw observations and actions; the message names
            the right order of wrappers.
    """

    env: gym.Env  # which Gymnasium takes to have the wrapper's actions

    def __init__(
        self,
        env: gym.Env,
        rule: Rule = "least_squares",
        step_size: float = 1.0,
        damping: float = 1.0,
        span: float = 10.0,
        rank: int = 0,
        seed: int = 0,
        share: Share = "module",
    ) -> None:
        lm = environment_inside(env, "ScaledUpdate").lm
        RecordConstructorArgs.__init__(
            self, rule=rule, step_size=step_size, damping=damping, span=span, rank=rank, seed=seed, share=share
        )
        gym.Wrapper.__init__(self, env)
        if rule not in ("gradient", "least_squares"):
            raise ValueError(f"rule is {rule!r}; give 'gradient' or 'least_squares'")
        for name, value, least in (("step_size", step_size, 0), ("damping", damping, 0), ("span", span, 1)):
            if not value > least:
                raise ValueError(f"{name} is {value}; give a number above {least}")
        self.device, self.shapes = lm.device, dict(lm.module_shapes)
        self.groups = module_groups(self.shapes, share)
        narrowest = min(d_out for _, d_out in self.shapes.values())
        if not 0 <= rank <= narrowest:
            raise ValueError(f"rank is {rank}; give 0 (no basis) to {narrowest}, the narrowest module's output")
        self.rule, self.step_size, self.damping, self.span, self.rank = rule, step_size, damping, span, rank
        generator = torch.Generator().manual_seed(seed)
        self.basis = {
            m: torch.linalg.qr(torch.randn(d_out, rank, generator=generator))[0].to(self.device)
            for m, (_, d_out) in self.shapes.items()
        }  # (d_out, rank)
        width = (max(self.groups) + 1) * (1 + (rule == "least_squares") + rank)
        self.action_space = spaces.Box(-1.0, 1.0, (width,), np.float32)
        self._observation: Observation | None = None

    def reset(self, *, seed: int | None = None, options: Options | None = None) -> tuple[Observation, Info]:
        self._observation, info = self.env.reset(seed=seed, options=options)
        return self._observation, info

    def step(self, action: np.ndarray) -> tuple[Observation, SupportsFloat, bool, bool, Info]:
        """A step with the factors that the action stands for.

        Raises:
            ValueError: the action has a wrong shape or a number that is not finite; nothing has changed.
            gymnasium.error.ResetNeeded: no episode was begun.
        """
        if self._observation is None:
            raise gym.error.ResetNeeded("no episode was begun: call reset() before step()")
        self._observation, reward, terminated, truncated, info = self.env.step(self.factors(self._observation, action))
        return self._observation, reward, terminated, truncated, info

    @torch.no_grad()
    def factors(self, observation: Observation, action: np.ndarray) -> Action:
        """The raw environment's action: update factors by module."""
        action = np.asarray(action, dtype=np.float32)
        if action.shape != self.action_space.shape:
            raise ValueError(f"the action has shape {action.shape}; it must be {self.action_space.shape}")
        if not np.isfinite(action).all():
            place = int(np.flatnonzero(~np.isfinite(action))[0])
            raise ValueError(f"the action's number {place} is not finite; nothing was applied")
        keys, gradients = _rows_in_use(observation, self.device)
        parts = torch.from_numpy(np.clip(action, -1.0, 1.0)).view(-1, max(self.groups) + 1)[:, self.groups]
        scale = self.span ** parts  # (numbers of a group, M)
        update_keys, values = {}, {}
        for i, m in enumerate(self.shapes):
            u, step_size = keys[m], self.step_size * float(scale[0, i])
            if self.rule == "gradient":
                update_keys[m], v = u, -step_size * gradients[m]
            else:
                update_keys[m] = ridge_keys(u, self.damping * float(scale[1, i]))
                v = -step_size * u.square().sum(1, keepdim=True) * gradients[m]
            if self.rank:
                coefficients = parts[-self.rank :, i].to(v.device)
                v = v + (v @ self.basis[m]) * coefficients @ self.basis[m].T
            values[m] = v
        factors = {"keys": update_keys, "values": values}
        if isinstance(observation["mask"], np.ndarray):
            padding = (0, 0, 0, len(observation["mask"]) - len(u))
            return {part: {m: F.pad(t, padding).cpu().numpy() for m, t in by.items()} for part, by in factors.items()}
        return factors
