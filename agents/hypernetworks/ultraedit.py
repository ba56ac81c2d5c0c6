"""UltraEdit: lifelong normalisation and ridge least squares, without any training (Gu et al., 2025)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

import torch
from safetensors.torch import load_file

from agents.base import Agent, Callback, factor_action, module_shapes, require_modules, used_rows
from agents.corpus import GENERATED
from agents.files import agent_folder, under
from agents.rledit.config import FLOAT32_EPSILON, HypernetworkConfig
from agents.rledit.hypernetwork import Hypernetwork
from agents.rledit.moments import Moments, training_moments
from agents.rledit.normaliser import moments_state
from agents.rledit.text_prior import start_from_text, turn_by_text
from agents.settings import environment_settings
from rledit_env.files import write_tensors, write_text
from rledit_env.interface import Environment, editing_env
from rledit_env.lm.editable import EditableLM
from rledit_env.spaces import Action, Observation
from rledit_env.type_aliases import Settings

Self = TypeVar("Self", bound="UltraEditAgent")
# Settings of agents in the first format, whose files lack them.
FIRST_FORMAT: Settings = {
    "normaliser_scope": "module", "normaliser_variance": "exact", "normaliser_epsilon": 1e-8,
}  # fmt: skip


@dataclass(frozen=True)
class UltraEditConfig:
    """UltraEdit's settings; the defaults are the paper's for models of 7B parameters and more.

    Attributes:
        step_size: η. It depends on the model's size: a smaller model needs a larger step (see `agents/configs`).
        damping: λ of the ridge.
        recursion: whether the system contains the second moment of all earlier keys, S_t = λI + Σ_{j≤t} u_jᵀ u_j
            (SimIE, ICML 2025; RLSEdit, arXiv 2601.15686). Each update is then the recursive least-squares step of
            argmin_W Σ_j ‖(W − W_{j−1}) u_jᵀ − v_jᵀ‖² + λ ‖W − W₀‖², which avoids the directions of earlier edits and is
            anchored at the original weights.
        warm_up: start the running moments from those of bundled training facts, which :meth:`UltraEditAgent.learn`
            gathers, so that single facts and first batches are edited as well as later ones. The paper's start empty.
        text_prior: c of a prior of text, S = λI + c·C + …, which keeps updates out of the directions of text's keys
            (see `HypernetworkConfig.prior`); the paper has none.
        output_curvature: γ, as in `HypernetworkConfig`; the paper has none.
        text, text_tokens: the text and its number of tokens, as in `HypernetworkConfig`.
        normaliser_scope, normaliser_variance, normaliser_epsilon: as in `HypernetworkConfig`; the defaults are the
            published code's: one set of moments for all modules of a shape.
    """

    step_size: float = 1e-6
    damping: float = 1.0
    recursion: bool = False
    warm_up: bool = False
    text_prior: float = 0.0
    output_curvature: float = 0.0
    text: str = GENERATED
    text_tokens: int = 65_536
    normaliser_scope: Literal["module", "shape", "shape in turn"] = "shape"
    normaliser_variance: Literal["exact", "published"] = "published"
    normaliser_epsilon: float = FLOAT32_EPSILON

    def network(self) -> HypernetworkConfig:
        """The rule as a hypernetwork without blocks."""
        return HypernetworkConfig(
            blocks=0, aggregation="recursive" if self.recursion else "least_squares", step_size=self.step_size,
            damping=self.damping, learn_damping=False, coefficient="normalised", prior=self.text_prior,
            prior_source="text", output_curvature=self.output_curvature, text=self.text,
            text_tokens=self.text_tokens, normaliser="stream",
            warm_up=self.warm_up, normaliser_scope=self.normaliser_scope,
            normaliser_variance=self.normaliser_variance, normaliser_epsilon=self.normaliser_epsilon,
        )  # fmt: skip


class UltraEditAgent(Agent):
    """UltraEdit (Gu et al., "UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing in Language Models",
    arXiv 2505.14679).

    For each module and token, [û; δ̂] = ([u; δ] − mean) / std with running moments over all tokens since the start of
    the stream, this batch included (lifelong normalisation); vᵢ = −η ‖ûᵢ‖² δ̂ᵢ; and
    ΔW = argmin ‖ΔW uᵀ − vᵀ‖² + λ ‖ΔW‖² = vᵀ u (uᵀu + λI)⁻¹, with λ = 1 and η = 1e-6 in the paper. Without ``warm_up``,
    the normalisation leaves nothing of a stream's first batch if that is a single token and no other module has the
    module's shape.

    As in the published code, modules of one shape share the running moments, and the rows of all are added before any
    is normalised; the running variance adds N times a batch's unbiased variance. ``normaliser_scope="module"`` and
    ``normaliser_variance="exact"`` are ours: each module's own moments, and the variance of all rows.

    Args:
        env: the environment that it edits in; None only for a loaded agent, with ``shapes``.
        config: the settings.
        seed: unused, since nothing is random.
        shapes: module → (d_in, d_out), if there is no ``env``.
    """

    name: ClassVar[str] = "ultraedit"
    config_class: ClassVar[type[UltraEditConfig]] = UltraEditConfig
    first_format: ClassVar[Settings] = FIRST_FORMAT

    def __init__(
        self,
        env: Environment | None,
        config: UltraEditConfig | None = None,
        seed: int = 0,
        shapes: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        self.env, self.config, self.seed = env, config or self.config_class(), seed
        if shapes is None:
            if env is None:
                raise ValueError("give an environment or the edited modules' shapes")
            shapes = module_shapes(env)
        self.network = Hypernetwork(shapes, self.config.network())
        if env is not None:
            self.network.to(editing_env(env).lm.device)
        self.network.reset()

    def set_env(self, env: Environment) -> None:
        require_modules(env, self.network.shapes, "this agent", f"make one for its modules: {type(self).__name__}(env)")
        if self.env is None or editing_env(env).lm is not editing_env(self.env).lm:
            self.network.forget_curvature()
        super().set_env(env)

    def reset(self) -> None:
        self.network.reset()

    def memory(self) -> dict[str, torch.Tensor]:
        return self.network.memory_state()

    def load_memory(self, memory: Mapping[str, torch.Tensor]) -> None:
        self.network.load_memory_state(memory)

    @torch.no_grad()
    def predict(self, observation: Observation, deterministic: bool = True) -> tuple[Action, None]:
        """Update factors for an observation in either array backend."""
        if self.network.wants_prior or self.network.wants_curvature or self.network.wants_moments:
            self.learn(0, progress_bar=False)
        record = self.network.observe(*used_rows(observation, self.network.device))
        return factor_action(observation, *self.network.factors(record)), None

    def learn(
        self: Self, total_timesteps: int = 0, callback: Callback | None = None, progress_bar: bool = True,
        reset_num_timesteps: bool = True,
    ) -> Self:  # fmt: skip
        """Gather the moments of training facts (with ``warm_up``) and of text (with ``text_prior`` and
        ``output_curvature``); nothing is trained.

        Raises:
            ValueError: there are moments to gather, but no environment.
        """
        network = self.network
        missing = {"text_prior": network.wants_prior, "output_curvature": network.wants_curvature,
                   "warm_up": network.wants_moments}  # fmt: skip
        if not any(missing.values()):
            return self
        if self.env is None:
            name = next(name for name, is_missing in missing.items() if is_missing)
            raise ValueError(f"{name} needs the environment's LLM; make the agent with env=…")
        inner, memory = editing_env(self.env), network.memory_state()
        if network.wants_prior:
            start_from_text(network, inner.lm, progress_bar)
            network.reset()
        if network.wants_curvature:
            turn_by_text(network, inner.lm, progress_bar)
        if network.wants_moments:
            network.start_from(self.warm_moments(inner.lm, inner.token))
            if any(float(v) for k, v in memory.items() if k.endswith(".count")):  # a stream that was loaded goes on
                network.load_memory_state(memory)
        return self

    def warm_moments(self, lm: EditableLM, token: str) -> Moments:
        """The moments of training facts that ``warm_up`` starts from."""
        return training_moments(lm, token)

    def save(self, path: str | Path) -> None:
        """Write the settings as JSON; the stream's moments and memory, and the moments of training facts and of text,
        as safetensors."""
        folder = agent_folder(path)
        start = {f"moments.{k}": v for k, v in moments_state(self.network.training_moments).items()}
        start |= {f"prior.{m}": v for m, v in self.network.key_memory.prior_state().items()}
        write_tensors(folder / "agent.safetensors", self.network.memory_state() | start)
        description = {
            "agent": self.name,
            "format": 1,
            "seed": self.seed,
            "config": asdict(self.config),
            "shapes": {m: list(s) for m, s in self.network.shapes.items()},
            "environment": environment_settings(self.env),
        }
        write_text(folder / "agent.json", json.dumps(description, indent=1) + "\n")

    @classmethod
    def load(cls: type[Self], path: str | Path, env: Environment | None = None) -> Self:
        """Load the agent from a folder that :meth:`save` wrote.

        Raises:
            FileNotFoundError: the folder contains no agent.
            ValueError: the agent was made for other modules than the environment's.
        """
        folder = Path(path)
        if not (folder / "agent.json").exists():
            raise FileNotFoundError(f"{folder} holds no agent (no agent.json); give the folder that save() wrote")
        description = json.loads((folder / "agent.json").read_text(encoding="utf-8"))
        shapes = {m: (s[0], s[1]) for m, s in description["shapes"].items()}
        if env is not None:
            require_modules(env, shapes, str(folder), f"make it with the settings in {folder / 'agent.json'}")
        config = cls.config_class(**cls.first_format | description["config"])
        agent = cls(env, config, description["seed"], shapes)
        tensors = load_file(folder / "agent.safetensors")
        agent.network.load_moments(under("moments.", tensors))
        agent.network.key_memory.load_prior_state(under("prior.", tensors))
        agent.network.load_memory_state(tensors)
        return agent
