"""Who edits in `rledit edit`: a trained agent (--agent), or an editor that needs no training (--editor)."""

from __future__ import annotations

import argparse
import json
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rledit_env.cli.command import (
    check_positive,
    dtype_name,
    model_name,
    model_source,
    option_or,
    probability,
    progress_bar,
    say_loading,
    skipped_rows,
    warn,
)

if TYPE_CHECKING:
    from agents import Agent
    from agents.running.editors import Editor
    from agents.running.strength import StrengthSearch, Trial
    from rledit_env.knowledge import EditRecord, KnowledgeDataset
    from rledit_env.knowledge.facts import Facts
    from rledit_env.lm.editable import EditableLM

DEFAULT_MODEL = "smollm2-135m"
BATCH_SIZE = 20
PRESENT_UNTIL, MAX_PRESENTATIONS = 0.8, 16  # with 12 a few of fifty single facts do not take (benchmarks/lone_facts.py)


@dataclass(frozen=True)
class Editing:
    """Who edits which model, and how.

    Attributes:
        lm: the model.
        agent: the editor, ready to edit.
        facts: what is edited, in the model's chat template where that is asked for.
        settings: batch_size, token, steps_per_batch and, unless batches are presented a fixed number of times,
            present_until, as `agents.edit_facts` takes them.
        identity: what a ledger's run must have been begun with, beside the settings, to be resumed.
        report: what edit_report.json says of the editor.
        notes: what the user should know.
        mend: what helps where the editor breaks the model.
    """

    lm: EditableLM
    agent: Agent
    facts: Facts
    settings: dict[str, Any]
    identity: dict[str, Any]
    report: dict[str, Any]
    notes: tuple[str, ...] = ()
    mend: str = "Train the agent on longer streams"


def editor_arguments(parser: argparse.ArgumentParser) -> None:
    """--agent or --editor, and what belongs to an editor."""
    parser.add_argument("--agent", metavar="RUN",
                        help="a trained agent: a run's folder (its best agent is taken), an agent's folder, or "
                        "'default', the agent that ships with the package for smollm2-135m")
    parser.add_argument("--editor", metavar="NAME",
                        help="instead of an agent, an editor that needs no training, for any model: ultraedit, "
                        "recursion, ft-l, ft-m, rome, memit, alphaedit or another one of 'rledit compare'")
    group = parser.add_argument_group("an editor's strength")
    group.add_argument("--step-size", type=float, metavar="X",
                       help="of the editor (default: found in about a minute on a few of the facts: most of them take, "
                       "and the model moves least, by no more than --drift-bound or 0.1 nats a token)")
    group.add_argument("--statistics-tokens", type=int, metavar="N",
                       help="tokens of text that a locate-then-edit method has the model write for its second moments "
                       "(default: 65,536)")


def presentation_arguments(parser: argparse.ArgumentParser) -> None:
    """--present-until and --max-presentations."""
    group = parser.add_argument_group("presentations, where a batch may be presented more than once")
    group.add_argument("--present-until", type=probability, metavar="P",
                       help="present a batch until the model gives every token of its answers at least this "
                       f"probability, each time the facts that lack it (default: {PRESENT_UNTIL}); 'none' or 0: a "
                       "fixed number of times, the agent's own or --steps-per-batch")
    group.add_argument("--max-presentations", type=int, metavar="N",
                       help=f"but so many times at most (default: {MAX_PRESENTATIONS}, or what was found with an "
                       "editor's step size)")


def check_editor(options: argparse.Namespace) -> None:
    """Refuse options that do not go together, before anything is read."""
    if options.max_presentations is not None:
        check_positive(options, "max_presentations")
        if options.steps_per_batch is not None or options.present_until == 0:
            other = "--steps-per-batch" if options.steps_per_batch is not None else "--present-until none"
            raise ValueError(f"--max-presentations and {other} exclude each other: a batch is presented either until "
                             "its facts have taken or a fixed number of times")
    if (options.agent is None) == (options.editor is None):
        given = "exclude each other" if options.agent else "are both missing"
        raise ValueError(f"--agent and --editor {given}; give --agent with a trained agent ('default' is one for "
                         f"{DEFAULT_MODEL}), or --editor with one of {_choices()}")
    _check_mix_up(options)
    for name in ("step_size", "statistics_tokens"):
        if options.agent and getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for --editor; a trained agent has its own")
    if options.editor:
        _named_editor(options)


