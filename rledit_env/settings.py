"""EpisodeSettings: the checked settings of an environment, without the model and the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rledit_env.lm.forward import TOKEN_CHOICES
from rledit_env.preservation import Constraint
from rledit_env.reward import RewardConfig

RENDER_MODES = ["ansi", "human", "rgb_array"]


@dataclass(frozen=True)
class EpisodeSettings:
    """The settings of an environment's episodes; `LifelongEditEnv` documents its arguments of the same names.

    Attributes:
        reward_config: configuration of the reward; None for no reward.

    Raises:
        ValueError: a setting has an invalid value.
    """

    token: str
    array_backend: Literal["numpy", "torch"]
    on_divergence: Literal["end", "skip", "raise"]
    steps_per_batch: int
    present_until: float | None
    contexts: int
    action_noise_std: float
    render_mode: str | None
    reward_gradient: bool
    reward_config: RewardConfig | None

    def __post_init__(self) -> None:
        is_probability = not isinstance(self.present_until, bool) and (
            self.present_until is None or 0 < self.present_until < 1
        )
        for name, is_valid, valid_values in (
            ("token", self.token in TOKEN_CHOICES, f"one of {', '.join(TOKEN_CHOICES)}"),
            ("array_backend", self.array_backend in ("numpy", "torch"), "'numpy' or 'torch'"),
            ("on_divergence", self.on_divergence in ("end", "skip", "raise"), "'end', 'skip' or 'raise'"),
            ("steps_per_batch", self.steps_per_batch >= 1, "1 or more"),
            ("present_until", is_probability, "a probability above 0 and below 1, or None"),
            ("contexts", type(self.contexts) is int and self.contexts >= 0, "a whole number from 0"),
            ("action_noise_std", self.action_noise_std >= 0, "0 or more"),
            ("render_mode", self.render_mode in (None, *RENDER_MODES), f"None or one of {RENDER_MODES}"),
        ):
            if not is_valid:
                raise ValueError(f"{name} is {getattr(self, name)!r}; give {valid_values}")
        if self.contexts and self.token == "all":
            raise ValueError(f"contexts is {self.contexts} and token is 'all', which would observe the contexts' "
                             "tokens, too; give 'answer', 'subject' or 'subject+answer', or contexts=0")

    @property
    def shows_answers(self) -> bool:
        """Whether the LLM's answers before and after each step are rendered."""
        return self.render_mode in ("ansi", "human")

    @property
    def constraint(self) -> Constraint | None:
        """The reward's bound on one of its components, or None."""
        return self.reward_config.constraint if self.reward_config is not None else None

    @property
    def batch_stride(self) -> int:
        """One in this many batches is scored."""
        return self.reward_config.batch_stride if self.reward_config is not None else 1

    @property
    def floor(self) -> float:
        """The reward of a step that breaks the LLM."""
        return self.reward_config.floor if self.reward_config is not None else 0.0
