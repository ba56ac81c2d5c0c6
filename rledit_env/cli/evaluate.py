"""`rledit evaluate`: score an agent or an editor on a stream of facts."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rledit_env.cli.command import (
    FAILED,
    OK,
    Command,
    check_positive,
    check_text,
    dtype_name,
    environment_arguments,
    metrics_argument,
    override_arguments,
    probability,
    progress_bar,
    skipped_rows,
    text_argument,
    to_stderr,
    warn,
)
from rledit_env.cli.evaluation_probes import MEASUREMENTS, Probes, make_probes, probe_arguments, say_probes
from rledit_env.cli.evaluation_setup import Evaluated, agent_arguments, check_agent, evaluated, run_ledger
from rledit_env.cli.paths import check_paths, file_or_dash, going_on, written_path
from rledit_env.cli.results import (
    before_and_after,
    chat_answers,
    finite,
    name_untaken,
    not_taken,
    print_chat,
    print_metrics,
    rounded,
    score_facts,
    warn_without_effect,
    without_effect,
)
from rledit_env.outputs import Output, PathError, added, result
from rledit_env.type_aliases import JsonObject

if TYPE_CHECKING:
    from agents import EditLog
    from rledit_env.evaluation.journal import Journal
    from rledit_env.evaluation.metrics import Metrics
    from rledit_env.interface import EditingEnv
    from rledit_env.knowledge import EditRecord
    from rledit_env.ledger import EditLedger
    from rledit_env.lm.chat import ChatTemplate

RESULT_FORMAT = "rledit-result-1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    environment_arguments(parser, required=False)
    agent_arguments(parser)
    parser.add_argument("--split", default="eval", help="'train' or 'eval'")
    parser.add_argument("--num-batches", type=int, default=20, metavar="T", help="batches of the stream")
    parser.add_argument("--batch-size", type=int, default=20, metavar="n", help="facts a batch")
    override_arguments(parser)
    parser.add_argument("--present-until", type=probability, metavar="P",
                        help="present a batch until the model gives every token of its answers this probability, at "
                        "most --steps-per-batch times (default: as the agent was trained, or a fixed number of times "
                        "if --steps-per-batch is given); 'none': always that often")
    parser.add_argument("--seed", type=int, default=0, help="of the facts' choice and order")
    parser.add_argument("--json", type=file_or_dash, metavar="FILE",
                        help="write the result to FILE, and replace an earlier result; '-' for the standard output")
    parser.add_argument("--ledger", type=written_path, metavar="DIR",
                        help="record every update and measurement in DIR; the same command then goes on where an "
                        "interrupted run ended, to the same result")
    group = parser.add_argument_group("scores and other measurements")
    metrics_argument(group)
    group.add_argument("--chat", action="store_true",
                       help="also ask the edits and their paraphrases as a user's messages, through the model's chat "
                       "template, and score whether its free answer contains the target")
    group.add_argument("--general", nargs="+", metavar="SOURCE", default=["self"],
                       help="general ability before and after: 'self' (perplexity and divergence on text that the "
                       "model wrote before editing, on human-written text and on its answers in a chat), a folder or "
                       "file of tasks (sst2.jsonl, mrpc, cola, rte, nli, mmlu), 'hub' for the public ones, "
                       "'lm-eval:TASK,TASK'; 'none' leaves it out (default: self)")
    text_argument(group)
    group.add_argument("--general-every", type=int, metavar="k",
                       help="measure general ability also during the stream, every k batches")
    group.add_argument("--general-shots", type=int, default=0, metavar="N", help="solved examples before a question")
    group.add_argument("--general-limit", type=int, default=200, metavar="N", help="examples a task")
    probe_arguments(parser, group)


def run(options: argparse.Namespace) -> int:
    sources = _check(options)
    run = evaluated(options)
    inner = run.inner
    template = _chat_template(inner) if options.chat else None
    run.agent.reset()
    say = to_stderr if options.json == "-" else print
    say(f"data   {inner.dataset.source} ({inner.dataset.split}): {options.num_batches} × {options.batch_size} of "
        f"{len(inner.dataset):,} facts", *skipped_rows(inner.dataset))
    say(f"model  {inner.lm.name} ({dtype_name(inner.lm)}, {inner.lm.device}), {len(inner.lm.module_shapes)} modules")
    say(f"agent  {run.name}" if run.editor is None else f"editor {run.name}")
    with _ledger(options, run, say) as (ledger, journal):
        probes = make_probes(options, run.env, sources, say)
        log = _edit(options, run, probes, ledger, journal)
        content = _measured(Edited(options, run, log, inner.edited_records()), probes, template, journal, say)
    if options.json:
        sys.stdout.flush()
        _write(json.dumps(finite(content), indent=1, ensure_ascii=False), options.json)
    if log.diverged:
        warn("the agent broke the model: its losses are no longer finite, and the stream ended there")
        return FAILED
    return OK


def _check(options: argparse.Namespace) -> list[str]:
    """Raise an error for wrong options and for paths that cannot be written; returns the sources of --general."""
    from rledit_env.evaluation.metrics import check_metrics
    from rledit_env.ledger import check_ledger

    check_agent(options)
    check_metrics(options.metrics)
    check_text(options)
    sources: list[str] = [] if options.general == ["none"] else options.general
    if options.text is not None and "self" not in sources and options.score_every is None:
        raise ValueError("--text is what 'self' of --general is measured on, too; add --general self, or leave it out")
    every = [name for name in ("general_every", "score_every") if getattr(options, name) is not None]
    check_positive(options, "retention_every", "general_limit", "score_facts", *every)
    if options.log_dir is not None and options.score_every is None:
        raise ValueError("--log-dir is for the scores of --score-every; give that, too")
    outputs = []
    if options.json not in (None, "-"):
        outputs.append(result("--json", Path(options.json), RESULT_FORMAT))
    if options.ledger is not None:
        outputs.append(Output("--ledger", options.ledger, lambda folder: check_ledger(folder, True), apart=False))
    if options.log_dir is not None:
        outputs.append(added("--log-dir", options.log_dir))
    if outputs:
        check_paths(options, *outputs)
    return sources


@contextmanager
def _ledger(
    options: argparse.Namespace, run: Evaluated, say: Callable[..., object]
) -> Iterator[tuple[EditLedger | None, Journal | None]]:
    """Context with the run's ledger and its measurements so far; None of both without --ledger."""
    from rledit_env.evaluation.journal import Journal

    if options.ledger is None:
        yield None, None
        return
    ledger = run_ledger(options, run)
    try:
        if len(ledger):
            say(f"ledger {options.ledger}: going on after {len(ledger)} recorded updates")
        with going_on():
            yield ledger, Journal(ledger.folder / MEASUREMENTS)
    finally:
        ledger.close()