def _check_mix_up(options: argparse.Namespace) -> None:
    """Refuse an editor's name as an agent, and an agent as an editor."""
    from agents.running.editors import EDITORS, SHORT_NAMES

    if options.agent in (*EDITORS, *SHORT_NAMES) and not Path(options.agent).exists():
        raise ValueError(f"--agent {options.agent} is the name of an editor: give --editor {options.agent}")
    if options.editor and (options.editor == "default" or Path(options.editor).is_dir()):
        raise ValueError(f"--editor {options.editor} is a trained agent: give --agent {options.editor}")


def _choices() -> str:
    from agents.running.editors import SHORT_NAMES, training_free_editors

    return ", ".join([*training_free_editors(), *SHORT_NAMES])


def _named_editor(options: argparse.Namespace) -> Editor:
    """The editor of --editor, with its published numbers.

    Raises:
        ValueError: it is unknown, has to be trained, or the other options are not for it.
    """
    from agents.running.editors import find_editor

    editor = find_editor(options.editor)
    if not editor.training_free:
        raise ValueError(f"--editor {options.editor} has to be trained before it edits: train an agent with 'rledit "
                         f"train' and name it with --agent, or take one that needs no training: {_choices()}")
    if options.step_size is not None:
        if not editor.step_size:
            raise ValueError(f"--step-size: {editor.name} has none; leave it out")
        if not 0 < options.step_size < float("inf"):
            raise ValueError(f"--step-size is {options.step_size:g}; give a positive number")
    if options.statistics_tokens is not None and editor.group != "locate":
        raise ValueError(f"--statistics-tokens: {editor.name} needs no text; leave it out")
    return editor


def trained_agent(options: argparse.Namespace, facts: Facts) -> Editing:
    """The agent of --agent, with the model and the settings that it was trained with unless others are given."""
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
        lm = EditableLM.load(model, modules, options.dtype, options.device, **model_source(options, trained))
    facts = _as_asked(facts, lm, options)
    with warnings.catch_warnings():
        if options.warm_up:
            warnings.simplefilter("ignore", MissingMomentsWarning)
        agent = load_agent(folder, _environment(lm, facts.dataset, settings["token"]))
    bundled_start = options.warm_up and start_warm(agent, lm, settings["token"])
    _say_what_is_edited(lm, facts.dataset)
    print(f"agent  {folder}", flush=True)
    identity: dict[str, Any] = {"agent": {path.name: sha256_of(path) for path in sorted(folder.glob("agent.*"))}}
    notes: tuple[str, ...] = ()
    if bundled_start:
        identity["warm_up"] = True
        notes = ("the agent has no moments of training facts, and starts from those of bundled ones",)
    return Editing(lm, agent, facts, settings, identity, {"agent": str(folder)}, notes)


