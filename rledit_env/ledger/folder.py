"""The folder of a ledger: checks before a ledger is created or resumed, and the lock of the writing process."""

from __future__ import annotations

from pathlib import Path

import filelock

from rledit_env.files import MARKER, partial_of
from rledit_env.ledger.format import HEADER, LedgerError, read_header

LOCK = ".lock"


def check_ledger(folder: str | Path, resume: bool = False) -> None:
    """Check that a ledger may be created in a folder or, with ``resume``, resumed there.

    Raises:
        FileExistsError: the folder is a file, or not empty and without a ledger to resume.
        LedgerError: the ledger's header is damaged, or of a newer format.
    """
    if resume and (Path(folder) / HEADER).exists():
        read_header(Path(folder))
    else:
        check_new(Path(folder))


def check_new(folder: Path) -> None:
    """Check that a ledger may be created in a folder. Files of a process that was killed before it wrote the header are
    ignored.

    Raises:
        FileExistsError: the folder is a file, or not empty.
    """
    unfinished = {LOCK, MARKER, partial_of(MARKER).name, partial_of(HEADER).name}
    if folder.exists() and (not folder.is_dir() or any(path.name not in unfinished for path in folder.iterdir())):
        going_on = ", or go on with it: resume (--resume)" if (folder / HEADER).exists() else ""
        raise FileExistsError(f"{folder} is there already and not empty; name another folder for the ledger{going_on}")


def reserved(folder: Path) -> filelock.BaseFileLock:
    """Lock the folder for this process, until the lock is released or the process dies.

    Raises:
        LedgerError: another process has locked it.
    """
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise LedgerError(f"{folder} is being written by another process; wait for it to end") from error
    return lock
