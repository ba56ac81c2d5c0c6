"""Tries every path that is to be written before any work is done."""

from __future__ import annotations

import errno
import os
import secrets
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rledit_env.files import check_free, check_growing, check_page, check_result, partial_of

LONG_NAME = "x" * 128  # longer than the names of the files that are written into folders

MENDS = {
    errno.ENOSPC: "free some space, or name a place on another disk",
    errno.EDQUOT: "free some space, or name a place on another disk",
    errno.ENAMETOOLONG: "give a shorter name",
}


class PathError(OSError):
    """A path cannot be written, or cannot take the output; the message says what to do."""


@dataclass(frozen=True)
class Input:
    """A file or folder that is read.

    Attributes:
        name: its name in messages, such as "the facts (--facts facts.jsonl)".
        path: its path.
    """

    name: str
    path: Path


@dataclass(frozen=True)
class Output:
    """A file or folder that will be written.

    Attributes:
        option: the option that names it, such as "--out".
        path: its path.
        check: raises OSError where the present content of the path may not be replaced or continued.
        folder: whether it is a folder; else it is a file.
        replaced: whether a folder is written under another name beside it and renamed.
        apart: whether it must be outside of folders that are read.
        parts: names in the folder; those of folders end with a slash.
    """

    option: str
    path: Path
    check: Callable[[Path], None]
    folder: bool = True
    replaced: bool = False
    apart: bool = True
    parts: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.option} {self.path}"


def whole(option: str, path: Path, overwrite: bool = False) -> Output:
    """A folder that is written in one piece, see `rledit_env.files.whole_folder`."""
    return Output(option, path, lambda place: check_free(place, overwrite), replaced=True)


def growing(option: str, path: Path, what: str, parts: tuple[str, ...] = ()) -> Output:
    """A folder that is begun or continued, see `rledit_env.files.check_growing`."""
    return Output(option, path, lambda place: check_growing(place, what), parts=parts)


def added(option: str, path: str | Path) -> Output:
    """A folder that files are added to, whatever is in it."""
    return Output(option, Path(path), lambda place: None, apart=False)


def result(option: str, path: Path, form: str) -> Output:
    """A JSON file, see `rledit_env.files.check_result`."""
    return Output(option, path, lambda place: check_result(place, form), folder=False)


def page(option: str, path: Path) -> Output:
    """A page, see `rledit_env.files.check_page`."""
    return Output(option, path, check_page, folder=False)


def try_outputs(outputs: Sequence[Output], inputs: Sequence[Input] = ()) -> None:
    """Check that all outputs can be written and that nothing is lost by it; leaves no files behind.

    Raises:
        OSError: an output cannot be written; the message names the path, the reason and what to do.
    """
    for output in outputs:
        with _explain_errors(output):
            _check_form(output)
    for number, output in enumerate(outputs):
        for source in inputs:
            _check_apart(output, source)
        for other in outputs[:number]:
            _check_distinct(other, output)
    for output in outputs:
        output.check(output.path)
        with _explain_errors(output):
            _try(output)


def try_or_exit(outputs: Sequence[Output], inputs: Sequence[Input] = ()) -> None:
    """:func:`try_outputs` for a script: an error is printed in one line, and ends the program with exit code 2."""
    try:
        try_outputs(outputs, inputs)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


@contextmanager
def _explain_errors(output: Output) -> Iterator[None]:
    """Context in which the system's errors become a PathError that names the output and says what to do."""
    try:
        yield
    except PathError:
        raise
    except OSError as error:
        advice = MENDS.get(error.errno or 0, "name a place on a disk that can be written")
        raise PathError(f"{output} cannot be written ({error.strerror or error}); {advice}") from error


# -- what kind of thing is there -----------------------------------------------------------------------------------


def _check_form(output: Output) -> None:
    """Refuse a link to nothing, a path below a file, and a file in place of a folder or the reverse."""
    if "\0" in str(output.path):
        raise PathError(f"{output.option} {str(output.path)!r} is no path; give another name")
    absolute = Path(os.path.abspath(output.path))
    for place in (*reversed(absolute.parents), absolute):
        if place.is_symlink() and not _exists(place):
            raise PathError(f"{output} cannot be written: {place} is a symbolic link that leads nowhere "
                            f"(to {os.readlink(place)}). Remove it, or name another path")
    real = Path(os.path.realpath(output.path))
    _check_is(output, real, output.folder)
    for place in real.parents:
        if _exists(place) and not place.is_dir():
            raise PathError(f"{output} cannot be written: {place} is a file, which holds nothing. Name another folder")
    for part in output.parts:
        _check_is(output, real / part, part.endswith("/"))


