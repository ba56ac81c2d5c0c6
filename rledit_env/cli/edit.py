"""`rledit edit`: edit facts into a model and write it out."""

from __future__ import annotations

import argparse
import hashlib
import json
import secrets
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rledit_env.cli.command import (
    FAILED,
    OK,
    Command,
    chat_argument,
    check_positive,
    check_text,
    check_text_is_no_prior,
    dtype_name,
    on_error_argument,
    override_arguments,
    progress_bar,
    text_argument,
    to_stderr,
    warn,
)
from rledit_env.cli.editing import Editing, trained_agent, training_free
from rledit_env.cli.editor_options import check_editor, editor_arguments, presentation_arguments
from rledit_env.cli.paths import check_paths, going_on, written_path
from rledit_env.cli.results import (
    finite,
    name_untaken,
    not_taken,
    presentations,
    print_divergences,
    print_metrics,
    rounded,
    say_presentations,
    score_facts,
    warn_without_effect,
    without_effect,
)
from rledit_env.outputs import Output, PathError, whole
from rledit_env.type_aliases import JsonObject

if TYPE_CHECKING:
    from agents import EditLog
    from rledit_env.evaluation.metrics import Metrics
    from rledit_env.knowledge import KnowledgeDataset
    from rledit_env.knowledge.facts import Facts
    from rledit_env.ledger import EditLedger
    from rledit_env.lm.editable import EditableLM
    from rledit_env.lm.forward import Passage

REPORT = "edit_report.json"
DIVERGENCE_PASSAGES = 12  # passages of 64 tokens of each text; fewer than in `compare`, since a user waits for them
REPORT_FORMAT = "rledit-edit-report-1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from rledit_env.lm.forms import FORMS

    parser.add_argument("--facts", type=Path, required=True, metavar="FILE",
                        help="the facts: JSON Lines, JSON, CSV, YAML or Parquet")
    parser.add_argument("--kind", choices=("facts", "zsre", "counterfact", "fever"),
                        help="how to read the file (default: by its fields)")
    on_error_argument(parser)
    chat_argument(parser, "every fact")
    editor_arguments(parser)
    presentation_arguments(parser)
    parser.add_argument("--out", type=written_path, required=True, metavar="DIR", help="folder for the edited model")
    parser.add_argument("--save", nargs="+", choices=FORMS, default=["model"], metavar="FORM",
                        help="what to write: 'model', the whole edited model; 'delta', only the change, as "
                        "safetensors; 'lora', the change as an adapter for peft; several are written to folders of "
                        "these names in DIR")
    parser.add_argument("--lora-rank", type=int, metavar="R",
                        help="truncate the adapter to this rank (default: the rank that makes it exact); the error is "
                        "printed")
    parser.add_argument("--overwrite", action="store_true",
                        help="replace DIR, if it is not empty and rledit wrote all that is in it")
    parser.add_argument("--model", help="registry name, hub id or folder (default: the agent's, or "
                        "smollm2-135m)")
    parser.add_argument("--batch-size", type=int, metavar="n", help="facts a batch (default: the agent's, or 20)")
    override_arguments(parser, dtype="stored")
    parser.add_argument("--warm-up", action=argparse.BooleanOptionalAction, default=True,
                        help="start an agent that was saved without moments of training facts from those of bundled "
                        "facts, so that single facts take; --no-warm-up leaves it as published")
    text_argument(parser)
    parser.add_argument("--no-divergence", dest="divergence", action="store_false",
                        help="leave out the divergence from the unedited model, for which the model writes some text")
    group = parser.add_argument_group("safety")
    group.add_argument("--ledger", type=written_path, metavar="DIR",
                       help="record every update in DIR before it takes effect (see 'rledit ledger')")
    group.add_argument("--resume", action="store_true", help="resume the run that --ledger recorded")
    group.add_argument("--on-divergence", choices=("end", "skip"), default="end",
                       help="end the run, or skip the update, when an update breaks the model; it is taken back")
    group.add_argument("--drift-bound", type=float, metavar="NATS",
                       help="bound on the KL divergence from the original model on held text, in nats a token")
    group.add_argument("--on-drift", choices=("warn", "stop"), default="stop",
                       help="warn or stop when that bound is exceeded")


