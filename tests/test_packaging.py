"""What is shipped: metadata, the wheel's contents, and nothing of the machine it was written on."""

from __future__ import annotations

import ast
import configparser
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions, version
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml
from wheel import copy_project, project_files

import rledit_env
from rledit_env.knowledge.bundled.build import SOURCE_PACKAGES
from rledit_env.lm.loading.registry import cache_dir

ROOT = Path(__file__).parents[1]
PACKAGES = ("rledit_env", "agents")
SHIPPED_DATA = {".jsonl", ".gz", ".safetensors", ".png", ".gif"}


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def requirements(text: str) -> dict[str, str]:
    """Requirement lines as normalised name → version specifier."""
    lines = [line for line in text.splitlines() if line.strip()]
    split = [re.split(r"(?=[<>=~!])", line.strip(), maxsplit=1) for line in lines]
    return {re.sub(r"[-_.]+", "-", name).lower(): "".join(rest) for name, *rest in split}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy, so that the tree stays as it is."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    copy_project(source)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    environment = {**os.environ, "SETUPTOOLS_USE_DISTUTILS": "local"}  # whatever a library set
    done = subprocess.run(
        [sys.executable, "-c", build, str(out)], cwd=source, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_wheel_holds_every_module_type_marker_and_data_file(wheel: zipfile.ZipFile) -> None:
    shipped = {
        path.relative_to(ROOT).as_posix()
        for path in project_files()
        if path.relative_to(ROOT).parts[0] in PACKAGES
        and (path.suffix in (".py", ".jinja") or path.name == "py.typed"
             or {"pretrained", "bundled", "configs"} & set(path.parts))
    }
    assert {f"{package}/py.typed" for package in PACKAGES} <= shipped
    assert len([name for name in shipped if name.endswith(".jsonl.gz")]) == 6
    assert shipped - set(wheel.namelist()) == set()


def test_wheel_holds_nothing_but_the_packages_and_their_metadata(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)


def test_wheel_holds_no_bytecode_no_test_and_no_absolute_path(wheel: zipfile.ZipFile) -> None:
    paths = [PurePosixPath(name) for name in wheel.namelist()]
    assert [path for path in paths if path.is_absolute() or ".." in path.parts] == []
    assert [path for path in paths if path.suffix == ".pyc" or "__pycache__" in path.parts] == []
    assert [path for path in paths if path.name.startswith(("test_", "conftest")) or "tests" in path.parts] == []


def test_wheel_carries_licence_version_readme_and_the_command(wheel: zipfile.ZipFile) -> None:
    info = f"rledit_env-{rledit_env.__version__}.dist-info"
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert f"\nVersion: {rledit_env.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert (ROOT / "README.md").read_text(encoding="utf-8").strip() in metadata
    assert "rledit = rledit_env.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_installed_version_is_the_sources_version() -> None:
    assert version("rledit-env") == rledit_env.__version__


def test_changelog_speaks_of_the_version_or_of_what_is_not_released_yet() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] in ("Unreleased", rledit_env.__version__)


def test_citation_has_the_metadatas_title_version_licence_and_keywords() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    metadata = setup_cfg()["metadata"]
    assert metadata["version"] == "attr: rledit_env.__version__"
    assert citation["title"] == metadata["name"]
    assert citation["version"] == rledit_env.__version__
    assert citation["license"] == metadata["license_expression"]
    assert citation["abstract"] == metadata["description"]
    assert citation["keywords"] == metadata["keywords"].split(", ")


def test_citation_has_what_its_format_requires_and_the_papers_authors_as_in_the_readme() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)
    paper = citation["preferred-citation"]
    bibtex = re.sub(r"\s+", " ", (ROOT / "README.md").read_text(encoding="utf-8"))
    authors = " and ".join(f"{person['family-names']}, {person['given-names']}" for person in paper["authors"])
    assert f"author = {{{authors}}}" in bibtex
    assert f"title = {{{paper['title']}}}" in bibtex and f"year = {{{paper['year']}}}" in bibtex


def workflow() -> dict[Any, Any]:
    parsed: dict[Any, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    return parsed


def test_the_workflow_runs_what_must_pass_on_every_pull_request_and_on_main() -> None:
    triggers = workflow()[True]  # YAML 1.1 reads the key "on" as true
    assert triggers["push"] == {"branches": ["main"]} and "pull_request" in triggers
    job = workflow()["jobs"]["ci"]
    assert "bash .ci/run" in [step.get("run") for step in job["steps"]]
    assert not job.get("continue-on-error") and "if" not in job


def test_the_workflows_oldest_python_is_the_oldest_that_the_package_takes() -> None:
    versions = workflow()["jobs"]["ci"]["strategy"]["matrix"]["python-version"]
    assert all(isinstance(version, str) for version in versions)  # 3.10 without quotes is the number 3.1
    oldest = min(versions, key=lambda version: tuple(map(int, version.split("."))))
    assert setup_cfg()["options"]["python_requires"] == f">={oldest}"


def test_the_workflow_caches_the_default_models_folder_and_pips() -> None:
    steps = workflow()["jobs"]["ci"]["steps"]
    (python,) = [step["with"] for step in steps if step.get("uses", "").startswith("actions/setup-python@")]
    (cache,) = [step["with"] for step in steps if step.get("uses", "").startswith("actions/cache@")]
    assert python["cache"] == "pip" and (ROOT / python["cache-dependency-path"]).exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RLEDIT_CACHE", raising=False)
        patch.delenv("XDG_CACHE_HOME", raising=False)
        assert Path(cache["path"]).expanduser() == cache_dir() / "models"
    (pattern,) = re.findall(r"hashFiles\('(.+)'\)", cache["key"])
    assert list(ROOT.glob(pattern))


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/releasing.md"])
def test_what_contributors_read_names_files_and_targets_that_exist(name: str) -> None:
    path, makefile = ROOT / name, (ROOT / "Makefile").read_text(encoding="utf-8")
    text = path.read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text)]
    folders = r"\.github|benchmarks|docs|examples|rledit_env|tests"
    named = re.findall(rf"`((?:{folders})/[\w./-]+|\w+\.(?:cfg|cff|toml|md))`", text)
    assert [link for link in links if not (path.parent / link).exists()] == []
    assert [file for file in named if not (ROOT / file).exists()] == []
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert set(re.findall(r"(?:^ *|`|&& )make ([a-z-]+)", text, re.MULTILINE)) - targets == set()


