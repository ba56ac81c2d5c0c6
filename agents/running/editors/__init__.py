"""The registry of editors: their agents, configurations and training, and hyperparameters by model."""

from agents.running.editors.configs import CONFIGS, ENVIRONMENT, configured, find_configs, load_configs
from agents.running.editors.editor import (
    Editor,
    Strength,
    Training,
    configured_step_size,
    with_step_size,
    with_strength,
)
from agents.running.editors.overrides import changed, merged
from agents.running.editors.table import (
    EDITORS,
    SHORT_NAMES,
    TEXT_PRIOR,
    chosen_editors,
    find_editor,
    training_free_editors,
)

__all__ = [
    "CONFIGS",
    "EDITORS",
    "ENVIRONMENT",
    "Editor",
    "SHORT_NAMES",
    "Strength",
    "TEXT_PRIOR",
    "Training",
    "changed",
    "chosen_editors",
    "configured",
    "configured_step_size",
    "find_configs",
    "find_editor",
    "load_configs",
    "merged",
    "training_free_editors",
    "with_step_size",
    "with_strength",
]
