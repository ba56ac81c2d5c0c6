"""Writes files and folders whole or not at all, and marks the folders that rledit wrote."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rledit_env.type_aliases import JsonObject

if TYPE_CHECKING:
    from torch import Tensor

MARKER = ".rledit.json"  # in every folder that rledit writes
MARKER_FORMAT = "rledit-folder-1"
FIGURES = "figures"  # ``what`` in the marker of a folder of pictures
LITTER = (".DS_Store", "Thumbs.db", "desktop.ini")  # files that desktops add to a folder that was opened
GENERATOR = '<meta name="generator" content="rledit-env">'  # in every page that rledit writes


# -- what rledit wrote ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Marker:
    """The content of a folder's marker.

    Attributes:
        what: what the folder is, such as "edited model" or "training run".
        command: the command line that wrote it, if there was one.
        whole: whether the folder was written in one piece, so that it can be replaced. Folders that grow, such as a
            training run's, are never replaced.
        files: paths, relative to the folder, that rledit wrote in it; those of folders end with a slash.
    """

    what: str
    command: str | None = None
    whole: bool = False
    files: tuple[str, ...] = ()


def mark(
    folder: str | Path, what: str, *, command: str | None = None, whole: bool = False, files: Iterable[str] = ()
) -> None:
    """Write the marker of an existing folder, which says that rledit wrote these files.

    An earlier marker's ``what`` and files are kept; the new files are added to them.

    Raises:
        OSError: as :func:`write_bytes`.
    """
    from rledit_env import __version__

    old = read_marker(folder) or Marker(what, command, whole)
    marker = Marker(old.what, command or old.command, whole or old.whole, tuple(sorted({*old.files, *files})))
    if marker == read_marker(folder):
        return
    content = {"format": MARKER_FORMAT, "version": __version__, **vars(marker)}
    write_bytes(Path(folder) / MARKER, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode("utf-8"))


def read_marker(folder: str | Path) -> Marker | None:
    """A folder's marker; None if there is none, or it cannot be read."""
    content = _json_at(Path(folder) / MARKER)
    if content.get("format") != MARKER_FORMAT:
        return None
    what, command, whole, files = (content.get(name) for name in ("what", "command", "whole", "files"))
    if not isinstance(what, str) or not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        return None
    return Marker(what, command if isinstance(command, str) else None, whole is True, tuple(files))


def foreign_in(folder: str | Path) -> Path | None:
    """The path of something in a folder that rledit did not write; None if rledit wrote everything in it.

    rledit wrote what the folder's marker names, results and pages that were added later, and folders of pictures.
    """
    folder = Path(folder)
    marker = read_marker(folder)
    parts = {MARKER, *(marker.files if marker else ())}
    for place, names, files in os.walk(folder):
        names.sort()
        for name in list(names):
            path = Path(place, name)
            if f"{path.relative_to(folder).as_posix()}/" in parts and not path.is_symlink():
                continue
            inner = read_marker(path)
            if path.is_symlink() or inner is None or inner.what != FIGURES or foreign_in(path) is not None:
                return path
            names.remove(name)
        for name in sorted(files):
            path = Path(place, name)
            if path.relative_to(folder).as_posix() not in parts and not _is_own_file(path):
                return path
    return None


def _is_own_file(path: Path) -> bool:
    """Whether a file's content says that rledit wrote it, or it is one of ``LITTER``."""
    if path.is_symlink() or not path.is_file():
        return False
    if path.name in LITTER:
        return True
    if path.suffix == ".json":
        return str(_json_at(path).get("format")).startswith("rledit-")
    return path.suffix == ".html" and is_own_page(path)


def is_own_page(path: str | Path) -> bool:
    """Whether a file is a page that rledit wrote."""
    with suppress(OSError), Path(path).open("rb") as file:
        return GENERATOR.encode() in file.read(1000)
    return False


