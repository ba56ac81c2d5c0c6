"""Pages, pictures and tables of results."""

from rledit_env.reporting.cells import Table, text_table
from rledit_env.reporting.charts import (
    drift_curves,
    layer_drift,
    learning_curves,
    memory_curve,
    module_map,
    norm_curve,
    retention_map,
    return_curves,
    score_bars,
    stream_curves,
    tradeoff_curves,
)
from rledit_env.reporting.clock import Clock, duration, flush_lines
from rledit_env.reporting.drawing import Form, check_pictures
from rledit_env.reporting.example_reports import Measured, editing_report, returns_report
from rledit_env.reporting.intervals import bootstrap_interval
from rledit_env.reporting.logs import read_curves
from rledit_env.reporting.page import Report
from rledit_env.reporting.provenance import versions
from rledit_env.reporting.run_tables import (
    answer_table,
    divergence_table,
    general_table,
    point_table,
    question_table,
    return_table,
    score_table,
)

__all__ = [
    "Clock",
    "Form",
    "Measured",
    "Report",
    "Table",
    "answer_table",
    "bootstrap_interval",
    "check_pictures",
    "divergence_table",
    "drift_curves",
    "duration",
    "editing_report",
    "flush_lines",
    "general_table",
    "layer_drift",
    "learning_curves",
    "memory_curve",
    "module_map",
    "norm_curve",
    "point_table",
    "question_table",
    "read_curves",
    "retention_map",
    "return_curves",
    "return_table",
    "returns_report",
    "score_bars",
    "score_table",
    "stream_curves",
    "text_table",
    "tradeoff_curves",
    "versions",
]
