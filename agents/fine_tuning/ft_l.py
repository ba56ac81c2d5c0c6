"""FT-L and FT-M: fine-tuning of one weight, each entry by at most ε (Zhu et al., 2021; Zhang et al., 2024)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from agents.base import Agent, Callback
from agents.facts import facts_themselves
from agents.files import agent_folder
from agents.settings import environment_settings
from rledit_env.files import write_text
from rledit_env.interface import Environment, editing_env
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage
from rledit_env.lm.losses import negative_log_likelihood
from rledit_env.lm.names import expand_globs
from rledit_env.nesting import environment_inside
from rledit_env.spaces import Action, Observation

FORMAT = 2  # of agent.json
OBJECTIVES = ("prompt_last", "target_new", "pooled")
Self = TypeVar("Self", bound="FTLAgent")


@dataclass(frozen=True)
class FTLConfig:
    """FT-L's settings; the defaults are those published for GPT-2 XL with ROME (Meng et al., NeurIPS 2022).

    Attributes:
        module: name or glob of the edited modules to fine-tune; None takes the environment's last one.
        objective: the loss of a fact with target tokens y₁ … y_T after the prompt x, by the published names:

            - "prompt_last", FT-L's: −mean_t log p(y_t | x). Every target token is predicted from the prompt's last
              position, as if it were the first.
            - "target_new", FT-M's: −mean_t log p(y_t | x, y_<t), teacher-forced.
            - "pooled", ours, the loss of earlier versions: as "target_new", but with the mean over the target tokens of
              all facts together, so that a fact with a longer target has a larger weight.
        steps: the largest number of rounds over the batch.
        learning_rate: Adam's. There is no weight decay, as published.
        epsilon: ε, the largest change of an entry of W (L∞). Published: 5e-4 for GPT-2 XL, 5e-5 for GPT-J and
            Mistral-7B; ``math.inf`` is no limit, as published for Llama-3.
        around: the weight that ε is measured from: "current", at the batch's start, as in ROME's FT+L and its
            successors, or "original", W₀, as in Zhu et al.'s single round of fine-tuning; the whole stream then shares
            one ε.
        loss_goal: a step is skipped if its loss is below this, and the rounds end once their mean loss is.
        batch_size: facts in an Adam step; a round over more facts takes several steps, in order. ROME's code has 64,
            EasyEdit's files 1 for most models. None takes all facts at once.

    Raises:
        ValueError: a value is out of range.
    """

    module: str | None = None
    steps: int = 25
    learning_rate: float = 5e-4
    epsilon: float = 5e-4
    around: Literal["current", "original"] = "current"
    loss_goal: float = 1e-2
    objective: Literal["prompt_last", "target_new", "pooled"] = "prompt_last"
    batch_size: int | None = 64

    def __post_init__(self) -> None:
        if self.around not in ("current", "original"):
            raise ValueError(f"around is {self.around!r}; give 'current' or 'original'")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective is {self.objective!r}; give {' or '.join(map(repr, OBJECTIVES))}")
        for name in ("learning_rate", "epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give a positive number")
        if self.steps < 0:
            raise ValueError(f"steps is {self.steps}; give 0 or more")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; give 1 or more, or None for all facts at once")


@dataclass(frozen=True)
class FTMConfig(FTLConfig):
    """FT-M's settings: those of FT-L with the teacher-forced loss."""

    objective: Literal["prompt_last", "target_new", "pooled"] = "target_new"


class FTLAgent(Agent):
    """FT-L (Zhu et al., "Modifying Memories in Transformer Models", arXiv 2012.00363), as in ROME's code.

    It minimises the mean of the facts' losses L (`FTLConfig.objective`) over one weight of one layer's feed-forward
    block, subject to ‖W − W′‖_∞ ≤ ε: Adam steps, each followed by the projection W ← clamp(W, W′ − ε, W′ + ε). W′ is
    the weight at the batch's start (or W₀, see `FTLConfig.around`). FT-L predicts all target tokens from the prompt's
    last position, so it cannot learn a target of several tokens as a sequence. FT-M (`FTMAgent`) is teacher-forced.

    As published: the loss, the mean per fact, Adam and its numbers, the projection after every step, and the stopping
    rule. Ours: tokens that the published code adds to a target by accident are left out (the beginning-of-text token of
    Llama's tokenizer, and padding if the tokenizer has no unknown token).

    The agent reads the LLM and the batch's facts from the environment, and leaves the LLM unchanged, bit for bit; its
    action is the dense update.

    Args:
        env: the environment that it edits in.
        config: the settings.
        seed: unused, since nothing is random.
    """

    name: ClassVar[str] = "ft-l"
    config_class: ClassVar[type[FTLConfig]] = FTLConfig

    def __init__(self, env: Environment | None, config: FTLConfig | None = None, seed: int = 0) -> None:
        if env is not None:
            environment_inside(env, type(self).__name__, agent=True)
        self.env, self.config, self.seed = env, config or self.config_class(), seed

    def memory(self) -> dict[str, Tensor]:
        return {}

    def predict(self, observation: Observation, deterministic: bool = True) -> tuple[Action, None]:
        """{"updates": module → ΔW (d_out, d_in)} for the environment's current batch.

        Raises:
            ValueError: the agent has no environment, or the environment does not edit ``config.module``.
        """
        if self.env is None:
            raise ValueError("this agent fine-tunes the environment's LLM; load it with env=…")
        inner = editing_env(self.env)
        passages = [record.edit for record in facts_themselves(inner)]
        numpy = inner.array_backend == "numpy"
        updates = constrained_fine_tuning(inner.lm, passages, self._modules(inner.lm), self.config)
        return {"updates": {m: u.cpu().numpy() if numpy else u for m, u in updates.items()}}, None

    def _modules(self, lm: EditableLM) -> list[str]:
        names = list(lm.module_shapes)
        return names[-1:] if self.config.module is None else expand_globs([self.config.module], names)

    def learn(
        self: Self, total_timesteps: int = 0, callback: Callback | None = None, progress_bar: bool = True,
        reset_num_timesteps: bool = True,
    ) -> Self:  # fmt: skip
        """Do nothing; there is nothing to train."""
        return self

    def save(self, path: str | Path) -> None:
        """Write the settings as JSON."""
        folder = agent_folder(path)
        description = {
            "agent": self.name, "format": FORMAT, "seed": self.seed, "config": asdict(self.config),
            "environment": environment_settings(self.env),
        }  # fmt: skip
        write_text(folder / "agent.json", json.dumps(description, indent=1) + "\n")

    @classmethod
    def load(cls: type[Self], path: str | Path, env: Environment | None = None) -> Self:
        """Load the agent from a folder that :meth:`save` wrote; an agent in the first format keeps its pooled loss.

        Raises:
            FileNotFoundError: the folder contains no agent.
            ValueError: a later version saved the agent.
        """
        folder = Path(path)
        if not (folder / "agent.json").exists():
            raise FileNotFoundError(f"{folder} holds no agent (no agent.json); give the folder that save() wrote")
        description = json.loads((folder / "agent.json").read_text(encoding="utf-8"))
        settings = description["config"]
        if description["format"] == 1:
            settings = {**settings, "objective": "pooled", "batch_size": None}
        elif description["format"] != FORMAT:
            raise ValueError(f"{folder} was saved by a later version of this package (format {description['format']}; "
                             f"known are 1 and {FORMAT}); install that version, or save the agent again with this one")
        return cls(env, cls.config_class(**settings), description["seed"])


