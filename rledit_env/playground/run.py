"""EditRun: the edits of one session, batch after batch, with their ledger."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from agents import EditLog, edit_facts
from agents.running.editing import StreamSettings
from rledit_env.encoding import encode
from rledit_env.knowledge import EditRecord, KnowledgeDataset
from rledit_env.ledger import EditLedger
from rledit_env.lm.chat import in_chat
from rledit_env.playground.choice import Choice, Prepared
from rledit_env.playground.view import Batch

KIND = "facts"  # with reward "none" a data set's kind changes nothing in editing, and facts of all kinds may meet here


class EditRun:
    """An editor at work on a model. It is not changed by several threads at once.

    Args:
        prepared: the model and its editor.
        choice: how facts are edited.
        ledger: the folder of the ledger, which is created.
    """

    def __init__(self, prepared: Prepared, choice: Choice, ledger: Path) -> None:
        self.lm, self.notes = prepared.lm, prepared.notes
        self._prepared, self._choice = prepared, choice
        self._forms_per_fact = 2 if choice.chat == "also" else 1
        self.records: tuple[EditRecord, ...] = ()  # of all batches so far
        self._forms: tuple[EditRecord, ...] = ()  # the same as they are edited
        self._log = EditLog()
        self._taken_back: set[int] = set()  # batches, from 0
        self._settings: StreamSettings = {
            **prepared.settings, "batch_size": choice.batch_size * self._forms_per_fact,
        }  # fmt: skip
        self._ledger = EditLedger.create(ledger, self.lm, {**self._settings, **prepared.identity})

    def check(self, records: Sequence[EditRecord]) -> None:
        """Check that these facts can be edited; nothing is changed.

        Raises:
            ValueError: a fact does not fit the model's context or chat template.
        """
        for form in self._as_edited(records):
            encode(self.lm, form)

    def edit(self, records: Sequence[EditRecord], stop: threading.Event, progress: Callable[[int], None]) -> str:
        """Edit these facts; returns what was done, in a sentence.

        Args:
            records: the facts.
            stop: ends the run after the present batch.
            progress: called after every batch with the number of facts edited by this call.

        Raises:
            Exception: an error of the editor; the batch that it interrupted is taken back.
        """
        agent, log, known = self._prepared.agent, self._log, self.records
        whole, memory = len(log.batch_sizes), _copied(agent.memory())

        def batch_ended(_: int) -> None:
            nonlocal whole, memory
            whole, memory = len(log.batch_sizes), _copied(agent.memory())
            progress(log.facts // self._forms_per_fact - len(known))

        forms = (*self._forms, *self._as_edited(records))
        dataset = KnowledgeDataset(KIND, "facts of the playground", "eval", forms)
        try:
            edit_facts(self.lm, agent, dataset, progress=batch_ended, ledger=self._ledger, guard=_Stop(stop), log=log,
                       **self._settings)  # fmt: skip
        except BaseException:
            self._take_back(whole, memory)
            raise
        finally:
            self._forms = forms[: log.facts]
            self.records = (*known, *records)[: log.facts // self._forms_per_fact]
        if log.diverged:
            broken = len(log.batch_sizes)
            self._take_back(broken - 1, memory)
            return (f"The update of batch {broken} broke the model and was taken back; its facts are not edited. Load "
                    "again with another editor, or with a smaller step size if the editor has one.")
        edited = len(self.records) - len(known)
        if log.stopped and edited < len(records):
            return f"Stopped: {edited} of {len(records)} facts were edited, in whole batches."
        return f"Edited: {edited} fact{'s' if edited != 1 else ''}."

    def undo(self, number: int) -> None:
        """Take out a batch, counted from 1.

        Raises:
            ValueError: there is no such batch, or it is undone already.
        """
        count = len(self._log.batch_sizes)
        if not 1 <= number <= count:
            raise ValueError(f"there is no batch {number}; there are batches 1 to {count}")
        if number - 1 in self._ledger.undone():
            raise ValueError(f"batch {number} is undone already; choose another one")
        self._ledger.undo(self.lm, number - 1)

    def batches(self) -> list[Batch]:
        """All batches so far."""
        undone, log = self._ledger.undone(), self._log
        batches = []
        for i, places in enumerate(log.batches()):
            first, last = places.start // self._forms_per_fact, places.stop // self._forms_per_fact
            state = "taken back" if i in self._taken_back else "undone" if i in undone else "edited"
            most = max(log.presentations[places.start : places.stop], default=0)
            texts = tuple(f"{record.prompt} → {record.target}" for record in self.records[first:last])
            batches.append(Batch(i + 1, texts, most, log.update_norms[i], state))
        return batches

    def numbers(self) -> list[int]:
        """For each fact, the number of its batch."""
        return [
            i + 1 for i, places in enumerate(self._log.batches()) for _ in range(len(places) // self._forms_per_fact)
        ]

    def close(self) -> None:
        """Release the ledger's lock."""
        self._ledger.close()

    def _as_edited(self, records: Sequence[EditRecord]) -> tuple[EditRecord, ...]:
        """The facts as they are edited: plain, as chat questions, or both."""
        chat = self._choice.chat
        return tuple(records) if chat is None else in_chat(records, self.lm.tokenizer, self.lm.name, chat)

    def _take_back(self, batch: int, memory: dict[str, Tensor] | None) -> None:
        """Undo what a batch, counted from 0, has changed before it was interrupted."""
        facts = next((e.facts for e in self._ledger.entries() if e.kind == "edit" and e.batch == batch), None)
        if facts is None:  # nothing was recorded, so that nothing was changed
            return
        self._ledger.undo(self.lm, batch)
        self._taken_back.add(batch)
        if len(self._log.batch_sizes) == batch:  # the error came before the log's entry
            self._log.batch_sizes.append(len(facts))
            self._log.update_norms.append(0.0)
            self._log.presentations += [1] * len(facts)
        if memory is not None:
            self._prepared.agent.load_memory(memory)


class _Stop:
    """A guard that ends a run when it is asked to."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def exceeded(self, batch: int) -> bool:
        return self._event.is_set()


def _copied(memory: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    return None if memory is None else {name: tensor.clone() for name, tensor in memory.items()}
