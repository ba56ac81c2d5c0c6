"""Finds and loads saved agents: by a run's folder, an agent's folder, or the name of the agents that ship."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from agents.base import Agent, module_shapes
from agents.files import built_from, read_description
from agents.running.editors import EDITORS
from agents.sb3 import RandomSearchAgent, StandardAgent
from rledit_env.interface import Environment, editing_env
from rledit_env.lm.names import UnknownModules
from rledit_env.type_aliases import JsonObject

PRETRAINED = Path(__file__).parents[1] / "pretrained"
DEFAULT = "default"  # the name of the agents that ship with the package, at most one for each kind of facts
GENERAL = "counterfact"  # the kind whose agent also edits facts of kinds without an agent, such as a user's own
# Class name in agent.json → class: of every editor, and of the agents that learn on the low-dimensional view.
CLASSES: dict[str, type[Agent]] = {editor.agent.name: editor.agent for editor in EDITORS.values()}
CLASSES |= {StandardAgent.name: StandardAgent, RandomSearchAgent.name: RandomSearchAgent}


def find_agent(name: str | Path, kind: str | None = None) -> Path:
    """The folder of a saved agent.

    Args:
        name: an agent's folder; a run's folder, with ``best`` or else ``last`` in it; or "default", the agent that
            ships with the package.
        kind: the kind of facts that "default" is to edit: "zsre", "counterfact" or "fever". For other kinds, None, and
            kinds for which no agent ships, it is CounterFact's agent, which edits statements.

    Raises:
        FileNotFoundError: there is no such agent.
    """
    if str(name) == DEFAULT:
        by_kind = {path.parent.name: path.parent for path in sorted(PRETRAINED.rglob("agent.json"))}
        if not by_kind:
            raise FileNotFoundError(
                "this installation ships no trained agent; train one with 'rledit train' and give its folder"
            )
        return by_kind.get(str(kind)) or by_kind.get(GENERAL) or next(iter(by_kind.values()))
    folder = Path(name).expanduser()
    for candidate in (folder, folder / "best", folder / "last"):
        if (candidate / "agent.json").exists():
            return candidate
    problem = "holds no agent (no agent.json, best or last)" if folder.is_dir() else "does not exist"
    raise FileNotFoundError(
        f"{folder} {problem}; give the folder that 'rledit train' wrote, or 'default' for the agent that ships with "
        "the package"
    )


def agent_settings(folder: str | Path) -> JsonObject:
    """The content of a saved agent's ``agent.json``: its class, its configuration, and ``environment``, the settings
    of the environment that it was trained in.

    Raises:
        FileNotFoundError: the folder contains no agent.
        ValueError: the file is damaged.
    """
    settings = read_description(folder)
    return {**settings, "environment": settings.get("environment") or {}}


@contextmanager
def modules_of(folder: str | Path, model: str) -> Iterator[None]:
    """Context in which a model is loaded with the modules of a saved agent.

    Raises:
        ValueError: the model has no such modules; the agent belongs to another model.
    """
    try:
        yield
    except UnknownModules as error:
        raise ValueError(_other_model(folder, model)) from error


def _check_modules(folder: str | Path, env: Environment) -> None:
    """Raise ValueError if a saved agent has shapes of modules, and they differ from the environment's."""
    shapes = {m: tuple(shape) for m, shape in (agent_settings(folder).get("shapes") or {}).items()}
    if shapes and shapes != module_shapes(env):
        raise ValueError(_other_model(folder, editing_env(env).lm.name, module_shapes(env)))


def _other_model(folder: str | Path, model: str, model_shapes: Mapping[str, tuple[int, int]] | None = None) -> str:
    """The error message for an agent whose modules are not the model's."""
    settings = agent_settings(folder)
    trained, shapes = settings["environment"].get("model") or "another model", settings.get("shapes") or {}
    modules = list(shapes) or settings["environment"].get("edit_modules") or ["unknown"]
    example = f"{modules[0]} {tuple(shapes[modules[0]])}" if shapes else modules[0]
    edited = "has none such"
    if model_shapes:
        edited = f"edits {len(model_shapes)} such as {' '.join(map(str, next(iter(model_shapes.items()))))}"
    remedy = "leave edit_modules (--edit-modules) out, or edit" if model == trained else "edit"
    model = model or "this model"
    return (
        f"the agent in {folder} belongs to {trained} and was trained for {len(modules)} modules such as {example}; "
        f"{model} {edited}; {remedy} {model} at once, without a trained agent: rledit edit --editor ultraedit --model "
        f"{model} --facts FILE --out DIR; or train an agent for it: rledit train --model {model} --out RUN"
    )


def load_agent(folder: str | Path, env: Environment | None = None) -> Agent:
    """Load a saved agent of any class.

    Raises:
        FileNotFoundError: the folder contains no agent.
        ValueError: its class is unknown, or it was trained for other modules than the environment's, or another model.
    """
    name = agent_settings(folder).get("agent")
    if not isinstance(name, str) or name not in CLASSES:
        raise ValueError(f"{folder} holds an agent of the class {name!r}; known are {', '.join(CLASSES)}")
    with built_from(folder):
        if env is not None:
            _check_modules(folder, env)
        return CLASSES[name].load(folder, env)
