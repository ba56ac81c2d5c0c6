"""The format of an edit ledger: its files, and the content of an entry.

A ledger is an append-only folder of

- ``ledger.json``: the model, its edited modules, the hash of W₀, and the run's settings;
- ``NNNNNNNN-DIGEST.safetensors``: entries, counted from 0. An entry contains an update in its original form, the batch
  and its facts, the random state, the hash of the weights after the update, and the name of the entry before it. DIGEST
  is the SHA-256 of the file. So each file is checked against its name, and each entry against all before it;
- ``memory-NNNNNNNN-DIGEST.safetensors``: the agent's memory of the stream at that entry; only the latest two are kept;
- ``damaged``: a folder of files that were moved there when an interrupted or damaged ledger was resumed.

Files are written whole (to a temporary name, synced, renamed) and are never changed. Nothing in them is code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rledit_env.files import sha256_of
from rledit_env.type_aliases import JsonObject
from rledit_env.updates import Update, from_tensors

LEDGER = "edit ledger"  # the kind of the folder in its marker
HEADER = "ledger.json"
FORMAT = 1
ENTRY_NAME = re.compile(r"(\d{8})-([0-9a-f]{64})\.safetensors")
MEMORY_NAME = re.compile(r"memory-(\d{8})-([0-9a-f]{64})\.safetensors")
TORCH_RANDOM = "random.torch"  # the one tensor in an entry's file that does not belong to the update
MAX_HEADER_BYTES = 2**24
MAX_ENTRY_BYTES = 2**34

Kind = Literal["edit", "rollback", "undo"]


class LedgerError(ValueError):
    """A ledger is damaged, belongs to another run, or is in use; the message names the place and what can be done."""


@dataclass(frozen=True)
class Entry:
    """One entry of a ledger.

    Attributes:
        index: its place, from 0.
        kind: "edit"; "rollback", which takes back the edit before it because that broke the LLM; or "undo", which
            subtracts all of a batch's edits.
        batch: the batch's place in the run, from 0.
        presentation: the number of the batch's presentation, from 0.
        facts: the batch's facts, as indices of the data set.
        norm: √(Σ ‖ΔW‖_F²) over the modules.
        weights_after: :func:`weights_hash` of the weights after the entry.
        random: the state of the environment's random generator before the step's reward, or None.
        previous: the name of the entry before it, or "".
        update: the update; nothing for a rollback.
        torch_random: torch's random state (bytes,) at that time, or None.
        presented: the presented facts, as indices in the batch; None for all.
    """

    index: int
    kind: Kind
    batch: int
    presentation: int
    facts: tuple[int, ...]
    norm: float
    weights_after: str
    random: Mapping[str, object] | None
    previous: str
    update: Update = field(repr=False)
    torch_random: Tensor | None = field(repr=False)
    presented: tuple[int, ...] | None = None

    @classmethod
    def from_content(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Entry:
        """The entry that a file's tensors and metadata describe.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: they do not describe an entry.
        """
        facts = json.loads(metadata["entry"])
        update = from_tensors({name: tensor for name, tensor in tensors.items() if name != TORCH_RANDOM})
        if facts.get("presented") is not None:
            facts["presented"] = tuple(facts["presented"])
        torch_random = tensors.get(TORCH_RANDOM)
        return cls(**{**facts, "facts": tuple(facts["facts"]), "update": update, "torch_random": torch_random})

    def content(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors and the metadata of the entry's file."""
        tensors = self.update.tensors()
        if self.torch_random is not None:
            tensors[TORCH_RANDOM] = self.torch_random
        left_out = {"update", "torch_random"} | ({"presented"} if self.presented is None else set())
        return tensors, {"entry": json.dumps({k: v for k, v in vars(self).items() if k not in left_out})}

    def problem(self, shapes: Mapping[str, tuple[int, int]]) -> str | None:
        """A description of what is wrong with the entry, apart from its place in the ledger; None if it is valid.

        Args:
            shapes: module → (d_in, d_out).
        """
        if self.kind not in ("edit", "rollback", "undo") or not re.fullmatch("[0-9a-f]{64}", self.weights_after):
            return "its kind or its hash is not valid"
        numbers = (self.batch, self.presentation, *self.facts)
        if not all(type(n) is int and n >= 0 for n in numbers) or not isinstance(self.norm, (int, float)):
            return "its batch, its facts or its norm are no numbers"
        places = self.presented
        count = len(self.facts)
        if places is not None and (sorted(set(places)) != list(places) or not set(places) <= set(range(count))):
            return f"it presented {list(places)} of {count} facts"
        return None if self.kind == "rollback" else self.update.misfit(shapes)


@dataclass(frozen=True)
class RunState:
    """The state of a run at an edit, from which it can be resumed.

    Attributes:
        presentation: the number of the batch's presentation, from 0.
        presented: the presented facts, as indices in the batch; None for all.
        random: the state of the environment's random generator before the step's reward, or None.
        memory: the agent's memory of the stream, or None.
    """

    presentation: int = 0
    presented: Sequence[int] | None = None
    random: Mapping[str, object] | None = None
    memory: Mapping[str, Tensor] | None = None


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 (hexadecimal) over the weights' names, shapes and bytes, in their order."""
    digest = sha256()
    for name, weight in weights.items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_header(folder: Path) -> JsonObject:
    """The checked content of a ledger's ``ledger.json``.

    Raises:
        FileNotFoundError: the folder contains no ledger.
        LedgerError: the file is damaged, or of a newer format.
    """
    path = folder / HEADER
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no ledger (no {HEADER}); give the folder that --ledger named")
    if path.stat().st_size > MAX_HEADER_BYTES:
        raise LedgerError(f"{path} has {path.stat().st_size} bytes, more than a ledger's header can have")
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


def checked_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a ledger's file, after a check of its content against the digest in its name.

    Raises:
        LedgerError: the content has another digest, or the file cannot be read.
    """
    digest = path.name.rsplit("-", 1)[-1].removesuffix(".safetensors")
    place = f"{path.parent} is damaged at {path.name[:24]}…"
    try:
        if path.is_symlink() or not path.is_file():
            raise LedgerError(f"{place}: it is no regular file")
        if path.stat().st_size > MAX_ENTRY_BYTES:
            raise LedgerError(f"{place}: it has {path.stat().st_size} bytes, more than an entry can have")
        if sha256_of(path) != digest:
            raise LedgerError(f"{place}: its content has another checksum (it was changed or cut short); the entries "
                              "before it are usable")
        with safe_open(path, "pt") as content:
            return {k: content.get_tensor(k) for k in content.keys()}, content.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise LedgerError(f"{place}: it cannot be read ({error})") from error
