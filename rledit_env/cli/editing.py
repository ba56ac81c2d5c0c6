"""Prepares the agent that edits in `rledit edit`: a trained one (--agent), or an editor without training (--editor)."""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING

from rledit_env.cli.command import (
    check_contexts,
    check_positive,
    dtype_name,
    model_name,
    model_source,
    option_or,
    say_loading,
    skipped_rows,
    warn,
)
from rledit_env.cli.editor_options import DEFAULT_MODEL, MAX_PRESENTATIONS, PRESENT_UNTIL, named_editor
from rledit_env.cli.editor_strength import recorded_settings, step_size_of, times_presented, with_strength
from rledit_env.type_aliases import JsonObject, Options, Settings

if TYPE_CHECKING:
    from agents import Agent
    from agents.running.editing import StreamSettings
    from agents.running.editors import Editor
    from agents.running.strength import Trial
    from rledit_env.env import LifelongEditEnv
    from rledit_env.knowledge import EditRecord, KnowledgeDataset
    from rledit_env.knowledge.facts import Facts
    from rledit_env.lm.editable import EditableLM

BATCH_SIZE = 20


@dataclass(frozen=True)
class Editing:
    """A model, an agent that is ready to edit it, and the settings.

    Attributes:
        lm: the model.
        agent: the agent, ready to edit.
        facts: the facts to edit, with --chat in the model's chat template.
        settings: arguments of `agents.edit_facts`; present_until and contexts only where they are used.
        identity: further settings that a run recorded in a ledger must share to be resumed.
        report: the editor's entries in edit_report.json.
        notes: notes for the user.
        mend: the advice if the editor breaks the model.
    """

    lm: EditableLM
    agent: Agent
    facts: Facts
    settings: StreamSettings
    identity: JsonObject
    report: JsonObject
    notes: tuple[str, ...] = ()
    mend: str = "Train the agent on longer streams"


def trained_agent(
    options: argparse.Namespace, facts: Facts, load: Callable[..., EditableLM] | None = None
) -> Editing:
    """The agent of --agent, with its training's model and settings unless the options override them.

    Args:
        options: the command's options.
        facts: the facts.
        load: loads the model, with the arguments of `EditableLM.load`, which is the default.
    """
    from agents import agent_settings, find_agent, load_agent
    from agents.rledit.moments import MissingMomentsWarning, start_warm
    from agents.running.saved import modules_of
    from rledit_env.files import sha256_of
    from rledit_env.lm.editable import EditableLM

    folder = find_agent(options.agent, facts.dataset.kind)
    trained = agent_settings(folder)["environment"]
    settings = _settings(options, trained, facts, repeated=trained.get("steps_per_batch", 1) > 1)
    model = model_name(options, trained, folder)
    modules = options.edit_modules or trained.get("edit_modules")
    say_loading(model)
    with nullcontext() if options.edit_modules else modules_of(folder, model):
        source = model_source(options, trained)
        lm = (load or EditableLM.load)(model, modules, options.dtype, options.device, **source)
    facts = _as_asked(facts, lm, options)
    with warnings.catch_warnings():
        if options.warm_up:
            warnings.simplefilter("ignore", MissingMomentsWarning)
        agent = load_agent(folder, _environment(lm, facts.dataset, settings["token"]))
    bundled_start = options.warm_up and start_warm(agent, lm, settings["token"])
    _say_what_is_edited(lm, facts.dataset)
    print(f"agent  {folder}", flush=True)
    identity: JsonObject = {"agent": {path.name: sha256_of(path) for path in sorted(folder.glob("agent.*"))}}
    notes: tuple[str, ...] = ()
    if bundled_start:
        identity["warm_up"] = True
        notes = ("the agent has no moments of training facts, and starts from those of bundled ones",)
    return Editing(lm, agent, facts, settings, identity, {"agent": str(folder)}, notes)


