"""Scoring of an edited model in `evaluate` and `edit`, and printing of the results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict

from rledit_env.cli.command import progress_bar, warn
from rledit_env.type_aliases import JsonObject

if TYPE_CHECKING:
    from agents import EditLog
    from agents.running.editing import StreamSettings
    from rledit_env.evaluation.chat_scores import ChatScores
    from rledit_env.evaluation.journal import Journal
    from rledit_env.evaluation.metrics import Metrics
    from rledit_env.evaluation.retention import Retention
    from rledit_env.knowledge import EditRecord
    from rledit_env.lm.editable import EditableLM

LISTED = 20  # the largest number of lines in a printed list
SHOWN = 20  # facts with their answers before and after in the result


class Presentations(TypedDict):
    """How often facts were presented; see :func:`presentations`."""

    until: float | None
    at_most: int
    facts_by_count: dict[str, int]
    never: list[int]
    lost: list[int]


class BatchWithoutEffect(TypedDict):
    """A batch whose update was zero, or of which no fact took; its facts are counted from 1."""

    batch: int
    first_fact: int
    last_fact: int
    update_norm: float


def score_facts(
    lm: EditableLM, records: Sequence[EditRecord], kind: str, how: str = "paper", journal: Journal | None = None
) -> tuple[Metrics, list[str]]:
    """The metrics on these records (``how``: a name in `rledit_env.evaluation.metrics.METRICS`), and the LLM's answer
    to each prompt. The journal keeps what has been scored."""
    from rledit_env.answers import answer_of
    from rledit_env.evaluation.chunks import score_in_chunks

    with progress_bar(len(records), "scoring") as bar:
        scored = score_in_chunks(lm, records, kind, how, progress=bar.update, journal=journal, name="edited model")
    return scored.metrics(records, how), [answer_of(text) for text in scored.written]


def before_and_after(
    lm: EditableLM, records: Sequence[EditRecord], kind: str, edited: Metrics, answers: Sequence[str],
    journal: Journal | None = None,
) -> tuple[Metrics, list[JsonObject]]:  # fmt: skip
    """The metrics of the unedited LLM (teacher-forced, scored in the same way as the edited LLM's), and some facts,
    spread evenly over the stream, with the answers before and after, and whether they took. The journal keeps what has
    been scored."""
    from rledit_env.evaluation.chunks import score_in_chunks
    from rledit_env.evaluation.metrics import free_answers

    count = min(SHOWN, len(records))
    chosen = [i * len(records) // count for i in range(count)]
    shown = [records[i] for i in chosen]
    how = edited.metrics
    with lm.original_weights(), progress_bar(len(records), "scoring the unedited model") as bar:
        scored = score_in_chunks(lm, records, kind, how, False, bar.update, journal, "unedited model")
        answers_before = free_answers(lm, shown)
    return scored.metrics(records, how), [
        {"prompt": r.prompt, "target": r.target, "before": answer, "after": answers[i], "took": edited.taken[i]}
        for i, r, answer in zip(chosen, shown, answers_before, strict=True)
    ]


def print_points(points: Sequence[JsonObject], say: Callable[..., object]) -> None:
    """Print the scores along the stream."""
    from rledit_env.reporting import point_table, text_table

    say("scores along the stream:")
    say(text_table(*point_table(points)))


def print_retention(retention: Retention, say: Callable[..., object]) -> None:
    """Print the first batch's scores after later batches, and the forgetting over all batches."""
    from rledit_env.reporting import text_table

    rows = [
        [edited, float(efficacy), None if exact != exact else float(exact)]
        for edited, efficacy, exact in zip(
            retention.edited, retention.first_batch, retention.first_exact_match, strict=True
        )
    ]
    if len(rows) > LISTED:
        rows = [rows[i * (len(rows) - 1) // (LISTED - 1)] for i in range(LISTED)]
    say("the first batch after later ones:")
    say(text_table(["batches edited", "efficacy", "exact match"], rows))
    say(f"{'forgetting':<20}{retention.forgetting:10.2f}")


def print_general(scores: Mapping[int, Mapping[str, Mapping[str, float]]], say: Callable[..., object]) -> None:
    """Print the scores of general ability, one column for each measurement."""
    from rledit_env.reporting import general_table, text_table

    say("general ability by batches edited:")
    say(text_table(*general_table(scores)))


def print_divergences(divergences: Mapping[str, Mapping[str, float]], say: Callable[..., object]) -> None:
    """Print the divergences from the unedited model, one row for each text; see
    `rledit_env.evaluation.general.drifts`."""
    from rledit_env.reporting import divergence_table, text_table

    if divergences:
        say("the rest of the model, on text that was not edited:")
        say(text_table(*divergence_table(divergences)))


def chat_answers(records: Sequence[EditRecord], scores: ChatScores) -> list[JsonObject]:
    """Some facts, spread evenly over the stream, with the answers in a chat, and whether these contain the target."""
    count = min(SHOWN, len(records))
    chosen = [i * len(records) // count for i in range(count)]
    return [
        {"prompt": records[i].prompt, "target": records[i].target, "answer": scores.answers[i], "took": scores.taken[i]}
        for i in chosen
    ]


def print_chat(scores: ChatScores, say: Callable[..., object]) -> None:
    """Print how often the model's answers in a chat contain the target."""
    for name, score in scores.as_dict().items():
        say(f"{name.replace('_', ' '):<20}{score:10.2f}")


def not_taken(records: Sequence[EditRecord], metrics: Metrics, answers: Sequence[str]) -> list[dict[str, str]]:
    return [
        {"prompt": r.prompt, "target": r.target, "answer": answer, "origin": r.origin}
        for r, took, answer in zip(records, metrics.taken, answers, strict=True)
        if not took
    ]


def without_effect(log: EditLog, metrics: Metrics) -> list[BatchWithoutEffect]:
    """Batches (counted from 1) whose update was zero, or of which no fact took."""
    batches: list[BatchWithoutEffect] = []
    for number, (facts, norm) in enumerate(zip(log.batches(), log.update_norms, strict=True), start=1):
        if not any(log.presentations[i] for i in facts):  # the model knew all facts already
            continue
        if norm == 0 or not any(metrics.taken[i] for i in facts):
            batches.append(
                {"batch": number, "first_fact": facts.start + 1, "last_fact": facts.stop, "update_norm": norm}
            )
    return batches


def warn_without_effect(batches: Sequence[BatchWithoutEffect], log: EditLog) -> None:
    for batch in batches[:LISTED]:
        what = "its update was zero" if batch["update_norm"] == 0 else "none of its facts took"
        warn(f"warning: batch {batch['batch']} of {len(log.batch_sizes)} (facts {batch['first_fact']} to "
             f"{batch['last_fact']}) had no effect: {what}")
    if len(batches) > LISTED:
        warn(f"warning: … and {len(batches) - LISTED} more batches had no effect")


def presentations(log: EditLog, settings: StreamSettings) -> Presentations:
    """How often facts were presented, for the report.

    Returns:
        "until": the probability of every answer token that ends a fact's presentations, None for a fixed number of
        them; "at_most": the largest number of presentations; "facts_by_count": number of presentations → number of
        facts; and the facts (from 0) below the probability at the end: "never", those presented as often as allowed,
        and "lost", those that had reached it before later facts were edited.
    """
    most = settings["steps_per_batch"]
    below = [i for i, taken in enumerate(log.taken) if not taken]
    counts = {str(n): log.presentations.count(n) for n in sorted(set(log.presentations))}
    return {
        "until": settings.get("present_until"), "at_most": most, "facts_by_count": counts,
        "never": [i for i in below if log.presentations[i] >= most],
        "lost": [i for i in below if log.presentations[i] < most],
    }  # fmt: skip


def say_presentations(found: Presentations, records: Sequence[EditRecord], say: Callable[..., object]) -> None:
    """Print how often facts were presented, and which are below the probability at the end; nothing if all were
    presented a fixed number of times. ``found``: the result of :func:`presentations`."""
    if found["until"] is None:
        return
    reached = f"every answer token at p ≥ {found['until']:g}"
    times = {"0": "not at all, known before", "1": "once"}
    counts = "; ".join(f"{times.get(n, f'{n} times')}: {facts}" for n, facts in found["facts_by_count"].items())
    say(f"facts were presented until {reached}, at most {found['at_most']} times; facts by presentations: {counts}")
    more = "; give a larger --max-presentations or --step-size" if found["at_most"] > 1 else ""
    lost = "had got there, and lost it to later facts"
    for places, what in ((found["never"], f"never got there{more}"), (found["lost"], lost)):
        if places:
            say(f"{len(places)} of {len(records)} facts {what}:")
            for i in places[:LISTED]:
                say(f"  {records[i].prompt!r}: {records[i].target!r}")
            if len(places) > LISTED:
                say(f"  … and {len(places) - LISTED} more")


def name_untaken(
    untaken: Sequence[Mapping[str, str]], total: int, exact: float | None, say: Callable[..., object], rest: str | None
) -> None:
    """Print how many facts took and how many match exactly, what both mean, and which facts did not take.

    Args:
        untaken: the result of :func:`not_taken`.
        total: number of all facts.
        exact: exact match, in percent.
        say: prints a line.
        rest: the file that names all facts that did not take.
    """
    all_took = "the fact" if total == 1 else f"all {total} facts"
    some_took = f"{total - len(untaken)} of {total} facts"
    say(f"{some_took if untaken else all_took} took: the model's own answer begins with the target; exact match, where "
        f"the answer also ends there: {round((exact or 0.0) * total / 100)} of {total}")
    if not untaken:
        return
    say(f"{len(untaken)} of {total} facts did not take, the model still answers otherwise:")
    for fact in untaken[:LISTED]:
        say(f"  {fact['prompt']!r}: wanted {fact['target']!r}, answers {fact['answer']!r}")
    if len(untaken) > LISTED:
        say(f"  … and {len(untaken) - LISTED} more" + (f", all in {rest}" if rest else ""))


def print_metrics(scores: Mapping[str, float | None], log: EditLog, say: Callable[..., object]) -> None:
    for name, score in scores.items():
        title = name if "/" in name else name.replace("_", " ")  # a group keeps the name that the data set gives it
        say(f"{title:<20}{'not scored' if score is None else f'{score:10.2f}'}")
    say(f"{'drift':<20}{log.drift:10.4f}")
    say(f"{'seconds a fact':<20}{log.seconds_per_fact:10.4f}")


def rounded(scores: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: None if score is None else round(score, 4) for name, score in scores.items()}


def finite(value: object) -> object:
    """The value with None in place of infinite numbers and NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    if isinstance(value, float) and not float("-inf") < value < float("inf"):
        return None
    return value