def training_free(options: argparse.Namespace, facts: Facts) -> Editing:
    """The editor of --editor, for any model; its strength is given, recorded in the ledger, or found."""
    from agents.running.comparison import Views
    from agents.running.editors import configured, find_configs, load_configs

    model = options.model or DEFAULT_MODEL
    editor = configured(_named_editor(options), load_configs(find_configs(model), facts.dataset.kind))
    editor = _with_options(editor, options)
    _check_subjects(editor, facts.dataset)
    settings = _settings(options, editor.env, facts, repeated=max(editor.presentations) > 1)
    say_loading(model)
    lm = Views(model, options.dtype, options.device, **model_source(options)).of(editor, options.edit_modules)
    facts = _as_asked(facts, lm, options)
    _check_statistics(editor, lm, options)
    _say_what_is_edited(lm, facts.dataset)
    editor, search = _with_strength(editor, options, lm, facts.dataset, settings)
    settings["steps_per_batch"] = editor.env["steps_per_batch"]
    agent = editor.agent_class()(_environment(lm, facts.dataset, settings["token"]), editor.configuration())
    strength = _strength(editor)
    with_what = f", step size {strength['step_size']:g}" if strength else ""
    most = "at most " if "present_until" in settings else ""
    print(f"editor {editor.title}{with_what}, {most}{_presentations(settings['steps_per_batch'])} of a batch, at the "
          f"tokens {settings['token']!r}")
    modules = list(lm.module_shapes)
    print(f"       edits {modules[0]}" + (f" to {modules[-1]}" if len(modules) > 1 else ""), flush=True)
    _get_ready(editor, agent, lm)
    config = json.loads(json.dumps(asdict(editor.configuration()))) if editor.config else {}
    probe = json.loads(json.dumps(search.as_dict())) if search else None
    identity = {"editor": editor.name, **strength, "probe": probe, **{f"editor.{k}": v for k, v in config.items()}}
    described = {"name": editor.name, **strength, "config": config, "probe": probe}
    mend = "Give a smaller --step-size or another --editor" if strength else "Take another --editor"
    return Editing(lm, agent, facts, settings, identity, {"agent": None, "editor": described}, mend=mend)


def _as_asked(facts: Facts, lm: EditableLM, options: argparse.Namespace) -> Facts:
    """The facts, with --chat in the model's chat template or both ways, and with --on-error skip without those that do
    not fit it or the model's context.

    Raises:
        ValueError: a fact does not fit; with --on-error skip, none does.
    """
    from rledit_env.encoding import encode
    from rledit_env.lm.chat import ChatTemplate

    template = ChatTemplate(lm.tokenizer, lm.name) if options.chat else None
    skips = options.on_error == "skip"
    records: list[EditRecord] = []
    reasons: list[str] = []
    for record in facts.dataset:
        try:
            shown = template.asked(record, options.chat) if template else (record,)
            if skips:  # where nothing is skipped, the environment checks the lengths
                for one in shown:
                    encode(lm, one)
        except ValueError as error:
            if not skips:
                raise
            reasons.append(str(error))
        else:
            records.extend(shown)
    if not records:
        raise ValueError(f"no fact fits {lm.name}; the first one: {reasons[0]}")
    skipped = dict(facts.dataset.skipped)
    if reasons:
        warn(f"warning: facts that do not fit {lm.name} are skipped: {len(reasons)}; the first one: {reasons[0]}")
        skipped["too long or unfit for the chat template"] = len(reasons)
    return replace(facts, dataset=replace(facts.dataset, records=tuple(records), skipped=skipped))


def _settings(options: argparse.Namespace, own: Any, facts: Facts, repeated: bool) -> dict[str, Any]:
    """How the facts are shown: as the options say, else as the ledger to be resumed recorded, or as the agent or editor
    itself does; ``repeated`` says whether it presents a batch more than once.

    Raises:
        ValueError: it presents a batch once, and is to present it until its facts have taken.
    """
    recorded = _recorded_settings(options)
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
    settings = {
        "token": options.token or own.get("token", "answer"),
        "steps_per_batch": count,
        **({"present_until": until} if until else {}),
        **({"contexts": contexts} if contexts else {}),
        "batch_size": min(option_or(options.batch_size, own.get("batch_size", BATCH_SIZE)), len(facts.dataset)),
    }
    check_positive(argparse.Namespace(**settings), "batch_size", "steps_per_batch")
    return settings


def _environment(lm: EditableLM, facts: KnowledgeDataset, token: str) -> Any:
    from rledit_env.env import LifelongEditEnv

    return LifelongEditEnv(
        facts.kind, lm, data=facts, num_batches=1, batch_size=1, token=token, reward="none", array_backend="torch"
    )