def training_free(
    options: argparse.Namespace, facts: Facts, load: Callable[..., EditableLM] | None = None,
    progress: Callable[[Trial], object] | None = None,
) -> Editing:  # fmt: skip
    """The editor of --editor, for any model; its strength is given, read from the ledger, or searched for.

    Args:
        options, facts, load: as for :func:`trained_agent`.
        progress: called with every trial of the search.
    """
    from agents.running.comparison import Views
    from agents.running.editors import configured, find_configs, load_configs

    model = options.model or DEFAULT_MODEL
    editor = configured(named_editor(options), load_configs(find_configs(model), facts.dataset.kind))
    editor = _with_options(editor, options)
    _check_subjects(editor, facts.dataset)
    settings = _settings(options, editor.env, facts, repeated=max(editor.presentations) > 1)
    say_loading(model)
    views = Views(model, options.dtype, options.device, **model_source(options), load=load)
    lm = views.of(editor, options.edit_modules)
    facts = _as_asked(facts, lm, options)
    _check_statistics(editor, lm, options)
    _say_what_is_edited(lm, facts.dataset)
    editor, search = with_strength(editor, options, lm, facts.dataset, settings, progress)
    settings["steps_per_batch"] = editor.env["steps_per_batch"]
    agent = editor.agent_class()(_environment(lm, facts.dataset, settings["token"]), editor.configuration())
    strength = step_size_of(editor)
    with_what = f", step size {strength['step_size']:g}" if strength else ""
    most = "at most " if "present_until" in settings else ""
    print(f"editor {editor.title}{with_what}, {most}{times_presented(settings['steps_per_batch'])} of a batch, at the "
          f"tokens {settings['token']!r}")
    modules = list(lm.module_shapes)
    print(f"       edits {modules[0]}" + (f" to {modules[-1]}" if len(modules) > 1 else ""), flush=True)
    _get_ready(agent)
    config = json.loads(json.dumps(asdict(editor.configuration()))) if editor.config else {}
    probe = json.loads(json.dumps(search.as_dict())) if search else None
    identity = {"editor": editor.name, **strength, "probe": probe, **{f"editor.{k}": v for k, v in config.items()}}
    description = {"name": editor.name, **strength, "config": config, "probe": probe}
    mend = "Give a smaller --step-size or another --editor" if strength else "Take another --editor"
    return Editing(lm, agent, facts, settings, identity, {"agent": None, "editor": description}, mend=mend)


def _as_asked(facts: Facts, lm: EditableLM, options: argparse.Namespace) -> Facts:
    """The facts as presented to the model: with --chat in its chat template, or both plain and in the template. With
    --on-error skip, facts that do not fit the template or the model's context are left out.

    Raises:
        ValueError: a fact does not fit; with --on-error skip, no fact fits.
    """
    from rledit_env.encoding import encode
    from rledit_env.lm.chat import ChatTemplate

    template = ChatTemplate(lm.tokenizer, lm.name) if options.chat else None
    skips = options.on_error == "skip"
    records: list[EditRecord] = []
    reasons: list[str] = []
    for record in facts.dataset:
        try:
            forms = template.asked(record, options.chat) if template else (record,)
            if skips:  # otherwise the environment checks the lengths
                for form in forms:
                    encode(lm, form)
        except ValueError as error:
            if not skips:
                raise
            reasons.append(str(error))
        else:
            records.extend(forms)
    if not records:
        raise ValueError(f"no fact fits {lm.name}; the first one: {reasons[0]}")
    skipped = dict(facts.dataset.skipped)
    if reasons:
        warn(f"warning: facts that do not fit {lm.name} are skipped: {len(reasons)}; the first one: {reasons[0]}")
        skipped["too long or unfit for the chat template"] = len(reasons)
    return replace(facts, dataset=replace(facts.dataset, records=tuple(records), skipped=skipped))


