"""Claims: divides work between processes, on one machine or several, by files in a folder that all of them see.

A claim is a file that its process creates, which succeeds for one process only, and to which it appends a byte every
few seconds. A claim that has not grown for a while is that of a process that died, or of a machine that is gone, and
another process takes it over. Each observer measures this with its own clock, so that the clocks of the machines need
not agree. Of processes on the same machine it is known at once whether they still run.

The file system must create files exclusively (O_EXCL) and show a file's size to whoever opens it, as local disks, NFS
from version 3 on, and the file systems of clusters (Lustre, GPFS, BeeGFS, CephFS) do. Locks are not needed.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from rledit_env.type_aliases import JsonObject

BEAT = 10.0  # seconds between two signs of life
EXPIRES = 120.0  # seconds without one, after which a claim of another machine is taken over
POLL = 1.0  # seconds between two looks at what others do


@dataclass(frozen=True)
class Claim:
    """A claim file.

    Attributes:
        name: what is claimed.
        generation: 0 for the first claim; a claim that takes an expired one over has the next number.
        path: the file.
    """

    name: str
    generation: int
    path: Path


class Claims:
    """This process's claims, and a view of those of others. Close it when the work is done.

    Args:
        folder: the folder of the claims, the same for all processes; created with the first claim.
        beat: seconds between two signs of life.
        expires: seconds without a sign of life, after which a claim is taken over; several times ``beat``, and more
            than the minute for which NFS may show an old file.
    """

    def __init__(self, folder: str | Path, beat: float = BEAT, expires: float = EXPIRES) -> None:
        self.folder, self.beat, self.expires = Path(folder), beat, expires
        self.owner = f"{socket.gethostname()}:{os.getpid()}"
        self._identity = {**_place(), "pid": os.getpid(), "owner": self.owner, "token": secrets.token_hex(8)}
        self._held: dict[str, Claim] = {}
        self._seen: dict[Path, tuple[int, float]] = {}  # others' claims: size, and when it was first seen
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # -- claiming ----------------------------------------------------------------------------------------------------

    def claim(self, name: str) -> bool:
        """Try to claim something; returns whether this process has it now.

        Raises:
            OSError: the folder cannot be written.
        """
        if name in self._held:
            return True
        latest = self._latest().get(name)
        before = {} if latest is None else _read(latest)
        if latest is not None and not self._expired(latest):
            return False
        generation = 0 if latest is None else latest.generation + 1
        claim = Claim(name, generation, self.folder / f"{quote(name, safe='')}.{generation}")
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(claim.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:  # another process was faster
            return False
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(self._identity) + "\n")
        if latest is not None and (not latest.path.exists() or _read(latest) != before):
            # Another process took the expired claim over, and has given it up since.
            claim.path.unlink(missing_ok=True)
            return False
        self._held[name] = claim
        if self._thread is None:
            self._thread = threading.Thread(target=self._beat, name="rledit claims", daemon=True)
            self._thread.start()
        return True

    def release(self, name: str) -> None:
        """Give a claim up, once the result is on the disk or the work has failed."""
        claim = self._held.pop(name, None)
        for generation in range(claim.generation + 1) if claim is not None else ():
            with suppress(OSError):
                (self.folder / f"{quote(name, safe='')}.{generation}").unlink(missing_ok=True)

    @contextmanager
    def turn(self, name: str, done: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Context in which this process has the claim; waits for other processes.

        Args:
            name: what is claimed.
            done: whether it is no longer needed, which ends the waiting.

        Returns:
            Whether this process has the claim; if not, it is done.
        """
        held = self.claim(name)
        while not held and not done():
            time.sleep(POLL)
            held = self.claim(name)
        try:
            yield held
        finally:
            if held:
                self.release(name)

    def close(self) -> None:
        """Give all claims up, and remove those of dead processes: one may have died once its result was on the disk."""
        self._stop.set()
        for name in list(self._held):
            self.release(name)
        for claim in self._latest().values():
            if self._expired(claim):
                claim.path.unlink(missing_ok=True)

    # -- others ------------------------------------------------------------------------------------------------------

    def others(self) -> dict[str, str]:
        """What other processes have claimed, by name → the process, "host:pid"; without expired claims."""
        return {name: str(_read(claim).get("owner", "unknown")) for name, claim in sorted(self._latest().items())
                if name not in self._held and not self._expired(claim)}  # fmt: skip

    def _latest(self) -> dict[str, Claim]:
        """The latest generation of every claim in the folder, this process's own included."""
        latest: dict[str, Claim] = {}
        try:
            paths = list(self.folder.iterdir())
        except FileNotFoundError:
            return {}
        for path in paths:
            name, _, number = path.name.rpartition(".")
            if name and number.isdecimal():
                claim = Claim(unquote(name), int(number), path)
                if claim.name not in latest or latest[claim.name].generation < claim.generation:
                    latest[claim.name] = claim
        return latest

    def _expired(self, claim: Claim) -> bool:
        """Whether the claim's process is known to be dead, or has given no sign of life for too long."""
        try:
            with claim.path.open("rb") as file:  # opened, since a network file system may know an old size of a name
                size = os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            return False  # given up meanwhile, and not to be taken over; the next look at the folder tells
        identity = _read(claim)
        if identity and {k: identity.get(k) for k in _place()} == _place() and not _runs(identity):
            return True
        known, since = self._seen.get(claim.path, (-1, 0.0))
        if size != known:
            self._seen[claim.path] = (size, time.monotonic())
            return False
        return time.monotonic() - since > self.expires

    def _beat(self) -> None:
        """Append a byte to every claim of this process from time to time."""
        while not self._stop.wait(self.beat):
            for claim in list(self._held.values()):
                with suppress(OSError):  # a full disk, or a network that is away: the next beat may succeed
                    handle = os.open(claim.path, os.O_WRONLY | os.O_APPEND)  # not created again if it is gone
                    try:
                        os.write(handle, b".")
                    finally:
                        os.close(handle)


def _read(claim: Claim) -> JsonObject:
    """The identity of a claim's process; empty if it has not been written yet."""
    try:
        identity = json.loads(claim.path.read_text(encoding="utf-8").partition("\n")[0])
    except (OSError, ValueError):
        return {}
    return identity if isinstance(identity, dict) else {}


def _place() -> dict[str, str]:
    """The place in which this process's number is known: machine, boot and, in containers, name space."""
    return {"host": socket.gethostname(), "boot": _text("/proc/sys/kernel/random/boot_id"), "space": _link("self")}


def _runs(identity: JsonObject) -> bool:
    """Whether a process of this place still runs; True where that is not known."""
    pid = identity.get("pid")
    if os.name != "posix" or not isinstance(pid, int):
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    state = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return not state or state[0] not in ("Z", "X")  # a dead process whose parent has not asked yet


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _link(process: str) -> str:
    try:
        return os.readlink(f"/proc/{process}/ns/pid")
    except OSError:
        return ""
