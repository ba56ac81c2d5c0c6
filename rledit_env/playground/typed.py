"""Facts that are typed on the page, or loaded from a file there."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rledit_env.knowledge.facts import PLAIN, Facts, load_facts

UNKNOWN = "…"  # the answer to a neighbour that was typed without one; what counts is whether the model's answer stays


def typed_fact(prompt: str, target: str, subject: str = "", paraphrases: str = "", neighbours: str = "") -> Facts:
    """A single fact.

    Args:
        prompt, target: the fact.
        subject: as it is written in the prompt; may be empty.
        paraphrases: other prompts for the same answer, one a line.
        neighbours: prompts whose answers should stay, one a line.

    Raises:
        KnowledgeError: the prompt or the target is empty, or the subject is not in the prompt.
    """
    row = {
        "prompt": prompt.strip(), "target": target.strip(), "subject": subject.strip() or None,
        "paraphrases": _lines(paraphrases) or None,
        "unrelated": [{"prompt": line, "answer": UNKNOWN} for line in _lines(neighbours)] or None,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "the typed fact.jsonl"
        file.write_text(json.dumps({k: v for k, v in row.items() if v is not None}), encoding="utf-8")
        return load_facts(file)


def joined(parts: Sequence[Facts]) -> Facts:
    """All these facts, in their order."""
    first = parts[0]
    kinds = {part.dataset.kind for part in parts}
    records = tuple(record for part in parts for record in part.dataset.records)
    dataset = replace(first.dataset, records=records, kind=kinds.pop() if len(kinds) == 1 else PLAIN)
    return Facts(
        dataset, sum(part.without_paraphrases for part in parts), sum(part.without_unrelated for part in parts), {}
    )


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
