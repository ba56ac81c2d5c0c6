"""General ability of an edited LLM: divergence on text, classification tasks, and lm-eval's tasks."""

from rledit_env.evaluation.general.ability import GeneralAbility, GeneralEvery
from rledit_env.evaluation.general.scored_text import chat_text, drifts, human_text, scored_texts
from rledit_env.evaluation.general.self_text import SelfDrift, self_drift, self_text
from rledit_env.evaluation.general.tasks import TASKS, Example, TaskData, TaskScore, load_tasks, score_task

__all__ = [
    "TASKS",
    "Example",
    "GeneralAbility",
    "GeneralEvery",
    "SelfDrift",
    "TaskData",
    "TaskScore",
    "chat_text",
    "drifts",
    "human_text",
    "load_tasks",
    "score_task",
    "scored_texts",
    "self_drift",
    "self_text",
]
