"""Warns once that a kernel is not used."""

from __future__ import annotations

import warnings
from functools import cache


@cache
def warn_once(kernel: str, reason: str) -> None:
    """Warn that a kernel does not fit the installed packages, once in a process for each reason."""
    warnings.warn(
        f"rledit's {kernel} does not fit the installed torch or transformers ({reason}); the plain one is used, which "
        "is slower",
        stacklevel=2,
    )


def shown(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
