"""Prepares what `rledit evaluate` evaluates: a trained agent (--agent), or an editor without training (--editor), in
its environment."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import gymnasium as gym

from rledit_env.cli.command import (
    check_contexts,
    check_positive,
    check_text_is_no_prior,
    kind_of,
    model_name,
    model_source,
    option_or,
    say_loading,
)
from rledit_env.cli.editor_options import DEFAULT_MODEL
from rledit_env.type_aliases import JsonObject, Settings

if TYPE_CHECKING:
    from agents import Agent
    from agents.running.editors import Editor
    from rledit_env.interface import EditingEnv, Environment
    from rledit_env.knowledge import EditRecord
    from rledit_env.ledger import EditLedger


def agent_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --agent, --editor and --strength."""
    parser.add_argument("--agent", metavar="RUN",
                        help="a trained agent: a run's folder (its best agent is taken), an agent's folder, or "
                        "'default', the agent that ships with the package for the kind of facts")
    parser.add_argument("--editor", metavar="NAME",
                        help="instead of an agent, an editor of 'rledit compare' that needs no training, with the "
                        "settings that ship for the model (agents/configs)")
    parser.add_argument("--strength", type=float, metavar="FACTOR",
                        help="factor of the agent's or editor's strength: step size, λ or learning rate (default: 1)")


@dataclass(frozen=True)
class Evaluated:
    """An agent in the environment that it edits in.

    Attributes:
        name: the agent's folder, or the editor's name.
        agent: the agent, ready to edit.
        env: the environment.
        inner: the environment without its wrappers.
        env_id: the environment's id.
        settings: the environment's settings.
        editor: the editor's description; None for a trained agent.
        identity: what a run recorded in a ledger must share to be resumed, beside the environment's settings.
    """

    name: str
    agent: Agent
    env: Environment
    inner: EditingEnv
    env_id: str
    settings: Settings
    editor: JsonObject | None
    identity: JsonObject


def check_agent(options: argparse.Namespace) -> None:
    """Raise ValueError for options of the agent that exclude each other, before anything is read."""
    from agents.running.editors import find_editor, training_free_editors

    if (options.agent is None) == (options.editor is None):
        problem = "exclude each other" if options.agent else "are both missing"
        raise ValueError(f"--agent and --editor {problem}; give --agent with a trained agent ('default' is one for "
                         f"{DEFAULT_MODEL}), or --editor with one of {', '.join(training_free_editors())}")
    if options.editor is not None:
        editor = find_editor(options.editor)
        if not editor.training_free:
            raise ValueError(f"--editor {editor.name} has to be trained before it edits: train an agent with 'rledit "
                             "train' and name it with --agent, or take one that needs no training: "
                             f"{', '.join(training_free_editors())}")
        if options.env is None:
            raise ValueError(f"--editor {editor.name} says nothing of the environment; name one with --env")
    if options.strength is not None and not 0 < options.strength < float("inf"):
        raise ValueError(f"--strength is {options.strength:g}; give a positive number")


def evaluated(options: argparse.Namespace) -> Evaluated:
    """The agent or the editor of the options, in its environment."""
    return _editor(options) if options.editor is not None else _trained(options)


def _trained(options: argparse.Namespace) -> Evaluated:
    """The agent of --agent, with its training's model and settings unless the options override them."""
    from agents import agent_settings, find_agent, load_agent
    from agents.rledit.agent import RLEditAgent
    from agents.running.saved import modules_of
    from rledit_env.files import sha256_of
    from rledit_env.interface import editing_env

    folder = find_agent(options.agent, kind_of(options.env) if options.env else None)
    trained = agent_settings(folder)["environment"]
    env_id = options.env or trained.get("id")
    if not env_id:
        raise ValueError(f"{folder} does not say which environment it was trained in; name one with --env")
    model = model_name(options, trained, folder)
    settings = _settings(options, trained, model, model_source(options, trained))
    say_loading(model)
    with nullcontext() if options.edit_modules else modules_of(folder, model):
        env = _environment(options, env_id, settings)
    agent = load_agent(folder, env)
    check_text_is_no_prior(options, getattr(agent, "config", None))
    if options.strength not in (None, 1.0):
        if not isinstance(agent, RLEditAgent):
            raise ValueError(f"--strength {options.strength:g}: {folder} is a {type(agent).__name__}, which has no "
                             "step sizes to multiply; leave it out")
        agent.scale_step_sizes(options.strength)
    identity: JsonObject = {"agent": {path.name: sha256_of(path) for path in sorted(folder.glob("agent.*"))}}
    return Evaluated(str(folder), agent, env, editing_env(env), env_id, settings, None, identity)


