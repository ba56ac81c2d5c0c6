"""`rledit playground` on the command line."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from rledit_env import cli

ROOT = Path(__file__).parents[2]


def test_help_teaches_with_examples_and_loads_no_page() -> None:
    code = (
        "import sys, rledit_env.cli as c; assert c.main(['--help']) == c.main(['playground', '--help']) == 0;"
        "assert not {'gradio', 'torch', 'agents', 'rledit_env.playground'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert "examples:" in done.stdout and "rledit playground --model owner/name" in done.stdout
    assert "exit codes:" in done.stdout


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


def test_a_missing_gradio_is_named_with_the_mend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["playground"]) == 2
    assert last_line(capsys) == 'rledit playground: error: the page needs Gradio: pip install "rledit-env[playground]"'


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--port", "70000"], "--port is 70000; give 0"), (["--max-tabs", "0"], "--max-tabs is 0; give 1 or more")],
)
def test_unusable_options_end_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["playground", *arguments]) == 2
    assert message in last_line(capsys)


def test_a_port_in_use_is_named_with_the_mend(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gradio", reason="the page needs Gradio")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert cli.main(["playground", "--port", str(port)]) == 2
    assert f"port {port} cannot be taken (Address already in use); give another --port" in last_line(capsys)


def test_the_address_is_printed_and_ctrl_c_ends_cleanly() -> None:
    pytest.importorskip("gradio", reason="the page needs Gradio")
    command = [sys.executable, "-m", "rledit_env.cli", "playground", "--port", "0", "--model", "tiny-llama"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        address = process.stdout.readline().strip().removeprefix("rledit playground: ")
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=60) as page:
            assert "rledit playground" in page.read().decode()
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
        assert process.wait(60) == 130
    assert errors.splitlines()[-1] == "the playground has ended" and "Traceback" not in errors
