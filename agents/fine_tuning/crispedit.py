"""CrispEdit: fine-tuning along directions of low curvature (Ikram et al., ICML 2026)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from agents.base import Callback
from agents.corpus import GENERATED
from agents.curvature import (
    Curvature,
    LowCurvature,
    TextCurvature,
    answer_curvature,
    check_energy,
    low_curvature,
    projected,
    text_curvature,
)
from agents.files import read_description, under
from agents.fine_tuning.rounds import FactTuningAgent, Objective, check_rounds, fine_tune, later_format
from rledit_env.files import write_tensors
from rledit_env.interface import Environment, editing_env
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage
from rledit_env.lm.names import expand_globs

MEMORY = "memory.safetensors"
ADAM = ("exp_avg", "exp_avg_sq", "step")  # the names of Adam's moments and counter in PyTorch
Self = TypeVar("Self", bound="CrispEditAgent")


@dataclass(frozen=True)
class CrispEditConfig:
    """CrispEdit's settings; the defaults are those of the published code, whose files are for models of 7 and 8 billion
    parameters.

    Attributes:
        module: name or glob of the edited modules to fine-tune; None takes all of them.
        steps: the largest number of rounds over the batch (``num_steps``).
        learning_rate: Adam's (``lr``). There is no weight decay, as published.
        loss_goal: a step is skipped if its loss is below this, and the rounds end once their mean loss is.
        objective: as in `FTLConfig`. Published: "pooled", the mean over the target tokens of a step's facts.
        batch_size: facts in an Adam step; None takes all facts at once.
        energy: γ, the share of the curvature's trace that the removed directions have (``energy_threshold``). The
            published command line has 0.9, the published examples 0.5 to 0.8.
        projects: what is projected: "gradient", as published: Adam's moments are of the projected gradient, but Adam
            divides entry by entry, after which a step is no longer within the directions of low curvature; or "step",
            ours: the change itself is projected, too, after every step.
        edit_weight: how many tokens of text a token of an edited fact counts as, in the means of A and G that later
            batches are projected with. Published: 1 (``edit_cache_style: sequential``); 0 leaves earlier facts out
            (``disable``).
        carry_moments: whether Adam goes on with its moments from batch to batch, as published; False starts each batch
            anew.
        corpus: the text for the curvature: "generated", written by the LLM, or the path of a text file. (Published: the
            first 512 tokens of 100 to 10,000 articles of Wikipedia.)
        corpus_tokens: number of tokens for A; G is from a quarter of them.

    Raises:
        ValueError: a value is out of range.
    """

    module: str | None = None
    steps: int = 25
    learning_rate: float = 5e-4
    loss_goal: float = 1e-2
    objective: Objective = "pooled"
    batch_size: int | None = 32
    energy: float = 0.9
    projects: Literal["gradient", "step"] = "gradient"
    edit_weight: float = 1.0
    carry_moments: bool = True
    corpus: str = GENERATED
    corpus_tokens: int = 65_536

    def __post_init__(self) -> None:
        check_rounds(self)
        check_energy("energy", self.energy)
        if self.projects not in ("gradient", "step"):
            raise ValueError(f"projects is {self.projects!r}; give 'gradient' or 'step'")
        if not 0 <= self.edit_weight < float("inf"):
            raise ValueError(f"edit_weight is {self.edit_weight}; give 0 (earlier facts are left out) or more")
        if type(self.corpus_tokens) is not int or self.corpus_tokens < 64:
            raise ValueError(f"corpus_tokens is {self.corpus_tokens!r}; give a whole number from 64")


@dataclass
class Stream:
    """What the agent keeps of a stream.

    Attributes:
        edited: module → the curvature of all facts so far.
        tokens: the number of their answer tokens.
        adam: module → Adam's moments and counter, by their names in PyTorch.
    """

    edited: dict[str, Curvature] = field(default_factory=dict)
    tokens: int = 0
    adam: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def add(self, facts: Mapping[str, Curvature], tokens: int) -> None:
        """Add a batch's facts with this number of answer tokens."""
        self.tokens += tokens
        share = tokens / self.tokens
        self.edited = {m: self.edited[m].mixed(new, share) if self.edited else new for m, new in facts.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Everything as named tensors, for :meth:`of`."""
        if not self.tokens and not self.adam:
            return {}
        tensors = {"tokens": torch.tensor(self.tokens)}
        for m, curvature in self.edited.items():
            tensors |= {f"inputs.{m}": curvature.inputs, f"outputs.{m}": curvature.outputs}
        return tensors | {f"{name}.{m}": t.clone() for m, state in self.adam.items() for name, t in state.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], device: torch.device) -> Stream:
        """The stream with these tensors."""
        if not tensors:
            return cls()
        inputs, outputs, *adam = (
            {m: t.to(device) for m, t in under(f"{name}.", tensors).items()} for name in ("inputs", "outputs", *ADAM)
        )
        edited = {m: Curvature(a, outputs[m]) for m, a in inputs.items()}
        states = {m: {name: part[m] for name, part in zip(ADAM, adam, strict=True)} for m in adam[0]}
        return cls(edited, int(tensors["tokens"]), states)


class CrispEditAgent(FactTuningAgent):
    """CrispEdit (Ikram, Firouzkouhi, Tu, Soltanolkotabi and Rashidinejad, "CrispEdit: Low-Curvature Projections for
    Scalable Non-Destructive LLM Editing", ICML 2026, arXiv 2602.15823), compared with the code of zarifikram/CrispEdit.

    It minimises the facts' loss L while the capability loss, here of ordinary text, may not rise. To second order the
    rise by ΔW is ½ vec(ΔW)ᵀ H vec(ΔW), with H the Gauss–Newton Hessian, which K-FAC approximates for each weight by
    A ⊗ G (`agents.curvature`). With A = V diag(λ_A) Vᵀ and G = U diag(λ_G) Uᵀ, the directions of highest curvature
    λ_G,i λ_A,j that together have the share γ of the sum are removed from each gradient,

        P(∂L/∂W) = U (Uᵀ (∂L/∂W) V ⊙ M) Vᵀ,   M_ij = 1 if λ_G,i λ_A,j is below that of the removed directions, else 0,

    without a matrix of d_in d_out rows. Adam steps along it, in rounds over the batch's facts.

    With one batch this is the published batch variant; with several the sequential one: after each batch the curvature
    of its facts at the edited weights, at the positions that predict answer tokens, is added to the means A and G, each
    token with the same weight; Adam goes on with its moments, of which the first is projected anew.

    As published: the loss, Adam and its numbers, the stopping rule, the projection of the gradient, the threshold, and
    the sequential means with ``edit_cache_style: sequential``. Ours:

    - The text is the LLM's own unless a file is given. Its next tokens are drawn from the LLM, so that G is of the
      Gauss–Newton Hessian; with Wikipedia's tokens, as published, it is of the empirical Fisher matrix. A is from
      65,536 tokens, G from a quarter of them.
    - Facts are in the stream's order in every round; the published batch variant shuffles them in each.
    - Not here: the published default ``edit_cache_style: mix``, which computes A and G of text and earlier facts again
      after every batch, and ``recalculate_cache`` (off by default), which does so once a weight has changed by 25 %.
    - ``projects="step"`` projects the change itself. Adam divides each entry by its own root mean square, which does
      not commute with the rotation into the eigenvectors, so a published step has a part along removed directions.

    Args:
        env: the environment that it edits in.
        config: the settings.
        seed: unused, since nothing is random.
    """

    name: ClassVar[str] = "crispedit"
    FORMAT = 1
    config_class: ClassVar[type[CrispEditConfig]] = CrispEditConfig
    config: CrispEditConfig

    def __init__(self, env: Environment | None, config: CrispEditConfig | None = None, seed: int = 0) -> None:
        super().__init__(env, config, seed)
        self.text: TextCurvature | None = None
        self.projections: dict[str, LowCurvature] | None = None
        self.stream = Stream()

    @property
    def one_off_seconds(self) -> float:
        """Time of the text and of its curvature, even if an earlier run computed them."""
        return self.text.seconds if self.text is not None else 0.0

    def set_env(self, env: Environment) -> None:
        former = self.env
        super().set_env(env)
        if former is None or editing_env(env).lm is not editing_env(former).lm:
            self.text, self.projections = None, None

    def reset(self) -> None:
        self.stream, self.projections = Stream(), None

    def memory(self) -> dict[str, Tensor]:
        """The curvature of the stream's facts so far, and Adam's moments."""
        return self.stream.tensors()

    def load_memory(self, memory: Mapping[str, Tensor]) -> None:
        """Load the tensors of :meth:`memory`."""
        device = editing_env(self.env).lm.device if self.env is not None else torch.device("cpu")
        self.stream, self.projections = Stream.of(memory, device), None

    def learn(
        self: Self, total_timesteps: int = 0, callback: Callback | None = None, progress_bar: bool = True,
        reset_num_timesteps: bool = True,
    ) -> Self:  # fmt: skip
        """Compute the curvature of text, or read it from the cache; nothing is trained, and no step is taken."""
        if self.text is None:
            if self.env is None:
                raise ValueError("the curvature of text needs the environment's LLM; load the agent with env=…")
            lm, config = editing_env(self.env).lm, self.config
            self.text = text_curvature(lm, self._modules(lm), config.corpus, config.corpus_tokens, progress_bar)
        return self

    def _modules(self, lm: EditableLM) -> list[str]:
        names = list(lm.module_shapes)
        return names if self.config.module is None else expand_globs([self.config.module], names)

    def fine_tuned(self, lm: EditableLM, passages: Sequence[Passage]) -> dict[str, Tensor]:
        self.learn(progress_bar=False)
        config, stream, projections = self.config, self.stream, self._projections()
        changes = {m: torch.zeros_like(lm.weight(m)) for m in projections}
        optimizer = torch.optim.Adam(list(changes.values()), lr=config.learning_rate)
        for m, state in stream.adam.items():
            moments = {name: t.clone() for name, t in state.items()}  # Adam writes to them
            optimizer.state[changes[m]] = {**moments, "exp_avg": projections[m].project(moments["exp_avg"])}

        def step(gradients: Mapping[str, Tensor]) -> None:
            for m, gradient in projected(gradients, projections).items():
                changes[m].grad = gradient
            optimizer.step()
            if config.projects == "step":
                for m, change in projected(changes, projections).items():
                    changes[m].copy_(change)

        def add_facts() -> None:
            if config.edit_weight and passages:
                tokens = sum(len(p.targets) for p in passages)
                stream.add(answer_curvature(lm, passages, list(changes)), tokens)
                self.projections = None

        fine_tune(lm, passages, config, changes, step, add_facts)
        if config.carry_moments:
            stream.adam = {m: dict(optimizer.state[c]) for m, c in changes.items() if c in optimizer.state}
        return changes

    def _projections(self) -> dict[str, LowCurvature]:
        """The projection of each module for the next batch."""
        if self.projections is None:
            assert self.text is not None
            curvature, facts = self.text.by_module, self.config.edit_weight * self.stream.tokens
            if facts:
                share = facts / (facts + self.text.tokens)
                curvature = {m: c.mixed(self.stream.edited[m], share) for m, c in curvature.items()}
            self.projections = low_curvature(curvature, self.config.energy)
        return self.projections

    def save(self, path: str | Path) -> None:
        """Write the settings as JSON and the stream's memory as safetensors; the curvature of text is in the cache."""
        super().save(path)
        write_tensors(Path(path) / MEMORY, self.memory())

    @classmethod
    def load(cls: type[Self], path: str | Path, env: Environment | None = None) -> Self:
        """Load the agent from a folder that :meth:`save` wrote.

        Raises:
            FileNotFoundError: the folder contains no agent.
            ValueError: a later version saved the agent.
        """
        description = read_description(path)
        if description["format"] != cls.FORMAT:
            raise later_format(path, description["format"], f"known is {cls.FORMAT}")
        agent = cls(env, cls.config_class(**description["config"]), description["seed"])
        agent.load_memory(load_file(Path(path) / MEMORY))
        return agent