def _say_what_is_edited(lm: EditableLM, facts: KnowledgeDataset) -> None:
    print(f"facts  {len(facts)} of {facts.source} (read as {facts.kind})", *skipped_rows(facts))
    print(f"model  {lm.name} ({dtype_name(lm)}, {lm.device}), {len(lm.module_shapes)} modules", flush=True)


# -- an editor's configuration -------------------------------------------------------------------------------------


def _with_options(editor: Editor, options: argparse.Namespace) -> Editor:
    """The editor with what the options say of its configuration."""
    from agents.running.editors import merged

    config = editor.configuration()
    more: dict[str, Any] = {}
    if config is not None and "warm_up" in {f.name for f in fields(config)}:
        more["warm_up"] = options.warm_up  # a single fact, too, is to take
    if options.statistics_tokens is not None:
        more["corpus_tokens"] = options.statistics_tokens
    return replace(editor, settings=merged(editor.settings, more))


def _check_subjects(editor: Editor, facts: KnowledgeDataset) -> None:
    """Refuse facts that a method cannot edit since it edits at their subjects."""
    if editor.group != "locate":
        return
    without = [r for r in facts if not r.subject_span]
    if without:
        raise ValueError(f"{without[0].origin}: {editor.name} edits at a fact's subject, and {len(without)} of "
                         f"{len(facts)} facts name none, such as {without[0].prompt!r}; add \"subject\" to each, as it "
                         "is written in the prompt, or take an editor that needs none, such as --editor ultraedit")


def _check_statistics(editor: Editor, lm: EditableLM, options: argparse.Namespace) -> None:
    """Refuse a text that is too short for second moments of full rank."""
    tokens, widest = options.statistics_tokens, max(shape[0] for shape in lm.module_shapes.values())
    if tokens is not None and not editor.configuration().needs_statistics:
        raise ValueError(f"--statistics-tokens: {editor.name} as configured for {lm.name} takes no second moments "
                         "(second_moment is false); leave it out")
    if editor.group == "locate" and tokens is not None and tokens <= widest:
        raise ValueError(f"--statistics-tokens is {tokens}; second moments of {widest} inputs need more tokens, "
                         f"better {16 * widest}")


def _strength(editor: Editor) -> dict[str, float]:
    """The editor's step size, where it has one."""
    from agents.running.editors import configured_step_size

    return {"step_size": configured_step_size(editor)} if editor.step_size else {}


def _with_strength(
    editor: Editor, options: argparse.Namespace, lm: EditableLM, facts: KnowledgeDataset, settings: dict[str, Any]
) -> tuple[Editor, StrengthSearch | None]:
    """The editor with the step size and the presentations that are given, that the ledger to be resumed recorded, or
    that are found on a few of the facts."""
    from agents.running.editors import with_step_size
    from agents.running.strength import StrengthSearch

    recorded = _recorded(editor, options)
    if not editor.step_size:
        return replace(editor, env={**editor.env, "steps_per_batch": settings["steps_per_batch"]}), None
    if recorded is not None:
        print(f"step size and presentations are those that {options.ledger} recorded")
        search = StrengthSearch.from_dict(recorded["probe"]) if recorded["probe"] else None
        return with_step_size(editor, recorded["step_size"], settings["steps_per_batch"]), search
    if options.step_size is not None:
        return with_step_size(editor, options.step_size, settings["steps_per_batch"]), None
    search = _probed(editor, options, lm, facts, settings)
    return with_step_size(editor, search.chosen.step_size, search.chosen.steps_per_batch), search


def _recorded(editor: Editor, options: argparse.Namespace) -> dict[str, Any] | None:
    """The settings of the ledger that is to be resumed; None where there is none yet.

    Raises:
        LedgerError: it records a run of somebody else.
    """
    from rledit_env.ledger import LedgerError

    recorded = _recorded_settings(options)
    if recorded is None:
        return None
    given = {"editor": editor.name} | ({} if options.step_size is None else {"step_size": options.step_size})
    for name, value in given.items():
        if recorded.get(name) != value:
            raise LedgerError(f"{options.ledger} records another run (--{name.replace('_', '-')}: "
                              f"{recorded.get(name, 'none')} there, {value} here); give the same, or another --ledger")
    return recorded


