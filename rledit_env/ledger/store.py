"""The edit ledger: every update of an editing run on disk before it takes effect, in an append-only folder.

A ledger is a folder of

- ``ledger.json``: the model, its edited modules, the hash of W₀, and what the run was started with;
- ``NNNNNNNN-DIGEST.safetensors``: entries, counted from 0. An entry holds an update in the form it was given in, the
  batch and its facts, the random state, the hash of the weights that it leads to, and the name of the entry before it.
  DIGEST is the SHA-256 of the file, so that a file proves itself, and each entry all that went before it;
- ``memory-NNNNNNNN-DIGEST.safetensors``: the agent's memory of the stream as it was at that entry; only the latest two
  are kept;
- ``damaged``: what an interrupted or damaged ledger was cut by, when editing went on.

Files appear whole (written aside, synced, renamed) and are never changed. Nothing in them is code.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import filelock
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rledit_env.files import MARKER, mark, partial_of, sha256_of, sync, write_bytes, write_text
from rledit_env.lm.editable import EditableLM

LEDGER = "edit ledger"  # what its folder is called in the marker
HEADER = "ledger.json"
LOCK = ".lock"
FORMAT = 1
FORMS = ({"keys", "values"}, {"updates"}, {"accumulated"}, set[str]())  # the parts of an update; none changes nothing
ENTRY_NAME = re.compile(r"(\d{8})-([0-9a-f]{64})\.safetensors")
MEMORY_NAME = re.compile(r"memory-(\d{8})-([0-9a-f]{64})\.safetensors")
MAX_HEADER_BYTES = 2**24
MAX_ENTRY_BYTES = 2**34
MEMORIES = 2  # the newest may be of an entry that never came to be

Update = Mapping[str, Mapping[str, Tensor]]  # part → module → tensor, as `LifelongEditEnv.step` takes it
Kind = Literal["edit", "rollback", "undo"]


class LedgerError(ValueError):
    """A ledger is damaged, of another run, or in use; the message names the place and what can be done."""


class Recorder(Protocol):
    """What `LifelongEditEnv.recorder` is told before anything takes effect."""

    def record(self, update: Update) -> Mapping[str, Tensor]:
        """An update is about to be applied; returns the weights that it leads to, which are then put in place."""

    def roll_back(self) -> None:
        """The last update is about to be taken back, since it broke the LLM."""


@dataclass(frozen=True)
class Entry:
    """One entry.

    Attributes:
        index: its place, from 0.
        kind: "edit", "rollback" (takes back the edit before it, which broke the LLM), or "undo" (takes a whole batch's
            edits out).
        batch: which batch of the run, from 0.
        presentation: which presentation of the batch, from 0.
        facts: the batch's facts, as indices of the data set.
        norm: √(Σ ‖ΔW‖_F²) over the modules.
        weights_after: see :func:`weights_hash`.
        random: the environment's random generator's state before the step's reward, or None.
        previous: the name of the entry before it, or "".
        update: the update, empty for a rollback.
        torch_random: torch's random state (bytes,) at that time, or None.
        presented: which of the facts were presented, as places in the batch; None for all.
    """

    index: int
    kind: Kind
    batch: int
    presentation: int
    facts: tuple[int, ...]
    norm: float
    weights_after: str
    random: Mapping[str, Any] | None
    previous: str
    update: Update = field(repr=False)
    torch_random: Tensor | None = field(repr=False)
    presented: tuple[int, ...] | None = None


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 (hexadecimal) over the weights' names, shapes and bytes, in their order."""
    digest = hashlib.sha256()
    for name, weight in weights.items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def updated(weights: Mapping[str, Tensor], original: Mapping[str, Tensor], update: Update) -> dict[str, Tensor]:
    """The weights (d_out, d_in) after an update: W + ṽᵀũ, W + ΔW, or W₀ + ΔW; new tensors where anything changes.

    The same numbers give the same bits, wherever in memory they lie and however they are laid out there.
    """

    def placed(tensor: Tensor) -> Tensor:  # a product's last bits depend on its factors' strides and alignment
        return tensor.detach().clone(memory_format=torch.contiguous_format)

    after = dict(weights)
    for name, weight in weights.items():
        if name in update.get("keys", {}):
            values, keys = (placed(update[part][name].to(weight)) for part in ("values", "keys"))
            after[name] = torch.addmm(weight, values.t(), keys)
        elif name in update.get("updates", {}):
            after[name] = weight + update["updates"][name].to(weight)
        elif name in update.get("accumulated", {}):
            after[name] = original[name] + update["accumulated"][name].to(weight)
    return after


