"""Tests of examples/demo.py, as somebody runs it."""

from __future__ import annotations

import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scripts import run_script

from agents import RLEditAgent

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


@pytest.fixture(scope="module")
def demo() -> dict[str, Any]:
    """What the file defines."""
    return runpy.run_path(str(DEMO))


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(DEMO), *arguments]  # without -u: the demo's lines must appear at once by themselves
    # A shell's background job ignores interrupts, and so would what it starts.
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def test_quick_demo_prints_its_tables_and_writes_a_report_and_the_agent(tmp_path: Path) -> None:
    process = run_script(DEMO, "--quick", "--out", str(tmp_path))
    output = process.stdout
    assert process.code == 0, output + process.stderr
    for expected in ("no edit", "the rule", "after ", "Exact match", "KL on own text", "not the published CounterFact"):
        assert expected in output
    assert "The capital of Canada is" in output and "neighbour" in output
    assert str(tmp_path / "report.html") in output
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(re.findall('src="data:image/png;base64,', page)) == 6
    assert "not the published CounterFact" in page and "Facts asked in four ways" in page
    assert "not how good an agent becomes" in page and "not how good an agent becomes" in output
    assert RLEditAgent.load(tmp_path / "agent").updates >= 1


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_interrupted_training_goes_on_to_edit_and_report(tmp_path: Path) -> None:
    process = start("--quick", "--minutes", "30", "--out", str(tmp_path))
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("update 0:"):  # the rule has been tried, and training begins
            process.send_signal(signal.SIGINT)
            break
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, "".join(lines) + output
    assert "training stopped by hand" in output
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize("step", [0.01, 0.05, 0.2, 0.5, 1.0, 3.0])
def test_what_is_chosen_fits_into_the_time(demo: dict[str, Any], step: float) -> None:
    left = 600.0
    sizes = demo["sizes_for"](step, left)
    edited = 3 * sizes.stream_seconds + sizes.gathered * demo["GATHERED"] * step
    smallest = sizes.facts == 5
    assert sizes.stream_seconds == pytest.approx(sizes.facts * demo["EDITED"] * step)
    assert smallest or edited + demo["UPDATES"] * sizes.update_seconds <= left or sizes.training == (2, 5, 3)
    assert smallest or edited < 0.7 * left
    assert sizes.facts % sizes.batch_size == 0


def test_a_slower_machine_edits_fewer_facts_and_trains_on_smaller_streams(demo: dict[str, Any]) -> None:
    sizes = [demo["sizes_for"](step, 600.0) for step in (0.02, 0.1, 0.5, 2.0)]
    facts = [chosen.facts for chosen in sizes]
    trained = [batches * size * times for batches, size, times in (chosen.training for chosen in sizes)]
    assert facts == sorted(facts, reverse=True) and facts[0] == 100 and facts[-1] == 5
    assert trained == sorted(trained, reverse=True) and trained[0] > trained[-1]


def test_the_words_about_the_training_follow_from_the_facts_scores(demo: dict[str, Any]) -> None:
    sizes, say = demo["QUICK"], demo["what_it_shows"]
    assert "no time to train" in say([0.0, 0.0], 0, sizes)
    assert "no policy was better" in say([0.0, 0.0], 3, sizes)
    assert "more than the choice of facts explains" in say([10.0, 12.0, 11.0, 9.0], 3, sizes)
    undecided = say([30.0, -25.0, 10.0, -5.0], 3, sizes)
    assert "no more than the choice of facts may explain" in undecided and "+2.5 points" in undecided