def _settings(options: argparse.Namespace, own: Settings, facts: Facts, repeated: bool) -> StreamSettings:
    """How the facts are presented: by the options, else by the ledger of the resumed run, else by the agent's or
    editor's own settings.

    Args:
        options: the command's options.
        own: the agent's or editor's own settings.
        facts: the facts.
        repeated: whether the agent or editor presents a batch more than once.

    Raises:
        ValueError: the options ask for presentations until the facts have taken, but a batch is presented only once.
    """
    recorded = recorded_settings(options)
    contexts = option_or(options.contexts, (own if recorded is None else recorded).get("contexts", 0))
    until, count = options.present_until, option_or(options.steps_per_batch, own.get("steps_per_batch", 1))
    if until is None and recorded is not None:
        until = recorded.get("present_until", 0.0)
        count = option_or(options.steps_per_batch, recorded["steps_per_batch"])
    elif until is None:
        until = PRESENT_UNTIL if repeated and options.steps_per_batch is None else 0.0
    if until or options.max_presentations is not None:
        if not repeated:
            name = "--present-until" if options.present_until else "--max-presentations"
            raise ValueError(f"{name}: {options.editor or options.agent} presents a batch once; leave it out")
        if recorded is None:
            count = option_or(options.steps_per_batch, MAX_PRESENTATIONS)
        count = option_or(options.max_presentations, count)
    settings: StreamSettings = {"token": options.token or own.get("token", "answer"), "steps_per_batch": count}
    if until:
        settings["present_until"] = until
    if contexts:
        settings["contexts"] = contexts
    size = option_or(options.batch_size, own.get("batch_size", BATCH_SIZE))
    settings["batch_size"] = min(size, len(facts.dataset))
    check_positive(argparse.Namespace(**settings), "batch_size", "steps_per_batch")
    check_contexts(contexts, settings["token"])
    return settings


def _environment(lm: EditableLM, facts: KnowledgeDataset, token: str) -> LifelongEditEnv:
    from rledit_env.env import LifelongEditEnv

    return LifelongEditEnv(
        facts.kind, lm, data=facts, num_batches=1, batch_size=1, token=token, reward="none", array_backend="torch"
    )


def _say_what_is_edited(lm: EditableLM, facts: KnowledgeDataset) -> None:
    print(f"facts  {len(facts)} of {facts.source} (read as {facts.kind})", *skipped_rows(facts))
    print(f"model  {lm.name} ({dtype_name(lm)}, {lm.device}), {len(lm.module_shapes)} modules", flush=True)


# -- an editor's configuration -------------------------------------------------------------------------------------


def _with_options(editor: Editor, options: argparse.Namespace) -> Editor:
    """The editor with the options that concern its configuration."""
    from agents.running.editors import merged

    config = editor.configuration()
    overrides: Options = {}
    if config is not None and "warm_up" in {f.name for f in fields(config)}:
        overrides["warm_up"] = options.warm_up  # lets single facts take
    if options.statistics_tokens is not None:
        overrides["corpus_tokens"] = options.statistics_tokens
    return replace(editor, settings=merged(editor.settings, overrides))


def _check_subjects(editor: Editor, facts: KnowledgeDataset) -> None:
    """Raise ValueError for facts without a subject if the method edits at the subject."""
    if editor.group != "locate":
        return
    without = [r for r in facts if not r.subject_span]
    if without:
        raise ValueError(f"{without[0].origin}: {editor.name} edits at a fact's subject, and {len(without)} of "
                         f"{len(facts)} facts name none, such as {without[0].prompt!r}; add \"subject\" to each, as it "
                         "is written in the prompt, or take an editor that needs none, such as --editor ultraedit")


def _check_statistics(editor: Editor, lm: EditableLM, options: argparse.Namespace) -> None:
    """Raise ValueError if --statistics-tokens is too small for second moments of full rank, or not needed."""
    tokens, widest = options.statistics_tokens, max(shape[0] for shape in lm.module_shapes.values())
    if tokens is not None and not editor.configuration().needs_statistics:
        raise ValueError(f"--statistics-tokens: {editor.name} as configured for {lm.name} takes no second moments "
                         "(second_moment is false); leave it out")
    if editor.group == "locate" and tokens is not None and tokens <= widest:
        raise ValueError(f"--statistics-tokens is {tokens}; second moments of {widest} inputs need more tokens, "
                         f"better {16 * widest}")


def _get_ready(agent: Agent) -> None:
    """Compute what the editor needs once per model, which announces what takes long."""
    started = time.perf_counter()
    agent.learn(0)
    if time.perf_counter() - started > 1:
        print(f"ready after {_duration(time.perf_counter() - started)}", flush=True)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"

