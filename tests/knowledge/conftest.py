"""What the tests of the knowledge readers share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PUBLISHED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def published() -> Path:
    """The folder of published data beside the project."""
    if not PUBLISHED.is_dir():
        pytest.skip("the published data (../shared/data) is not beside the project")
    return PUBLISHED


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows as a JSON Lines file in a fresh folder and returns its path; a `bytes` row is written as it is."""

    def write(name: str, *rows: Any) -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path.write_bytes(b"\n".join(lines) + b"\n")
        return path

    return write
