"""Claims: one process has a claim, and those of dead processes are taken over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from killing import import_paths

from agents.running import claims as module
from agents.running.claims import Claims

FAST = {"beat": 0.05, "expires": 0.4}


@pytest.fixture(autouse=True)
def _fast_polling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL", 0.02)


def elsewhere(folder: Path, name: str, generation: int = 0) -> Path:
    """A claim of a process on another machine, which gives no sign of life."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.{generation}"
    path.write_text(json.dumps({"host": "far", "boot": "x", "space": "y", "pid": 1, "owner": "far:1"}) + "\n")
    return path


def attempt(claims: Claims, name: str, start: threading.Barrier, got: list[Claims]) -> None:
    start.wait()
    if claims.claim(name):
        got.append(claims)


def test_one_has_a_claim_until_it_gives_it_up(tmp_path: Path) -> None:
    one, other = Claims(tmp_path / "claims"), Claims(tmp_path / "claims")
    assert one.claim("cells/rledit@0.5/seed-1") and one.claim("cells/rledit@0.5/seed-1")
    assert not other.claim("cells/rledit@0.5/seed-1") and other.claim("cells/rledit@0.5/seed-2")
    assert other.others() == {"cells/rledit@0.5/seed-1": one.owner}
    assert one.owner.endswith(f":{os.getpid()}")
    one.release("cells/rledit@0.5/seed-1")
    assert other.claim("cells/rledit@0.5/seed-1") and one.others().keys() == {
        "cells/rledit@0.5/seed-1", "cells/rledit@0.5/seed-2"
    }  # fmt: skip
    other.close()
    assert one.others() == {} and list((tmp_path / "claims").iterdir()) == []


def test_of_many_that_try_at_once_one_has_the_claim(tmp_path: Path) -> None:
    everyone = [Claims(tmp_path) for _ in range(8)]
    expired = elsewhere(tmp_path, "old")
    for claims in everyone:
        claims.expires = 0.1
        claims.others()  # first seen now
    time.sleep(0.2)
    for name in ("new", "old"):
        start, got = threading.Barrier(8), []
        threads = [threading.Thread(target=attempt, args=(claims, name, start, got)) for claims in everyone]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 1, name
    assert (tmp_path / "old.1").exists() and expired.exists()
    for claims in everyone:
        claims.close()
    assert list(tmp_path.iterdir()) == []


def test_a_claim_without_a_sign_of_life_is_taken_over_and_one_with_signs_is_not(tmp_path: Path) -> None:
    path, claims = elsewhere(tmp_path, "cell"), Claims(tmp_path, **FAST)
    assert not claims.claim("cell") and claims.others() == {"cell": "far:1"}
    for _ in range(6):  # longer than it takes to expire
        time.sleep(0.1)
        with path.open("a") as file:
            file.write(".")
        assert not claims.claim("cell")
    time.sleep(0.5)
    assert claims.others() == {} and claims.claim("cell")
    live = Claims(tmp_path, **FAST)
    for _ in range(8):
        time.sleep(0.1)
        assert not live.claim("cell")  # the new owner gives signs of life by itself
    claims.close()
    assert live.claim("cell")
    live.close()


def test_a_claim_that_was_taken_over_and_given_up_meanwhile_is_not_taken_over_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere(tmp_path, "cell")
    slow, quick = Claims(tmp_path, **FAST), Claims(tmp_path, **FAST)
    monkeypatch.setattr(slow, "_expired", lambda claim: True)
    monkeypatch.setattr(quick, "_expired", lambda claim: True)
    opened = os.open

    def open_late(path: Path, *arguments: int) -> int:
        monkeypatch.setattr(os, "open", opened)
        assert quick.claim("cell")
        quick.release("cell")
        assert quick.claim("cell")  # anew, from the first generation
        return opened(path, *arguments)

    monkeypatch.setattr(os, "open", open_late)
    assert not slow.claim("cell")
    assert quick.claim("cell") and [path.name for path in tmp_path.iterdir()] == ["cell.0"]
    quick.close()


def test_the_claim_of_a_killed_process_of_this_machine_is_taken_over_at_once(tmp_path: Path) -> None:
    code = (f"import time; from agents.running.claims import Claims; c = Claims({str(tmp_path)!r}); "
            "print(c.claim('a'), flush=True); time.sleep(600)")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": import_paths()})  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "True\n"
    claims = Claims(tmp_path)
    assert not claims.claim("a")
    process.kill()
    process.wait()
    assert claims.claim("a")
    claims.close()


def test_what_a_dead_process_left_is_removed_at_the_end_and_what_a_living_one_has_is_kept(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    living, ending = Claims(tmp_path), Claims(tmp_path)
    assert living.claim("kept")
    identity = json.loads(next(tmp_path.iterdir()).read_text().partition("\n")[0])
    (tmp_path / "left.0").write_text(json.dumps(identity | {"pid": dead.pid}) + "\n")
    ending.close()
    assert [path.name for path in tmp_path.iterdir()] == ["kept.0"]
    living.close()


def test_a_turn_waits_until_the_other_is_ready_or_it_is_not_needed_any_more(tmp_path: Path) -> None:
    one, other = Claims(tmp_path, **FAST), Claims(tmp_path, **FAST)
    assert one.claim("tables")
    threading.Timer(0.2, one.release, ["tables"]).start()
    with other.turn("tables") as held:
        assert held and not one.claim("tables")
    assert one.claim("tables")
    with other.turn("tables", done=lambda: True) as held:
        assert not held
    one.close()
