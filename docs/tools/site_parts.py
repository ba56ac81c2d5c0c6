"""What several of these tools use: the folders, the form of a diagram, and what its picture is called by."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MERMAID = re.compile(r"^```mermaid\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def digest(source: str) -> str:
    """The name of a diagram's picture, from its source."""
    return hashlib.sha256(source.encode()).hexdigest()[:12]