class FTMAgent(FTLAgent):
    """FT-M (Zhang et al., "A Comprehensive Study of Knowledge Editing for Large Language Models", arXiv 2401.01286):
    FT-L with the teacher-forced loss of the target's tokens, EasyEdit's ``objective_optimization: target_new``.

    Args:
        env, config, seed: see `FTLAgent`.
    """

    name = "ft-m"
    config_class = FTMConfig


def constrained_fine_tuning(
    lm: EditableLM, passages: Sequence[Passage], modules: Sequence[str], config: FTLConfig
) -> dict[str, Tensor]:
    """The total ΔW (d_out, d_in) of the fine-tuning, by module; the LLM's weights are restored, bit for bit.

    Args:
        lm: the LLM.
        passages: the prompts and targets of the batch; if empty, ΔW is zero.
        modules: names of the edited modules to fine-tune.
        config: the settings.
    """
    start = lm.snapshot()
    changes = {m: torch.zeros_like(start[m]) for m in modules}
    centre = {m: lm.original_weight(m) - start[m] if config.around == "original" else 0.0 for m in modules}  # W′ − W
    optimizer = torch.optim.Adam(list(changes.values()), lr=config.learning_rate)
    size = config.batch_size or max(len(passages), 1)
    parts = [passages[first : first + size] for first in range(0, len(passages), size)]
    try:
        for _ in range(config.steps if passages else 0):
            total = 0.0
            for part in parts:
                loss, gradients = _loss_and_gradients(lm, part, modules, config.objective)
                total += loss * len(part) / len(passages)
                if not loss >= config.loss_goal:  # the goal is reached, or the LLM broke (NaN)
                    continue
                for m, change in changes.items():
                    change.grad = gradients[m]
                optimizer.step()
                for m, change in changes.items():
                    change.copy_((change - centre[m]).clamp_(-config.epsilon, config.epsilon).add_(centre[m]))
                lm.restore({**start, **{m: start[m] + change for m, change in changes.items()}})
            if not total >= config.loss_goal:
                break
    finally:
        lm.restore(start)
    return changes


def _loss_and_gradients(
    lm: EditableLM, passages: Sequence[Passage], modules: Sequence[str], objective: str
) -> tuple[float, dict[str, Tensor]]:
    """The loss of these facts (see `FTLConfig.objective`) and its gradient by module (d_out, d_in), in the weights'
    precision."""
    counts = [len(p.targets) for p in passages]
    if objective == "pooled":
        shares = [1 / sum(counts)] * len(passages)
    else:
        shares = [1 / (count * len(passages)) for count in counts]
    run = [prompt_of(p) for p in passages] if objective == "prompt_last" else list(passages)
    total = 0.0
    with lm.collecting() as (sums,):
        for chunk, states in lm.answer_chunks(run):
            hidden, lengths = states.hidden, torch.tensor([counts[i] for i in chunk], device=lm.device)
            if objective == "prompt_last":  # one state a fact, for all of its target tokens
                hidden = hidden.repeat_interleave(lengths, dim=0)
            targets = torch.tensor([t for i in chunk for t in passages[i].targets], device=lm.device)
            nll = negative_log_likelihood(lm.forward, hidden, targets)
            share = torch.tensor([shares[i] for i in chunk], device=lm.device, dtype=nll.dtype)
            loss = nll @ share.repeat_interleave(lengths)
            loss.backward()
            total += float(loss.detach())
    return total, {m: sums[m] for m in modules}


def prompt_of(passage: Passage) -> Passage:
    """The passage's prompt alone; its last position predicts the first target token."""
    end = passage.positions[0] + 1
    return Passage(passage.input_ids[:end], passage.targets[:1], passage.subject_position)