def _json_at(path: Path) -> JsonObject:
    """The dictionary in a JSON file; an empty one where there is none."""
    with suppress(OSError, ValueError, RecursionError):
        if path.is_file():  # reading a pipe would wait
            content = json.loads(path.read_text(encoding="utf-8"))
            return content if isinstance(content, dict) else {}
    return {}


# -- may it be written? --------------------------------------------------------------------------------------------


def check_free(folder: str | Path, overwrite: bool = False) -> None:
    """Check that a folder may be written in one piece.

    Args:
        folder: its path; a symbolic link is followed.
        overwrite: whether an existing folder may be replaced, if rledit wrote it in one piece and it has nothing else.

    Raises:
        FileExistsError: there is a file of that name; or a folder that is not empty and may not be replaced; or the
            path is the current folder or one above it.
    """
    path = Path(os.path.realpath(folder))
    _check_folder(path, folder)
    if os.path.ismount(path):
        raise FileExistsError(f"{folder} is where a disk is mounted, which cannot be replaced; name a folder in it")
    if not path.is_dir() or not any(path.iterdir()):
        return
    marker = read_marker(path)
    if marker is None:
        raise FileExistsError(
            f"the folder {folder} is not empty ({min(path.iterdir()).name}) and has no {MARKER}, by which rledit knows "
            "the folders that it wrote: it is never replaced. Name another one, or delete it yourself if rledit wrote "
            "it before there were markers"
        )
    if not marker.whole:
        raise FileExistsError(f"the folder {folder} is not empty: it holds {_described(marker)}, which is never "
                              "replaced. Name another one, or delete it yourself")
    foreign = foreign_in(path)
    if foreign is not None:
        raise FileExistsError(f"the folder {folder} is not empty: it holds {foreign.relative_to(path)}, which is no "
                              f"part of the {marker.what} that rledit wrote there. Move that away, or name another one")
    if not overwrite:
        raise FileExistsError(f"the folder {folder} is not empty: it holds {_described(marker)}. Name another one, or "
                              "ask for it to be overwritten (--overwrite, or overwrite=True)")


def check_growing(folder: str | Path, what: str) -> None:
    """Check that a folder that grows may be begun or continued as a ``what``; nothing in it is deleted.

    Raises:
        FileExistsError: there is a file of that name, or a folder that is something else; or the path is the current
            folder or one above it.
    """
    path = Path(os.path.realpath(folder))
    _check_folder(path, folder)
    if not path.is_dir():
        return
    marker = read_marker(path)
    if marker is None:
        foreign = foreign_in(path)
        if foreign is not None:
            content = json.dumps({"format": MARKER_FORMAT, "what": what, "files": []})
            raise FileExistsError(
                f"the folder {folder} holds {foreign.relative_to(path)}, which rledit did not write; name another one. "
                f"If rledit wrote it before there were markers, go on with it by putting {content} into its {MARKER}"
            )
    elif marker.what != what:
        raise FileExistsError(f"the folder {folder} holds {_described(marker)}, no {what}; name another one")


def check_result(path: str | Path, form: str) -> None:
    """Check that a JSON file whose ``format`` is ``form`` may be written.

    Raises:
        FileExistsError: there is a file of another form.
    """
    path = Path(path)
    if path.exists() and path.stat().st_size and _json_at(path).get("format") != form:
        raise FileExistsError(f"{path} is there already, and is no result that rledit wrote ('format' is not {form!r} "
                              "in it): it is not overwritten. Name another file, or delete it yourself")


def check_page(path: str | Path) -> None:
    """Check that a page may be written.

    Raises:
        FileExistsError: there is a file that is not a page of rledit's.
    """
    path = Path(path)
    if path.exists() and path.stat().st_size and not is_own_page(path):
        raise FileExistsError(f"{path} is there already, and is no page that rledit wrote: it is not overwritten. Name "
                              "another file, or delete it yourself")


