"""The pages that the examples write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rledit_env.evaluation.retention import Retention
from rledit_env.reporting.cells import Table
from rledit_env.reporting.charts import (
    LAYERS_CAPTION,
    MEMORY_CAPTION,
    RETENTION_CAPTION,
    Curve,
    drift_curves,
    layer_drift,
    learning_curves,
    memory_curve,
    retention_map,
    return_curves,
    score_bars,
)
from rledit_env.reporting.page import Report
from rledit_env.reporting.provenance import versions
from rledit_env.reporting.run_tables import general_table, return_table, score_table


@dataclass(frozen=True)
class Measured:
    """Measurements of an editor along a stream; missing measurements are None.

    Attributes:
        retention: retention of the stream's batches.
        module_drift: as in :func:`rledit_env.reporting.charts.layer_drift`.
        general: as in :func:`rledit_env.reporting.run_tables.general_table`.
        training: what the training shows and cannot show, in sentences.
    """

    retention: Retention | None = None
    module_drift: Mapping[str, Sequence[float]] | None = None
    general: Mapping[int, Mapping[str, Mapping[str, float]]] | None = None
    training: str = ""


def editing_report(
    lead: str,
    scores: Mapping[str, Mapping[str, float | None]],
    answers: Table,
    curves: Mapping[str, Curve],
    drifts: Mapping[str, Curve],
    settings: Mapping[str, object],
    source: str,
    measured: Measured | None = None,
) -> Report:
    """The page of agents that edited a few facts and then a stream; the first editor's row is in bold.

    Args:
        lead: a sentence that describes the run.
        scores: as in :func:`score_table`; the first row is the unedited LLM's.
        answers: the result of :func:`question_table`.
        curves: the result of :func:`read_curves`; may be empty.
        drifts: as in :func:`drift_curves`.
        settings: the run's settings.
        source: a description of the facts' source.
        measured: measurements of the first editor, and the words about the training.
    """
    measured = measured or Measured()
    page = Report("Lifelong editing of a language model", lead)
    page.heading("Facts asked in four ways")
    page.paragraph("The new facts are false on purpose. The prompt, its paraphrase and a question in the chat template "
                   "must give the new answer; a neighbouring fact must keep its own. The neighbour's row is not right "
                   "either if the model never knew its answer.")
    page.table(*answers)
    page.heading("A stream of facts")
    page.table(*score_table(scores), strong=[1])
    page.picture(score_bars(scores), "Scores on the edited facts after the whole stream.")
    page.paragraph(
        "Efficacy: edited prompts where the new answer is more probable than the old one. Generalization: the same on "
        "paraphrases. Specificity: neighbouring facts that still prefer their own answer. Exact match: the answer "
        "written freely begins with the new one and ends there. KL on own text: how far the model's predictions moved "
        "on text that it wrote before, in nats a token; 0 is the unedited model."
    )
    if measured.training:
        page.heading("Learning")
        page.paragraph(measured.training)
    if picture := learning_curves(curves):
        page.picture(picture, "Losses on the training streams, and scores on facts kept back to choose the checkpoint.")
    if measured.retention is not None:
        page.heading("Retention")
        page.picture(retention_map(measured.retention), RETENTION_CAPTION)
        page.picture(memory_curve(measured.retention), MEMORY_CAPTION)
    page.heading("Drift")
    page.picture(drift_curves(drifts), "How far the edited weights moved from the original ones along the stream.")
    if measured.module_drift and all(measured.module_drift.values()):
        page.picture(layer_drift(measured.module_drift), LAYERS_CAPTION)
    if measured.general:
        page.heading("General ability")
        page.paragraph("Text that the model wrote before any editing, that people wrote, and what the model answered "
                       "before in its chat template, if it has one: how it takes them by batches edited.")
        page.table(*general_table(measured.general))
    _add_origin(page, source, settings)
    return page


def returns_report(
    lead: str,
    returns: Mapping[str, Sequence[float]],
    steps: Mapping[str, int],
    curves: Mapping[str, Curve],
    levels: Mapping[str, float],
    settings: Mapping[str, object],
    source: str,
) -> Report:
    """The page of algorithms that learned to edit, compared by their returns on the same held-out streams.

    Args:
        lead: a sentence that describes the run.
        returns, steps: as in :func:`return_table`.
        curves, levels: as in :func:`return_curves`.
        settings: the run's settings.
        source: a description of the facts' source.
    """
    page = Report("Standard algorithms as editors", lead)
    page.table(*return_table(returns, steps))
    count = len(next(iter(returns.values())))
    page.paragraph(
        f"Mean returns over {count} held-out streams, the same for all; a return is minus the losses that the reward "
        "weighs, so that more is better. The interval is a bootstrap's over the streams, of the difference from the "
        "first row stream by stream."
    )
    page.heading("Learning")
    page.picture(
        return_curves(curves, levels),
        "Mean return on held-out streams, others than the table's, over the environment steps learned from. Dashed: "
        "what does not learn step by step, on the same streams.",
    )
    _add_origin(page, source, settings)
    return page


def _add_origin(page: Report, source: str, settings: Mapping[str, object]) -> None:
    page.heading("Data, settings and versions")
    page.paragraph(f"Data: {source}.")
    page.table(["Setting", "Value"], [[name, str(value)] for name, value in settings.items()])
    page.table(["Package", "Version"], list(versions().items()))
