"""LocateAgent, the base class of ROME, MEMIT, PRUNE, RECT and AlphaEdit, and their common settings."""

from __future__ import annotations

import json
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from agents.base import Agent, Callback, NotApplicable
from agents.corpus import GENERATED
from agents.facts import facts_themselves
from agents.files import agent_folder
from agents.key_statistics import KeyStatistics, key_statistics
from agents.locate_then_edit.keys import write_contexts
from agents.locate_then_edit.least_squares import dense
from agents.locate_then_edit.modules import default_output_projections, output_projections
from agents.locate_then_edit.value_optimisation import Request, ValueConfig, Values, encode_request, optimise_values
from agents.settings import environment_settings
from rledit_env.files import write_tensors, write_text
from rledit_env.interface import Environment
from rledit_env.lm.editable import EditableLM
from rledit_env.nesting import environment_inside
from rledit_env.spaces import Action, Observation
from rledit_env.type_aliases import JsonObject

MEMORY = "memory.safetensors"
FORMAT = 2  # of agent.json
Self = TypeVar("Self", bound="LocateAgent")


@dataclass(frozen=True)
class LocateConfig:
    """The settings of all locate-then-edit methods.

    Attributes:
        value: settings of the value optimisation.
        contexts: number of texts that the LLM writes as contexts; each prompt is used alone and after each context.
            MEMIT, PRUNE, RECT and AlphaEdit are published with 5, ROME with 20.
        context_lengths: numbers of tokens of a context; the contexts are divided equally among them. Published: 10;
            ROME: 5 and 10.
        key: k*, the module's input at the subject's last token:

            - "balanced": half the key of the prompt alone, half the mean over the contexts, as in the published code
              of MEMIT, PRUNE, RECT and AlphaEdit.
            - "mean": the mean over the prompt alone and after each context, all with equal weight, as in ROME's paper.
              (In the first version it was every editor's key.)
            - "prompt": the key of the prompt alone. W k = v* holds for the prompt only if its own key is close to k*,
              so a single edit is most reliable with this choice.
            - "mixed": for ROME only, see `ROMEConfig`.
        corpus: the text for the second moments of keys: "generated", written by the LLM, or the path of a text file.
            (The published code reads 100,000 articles of Wikipedia.)
        corpus_tokens: number of the text's tokens.
        norm_anchor: NAS (Liu et al., "Norm Anchors Make Model Edits Last", arXiv 2602.02543v3): rescale every v* to the
            anchor, the mean of ``‖v*‖`` over some facts in the original model without the largest 5 %, each solved
            for its plain prompt alone. v* is m + δ, the output of the MLP's last projection. Compared with the code of
            SasyaTitech/NAS; of the paper only the abstract was at hand. Ours: the facts and their number, and the
            editor's own settings of the value optimisation, where the published anchor takes MEMIT's for every editor.
        anchor_facts: number of facts in that mean, the first ones of the environment's data set; published: 1,000
            drawn from CounterFact.
        anchor_outlier: a fact whose ``‖v*‖`` exceeds this many times the anchor is not edited (v* = m), as in the
            published code, which takes 2, and 5 with ROME. None: it is rescaled like any other (the earlier
            behaviour).

    Raises:
        ValueError: a value is out of range.
    """

    value: ValueConfig = field(default_factory=ValueConfig)
    contexts: int = 5
    context_lengths: tuple[int, ...] = (10,)
    key: Literal["balanced", "mean", "prompt", "mixed"] = "balanced"
    corpus: str = GENERATED
    corpus_tokens: int = 65_536
    norm_anchor: bool = False
    anchor_facts: int = 100
    anchor_outlier: float | None = 2.0

    KEYS: ClassVar[tuple[str, ...]] = ("balanced", "mean", "prompt")

    def __post_init__(self) -> None:
        object.__setattr__(self, "context_lengths", tuple(self.context_lengths))
        if self.key not in self.KEYS:
            raise ValueError(f"key is {self.key!r}; give {' or '.join(map(repr, self.KEYS))}")
        if self.contexts < 0:
            raise ValueError(f"contexts is {self.contexts}; give 0 or more")
        if self.contexts and not (self.context_lengths and min(self.context_lengths) > 0):
            raise ValueError(f"context_lengths is {self.context_lengths}; give numbers of tokens, such as (10,)")

        if self.anchor_facts < 1:
            raise ValueError(f"anchor_facts is {self.anchor_facts}; give 1 or more")
        if self.anchor_outlier is not None and not self.anchor_outlier > 0:
            raise ValueError(f"anchor_outlier is {self.anchor_outlier}; give a positive number, or None for no limit")

    @property
    def needs_statistics(self) -> bool:
        """Whether the method uses the second moments of the modules' inputs."""
        return True


