"""Files and folders that come into being whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
    work = path.with_name(f".{path.name}.partial-{os.getpid()}")
    replaced = path.with_name(f".{path.name}.replaced-{os.getpid()}")
    work.mkdir()
    try:
        yield work
        for file in work.rglob("*"):  # some writers make private files; these are as readable as any new file
            if file.is_file():
                file.chmod(work.stat().st_mode & 0o666)
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
    """Write a text file whole, making its folder if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole; its folder must be there."""
    from safetensors.torch import save_file

    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")  # one name: these are large, and a killed process leaves one
    try:
        save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, partial, metadata)
        partial.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes private files
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
