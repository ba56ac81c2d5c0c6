"""Whatever the README tells a reader to run is run: Python and `rledit` here, on a tiny model; the rest by CI."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from documented import ROOT, Block, blocks, commands, shortened, shortened_command, write_tiny_model

import rledit_env
from rledit_env import cli

README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = blocks(README)


def commands_of_the_readme() -> list[str]:
    return [command for block in BLOCKS if block.language == "sh" for command in commands(block)]


def dry_run_of_ci() -> str:
    """Everything that `.ci/run` does by way of the Makefile."""
    targets = re.findall(r"^ *part make ([\w-]+)", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    return subprocess.run(["make", "-n", "-B", *targets], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with the files that the README shows."""
    for block in BLOCKS:
        if block.name:
            (tmp_path / block.name).write_text(block.text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=lambda b: f"line {b.line}")
def test_python_of_the_readme_runs(block: Block, workplace: Path) -> None:
    code = compile(shortened(block.text), f"README.md, line {block.line}", "exec")
    exec(code, {"__name__": "__main__"})


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
    write_tiny_model(workplace / "tiny")
    for command in commands_of_the_readme():
        if command.startswith("rledit "):
            code = cli.main(shortened_command(command, workplace / "tiny"))
            assert code == 0, f"{command} failed:\n{capsys.readouterr()}"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("command", [c for c in commands_of_the_readme() if not c.startswith("rledit ")])
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


def test_the_badges_say_what_the_package_says() -> None:
    setup = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    for badge, field in (("licence", "license_expression"), ("python", "python_requires")):
        picture = (ROOT / "docs" / "assets" / f"{badge}.svg").read_text(encoding="utf-8")
        value = re.search(rf"^{field} = (.+)$", setup, re.MULTILINE)
        assert f"docs/assets/{badge}.svg" in TEXT and value is not None
        assert f"<title>{badge}: {value[1]}</title>" in picture.replace("&gt;", ">")


def test_links_to_the_repository_lead_somewhere() -> None:
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", TEXT) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
