"""Every example runs from its first line to its last, on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import run_script
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
EXAMPLES = ["quickstart", "train_rledit", "train_ppo", "ppo_single_file", "custom_policy", "edit_my_model"]
SMALL = ["--model", "tiny-llama", "--num-batches", "2", "--batch-size", "2"]


def example(name: str, *arguments: str, folder: Path = ROOT) -> str:
    """The example's output, run as a user would from any folder."""
    result = run_script(ROOT / "examples" / f"{name}.py", *arguments, folder=folder)
    assert result.code == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_help_explains_every_argument(name: str) -> None:
    shown = example(name, "--help")
    assert "--model" in shown
    assert "default" in shown


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_one_file_of_under_150_lines(name: str) -> None:
    assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) < 150


def test_quickstart_shows_the_answers_and_the_scores(tmp_path: Path) -> None:
    # In a process of its own, from a folder of the user's; the package need not be installed.
    code = f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r}); sys.argv = sys.argv[1:]; " \
           "runpy.run_path(sys.argv[0], run_name='__main__')"  # fmt: skip
    command = [sys.executable, "-c", code, str(ROOT / "examples" / "quickstart.py"), *SMALL]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    shown = result.stdout
    assert "before" in shown
    assert "all 4 facts, after the whole stream" in shown
    assert "not the published CounterFact" in shown


def test_train_rledit_trains_saves_and_compares(tmp_path: Path) -> None:
    arguments = ["--trajectories", "2", "--rank", "4", "--steps-per-batch", "1", "--out", str(tmp_path / "run")]
    shown = example("train_rledit", *SMALL, *arguments, folder=tmp_path)
    assert "untrained  8 facts of the evaluation split" in shown
    assert "trained    8 facts of the evaluation split" in shown
    assert (tmp_path / "run" / "best" / "agent.safetensors").exists()


@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
def test_train_ppo_tests_everybody_on_the_same_streams(tmp_path: Path, algorithm: str) -> None:
    out = tmp_path / "out"
    arguments = ["--steps", "16", "--baseline-streams", "2", "--rledit-steps", "2", "--test-streams", "2",
                 "--curve-streams", "1", "--out", str(out)]  # fmt: skip
    shown = example("train_ppo", *SMALL, "--algorithm", algorithm, *arguments, folder=tmp_path)
    returns = json.loads((out / "returns.json").read_text())
    assert list(returns) == ["zero action", "random search", algorithm.upper(), "RLEdit, untrained", "RLEdit"]
    assert returns["RLEdit, untrained"] == pytest.approx(returns["zero action"], rel=1e-4)
    assert f"above {algorithm.upper()}, stream by stream: RLEdit by" in shown
    assert all(len(values) == 2 for values in returns.values())
    assert "Returns on 2 held-out streams" in shown and "not the published CounterFact" in shown
    rows = [line.split() for line in shown.splitlines() if line.startswith(tuple(returns))]
    assert len(rows) == 5 and all(len(row[-4:]) == 4 for row in rows)
    assert (out / algorithm / "agent.safetensors").exists()
    assert list((out / algorithm).glob("events.out.tfevents.*"))
    assert "data:image/png;base64" in (out / "report.html").read_text(encoding="utf-8")


def test_the_single_file_ppo_learns_and_logs(tmp_path: Path) -> None:
    arguments = ["--streams", "2", "--total-timesteps", "20", "--num-steps", "8", "--minibatch-size", "4",
                 "--update-epochs", "1", "--log-dir", str(tmp_path / "run")]  # fmt: skip
    shown = example("ppo_single_file", *SMALL, *arguments, folder=tmp_path)
    assert [line.split(":")[0] for line in shown.splitlines()] == ["step 12", "step 20"]
    assert "beside the zero action" in shown
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))


def test_custom_policy_learns_its_step_sizes(tmp_path: Path) -> None:
    shown = example("custom_policy", *SMALL, "--updates", "2", folder=tmp_path)
    assert "stream 2: return" in shown
    sizes = [float(line.rsplit(" ", 1)[1]) for line in shown.splitlines() if "step size" in line]
    assert len(sizes) == 4
    assert all(size != 0.1 for size in sizes)


def test_edit_my_model_writes_a_model_that_loads(tmp_path: Path) -> None:
    facts = tmp_path / "facts.jsonl"
    rows = [{"prompt": f"Fact {i} is", "target": f"number {i}", "subject": f"Fact {i}"} for i in range(3)]
    facts.write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--model", "tiny-llama", "--facts", str(facts), "--batch-size", "2", "--out", str(tmp_path / "out"),
                 "--editor", "ft-l"]
    shown = example("edit_my_model", *arguments, folder=tmp_path)
    assert "of 3 facts took" in shown and "Trial(step_size=" in shown
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
