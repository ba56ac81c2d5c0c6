"""`rledit evaluate` on long streams: scores along the stream, and killed runs that go on by the same command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from killing import assert_killed_runs_end_alike, die_at, forked, import_paths

from rledit_env import cli
from rledit_env.evaluation.general import ability, scored_texts
from rledit_env.reporting import read_curves
from rledit_env.reporting.run_report import RunReport

ENV = "RLEdit-CounterFact-v0"
EVALUATE = [
    "evaluate", "--editor", "ultraedit", "--env", ENV, "--model", "tiny-llama", "--steps-per-batch", "2",
    "--device", "cpu", "--dtype", "float32", "--num-batches", "5", "--batch-size", "2", "--score-every", "2",
    "--score-facts", "3", "--general-every", "2", "--retention", "--retention-every", "2",
]  # fmt: skip
TIMES = ("seconds_per_batch", "memory_mib", "scoring_seconds", "device_memory_mib")


def measured(result: dict[str, Any]) -> dict[str, Any]:
    """What a result has measured of the model, without times and memory."""
    points = [{k: v for k, v in point.items() if k not in TIMES} for point in result["points"]]
    kept = ("metrics", "before", "taken", "not_taken", "answers", "retention", "general", "module_drift",
            "update_norms", "drift", "batch_sizes")  # fmt: skip
    return {"points": points, **{name: result[name] for name in kept}}


def evaluate_and_die(folder: Path) -> str:
    """Evaluate with a ledger in a folder "at N", or go on with it, killed just before the N-th change of its files."""
    die_at(folder, int(folder.name.split()[1]))
    ability.scored_texts = partial(scored_texts, passages=2)  # the model writes no more than the test needs
    out = folder.with_name("of " + folder.name.replace("-", "")) / "result.json"
    code = cli.main([*EVALUATE, "--ledger", str(folder), "--json", str(out)])
    assert code == 0, code
    return json.dumps(measured(json.loads(out.read_text(encoding="utf-8"))))


def test_a_killed_evaluation_goes_on_to_the_same_points(tmp_path: Path) -> None:
    with forked(__file__, "evaluate_and_die") as runner:
        # During the first batches, around the first point, near the end of the stream, and while all facts are scored.
        left = assert_killed_runs_end_alike(runner, tmp_path, [12, 20, 26, 27, 28, 29, 40, 52, 66, 70])
    assert {"measurements.jsonl"} <= set.union(*left)
    result = json.loads((tmp_path / "of at 66" / "result.json").read_text(encoding="utf-8"))
    assert [(p["batches"], p["facts"], p["scored_facts"]) for p in result["points"]] == [
        (2, 4, 3), (4, 8, 3), (5, 10, 10)
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def _short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ability, "scored_texts", partial(scored_texts, passages=2))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_evaluation_which_the_same_command_continues(how: signal.Signals, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": import_paths()}

    def start(name: str) -> subprocess.Popen[str]:
        options = ["--num-batches", "40", "--ledger", str(tmp_path / name), "--json", str(tmp_path / f"{name}.json")]
        return subprocess.Popen(
            [sys.executable, "-m", "rledit_env.cli", *EVALUATE, *options], env=environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
        )  # fmt: skip

    process = start("stopped")
    journal = tmp_path / "stopped" / "measurements.jsonl"
    for _ in range(600):
        time.sleep(0.1)
        if journal.exists() and '"points"' in journal.read_text(encoding="utf-8"):
            break
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGTERM)
    if how == signal.SIGINT:
        assert "Go on with the same command:\n  rledit evaluate" in err
    assert not (tmp_path / "stopped.json").exists()
    for name in ("stopped", "whole"):
        ended = start(name)
        _, err = ended.communicate(timeout=600)
        assert ended.returncode == 0, err
    resumed, whole = (json.loads((tmp_path / n).read_text(encoding="utf-8")) for n in ("stopped.json", "whole.json"))
    assert measured(resumed) == measured(whole)
    # The time of the batch at which the signal came is not known, if it came at one.
    assert resumed["batch_seconds"].count(None) <= 1 and whole["batch_seconds"].count(None) == 0


def test_the_same_facts_are_scored_for_an_agent_and_an_editor_and_the_report_draws_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs"
    for name, editor in (("gradient", "fine-tuning"), ("nothing", "none")):
        arguments = [*EVALUATE, "--editor", editor, "--log-dir", str(tmp_path / name)]
        assert cli.main([*arguments, "--json", str(folder / f"{name}.json")]) == 0
        out = capsys.readouterr().out
        assert "after 4 facts, on 3 of them: mean" in out and "scores along the stream" in out
    curves = read_curves(tmp_path / "gradient")
    points = json.loads((folder / "gradient.json").read_text(encoding="utf-8"))["points"]
    assert [facts for facts, _ in curves["stream/kl"]] == [p["facts"] for p in points] == [4, 8, 10]
    assert [kl for _, kl in curves["stream/kl"]] == pytest.approx([p["kl"] for p in points])
    unedited = json.loads((folder / "nothing.json").read_text(encoding="utf-8"))
    assert unedited["editor"]["name"] == "none" and unedited["agent"] is None
    assert [point["kl"] for point in unedited["points"]] == pytest.approx([0, 0, 0], abs=1e-6)
    report = RunReport(folder)
    page = report.page().html()
    assert "<h2>Along the stream" in page and "stream" in report.pictures
    assert report.pictures["stream"]("svg") is not None


def test_without_score_every_there_are_no_points(tmp_path: Path) -> None:
    arguments = ["evaluate", "--editor", "none", "--env", ENV, "--model", "tiny-llama", "--num-batches", "1"]
    assert cli.main([*arguments, "--batch-size", "2", "--general", "none", "--json", str(tmp_path / "a.json")]) == 0
    assert "points" not in json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))


def test_an_editor_at_another_strength_edits_more(tmp_path: Path) -> None:
    norms = []
    for number, strength in enumerate(("1", "2")):
        path = tmp_path / f"{number}.json"
        assert cli.main([*EVALUATE, "--num-batches", "1", "--strength", strength, "--json", str(path)]) == 0
        norms.append(json.loads(path.read_text(encoding="utf-8"))["update_norms"][0])
    assert norms[1] > 1.5 * norms[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--env", ENV], "--agent and --editor are both missing"),
        (["--agent", "default", "--editor", "memit"], "--agent and --editor exclude each other"),
        (["--editor", "ultraedit"], "--editor ultraedit says nothing of the environment; name one with --env"),
        (["--editor", "malmen", "--env", ENV], "--editor malmen has to be trained before it edits"),
        (["--editor", "memitt", "--env", ENV], "did you mean 'memit'?"),
        (["--editor", "none", "--env", ENV, "--score-every", "0"], "--score-every is 0; give 1 or more"),
        (["--editor", "none", "--env", ENV, "--score-facts", "0"], "--score-facts is 0; give 1 or more"),
        (["--editor", "none", "--env", ENV, "--log-dir", "x"], "--log-dir is for the scores of --score-every"),
        (["--editor", "none", "--env", ENV, "--strength", "-1"], "--strength is -1; give a positive number"),
        (["--editor", "none", "--env", ENV, "--strength", "2", "--model", "tiny-llama"], "has no strength"),
        (["--editor", "none", "--env", ENV, "--num-batches", "0", "--model", "tiny-llama"], "--num-batches is 0"),
    ],
)
def test_wrong_options_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_ledger_of_another_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = [*EVALUATE, "--num-batches", "1", "--general", "none", "--ledger", str(tmp_path / "ledger")]
    assert cli.main(short) == 0
    for changed, there in (
        (["--seed", "1"], "seed: 0 there, 1 here"), (["--score-facts", "4"], "--score-facts: 3 there, 4 here"),
        (["--strength", "2"], "strength: 1.0 there, 2.0 here"), (["--num-batches", "2"], "--num-batches: 1 there"),
    ):  # fmt: skip
        assert cli.main([*short, *changed]) == 2
        assert there in capsys.readouterr().err
