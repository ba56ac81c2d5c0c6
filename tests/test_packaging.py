"""What is shipped: metadata, the wheel's contents, and nothing of the machine it was written on."""

from __future__ import annotations

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest

import rledit_env
from rledit_env.knowledge.bundled.build import SOURCE_PACKAGES

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


def project_files() -> list[Path]:
    """The files that git tracks or would track, or all files where there is no git."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True)
        paths = [ROOT / name for name in done.stdout.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        left_out = {".venv", ".git", "__pycache__", "runs", "build", "dist"}
        paths = [
            path for path in ROOT.rglob("*")
            if not any(part in left_out or part.endswith(("_cache", ".egg-info")) for part in path.parts)
        ]
    return sorted(path for path in set(paths) if path.is_file())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy, so that the tree stays as it is."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in project_files():
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
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