def run(options: argparse.Namespace) -> int:
    from rledit_env.evaluation.general import scored_texts
    from rledit_env.knowledge.facts import load_facts

    _check(options)
    loaded_facts = load_facts(options.facts, options.kind, options.on_error)
    editing = training_free(options, loaded_facts) if options.editor else trained_agent(options, loaded_facts)
    lm, facts = editing.lm, editing.facts
    notes = [*_notes(facts, editing.settings["token"]), *editing.notes]
    for note in notes:
        print(f"note: {note}")
    sys.stdout.flush()
    check_text_is_no_prior(options, getattr(editing.agent, "config", None))
    if options.divergence:
        to_stderr("writing the texts on which the divergence is measured …")
    texts = scored_texts(lm, options.text, passages=DIVERGENCE_PASSAGES) if options.divergence else {}
    log = _edit(editing, options)
    if log.diverged or log.stopped:
        what = "broke the model" if log.diverged else "moved the model further than --drift-bound on held text"
        warn(f"the update of batch {len(log.batch_sizes)} {what}; nothing was written. {editing.mend}, or give fewer "
             "facts")
        return FAILED
    records = list(facts.dataset)
    metrics, answers = score_facts(lm, records, facts.dataset.kind)
    report = _report(editing, log, metrics, answers, texts, notes, options)
    print_metrics(report["metrics"], log, print)
    print_divergences(report["divergences"], print)
    say_presentations(report["presentations"], records, print)
    name_untaken(report["not_taken"], len(records), metrics.exact_match, print, str(options.out / REPORT))
    warn_without_effect(report["batches_without_effect"], log)
    sys.stdout.flush()
    print(f"writing {options.out} …", file=sys.stderr)
    _write(lm, report, options)
    for saved in report["saved"].values():
        print(f"written: {options.out / saved['folder']}, {saved['what']}")
    return OK


def _check(options: argparse.Namespace) -> None:
    """Raise an error for options that exclude each other and for paths that cannot be written, before reading."""
    check_editor(options)
    check_text(options)
    if options.text is not None and not options.divergence:
        raise ValueError("--text and --no-divergence exclude each other: the divergence is measured on the text")
    check_paths(options, whole("--out", options.out, options.overwrite), *_ledger_output(options))
    if options.lora_rank is not None:
        check_positive(options, "lora_rank")
    if options.resume and options.ledger is None:
        raise ValueError("--resume goes on with a recorded run; name it with --ledger DIR")


def _edit(editing: Editing, options: argparse.Namespace) -> EditLog:
    """Edit the facts, with the ledger and the guard of the options."""
    from agents import edit_facts
    from rledit_env.evaluation.guard import DriftGuard

    lm, facts = editing.lm, editing.facts.dataset
    guard = DriftGuard(lm, options.drift_bound, options.on_drift) if options.drift_bound is not None else None
    ledger = _ledger(options, editing, facts) if options.ledger is not None else None
    try:
        with going_on("the same command with --resume"), progress_bar(len(facts), "editing") as bar:
            return edit_facts(lm, editing.agent, facts, progress=bar.update, ledger=ledger, guard=guard,
                              on_divergence=options.on_divergence, **editing.settings)  # fmt: skip
    finally:
        if ledger is not None:
            ledger.close()


