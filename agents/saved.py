"""Finds and loads saved agents: a run's folder, an agent's own, or the one that ships with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym

from agents.alphaedit import AlphaEditAgent
from agents.base import Agent
from agents.baselines import FineTuningAgent, NoEditAgent
from agents.dafnet import DAFNetAgent
from agents.files import built_from, read_description
from agents.ft_l import FTLAgent
from agents.malmen import MALMENAgent
from agents.memit import MEMITAgent
from agents.mend import MENDAgent
from agents.ppo import StandardAgent
from agents.prune import PRUNEAgent
from agents.random_search import RandomSearchAgent
from agents.rect import RECTAgent
from agents.rledit import RLEditAgent
from agents.rome import ROMEAgent
from agents.ultraedit import UltraEditAgent

PRETRAINED = Path(__file__).parent / "pretrained"
DEFAULT = "default"  # names the agent that ships with the package
CLASSES: dict[str, type[Agent]] = {
    "rledit": RLEditAgent,
    "standard": StandardAgent,
    "random search": RandomSearchAgent,
    "none": NoEditAgent,
    "fine-tuning": FineTuningAgent,
    "dafnet": DAFNetAgent,
    "ft-l": FTLAgent,
    "malmen": MALMENAgent,
    "mend": MENDAgent,
    "ultraedit": UltraEditAgent,
    **{agent.name: agent for agent in (ROMEAgent, MEMITAgent, PRUNEAgent, RECTAgent, AlphaEditAgent)},
}


def find_agent(name: str | Path) -> Path:
    """The folder of a saved agent.

    Args:
        name: an agent's folder; a run's folder, whose ``best`` is taken, else its ``last``; or "default", the agent
            that ships with the package.

    Raises:
        FileNotFoundError: there is none.
    """
    if str(name) == DEFAULT:
        found = sorted(path.parent for path in [PRETRAINED / "agent.json", *PRETRAINED.glob("*/agent.json")]
                       if path.exists())
        if not found:
            raise FileNotFoundError(
                "this installation ships no trained agent; train one with 'rledit train' and give its folder"
            )
        return found[0]
    folder = Path(name).expanduser()
    for candidate in (folder, folder / "best", folder / "last"):
        if (candidate / "agent.json").exists():
            return candidate
    what = "holds no agent (no agent.json, best or last)" if folder.is_dir() else "does not exist"
    raise FileNotFoundError(
        f"{folder} {what}; give the folder that 'rledit train' wrote, or 'default' for the agent that ships with the "
        "package"
    )


def agent_settings(folder: str | Path) -> dict[str, Any]:
    """What a saved agent says of itself: its class, configuration, and ``environment``, which it was trained in.

    Raises:
        FileNotFoundError: there is no agent there.
        ValueError: the file is damaged.
    """
    settings = read_description(folder)
    return {**settings, "environment": settings.get("environment") or {}}


def load_agent(folder: str | Path, env: gym.Env | None = None) -> Agent:
    """The agent in a folder, whatever its class.

    Raises:
        FileNotFoundError: there is no agent there.
        ValueError: its class is unknown, or it was trained for other modules than the environment's.
    """
    name = agent_settings(folder).get("agent")
    if not isinstance(name, str) or name not in CLASSES:
        raise ValueError(f"{folder} holds an agent of the class {name!r}; known are {', '.join(CLASSES)}")
    with built_from(folder):
        return CLASSES[name].load(folder, env)