def change_norm(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """√(Σ ‖W′ − W‖_F²) over the modules."""
    return float(torch.stack([(after[n] - before[n]).norm().double() for n in before]).norm())


class EditLedger:
    """A ledger open for reading, and for writing once :meth:`lock` has been called.

    Args:
        folder: of a ledger.

    Raises:
        FileNotFoundError: there is none.
        LedgerError: its header is damaged, or of a newer format.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.header = _read_header(self.folder)
        self.shapes: dict[str, tuple[int, int]] = {m: (s[0], s[1]) for m, s in self.header["shapes"].items()}
        self.names, self.damage = self._scan()
        self._lock: filelock.BaseFileLock | None = None
        self._checked: dict[int, Entry] = {}  # entries whose file has been read whole, without their tensors

    @classmethod
    def create(cls, folder: str | Path, lm: EditableLM, settings: Mapping[str, Any] | None = None) -> EditLedger:
        """Begin a ledger in a new or empty folder, locked for writing.

        Args:
            folder: made if need be.
            lm: whose edits will be recorded.
            settings: what else the run depends on; what JSON can hold.

        Raises:
            FileExistsError: the folder is not empty.
            LedgerError: another process begins a ledger there.
            OSError: it cannot be written.
        """
        folder = Path(folder)
        _check_new(folder)
        header = {
            "format": FORMAT,
            "model": lm.name,
            "revision": lm.revision,
            "shapes": {m: list(s) for m, s in lm.module_shapes.items()},
            "dtype": str(lm.dtype).removeprefix("torch."),
            "original": _original_hash(lm),
            "settings": dict(settings or {}),
        }
        folder.mkdir(parents=True, exist_ok=True)
        lock = _reserved(folder)
        try:
            _check_new(folder)  # another process may have begun and ended one meanwhile
            mark(folder, LEDGER)
            write_text(folder / HEADER, json.dumps(header, indent=1) + "\n")
            ledger = cls(folder)
        except BaseException:
            lock.release()
            raise
        ledger._lock = lock
        return ledger

    @classmethod
    def resume(cls, folder: str | Path, lm: EditableLM, settings: Mapping[str, Any] | None = None) -> EditLedger:
        """Open a ledger to go on with it, locked for writing; one that does not exist is created.

        What is damaged, and all that follows it, is moved to the subfolder ``damaged``.

        Raises:
            LedgerError: it is of another model or other settings, or another process is writing it.
        """
        if not (Path(folder) / HEADER).exists():
            return cls.create(folder, lm, settings)
        ledger = cls(folder)
        ledger.check_model(lm)
        mine = json.loads(json.dumps(dict(settings or {})))
        theirs = ledger.header["settings"]
        different = [
            f"{name}: {theirs.get(name)!r} there, {mine.get(name)!r} here"
            for name in sorted({*theirs, *mine}) if theirs.get(name) != mine.get(name)
        ]
        if different:
            raise LedgerError(f"{folder} records another run ({'; '.join(different)}); give the same settings, or "
                              "another folder")
        ledger.lock()
        ledger.verify()
        ledger.cut(len(ledger))
        return ledger

    def lock(self) -> None:
        """Reserve the ledger for this process until :meth:`close` or its death.

        Raises:
            LedgerError: another process has it.
        """
        self._lock = _reserved(self.folder)
        self.names, self.damage = self._scan()

    def close(self) -> None:
        """Let other processes write."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    # -- reading ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Usable entries, as far as is known: see :meth:`verify`."""
        return len(self.names)

    def _scan(self) -> tuple[list[str], str | None]:
        """Names of the entries, up to the first that is missing or there twice, and what is wrong there."""
        by_index: dict[int, list[str]] = {}
        self._memory_names = sorted(path.name for path in self.folder.iterdir() if MEMORY_NAME.fullmatch(path.name))
        for path in self.folder.iterdir():
            if match := ENTRY_NAME.fullmatch(path.name):
                by_index.setdefault(int(match[1]), []).append(path.name)
        names: list[str] = []
        for index in range(len(by_index)):
            found = by_index.get(index, [])
            if len(found) != 1:
                what = "is missing" if not found else f"is there {len(found)} times"
                return names, f"entry {index} {what} in {self.folder}"
            names.append(found[0])
        return names, None

    def read(self, index: int) -> Entry:
        """An entry with its tensors; its checksum and its link to the entry before it are checked first.

        Raises:
            IndexError: there is no such entry.
            LedgerError: it is damaged.
        """
        if not 0 <= index < len(self.names):
            raise IndexError(f"{self.folder} has entries 0 to {len(self) - 1}, not {index}")
        path = self.folder / self.names[index]
        entry = self._entry(index, path, _checked_tensors(path))
        self._checked[index] = replace(entry, random=None, update={}, torch_random=None)
        return entry

    def summary(self, index: int) -> Entry:
        """:meth:`read` without the tensors and the random states; the file is read only once."""
        if index not in self._checked:
            self.read(index)
        return self._checked[index]

    def _entry(self, index: int, path: Path, content: tuple[dict[str, Tensor], dict[str, str]]) -> Entry:
        tensors, metadata = content
        try:
            facts = json.loads(metadata["entry"])
            torch_random = tensors.pop("random.torch", None)
            update: dict[str, dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                part, module = name.split(".", 1)
                update.setdefault(part, {})[module] = tensor
            if facts.get("presented") is not None:
                facts["presented"] = tuple(facts["presented"])
            entry = Entry(**{**facts, "facts": tuple(facts["facts"]), "update": update, "torch_random": torch_random})
            problem = self._problem(index, entry)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problem = f"its description is unreadable ({error})"
        if problem:
            raise LedgerError(f"entry {index} ({path}) is damaged or forged: {problem}; the {index} entries before it "
                              "are usable")
        return entry

    def _problem(self, index: int, entry: Entry) -> str | None:
        """What is wrong with an entry, if anything."""
        if entry.index != index:
            return f"it says that it is entry {entry.index}"
        before = self.names[index - 1] if index else ""
        if entry.previous != before:
            return f"it follows {entry.previous or 'nothing'}, but the entry before it is {before or 'none'}"
        if entry.kind not in ("edit", "rollback", "undo") or not re.fullmatch("[0-9a-f]{64}", entry.weights_after):
            return "its kind or its hash is none"
        numbers = (entry.batch, entry.presentation, *entry.facts)
        if not all(type(n) is int and n >= 0 for n in numbers) or not isinstance(entry.norm, (int, float)):
            return "its batch, its facts or its norm are no numbers"
        shown = entry.presented
        if shown is not None and (sorted(set(shown)) != list(shown) or not set(shown) <= set(range(len(entry.facts)))):
            return f"it presented {list(shown)} of {len(entry.facts)} facts"
        if entry.kind == "rollback":
            return "it takes back no edit" if not index or self.summary(index - 1).kind != "edit" else None
        if set(entry.update) not in FORMS:
            return f"it holds {sorted(entry.update)}"
        rows = {len(t) for part in ("keys", "values") for t in entry.update.get(part, {}).values()}
        for part, by_module in entry.update.items():
            for module, tensor in by_module.items():
                d_in, d_out = self.shapes[module]
                wanted = {"keys": (len(tensor), d_in), "values": (len(tensor), d_out)}.get(part, (d_out, d_in))
                if tuple(tensor.shape) != wanted or not tensor.is_floating_point() or len(rows) > 1:
                    return f"{part} of {module} has shape {tuple(tensor.shape)}"
        if "keys" in entry.update and set(entry.update["keys"]) != set(entry.update["values"]):
            return "keys and values are of different modules"
        return None

    def entries(self) -> Iterator[Entry]:
        """The usable entries without their tensors, in order; damage ends them and is put in :attr:`damage`."""
        for index in range(len(self.names)):
            try:
                yield self.summary(index)
            except LedgerError as error:
                self.names, self.damage = self.names[:index], str(error)
                return

    def verify(self, lm: EditableLM | None = None) -> str | None:
        """Check every entry; with an LLM, also that the updates lead to the weights that were recorded.

        Returns:
            What is wrong, or None. ``len(ledger)`` is then what is usable.

        Raises:
            LedgerError: the LLM is another one than was edited.
        """
        self._checked.clear()
        if lm is not None:
            self.check_model(lm)
            for _ in self._walk(lm, None):
                pass
        else:
            for _ in self.entries():
                pass
        return self.damage

    def check_model(self, lm: EditableLM) -> None:
        """Raise LedgerError unless the ledger is of this LLM: the same modules and the same W₀."""
        if lm.module_shapes != self.shapes:
            raise LedgerError(
                f"{self.folder} records edits of {len(self.shapes)} modules such as {next(iter(self.shapes.items()))}, "
                f"but {lm.name or 'the model'} has {len(lm.module_shapes)} edited modules such as "
                f"{next(iter(lm.module_shapes.items()))}; load it with edit_modules={list(self.shapes)[:2]}…"
            )
        if _original_hash(lm) != self.header["original"]:
            raise LedgerError(f"{self.folder} records edits of {self.header['model']!r}, whose pre-trained weights are "
                              f"not those of {lm.name!r} as loaded here (dtype {lm.dtype}); name the model, and the "
                              f"dtype, that it was made with ({self.header['dtype']})")

    def undone(self) -> set[int]:
        """Batches that an undo has taken out."""
        return {entry.batch for entry in self.entries() if entry.kind == "undo"}

    # -- the weights -----------------------------------------------------------------------------------------------

    def _walk(self, lm: EditableLM, to: int | None) -> Iterator[tuple[Entry, Mapping[str, Tensor]]]:
        """Each of the first ``to`` entries with the weights after it; damage ends it, as in :meth:`entries`."""
        original = {m: lm.original_weight(m) for m in lm.module_shapes}
        weights: Mapping[str, Tensor] = original
        before = weights
        for index in range(len(self.names) if to is None else to):
            try:
                entry = self.read(index)
                if entry.kind == "rollback":
                    weights = before
                else:
                    before, weights = weights, updated(weights, original, _on(entry.update, lm))
                if weights_hash(weights) != entry.weights_after:
                    raise LedgerError(
                        f"entry {index} ({self.folder / self.names[index]}) leads to other weights here than those "
                        f"recorded; the {index} entries before it are usable. If its file is whole (verify without the "
                        "model), this machine computes otherwise: use the same device, and the same number of threads"
                    )
            except LedgerError as error:
                self.names, self.damage = self.names[:index], str(error)
                return
            yield entry, weights

    def weights(self, lm: EditableLM, to: int | None = None) -> dict[str, Tensor]:
        """The weights after the first ``to`` entries (all of them by default); the LLM is left as it is.

        Raises:
            ValueError: there are not so many entries.
            LedgerError: an entry among them is damaged, or the ledger is of another LLM.
        """
        self.check_model(lm)
        if to is not None and not 0 <= to <= len(self):
            damage = f" ({self.damage})" if self.damage else ""
            raise ValueError(f"to is {to}; {self.folder} can be replayed to 0 … {len(self)} entries{damage}")
        wanted = len(self) if to is None else to
        weights: Mapping[str, Tensor] = {m: lm.original_weight(m) for m in lm.module_shapes}
        for _, after in self._walk(lm, wanted):
            weights = after
        if len(self) < wanted:
            raise LedgerError(self.damage or "damaged")
        return dict(weights)

    def replay(self, lm: EditableLM, to: int | None = None) -> None:
        """Give the LLM the weights after the first ``to`` entries, bit for bit as they were; see :meth:`weights`."""
        lm.restore(self.weights(lm, to))

    # -- writing ---------------------------------------------------------------------------------------------------

    def append(
        self, kind: Kind, update: Update, after: Mapping[str, Tensor], batch: int, presentation: int = 0,
        facts: Sequence[int] = (), norm: float = 0.0, random: Mapping[str, Any] | None = None,
        memory: Mapping[str, Tensor] | None = None, presented: Sequence[int] | None = None,
    ) -> None:
        """Put an entry on the disk, and before it the agent's memory; when this returns, they are there.

        Raises:
            OSError: the disk is full or read-only; the ledger is as it was.
            LedgerError: the ledger was not locked by this process, or is damaged.
        """
        if self._lock is None:
            raise LedgerError(f"{self.folder} is open for reading only; lock() it first")
        if self.damage:
            raise LedgerError(f"{self.damage}; go on with resume, which puts the damaged part aside")
        index = len(self)
        if memory is not None:
            self._memory_names.append(self._write(f"memory-{index:08d}-", memory, {"index": str(index)}))
        entry = Entry(
            index, kind, int(batch), int(presentation), tuple(map(int, facts)), norm, weights_hash(after), random,
            self.names[-1] if self.names else "", {}, None, None if presented is None else tuple(map(int, presented)),
        )
        tensors = {f"{part}.{module}": t for part, by_module in update.items() for module, t in by_module.items()}
        tensors["random.torch"] = torch.get_rng_state()
        left_out = ("update", "torch_random", *(("presented",) if presented is None else ()))
        described = {k: v for k, v in vars(entry).items() if k not in left_out}
        name = self._write(f"{index:08d}-", tensors, {"entry": json.dumps(described)})
        self.names.append(name)
        if memory is not None:
            for old in self._memory_names[:-MEMORIES]:
                (self.folder / old).unlink(missing_ok=True)
            self._memory_names = self._memory_names[-MEMORIES:]

    def _write(self, prefix: str, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> str:
        # Cloned where tensors share memory, which the format does not know.
        data = save({k: v.detach().contiguous().cpu().clone() for k, v in tensors.items()}, metadata)
        name = f"{prefix}{hashlib.sha256(data).hexdigest()}.safetensors"
        write_bytes(self.folder / name, data)
        return name

    def undo(self, lm: EditableLM, batch: int) -> None:
        """Take a batch's updates out of the LLM, by an entry that subtracts them; the LLM gets the resulting weights.

        The result is W₀ plus all other updates, to rounding. Later updates stay as they are, though they were computed
        while this one was in place.

        Raises:
            ValueError: there is no such batch, or it has been undone.
            LedgerError: as :meth:`weights`.
        """
        if batch in self.undone():
            raise ValueError(f"batch {batch} has been undone already")
        if not any(e.batch == batch and e.kind == "edit" for e in self.entries()):
            batches = {e.batch for e in self.entries() if e.kind == "edit"}
            known = f"batches {min(batches)} to {max(batches)}" if batches else "no batch"
            raise ValueError(f"{self.folder} has {known}, not {batch}")
        self.check_model(lm)
        original = {m: lm.original_weight(m) for m in lm.module_shapes}
        weights: Mapping[str, Tensor] = original
        before = weights
        total: dict[str, Tensor] = {m: torch.zeros_like(w) for m, w in original.items()}
        factors: list[Update] = []
        low_rank = True
        facts: tuple[int, ...] = ()
        count = len(self)
        for entry, after in self._walk(lm, count):
            taken_back = entry.index + 1 < count and self.summary(entry.index + 1).kind == "rollback"
            if entry.batch == batch and entry.kind == "edit" and not taken_back:
                facts = entry.facts
                total = {m: total[m] + (after[m] - before[m]) for m in total}
                low_rank &= "keys" in entry.update
                factors.append(entry.update)
            before = after
        if len(self) < count:
            raise LedgerError(self.damage or "damaged")
        weights = before
        update: Update = {"updates": {m: -t for m, t in total.items()}}
        if low_rank and factors:
            keys = {m: torch.cat([f["keys"][m] for f in factors]) for m in factors[0]["keys"]}
            values = {m: -torch.cat([f["values"][m] for f in factors]) for m in factors[0]["values"]}
            if sum(t.numel() for t in (*keys.values(), *values.values())) < sum(t.numel() for t in total.values()):
                update = {"keys": keys, "values": values}
        after = updated(weights, original, _on(update, lm))
        self.append("undo", update, after, batch, facts=facts, norm=change_norm(weights, after))
        lm.restore(after)

    # -- the agent's memory, and cutting -----------------------------------------------------------------------------

    def memory(self, index: int) -> dict[str, Tensor] | None:
        """The agent's memory as it was at an entry, or None where that is not kept, or damaged."""
        for name in self._memory_names:
            if name.startswith(f"memory-{index:08d}-"):
                with suppress(LedgerError):
                    return _checked_tensors(self.folder / name)[0]
        return None

    def cut(self, length: int) -> None:
        """Put everything but the first ``length`` entries aside, in the subfolder ``damaged``."""
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


def check_ledger(folder: str | Path, resume: bool = False) -> None:
    """Make sure that a ledger may begin in a folder or, to ``resume``, go on there.

    Raises:
        FileExistsError: the folder is a file, or not empty and no ledger to go on with.
        LedgerError: the ledger's header is damaged, or of a newer format.
    """
    if resume and (Path(folder) / HEADER).exists():
        _read_header(Path(folder))
    else:
        _check_new(Path(folder))


def _check_new(folder: Path) -> None:
    """Make sure that a ledger may begin there; what one leaves that was killed before its header was whole is nothing.

    Raises:
        FileExistsError: the folder is a file, or not empty.
    """
    unfinished = {LOCK, MARKER, partial_of(MARKER).name, partial_of(HEADER).name}
    if folder.exists() and (not folder.is_dir() or any(path.name not in unfinished for path in folder.iterdir())):
        going_on = ", or go on with it: resume (--resume)" if (folder / HEADER).exists() else ""
        raise FileExistsError(f"{folder} is there already and not empty; name another folder for the ledger{going_on}")


def _reserved(folder: Path) -> filelock.BaseFileLock:
    """The folder's lock, held by this process until it is released or the process dies.

    Raises:
        LedgerError: another process has it.
    """
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise LedgerError(f"{folder} is being written by another process; wait for it to end") from error
    return lock


def _original_hash(lm: EditableLM) -> str:
    return weights_hash({m: lm.original_weight(m) for m in lm.module_shapes})


def _on(update: Update, lm: EditableLM) -> dict[str, dict[str, Tensor]]:
    return {part: {m: t.to(lm.device) for m, t in by_module.items()} for part, by_module in update.items()}


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / HEADER
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no ledger (no {HEADER}); give the folder that --ledger named")
    if path.stat().st_size > MAX_HEADER_BYTES:
        raise LedgerError(f"{path} has {path.stat().st_size} bytes, more than any ledger's header; it is none")
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        if header["format"] != FORMAT:
            raise LedgerError(f"{path} is of format {header['format']!r}, this version reads {FORMAT}; use a newer one")
        for module, shape in header["shapes"].items():
            if len(shape) != 2 or not all(type(n) is int and 0 < n < 2**31 for n in shape):
                raise ValueError(f"module {module!r} has shape {shape!r}")
        if not all(isinstance(header[k], str) for k in ("model", "dtype", "original")):
            raise ValueError("model, dtype and original must be texts")
        if not isinstance(header["settings"], dict) or not header["shapes"]:
            raise ValueError("settings or shapes are empty")
    except LedgerError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LedgerError(f"{path} is damaged ({type(error).__name__}: {error}); without it the ledger cannot be "
                          "read") from error
    return dict(header)


def _checked_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors and metadata, once its content has been found to be what its name says."""
    digest = path.name.rsplit("-", 1)[-1].removesuffix(".safetensors")
    place = f"{path.parent} is damaged at {path.name[:24]}…"
    try:
        if path.is_symlink() or not path.is_file():
            raise LedgerError(f"{place}: it is no regular file")
        if path.stat().st_size > MAX_ENTRY_BYTES:
            raise LedgerError(f"{place}: it has {path.stat().st_size} bytes, more than an entry can")
        if sha256_of(path) != digest:
            raise LedgerError(f"{place}: its content has another checksum (it was changed or cut short); the entries "
                              "before it are usable")
        with safe_open(path, "pt") as content:
            return {k: content.get_tensor(k) for k in content.keys()}, content.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise LedgerError(f"{place}: it cannot be read ({error})") from error
