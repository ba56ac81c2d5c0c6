"""Low-dimensional views of the environment, for libraries that take flat Box spaces.

A raw observation and action have millions of numbers. With these wrappers an agent sees some features of each edited
module and chooses how strongly a base rule edits it:

    env = gym.make("rledit_env:RLEdit-CounterFact-v0", array_backend="torch")
    env = GradientFeatures(ScaledUpdate(env))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from torch import Tensor

Rule = Literal["gradient", "least_squares"]


def _inner(env: gym.Env[Any, Any]) -> Any:
    """The `LifelongEditEnv` inside the wrappers."""
    inner: Any = env.unwrapped
    if not hasattr(inner, "lm"):
        raise ValueError(f"{inner} is no environment of this package; wrap one such as RLEdit-CounterFact-v0")
    return inner


def _used(observation: Mapping[str, Any], device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Keys and value gradients of the rows in use, as tensors, whatever the array backend."""
    rows = int(observation["mask"].sum())
    keys, gradients = (
        {m: torch.as_tensor(v[:rows], device=device) for m, v in observation[part].items()}
        for part in ("keys", "value_gradients")
    )
    return keys, gradients


class GradientFeatures(gym.ObservationWrapper[Any, Any, Any], RecordConstructorArgs):
    """Features of the fine-tuning gradient instead of the gradient: Box(−1, 1, (4 M + 2,)) for M edited modules.

    | place | feature | scaled by |
    |---|---|---|
    | 4 l | root mean square norm of module l's keys | log₁₀, six decades to 1 |
    | 4 l + 1 | root mean square norm of its value gradients | log₁₀, six decades to 1 |
    | 4 l + 2 | cosine of its new gradient δᵀu and its accumulated update W_t − W₀; 0 before the first | itself |
    | 4 l + 3 | ‖W_t − W₀‖ / ‖W₀‖ | tanh |
    | 4 M | the edit loss | x / (1 + x) |
    | 4 M + 1 | progress in the stream | 2 x − 1 |

    Everything is clipped to [−1, 1]. All features come from the state alone: none is a running statistic, so that
    `gymnasium.wrappers.NormalizeObservation` can be put around it where one is wanted.

    Args:
        env: the environment, or `ScaledUpdate` around it (which needs the raw observations).
    """

    DECADES = 6.0

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        RecordConstructorArgs.__init__(self)
        gym.ObservationWrapper.__init__(self, env)
        self.lm = _inner(env).lm
        self.observation_space = spaces.Box(-1.0, 1.0, (4 * len(self.lm.module_shapes) + 2,), np.float32)

    @torch.no_grad()
    def observation(self, observation: Any) -> np.ndarray:
        """The features (4 M + 2,) of a raw observation."""
        keys, gradients = _used(observation, self.lm.device)
        features: list[float] = []
        for module in self.lm.module_shapes:
            u, delta = keys[module], gradients[module]
            change = self.lm.weight(module) - self.lm.original_weight(module)
            features += [self._decades(u), self._decades(delta), _alignment(u, delta, change),
                         float(torch.tanh(change.norm() / self.lm.original_weight(module).norm()))]
        loss = float(observation["edit_loss"][0])
        features += [loss / (1 + loss), 2 * float(observation["progress"][0]) - 1]
        return np.clip(np.asarray(features, dtype=np.float32), -1.0, 1.0)

    def _decades(self, rows: Tensor) -> float:
        """log₁₀ of the root mean square of the rows' norms, over the decades that count."""
        mean = float(rows.square().sum(1).mean()) if len(rows) else 0.0
        return float(np.log10(max(mean, 1e-30)) / 2 / self.DECADES)


def _alignment(u: Tensor, delta: Tensor, change: Tensor) -> float:
    """cos(δᵀu, ΔW), from the factors."""
    product = ((delta @ change) * u).sum()
    norm = ((u @ u.T) * (delta @ delta.T)).sum().clamp(min=0).sqrt() * change.norm()
    return float(product / norm) if norm > 0 else 0.0


