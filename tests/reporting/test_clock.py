"""What a long run says of its time."""

from __future__ import annotations

import io
import sys

import pytest

from rledit_env.reporting import Clock, duration, flush_lines


def test_the_clock_says_the_time_gone_and_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    clock = Clock(600, lambda: now[0])
    now[0] = 130.0
    clock.say("editing")
    assert capsys.readouterr().out == "[30 s, about 9.5 min left] editing\n"


def test_the_end_can_be_corrected_and_nothing_is_left_after_it() -> None:
    now = [0.0]
    clock = Clock(60, lambda: now[0])
    now[0] = 10.0
    clock.expect(20)
    assert clock.left == 20
    now[0] = 50.0
    assert (clock.left, clock.elapsed) == (0, 50)


@pytest.mark.parametrize("seconds, text", [(0.4, "0 s"), (99, "99 s"), (100, "1.7 min"), (3600, "60.0 min")])
def test_durations_are_in_seconds_or_minutes(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_lines_of_an_output_that_is_a_file_appear_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written))
    flush_lines()
    print("a line")
    assert written.getvalue().split() == [b"a", b"line"]