def _report(
    editing: Editing, log: EditLog, metrics: Metrics, answers: Sequence[str], texts: Mapping[str, Sequence[Passage]],
    notes: Sequence[str], options: argparse.Namespace,
) -> JsonObject:  # fmt: skip
    """The content of edit_report.json, except for "saved"."""
    from rledit_env.answers import MEANING
    from rledit_env.evaluation.general import drifts
    from rledit_env.evaluation.general.scored_text import source_of
    from rledit_env.evaluation.metrics import METRICS_VERSION
    from rledit_env.reporting import versions

    lm, facts, records = editing.lm, editing.facts, list(editing.facts.dataset)
    scores = rounded(metrics.as_dict())
    if facts.without_paraphrases:
        scores |= {"generalization": None, "mean": None}
    if facts.without_unrelated:
        scores |= {"specificity": None, "specificity_answer": None, "mean": None}
    return {
        "format": REPORT_FORMAT,
        "facts_file": str(options.facts),
        "data_source": facts.dataset.source,
        **editing.report,
        "metrics_version": METRICS_VERSION,
        "metrics": scores,
        "seconds_per_fact": log.seconds_per_fact,
        "drift": log.drift,
        "divergences": {text: drift.as_dict() for text, drift in drifts(lm, texts).items()},
        "divergences_of": {"human": source_of(options.text)},
        "settings": {**editing.settings, "model": lm.name, "revision": lm.revision,
                     "edit_modules": list(lm.module_shapes), "dtype": dtype_name(lm), "device": str(lm.device),
                     "kind": facts.dataset.kind, "chat": options.chat},
        "versions": versions(),
        "notes": list(notes),
        "taken": list(metrics.taken),
        "taken_means": MEANING,
        "not_taken": not_taken(records, metrics, answers),
        "batches_without_effect": without_effect(log, metrics),
        "presentations": presentations(log, editing.settings),
        "answers": [
            {"prompt": r.prompt, "target": r.target, "answer": answer, "took": took, "presentations": count}
            for r, answer, took, count in zip(records, answers, metrics.taken, log.presentations, strict=True)
        ],
    }  # fmt: skip


def _write(lm: EditableLM, report: JsonObject, options: argparse.Namespace) -> None:
    """Write the forms of --save, and the report with the folder of each; if that fails, write the change elsewhere.

    Raises:
        OSError: the folder cannot be written; the message names what was kept instead.
    """
    from rledit_env.files import whole_folder
    from rledit_env.lm.forms import save_forms

    try:
        with whole_folder(options.out, options.overwrite, "edited model", options.command_line) as work:
            report["saved"] = save_forms(lm, work, options.save, options.lora_rank)
            _write_report(work, report)
    except OSError as error:
        folder = _keep_change(lm, report)
        ways = [f"the change and the report are in {folder} (see rledit_env.lm.delta.load_delta)"] if folder else []
        if options.ledger is not None:
            ways.append(f"write the model with: rledit ledger replay {shlex.quote(str(options.ledger))} --out MODEL")
        raise PathError("; ".join([str(error), *(ways or ["nothing of this run was kept but the scores above"])]))\
            from error


def _keep_change(lm: EditableLM, report: JsonObject) -> Path | None:
    """Write the change and the report into the system's folder for temporary files; None if that fails too."""
    from rledit_env.files import whole_folder
    from rledit_env.lm.delta import save_delta

    folder = Path(tempfile.gettempdir()) / f"rledit-edit-{secrets.token_hex(4)}"
    try:
        with whole_folder(folder, what="weight change") as work:
            save_delta(lm, work)
            _write_report(work, report | {"saved": {}})
    except OSError:
        return None
    return folder


def _write_report(folder: Path, report: JsonObject) -> None:
    from rledit_env.files import write_text

    write_text(folder / REPORT, json.dumps(finite(report), indent=1, ensure_ascii=False) + "\n")


def _ledger_output(options: argparse.Namespace) -> list[Output]:
    """The ledger as an output to be checked."""
    from rledit_env.ledger import check_ledger

    if options.ledger is None:
        return []
    return [Output("--ledger", options.ledger, lambda folder: check_ledger(folder, options.resume), apart=False)]


