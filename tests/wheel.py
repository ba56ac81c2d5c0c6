"""Builds the sdist and the wheel, compares them, and uses the wheel away from the checkout.

    python tests/wheel.py                  # needs `build`; fetches setuptools
    python tests/wheel.py --out dist       # keeps the two files in a new or empty folder

`.ci/run` runs it as `make wheel`. To be quick, the new environment takes the dependencies from the environment that
runs this script, by a .pth file; only the wheel itself is installed. A full installation of the dependencies is a step
of docs/releasing.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
INSIDE = Path(__file__).with_name("wheel_inside.py")
FACT = {"prompt": "The capital of Freedonia is", "target": "Sylvania", "subject": "Freedonia"}


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


def copy_project(folder: Path) -> None:
    """Copy the project's files, so that a build changes nothing in the checkout and finds nothing else there."""
    for path in project_files():
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)


def contents(wheel: Path) -> dict[str, bytes]:
    """The files of a wheel, without those that name the version of setuptools that built it."""
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist() if not name.endswith((".dist-info/WHEEL", "/RECORD"))}


def built(source: Path, out: Path, *options: str) -> None:
    """Run `python -m build`; its output is shown only if it fails."""
    environment = {**os.environ, "SETUPTOOLS_USE_DISTUTILS": "local"}  # whatever a library set
    command = [sys.executable, "-m", "build", "--outdir", str(out), *options, str(source)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}")


def build(folder: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it, in new folders under ``folder``.

    Raises:
        SystemExit: a build failed, or the wheel is not the one that the project's files give.
    """
    source, out, direct = folder / "source", folder / "dist", folder / "direct"
    copy_project(source)
    built(source, out)  # the sdist in an environment of its own, then the wheel from the sdist in another
    built(source, direct, "--wheel", "--no-isolation")
    (sdist,), (wheel,), (other,) = out.glob("*.tar.gz"), out.glob("*.whl"), direct.glob("*.whl")
    one, two = contents(wheel), contents(other)
    different = sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
    if different:
        raise SystemExit(f"the wheel of the sdist and that of the project's files differ in {', '.join(different)}")
    return sdist, wheel


def installed(wheel: Path, folder: Path) -> Path:
    """The programs' folder of a new environment with the wheel and this environment's dependencies."""
    venv.create(folder, with_pip=False)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, str(wheel)], check=True)
    asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.run([python, "-I", "-c", asked], capture_output=True, text=True, check=True).stdout.strip()
    # Only this folder joins the path: .pth files in it, such as that of an editable installation, are not read.
    Path(packages, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return scripts


def use(scripts: Path, folder: Path) -> None:
    """Import, load and edit with the installed wheel, in a folder away from the checkout."""
    (folder / "facts.jsonl").write_text(json.dumps(FACT) + "\n", encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    rledit = str(scripts / "rledit")
    for command in (
        [str(scripts / "python"), "-I", str(INSIDE)],
        [rledit, "--help"],
        [rledit, "edit", "--facts", "facts.jsonl", "--editor", "fine-tuning", "--step-size", "0.1", "--model",
         "tiny-llama", "--out", "edited"],
    ):
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    if not (folder / "edited" / "model.safetensors").exists():
        raise SystemExit("rledit edit wrote no model")


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the sdist and the wheel, and use the wheel.")
    parser.add_argument("--out", type=Path, help="a new or empty folder for the two files")
    out = parser.parse_args().out
    if out is not None and out.exists() and any(out.iterdir()):
        raise SystemExit(f"--out {out} is not empty; give a new folder, or delete it")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sdist, wheel = build(folder)
        with tarfile.open(sdist) as file:
            print(f"{sdist.name}: {len(file.getnames())} files, {sdist.stat().st_size / 1e6:.1f} MB", flush=True)
        print(f"{wheel.name}: {len(contents(wheel))} files, {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
        scripts = installed(wheel, folder / "environment")
        use(scripts, folder)
        print("the wheel works in an environment of its own", flush=True)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            for path in (sdist, wheel):
                shutil.copy(path, out)


if __name__ == "__main__":
    main()
