"""What an edited LLM is still good for: classification tasks, drift on its own text, and lm-eval's tasks."""

from rledit_env.general.ability import GeneralAbility, GeneralEvery
from rledit_env.general.self_text import SelfDrift, self_drift, self_text
from rledit_env.general.tasks import TASKS, Example, TaskData, TaskScore, load_tasks, score_task

__all__ = [
    "TASKS",
    "Example",
    "GeneralAbility",
    "GeneralEvery",
    "SelfDrift",
    "TaskData",
    "TaskScore",
    "load_tasks",
    "score_task",
    "self_drift",
    "self_text",
]
