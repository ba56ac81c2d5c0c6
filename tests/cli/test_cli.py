"""The `rledit` command: what it writes, what it says, and how it ends."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from agents import HypernetworkConfig, RLEditAgent, RLEditConfig
from agents.running import saved as saved_agents
from rledit_env import cli, preservation
from rledit_env.cli import results, train
from rledit_env.env import LifelongEditEnv
from rledit_env.evaluation.metrics import METRICS_VERSION
from rledit_env.reporting import versions
from rledit_env.reward import RewardConfig

ROOT = Path(__file__).parents[2]
ENV = "RLEdit-CounterFact-v0"
FACTS = [
    {"prompt": "The capital of Freedonia is", "target": "Sylvania", "subject": "Freedonia"},
    {"prompt": "The king of Ruritania is", "target": "Rudolf"},
    {"prompt": "Up is", "target": "down", "paraphrases": ["Up means"]},
]
TRAIN = [
    "train", "--env", ENV, "--model", "tiny-llama", "--num-batches", "2", "--batch-size", "2", "--steps-per-batch", "2",
    "--rank", "4", "--eval-every", "1", "--dtype", "float32", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two trajectories."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert cli.main([*TRAIN, "--trajectories", "2", "--out", str(folder)]) == 0
    return folder


def test_train_keeps_the_rest_of_the_model_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--own-text-weight", "0.5", "--continuation-weight", "0.25", "--kl-bound", "0.2", "--kl-rate", "3"]
    assert cli.main([*TRAIN, *more, "--trajectories", "1", "--out", str(tmp_path / "run")]) == 0
    assert "own_text × 0.5, continuation × 0.25, own_text ≤ 0.2" in capsys.readouterr().out
    reward = json.loads((tmp_path / "run" / "last" / "agent.json").read_text())["environment"]["reward"]
    assert reward["components"]["own_text"] == [0.5, repr(preservation.OwnText())]
    assert reward["components"]["continuation"] == [0.25, repr(preservation.Continuation())]
    assert reward["constraint"] == {"component": "own_text", "bound": 0.2, "rate": 3.0, "start": 0.0}


def test_train_asks_what_scores_ask_and_presents_until_facts_take_when_told_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, result = tmp_path / "run", tmp_path / "result.json"
    more = ["--reward", "keeping", "--present-until", "0.8", "--locality-weight", "0.25", "--trajectories", "3"]
    assert cli.main([*TRAIN, *more, "--out", str(run)]) == 0
    assert "at most 2 steps a batch" in capsys.readouterr().out
    saved = json.loads((run / "last" / "agent.json").read_text())
    assert saved["updates"] == 3 and saved["environment"]["present_until"] == 0.8
    kept = {name: weight for name, (weight, _) in RewardConfig.keeping("counterfact").components.items()}
    weights = {name: weight for name, (weight, _) in saved["environment"]["reward"]["components"].items()}
    assert weights == kept | {"locality": 0.25}
    # An agent is scored as it was trained, unless told otherwise; what that cost the model is said without asking.
    evaluate = ["evaluate", "--env", ENV, "--agent", str(run), "--num-batches", "1", "--batch-size", "2", "--json"]
    for options, until in (([], 0.8), (["--steps-per-batch", "2"], None), (["--present-until", "none"], None),
                           (["--steps-per-batch", "3", "--present-until", "0.5"], 0.5)):
        assert cli.main([*evaluate, str(result), *options]) == 0
        content = json.loads(result.read_text())
        assert content["settings"]["present_until"] == until
        assert content["general"]["scores"]["1"]["self"]["kl"] > 0
    assert cli.main([*evaluate, str(result), "--general", "none"]) == 0
    assert "general" not in json.loads(result.read_text())


@pytest.fixture
def facts_file(tmp_path: Path) -> Path:
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(map(json.dumps, FACTS)), encoding="utf-8")
    return path


def saved_agent(folder: Path, step_size: float) -> Path:
    env = LifelongEditEnv("counterfact", "tiny-llama", num_batches=1, batch_size=1, dtype="float32", device="cpu")
    RLEditAgent(env, RLEditConfig(network=HypernetworkConfig(rank=4, step_size=step_size))).save(folder)
    return folder


# -- help and usage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["fetch", "train", "evaluate", "edit", "report", "probe", "playground"])
def test_help_teaches_with_examples_and_exit_codes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "examples:" in shown
    assert f"rledit {command} " in shown
    assert "exit codes:" in shown


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command.name in shown and command.summary in shown for command in cli.COMMANDS)


@pytest.mark.parametrize("arguments", [[], ["compare"], ["fetch"], ["train", "--env", ENV], ["evaluate", "--bogus"]])
def test_wrong_usage_ends_with_2(arguments: list[str]) -> None:
    assert cli.main(arguments) == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["fetch", "smollm2-135"], "did you mean 'smollm2-135m'"),
        (["evaluate", "--env", ENV, "--agent", "no-such-run"], "no-such-run does not exist"),
        (["train", "--env", "RLEdit-Chess-v0", "--out", "x"], "RLEdit-Chess"),
        (["train", "--env", "CartPole-v1", "--out", "x"], "no environment of this package"),
        (["train", "--env", ENV, "--out", "x", "--data", "nowhere.jsonl"], "no such file"),
        (["train", "--env", ENV, "--out", "x", "--batch-size", "0"], "--batch-size is 0"),
        (["train", "--env", ENV, "--out", "x", "--kl-bound", "0"], "the bound on 'own_text' is 0.0; give a positive"),
        (["edit", "--facts", "nowhere.jsonl", "--agent", "default", "--out", "x"], "no such file of facts"),
        (["evaluate", "--agent", "default", "--metrics", "rome"], "metrics 'rome' is unknown; give one of 'paper'"),
    ],
)
def test_unusable_input_ends_with_2_and_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"rledit {arguments[0]}: error: ")
    assert message in last


def test_traceback_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fetch", "smollm2-135", "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_is_not_taken_for_the_user_s_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("rledit_env.lm.loading.fetching.fetch", broken)
    assert cli.main(["fetch", "smollm2-135m"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_neither_the_environment_nor_the_help_imports_an_agent() -> None:
    code = (
        "import sys, rledit_env.env, rledit_env.cli; rledit_env.cli.main(['edit', '--help']);"
        "assert not [m for m in sys.modules if m.split('.')[0] == 'agents']"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def test_fetch_prints_the_folder_of_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert cli.main(["fetch", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path)


def test_fetch_hands_the_wheel_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fetch", "tiny-llama", "--wheel", str(tmp_path / "x.whl")]) == 2
    assert "does not come from a wheel" in capsys.readouterr().err


# -- train ---------------------------------------------------------------------------------------------------------


def test_train_leaves_the_best_and_the_last_agent_and_tensorboard_s_log(run_folder: Path) -> None:
    assert {path.name for path in run_folder.iterdir() if path.is_dir()} == {"best", "last", "steps"}
    assert list(run_folder.glob("events.out.tfevents.*"))
    settings = json.loads((run_folder / "best" / "agent.json").read_text())["environment"]
    assert settings["id"] == ENV
    assert settings["model"] == "tiny-llama"
    assert settings["steps_per_batch"] == 2
    assert all(name.startswith("model.layers.") for name in settings["edit_modules"])


def test_train_holds_the_last_fifth_of_the_training_split_out() -> None:
    options = argparse.Namespace(env=ENV, data="bundled", on_error="raise", select_on="held-out")
    training, selection = train._training_data(options)
    whole = len(training) + len(selection)
    assert len(selection) == int(0.2 * whole)
    assert not {r.prompt for r in training} & {r.prompt for r in selection}
    assert (training.split, selection.split) == ("train", "train")
    assert "held out" in selection.source


def test_train_says_what_it_trains_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*TRAIN, "--trajectories", "1", "--out", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert "not the published CounterFact" in shown
    assert "tiny-llama" in shown
    assert "rledit evaluate" in shown


def test_train_scales_the_step_sizes_for_longer_streams_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*TRAIN, "--trajectories", "1", "--out", str(tmp_path / "run")]
    assert cli.main([*arguments, "--calibrate-num-batches", "100000"]) == 2
    assert "100000 batches" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert cli.main([*arguments, "--calibrate-num-batches", "3"]) == 0
    assert "mean scores: × 1: " in capsys.readouterr().out


def test_train_records_how_the_agent_presents_when_it_edits_and_within_what_divergence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    arguments = [*TRAIN, "--trajectories", "1", "--out", str(run)]
    assert cli.main([*arguments, "--calibrate-kl-bound", "0.1"]) == 2
    assert "--calibrate-kl-bound is for --calibrate-num-batches T; give that, too" in capsys.readouterr().err
    assert cli.main([*arguments, "--calibrate-num-batches", "3", "--calibrate-kl-bound", "0"]) == 2
    assert "--calibrate-kl-bound is 0; give a positive number of nats" in capsys.readouterr().err
    more = ["--edit-steps-per-batch", "3", "--edit-present-until", "0.75", "--edit-contexts", "1",
            "--calibrate-num-batches", "3"]
    assert cli.main([*arguments, *more, "--calibrate-kl-bound", "1e-9", "--save-precision", "bfloat16"]) == 0
    shown = capsys.readouterr().out
    assert "mean scores: × 1: -0.0, × 0.85: -0.0" in shown  # how far they are beyond the bound
    last, best = (json.loads((run / name / "agent.json").read_text())["environment"] for name in ("last", "best"))
    assert (last["steps_per_batch"], last["present_until"]) == (2, None)
    assert (best["steps_per_batch"], best["present_until"]) == (3, 0.75)
    assert (last["contexts"], best["contexts"]) == (0, 1)
    assert best["reward"] == last["reward"] and best["num_batches"] == last["num_batches"]
    stored = safetensors.torch.load_file(run / "best" / "agent.safetensors")
    assert {t.dtype for name, t in stored.items() if name.startswith("network.networks.")} == {torch.bfloat16}


def test_a_train_command_that_was_interrupted_says_how_to_go_on_and_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = [*TRAIN, "--edit-steps-per-batch", "3", "--patience", "999", "--out", str(out), "--trajectories"]
    command = [sys.executable, "-m", "rledit_env.cli", *arguments]
    process = subprocess.Popen(
        [*command, "9999"], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        # A shell's background job ignores interrupts, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not (out / "last" / "training.safetensors").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "interrupted" in err
    assert "Go on with the same command:\n  rledit train" in err
    assert "Traceback" not in err
    updates = json.loads((out / "last" / "agent.json").read_text())["updates"]
    assert json.loads((out / "best" / "agent.json").read_text())["environment"]["steps_per_batch"] == 3  # not 2
    assert cli.main([*arguments, str(updates + 1)]) == 0
    assert f"update {updates}, step" in capsys.readouterr().out
    assert json.loads((out / "last" / "agent.json").read_text())["updates"] == updates + 1


def test_an_interruption_before_the_first_checkpoint_says_that_nothing_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rledit_env.lm.editable.EditableLM.load", interrupted)
    assert cli.main([*TRAIN, "--out", str(tmp_path / "run")]) == 130
    assert "nothing was saved" in capsys.readouterr().err


# -- evaluate ------------------------------------------------------------------------------------------------------


def test_evaluate_writes_metrics_settings_and_versions(run_folder: Path, tmp_path: Path) -> None:
    result = tmp_path / "deep" / "result.json"
    arguments = ["evaluate", "--env", ENV, "--agent", str(run_folder), "--data", "bundled", "--split", "eval"]
    assert cli.main([*arguments, "--num-batches", "2", "--batch-size", "3", "--json", str(result)]) == 0
    written = json.loads(result.read_text(encoding="utf-8"))
    assert set(written["metrics"]) == {
        "efficacy", "generalization", "specificity", "specificity_answer", "exact_match", "top1", "mean",
    }  # fmt: skip
    assert all(0 <= score <= 100 for score in written["metrics"].values())
    assert written["versions"] == versions()
    assert (written["metrics_version"], written["settings"]["metrics"]) == (METRICS_VERSION, "paper")
    assert len(written["taken"]) == 6
    assert written["seconds_per_fact"] > 0
    assert "not the published CounterFact" in written["data_source"]
    settings = written["settings"]
    assert (settings["model"], settings["steps_per_batch"], settings["num_batches"]) == ("tiny-llama", 2, 2)
    assert settings["edit_modules"] == json.loads((run_folder / "best" / "agent.json").read_text())["environment"][
        "edit_modules"
    ]


def test_evaluate_scores_as_the_released_code_does_where_that_is_asked_for(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", "--agent", str(run_folder), "--num-batches", "2", "--batch-size", "4", "--retention"]
    results = {}
    for metrics in ("paper", "rledit-code"):
        assert cli.main([*arguments, "--json", "-", "--metrics", metrics]) == 0
        results[metrics] = json.loads(capsys.readouterr().out)
        assert results[metrics]["settings"]["metrics"] == metrics
        last = results[metrics]["retention"]["efficacy"][-1]
        assert sum(last) / 2 == pytest.approx(results[metrics]["metrics"]["efficacy"], abs=1e-3)
    for scores in ("metrics", "before"):
        paper, code = (results[metrics][scores] for metrics in results)
        assert code["top1"] == paper["top1"]
        assert any(code[name] != paper[name] for name in ("efficacy", "generalization", "specificity"))


def test_evaluate_gives_json_alone_on_the_standard_output(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", "--agent", str(run_folder), "--num-batches", "1", "--batch-size", "2", "--json", "-"]
    assert cli.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["env"] == ENV


def test_evaluate_names_the_facts_that_did_not_take_and_warns_of_batches_without_effect(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", "--agent", str(run_folder), "--num-batches", "2", "--batch-size", "2"]) == 0
    out, err = capsys.readouterr()
    assert "4 of 4 facts did not take" in out
    assert out.count(": wanted ") == out.count(", answers ") == 4
    assert "batch 1 of 2 (facts 1 to 2) had no effect: none of its facts took" in err


def test_the_seed_decides_which_facts_are_edited(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = []
    for seed in ("1", "1", "2"):
        arguments = ["evaluate", "--agent", str(run_folder), "--num-batches", "1", "--batch-size", "3", "--json", "-"]
        assert cli.main([*arguments, "--seed", seed]) == 0
        prompts.append([one["prompt"] for one in json.loads(capsys.readouterr().out)["not_taken"]])
    assert prompts[0] == prompts[1] != prompts[2]


def test_an_agent_for_other_modules_is_refused(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", "--agent", str(run_folder), "--edit-modules", "model.layers.3.mlp.up_proj"]
    assert cli.main(arguments) == 2
    assert "was trained for 4 modules" in capsys.readouterr().err


def test_long_lists_of_untaken_facts_are_cut_with_a_count(capsys: pytest.CaptureFixture[str]) -> None:
    untaken = [{"prompt": f"p{i}", "target": "t", "answer": "a"} for i in range(25)]
    results.name_untaken(untaken, 30, 10.0, print, "result.json")
    out = capsys.readouterr().out
    assert out.count("wanted") == 20
    assert "… and 5 more, all in result.json" in out


@pytest.mark.parametrize(
    ("untaken", "total", "exact", "sentence"),
    [
        (0, 30, 0.0, "all 30 facts took: the model's own answer begins with the target; exact match, where the answer "
         "also ends there: 0 of 30\n"),
        (0, 1, 100.0, "the fact took: the model's own answer begins with the target; exact match, where the answer "
         "also ends there: 1 of 1\n"),
        (2, 3, 100 / 3, "1 of 3 facts took: the model's own answer begins with the target; exact match, where the "
         "answer also ends there: 1 of 3\n2 of 3 facts did not take"),
    ],
)  # fmt: skip
def test_the_closing_lines_say_what_took_and_exact_match_mean(
    capsys: pytest.CaptureFixture[str], untaken: int, total: int, exact: float, sentence: str
) -> None:
    results.name_untaken([{"prompt": "p", "target": "t", "answer": "a"}] * untaken, total, exact, print, None)
    assert capsys.readouterr().out.startswith(sentence)


# -- edit ----------------------------------------------------------------------------------------------------------


def test_edit_writes_a_model_that_loads_and_differs_in_the_edited_modules_only(
    run_folder: Path, facts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "edited"
    arguments = ["edit", "--facts", str(facts_file), "--agent", str(run_folder), "--model", "tiny-llama"]
    assert cli.main([*arguments, "--out", str(out)]) == 0  # three facts in batches of two
    edited = AutoModelForCausalLM.from_pretrained(out).state_dict()
    AutoTokenizer.from_pretrained(out)
    from rledit_env.lm.loading.loader import load_model

    original = load_model("tiny-llama")[0].state_dict()
    report = json.loads((out / "edit_report.json").read_text(encoding="utf-8"))
    changed = {key.removesuffix(".weight") for key, value in original.items() if not torch.equal(value, edited[key])}
    assert changed == set(report["settings"]["edit_modules"])
    assert len(report["taken"]) == len(report["answers"]) == 3
    assert report["metrics"]["generalization"] is None and report["metrics_version"] == METRICS_VERSION
    assert report["metrics"]["efficacy"] is not None
    shown = capsys.readouterr()
    assert "2 facts have no paraphrases" in shown.out
    assert "2 facts name no subject" in shown.out
    assert "'The capital of Freedonia is': wanted 'Sylvania', answers " in shown.out
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_edit_does_not_overwrite_unless_asked(
    run_folder: Path, facts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "edited"
    out.mkdir()
    (out / "mine.txt").touch()
    arguments = ["edit", "--facts", str(facts_file), "--agent", str(run_folder), "--out", str(out)]
    assert cli.main(arguments) == 2
    assert "not empty" in capsys.readouterr().err
    (out / "mine.txt").unlink()
    assert cli.main(arguments) == 0
    before = (out / "edit_report.json").stat().st_ino
    assert cli.main(arguments) == 2
    assert "not empty" in capsys.readouterr().err
    assert cli.main([*arguments, "--overwrite"]) == 0
    assert (out / "edit_report.json").stat().st_ino != before


def test_edit_reads_published_schemas_too(run_folder: Path, tmp_path: Path) -> None:
    facts = tmp_path / "zsre.jsonl"
    row = {"src": "Who rules Ruritania?", "rephrase": "Ruritania's king?", "alt": "Rudolf", "loc": "nq question: where"}
    facts.write_text(json.dumps({**row, "loc_ans": "here"}))
    out = tmp_path / "edited"
    assert cli.main(["edit", "--facts", str(facts), "--agent", str(run_folder), "--out", str(out)]) == 0
    report = json.loads((out / "edit_report.json").read_text())
    assert report["settings"]["kind"] == "zsre"
    assert None not in report["metrics"].values()


def test_an_update_of_zero_is_never_silent(
    facts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agent = saved_agent(tmp_path / "agent", step_size=1e-300)
    arguments = ["edit", "--facts", str(facts_file), "--agent", str(agent), "--out", str(tmp_path / "edited")]
    assert cli.main(arguments) == 0
    assert "had no effect: its update was zero" in capsys.readouterr().err


def test_an_update_that_breaks_the_model_writes_nothing_and_ends_with_1(
    facts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agent = saved_agent(tmp_path / "agent", step_size=1e30)
    arguments = ["edit", "--facts", str(facts_file), "--agent", str(agent), "--out", str(tmp_path / "edited")]
    assert cli.main(arguments) == 1
    assert "broke the model; nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "edited").exists()


def test_an_evaluation_that_breaks_the_model_says_so_and_ends_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agent = saved_agent(tmp_path / "agent", step_size=1e30)
    result = tmp_path / "result.json"
    arguments = ["evaluate", "--env", ENV, "--agent", str(agent), "--num-batches", "2", "--batch-size", "2"]
    assert cli.main([*arguments, "--json", str(result)]) == 1
    assert "broke the model" in capsys.readouterr().err
    assert json.loads(result.read_text())["diverged"] is True


def test_default_is_the_agent_that_ships_or_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(saved_agents, "PRETRAINED", tmp_path / "pretrained")
    arguments = ["evaluate", "--env", ENV, "--agent", "default", "--num-batches", "1", "--batch-size", "1"]
    assert cli.main(arguments) == 2
    assert "ships no trained agent" in capsys.readouterr().err
    saved_agent(tmp_path / "pretrained" / "tiny", step_size=1e-3)
    assert cli.main(arguments) == 0


def test_an_agent_ships_for_each_kind_of_facts_and_counterfacts_edits_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved_agents, "PRETRAINED", tmp_path)
    for kind in ("fever", "counterfact", "zsre"):
        saved_agent(tmp_path / "tiny" / kind, step_size=1e-3)
    for kind, found in (("zsre", "zsre"), ("fever", "fever"), ("facts", "counterfact"), (None, "counterfact")):
        assert saved_agents.find_agent("default", kind) == tmp_path / "tiny" / found


def test_the_installed_command_is_this_one() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "import sys; from rledit_env.cli import main; sys.exit(main(['--version']))"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert shown.stdout.startswith("rledit-env ")


def test_edit_saves_only_the_change_when_asked(
    run_folder: Path, facts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rledit_env.lm.delta import load_delta
    from rledit_env.lm.loading.loader import load_model

    out = tmp_path / "edited"
    arguments = ["edit", "--facts", str(facts_file), "--agent", str(run_folder), "--save", "lora", "model", "delta"]
    assert cli.main([*arguments, "--lora-rank", "1", "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"model", "delta", "lora", "edit_report.json", ".rledit.json"}
    shown = capsys.readouterr().out
    assert "rank 1, truncated, relative error of the change 0." in shown
    saved = json.loads((out / "edit_report.json").read_text(encoding="utf-8"))["saved"]
    assert 0 < saved["lora"]["relative_error"] < 1
    whole = AutoModelForCausalLM.from_pretrained(out / "model").state_dict()
    changed = load_delta(load_model("tiny-llama")[0], out / "delta").state_dict()
    for key, value in whole.items():
        torch.testing.assert_close(changed[key], value, atol=1e-6, rtol=1e-6)
    assert cli.main([*arguments[:-3], "delta", "--out", str(tmp_path / "one")]) == 0
    assert {path.name for path in (tmp_path / "one").iterdir()} == {
        "delta.safetensors", "edit_report.json", ".rledit.json",
    }  # fmt: skip
    assert cli.main([*arguments, "--lora-rank", "0", "--out", str(tmp_path / "two")]) == 2


def test_edit_measures_what_became_of_the_rest_of_the_model_and_report_shows_it(
    run_folder: Path, facts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rledit_env.evaluation.general import drifts, scored_texts
    from rledit_env.lm.delta import load_delta
    from rledit_env.lm.editable import EditableLM
    from rledit_env.lm.loading.loader import load_model

    text, out = tmp_path / "book.txt", tmp_path / "edited"
    text.write_text("Nobody had seen the river so high since the old mill was built. " * 40, encoding="utf-8")
    arguments = ["edit", "--facts", str(facts_file), "--agent", str(run_folder), "--save", "delta", "--out", str(out)]
    assert cli.main([*arguments, "--text", str(text)]) == 0
    shown = capsys.readouterr().out
    assert "the rest of the model, on text that was not edited:" in shown and "human text" in shown
    content = json.loads((out / "edit_report.json").read_text(encoding="utf-8"))
    assert list(content["divergences"]) == ["self", "human"] and content["divergences_of"] == {"human": "file book.txt"}
    original = EditableLM.load("tiny-llama", dtype="float32", device="cpu")
    texts = scored_texts(original, text, passages=12)
    model = load_delta(load_model("tiny-llama")[0], out / "delta.safetensors")
    edited = EditableLM(model, original.tokenizer, ("*.mlp.up_proj",))
    for key, drift in drifts(edited, texts).items():  # its own θ₀ is the edited model
        assert content["divergences"][key]["perplexity"] == pytest.approx(drift.perplexity, rel=1e-3)
    for key, drift in drifts(original, texts).items():
        found = content["divergences"][key]
        assert found["kl"] > 1e-7 and found["original_perplexity"] == pytest.approx(drift.perplexity, rel=1e-3)
    assert cli.main(["report", str(out)]) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "The rest of the model" in page and "human text: file book.txt" in page
    assert cli.main([*arguments[:-1], str(tmp_path / "two"), "--no-divergence"]) == 0
    assert json.loads((tmp_path / "two" / "edit_report.json").read_text(encoding="utf-8"))["divergences"] == {}
    assert cli.main(["report", str(tmp_path / "two")]) == 0
    assert "The rest of the model" not in (tmp_path / "two" / "report.html").read_text(encoding="utf-8")
    capsys.readouterr()
    refused = [*arguments[:-1], str(tmp_path / "three"), "--text", str(tmp_path / "none.txt")]
    assert cli.main(refused) == 2
    assert f"there is no text file {tmp_path / 'none.txt'}" in capsys.readouterr().err


def test_evaluate_measures_retention_and_general_ability_and_report_shows_them(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sst2 = tmp_path / "sst2.jsonl"
    sst2.write_text("\n".join(json.dumps({"sentence": f"film {i}", "label": i % 2}) for i in range(6)))
    path = tmp_path / "run" / "result.json"
    arguments = ["evaluate", "--agent", str(run_folder), "--num-batches", "3", "--batch-size", "2", "--json", str(path)]
    more = ["--retention", "--general", "self", str(sst2), "--general-every", "2", "--general-limit", "4"]
    assert cli.main([*arguments, *more]) == 0
    out = capsys.readouterr().out
    assert "the first batch after later ones:" in out
    assert "own text, KL from the unedited model" in out
    written = json.loads(path.read_text(encoding="utf-8"))
    assert list(written["general"]["scores"]) == ["0", "2", "3"]
    assert written["general"]["scores"]["3"]["sst2"]["examples"] == 4
    efficacy = written["retention"]["efficacy"]
    assert sum(efficacy[-1]) / 3 == pytest.approx(written["metrics"]["efficacy"], abs=1e-3)
    assert efficacy[0][1:] == [None, None]
    assert len(written["answers"]) == 6 and {"before", "after"} <= set(written["answers"][0])
    assert written["before"]["efficacy"] is not None and written["before"] != written["metrics"]
    assert {len(values) for values in written["module_drift"].values()} == {3}
    assert cli.main(["report", str(path.parent), "--figures", "pdf"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == str(path.parent / "report.html") and any(line.endswith("retention.pdf") for line in shown)
    assert shown_command(path.parent / "report.html").startswith("rledit evaluate --agent")


def shown_command(page: Path) -> str:
    return page.read_text(encoding="utf-8").split("<pre>")[1].split("</pre>")[0]


def test_report_of_a_folder_without_results_says_how_to_get_one(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", str(run_folder)]) == 2
    assert "holds no result to show; write one with: rledit evaluate" in capsys.readouterr().err


@pytest.mark.parametrize(
    "message, shown",
    [
        ("correct it, or pass on_error='skip' to leave", "correct it, or pass --on-error skip to leave"),
        ("lower num_batches or batch_size, or", "lower --num-batches or --batch-size, or"),
        ('with edit_modules="x"', "with --edit-modules x"),
        ("the file batch_size.json in /a/batch_size and 'batch_size'",) * 2,
        ("my_batch_size and batch_sizes",) * 2,
    ],
)
def test_errors_name_the_command_s_options_not_python_s_arguments(message: str, shown: str) -> None:
    options = argparse.Namespace(on_error="raise", num_batches=1, batch_size=2, edit_modules=None, kind="x")
    assert cli._as_options(message, options) == shown


@pytest.mark.parametrize("command", ["train", "probe", "evaluate", "compare", "edit"])
def test_every_command_that_reads_facts_can_leave_rows_out(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    assert "--on-error {raise,skip}" in capsys.readouterr().out
