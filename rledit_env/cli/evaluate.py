"""`rledit evaluate`: score a trained agent on facts that it was not trained on."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import gymnasium as gym

from rledit_env.cli.command import (
    FAILED,
    OK,
    Command,
    agent_argument,
    check_contexts,
    check_positive,
    check_text,
    check_text_is_no_prior,
    dtype_name,
    environment_arguments,
    kind_of,
    metrics_argument,
    model_name,
    model_source,
    option_or,
    override_arguments,
    probability,
    progress_bar,
    say_loading,
    skipped_rows,
    text_argument,
    to_stderr,
    warn,
)
from rledit_env.cli.paths import check_paths, file_or_dash
from rledit_env.cli.results import (
    before_and_after,
    chat_answers,
    finite,
    name_untaken,
    not_taken,
    print_chat,
    print_general,
    print_metrics,
    print_retention,
    rounded,
    score_facts,
    warn_without_effect,
    without_effect,
)
from rledit_env.outputs import PathError, result
from rledit_env.type_aliases import JsonObject, Settings

if TYPE_CHECKING:
    from agents import EditLog
    from rledit_env.evaluation.general import GeneralEvery
    from rledit_env.evaluation.metrics import Metrics
    from rledit_env.evaluation.retention import DriftProbe, RetentionProbe
    from rledit_env.interface import EditingEnv, Environment
    from rledit_env.knowledge import EditRecord
    from rledit_env.lm.chat import ChatTemplate

RESULT_FORMAT = "rledit-result-1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    environment_arguments(parser, required=False)
    agent_argument(parser)
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
    group = parser.add_argument_group("scores and other measurements")
    metrics_argument(group)
    group.add_argument("--chat", action="store_true",
                       help="also ask the edits and their paraphrases as a user's messages, through the model's chat "
                       "template, and score whether its free answer contains the target")
    group.add_argument("--retention", action="store_true", help="every batch's Efficacy after later batches")
    group.add_argument("--retention-every", type=int, default=1, metavar="k", help="batches between two measurements")
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


def run(options: argparse.Namespace) -> int:
    from agents import edit_stream, find_agent, load_agent
    from rledit_env.interface import editing_env

    sources = _check(options)
    folder = find_agent(options.agent, kind_of(options.env) if options.env else None)
    env_id, settings = _settings(options, folder)
    check_contexts(settings["contexts"], settings["token"])
    say_loading(settings["model"])
    env = _environment(options, env_id, settings, folder)
    inner = editing_env(env)
    template = _chat_template(inner) if options.chat else None
    agent = load_agent(folder, env)
    check_text_is_no_prior(options, getattr(agent, "config", None))
    agent.reset()
    say = to_stderr if options.json == "-" else print
    say(f"data   {inner.dataset.source} ({inner.dataset.split}): {options.num_batches} × {options.batch_size} of "
        f"{len(inner.dataset):,} facts", *skipped_rows(inner.dataset))
    say(f"model  {inner.lm.name} ({dtype_name(inner.lm)}, {inner.lm.device}), {len(inner.lm.module_shapes)} modules")
    say(f"agent  {folder}")
    probes = _probes(options, env, sources)
    with progress_bar(options.num_batches * options.batch_size, "editing") as bar:
        log = edit_stream(env, agent, progress=bar.update, callbacks=probes.callbacks, seed=options.seed)
    edited = Edited(options, folder, env_id, settings, inner, log, inner.edited_records())
    metrics, answers = score_facts(inner.lm, edited.records, inner.dataset.kind, options.metrics)
    content = _content(edited, metrics, answers) | {"module_drift": probes.drift.by_module}
    print_metrics(content["metrics"], log, say)
    if template is not None:
        content["chat"] = _chat(edited, template, say)
    content |= _say_probes(probes, options, say)
    name_untaken(content["not_taken"], len(edited.records), metrics.exact_match, say,
                 options.json if options.json != "-" else None)
    warn_without_effect(content["batches_without_effect"], log)
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

    check_metrics(options.metrics)
    check_text(options)
    sources: list[str] = [] if options.general == ["none"] else options.general
    if options.text is not None and "self" not in sources:
        raise ValueError("--text is what 'self' of --general is measured on, too; add --general self, or leave it out")
    if options.json not in (None, "-"):
        check_paths(options, result("--json", Path(options.json), RESULT_FORMAT))
    return sources


def _settings(options: argparse.Namespace, folder: Path) -> tuple[str, Settings]:
    """The environment's id and settings: those of the options, or else those that the agent in ``folder`` was trained
    with.

    Raises:
        ValueError: neither names the environment, or an option is below 1.
    """
    from agents import agent_settings

    trained = agent_settings(folder)["environment"]
    env_id = options.env or trained.get("id")
    if not env_id:
        raise ValueError(f"{folder} does not say which environment it was trained in; name one with --env")
    check_positive(options, "retention_every", "general_limit")
    if options.general_every is not None:
        check_positive(options, "general_every")
    return env_id, {
        "model": model_name(options, trained, folder),
        **model_source(options, trained),
        "edit_modules": options.edit_modules or trained.get("edit_modules"),
        "split": options.split,
        "num_batches": options.num_batches,
        "batch_size": options.batch_size,
        "token": options.token or trained.get("token", "answer"),
        "steps_per_batch": options.steps_per_batch or trained.get("steps_per_batch", 1),
        "present_until": _until(options, trained),
        "contexts": option_or(options.contexts, trained.get("contexts", 0)),
    }


def _until(options: argparse.Namespace, trained: JsonObject) -> float | None:
    """The probability at which a fact is no longer presented; None for a fixed number of presentations."""
    if options.present_until is not None:
        return options.present_until or None
    return trained.get("present_until") if options.steps_per_batch is None else None


def _environment(options: argparse.Namespace, env_id: str, settings: Settings, folder: Path) -> Environment:
    """The environment in which the agent in ``folder`` edits."""
    from agents.running.saved import modules_of

    with nullcontext() if options.edit_modules else modules_of(folder, settings["model"]):
        return gym.make(
            env_id, data=options.data, device=options.device, dtype=options.dtype, on_error=options.on_error,
            reward="none", array_backend="torch", disable_env_checker=True, **settings,
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
class Probes:
    """The measurements while a stream is edited; None for those that were not asked for."""

    drift: DriftProbe
    retention: RetentionProbe | None
    general: GeneralEvery | None

    @property
    def callbacks(self) -> list[Callable[[int], object]]:
        """The probes as callbacks of `agents.edit_stream`."""
        return [probe for probe in (self.drift, self.retention, self.general) if probe is not None]


def _probes(options: argparse.Namespace, env: Environment, sources: Sequence[str]) -> Probes:
    """The probes of the options; general ability is measured on these ``sources``."""
    from rledit_env.evaluation.general import GeneralAbility, GeneralEvery
    from rledit_env.evaluation.retention import DriftProbe, RetentionProbe
    from rledit_env.interface import editing_env

    retention = RetentionProbe(env, options.retention_every, metrics=options.metrics) if options.retention else None
    general = None
    if sources:
        ability = GeneralAbility(editing_env(env).lm, sources, options.general_shots, options.general_limit,
                                 options.seed, options.text)  # fmt: skip
        general = GeneralEvery(env, ability, options.general_every)
    return Probes(DriftProbe(env), retention, general)


def _say_probes(probes: Probes, options: argparse.Namespace, say: Callable[..., object]) -> JsonObject:
    """Print the probes' measurements; returns the result's entries for them."""
    content: JsonObject = {}
    retention, general = probes.retention, probes.general
    if retention is not None and retention.measured:
        content["retention"] = retention.result.as_dict()
        print_retention(retention.result, say)
    if general is not None:
        content["general"] = {"sources": general.ability.sources, "shots": options.general_shots,
                             "scores": {str(edited): scores for edited, scores in general.scores.items()}}
        print_general(general.scores, say)
    return content


@dataclass(frozen=True)
class Edited:
    """A stream that an agent edited.

    Attributes:
        options: the command's options.
        folder: the agent's folder.
        env_id: the environment's id.
        settings: the environment's settings.
        env: the environment.
        log: the record of the stream.
        records: the facts, in order.
    """

    options: argparse.Namespace
    folder: Path
    env_id: str
    settings: Settings
    env: EditingEnv
    log: EditLog
    records: Sequence[EditRecord]


def _content(edited: Edited, metrics: Metrics, answers: Sequence[str]) -> JsonObject:
    """The content of the result's file, without the entries of the probes and the chat."""
    from rledit_env.answers import MEANING
    from rledit_env.evaluation.metrics import METRICS_VERSION
    from rledit_env.reporting import versions

    options, env, log, records = edited.options, edited.env, edited.log, edited.records
    before, shown_answers = before_and_after(env.lm, records, env.dataset.kind, metrics, answers)
    return {
        "format": RESULT_FORMAT,
        "env": edited.env_id,
        "agent": str(edited.folder),
        "data_source": env.dataset.source,
        "command": options.command_line,
        "metrics_version": METRICS_VERSION,
        "metrics": rounded(metrics.as_dict()),
        "before": rounded(before.as_dict()),
        "seconds_per_fact": log.seconds_per_fact,
        "drift": log.drift,
        "diverged": log.diverged,
        "settings": {**edited.settings, "data": options.data, "seed": options.seed, "device": str(env.lm.device),
                     "dtype": dtype_name(env.lm), "kind": env.dataset.kind, "metrics": options.metrics,
                     "chat": options.chat, "text": options.text},
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
        chat = chat_scores(edited.env.lm, records, template, bar.update)
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


COMMAND = Command(
    "evaluate",
    "score a trained agent on facts it never saw",
    "Let an agent edit one stream of facts and score the model on all of them at the end. The facts whose answer\n"
    "did not change are named. The model, its modules and the agent's other settings come with the agent.",
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
""",
    add_arguments,
    run,
    lambda options: "interrupted; no result was written",
)
