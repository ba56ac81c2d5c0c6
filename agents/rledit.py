"""RLEdit: the hypernetwork trained by the gradient of the whole trajectory's return (ICML 2025)."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from agents.base import Agent, run_stream
from agents.hypernetwork import Hypernetwork, HypernetworkConfig, StepRecord

Callback = Callable[[dict[str, float]], bool | None]


@dataclass(frozen=True)
class RLEditConfig:
    """How the agent is trained.

    Attributes:
        network: the hypernetwork.
        credit: "trajectory", the gradient of the whole return, or "step", each step's own reward only.
        learning_rate: Adam's, for the residual blocks.
        step_size_learning_rate: Adam's, for log η_l and log λ_l.
        max_gradient_norm: the policy gradient is clipped to this norm.
        trajectories_per_update: trajectories whose gradients are averaged for one policy update.
        discount: γ.
        drift_limit: a training trajectory is cut once the mean ‖W_t − W₀‖ / ‖W₀‖ exceeds this, before the LLM breaks:
            gradients through a broken LLM spoil the policy.
    """

    network: HypernetworkConfig = field(default_factory=HypernetworkConfig)
    credit: Literal["trajectory", "step"] = "trajectory"
    learning_rate: float = 1e-3
    step_size_learning_rate: float = 2e-2
    max_gradient_norm: float = 1.0
    trajectories_per_update: int = 1
    discount: float = 1.0
    drift_limit: float = 0.6

    def __post_init__(self) -> None:
        if self.credit not in ("trajectory", "step"):
            raise ValueError(f"credit is {self.credit!r}; give 'trajectory' or 'step'")


class CreditAccumulator:
    """∂R/∂ũ_t and ∂R/∂ṽ_t of all steps so far, as rewards come in.

    Every reward gradient G_τ is projected at once on the factors of the steps it depends on (one product with the
    stacked factors a module), so that no dense gradient outlives its step.

    Args:
        credit: "trajectory" (all steps t ≤ τ) or "step" (t = τ only).
        key_gradients: whether ∂R/∂ũ is needed; the recursion's ũ does not depend on the parameters.
    """

    def __init__(self, credit: str, key_gradients: bool) -> None:
        self.credit, self.key_gradients = credit, key_gradients
        self.keys: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}
        self.for_keys: dict[str, Tensor] = {}
        self.for_values: dict[str, Tensor] = {}
        self.rows: list[int] = []

    def add(
        self,
        keys: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        reward_gradient: Mapping[str, Tensor] | None,
        action_gradient: Mapping[str, Mapping[str, Tensor]],
        discount: float,
    ) -> None:
        """Take in step τ: its factors, ∂r_τ/∂W_τ (None if it is zero), the direct ∂r_τ/∂a_τ, and γ^τ."""
        start = sum(self.rows) if self.credit == "step" else 0
        self.rows.append(len(next(iter(keys.values()))))
        for m in keys:
            gradient = reward_gradient[m] if reward_gradient is not None else None
            self.keys[m] = _stacked(self.keys.get(m), keys[m])
            self.for_values[m] = _stacked(self.for_values.get(m), discount * action_gradient["values"][m])
            if gradient is not None:
                self.for_values[m][start:].addmm_(self.keys[m][start:], gradient.T, alpha=discount)
            if self.key_gradients:
                self.values[m] = _stacked(self.values.get(m), values[m])
                self.for_keys[m] = _stacked(self.for_keys.get(m), discount * action_gradient["keys"][m])
                if gradient is not None:
                    self.for_keys[m][start:].addmm_(self.values[m][start:], gradient, alpha=discount)

    def of_step(self, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(∂R/∂ũ_t, ∂R/∂ṽ_t) by module; the first is empty if it is not needed."""
        part = slice(sum(self.rows[:step]), sum(self.rows[: step + 1]))
        return {m: g[part] for m, g in self.for_keys.items()}, {m: g[part] for m, g in self.for_values.items()}


def _stacked(stack: Tensor | None, rows: Tensor) -> Tensor:
    return rows.clone() if stack is None else torch.cat([stack, rows])


