"""`rledit evaluate`: score a trained agent on facts it never saw."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gymnasium as gym

from rledit_env.cli.command import (
    FAILED,
    OK,
    Command,
    agent_argument,
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

RESULT_FORMAT = "rledit-result-1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    environment_arguments(parser, required=False)
    agent_argument(parser)
    parser.add_argument("--split", default="eval", help="'train' or 'eval'")
    parser.add_argument("--num-batches", type=int, default=20, metavar="T", help="batches of the stream")
    parser.add_argument("--batch-size", type=int, default=20, metavar="n", help="facts a batch")
    override_arguments(parser)
    parser.add_argument("--present-until", type=probability, metavar="P",
                        help="present a batch until the model gives every token of its answers this probability, and "
                        "--steps-per-batch times at most (default: as the agent was trained, or a fixed number of "
                        "times where --steps-per-batch is given); 'none': always that often")
    parser.add_argument("--seed", type=int, default=0, help="of the facts' choice and order")
    parser.add_argument("--json", type=file_or_dash, metavar="FILE",
                        help="write the result there, over an earlier result perhaps; '-' for the standard output")
    group = parser.add_argument_group("how it is scored, and what else is measured")
    metrics_argument(group)
    group.add_argument("--chat", action="store_true",
                       help="also ask the edits and their paraphrases as a user's messages, through the model's chat "
                       "template: does its free answer contain the target?")
    group.add_argument("--retention", action="store_true", help="every batch's Efficacy after later batches")
    group.add_argument("--retention-every", type=int, default=1, metavar="k", help="batches between two measurements")
    group.add_argument("--general", nargs="+", metavar="SOURCE", default=["self"],
                       help="general ability before and after: 'self' (perplexity and divergence on text that the "
                       "model wrote before editing, on human-written text and on its answers in a chat), a folder or "
                       "file of tasks (sst2.jsonl, mrpc, cola, rte, nli, mmlu), 'hub' for the public ones, "
                       "'lm-eval:TASK,TASK'; 'none' leaves it out (default: self)")
    text_argument(group)
    group.add_argument("--general-every", type=int, metavar="k", help="also during the stream, every k batches")
    group.add_argument("--general-shots", type=int, default=0, metavar="N", help="solved examples before a question")
    group.add_argument("--general-limit", type=int, default=200, metavar="N", help="examples a task")


def run(options: argparse.Namespace) -> int:
    from agents import agent_settings, edit_stream, find_agent, load_agent
    from agents.running.saved import modules_of
    from rledit_env.answers import MEANING
    from rledit_env.evaluation.chat_scores import CHAT_MEANING, chat_scores
    from rledit_env.evaluation.general import GeneralAbility, GeneralEvery
    from rledit_env.evaluation.metrics import METRICS_VERSION, check_metrics
    from rledit_env.evaluation.retention import DriftProbe, RetentionProbe
    from rledit_env.lm.chat import ChatTemplate
    from rledit_env.reporting import versions

    check_metrics(options.metrics)
    check_text(options)
    sources = [] if options.general == ["none"] else options.general
    if options.text is not None and "self" not in sources:
        raise ValueError("--text is what 'self' of --general is measured on, too; add --general self, or leave it out")
    if options.json not in (None, "-"):
        check_paths(options, result("--json", Path(options.json), RESULT_FORMAT))
    folder = find_agent(options.agent, kind_of(options.env) if options.env else None)
    trained = agent_settings(folder)["environment"]
    env_id = options.env or trained.get("id")
    if not env_id:
        raise ValueError(f"{folder} does not say which environment it was trained in; name one with --env")
    check_positive(options, "retention_every", "general_limit")
    if options.general_every is not None:
        check_positive(options, "general_every")
    settings = {
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
    say_loading(settings["model"])
    with nullcontext() if options.edit_modules else modules_of(folder, settings["model"]):
        env = gym.make(
            env_id, data=options.data, device=options.device, dtype=options.dtype, on_error=options.on_error,
            reward="none", array_backend="torch", disable_env_checker=True, **settings,
        )
    inner: Any = env.unwrapped
    template = ChatTemplate(inner.lm.tokenizer, inner.lm.name) if options.chat else None
    if template is not None:  # before anything is edited
        for record in inner.dataset:
            for prompt in (record.prompt, *record.paraphrases):
                template.check(prompt, record.origin)
    agent = load_agent(folder, env)
    check_text_is_no_prior(options, getattr(agent, "config", None))
    agent.reset()
    say = to_stderr if options.json == "-" else print
    say(f"data   {inner.dataset.source} ({inner.dataset.split}): {options.num_batches} × {options.batch_size} of "
        f"{len(inner.dataset):,} facts", *skipped_rows(inner.dataset))
    say(f"model  {inner.lm.name} ({dtype_name(inner.lm)}, {inner.lm.device}), {len(inner.lm.module_shapes)} modules")
    say(f"agent  {folder}")
    retention = RetentionProbe(env, options.retention_every, metrics=options.metrics) if options.retention else None
    general = None
    if sources:
        ability = GeneralAbility(inner.lm, sources, options.general_shots, options.general_limit, options.seed,
                                 options.text)
        general = GeneralEvery(env, ability, options.general_every)
    drift = DriftProbe(env)
    callbacks = [probe for probe in (drift, retention, general) if probe is not None]
    with progress_bar(options.num_batches * options.batch_size, "editing") as bar:
        log = edit_stream(env, agent, progress=bar.update, callbacks=callbacks, seed=options.seed)
    records = inner.edited_records()
    metrics, answers = score_facts(inner.lm, records, inner.dataset.kind, options.metrics)
    before, shown = before_and_after(inner.lm, records, inner.dataset.kind, metrics, answers)
    content = {
        "format": RESULT_FORMAT,
        "env": env_id,
        "agent": str(folder),
        "data_source": inner.dataset.source,
        "command": options.command_line,
        "metrics_version": METRICS_VERSION,
        "metrics": rounded(metrics.as_dict()),
        "before": rounded(before.as_dict()),
        "seconds_per_fact": log.seconds_per_fact,
        "drift": log.drift,
        "diverged": log.diverged,
        "settings": {**settings, "data": options.data, "seed": options.seed, "device": str(inner.lm.device),
                     "dtype": dtype_name(inner.lm), "kind": inner.dataset.kind, "metrics": options.metrics,
                     "chat": options.chat, "text": options.text},
        "versions": versions(),
        "taken": list(metrics.taken),
        "taken_means": MEANING,
        "not_taken": not_taken(records, metrics, answers),
        "batches_without_effect": without_effect(log, metrics),
        "answers": shown,
        "batch_sizes": log.batch_sizes,
        "update_norms": log.update_norms,
        "module_drift": drift.by_module,
    }
    print_metrics(content["metrics"], log, say)
    if template is not None:
        with progress_bar(len(records), "asking in a chat") as bar:
            chat = chat_scores(inner.lm, records, template, bar.update)
        content["chat"] = {**rounded(chat.as_dict()), "taken": list(chat.taken), "taken_means": CHAT_MEANING,
                           "answers": chat_answers(records, chat)}
        print_chat(chat, say)
    if retention is not None and retention.measured:
        content["retention"] = retention.result.as_dict()
        print_retention(retention.result, say)
    if general is not None:
        content["general"] = {"sources": general.ability.sources, "shots": options.general_shots,
                             "scores": {str(edited): scores for edited, scores in general.scores.items()}}
        print_general(general.scores, say)
    name_untaken(content["not_taken"], len(records), metrics.exact_match, say,
                 options.json if options.json != "-" else None)
    warn_without_effect(content["batches_without_effect"], log)
    if options.json:
        sys.stdout.flush()
        _write(json.dumps(finite(content), indent=1, ensure_ascii=False), options.json)
    if log.diverged:
        warn("the agent broke the model: its losses are no longer finite, and the stream ended there")
        return FAILED
    return OK


def _until(options: argparse.Namespace, trained: Mapping[str, Any]) -> float | None:
    """The probability at which a fact is no longer presented, if any."""
    if options.present_until is not None:
        return options.present_until or None
    return trained.get("present_until") if options.steps_per_batch is None else None


def _write(text: str, path: str) -> None:
    """Write the result to a file, or to the standard output where that is asked for, or nothing else is left.

    Raises:
        OSError: it was not written to its file.
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

  # a model made for chat: is the edit there for those who ask in a chat?
  rledit evaluate --agent runs/chat --chat

  # what is remembered, and what the model is still good for; then the run's page
  rledit evaluate --agent runs/first --retention --general self glue --json runs/first/result.json
  rledit report runs/first
""",
    add_arguments,
    run,
    lambda options: "interrupted; no result was written",
)
