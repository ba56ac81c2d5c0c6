"""The tables of a run, as header and rows: scores, answers, general ability, divergences and returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rledit_env.answers import answer_of, took
from rledit_env.evaluation.four_ways import Question
from rledit_env.evaluation.general.scored_text import NAMES
from rledit_env.knowledge import EditRecord
from rledit_env.reporting.cells import Table
from rledit_env.reporting.intervals import bootstrap_interval
from rledit_env.type_aliases import JsonObject

SCORES = {
    "efficacy": "Efficacy",
    "generalization": "Generalization",
    "specificity": "Specificity",
    "exact_match": "Exact match",
}
PORTABILITY = "portability"  # tables show it where the data has it
DIVERGENCE = "kl"  # tables show it where it was measured
GENERAL = {  # scores of a task that tables show: key → name
    "perplexity": "perplexity", "kl": "KL from the unedited model, nats", "f1": "F1", "f1_calibrated": "F1, calibrated",
}  # fmt: skip


def score_table(scores: Mapping[str, Mapping[str, float | None]]) -> Table:
    """Header and rows of editors' scores.

    Args:
        scores: editor's name → its scores by the names of ``SCORES``, and "seconds" a fact (None if it edited none);
            "portability", those of the groups that the data names ("portability/multi_hop"), and "kl", the divergence
            from the unedited LLM on its own text in nats a token, where measured.
    """
    groups = {key: key[0].upper() + key[1:].replace("/", ": ") for s in scores.values() for key in s if "/" in key}
    further = {PORTABILITY: "Portability", **groups, DIVERGENCE: "KL on own text"}
    columns = SCORES | {key: title for key, title in further.items() if any(key in s for s in scores.values())}
    rows: list[list[object]] = [
        [name, *(s.get(key) for key in columns), s.get("seconds")] for name, s in scores.items()
    ]
    return ["", *columns.values(), "Seconds a fact"], rows


def answer_table(facts: Sequence[EditRecord], before: Sequence[str], after: Sequence[str]) -> Table:
    """Header and rows of facts with the model's answers before and after editing, and whether the fact took.

    Args:
        facts: the facts.
        before, after: results of `rledit_env.evaluation.metrics.continuations`, which are shown up to the end of a
            phrase.
    """
    header = ["Prompt", "New fact", "Answer before", "Answer after", "Took"]
    return header, [
        [fact.prompt, fact.target, answer_of(b) or "(nothing)", answer_of(a) or "(nothing)", took(a, fact.target)]
        for fact, b, a in zip(facts, before, after, strict=True)
    ]


def question_table(questions: Sequence[Question], before: Sequence[str], after: Sequence[str]) -> Table:
    """Header and rows of the LLM's answers before and after editing to facts asked in four ways, and whether the answer
    after it is as it should be.

    Args:
        questions: the questions, by `rledit_env.evaluation.four_ways.questions_of`.
        before, after: the LLM's answers (`rledit_env.evaluation.four_ways.ask`); questions without an answer are left
            out.
    """
    return ["", "Asked", "Before", "After", "Should be", "Right"], [
        [q.way, q.text, q.shown(b), q.shown(a), q.answer, q.is_right(a)]
        for q, b, a in zip(questions, before, after, strict=True)
        if a or b
    ]


def general_table(scores: Mapping[int, Mapping[str, Mapping[str, float]]], most: int = 6) -> Table:
    """Header and rows of general ability, with a column for each measurement (the first, the last, some between).

    Args:
        scores: batches edited → scores, from `rledit_env.evaluation.general.GeneralEvery`.
        most: the largest number of such columns.
    """
    steps = sorted(scores)
    if len(steps) > most:
        steps = [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]
    rows: list[list[object]] = []
    for task, first in scores[steps[0]].items():
        if "original_perplexity" in first:
            names = {key: f"{NAMES.get(task, task)}, {GENERAL[key]}" for key in ("perplexity", "kl")}
        elif "f1_calibrated" in first:
            names = {key: f"{task}, {GENERAL[key]}" for key in ("f1", "f1_calibrated")}
            names |= {"mcc": f"{task}, MCC"} if task == "cola" else {}
        else:
            names = {key: f"{task}, {key}" for key in first}
        rows += [[name, *(float(scores[step][task][key]) for step in steps)] for key, name in names.items()]
    return ["", *("before" if step == 0 else f"after {step}" for step in steps)], rows


def point_table(points: Sequence[JsonObject], most: int = 12) -> Table:
    """Header and rows of scores along a stream: a row for each point (the first, the last, some between).

    Args:
        points: the points of `rledit_env.evaluation.points.ScoreProbe`.
        most: the largest number of rows.
    """
    columns = {"facts": "Facts edited", "scored_facts": "Scored", "mean": "Mean", **SCORES, "kl": "KL on own text",
               "kl_human": "human text", "kl_chat": "chat", "seconds_per_batch": "Seconds a batch",
               "memory_mib": "MiB"}  # fmt: skip
    columns = {key: title for key, title in columns.items() if any(point.get(key) is not None for point in points)}
    if len(points) > most:
        points = [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]
    return list(columns.values()), [[point.get(key) for key in columns] for point in points]


def divergence_table(divergences: Mapping[str, Mapping[str, float | None]]) -> Table:
    """Header and rows of the divergence from the unedited LLM, a row for each kind of text.

    Args:
        divergences: text → `SelfDrift.as_dict` of the result of `rledit_env.evaluation.general.drifts`; None for a
            number that is not finite.
    """
    header = ["", GENERAL["kl"], "perplexity before", "perplexity after"]
    return header, [
        [NAMES.get(text, text), *(drift[key] for key in ("kl", "original_perplexity", "perplexity"))]
        for text, drift in divergences.items()
    ]


def return_table(returns: Mapping[str, Sequence[float]], steps: Mapping[str, int]) -> Table:
    """Header and rows of agents' returns on the same streams, compared stream by stream with the first agent's.

    Args:
        returns: agent's name → its return on every stream.
        steps: agent's name → environment steps it learned from.
    """
    header = ["", "Environment steps", "Mean return", "Above the first", "95 % from", "to"]
    first = next(iter(returns.values()))
    rows: list[list[object]] = []
    for name, values in returns.items():
        above = np.subtract(values, first)
        low, high = bootstrap_interval(above)
        rows.append([name, steps.get(name, 0), float(np.mean(values)), float(above.mean()), low, high])
    return header, rows
