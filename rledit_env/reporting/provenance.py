"""The versions of the software, and the machine, that a result was made with."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("rledit-env", "torch", "transformers", "gymnasium", "numpy")


def versions() -> dict[str, str]:
    """The versions of Python and the packages of ``PACKAGES``, and a description of the machine."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["machine"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return found