def check_part(path: str | Path) -> None:
    """Check that a file of a marked folder may be written.

    Raises:
        FileExistsError: the file exists, and the folder's marker does not name it.
    """
    path = Path(path)
    marker = read_marker(path.parent)
    if path.exists() and (marker is None or path.name not in marker.files):
        raise FileExistsError(f"{path} is there already, and rledit did not write it: it is not overwritten. Name "
                              "another folder, or move that file away")


def _check_folder(path: Path, named: str | Path) -> None:
    """Raise FileExistsError for a file, the current folder and those above it; ``path`` is ``named``, resolved."""
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{named} is a file; name a folder")
    try:
        here = Path.cwd()
    except FileNotFoundError:  # the current folder was deleted meanwhile
        return
    if path.is_dir() and any(path.samefile(folder) for folder in (here, *here.parents)):
        what = "is" if path.samefile(here) else "holds"
        raise FileExistsError(f"{named} {what} the current folder ({here}); name a folder inside it")


def _described(marker: Marker) -> str:
    article = "an" if marker.what[0] in "aeiou" else "a"
    return f"{article} {marker.what}" + (f", written by '{marker.command}'" if marker.command else "")


# -- writing -------------------------------------------------------------------------------------------------------


@contextmanager
def whole_folder(
    folder: str | Path, overwrite: bool = False, what: str = "folder", command: str | None = None
) -> Iterator[Path]:
    """Context with a temporary folder to write in, which is renamed to ``folder`` at the end; an error leaves nothing.

    Args:
        folder: its path; a symbolic link is followed.
        overwrite: as in :func:`check_free`.
        what, command: for the folder's :class:`Marker`.

    Raises:
        FileExistsError: as :func:`check_free`, before anything is written.
        OSError: the folder cannot be written; what was there before still is.
    """
    check_free(folder, overwrite)
    path = Path(os.path.realpath(folder))
    token = secrets.token_hex(4)  # leftovers of a killed process do not collide; process ids would, in containers
    work = path.with_name(f".{path.name}.partial-{token}")
    replaced = path.with_name(f".{path.name}.replaced-{token}")
    with _explain_write_errors(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir()
    try:
        with _explain_write_errors(folder):
            yield work
            mark(work, what, command=command, whole=True, files=_listed(work))
            for file in work.rglob("*"):  # some libraries write private files; these get a new file's usual rights
                if file.is_file():
                    file.chmod(work.stat().st_mode & 0o666)
                    sync(file)
        check_free(folder, overwrite)  # something may have been put there meanwhile
        with _explain_write_errors(folder):
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


@contextmanager
def _explain_write_errors(folder: str | Path) -> Iterator[None]:
    """Context in which errors of writing become an OSError that names the folder and what to do."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OSError | SafetensorError) else error
        reason = getattr(cause, "strerror", None) or str(cause)
        raise OSError(f"{folder} cannot be written ({reason}); free some space or name another folder. What was there "
                      "before still is") from error


def _listed(folder: Path) -> list[str]:
    """All paths below a folder, as its marker lists them."""
    paths = (path for path in folder.rglob("*") if path.parent != folder or path.name != MARKER)
    return [path.relative_to(folder).as_posix() + ("/" if path.is_dir() else "") for path in paths]


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole, and make its folder if needed; a symbolic link is followed.

    Raises:
        OSError: as :func:`write_bytes`.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file whole; its folder must exist. The file is on the disk when this returns.

    Raises:
        OSError: the disk is full, or the folder may not be written; what was there before still is.
    """
    with _replacing(Path(path)) as partial, partial.open("wb") as file:
        file.write(data)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole; its folder must exist. The file is on the disk when this returns.

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
    """The temporary path that a file is written to before it is renamed; a killed process leaves it behind."""
    path = Path(path)
    return path.with_name(f".{path.name}.partial")  # always the same name, so that large leftovers do not pile up


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Context with a path to write to, which is renamed to ``path`` once its content is on the disk."""
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
