"""Measures how well facts were edited, and how much else in the LLM changed."""

from rledit_env.evaluation.chat_scores import ChatScores, chat_scores
from rledit_env.evaluation.guard import DriftGuard
from rledit_env.evaluation.metrics import METRICS_VERSION, Metrics, continuations, evaluate
from rledit_env.evaluation.retention import DriftProbe, Retention, RetentionProbe

__all__ = [
    "ChatScores",
    "DriftGuard",
    "DriftProbe",
    "METRICS_VERSION",
    "Metrics",
    "Retention",
    "RetentionProbe",
    "chat_scores",
    "continuations",
    "evaluate",
]
