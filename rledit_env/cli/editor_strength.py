"""The strength of `rledit edit --editor`: step size and presentations, given, read from a ledger, or searched for."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from rledit_env.cli.command import progress_bar, warn
from rledit_env.type_aliases import JsonObject

if TYPE_CHECKING:
    from agents.running.editing import StreamSettings
    from agents.running.editors import Editor
    from agents.running.strength import StrengthSearch, Trial
    from rledit_env.knowledge import KnowledgeDataset
    from rledit_env.lm.editable import EditableLM


def step_size_of(editor: Editor) -> dict[str, float]:
    """{"step_size": the editor's step size}; empty if it has none."""
    from agents.running.editors import configured_step_size

    return {"step_size": configured_step_size(editor)} if editor.step_size else {}


def with_strength(
    editor: Editor, options: argparse.Namespace, lm: EditableLM, facts: KnowledgeDataset, settings: StreamSettings,
    progress: Callable[[Trial], object] | None = None,
) -> tuple[Editor, StrengthSearch | None]:  # fmt: skip
    """The editor with its step size and presentations, and the search if there was one. They are given, read from the
    ledger of the resumed run, or searched for on a few of the facts (``progress`` is called with every trial)."""
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
    search = _probed(editor, options, lm, facts, settings, progress)
    return with_step_size(editor, search.chosen.step_size, search.chosen.steps_per_batch), search


def _recorded(editor: Editor, options: argparse.Namespace) -> JsonObject | None:
    """The settings in the ledger of the resumed run; None if there is no ledger yet.

    Raises:
        LedgerError: the ledger records a run of another editor or step size.
    """
    from rledit_env.ledger import LedgerError

    recorded = recorded_settings(options)
    if recorded is None:
        return None
    current = {"editor": editor.name} | ({} if options.step_size is None else {"step_size": options.step_size})
    for name, value in current.items():
        if recorded.get(name) != value:
            raise LedgerError(f"{options.ledger} records another run (--{name.replace('_', '-')}: "
                              f"{recorded.get(name, 'none')} there, {value} here); give the same, or another --ledger")
    return recorded


def recorded_settings(options: argparse.Namespace) -> JsonObject | None:
    """The settings in the ledger of the resumed run; None if there is no ledger yet."""
    from rledit_env.ledger import HEADER, EditLedger

    if not options.resume or options.ledger is None or not (options.ledger / HEADER).exists():
        return None
    settings: JsonObject = EditLedger(options.ledger).header["settings"]
    return settings


def _probed(
    editor: Editor, options: argparse.Namespace, lm: EditableLM, facts: KnowledgeDataset, settings: StreamSettings,
    progress: Callable[[Trial], object] | None,
) -> StrengthSearch:  # fmt: skip
    """Search for the strength on a few of the facts, and print the trials and the choice."""
    from agents.running.strength import KL_BOUND, SECONDS, StrengthProbe, some_facts

    few = some_facts(facts)
    bound = KL_BOUND if options.drift_bound is None else options.drift_bound
    print(f"no step size is given: {editor.title} is tried on {len(few)} of the facts, for about {SECONDS:.0f} seconds",
          flush=True)
    with progress_bar(None, "probing", "trial") as bar:
        def advance(trial: Trial) -> None:
            bar.set_postfix(step_size=f"{trial.step_size:.3g}", took=f"{trial.taken} of {len(few)}")
            bar.update()
            if progress is not None:
                progress(trial)

        probe = StrengthProbe(lm, editor, few, settings["token"], settings["batch_size"], bound,
                              guarded=options.drift_bound is not None, progress=advance,
                              present_until=settings.get("present_until"),
                              contexts=settings.get("contexts", 0))
        fixed = options.steps_per_batch is not None or options.max_presentations is not None
        search = probe.search((settings["steps_per_batch"],) if fixed else editor.presentations)
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
    print(f"chosen: step size {search.chosen.step_size:.3g}, {times_presented(search.chosen.steps_per_batch)}: "
          f"{search.reason} ({search.seconds:.0f} s{early})", flush=True)
    if search.chosen.taken < search.facts:
        warn(f"note: with no strength tried do all {search.facts} facts take within {search.bound:g} nats a token; try "
             "another --editor or other --edit-modules, allow more with --drift-bound, or train an agent with 'rledit "
             "train'")


def times_presented(count: int) -> str:
    return "1 presentation" if count == 1 else f"{count} presentations"
