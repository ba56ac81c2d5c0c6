"""Whatever the documentation tells a reader to run is run: each page from top to bottom, on a tiny model."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from documented import NOT_RUN, PAGES, ROOT, SHORT_RLEDIT, Block, blocks, commands, shortened, shortened_command
from documented import write_tiny_model as tiny_folder
from scripts import run_script

import agents
from rledit_env import cli
from rledit_env.lm.loading.registry import MODELS

README = ROOT / "README.md"
SHORT = ("--model", "tiny-llama", "--num-batches", "2", "--batch-size", "2")
SHORT_SCRIPTS: dict[str, tuple[str, ...]] = {
    "examples/quickstart.py": SHORT,
    "examples/custom_policy.py": (*SHORT, "--updates", "1"),
    "examples/edit_my_model.py": ("--model", "tiny-llama", "--max-presentations", "2"),
    "examples/train_rledit.py": (*SHORT, "--trajectories", "1", "--eval-every", "1"),
    "examples/demo.py": ("--quick",),
    "examples/ppo_single_file.py": (
        *SHORT, "--streams", "2", "--total-timesteps", "20", "--num-steps", "8", "--minibatch-size", "4",
        "--update-epochs", "1",
    ),
}
# Languages of blocks that show something and are not run.
SHOWN = {"text", "mermaid", "bibtex", "console"}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def is_run(page: Path) -> bool:
    return any(b.language in ("python", "sh") and not b.not_run for b in blocks(page))


@pytest.mark.parametrize("page", [p for p in PAGES if is_run(p)], ids=name_of)
def test_page_of_the_documentation_runs_from_top_to_bottom(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_folder(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.name:
            (tmp_path / block.name).write_text(shortened(block.text), encoding="utf-8")
        if block.language == "python" and not block.not_run:
            exec(compile(shortened(block.text), f"{name_of(page)}, line {block.line}", "exec"), namespace)
        if block.language == "sh" and not block.not_run:
            for command in commands(block):
                run_command(command, f"{name_of(page)}, line {block.line}", capsys)


def run_command(command: str, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command of a page in this process; what installs the project, or runs its checks, is for CI."""
    first, *rest = command.split()
    if first == "rledit":
        code = cli.main(shortened_command(command, Path("tiny")))
        assert code == 0, f"{place}: {command} failed:\n{capsys.readouterr()}"
    elif first == "python" and rest[0] in SHORT_SCRIPTS:
        done = run_script(ROOT / rest[0], *rest[1:], *SHORT_SCRIPTS[rest[0]])
        assert done.code == 0, f"{place}: {command} failed:\n{done.stdout}{done.stderr}"
    elif first == "make":
        dry = subprocess.run(["make", "-n", *rest], cwd=ROOT, capture_output=True, text=True)
        assert dry.returncode == 0, f"{place}: {dry.stderr}"
    else:
        assert command in readme_commands(), f"{place}: nothing runs '{command}'; mark the block as not run"


def readme_commands() -> list[str]:
    return [command for block in blocks(README) if block.language == "sh" for command in commands(block)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_block_that_is_not_run_says_why_and_where_its_tiny_twin_is(page: Path) -> None:
    marks = re.findall(r"<!-- not run\b.*?-->\s*?\n", page.read_text(encoding="utf-8"), re.DOTALL)
    assert [mark for mark in marks if not NOT_RUN.search(mark)] == []
    assert len(marks) == len([b for b in blocks(page) if b.not_run]), "a mark does not stand directly above a block"
    known = SHOWN | {"python", "sh"}
    assert [b for b in blocks(page) if b.language not in known and not b.name and not b.not_run] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_that_is_not_run_is_at_least_python(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            ast.parse(block.text)


@pytest.mark.parametrize("page", [README, *PAGES], ids=name_of)
def test_links_and_pictures_lead_to_a_file_of_the_project(page: Path) -> None:
    text = re.sub(r"^ *```.*?^ *```$|`[^`\n]+`", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^()\s]+)\)", text) if not re.match(r"https?:", link)]
    # examples.md and the mirrored pages are made when the site is built.
    assert [link for link in links if link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", [README, *PAGES, ROOT / "benchmarks" / "RESULTS.md"], ids=name_of)
def test_data_is_named_by_a_path_of_the_readers(page: Path) -> None:
    assert "shared/data" not in page.read_text(encoding="utf-8")


def shown() -> list[Block]:
    return [block for page in (README, *PAGES) for block in blocks(page)]


def test_every_command_of_rledit_is_shown_and_run_somewhere() -> None:
    run = {c.split()[1] for b in shown() if b.language == "sh" and not b.not_run for c in commands(b)
           if c.startswith("rledit ")}  # fmt: skip
    assert set(SHORT_RLEDIT) - run == set()


def test_every_model_of_the_registry_is_named() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in (README, *PAGES))
    assert [name for name in MODELS if f'"{name}"' not in text] == []


def test_every_public_name_of_agents_is_in_the_api_reference() -> None:
    text = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs" / "reference").glob("*.md"))
    listed = set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    assert [name for name in agents.__all__ if f"agents.{name}" not in listed] == []


def test_every_diagram_has_its_picture_and_every_picture_its_diagram(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "tools"))
    import site_parts

    sources = [m[1] for p in PAGES for m in site_parts.MERMAID.finditer(p.read_text(encoding="utf-8"))]
    drawn = {path.stem for path in (ROOT / "docs" / "diagrams").glob("*.svg")}
    assert drawn == {site_parts.digest(source) for source in sources}, "draw them again: make diagrams"