def _recorded_settings(options: argparse.Namespace) -> dict[str, Any] | None:
    """What the ledger that is to be resumed was begun with; None where there is none yet."""
    from rledit_env.ledger import HEADER, EditLedger

    if not options.resume or options.ledger is None or not (options.ledger / HEADER).exists():
        return None
    settings: dict[str, Any] = EditLedger(options.ledger).header["settings"]
    return settings


# -- its strength --------------------------------------------------------------------------------------------------


def _probed(
    editor: Editor, options: argparse.Namespace, lm: EditableLM, facts: KnowledgeDataset, settings: dict[str, Any]
) -> StrengthSearch:
    """Find the strength on a few of the facts, and say what was tried and chosen."""
    from agents.running.strength import KL_BOUND, SECONDS, StrengthProbe, some_facts

    few = some_facts(facts)
    bound = KL_BOUND if options.drift_bound is None else options.drift_bound
    print(f"no step size is given: {editor.title} is tried on {len(few)} of the facts, for about {SECONDS:.0f} seconds",
          flush=True)
    with progress_bar(None, "probing", "trial") as bar:
        def advance(trial: Trial) -> None:
            bar.set_postfix(step_size=f"{trial.step_size:.3g}", took=f"{trial.taken} of {len(few)}")
            bar.update()

        probe = StrengthProbe(lm, editor, few, settings["token"], settings["batch_size"], bound,
                              guarded=options.drift_bound is not None, progress=advance,
                              present_until=settings.get("present_until"),
                              contexts=settings.get("contexts", 0))
        chosen = options.steps_per_batch is not None or options.max_presentations is not None
        search = probe.search((settings["steps_per_batch"],) if chosen else editor.presentations)
    _say_search(search)
    return search


def _say_search(search: StrengthSearch) -> None:
    from rledit_env.reporting import text_table

    rows = [
        [t.steps_per_batch, f"{t.step_size:.3g}", f"{t.taken} of {search.facts}",
         "too far" if t.kl is None else f"{t.kl:.4f}", "chosen" if t == search.chosen else ""]
        for t in sorted(search.trials, key=lambda t: (t.steps_per_batch, t.step_size))
    ]  # fmt: skip
    print(text_table(["presentations", "step size", "facts that took", "KL on own text", ""], rows))
    early = "" if search.complete else "; the time was up before all was tried"
    print(f"chosen: step size {search.chosen.step_size:.3g}, {_presentations(search.chosen.steps_per_batch)}: "
          f"{search.reason} ({search.seconds:.0f} s{early})", flush=True)
    if search.chosen.taken < search.facts:
        warn(f"note: with no strength tried do all {search.facts} facts take within {search.bound:g} nats a token; try "
             "another --editor or other --edit-modules, allow more with --drift-bound, or train an agent with 'rledit "
             "train'")


def _get_ready(editor: Editor, agent: Agent, lm: EditableLM) -> None:
    """What the editor needs once per model; what takes long is said beforehand."""
    config = editor.configuration()
    if editor.group == "locate" and config.needs_statistics:
        from agents.key_statistics import expected_seconds

        seconds = expected_seconds(lm, list(lm.module_shapes), config.corpus_tokens)
        if seconds:
            print(f"once for this model: second moments of {len(lm.module_shapes)} modules' inputs over "
                  f"{config.corpus_tokens:,} tokens of text that the model writes, about {_duration(seconds)}",
                  flush=True)
    started = time.perf_counter()
    agent.learn(0)
    if time.perf_counter() - started > 1:
        print(f"ready after {_duration(time.perf_counter() - started)}", flush=True)


def _presentations(count: int) -> str:
    return "1 presentation" if count == 1 else f"{count} presentations"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"