class RLEditAgent(Agent):
    """The RLEdit agent.

    Args:
        env: a `LifelongEditEnv` made with ``array_backend="torch"`` (and ``reward_gradient=True`` to learn); None for
            an agent that only predicts, given ``shapes``.
        config: the network and its training.
        shapes: module → (d_in, d_out), if there is no ``env``.
        seed: of the initial parameters and of the training streams.
    """

    def __init__(
        self,
        env: gym.Env | None = None,
        config: RLEditConfig | None = None,
        shapes: Mapping[str, tuple[int, int]] | None = None,
        seed: int = 0,
    ) -> None:
        self.env, self.config, self.seed = env, config or RLEditConfig(), seed
        if shapes is None:
            if env is None:
                raise ValueError("give an environment or the edited modules' shapes")
            spaces = env.action_space["keys"], env.action_space["values"]
            shapes = {m: (spaces[0][m].shape[1], spaces[1][m].shape[1]) for m in spaces[0]}
        self.network = Hypernetwork(shapes, self.config.network, seed)
        self.optimizer = self._make_optimizer()
        self.updates = 0
        self.timesteps = 0
        self.best_score = -math.inf
        self._best: dict[str, Tensor] | None = None

    def _make_optimizer(self) -> torch.optim.Optimizer:
        network, config = self.network, self.config
        return torch.optim.Adam(
            [
                {"params": list(network.networks.parameters()), "lr": config.learning_rate},
                {"params": [network.log_step_size, network.log_damping], "lr": config.step_size_learning_rate},
            ]
        )

    # -- acting --------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        self.network.reset()

    @torch.no_grad()
    def predict(self, observation: Any, deterministic: bool = True) -> tuple[Any, None]:
        """Update factors for an observation in either array backend; the policy is deterministic."""
        numpy = isinstance(observation["mask"], np.ndarray)
        record = self._observe(observation, adapt=False)
        keys, values = self.network.factors(record)
        if not numpy:
            return {"keys": keys, "values": values}, None
        rows = len(observation["mask"])
        padded = [{m: _padded(t, rows) for m, t in factors.items()} for factors in (keys, values)]
        return {"keys": padded[0], "values": padded[1]}, None

    def _observe(self, observation: Any, adapt: bool) -> StepRecord:
        used = int(observation["mask"].sum())
        keys, gradients = (
            {m: torch.as_tensor(v[:used], device=self.network.device) for m, v in observation[part].items()}
            for part in ("keys", "value_gradients")
        )
        return self.network.observe(keys, gradients, adapt)

    # -- learning ------------------------------------------------------------------------------------------------

    def learn(
        self,
        total_timesteps: int,
        callback: Callback | None = None,
        progress_bar: bool = True,
        log_dir: str | Path | None = None,
        eval_env: gym.Env | None = None,
        eval_every: int = 5,
        patience: int = 4,
        eval_seed: int = 12345,
    ) -> RLEditAgent:
        """Train by whole-trajectory updates: each ends with one step of Adam on the gradient of the return.

        Args:
            total_timesteps: environment steps to take in all, counted over every call of ``learn``.
            callback: called after every update with its numbers; training stops when it returns False.
            progress_bar: show one.
            log_dir: TensorBoard's folder; checkpoints ``last`` and ``best`` are written there too, and training goes
                on from ``last`` if it is there.
            eval_env: a held-out stream, best a longer one than the training streams (a policy trained on one horizon
                need not be stable beyond it). Its metrics choose the best checkpoint, which the agent holds at the
                end. It may share the LLM with the training environment.
            eval_every: updates between two evaluations; the untrained policy is evaluated too.
            patience: evaluations without a better score before training stops early.
            eval_seed: the seed that ``eval_env`` is always reset with.

        Raises:
            ValueError: the environment does not give tensors and reward gradients.
        """
        env = self._training_env()
        folder = Path(log_dir) if log_dir is not None else None
        writer = _summary_writer(folder)
        bar = tqdm(total=total_timesteps, initial=self.timesteps, unit="step", disable=not progress_bar)
        waited = 0
        horizon = env.unwrapped.episode_steps
        try:
            if eval_env is not None and self._best is None:
                self._evaluate(eval_env, eval_seed, writer)
            while self.timesteps < total_timesteps:
                gradients: list[list[Tensor]] = []
                numbers: dict[str, float] = {}
                for _ in range(self.config.trajectories_per_update):
                    gradient, numbers = self._trajectory(env, self.seed + self.updates * 1000 + len(gradients))
                    gradients.append(gradient)
                    self.timesteps += horizon
                    bar.update(horizon)
                numbers |= self._update(gradients)
                bar.set_postfix({k: f"{numbers[k]:.3g}" for k in ("return", "drift") if k in numbers})
                _log(writer, "train", numbers, self.updates)
                if eval_env is not None and self.updates % eval_every == 0:
                    better = self._evaluate(eval_env, eval_seed, writer)
                    waited = 0 if better else waited + 1
                    if folder is not None:
                        self._checkpoint(folder)
                if callback is not None and callback(numbers) is False:
                    break
                if eval_env is not None and waited >= patience:
                    break
        finally:
            bar.close()
            if writer is not None:
                writer.close()
        if self._best is not None:
            self.network.load_state_dict(self._best)
        if folder is not None:
            self._checkpoint(folder)
        return self

    def _training_env(self) -> gym.Env:
        if self.env is None:
            raise ValueError("this agent has no environment to learn in; load it with env=…")
        inner = self.env.unwrapped
        if inner.array_backend != "torch" or not inner.reward_gradient:
            raise ValueError(
                "the environment must be made with array_backend='torch' and reward_gradient=True, so that a "
                "trajectory can be differentiated"
            )
        return self.env

    def _trajectory(self, env: gym.Env, seed: int) -> tuple[list[Tensor], dict[str, float]]:
        """One stream: the policy gradient (negative, for descent) and the trajectory's numbers."""
        observation, _ = env.reset(seed=seed)
        self.reset()
        credit = CreditAccumulator(self.config.credit, self.config.network.aggregation != "recursive")
        records: list[StepRecord] = []
        infos: list[dict[str, Any]] = []
        total, done = 0.0, False
        while not done:
            record = self._observe(observation, adapt=True)
            with torch.no_grad():
                keys, values = self.network.factors(record)
            observation, reward, terminated, truncated, info = env.step({"keys": keys, "values": values})
            done = terminated or truncated
            if info["diverged"]:
                warnings.warn(f"the LLM broke at step {len(records)} of a training stream; that step is left out of "
                              "the gradient. Lower the step size or drift_limit", stacklevel=2)
                break
            credit.add(keys, values, info.get("reward_gradient"), info["action_gradient"],
                       self.config.discount ** len(records))
            records.append(record)
            infos.append({k: v for k, v in info.items() if isinstance(v, float)} | {"reward": float(reward)})
            total += float(reward)
            if info["drift"] > self.config.drift_limit:
                warnings.warn(f"drift {info['drift']:.2f} passed drift_limit at step {len(records)}: the trajectory is "
                              "cut here, before the LLM breaks", stacklevel=2)
                break
        if not records:
            return [torch.zeros_like(p) for p in self._parameters()], {"return": float(reward), "steps": 0.0}
        numbers = {k: float(np.mean([i[k] for i in infos if k in i])) for k in infos[-1]}
        numbers |= {"return": total, "steps": float(len(records)), "drift": infos[-1]["drift"]}
        numbers["step_size"] = float(self.network.log_step_size.detach().exp().mean())
        return self._policy_gradient(records, credit), numbers

    def _parameters(self) -> list[Tensor]:
        return [p for p in self.network.parameters() if p.requires_grad]

    def _policy_gradient(self, records: list[StepRecord], credit: CreditAccumulator) -> list[Tensor]:
        """−∂R/∂φ per step of the stream: the network runs a second time, step by step, with the cotangents."""
        parameters = self._parameters()
        gradient = [torch.zeros_like(p) for p in parameters]
        for step, record in enumerate(records):
            for_keys, for_values = credit.of_step(step)
            keys, values = self.network.factors(record)
            outputs = list(values.values()) + [keys[m] for m in for_keys]
            cotangents = list(for_values.values()) + list(for_keys.values())
            pieces = torch.autograd.grad(outputs, parameters, cotangents, allow_unused=True)
            for total, piece in zip(gradient, pieces, strict=True):
                if piece is not None:
                    total.sub_(piece, alpha=1 / len(records))
        return gradient

    def _update(self, gradients: list[list[Tensor]]) -> dict[str, float]:
        """One step of Adam on the mean of the trajectories' gradients."""
        for parameter, *pieces in zip(self._parameters(), *gradients, strict=True):
            parameter.grad = torch.stack(pieces).mean(0)
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters(), self.config.max_gradient_norm))
        if math.isfinite(norm):
            self.optimizer.step()
        else:
            warnings.warn("the policy gradient is not finite; this update is left out", stacklevel=2)
        self.optimizer.zero_grad()
        self.updates += 1
        return {"gradient_norm": norm}

    def _evaluate(self, eval_env: gym.Env, seed: int, writer: Any) -> bool:
        """Score the policy on the held-out stream and keep it if it is the best so far."""
        _, info = run_stream(eval_env, self, seed=seed)
        metrics = eval_env.unwrapped.evaluate(generate=False)
        score = -math.inf if info["diverged"] else metrics.mean
        _log(writer, "eval", {k: v for k, v in metrics.as_dict().items() if v is not None} | {"drift": info["drift"]},
             self.updates)
        tqdm.write(
            f"update {self.updates}: held-out efficacy {metrics.efficacy:.1f}, generalization "
            f"{metrics.generalization:.1f}, specificity {metrics.specificity:.1f}, mean {metrics.mean:.1f}, top-1 "
            f"{metrics.top1:.1f}, drift {info['drift']:.3f}"
        )
        if score <= self.best_score:
            return False
        self.best_score = score
        self._best = {k: v.detach().clone() for k, v in self.network.state_dict().items()}
        return True

    # -- files ---------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the network, its normalisers and its memory as safetensors, and its configuration as JSON."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"stream.{k}": v for k, v in self.network.memory_state().items()}
        partial = folder / "agent.safetensors.partial"
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, partial)
        description = {
            "agent": "rledit",
            "format": 1,
            "seed": self.seed,
            "config": asdict(self.config),
            "shapes": {m: list(s) for m, s in self.network.shapes.items()},
            "updates": self.updates,
            "timesteps": self.timesteps,
            "best_score": self.best_score if math.isfinite(self.best_score) else None,
            "environment": _environment_settings(self.env),
        }
        (folder / "agent.json.partial").write_text(json.dumps(description, indent=1) + "\n")
        partial.rename(folder / "agent.safetensors")
        (folder / "agent.json.partial").rename(folder / "agent.json")

    @classmethod
    def load(cls, path: str | Path, env: gym.Env | None = None) -> RLEditAgent:
        """The agent in a folder that :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no agent there.
            ValueError: it was trained for other modules than the environment's.
        """
        folder = Path(path)
        if not (folder / "agent.json").exists():
            raise FileNotFoundError(f"{folder} holds no agent (no agent.json); give the folder that save() wrote")
        description = json.loads((folder / "agent.json").read_text())
        config = RLEditConfig(**description["config"] | {
            "network": HypernetworkConfig(**description["config"]["network"])
        })
        shapes = {m: (s[0], s[1]) for m, s in description["shapes"].items()}
        agent = cls(env, config, shapes, description["seed"])
        if env is not None:
            wanted = {m: (s.shape[1], env.action_space["values"][m].shape[1])
                      for m, s in env.action_space["keys"].items()}
            if wanted != shapes:
                raise ValueError(
                    f"{folder} was trained for {len(shapes)} modules such as {next(iter(shapes.items()))}, the "
                    f"environment edits {len(wanted)} such as {next(iter(wanted.items()))}; make the environment with "
                    f"the settings in {folder / 'agent.json'}"
                )
        tensors = load_file(folder / "agent.safetensors")
        agent.network.load_state_dict({k.removeprefix("network."): v for k, v in tensors.items() if "network." in k[:8]})
        agent.network.load_memory_state({k.removeprefix("stream."): v for k, v in tensors.items() if k[:7] == "stream."})
        agent.updates, agent.timesteps = description["updates"], description["timesteps"]
        return agent

    def _checkpoint(self, folder: Path) -> None:
        """Write ``last`` (with the optimiser's state, to go on from) and ``best``."""
        self.save(folder / "last")
        if self._best is not None:
            current = {k: v.detach().clone() for k, v in self.network.state_dict().items()}
            self.network.load_state_dict(self._best)
            self.save(folder / "best")
            self.network.load_state_dict(current)


def _padded(rows: Tensor, count: int) -> np.ndarray:
    array = np.zeros((count, rows.shape[1]), dtype=np.float32)
    array[: len(rows)] = rows.cpu().numpy()
    return array


def _environment_settings(env: gym.Env | None) -> dict[str, Any] | None:
    """What of the environment a policy depends on, for the record."""
    if env is None:
        return None
    inner = env.unwrapped
    return {
        "id": env.spec.id if env.spec is not None else None,
        "model": inner.lm.name,
        "source": inner.dataset.source,
        "split": inner.dataset.split,
        "token": inner.token,
        "steps_per_batch": inner.steps_per_batch,
        "num_batches": inner.stream.num_batches,
        "batch_size": inner.stream.batch_size,
    }


def _summary_writer(folder: Path | None) -> Any:
    if folder is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))


def _log(writer: Any, group: str, numbers: Mapping[str, float], step: int) -> None:
    if writer is not None:
        for name, value in numbers.items():
            writer.add_scalar(f"{group}/{name}", value, step)
