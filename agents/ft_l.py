"""FT-L: constrained fine-tuning of one weight (Zhu et al., 2021)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import torch
from torch import Tensor

from agents.base import Agent
from agents.files import agent_folder
from agents.settings import environment_settings
from rledit_env.files import write_text
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage
from rledit_env.lm.losses import negative_log_likelihood
from rledit_env.lm.names import expand_globs
from rledit_env.nesting import environment_inside

# The environment's settings that the editor is used with; what is traced does not matter to it.
RECOMMENDED: dict[str, Any] = {"token": "answer", "steps_per_batch": 1}


@dataclass(frozen=True)
class FTLConfig:
    """FT-L's numbers; the defaults are those of ROME's FT+L (Meng et al., NeurIPS 2022).

    Attributes:
        module: name or glob of the edited modules to fine-tune; None is the last of the environment's.
        steps: of Adam, at most.
        learning_rate: Adam's.
        epsilon: the most that an entry of W may move (L∞); ``math.inf`` for plain fine-tuning.
        around: "current", the batch's own start, as in ROME's FT+L and what followed it, or "original", W₀, as Zhu et
            al. constrain a single round of fine-tuning: the whole stream then shares the budget.
        loss_goal: the steps end once the batch's loss is below this.
    """

    module: str | None = None
    steps: int = 25
    learning_rate: float = 5e-4
    epsilon: float = 5e-4
    around: Literal["current", "original"] = "current"
    loss_goal: float = 1e-2

    def __post_init__(self) -> None:
        if self.around not in ("current", "original"):
            raise ValueError(f"around is {self.around!r}; give 'current' or 'original'")
        for name in ("learning_rate", "epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give a positive number")
        if self.steps < 0:
            raise ValueError(f"steps is {self.steps}; give 0 or more")


class FTLAgent(Agent):
    """FT-L (Zhu et al., "Modifying Memories in Transformer Models", arXiv 2012.00363).

    Minimises L(B, W) = −mean log p_W(y*|x) over the batch's answer tokens, subject to ‖W − W′‖_∞ ≤ ε, for one weight of
    one layer's feed-forward block: Adam steps on the whole batch, each followed by the projection
    W ← clamp(W, W′ − ε, W′ + ε). W′ is the weight at the batch's start (or W₀, see `FTLConfig.around`).

    It asks the environment for the LLM and the facts of the batch, and leaves the LLM as it was, bit for bit; its
    action is the dense update.

    Args:
        env: the environment that it edits in.
        config: its numbers.
        seed: unused, since nothing is random.
    """

    def __init__(self, env: gym.Env | None, config: FTLConfig | None = None, seed: int = 0) -> None:
        if env is not None:
            environment_inside(env, "FTLAgent", agent=True)
        self.env, self.config, self.seed = env, config or FTLConfig(), seed

    def memory(self) -> dict[str, Tensor]:
        return {}

    def predict(self, observation: Any, deterministic: bool = True) -> tuple[Any, None]:
        """{"updates": module → ΔW (d_out, d_in)} for the environment's current batch.

        Raises:
            ValueError: the agent has no environment, or the environment does not edit ``config.module``.
        """
        if self.env is None:
            raise ValueError("this agent fine-tunes the environment's LLM; load it with env=…")
        inner: Any = self.env.unwrapped
        passages = [record.edit for record in inner.current_batch()]
        numpy = inner.array_backend == "numpy"
        updates = constrained_fine_tuning(inner.lm, passages, self._modules(inner.lm), self.config)
        return {"updates": {m: u.cpu().numpy() if numpy else u for m, u in updates.items()}}, None

    def _modules(self, lm: EditableLM) -> list[str]:
        names = list(lm.module_shapes)
        return names[-1:] if self.config.module is None else expand_globs([self.config.module], names)

    def learn(
        self, total_timesteps: int = 0, callback: Any = None, progress_bar: bool = True,
        reset_num_timesteps: bool = True,
    ) -> FTLAgent:  # fmt: skip
        """There is nothing to train."""
        return self

    def save(self, path: str | Path) -> None:
        """Write the numbers as JSON."""
        folder = agent_folder(path)
        description = {
            "agent": "ft-l", "format": 1, "seed": self.seed, "config": asdict(self.config),
            "environment": environment_settings(self.env),
        }  # fmt: skip
        write_text(folder / "agent.json", json.dumps(description, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path, env: gym.Env | None = None) -> FTLAgent:
        """The agent in a folder that :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no agent there.
        """
        folder = Path(path)
        if not (folder / "agent.json").exists():
            raise FileNotFoundError(f"{folder} holds no agent (no agent.json); give the folder that save() wrote")
        description = json.loads((folder / "agent.json").read_text(encoding="utf-8"))
        return cls(env, FTLConfig(**description["config"]), description["seed"])


def constrained_fine_tuning(
    lm: EditableLM, passages: Sequence[Passage], modules: Sequence[str], config: FTLConfig
) -> dict[str, Tensor]:
    """ΔW (d_out, d_in) by module that the fine-tuning ends with; the LLM's weights are what they were, bit for bit.

    Args:
        lm: the LLM.
        passages: the edits of the batch; none gives no change.
        modules: names of the edited modules to fine-tune.
        config: the numbers.
    """
    start = lm.snapshot()
    changes = {m: torch.zeros_like(start[m]) for m in modules}
    middle = {m: lm.original_weight(m) - start[m] if config.around == "original" else 0.0 for m in modules}
    optimizer = torch.optim.Adam(list(changes.values()), lr=config.learning_rate)
    try:
        for _ in range(config.steps if passages else 0):
            loss, gradients = _loss_and_gradients(lm, passages, modules)
            if not loss >= config.loss_goal:  # reached, or the model broke
                break
            for m, change in changes.items():
                change.grad = gradients[m]
            optimizer.step()
            for m, change in changes.items():
                change.copy_((change - middle[m]).clamp_(-config.epsilon, config.epsilon).add_(middle[m]))
            lm.restore({**start, **{m: start[m] + change for m, change in changes.items()}})
    finally:
        lm.restore(start)
    return changes


def _loss_and_gradients(
    lm: EditableLM, passages: Sequence[Passage], modules: Sequence[str]
) -> tuple[float, dict[str, Tensor]]:
    """The mean answer-token cross-entropy and its gradient by module (d_out, d_in), in the weights' precision."""
    tokens = sum(len(p.targets) for p in passages)
    total = 0.0
    with lm.collecting() as (sums,):
        for _, states in lm.answer_chunks(passages):
            loss = negative_log_likelihood(lm.forward, states.hidden, states.targets).sum() / tokens
            loss.backward()
            total += float(loss.detach())
    return total, {m: sums[m] for m in modules}