class LocateAgent(Agent):
    """Base class of editors without training that optimise a value for each fact and then solve for the weights.

    They read the LLM (`env.unwrapped.lm`) and the facts (`env.unwrapped.current_batch()`) and change neither. Contexts,
    key statistics and NAS's norm are computed once, by :meth:`learn` or the first :meth:`predict`.

    Args:
        env: a `LifelongEditEnv` whose edited modules are the last projections of MLPs, such as
            ``model.layers.[4-8].mlp.down_proj`` or ``transformer.h.[3-8].mlp.c_proj``.
        config: the method's settings.
        seed: of the texts that the LLM writes.

    Raises:
        NotApplicable: no fact of the environment has a subject that occurs in its prompt (FEVER).
        ValueError: the edited modules are not such projections.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[LocateConfig]]
    config: LocateConfig

    def __init__(self, env: Environment, config: LocateConfig | None = None, seed: int = 0) -> None:
        inner = environment_inside(env, type(self).__name__, agent=True)
        self.config = self.config_class() if config is None else config
        self.env, self.inner, self.seed = env, inner, seed
        self.lm: EditableLM = inner.lm
        self.modules = output_projections(self.lm)
        if not any(r.subject_span for r in inner.dataset.records):
            raise NotApplicable(
                f"no fact of {inner.dataset.source} has a subject that occurs in its prompt, which {self.name} "
                "edits at; take facts with subjects (ZsRE, CounterFact)"
            )
        self.contexts: list[str] | None = None
        self.statistics: KeyStatistics | None = None
        self.anchor_norm: float | None = None
        self.one_off_seconds = 0.0  # time of the computations of :meth:`learn`
        self.key_moments: dict[str, Tensor] = {}

    @classmethod
    def default_modules(cls, lm: EditableLM) -> list[str]:
        """The modules to edit in an LLM without published ones; see :func:`default_output_projections`."""
        return default_output_projections(lm)

    def set_env(self, env: Environment) -> None:
        """Edit in this environment from now on. Contexts and statistics are kept, unless its LLM is another one.

        Raises:
            NotApplicable: none of its facts has a subject that occurs in its prompt.
            ValueError: it is not an environment of this package, or its edited modules are not projections as above;
                the agent is unchanged.
        """
        other = type(self)(env, self.config, self.seed)
        if other.lm is not self.lm:
            self.__dict__ |= vars(other)
        self.env, self.inner = env, other.inner

    def reset(self) -> None:
        self.key_moments = {}

    def memory(self) -> dict[str, Tensor]:
        """The second moments of the stream's keys so far, if the editor keeps them."""
        return dict(self.key_moments)

    def load_memory(self, memory: Mapping[str, Tensor]) -> None:
        """Load the tensors of :meth:`memory`."""
        self.key_moments = {name: tensor.to(self.lm.device) for name, tensor in memory.items()}

    # -- computed once ---------------------------------------------------------------------------------------------

    def learn(
        self: Self, total_timesteps: int = 0, callback: Callback | None = None, progress_bar: bool = True,
        reset_num_timesteps: bool = True,
    ) -> Self:  # fmt: skip
        """Compute contexts, key statistics and NAS's norm; nothing is trained, and no environment step is taken."""
        started = time.perf_counter()
        if self.contexts is None:
            self.contexts = write_contexts(self.lm, self.config.contexts, self.config.context_lengths, self.seed)
        if self.statistics is None and self.config.needs_statistics:
            before = time.perf_counter()
            self.statistics = key_statistics(
                self.lm, self.modules, self.config.corpus, self.config.corpus_tokens, progress=progress_bar
            )
            self.one_off_seconds += self.statistics.seconds  # counted even if an earlier run computed them
            started += time.perf_counter() - before
        if self.config.norm_anchor and self.anchor_norm is None:
            records = (r for r in self.inner.dataset.records if r.subject_span)
            anchors = islice(records, self.config.anchor_facts)
            requests = [encode_request(self.lm, r) for r in anchors]
            with self.lm.original_weights():
                solved = optimise_values(self.lm, self.modules[-1], requests, self.config.value).solved
            self.anchor_norm = trimmed_mean(solved.norm(dim=1))
        self.one_off_seconds += time.perf_counter() - started
        return self

    def second_moment(self, module: str) -> Tensor:
        """C of a module in float64, (d_in, d_in)."""
        assert self.statistics is not None
        return self.statistics.second_moments[module].double()

    # -- acting ----------------------------------------------------------------------------------------------------

    def predict(self, observation: Observation, deterministic: bool = True) -> tuple[Action, None]:
        """The update for the batch that the environment presents.

        Raises:
            NotApplicable: a fact of the batch has no subject that occurs in its prompt.
        """
        facts = facts_themselves(self.inner)
        self.learn(progress_bar=False)
        assert self.contexts is not None
        requests = [encode_request(self.lm, encoded.record, self.contexts) for encoded in facts]
        with torch.no_grad():
            values = optimise_values(self.lm, self.modules[-1], requests, self.config.value)
            if self.anchor_norm is not None:
                values = anchored(values, self.anchor_norm, self.config.anchor_outlier)
            keys, residuals = self.solve(requests, values)
            return self.action(observation, keys, residuals), None

    @abstractmethod
    def solve(self, requests: Sequence[Request], values: Values) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Update factors ũ (N, d_in) and ṽ (N, d_out) by module, ΔW = ṽᵀũ."""

    def action(self, observation: Observation, keys: dict[str, Tensor], values: dict[str, Tensor]) -> Action:
        """The update as factors if they have as many rows as the observation, else as dense updates."""
        rows = len(next(iter(keys.values())))
        if self.inner.array_backend == "torch" and len(observation["mask"]) == rows:
            return {"keys": keys, "values": values}
        return {"updates": dense(keys, values)}

    # -- files -----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the settings, contexts, NAS's norm and the stream's memory; key statistics stay in the cache."""
        folder = agent_folder(path)
        description = {
            "agent": self.name,
            "format": FORMAT,
            "seed": self.seed,
            "config": asdict(self.config),
            "contexts": self.contexts,
            "anchor_norm": self.anchor_norm,
            "statistics": None if self.statistics is None else self.statistics.source,
            "environment": environment_settings(self.env),
        }
        write_tensors(folder / MEMORY, self.memory())
        write_text(folder / "agent.json", json.dumps(description, indent=1) + "\n")

    @classmethod
    def load(cls: type[Self], path: str | Path, env: Environment | None = None) -> Self:
        """Load the agent from a folder that :meth:`save` wrote; agents in the first format keep that version's
        settings.

        Raises:
            FileNotFoundError: the folder contains no agent.
            ValueError: no environment was given, or it edits other modules; or a later version saved the agent.
        """
        folder = Path(path)
        if not (folder / "agent.json").exists():
            raise FileNotFoundError(f"{folder} holds no agent (no agent.json); give the folder that save() wrote")
        if env is None:
            raise ValueError(f"the agent in {folder} needs the LLM that it edits; give the environment: env=…")
        description = json.loads((folder / "agent.json").read_text(encoding="utf-8"))
        settings: JsonObject = description["config"]
        if description["format"] == 1:
            settings = cls.of_first_format(settings)
        elif description["format"] != FORMAT:
            raise ValueError(f"{folder} was saved by a later version of this package (format {description['format']}; "
                             f"known are 1 and {FORMAT}); install that version, or save the agent again with this one")
        settings = {"anchor_outlier": None, **settings}  # which agents of earlier versions lack
        config = cls.config_class(**{**settings, "value": ValueConfig(**settings["value"])})
        agent = cls(env, config, description["seed"])
        saved_modules = description["environment"]["edit_modules"]
        if saved_modules != agent.modules:
            raise ValueError(
                f"{folder} edits {', '.join(saved_modules)}, the environment {', '.join(agent.modules)}; make the "
                f"environment with the settings in {folder / 'agent.json'}"
            )
        agent.contexts, agent.anchor_norm = description["contexts"], description["anchor_norm"]
        agent.load_memory(load_file(folder / MEMORY))
        return agent

    @classmethod
    def of_first_format(cls, settings: JsonObject) -> JsonObject:
        """Convert a configuration of the first format. There, all editors had one length of contexts, an Adam step
        after each loss, and the KL of the token after the essence prompt."""
        converted = dict(settings)
        length, value = converted.pop("context_length"), dict(converted["value"])
        value |= {"steps": value["steps"] + 1, "kl": "essence"}
        return {**converted, "context_lengths": (length,), "value": value}


def rescaled(solved: Tensor, norm: float) -> Tensor:
    """Vectors (F, d) rescaled to one norm (NAS)."""
    length: Tensor = solved.norm(dim=1, keepdim=True)
    return solved * (norm / length)


def anchored(values: Values, norm: float, outlier: float | None) -> Values:
    """Values whose v* have this norm; δ = 0 for those of more than ``outlier`` times the norm (NAS)."""
    delta = rescaled(values.solved, norm) - values.initial
    if outlier is not None:
        left_out = values.solved.norm(dim=1, keepdim=True) > outlier * norm
        delta = torch.where(left_out, 0.0, delta)
    return replace(values, delta=delta)


def trimmed_mean(numbers: Tensor, dropped: float = 0.05) -> float:
    """The mean without the share ``dropped`` of the numbers that are largest, rounded down to a whole number of
    them."""
    kept = len(numbers) - int(dropped * len(numbers))
    return float(numbers.sort().values[:kept].mean())