def _ledger(options: argparse.Namespace, editing: Editing, facts: KnowledgeDataset) -> EditLedger:
    """The run's ledger, new or resumed; a resumed run must have the same facts, editor and settings."""
    from rledit_env.ledger import EditLedger

    texts = json.dumps([[r.prompt, r.target, r.subject] for r in facts])
    settings = {
        **editing.settings,
        "facts": hashlib.sha256(texts.encode()).hexdigest(),
        **editing.identity,
        "on_divergence": options.on_divergence,
    }
    if not options.resume:
        return EditLedger.create(options.ledger, editing.lm, settings)
    ledger = EditLedger.resume(options.ledger, editing.lm, settings)
    print(f"ledger {options.ledger}: going on after {len(ledger)} recorded updates", flush=True)
    return ledger


def _notes(facts: Facts, token: str) -> list[str]:
    """Notes for the user on how the facts were read."""
    dataset, notes = facts.dataset, []
    if facts.ignored:
        names = [f"{n!r} (did you mean {meant!r}?)" if meant else f"{n!r}" for n, meant in facts.ignored.items()]
        notes.append(f"fields that are not used: {', '.join(names)}")
    if facts.without_paraphrases:
        notes.append(f"{facts.without_paraphrases} facts have no paraphrases: their own prompt stands in, which "
                     "changes nothing in editing; generalization is not scored")
    if facts.without_unrelated:
        notes.append(f"{facts.without_unrelated} facts name no unrelated fact to keep: specificity is not scored")
    nameless = sum(record.subject is None for record in dataset)
    if nameless and "subject" in token:
        notes.append(f"{nameless} facts name no subject, at whose last token the agent edits: they are edited at their "
                     "answers' tokens instead, which it may do less well; add \"subject\" to each")
    if facts.conflicts:
        prompt, count = next(iter(facts.conflicts.items()))
        notes.append(f"{len(facts.conflicts)} prompts have several targets, such as {prompt!r} with {count}: at most "
                     "one of them can hold")
    return notes


def interrupted(options: argparse.Namespace) -> str:
    message = f"interrupted; {options.out} was not written"
    if options.ledger is None:
        return message
    resume = "" if options.resume else " --resume"
    return f"{message}. Go on with the same command:\n  {options.command_line}{resume}"


COMMAND = Command(
    "edit",
    "edit your own facts into a model and write it out",
    "Edit facts into a model and write the edited model as a Hugging Face folder, in its original precision, or\n"
    "only the change, with edit_report.json. The facts whose answer did not change are named.",
    """\
the file of facts: JSON Lines, JSON, CSV, YAML or Parquet, recognised by its content. A fact is
  {"prompt": "The capital of Freedonia is", "target": "Sylvania", "subject": "Freedonia"}
or has the names of ZsRE, CounterFact, FEVER, KnowEdit, MQuAKE or WikiBigEdit, or those of EasyEdit's, ROME's, MEMIT's
and AlphaEdit's requests ("{}" in a prompt is the subject's place).
"subject" is optional but helps; so are "paraphrases": [...] and "unrelated": [{"prompt": ..., "answer": ...}], which
are only used to score the result.
Texts are not changed. Prompt and target are joined by a space, except after white space or a chat template, and in
scripts without spaces.

examples:
  rledit edit --facts facts.jsonl --agent default --out edited-model

  # any model, without a trained agent: the step size is found on a few of the facts, or given
  rledit edit --facts facts.jsonl --model owner/name --editor ultraedit --out edited-model
  rledit edit --facts facts.jsonl --model owner/name --editor ft-m --step-size 5e-4 --out edited-model

  rledit edit --facts facts.jsonl --agent runs/first --model smollm2-135m --out edited-model --overwrite
  rledit edit --facts facts.jsonl --agent default --out edited-model --max-presentations 40  # for stubborn facts
  rledit edit --facts facts.jsonl --agent default --out edited-model --ledger runs/ledger  # and, if interrupted,
  rledit edit --facts facts.jsonl --agent default --out edited-model --ledger runs/ledger --resume

  # only the change: an adapter for peft, and a safetensors file
  rledit edit --facts facts.jsonl --agent default --save lora delta --out edited

  # then, in Python
  AutoModelForCausalLM.from_pretrained("edited-model")
""",
    add_arguments,
    run,
    interrupted,
)