def _editor(options: argparse.Namespace) -> Evaluated:
    """The editor of --editor, with the hyperparameters that ship for the model."""
    from agents.running.comparison import Views
    from agents.running.editors import configured, find_configs, find_editor, load_configs, with_strength
    from rledit_env.interface import editing_env

    model, env_id = options.model or DEFAULT_MODEL, options.env
    editor: Editor = configured(find_editor(options.editor), load_configs(find_configs(model), kind_of(env_id)))
    if options.strength is not None:
        editor = with_strength(editor, options.strength)
    check_text_is_no_prior(options, editor.configuration())
    source = model_source(options)
    settings = _settings(options, dict(editor.env), model, source)
    say_loading(model)
    lm = Views(model, options.dtype, options.device, **source).of(editor, options.edit_modules)
    of_loading = {"model", "edit_modules", *source}
    env = _environment(options, env_id, {"model": lm, **{k: v for k, v in settings.items() if k not in of_loading}})
    agent = editor.agent_class()(env, editor.configuration())
    agent.learn(0)
    settings = {**settings, "edit_modules": list(lm.module_shapes)}
    description = editor.description()
    return Evaluated(editor.label, agent, env, editing_env(env), env_id, settings, description, {"editor": description})


def _settings(options: argparse.Namespace, own: JsonObject, model: str, source: Settings) -> Settings:
    """The environment's settings: those of the options, or else the agent's or editor's own.

    Raises:
        ValueError: an option is below 1, or the environment refuses it.
    """
    check_positive(options, "num_batches", "batch_size")
    until = own.get("present_until") if options.steps_per_batch is None else None
    if options.present_until is not None:
        until = options.present_until or None
    settings: Settings = {
        "model": model,
        **source,
        "edit_modules": options.edit_modules or own.get("edit_modules"),
        "split": options.split,
        "num_batches": options.num_batches,
        "batch_size": options.batch_size,
        "token": options.token or own.get("token", "answer"),
        "steps_per_batch": options.steps_per_batch or own.get("steps_per_batch", 1),
        "present_until": until,
        "contexts": option_or(options.contexts, own.get("contexts", 0)),
    }
    check_contexts(settings["contexts"], settings["token"])
    return settings


def _environment(options: argparse.Namespace, env_id: str, settings: Settings) -> Environment:
    """The environment in which the agent edits."""
    loading = {"device": options.device, "dtype": options.dtype} if isinstance(settings["model"], str) else {}
    return gym.make(
        env_id, data=options.data, on_error=options.on_error, reward="none", array_backend="torch",
        disable_env_checker=True, **loading, **settings,
    )


def run_ledger(options: argparse.Namespace, run: Evaluated) -> EditLedger:
    """The run's ledger, new or resumed. A resumed run must have the same facts, agent, settings and measurements."""
    from rledit_env.ledger import EditLedger

    measured = ("seed", "metrics", "score_every", "score_facts", "general", "general_every", "general_shots",
                "general_limit", "text", "retention", "retention_every")  # fmt: skip
    settings = {
        "evaluation": run.env_id, **run.settings, "facts": facts_hash(run.inner.dataset), **run.identity,
        "strength": options.strength or 1.0, **{name: getattr(options, name) for name in measured},
    }  # fmt: skip
    return EditLedger.resume(options.ledger, run.inner.lm, settings)


def facts_hash(records: Sequence[EditRecord]) -> str:
    """SHA-256 (hexadecimal) of facts, in their order."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps([record.prompt, record.target, record.subject]).encode() + b"\n")
    return digest.hexdigest()