def _edit(
    options: argparse.Namespace, run: Evaluated, probes: Probes, ledger: EditLedger | None, journal: Journal | None
) -> EditLog:
    """Edit the stream, with the probes."""
    from agents import edit_stream

    callbacks = probes.callbacks(run.env, journal)
    with progress_bar(options.num_batches * options.batch_size, "editing") as bar:
        return edit_stream(
            run.env, run.agent, progress=bar.update, callbacks=callbacks, ledger=ledger, seed=options.seed
        )


def _chat_template(env: EditingEnv) -> ChatTemplate:
    """The model's chat template.

    Raises:
        ValueError: a fact does not fit the template.
    """
    from rledit_env.lm.chat import ChatTemplate

    template = ChatTemplate(env.lm.tokenizer, env.lm.name)
    for record in env.dataset:
        for prompt in (record.prompt, *record.paraphrases):
            template.check(prompt, record.origin)
    return template


@dataclass(frozen=True)
class Edited:
    """A stream that an agent edited.

    Attributes:
        options: the command's options.
        run: the agent and its environment.
        log: the record of the stream.
        records: the facts, in order.
    """

    options: argparse.Namespace
    run: Evaluated
    log: EditLog
    records: Sequence[EditRecord]


def _measured(
    edited: Edited, probes: Probes, template: ChatTemplate | None, journal: Journal | None, say: Callable[..., object]
) -> JsonObject:
    """Score all facts, and print the scores and the probes' measurements; returns the content of the result's file."""
    options, run, log, records = edited.options, edited.run, edited.log, edited.records
    if journal is not None:  # the log knows only the time since the run was resumed
        log.seconds = probes.seconds(log)
    metrics, answers = score_facts(run.inner.lm, records, run.inner.dataset.kind, options.metrics, journal)
    content = _content(edited, metrics, answers, journal)
    print_metrics(content["metrics"], log, say)
    if template is not None:
        content["chat"] = _chat(edited, template, say)
    content |= say_probes(probes, options, metrics, len(records), say)
    name_untaken(content["not_taken"], len(records), metrics.exact_match, say,
                 options.json if options.json != "-" else None)
    warn_without_effect(content["batches_without_effect"], log)
    return content


