"""What must work where the wheel is installed: `tests/wheel.py` runs this there, isolated from the checkout."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import agents
import rledit_env
from agents.running.editors import find_configs, load_configs
from rledit_env.knowledge import load_knowledge
from rledit_env.reporting import Report

KINDS = ("zsre", "counterfact", "fever")


def check(condition: object, message: str) -> None:
    if not condition:
        raise SystemExit(message)


def main() -> None:
    for package in (rledit_env, agents):
        folder = Path(package.__file__).parent
        check(folder.is_relative_to(sys.prefix), f"{package.__name__} is {folder}, not in {sys.prefix}")
        check((folder / "py.typed").exists(), f"{package.__name__} has no py.typed")
    check(version("rledit-env") == rledit_env.__version__, f"rledit-env's metadata says {version('rledit-env')}")
    for kind in KINDS:
        for split in ("train", "eval"):
            check(len(load_knowledge(kind, split=split)) > 0, f"no bundled facts: {kind}, {split}")
        folder = agents.find_agent("default", kind)
        check(folder.name == kind, f"no agent for {kind}: {folder}")
        agents.load_agent(folder)
    check(load_configs(find_configs("smollm2-135m"), "zsre"), "no hyperparameters for smollm2-135m")
    check("<html" in Report("A page").html(), "no page from the template")


if __name__ == "__main__":
    main()
