"""Files and folders that come into being whole or not at all."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def check_free(folder: str | Path, overwrite: bool = False) -> None:
    """Make sure that a folder may be written.

    Raises:
        FileExistsError: there is a file of that name, or a folder that is not empty (unless ``overwrite``).
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; name a folder")
    if path.is_dir() and not overwrite and any(path.iterdir()):
        raise FileExistsError(f"the folder {path} is not empty; name another one, or ask for it to be overwritten")


@contextmanager
def whole_folder(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``folder`` to write in, renamed to it at the end; an error leaves nothing behind.

    Raises:
        FileExistsError: as :func:`check_free`, before anything is written.
    """
    path = Path(folder)
    check_free(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)  # what a killed process left is in nobody's way; in a container all have the same id
    work = path.with_name(f".{path.name}.partial-{token}")
    replaced = path.with_name(f".{path.name}.replaced-{token}")
    work.mkdir()
    try:
        yield work
        for file in work.rglob("*"):  # some writers make private files; these are as readable as any new file
            if file.is_file():
                file.chmod(work.stat().st_mode & 0o666)
                sync(file)
        if path.exists():
            path.rename(replaced)
        try:
            work.rename(path)
        except BaseException:
            if replaced.exists():
                replaced.rename(path)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole, making its folder if need be.

    Raises:
        OSError: as :func:`write_bytes`.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file whole; its folder must be there. It is on the disk, not on its way there, when this returns.

    Raises:
        OSError: the disk is full, or the folder may not be written; what was there before still is.
    """
    with _replacing(Path(path)) as partial, partial.open("wb") as file:
        file.write(data)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole; its folder must be there. It is on the disk when this returns.

    Raises:
        OSError: as :func:`write_bytes`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with _replacing(Path(path)) as partial:
        try:
            save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, partial, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        partial.chmod(partial.parent.stat().st_mode & 0o666)  # safetensors makes private files


def partial_of(path: str | Path) -> Path:
    """Where a file is written before it takes its place: what a process that was killed meanwhile leaves."""
    path = Path(path)
    return path.with_name(f".{path.name}.partial")  # one name: these can be large


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A path to write in, which takes the place of ``path`` once it is safe on the disk."""
    partial = partial_of(path)
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    except OSError as error:
        raise type(error)(
            f"{path} cannot be written ({error.strerror or error}); free some space or name another folder. What was "
            "there before still is"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sync(path: str | Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk and survive a power failure."""
    if os.name != "posix" and Path(path).is_dir():  # folders cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
