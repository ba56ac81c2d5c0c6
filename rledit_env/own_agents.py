"""Importing this module checks that the import name ``agents`` is rledit-env's package.

Another package on PyPI has that import name, too. If it comes first on the import path, or was installed over our
files, ``from agents import …`` fails without naming the cause. The ``rledit`` command and the examples import this
module before anything of ``agents``.

Raises:
    ForeignAgents: ``agents`` is another package, or some of its files are another package's.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

DISTRIBUTION = "rledit-env"


class ForeignAgents(ImportError):
    """The import name ``agents`` belongs to another package; the message says which, and what to do."""


def check() -> None:
    """Check that ``import agents`` gives rledit-env's package, with all its files as installed.

    Raises:
        ForeignAgents: it does not.
    """
    ours = Path(__file__).parents[1] / "agents"
    spec = find_spec("agents")
    folders = [Path(place) for place in spec.submodule_search_locations or ()] if spec is not None else []
    own_environment = (
        f"install {DISTRIBUTION} in a virtual environment of its own: python3 -m venv .venv, then "
        f".venv/bin/pip install {DISTRIBUTION}"
    )
    if not any(folder.resolve() == ours.resolve() for folder in folders):
        place = str(folders[0]) if folders else spec.origin if spec is not None else f"nothing; {ours} is missing"
        raise ForeignAgents(
            f"the import name 'agents' is {_owner()} here ({place}), not the package of {DISTRIBUTION}; "
            f"{own_environment}"
        )
    if changed := _changed_files():
        raise ForeignAgents(
            f"{_owner()} has overwritten files of {DISTRIBUTION}'s package 'agents' ({', '.join(changed[:3])}); "
            f"{own_environment}; or remove that package and run: pip install --force-reinstall --no-deps {DISTRIBUTION}"
        )


def _owner() -> str:
    """The other installed distributions that have an import package ``agents``."""
    names = set(metadata.packages_distributions().get("agents", ())) - {DISTRIBUTION}
    return " and ".join(f"{name} {metadata.version(name)}" for name in sorted(names)) or "another package"


def _changed_files() -> list[str]:
    """Files of ``agents`` that differ from those that this distribution installed; none if it runs from its sources."""
    try:
        files = metadata.files(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []
    changed = []
    for file in files:
        if file.parts[0] != "agents" or file.suffix != ".py" or file.hash is None:
            continue
        path = Path(str(file.locate()))
        if not path.is_file() or _digest(path, file.hash.mode) != file.hash.value:
            changed.append(str(file))
    return sorted(changed)


def _digest(path: Path, algorithm: str) -> str:
    """The file's hash as a wheel's RECORD has it."""
    return base64.urlsafe_b64encode(hashlib.new(algorithm, path.read_bytes()).digest()).decode().rstrip("=")


check()