def test_ci_builds_and_uses_the_wheel() -> None:
    assert "\npart make wheel\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def foreign_wheel(folder: Path) -> Path:
    """A wheel of another project whose import name is ``agents`` as well."""
    path, info = folder / "assistant_sdk-0.3.2-py3-none-any.whl", "assistant_sdk-0.3.2.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("agents/__init__.py", "class Agent:\n    pass\n")
        file.writestr("agents/run.py", "")
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: assistant-sdk\nVersion: 0.3.2\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/top_level.txt", "agents\n")
        file.writestr(f"{info}/RECORD", f"agents/__init__.py,,\nagents/run.py,,\n{info}/RECORD,,\n")
    return path


def installed(prefix: Path, *wheels: Path) -> Path:
    """The folder of packages of a prefix into which pip has installed the wheels, in this order."""
    for wheel in wheels:
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--ignore-installed",
             "--prefix", str(prefix), str(wheel)], check=True,
        )  # fmt: skip
    return next(prefix.rglob("agents")).parent


def run_with(packages: list[Path], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python, away from the sources, with these folders of packages first."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, packages))}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=packages[0], capture_output=True, text=True, check=False
    )


def test_another_package_called_agents_is_named_with_the_mend(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    ours, theirs = Path(str(wheel.filename)), foreign_wheel(tmp_path)
    alone, foreign = installed(tmp_path / "ours", ours), installed(tmp_path / "theirs", theirs)
    both = installed(tmp_path / "both", ours, theirs)  # theirs came last, and some files are theirs now
    rledit = ("-m", "rledit_env.cli", "--version")
    done = run_with([alone], *rledit)
    assert done.returncode == 0 and rledit_env.__version__ in done.stdout
    mend = "install rledit-env in a virtual environment of its own: python3 -m venv .venv, then"
    example = str(ROOT / "examples" / "train_rledit.py")
    for packages, what in (
        ([foreign, alone], f"the import name 'agents' is assistant-sdk 0.3.2 here ({foreign / 'agents'})"),
        ([both], "assistant-sdk 0.3.2 has overwritten files of rledit-env's package 'agents' (agents/__init__.py)"),
    ):
        done = run_with(packages, *rledit)
        assert (done.returncode, done.stdout) == (2, "")
        assert f"rledit: error: {what}" in done.stderr and mend in done.stderr and "Traceback" not in done.stderr
        done = run_with(packages, example, "--help")
        assert done.returncode == 1 and what in done.stderr and mend in done.stderr
    assert "pip install --force-reinstall --no-deps rledit-env" in done.stderr
    # Where theirs came first, ours is whole.
    assert run_with([installed(tmp_path / "late", theirs, ours)], *rledit).returncode == 0


def test_extra_bundled_data_is_what_the_bundled_data_is_built_from() -> None:
    extra = requirements(setup_cfg()["options.extras_require"]["bundled-data"])
    assert extra == {name: f"=={version}" for name, version in SOURCE_PACKAGES.items()}


def test_every_package_that_is_imported_at_the_top_is_a_core_dependency() -> None:
    core = requirements(setup_cfg()["options"]["install_requires"])
    of_module = packages_distributions()
    missing = {}
    for path in [p for package in PACKAGES for p in (ROOT / package).rglob("*.py")]:
        if path.parent.name in ("bundled", "playground"):  # what built the bundled data and the page have their extras
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for top in {name.split(".")[0] for name in names} - set(PACKAGES) - sys.stdlib_module_names:
                owners = {re.sub(r"[-_.]+", "-", owner).lower() for owner in of_module.get(top, [top])}
                if not owners & set(core):
                    missing[top] = path.relative_to(ROOT).as_posix()
    assert missing == {}


def test_no_text_file_names_a_machines_folder_or_a_package_registrys_host() -> None:
    # Put together from halves, so that this file does not hold what it looks for.
    folders = [f"/{name}/" for name in ("wo" + "rk", "ro" + "ot", "ho" + "me", "tm" + "p", "op" + "t")]
    hosts = [f"{name}.{end}" for name, end in (("pypi", "org"), ("pythonhosted", "org"), ("npmjs", "org"))]
    hosts += [f"{sub}.{name}.org" for sub, name in (("download", "pytorch"), ("deb", "debian"), ("conda", "anaconda"))]
    folder = re.compile(rf"(?<![\w.~{{}}$)>/\]-])(?:{'|'.join(folders)})")
    found = []
    for path in project_files():
        if path.suffix in SHIPPED_DATA:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if folder.search(line) or any(host in line for host in hosts):
                found.append(f"{path.relative_to(ROOT)}, line {number}: {line.strip()[:80]}")
    assert found == []