def _exists(path: Path) -> bool:
    """Whether a path exists. Unlike with Path.exists(), a name that is too long is an error."""
    try:
        path.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False
        raise
    return True


def _check_is(output: Output, path: Path, folder: bool) -> None:
    if not _exists(path):
        return
    here = output if path == Path(os.path.realpath(output.path)) else f"{output}: {path}"
    status = path.stat()
    if folder and not stat.S_ISDIR(status.st_mode):
        raise PathError(f"{here} is a file; name a folder")
    if not folder and stat.S_ISDIR(status.st_mode):
        raise PathError(f"{here} is a folder; name a file in it")
    if not folder and not stat.S_ISREG(status.st_mode):
        raise PathError(f"{here} is a device or a pipe, which cannot be replaced by a file; name a regular file")
    if _is_printed_into(status):
        raise PathError(f"{here} is what this process prints into, and would be replaced; name another file")


def _is_printed_into(status: os.stat_result) -> bool:
    """Whether a file is the standard output or the error output."""
    for descriptor in (1, 2):
        with suppress(OSError):  # it may be closed
            if os.path.samestat(os.fstat(descriptor), status):
                return True
    return False


# -- whether it is apart from everything else ----------------------------------------------------------------------


def _check_apart(output: Output, source: Input) -> None:
    """Refuse an output that is or contains an input, and an output folder inside an input."""
    advice = "name a folder of its own" if output.folder else "name another file"
    if _same(output.path, source.path):
        raise PathError(f"{output} is {source.name}; {advice}")
    if output.folder and _inside(source.path, output.path):
        raise PathError(f"{output} holds {source.name}; {advice}")
    if output.folder and output.apart and _inside(output.path, source.path):
        raise PathError(f"{output} lies inside {source.name}; {advice}")


def _check_distinct(one: Output, other: Output) -> None:
    """Refuse two outputs at the same place, or one inside the other."""
    if _same(one.path, other.path):
        raise PathError(f"{one} and {other} are the same place; give each its own")
    for inner, outer in ((one, other), (other, one)):
        if outer.folder and _inside(inner.path, outer.path):
            raise PathError(f"{inner} lies inside {outer}; give each a place of its own")


def _same(one: Path, other: Path) -> bool:
    return _identity(os.path.realpath(one)) == _identity(os.path.realpath(other))


def _inside(inner: Path, outer: Path) -> bool:
    """Whether a path is below another one."""
    outer_identity = _identity(os.path.realpath(outer))
    return any(_identity(str(place)) == outer_identity for place in Path(os.path.realpath(inner)).parents)


def _identity(path: str) -> tuple[object, ...]:
    """A key that is equal for two resolved paths to the same place: device and inode of the part that exists, and the
    names that do not exist yet."""
    missing: list[str] = []
    while True:
        try:
            status = os.stat(path)
        except OSError:
            path, name = os.path.split(path)
            missing.insert(0, name)
            continue
        names = [name.casefold() for name in missing] if _ignores_case(Path(path)) else missing
        return (status.st_dev, status.st_ino, *names)


def _ignores_case(folder: Path) -> bool:
    """Whether the folder's file system treats names that differ only in case as the same."""
    for place in (folder, *folder.parents):
        other = place.with_name(place.name.swapcase()) if place.name else place
        if other != place:
            return other.exists() and other.samefile(place)
    return False


# -- whether it can be written -------------------------------------------------------------------------------------


def _try(output: Output) -> None:
    """Write small files where the output will be written, and delete them."""
    path = Path(os.path.realpath(output.path))
    folder = path if output.folder else path.parent
    new_folders: list[Path] = []
    token = secrets.token_hex(4)
    try:
        for place in (*reversed(folder.parents), folder):
            if not place.exists():
                place.mkdir()
                new_folders.append(place)
        if not output.folder:
            _try_file(partial_of(path))
            if path.exists():
                path.open("r+b").close()
            return
        for part in ("", *output.parts):
            if (folder / part).is_dir():
                _try_file(folder / part / f".{token}{LONG_NAME}")
        if output.replaced:
            renamed = path.with_name(f".{path.name}.replaced-{token}")
            renamed.mkdir()
            renamed.rmdir()
    finally:
        for place in reversed(new_folders):
            with suppress(OSError):  # another process may have put something there
                place.rmdir()


def _try_file(path: Path) -> None:
    if path.exists():  # another process is writing it, or was killed while it did
        return
    try:
        path.write_bytes(b"rledit")
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
