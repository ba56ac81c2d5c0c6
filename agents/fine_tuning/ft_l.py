"""FT-L and FT-M: fine-tuning of one weight, each entry by at most ε (Zhu et al., 2021; Zhang et al., 2024)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from agents.fine_tuning.rounds import FactTuningAgent, Objective, check_rounds, fine_tune, later_format
from rledit_env.interface import Environment
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage
from rledit_env.lm.names import expand_globs

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
    objective: Objective = "prompt_last"
    batch_size: int | None = 64

    def __post_init__(self) -> None:
        if self.around not in ("current", "original"):
            raise ValueError(f"around is {self.around!r}; give 'current' or 'original'")
        if not self.epsilon > 0:
            raise ValueError(f"epsilon is {self.epsilon}; give a positive number")
        check_rounds(self)


@dataclass(frozen=True)
class FTMConfig(FTLConfig):
    """FT-M's settings: those of FT-L with the teacher-forced loss."""

    objective: Objective = "target_new"


class FTLAgent(FactTuningAgent):
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
    FORMAT = 2
    config_class: ClassVar[type[FTLConfig]] = FTLConfig
    config: FTLConfig

    def memory(self) -> dict[str, Tensor]:
        return {}

    def fine_tuned(self, lm: EditableLM, passages: Sequence[Passage]) -> dict[str, Tensor]:
        names = list(lm.module_shapes)
        modules = names[-1:] if self.config.module is None else expand_globs([self.config.module], names)
        return constrained_fine_tuning(lm, passages, modules, self.config)

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
        elif description["format"] != cls.FORMAT:
            raise later_format(folder, description["format"], f"known are 1 and {cls.FORMAT}")
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
    start = {m: lm.weight(m).clone() for m in modules}
    changes = {m: torch.zeros_like(weight) for m, weight in start.items()}
    centre = {m: lm.original_weight(m) - start[m] if config.around == "original" else 0.0 for m in modules}  # W′ − W
    optimizer = torch.optim.Adam(list(changes.values()), lr=config.learning_rate)

    def step(gradients: Mapping[str, Tensor]) -> None:
        for m, change in changes.items():
            change.grad = gradients[m]
        optimizer.step()
        for m, change in changes.items():
            change.copy_((change - centre[m]).clamp_(-config.epsilon, config.epsilon).add_(centre[m]))

    fine_tune(lm, passages, config, changes, step)
    return changes