class ScaledUpdate(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """The agent scales a base rule's update: Box(−1, 1, (M,)), (2 M,) or more for M edited modules.

    The zero action is the base rule itself. For module l

    | numbers | meaning |
    |---|---|
    | M | a_l: its step size is ``step_size`` · ``span``^a_l |
    | M ("least_squares" only) | b_l: its damping is ``damping`` · ``span``^b_l |
    | M · ``rank`` | c_lj: the part of the values along the basis vector p_j is multiplied by 1 + c_lj |

    Rules, with keys u (N, d_in) and value gradients δ (N, d_out): "gradient" is plain fine-tuning, ΔW = −η δᵀu;
    "least_squares" asks every key's output to move as a gradient step on that row alone would move it,
    ΔW uᵢ = −η ‖uᵢ‖² δᵢ, by ridge regression: ΔW = vᵀ (u uᵀ + λI)⁻¹ u with vᵢ = −η ‖uᵢ‖² δᵢ (MALMEN's rule with û = u).

    Args:
        env: the environment, in either array backend ("torch" saves copies).
        rule: the base rule.
        step_size: η of the zero action.
        damping: λ of the zero action.
        span: how far an action of ±1 goes, as a factor.
        rank: vectors of the basis; 0 for none.
        seed: of the basis: the orthonormal part of a random matrix (d_out, rank) for each module.
    """

    def __init__(
        self,
        env: gym.Env[Any, Any],
        rule: Rule = "least_squares",
        step_size: float = 0.01,
        damping: float = 1.0,
        span: float = 10.0,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        RecordConstructorArgs.__init__(
            self, rule=rule, step_size=step_size, damping=damping, span=span, rank=rank, seed=seed
        )
        gym.Wrapper.__init__(self, env)
        if rule not in ("gradient", "least_squares"):
            raise ValueError(f"rule is {rule!r}; give 'gradient' or 'least_squares'")
        for name, value, least in (("step_size", step_size, 0), ("damping", damping, 0), ("span", span, 1)):
            if not value > least:
                raise ValueError(f"{name} is {value}; give a number above {least}")
        lm = _inner(env).lm
        self.device, self.shapes = lm.device, dict(lm.module_shapes)
        narrowest = min(d_out for _, d_out in self.shapes.values())
        if not 0 <= rank <= narrowest:
            raise ValueError(f"rank is {rank}; give 0 (no basis) to {narrowest}, the narrowest module's output")
        self.rule, self.step_size, self.damping, self.span, self.rank = rule, step_size, damping, span, rank
        generator = torch.Generator().manual_seed(seed)
        self.basis = {
            m: torch.linalg.qr(torch.randn(d_out, rank, generator=generator))[0].to(self.device)
            for m, (_, d_out) in self.shapes.items()
        }  # (d_out, rank)
        width = len(self.shapes) * (1 + (rule == "least_squares") + rank)
        self.action_space = spaces.Box(-1.0, 1.0, (width,), np.float32)
        self._observation: Any = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self._observation, info = self.env.reset(seed=seed, options=options)
        return self._observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """A step with the factors that the action means.

        Raises:
            ValueError: the action has a wrong shape or a number that is not finite; nothing has changed.
        """
        self._observation, reward, terminated, truncated, info = self.env.step(self.factors(self._observation, action))
        return self._observation, reward, terminated, truncated, info

    @torch.no_grad()
    def factors(self, observation: Any, action: Any) -> dict[str, dict[str, Any]]:
        """The raw environment's action: update factors by module."""
        action = np.asarray(action, dtype=np.float32)
        if action.shape != self.action_space.shape:
            raise ValueError(f"the action has shape {action.shape}; it must be {self.action_space.shape}")
        if not np.isfinite(action).all():
            place = int(np.flatnonzero(~np.isfinite(action))[0])
            raise ValueError(f"the action's number {place} is not finite; nothing was applied")
        keys, gradients = _used(observation, self.device)
        parts = torch.from_numpy(np.clip(action, -1.0, 1.0)).view(-1, len(self.shapes))
        scale = self.span ** parts
        update_keys, values = {}, {}
        for i, m in enumerate(self.shapes):
            u, step_size = keys[m], self.step_size * float(scale[0, i])
            if self.rule == "gradient":
                update_keys[m], v = u, -step_size * gradients[m]
            else:
                damping = self.damping * float(scale[1, i])
                gram = u @ u.T + damping * torch.eye(len(u), device=u.device)  # (N, N)
                update_keys[m] = torch.cholesky_solve(u, torch.linalg.cholesky(gram))
                v = -step_size * u.square().sum(1, keepdim=True) * gradients[m]
            if self.rank:
                coefficients = parts[-self.rank :, i].to(v.device)
                v = v + (v @ self.basis[m]) * coefficients @ self.basis[m].T
            values[m] = v
        factors = {"keys": update_keys, "values": values}
        if isinstance(observation["mask"], np.ndarray):
            return {part: {m: t.cpu().numpy() for m, t in by.items()} for part, by in factors.items()}
        return factors


class FlattenFactors(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """The whole factors as one Box each way, for small models: what a policy over raw gradients needs.

    The observation is keys and value gradients of every module (padded to N rows), the mask, the edit loss and the
    progress, one after the other; the action is update keys and values of every module.

    Args:
        env: the environment with ``array_backend="numpy"``.
        limit: refuse spaces of more numbers than this, which no standard library will train on.
    """

    def __init__(self, env: gym.Env[Any, Any], limit: int = 10_000_000) -> None:
        RecordConstructorArgs.__init__(self, limit=limit)
        gym.Wrapper.__init__(self, env)
        if _inner(env).array_backend != "numpy":
            raise ValueError("the environment gives tensors without padding; make it with array_backend='numpy'")
        for name in ("observation_space", "action_space"):
            size = spaces.flatdim(getattr(env, name))
            if size > limit:
                raise ValueError(
                    f"the {name.replace('_', ' ')} has {size:,} numbers, more than {limit:,}; edit fewer modules or "
                    "smaller batches, use GradientFeatures(ScaledUpdate(env)), or give a higher limit"
                )
        flat: Any = (spaces.flatten_space(env.observation_space), spaces.flatten_space(env.action_space))
        self.observation_space, self.action_space = flat

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        return spaces.flatten(self.env.observation_space, observation), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """A step with the flat factors.

        Raises:
            ValueError: as the environment's, or the action is not as long as the space says.
        """
        action = np.asarray(action, dtype=np.float32)
        if action.shape != self.action_space.shape:
            raise ValueError(f"the action has shape {action.shape}; it must be {self.action_space.shape}")
        observation, reward, terminated, truncated, info = self.env.step(
            spaces.unflatten(self.env.action_space, action)
        )
        return spaces.flatten(self.env.observation_space, observation), reward, terminated, truncated, info