def _content(edited: Edited, metrics: Metrics, answers: Sequence[str], journal: Journal | None) -> JsonObject:
    """The content of the result's file, without the entries of the probes and the chat."""
    from rledit_env.answers import MEANING
    from rledit_env.evaluation.metrics import METRICS_VERSION
    from rledit_env.reporting import versions

    options, run, log, records = edited.options, edited.run, edited.log, edited.records
    env = run.inner
    before, shown_answers = before_and_after(env.lm, records, env.dataset.kind, metrics, answers, journal)
    return {
        "format": RESULT_FORMAT,
        "env": run.env_id,
        "agent": run.name if run.editor is None else None,
        "editor": run.editor,
        "data_source": env.dataset.source,
        "command": options.command_line,
        "metrics_version": METRICS_VERSION,
        "metrics": rounded(metrics.as_dict()),
        "before": rounded(before.as_dict()),
        "seconds_per_fact": log.seconds_per_fact,
        "drift": log.drift,
        "diverged": log.diverged,
        "settings": {**run.settings, "data": options.data, "seed": options.seed, "device": str(env.lm.device),
                     "dtype": dtype_name(env.lm), "kind": env.dataset.kind, "metrics": options.metrics,
                     "chat": options.chat, "text": options.text, "strength": options.strength or 1.0,
                     "score_every": options.score_every, "score_facts": options.score_facts},
        "versions": versions(),
        "taken": list(metrics.taken),
        "taken_means": MEANING,
        "not_taken": not_taken(records, metrics, answers),
        "batches_without_effect": without_effect(log, metrics),
        "answers": shown_answers,
        "batch_sizes": log.batch_sizes,
        "update_norms": log.update_norms,
    }  # fmt: skip


def _chat(edited: Edited, template: ChatTemplate, say: Callable[..., object]) -> JsonObject:
    """Ask the facts in a chat, and print how often the target was answered; returns the result's entry for it."""
    from rledit_env.evaluation.chat_scores import CHAT_MEANING, chat_scores

    records = edited.records
    with progress_bar(len(records), "asking in a chat") as bar:
        chat = chat_scores(edited.run.inner.lm, records, template, bar.update)
    print_chat(chat, say)
    return {**rounded(chat.as_dict()), "taken": list(chat.taken), "taken_means": CHAT_MEANING,
            "answers": chat_answers(records, chat)}  # fmt: skip


def _write(text: str, path: str) -> None:
    """Write the result to a file, or to the standard output if ``path`` is "-" or the file cannot be written.

    Raises:
        OSError: the file cannot be written.
    """
    from rledit_env.files import write_text

    if path == "-":
        print(text)
        return
    try:
        write_text(path, text + "\n")
    except OSError as error:
        print(text, flush=True)
        raise PathError(f"{error}; the result is on the standard output instead") from error
    print(f"written: {path}")


def interrupted(options: argparse.Namespace) -> str:
    if options.ledger is None:
        return "interrupted; no result was written"
    return f"interrupted; no result was written. Go on with the same command:\n  {options.command_line}"


COMMAND = Command(
    "evaluate",
    "score a trained agent on facts it never saw",
    "Let an agent, or an editor, edit one stream of facts and score the model on all of them at the end. The facts\n"
    "whose answer did not change are named. The model, its modules and the agent's other settings come with the agent.",
    """\
examples:
  rledit evaluate --env RLEdit-CounterFact-v0 --agent runs/first --json result.json
  rledit evaluate --env RLEdit-ZsRE-v0 --agent runs/paper --data zsre_eval.jsonl --split eval \\
      --num-batches 20 --batch-size 20 --seed 1 --json result.json

  # a chat model: does an edit also change its answers in a chat?
  rledit evaluate --agent runs/chat --chat

  # retention and general ability; then the run's page
  rledit evaluate --agent runs/first --retention --general self glue --json runs/first/result.json
  rledit report runs/first

  # a long stream: scored every 50 batches, and continued by the same command after any interruption
  rledit evaluate --agent default --env RLEdit-CounterFact-v0 --data facts.jsonl --num-batches 500 --score-every 50 \\
      --ledger runs/long/ledger --json runs/long/rledit.json
""",
    add_arguments,
    run,
    interrupted,
)
