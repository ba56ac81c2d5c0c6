"""A hypernetwork as a policy: acting, saving and loading."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from agents.base import Agent, factor_action, module_shapes, require_modules, used_rows
from agents.curvature import LowCurvature, low_curvature, projected, restrained, text_curvature
from agents.facts import PresentedFacts
from agents.files import agent_folder, under
from agents.rledit.config import RLEditConfig
from agents.rledit.hypernetwork import Hypernetwork, StepRecord
from agents.rledit.normaliser import moments_state
from agents.rledit.progress import Progress
from agents.rledit.text_prior import turn_by_text
from agents.settings import environment_settings, presentation_settings
from rledit_env.evaluation.metrics import METRICS_VERSION
from rledit_env.files import write_tensors, write_text
from rledit_env.interface import Environment, editing_env
from rledit_env.spaces import Action, Observation
from rledit_env.type_aliases import JsonObject, Settings


class HypernetworkPolicy(Agent):
    """An agent whose updates a hypernetwork computes.

    Args:
        env, config, shapes, seed: as in `RLEditAgent`.

    Attributes:
        network: the hypernetwork.
        optimizer: Adam, with its moments.
        updates: the number of policy updates so far.
        timesteps: the number of environment steps so far.
        best_score: the best held-out score of the training; −inf before the first evaluation.
        progress: the progress of the latest training run.
        projections: module → the projection of its updates; empty if there is none, or it is not known yet.
    """

    name: ClassVar[str] = "rledit"  # the class's name in agent.json
    config_type: ClassVar[type[RLEditConfig]] = RLEditConfig
    network_type: ClassVar[type[Hypernetwork]] = Hypernetwork
    # Settings that the first file format lacks and whose defaults differ from that version's behaviour.
    first_format: ClassVar[Settings] = {"warm_up": False}

    def __init__(
        self,
        env: Environment | None = None,
        config: RLEditConfig | None = None,
        shapes: Mapping[str, tuple[int, int]] | None = None,
        seed: int = 0,
    ) -> None:
        self.env, self.config, self.seed = env, config or self.config_type(), seed
        self.presented = PresentedFacts(env)
        self.projections: dict[str, LowCurvature] = {}
        if shapes is None:
            if env is None:
                raise ValueError("give an environment or the edited modules' shapes")
            shapes = module_shapes(env)
        self.network = self.network_type(shapes, self.config.network, seed)
        if env is not None:  # on the LLM's device, so that no factor is copied through the host
            self.network.to(editing_env(env).lm.device)
            self.network.normalisers = self.network.first_normalisers()
        self.optimizer = self.make_optimizer()
        self.updates = 0
        self.timesteps = 0
        self.best_score = -math.inf
        self.progress = Progress()

    def make_optimizer(self) -> torch.optim.Optimizer:
        """A new Adam with the configuration's learning rates."""
        network, config = self.network, self.config
        return torch.optim.Adam(
            [
                {"params": list(network.networks.parameters()), "lr": config.learning_rate},
                {"params": [network.step_size_parameter, network.log_damping], "lr": config.step_size_learning_rate},
            ]
        )

    # -- acting --------------------------------------------------------------------------------------------------

    def set_env(self, env: Environment) -> None:
        require_modules(env, self.network.shapes, "this agent", f"make one for its modules: {type(self).__name__}(env)")
        if self.env is None or editing_env(env).lm is not editing_env(self.env).lm:
            self.network.forget_curvature()
            self.projections = {}
        super().set_env(env)
        self.presented = PresentedFacts(env)

    def reset(self) -> None:
        self.network.reset()

    def memory(self) -> dict[str, Tensor] | None:
        return self.network.memory_state()

    def load_memory(self, memory: Mapping[str, Tensor]) -> None:
        self.network.load_memory_state(memory)

    @torch.no_grad()
    def predict(self, observation: Observation, deterministic: bool = True) -> tuple[Action, None]:
        """Update factors for an observation in either array backend; the policy is deterministic."""
        if self.wants_curvature:
            self.take_curvature(progress_bar=False)
        record = self.observe(observation, adapt=False)
        return self.restrained(self.action(observation, record, *self.network.factors(record))), None

    def observe(self, observation: Observation, adapt: bool) -> StepRecord:
        """Show the network an observation; ``adapt``: whether it is a training batch (see `Hypernetwork.observe`)."""
        keys, gradients = used_rows(observation, self.network.device)
        if self.config.network.memory_weight != 1 and self.presented.for_the_first_time():
            self.network.key_memory.end_batch()
        return self.network.observe(keys, self.of_loss(gradients), adapt)

    def of_loss(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """δ (N, d_out) by module of the loss in `HypernetworkConfig.loss`, given δ of the batch's mean loss."""
        loss, rows = self.config.network.loss, len(next(iter(gradients.values())))
        if loss == "batch" or (loss == "rows" and self.network.training_moments):  # the network then multiplies by N
            return gradients
        if loss == "rows":
            return {m: rows * g for m, g in gradients.items()}
        facts = self.presented.facts(rows)
        answers = sum(fact.answers for fact in facts)
        if loss == "sum":
            return {m: answers * g for m, g in gradients.items()}
        factors = [answers / fact.answers for fact in facts for _ in range(fact.rows)]
        column = torch.tensor(factors, device=self.network.device)[:, None]  # (N, 1)
        return {m: column.to(g.dtype) * g for m, g in gradients.items()}

    def action(
        self, observation: Observation, record: StepRecord, keys: Mapping[str, Tensor], values: Mapping[str, Tensor]
    ) -> Action:
        """The environment's action for the step's factors, in the array backend of the observation."""
        return factor_action(observation, keys, values)

    # -- the curvature of text -----------------------------------------------------------------------------------

    @property
    def wants_curvature(self) -> bool:
        """Whether the agent uses the curvature of text, and it is not known yet."""
        return self.network.wants_curvature or (self.config.network.crisp_energy > 0 and not self.projections)

    def take_curvature(self, progress_bar: bool) -> None:
        """Compute the curvature of text in the environment's LLM, or read it from the cache.

        Raises:
            ValueError: there is no environment.
        """
        config = self.config.network
        if self.env is None:
            name = "output_curvature" if config.output_curvature else "crisp_energy"
            raise ValueError(f"{name} needs the environment's LLM; load the agent with env=…, or give it with "
                             "set_env(env)")
        lm = editing_env(self.env).lm
        if self.network.wants_curvature:
            turn_by_text(self.network, lm, progress_bar)
        if config.crisp_energy:
            curvature = text_curvature(lm, list(self.network.shapes), config.text, config.text_tokens, progress_bar)
            precision = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.precision]
            projections = low_curvature(curvature.by_module, config.crisp_energy)
            self.projections = {m: p.to(self.network.device, precision) for m, p in projections.items()}

    def restrain(self, energy: float) -> None:
        """Remove directions of high curvature from the updates from now on (`HypernetworkConfig.crisp_energy`).

        Raises:
            ValueError: the share is out of range.
        """
        network = replace(self.config.network, crisp_energy=energy)
        self.config, self.network.config, self.projections = replace(self.config, network=network), network, {}

    def restrained(self, action: Action) -> Action:
        """The action without the directions of high curvature (see `HypernetworkConfig.crisp_energy`)."""
        return restrained(action, self.projections) if self.projections else action

    def restrained_gradient(self, gradient: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The gradient with respect to an unrestrained ΔW, given that with respect to the restrained one, (d_out, d_in)
        by module. A projection is symmetric, so that both are restrained alike."""
        return projected(gradient, self.projections) if self.projections else gradient

    # -- files ---------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write the network, its normalisers and its memory as safetensors, and its configuration as JSON.

        Args:
            path: a folder, created if it does not exist.
            dtype: of the blocks' weights in the file; ``torch.bfloat16`` halves its size.
        """
        blocks = {f"network.{k}" for k, _ in self.network.named_parameters() if k.startswith("networks.")}
        tensors = {k: v.to(dtype) if k in blocks else v for k, v in self._saved_tensors().items()}
        stream = {f"stream.{k}": v for k, v in self.network.memory_state().items()}
        self.write(Path(path), tensors | stream)

    def write(self, folder: Path, tensors: Mapping[str, Tensor], presented_as_in: Environment | None = None) -> None:
        """Write an agent with these tensors and this agent's description into a folder.

        Args:
            folder: the folder.
            tensors: the tensors by name.
            presented_as_in: the environment that presents batches as the agent is to be used; None: its own.
        """
        agent_folder(folder)
        write_tensors(folder / "agent.safetensors", tensors)
        description = self.description()
        if presented_as_in is not None and description["environment"] is not None:
            description["environment"] |= presentation_settings(presented_as_in)
        write_text(folder / "agent.json", json.dumps(description, indent=1) + "\n")

    def description(self) -> JsonObject:
        """The content of ``agent.json``: the configuration, the counters and the training environment's settings."""
        return {
            "agent": self.name,
            "format": 1,
            "seed": self.seed,
            "config": asdict(self.config),
            "shapes": {m: list(s) for m, s in self.network.shapes.items()},
            "updates": self.updates,
            "timesteps": self.timesteps,
            "best_score": self.best_score if math.isfinite(self.best_score) else None,
            "metrics_version": METRICS_VERSION,
            "environment": environment_settings(self.env),
        }

    def _saved_tensors(self) -> dict[str, Tensor]:
        """The parameters, the prior and the moments that streams start from."""
        parameters = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        prior = {f"prior.{m}": v for m, v in self.network.key_memory.prior_state().items()}
        prior |= {f"lifetime.{k}": v.clone() for k, v in self.network.lifetime.items()}
        return parameters | prior | {f"moments.{k}": v for k, v in moments_state(self.network.training_moments).items()}

    def policy_state(self) -> dict[str, Tensor]:
        """Copies of the policy's tensors between two streams: the parameters, and moments that outlast a stream."""
        tensors = self._saved_tensors()
        if self.config.network.normaliser == "lifetime":
            tensors |= {f"stream.{k}": v for k, v in self.network.memory_state().items() if k[:11] == "normaliser."}
        return {k: v.detach().clone() for k, v in tensors.items()}

    def load_policy_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the tensors of :meth:`policy_state` or of a saved agent; without tensors of a stream, reset."""
        self.network.load_state_dict(under("network.", tensors))
        self.network.key_memory.load_prior_state(under("prior.", tensors))
        self.network.load_moments(under("moments.", tensors))
        if self.config.network.normaliser == "continued":
            self.network.load_lifetime(under("lifetime.", tensors))
        stream = under("stream.", tensors)
        if stream:
            self.network.load_memory_state(stream)
        else:
            self.network.reset()
