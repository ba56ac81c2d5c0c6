"""EditLedger: a ledger on disk; entries are appended before they take effect, and can be read, replayed and undone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import filelock
import torch
from safetensors.torch import save
from torch import Tensor

from rledit_env.files import mark, sync, write_bytes, write_text
from rledit_env.ledger.folder import check_new, reserved
from rledit_env.ledger.format import (
    ENTRY_NAME,
    FORMAT,
    HEADER,
    LEDGER,
    MEMORY_NAME,
    Entry,
    Kind,
    LedgerError,
    RunState,
    checked_tensors,
    read_header,
    weights_hash,
)
from rledit_env.ledger.replay import Replay, change_norm, original_weights, reverse
from rledit_env.lm.editable import EditableLM
from rledit_env.updates import NOTHING, Update

MEMORIES = 2  # kept memories; the newest may belong to an entry that was never written


class EditLedger:
    """A ledger open for reading, and for writing once :meth:`lock` has been called.

    Args:
        folder: the ledger's folder.

    Raises:
        FileNotFoundError: the folder contains no ledger.
        LedgerError: the ledger's header is damaged, or of a newer format.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.header = read_header(self.folder)
        self.shapes: dict[str, tuple[int, int]] = {m: (s[0], s[1]) for m, s in self.header["shapes"].items()}
        self.names, self.damage = self._scan()
        self._lock: filelock.BaseFileLock | None = None
        self._checked: dict[int, Entry] = {}  # index → an entry whose file has been checked, without its tensors

    @classmethod
    def create(cls, folder: str | Path, lm: EditableLM, settings: Mapping[str, object] | None = None) -> EditLedger:
        """Create a ledger in a new or empty folder, locked for writing.

        Args:
            folder: its path; created if it does not exist.
            lm: the LLM whose edits will be recorded.
            settings: everything else that the run depends on, as JSON types.

        Raises:
            FileExistsError: the folder is not empty.
            LedgerError: another process is creating a ledger there.
            OSError: the folder cannot be written.
        """
        folder = Path(folder)
        check_new(folder)
        header = {
            "format": FORMAT,
            "model": lm.name,
            "revision": lm.revision,
            "shapes": {m: list(s) for m, s in lm.module_shapes.items()},
            "dtype": str(lm.dtype).removeprefix("torch."),
            "original": weights_hash(original_weights(lm)),
            "settings": dict(settings or {}),
        }
        folder.mkdir(parents=True, exist_ok=True)
        lock = reserved(folder)
        try:
            check_new(folder)  # another process may have created and closed one meanwhile
            mark(folder, LEDGER)
            write_text(folder / HEADER, json.dumps(header, indent=1) + "\n")
            ledger = cls(folder)
        except BaseException:
            lock.release()
            raise
        ledger._lock = lock
        return ledger

    @classmethod
    def resume(cls, folder: str | Path, lm: EditableLM, settings: Mapping[str, object] | None = None) -> EditLedger:
        """Open a ledger to continue it, locked for writing; one that does not exist is created.

        A damaged entry, and all entries after it, are moved to the subfolder ``damaged``.

        Raises:
            LedgerError: the ledger belongs to another model or other settings, or another process is writing it.
        """
        if not (Path(folder) / HEADER).exists():
            return cls.create(folder, lm, settings)
        ledger = cls(folder)
        ledger.check_model(lm)
        current = json.loads(json.dumps(dict(settings or {})))
        recorded = ledger.header["settings"]
        different = [
            f"{name}: {recorded.get(name)!r} there, {current.get(name)!r} here"
            for name in sorted({*recorded, *current}) if recorded.get(name) != current.get(name)
        ]
        if different:
            raise LedgerError(f"{folder} records another run ({'; '.join(different)}); give the same settings, or "
                              "another folder")
        ledger.lock()
        ledger.verify()
        ledger.cut(len(ledger))
        return ledger

    def lock(self) -> None:
        """Lock the ledger for this process, until :meth:`close` or the end of the process.

        Raises:
            LedgerError: another process has locked it.
        """
        self._lock = reserved(self.folder)
        self.names, self.damage = self._scan()

    def close(self) -> None:
        """Release the lock, so that other processes can write."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    # -- reading ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """The number of entries that are usable as far as they have been checked; see :meth:`verify`."""
        return len(self.names)

    def _scan(self) -> tuple[list[str], str | None]:
        """The entries' file names, up to the first entry that is missing or exists twice, and a description of that
        problem."""
        by_index: dict[int, list[str]] = {}
        self._memory_names = sorted(path.name for path in self.folder.iterdir() if MEMORY_NAME.fullmatch(path.name))
        for path in self.folder.iterdir():
            if match := ENTRY_NAME.fullmatch(path.name):
                by_index.setdefault(int(match[1]), []).append(path.name)
        names: list[str] = []
        for index in range(len(by_index)):
            files = by_index.get(index, [])
            if len(files) != 1:
                what = "is missing" if not files else f"is there {len(files)} times"
                return names, f"entry {index} {what} in {self.folder}"
            names.append(files[0])
        return names, None

    def read(self, index: int) -> Entry:
        """Read an entry with its tensors, after a check of its digest and its link to the entry before it.

        Raises:
            IndexError: the entry does not exist.
            LedgerError: the entry is damaged.
        """
        if not 0 <= index < len(self.names):
            raise IndexError(f"{self.folder} has entries 0 to {len(self) - 1}, not {index}")
        path = self.folder / self.names[index]
        entry = self._entry(index, path, *checked_tensors(path))
        self._checked[index] = replace(entry, random=None, update=NOTHING, torch_random=None)
        return entry

    def summary(self, index: int) -> Entry:
        """:meth:`read` without the tensors and the random states; the file is read only once."""
        if index not in self._checked:
            self.read(index)
        return self._checked[index]

    def _entry(self, index: int, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Entry:
        try:
            entry = Entry.from_content(tensors, metadata)
            problem = self._misplaced(index, entry) or entry.problem(self.shapes)
            if not problem and entry.kind == "rollback" and (not index or self.summary(index - 1).kind != "edit"):
                problem = "it takes back no edit"
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problem = f"its description is unreadable ({error})"
        if problem:
            raise LedgerError(f"entry {index} ({path}) is damaged or forged: {problem}; the {index} entries before it "
                              "are usable")
        return entry

    def _misplaced(self, index: int, entry: Entry) -> str | None:
        """A description of what is wrong with an entry's place; None if it is right."""
        if entry.index != index:
            return f"it says that it is entry {entry.index}"
        before = self.names[index - 1] if index else ""
        if entry.previous != before:
            return f"it follows {entry.previous or 'nothing'}, but the entry before it is {before or 'none'}"
        return None

    def entries(self) -> Iterator[Entry]:
        """The usable entries without their tensors, in order, up to the first damaged one; see :attr:`damage`."""
        for index in range(len(self.names)):
            try:
                yield self.summary(index)
            except LedgerError as error:
                self.names, self.damage = self.names[:index], str(error)
                return

    def verify(self, lm: EditableLM | None = None) -> str | None:
        """Check every entry; given an LLM, check also that the updates lead to the recorded weights.

        Returns:
            A description of the damage, or None. ``len(ledger)`` is then the number of usable entries.

        Raises:
            LedgerError: the LLM is not the one that was edited.
        """
        self._checked.clear()
        if lm is not None:
            self.check_model(lm)
            with suppress(LedgerError):
                self._follow(Replay(lm), len(self))
        else:
            for _ in self.entries():
                pass
        return self.damage

    def check_model(self, lm: EditableLM) -> None:
        """Raise LedgerError unless the ledger belongs to this LLM: the same modules and the same W₀."""
        if lm.module_shapes != self.shapes:
            raise LedgerError(
                f"{self.folder} records edits of {len(self.shapes)} modules such as {next(iter(self.shapes.items()))}, "
                f"but {lm.name or 'the model'} has {len(lm.module_shapes)} edited modules such as "
                f"{next(iter(lm.module_shapes.items()))}; load it with edit_modules={list(self.shapes)[:2]}…"
            )
        if weights_hash(original_weights(lm)) != self.header["original"]:
            raise LedgerError(f"{self.folder} records edits of {self.header['model']!r}, whose pre-trained weights are "
                              f"not those of {lm.name!r} as loaded here (dtype {lm.dtype}); name the model, and the "
                              f"dtype, that it was made with ({self.header['dtype']})")

    def undone(self) -> set[int]:
        """The batches that have been undone."""
        return {entry.batch for entry in self.entries() if entry.kind == "undo"}

    # -- the weights -----------------------------------------------------------------------------------------------

    def _walk(self, replay: Replay, count: int) -> Iterator[Entry]:
        """The first ``count`` entries, each yielded after the replay has applied it.

        Raises:
            LedgerError: an entry is damaged, or leads to other weights than the recorded ones. The usable entries then
                end before it.
        """
        for index in range(count):
            try:
                entry = self.read(index)
                if not replay.follow(entry):
                    raise LedgerError(
                        f"entry {index} ({self.folder / self.names[index]}) leads to other weights here than those "
                        f"recorded; the {index} entries before it are usable. If its file is whole (verify without the "
                        "model), the numbers differ on this machine: use the same device and number of threads"
                    )
            except LedgerError as error:
                self.names, self.damage = self.names[:index], str(error)
                raise
            yield entry

    def _follow(self, replay: Replay, count: int) -> None:
        for _ in self._walk(replay, count):
            pass

    def weights(self, lm: EditableLM, to: int | None = None) -> dict[str, Tensor]:
        """The weights after the first ``to`` entries (by default all); the LLM is not changed.

        Raises:
            ValueError: the ledger has fewer entries.
            LedgerError: one of these entries is damaged, or the ledger belongs to another LLM.
        """
        self.check_model(lm)
        if to is not None and not 0 <= to <= len(self):
            damage = f" ({self.damage})" if self.damage else ""
            raise ValueError(f"to is {to}; {self.folder} can be replayed to 0 … {len(self)} entries{damage}")
        replay = Replay(lm)
        self._follow(replay, len(self) if to is None else to)
        return dict(replay.weights)

    def replay(self, lm: EditableLM, to: int | None = None) -> None:
        """Set the LLM's weights to those after the first ``to`` entries, bit for bit; see :meth:`weights`."""
        lm.restore(self.weights(lm, to))

    # -- writing ---------------------------------------------------------------------------------------------------

    def append(
        self, kind: Kind, update: Update, after: Mapping[str, Tensor], batch: int, facts: Sequence[int] = (),
        norm: float = 0.0, state: RunState | None = None,
    ) -> None:
        """Write an entry, and before it the agent's memory; both are on disk when this returns.

        Args:
            kind, update, batch, facts, norm: see :class:`Entry`.
            after: module → the weights (d_out, d_in) after the entry.
            state: the state of the run.

        Raises:
            OSError: the disk is full or read-only; the ledger is unchanged.
            LedgerError: the ledger was not locked by this process, or is damaged.
        """
        if self._lock is None:
            raise LedgerError(f"{self.folder} is open for reading only; lock() it first")
        if self.damage:
            raise LedgerError(f"{self.damage}; resume the ledger, which moves the damaged part aside")
        index, state = len(self), state or RunState()
        if state.memory is not None:
            self._memory_names.append(self._write(f"memory-{index:08d}-", state.memory, {"index": str(index)}))
        entry = Entry(
            index, kind, int(batch), int(state.presentation), tuple(map(int, facts)), norm, weights_hash(after),
            state.random, self.names[-1] if self.names else "", update, torch.get_rng_state(),
            None if state.presented is None else tuple(map(int, state.presented)),
        )
        self.names.append(self._write(f"{index:08d}-", *entry.content()))
        if state.memory is not None:
            for old in self._memory_names[:-MEMORIES]:
                (self.folder / old).unlink(missing_ok=True)
            self._memory_names = self._memory_names[-MEMORIES:]

    def _write(self, prefix: str, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> str:
        # Cloned, since the format does not support tensors that share memory.
        data = save({k: v.detach().contiguous().cpu().clone() for k, v in tensors.items()}, metadata)
        name = f"{prefix}{sha256(data).hexdigest()}.safetensors"
        write_bytes(self.folder / name, data)
        return name

    def undo(self, lm: EditableLM, batch: int) -> None:
        """Subtract a batch's updates from the LLM's weights, by a new entry.

        The result is W₀ plus all other updates, to rounding. Later updates are not changed, though they were computed
        with the batch's updates in the weights.

        Raises:
            ValueError: the batch does not exist, or has been undone.
            LedgerError: as :meth:`weights`.
        """
        if batch in self.undone():
            raise ValueError(f"batch {batch} has been undone already")
        entries = list(self.entries())
        batches = {e.batch for e in entries if e.kind == "edit"}
        if batch not in batches:
            known = f"batches {min(batches)} to {max(batches)}" if batches else "no batch"
            raise ValueError(f"{self.folder} has {known}, not {batch}")
        self.check_model(lm)
        rolled_back = {e.index - 1 for e in entries if e.kind == "rollback"}
        replay = Replay(lm)
        change = {m: torch.zeros_like(w) for m, w in replay.original.items()}
        edits: list[Entry] = []
        for entry in self._walk(replay, len(entries)):
            if entry.batch == batch and entry.kind == "edit" and entry.index not in rolled_back:
                change = {m: change[m] + (replay.weights[m] - replay.before[m]) for m in change}
                edits.append(entry)
        update = reverse([edit.update for edit in edits], change)
        after = update.updated(replay.weights, replay.original)
        self.append("undo", update, after, batch, edits[-1].facts if edits else (), change_norm(replay.weights, after))
        lm.restore(after)

    # -- the agent's memory, and cutting -----------------------------------------------------------------------------

    def memory(self, index: int) -> dict[str, Tensor] | None:
        """The agent's memory at an entry; None if it is no longer kept or damaged."""
        for name in self._memory_names:
            if name.startswith(f"memory-{index:08d}-"):
                with suppress(LedgerError):
                    return checked_tensors(self.folder / name)[0]
        return None

    def cut(self, length: int) -> None:
        """Move all entries but the first ``length`` into the subfolder ``damaged``."""
        keep = set(self.names[:length])
        self.names, self.damage = self.names[:length], None
        self._checked = {i: e for i, e in self._checked.items() if i < length}
        for path in self.folder.iterdir():
            entry, memory = ENTRY_NAME.fullmatch(path.name), MEMORY_NAME.fullmatch(path.name)
            if (entry and path.name not in keep) or (memory and int(memory[1]) >= length):
                aside = self.folder / "damaged"
                aside.mkdir(exist_ok=True)
                path.rename(aside / path.name)
                if memory:
                    self._memory_names.remove(path.name)
            elif path.name.endswith(".partial"):
                path.unlink()
        sync(self.folder)
