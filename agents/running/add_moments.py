"""``python -m agents.running.add_moments FOLDER``: add moments of training facts to a saved agent that has none."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym

from agents.files import read_tensors
from agents.rledit.moments import MissingMomentsWarning
from agents.rledit.normaliser import moments_state
from agents.running.saved import agent_settings, find_agent, load_agent
from rledit_env.files import write_tensors, write_text
from rledit_env.knowledge import KnowledgeDataset
from rledit_env.knowledge.source import Data


def add_to_agent(folder: str | Path, data: KnowledgeDataset | Data = "bundled", model: str | None = None) -> None:
    """Add moments of training facts to a saved agent, which its streams then start from; nothing else in its files
    changes.

    Args:
        folder: the agent's folder, or a run's.
        data: the facts that the agent was trained on (the environment's ``data``; the training split is read).
        model: the LLM that the agent edits, if the agent's file does not name it or it has moved.

    Raises:
        FileNotFoundError: there is no agent, or no data.
        ValueError: the agent's moments do not start with each stream, or its file lacks a setting of its environment.
    """
    folder = find_agent(folder)
    description = agent_settings(folder)
    env_settings = description["environment"]
    if description.get("agent") != "rledit" or description["config"]["network"].get("normaliser", "stream") != "stream":
        raise ValueError(f"the agent in {folder} does not start with its streams; it needs no moments")
    missing = [name for name in ("id", "model", "edit_modules", "token", "batch_size") if not env_settings.get(name)]
    if missing:
        raise ValueError(f"{folder} does not say its environment's {missing[0]}; call agent.gather_moments(env) with "
                         "an environment of the facts it was trained on, and save it")
    env = gym.make(
        env_settings["id"], model=model or env_settings["model"], edit_modules=env_settings["edit_modules"], data=data,
        split="train", num_batches=1, batch_size=env_settings["batch_size"], token=env_settings["token"], reward="none",
        array_backend="torch", disable_env_checker=True,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MissingMomentsWarning)
        agent: Any = load_agent(folder, env)
    agent.gather_moments(env)
    saved = read_tensors(folder / "agent.safetensors")[0]
    policy = {k: v for k, v in saved.items() if not k.startswith("stream.")}
    start = {f"stream.{k}": v for k, v in agent.network.memory_state().items()}
    moments = {f"moments.{k}": v for k, v in moments_state(agent.network.training_moments).items()}
    write_tensors(folder / "agent.safetensors", policy | moments | start)
    description["config"]["network"]["warm_up"] = True
    write_text(folder / "agent.json", json.dumps(description, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m agents.running.add_moments FOLDER``."""
    parser = argparse.ArgumentParser(
        prog="python -m agents.running.add_moments",
        description="Add moments of training facts to a saved RLEdit agent that has none, so that single facts and "
        "small batches take; its weights stay as they are.",
    )  # fmt: skip
    parser.add_argument("folder", help="the agent's folder, or a run's")
    parser.add_argument("--data", default="bundled", help="the facts that it was trained on: a file, a folder or a hub "
                        "id (default: the sample that ships with the package)")
    parser.add_argument("--model", help="registry name, hub id or folder (default: the agent's)")
    options = parser.parse_args(arguments)
    try:
        add_to_agent(options.folder, options.data, options.model)
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"written: {options.folder}, whose streams now start from moments of training facts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
