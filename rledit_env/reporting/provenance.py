"""The versions of the software and the machine with which a result was computed."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("rledit-env", "torch", "transformers", "gymnasium", "numpy")


def versions() -> dict[str, str]:
    """The versions of Python and the packages of ``PACKAGES``, and a description of the machine."""
    entries = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            entries[package] = version(package)
        except PackageNotFoundError:
            entries[package] = "not installed"
    entries["machine"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return entries
