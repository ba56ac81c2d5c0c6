"""Tests of examples/demo.py, as somebody runs it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import run_script

from agents import RLEditAgent

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-u", str(DEMO), *arguments]
    # A shell's background job ignores interrupts, and so would what it starts.
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def test_quick_demo_prints_its_tables_and_writes_a_report_and_the_agent(tmp_path: Path) -> None:
    process = run_script(DEMO, "--quick", "--out", str(tmp_path))
    output = process.stdout
    assert process.code == 0, output + process.stderr
    for expected in ("no edit", "untrained policy", "trained agent", "Exact match", "not the published CounterFact"):
        assert expected in output
    assert str(tmp_path / "report.html") in output
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(re.findall('src="data:image/png;base64,', page)) == 6
    assert "not the published CounterFact" in page
    assert RLEditAgent.load(tmp_path / "agent").updates >= 1


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_interrupted_training_goes_on_to_edit_and_report(tmp_path: Path) -> None:
    process = start("--quick", "--minutes", "30", "--out", str(tmp_path))
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("update 5:"):
            process.send_signal(signal.SIGINT)
            break
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, "".join(lines) + output
    assert "training stopped by hand" in output
    assert (tmp_path / "report.html").exists()
