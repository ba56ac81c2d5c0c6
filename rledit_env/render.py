"""What the environment shows of itself."""
from __future__ import annotations
from dataclasses import dataclass
from typing import Any
@dataclass
class Scene:
    batch: int
    records: Any
    before: list[str]
    after: list[str]
    info: dict[str, Any]
    reward: float
def text(scene, source): return ""
def curves(history, steps): return None
