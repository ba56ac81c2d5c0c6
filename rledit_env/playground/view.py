"""What a session shows: its facts with their answers, its batches, and what the edits cost the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rledit_env.knowledge import EditRecord
from rledit_env.playground.answers import Answers
from rledit_env.self_text import SelfDrift


@dataclass(frozen=True)
class FactView:
    """A fact with its answers before and after.

    Attributes:
        record: the fact.
        batch: its batch, counted from 1.
        is_edited: whether the batch's updates are in the model; otherwise they were undone or taken back.
        before, after: the answers of the unedited model, and at the present weights.
    """

    record: EditRecord
    batch: int
    is_edited: bool
    before: Answers
    after: Answers


@dataclass(frozen=True)
class Batch:
    """A batch of the ledger.

    Attributes:
        number: counted from 1.
        facts: its facts, as texts.
        presentations: how often it was presented.
        norm: √(Σ ‖ΔW‖_F²) over the modules and presentations.
        state: "edited", "undone", or "taken back": its update broke the model, or an error interrupted it.
    """

    number: int
    facts: tuple[str, ...]
    presentations: int
    norm: float
    state: str


@dataclass(frozen=True)
class View:
    """All that the page shows of a session.

    Attributes:
        model, editor: their names.
        chat: whether the model has a chat template.
        facts, batches: in their order.
        meter: text → the divergence from the unedited model on it, and the perplexities.
        notes: what the user should know of the editor.
    """

    model: str
    editor: str
    chat: bool
    facts: tuple[FactView, ...] = ()
    batches: tuple[Batch, ...] = ()
    meter: Mapping[str, SelfDrift] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
