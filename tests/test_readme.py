"""Whatever the README tells a reader to run is run: Python and `rledit` here, on a tiny model; the rest by CI."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import rledit_env
from rledit_env import cli
from rledit_env.lm.loading.registry import MODELS
from rledit_env.lm.loading.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# What makes an example short: the same code and commands with other values.
SHORT_PYTHON = {
    r'model="smollm2-135m"': 'model="tiny-llama"',
    r"num_batches=\d+": "num_batches=2",
    r"batch_size=\d+": "batch_size=2",
    r"total_timesteps=\d+": "total_timesteps=8",
    r'"model": "smollm2-135m", "num_batches": \d+': '"model": "tiny-llama", "num_batches": 2',
    r"streams=32": "streams=2",
    r"n_steps=\d+, batch_size=2": "n_steps=4, batch_size=4",
    r"range\(20\)": "range(2)",
}
SHORT_RLEDIT = {
    "fetch": "",
    "train": "--model tiny-llama --num-batches 2 --batch-size 2 --trajectories 1",
    "evaluate": "--model tiny-llama --num-batches 2 --batch-size 2",
    "edit": "--model tiny-llama",
    "probe": "--model tiny-llama --num-batches 1 --batch-size 2 --step-sizes 0.01 --layer-stride 4 --run-lengths 2 "
             "--finalists 1",
    "compare": "--model tiny-llama --batches 2 --batch-size 2 --seeds 1 --no-generate",
    "report": "",
    "ledger": "",
}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, what stands behind it, its text, and the line it begins on."""

    language: str
    name: str
    text: str
    line: int


def blocks(language: str) -> list[Block]:
    found = re.finditer(r"^```(\w+)[ ]?(\S*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    every = [Block(m[1], m[2], m[3], README.count("\n", 0, m.start()) + 2) for m in found]
    assert len(every) * 2 == len(re.findall(r"^```", README, re.MULTILINE)), "a block has no language"
    return [block for block in every if block.language == language]


def commands() -> list[str]:
    """All shell commands, without their comments."""
    text = "\n".join(block.text for block in blocks("sh")).replace("\\\n", " ")
    return [line for raw in text.splitlines() if (line := re.sub(r"(^|\s+)#.*", "", raw).strip())]


def dry_run_of_ci() -> str:
    """Everything that `.ci/run` does by way of the Makefile."""
    targets = re.findall(r"^ *part make ([\w-]+)", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    return subprocess.run(["make", "-n", "-B", *targets], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with the files that the README shows."""
    for block in blocks("json"):
        (tmp_path / block.name).write_text(block.text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: f"line {block.line}")
def test_python_of_the_readme_runs(block: Block, workplace: Path) -> None:
    code = block.text
    for pattern, short in SHORT_PYTHON.items():
        code = re.sub(pattern, short, code)
    exec(compile(code, f"README.md, line {block.line}", "exec"), {"__name__": "__main__"})


def test_the_rledit_command_is_installed() -> None:
    script = Path(sys.executable).with_name("rledit")
    program = [str(script)] if script.exists() else [sys.executable, "-m", "rledit_env.cli"]
    done = subprocess.run(
        [*program, "--version"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.stdout == f"rledit-env {rledit_env.__version__}\n", done.stderr


def test_rledit_commands_of_the_readme_run_one_after_another(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = workplace / "tiny"
    tiny_model("tiny-llama").save_pretrained(tiny)
    tiny_tokenizer("tiny-llama").save_pretrained(tiny)
    mine = [shlex.split(command) for command in commands() if command.startswith("rledit ")]
    assert {arguments[1] for arguments in mine} == set(SHORT_RLEDIT), "every command is in the README once at least"
    for _, verb, *arguments in mine:
        if verb == "fetch":  # the tiny models are not fetched; a folder is the least that is
            arguments = [str(tiny)]
        code = cli.main([verb, *arguments, *shlex.split(SHORT_RLEDIT[verb])])
        assert code == 0, f"rledit {verb} failed:\n{capsys.readouterr()}"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("command", [c for c in commands() if not c.startswith("rledit ")])
def test_every_other_command_of_the_readme_is_run_by_ci(command: str) -> None:
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    if command == "bash .ci/run":
        assert os.access(ROOT / ".ci" / "run", os.X_OK)
        subprocess.run(["bash", "-n", ".ci/run"], cwd=ROOT, check=True)
    elif command.startswith(". .venv/"):
        assert re.search(r"^VENV +\?= \.venv$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    elif command.startswith("make "):
        dry = subprocess.run(["make", "-n", *command.split()[1:]], cwd=ROOT, capture_output=True, text=True)
        assert dry.returncode == 0, dry.stderr
        parts = set(dry.stdout.splitlines()) <= set(dry_run_of_ci().splitlines())
        assert f"\npart {command}" in ci or parts, f"CI runs no '{command}'"
    else:
        typed = dry_run_of_ci().replace(".venv/bin/python -m pip", "pip").replace(".venv/bin/python", "python")
        assert command in typed, f"CI runs no '{command}'"


def test_links_to_the_repository_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_readme_names_every_model_of_the_registry() -> None:
    assert [name for name in MODELS if f'"{name}"' not in README] == []
