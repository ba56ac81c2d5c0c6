"""What a user meets first: nothing is lost, whatever paths a command is given."""

from __future__ import annotations

import json
import pkgutil
import runpy
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from agents import FineTuningAgent, HypernetworkConfig, RLEditAgent, RLEditConfig
from agents.files import agent_folder, check_agent_folder, remove_run, run_folder
from rledit_env import cli
from rledit_env.files import MARKER, read_marker, write_tensors
from rledit_env.lm.delta import load_delta, save_delta, save_lora
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.loading.loader import load_model

ENV = "RLEdit-CounterFact-v0"
FACTS = [
    {"prompt": "The capital of Freedonia is", "target": "Sylvania", "subject": "Freedonia"},
    {"prompt": "The king of Ruritania is", "target": "Rudolf", "subject": "Ruritania"},
]
DEVICE = ["--device", "cpu", "--dtype", "float32"]
TRAIN = [
    "train", "--env", ENV, "--model", "tiny-llama", "--num-batches", "1", "--batch-size", "2", "--steps-per-batch", "1",
    "--rank", "4", "--aggregation", "least_squares", "--eval-every", "1", "--eval-num-batches", "1", "--trajectories",
    "1", *DEVICE,
]  # fmt: skip
COMPARE = [
    "compare", "--env", ENV, "--model", "tiny-llama", "--editors", "none", "--batches", "1", "--batch-size", "2",
    "--seeds", "1", "--no-generate", *DEVICE,
]  # fmt: skip
PROBE = [
    "probe", "--model", "tiny-llama", "--step-sizes", "0.01", "--num-batches", "1", "--batch-size", "2",
    "--run-lengths", "--finalists", "0", "--edit-modules", "model.layers.1.mlp.up_proj", *DEVICE,
]  # fmt: skip
EVALUATE = ["--num-batches", "1", "--batch-size", "2", *DEVICE]


@dataclass(frozen=True)
class Home:
    """A user's files: a model, an agent, facts, and what was made of them."""

    folder: Path

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    @property
    def edit(self) -> list[str]:
        """`rledit edit` without its outputs."""
        return ["edit", "--facts", str(self / "facts.jsonl"), "--agent", str(self / "agent"), *DEVICE]

    def command(self, name: str, out: str) -> list[str]:
        """A command that writes ``out``."""
        return {
            "edit": [*self.edit, "--out", out],
            "edit --ledger": [*self.edit, "--out", str(self / "free"), "--ledger", out],
            "train": [*TRAIN, "--out", out],
            "probe": [*PROBE, "--out", out],
            "compare": [*COMPARE, "--out", out],
            "evaluate": ["evaluate", "--agent", str(self / "agent"), *EVALUATE, "--json", out],
            "report": ["report", str(self / "edited"), "--out", out],
            "ledger replay": ["ledger", "replay", str(self / "ledger"), "--out", out],
            "ledger undo": ["ledger", "undo", str(self / "ledger"), "--batch", "1", "--out", out],
        }[name]


FOLDERS = ("edit", "edit --ledger", "train", "probe", "compare", "ledger replay", "ledger undo")
FILES = ("evaluate", "report")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """Facts, an agent, and what one edit with a ledger wrote."""
    home = Home(tmp_path_factory.mktemp("home"))
    (home / "facts.jsonl").write_text("\n".join(map(json.dumps, FACTS)))
    lm = EditableLM.load("tiny-llama", dtype="float32", device="cpu")
    lm.save_pretrained(home / "model")
    lm = EditableLM.load(str(home / "model"), "model.layers.1.mlp.up_proj", dtype="float32", device="cpu")
    agent = RLEditAgent(shapes=lm.module_shapes, config=RLEditConfig(network=HypernetworkConfig(rank=4)))
    agent.save(home / "agent")
    described = json.loads((home / "agent" / "agent.json").read_text())
    described["environment"] = {"id": ENV, "model": str(home / "model"), "edit_modules": list(lm.module_shapes)}
    (home / "agent" / "agent.json").write_text(json.dumps(described))
    assert cli.main([*home.edit, "--out", str(home / "edited"), "--ledger", str(home / "ledger")]) == 0
    return home


@pytest.fixture
def home(made: Home, tmp_path: Path) -> Home:
    """A copy of those files for each test."""
    shutil.copytree(made.folder, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "agent" / "agent.json", tmp_path / "ledger" / "ledger.json"):
        path.write_text(path.read_text().replace(str(made.folder), str(tmp_path)))
    return Home(tmp_path)


@pytest.fixture
def nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test where a command reads data or loads or fetches a model."""
    for name in ("rledit_env.lm.editable.EditableLM.load", "rledit_env.lm.loading.loader.load_model",
                 "rledit_env.knowledge.load_knowledge", "rledit_env.knowledge.facts.load_facts",
                 "rledit_env.lm.loading.fetching.fetch", "rledit_env.reporting.run_report.RunReport.page",
                 "gymnasium.make"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("work was begun"))


def content(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in folder.rglob("*") if path.name != ".lock"}


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command which ends with 2 says, and prints nothing else."""
    capsys.readouterr()
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(f"rledit {arguments[0]}: error: "), out + err
    return err


# -- every path of every command is tried before any work ----------------------------------------------------------


@pytest.mark.usefixtures("nothing_is_done")
@pytest.mark.parametrize("command", [*FOLDERS, *FILES])
def test_a_path_that_cannot_be_written_is_refused_before_any_work(
    command: str, home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "loop").symlink_to("loop")
    (home / "dangling").symlink_to("nowhere")
    before = content(home.folder)
    for out, message in (
        ("/sys/x", "name a place on a disk that can be written"),
        ("/proc/x", "name a place on a disk that can be written"),
        (str(home / ("x" * 300)), "give a shorter name"),
        (str(home / "facts.jsonl" / "x"), "Name another folder"),
        (str(home / "loop"), "Remove it, or name another path"),
        (str(home / "dangling" / "x"), "Remove it, or name another path"),
        ("", "a path is empty; name a folder or a file"),
        ("~nobody-of-this-name/x", "write the folder out"),
        (str(home / ("facts.jsonl" if command in FOLDERS else "model")),
         "is a file; name a folder" if command in FOLDERS else "is a folder; name a file in it"),
    ):
        said = refused(home.command(command, out), capsys)
        assert message in said and out in said, said
        assert content(home.folder) == before


@pytest.mark.usefixtures("nothing_is_done")
def test_a_cache_that_cannot_be_written_is_refused_before_anything_is_fetched(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for cache in ("/sys/x", "/proc/x", str(home / "facts.jsonl"), str(home / ("x" * 300))):
        monkeypatch.setenv("RLEDIT_CACHE", cache)
        for command in (["fetch", "smollm2-135m"], ["train", "--env", ENV, "--out", str(home / "run")],
                        [*home.edit[:3], "--agent", "default", "--out", str(home / "new")]):
            said = refused(command, capsys)
            assert "RLEDIT_CACHE" in said and cache in said
    assert not (home / "run").exists() and not (home / "new").exists()


@pytest.mark.usefixtures("nothing_is_done")
def test_a_model_s_folder_in_the_cache_that_holds_something_else_is_not_replaced(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RLEDIT_CACHE", str(home.folder))
    folder = home / "models" / "smollm2-135m"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").touch()
    assert "holds thesis.tex, which rledit did not write: move that away" in refused(["fetch", "smollm2-135m"], capsys)
    assert (folder / "thesis.tex").exists()


@pytest.mark.usefixtures("nothing_is_done")
def test_pictures_are_tried_with_their_page(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "edited" / "figures").touch()
    arguments = ["report", str(home / "edited"), "--figures", "png"]
    assert "figures is a file; name a folder" in refused(arguments, capsys)
    (home / "edited" / "figures").unlink()
    assert "are the same place" in refused([*arguments, "--out", str(home / "edited" / "figures")], capsys)


# -- nothing is replaced but what rledit wrote ---------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_is_done")
@pytest.mark.parametrize("option", ["facts", "agent", "model", "ledger", "the agent's model"])
def test_edit_does_not_write_where_it_reads(option: str, home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = ["--ledger", str(home / "ledger"), "--resume"] if option == "ledger" else []
    model = ["--model", str(home / "model")] if option == "model" else []
    read = home / {"facts": "facts.jsonl", "the agent's model": "model"}.get(option, option)
    mine = home / "mine"
    mine.mkdir()
    (mine / "thesis.tex").touch()
    shutil.move(read, mine / read.name)
    read.symlink_to(mine / read.name)  # named through a link, it is the same place
    before = content(home.folder)
    inside = [] if option == "facts" else [mine / read.name / "new"]
    same = [] if option == "facts" else [read, mine / read.name]
    for out in (mine, *same, *inside):
        for more in ([], ["--overwrite"]):
            said = refused([*home.edit, *ledger, *model, "--out", str(out), *more], capsys)
            assert option in said or "not empty" in said, said
        assert content(home.folder) == before


@pytest.mark.usefixtures("nothing_is_done")
def test_edit_does_not_write_into_a_model_in_a_cache(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RLEDIT_CACHE", str(home / "cache"))
    registered, hub = home / "cache" / "models" / "smollm2-135m", home / "hub" / "snapshots" / "1"
    for folder in (registered, hub):
        folder.mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: str(hub / file))
    for name, folder in (("smollm2-135m", registered), ("owner/name", hub)):
        for out, what in ((folder, "is"), (folder / "new", "lies inside"), (folder.parent, "holds")):
            said = refused([*home.edit, "--model", name, "--out", str(out)], capsys)
            assert f"{out} {what} the model (--model {name})" in said


@pytest.mark.usefixtures("nothing_is_done")
@pytest.mark.parametrize("command", [["report"], ["ledger", "list"], ["ledger", "undo", "--batch", "1"]])
def test_an_empty_path_is_not_the_current_folder(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "a path is empty; name a folder or a file" in refused([*command, ""], capsys)


@pytest.mark.usefixtures("nothing_is_done")
@pytest.mark.parametrize("command", ["train", "compare", "probe"])
def test_what_learns_from_data_does_not_write_where_the_data_is(
    command: str, home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    data = home / "data"
    data.mkdir()
    for split in ("train", "eval"):
        (data / f"counterfact_{split}.jsonl").write_text("{}")
    for out, what in ((data, "is the data"), (data / "new", "lies inside the data"), (home.folder, "holds the data")):
        said = refused([*home.command(command, str(out)), "--data", str(data)], capsys)
        assert what in said and "--data" in said
    model = str(home / "model")
    for out, what in ((model, "is the model"), (f"{model}/new", "lies inside the model")):
        assert what in refused([*home.command(command, out), "--model", model], capsys)


@pytest.mark.usefixtures("nothing_is_done")
def test_a_replayed_model_is_not_written_into_its_ledger_or_its_model(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(home.folder)
    for action in ("replay", "undo"):
        for place in ("ledger", "model"):
            for out in (home / place, home / place / "new", home.folder):
                said = refused([*home.command(f"ledger {action}", str(out)), "--overwrite"], capsys)
                assert "ledger" in said or "model" in said
    assert content(home.folder) == before


@pytest.mark.usefixtures("nothing_is_done")
def test_two_outputs_at_one_place_are_refused_before_any_work(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    new = str(home / "new")
    for out, ledger in ((new, f"{new}/ledger"), (new, new), (f"{new}/out", new), (new, f"{new}/../new/ledger")):
        said = refused([*home.edit, "--out", out, "--ledger", ledger, "--overwrite"], capsys)
        assert "--out" in said and "--ledger" in said
    assert not (home / "new").exists()


@pytest.mark.usefixtures("nothing_is_done")
@pytest.mark.parametrize("command", ["edit", "train", "probe", "compare", "ledger replay"])
def test_the_current_folder_and_those_that_hold_it_are_refused(
    command: str, home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = home / "a" / "b"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home / "a"))
    for out in (".", "..", "new/..", str(here), "~"):
        assert "the current folder" in refused(home.command(command, out), capsys)
    assert here.is_dir()


@pytest.mark.usefixtures("nothing_is_done")
@pytest.mark.parametrize("command", ["edit", "edit --ledger", "train", "probe", "compare", "ledger replay"])
def test_a_folder_of_somebody_else_is_refused(command: str, home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    mine = home / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years")
    arguments = home.command(command, str(mine))
    for more in ([], ["--overwrite"]) if command in ("edit", "ledger replay") else ([],):
        said = refused([*arguments, *more], capsys)
        assert str(mine) in said and ("thesis.tex" in said or "not empty" in said)
    shutil.copytree(home / "edited", home / "other")
    (home / "other" / MARKER).unlink()  # from before there were markers
    said = refused(home.command(command, str(home / "other")), capsys)
    assert ("name another" in said.lower()) and str(home / "other") in said
    assert (mine / "thesis.tex").read_text() == "years"


@pytest.mark.usefixtures("nothing_is_done")
def test_runs_agents_and_ledgers_are_not_overwritten(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    default = ["edit", "--facts", str(home / "facts.jsonl"), "--agent", "default", "--overwrite", "--out"]
    assert "holds an agent, which is never replaced" in refused([*default, str(home / "agent")], capsys)
    assert "holds an edit ledger, which is never replaced" in refused([*default, str(home / "ledger")], capsys)
    (home / "runs").mkdir()
    shutil.move(home / "agent", home / "runs" / "a")
    assert "has no .rledit.json" in refused([*default, str(home / "runs")], capsys)
    assert (home / "runs" / "a" / "agent.json").exists()
    (home / "edited" / "notes.txt").touch()
    said = refused([*default, str(home / "edited")], capsys)
    assert "holds notes.txt, which is no part of the edited model that rledit wrote there" in said


@pytest.mark.usefixtures("nothing_is_done")
@pytest.mark.parametrize("command", FILES)
def test_a_file_of_somebody_else_is_not_overwritten(
    command: str, home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("facts.jsonl", "agent/agent.json", "ledger/ledger.json", "edited/edit_report.json"):
        before = (home / name).read_bytes()
        assert "it is not overwritten" in refused(home.command(command, str(home / name)), capsys)
        assert (home / name).read_bytes() == before


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.usefixtures("nothing_is_done")
@pytest.mark.parametrize(
    ("name", "option"),
    [("demo", "out"), ("train_rledit", "out"), ("train_ppo", "out"), ("edit_my_model", "out"),
     ("ppo_single_file", "log_dir")],
)  # fmt: skip
def test_an_example_refuses_what_it_cannot_write_before_any_work(
    name: str, option: str, home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    example = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    settings = example.get("Args") or example["Settings"]
    places = [("/sys/x", "name a place on a disk"), (str(home / "facts.jsonl"), "is a file; name a folder")]
    if option == "out":  # logs are only added to a folder
        (home / "mine" / "training").mkdir(parents=True)
        (home / "mine" / "training" / "thesis.tex").touch()
        places.append((str(home / "mine"), "another one"))
    for out, message in places:
        with pytest.raises(SystemExit) as stop:
            example["main"](settings(**{option: Path(out) if option == "out" else out}))
        printed, said = capsys.readouterr()
        assert stop.value.code == 2 and printed == ""
        assert said.startswith("error: ") and said.count("\n") == 1 and message.lower() in said.lower() and out in said
    assert not (home / "mine").exists() or (home / "mine" / "training" / "thesis.tex").exists()


def test_a_second_demo_takes_away_what_the_first_one_trained_and_nothing_else(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "training")
    logs = ("events.out.tfevents.1", "steps/events.out.tfevents.1")
    for name in ("best/agent.json", "last/training.safetensors", *logs):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).touch()
        (run / name).with_name("notes.txt").touch()
    remove_run(run)
    left = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert left == {MARKER, "notes.txt", "best/notes.txt", "last/notes.txt", "steps/notes.txt"}


# -- and what may be written is ------------------------------------------------------------------------------------


def test_an_edit_replaces_an_earlier_one_with_its_results_pages_and_pictures(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    edited = home / "edited"
    evaluate = ["evaluate", "--agent", str(home / "agent"), *EVALUATE, "--json", str(edited / "result.json")]
    assert cli.main(evaluate) == 0
    assert cli.main(evaluate) == 0  # over the first one
    for _ in range(2):
        assert cli.main(["report", str(edited), "--figures", "png"]) == 0
    assert {"result.json", "report.html", "figures"} <= {path.name for path in edited.iterdir()}
    assert "ask for it to be overwritten (--overwrite, or" in refused([*home.edit, "--out", str(edited)], capsys)
    assert cli.main([*home.edit, "--out", str(edited), "--save", "delta", "--overwrite"]) == 0
    assert {path.name for path in edited.iterdir()} == {"delta.safetensors", "edit_report.json", MARKER}
    marker = read_marker(edited)
    assert marker is not None and marker.whole and "--save delta --overwrite" in str(marker.command)
    assert [path.name for path in home.folder.iterdir() if path.name.startswith(".")] == []


def test_a_picture_of_somebody_else_is_not_overwritten_and_nothing_is_written(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = home / "edited" / "figures"
    figures.mkdir()
    (figures / "scores.png").write_text("mine")
    assert "scores.png is there already" in refused(["report", str(home / "edited"), "--figures", "png"], capsys)
    assert (figures / "scores.png").read_text() == "mine" and not (home / "edited" / "report.html").exists()
    assert cli.main(["report", str(home / "edited"), "--figures", "pdf"]) == 0


def test_a_training_run_goes_on_in_its_own_folder_and_is_evaluated_into_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "first"
    assert cli.main([*TRAIN, "--out", str(run)]) == 0
    marker = read_marker(run)
    assert marker is not None and marker.what == "training run" and "rledit train" in str(marker.command)
    assert cli.main(["evaluate", "--agent", str(run), *EVALUATE, "--json", str(run / "result.json")]) == 0
    assert json.loads((run / "result.json").read_text())["format"] == "rledit-result-1"
    assert cli.main([*TRAIN, "--trajectories", "2", "--out", str(run)]) == 0
    assert "going on from" in capsys.readouterr().out
    for command in (COMPARE, PROBE):
        said = refused([*command, "--out", str(run)], capsys)
        assert "holds a training run, written by 'rledit train" in said and "name another one" in said


@pytest.mark.parametrize(("arguments", "what"), [(COMPARE, "comparison"), (PROBE, "probe")], ids=["compare", "probe"])
def test_a_comparison_and_a_probe_go_on_in_their_own_folders(
    arguments: list[str], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert cli.main([*arguments, "--out", str(out)]) == 0
    marker = read_marker(out)
    assert marker is not None and marker.what == what and not marker.whole
    monkeypatch.setattr("rledit_env.evaluation.metrics.evaluate", lambda *_, **__: pytest.fail("it is computed again"))
    monkeypatch.setattr("agents.running.comparison.evaluate", lambda *_, **__: pytest.fail("it is computed again"))
    monkeypatch.setattr("agents.running.probe.evaluate", lambda *_, **__: pytest.fail("it is computed again"))
    assert cli.main([*arguments, "--out", str(out)]) == 0


def test_an_edit_goes_on_with_its_ledger(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*home.edit, "--ledger", str(home / "recorded")]
    assert cli.main([*arguments, "--out", str(home / "new")]) == 0
    said = refused([*arguments, "--out", str(home / "again")], capsys)
    assert "go on with it: resume (--resume)" in said
    assert cli.main([*arguments, "--out", str(home / "again"), "--resume"]) == 0
    assert (home / "again" / "model.safetensors").read_bytes() == (home / "edited" / "model.safetensors").read_bytes()


# -- the same in Python --------------------------------------------------------------------------------------------


def test_saving_an_agent_replaces_an_agent_and_nothing_else(tmp_path: Path) -> None:
    agent = RLEditAgent(shapes={"up": (4, 4)}, config=RLEditConfig(network=HypernetworkConfig(rank=2)))
    (tmp_path / "notes.txt").touch()
    agent.save(tmp_path)
    agent.save(tmp_path)
    (tmp_path / MARKER).unlink()  # as one that was saved before there were markers
    agent.save(tmp_path)
    for name in ("agent.json", "agent.safetensors", "training.safetensors"):
        mine = tmp_path / f"with-{name}"
        mine.mkdir()
        (mine / name).write_text("{}")
        for write in (agent.save, FineTuningAgent().save):
            with pytest.raises(FileExistsError, match=f"{name} is there already, and no agent wrote it"):
                write(mine)
        assert {path.name: path.read_text() for path in mine.iterdir()} == {name: "{}"}
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is a file; name a folder for the agent"):
        agent.save(tmp_path / "file")


def test_training_does_not_begin_where_it_would_overwrite_what_no_training_wrote(tmp_path: Path) -> None:
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "agent.json").write_text('{"agent": "my own"}')
    with pytest.raises(FileExistsError, match="no agent wrote it"):
        run_folder(tmp_path)
    (tmp_path / "last" / "agent.json").unlink()
    tensors = tmp_path / "last" / "training.safetensors"
    write_tensors(tensors, {"x": torch.zeros(1)})
    with pytest.raises(FileExistsError, match="no agent wrote it"):
        run_folder(tmp_path)
    write_tensors(tensors, {"x": torch.zeros(1)}, {"training": "{}"})  # an interrupted run from before the markers
    run_folder(tmp_path)
    agent_folder(tmp_path)
    marker = read_marker(tmp_path)
    assert marker is not None and marker.what == "training run" and "agent.json" in marker.files
    check_agent_folder(tmp_path)


@pytest.mark.parametrize("save", [
    lambda lm, folder, overwrite: lm.save_pretrained(folder, overwrite),
    lambda lm, folder, overwrite: save_delta(lm, folder, overwrite),
    lambda lm, folder, overwrite: save_lora(lm, folder, overwrite=overwrite),
], ids=["model", "delta", "lora"])  # fmt: skip
def test_a_saved_model_or_change_replaces_its_like_and_nothing_else(
    save: Callable[[EditableLM, Path, bool], Any], tmp_path: Path, tiny_lm: Callable[..., EditableLM]
) -> None:
    lm = tiny_lm(modules="model.layers.1.mlp.up_proj")
    save(lm, tmp_path / "out", False)
    with pytest.raises(FileExistsError, match="not empty"):
        save(lm, tmp_path / "out", False)
    save(lm, tmp_path / "out", True)
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match=r"holds thesis\.tex"):
        save(lm, tmp_path / "out", True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="never replaced"):
        save(lm, tmp_path / "mine", True)
    assert (tmp_path / "out" / "thesis.tex").exists() and (tmp_path / "mine" / "thesis.tex").exists()


# -- scores come first ---------------------------------------------------------------------------------------------


@pytest.fixture
def disk_full_at(
    monkeypatch: pytest.MonkeyPatch, file_size_limit: Callable[[int], None]
) -> Callable[[str, int], None]:
    """Gives a function after which no file can have more than so many bytes once a function has been called."""

    def full_at(place: str, most: int) -> None:
        original = pkgutil.resolve_name(place)

        def filled(*arguments: Any, **more: Any) -> Any:
            file_size_limit(most)
            return original(*arguments, **more)

        monkeypatch.setattr(place, filled)

    return full_at


@pytest.mark.parametrize("most", [100_000, 10])
def test_an_edit_that_cannot_be_written_after_all_says_its_scores_and_keeps_what_it_can(
    most: int, home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    disk_full_at: Callable[[str, int], None],
) -> None:  # fmt: skip
    temporary = home / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    assert (home / "edited" / "model.safetensors").stat().st_size > 100_000
    disk_full_at("rledit_env.cli.edit._write", most)
    assert cli.main([*home.edit, "--out", str(home / "new"), "--ledger", str(home / "recorded")]) == 2
    out, err = capsys.readouterr()
    assert "efficacy" in out and "drift" in out and "written" not in out
    said = err.splitlines()[-1]
    assert f"{home / 'new'} cannot be written (" in said and "File too large" in said
    assert "free some space or name another folder. What was there before still is" in said
    assert f"rledit ledger replay {home / 'recorded'} --out MODEL" in said and not (home / "new").exists()
    kept = list(temporary.iterdir())
    if most == 10:
        assert not kept
        return
    assert f"the change and the report are in {kept[0]} " in said
    assert json.loads((kept[0] / "edit_report.json").read_text())["metrics"]
    changed = load_delta(load_model(str(home / "model"))[0], kept[0]).state_dict()
    edited = AutoModelForCausalLM.from_pretrained(home / "edited").state_dict()
    for name, weight in edited.items():
        torch.testing.assert_close(changed[name], weight, atol=1e-6, rtol=1e-6)


def test_an_edit_that_cannot_be_written_and_has_no_ledger_says_that_nothing_was_kept(
    home: Home, capsys: pytest.CaptureFixture[str], disk_full_at: Callable[[str, int], None]
) -> None:
    disk_full_at("rledit_env.cli.edit._write", 10)
    assert cli.main([*home.edit, "--out", str(home / "new")]) == 2
    assert "nothing of this run was kept but the scores above" in capsys.readouterr().err


def test_an_evaluation_that_cannot_be_written_after_all_is_printed(
    home: Home, capsys: pytest.CaptureFixture[str], disk_full_at: Callable[[str, int], None]
) -> None:
    disk_full_at("rledit_env.cli.evaluate._write", 1000)
    path = home / "deep" / "result.json"
    assert cli.main(["evaluate", "--agent", str(home / "agent"), *EVALUATE, "--json", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out.index("efficacy") < out.index("{") and json.loads(out[out.index("\n{") :])["metrics"]
    assert "result.json cannot be written" in err and "the result is on the standard output instead" in err
    assert not path.exists()


def test_a_replayed_model_that_cannot_be_written_after_all_names_the_ledger(
    home: Home, capsys: pytest.CaptureFixture[str], disk_full_at: Callable[[str, int], None]
) -> None:
    disk_full_at("rledit_env.cli.ledger._write", 10)
    assert cli.main(home.command("ledger replay", str(home / "new"))) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "cannot be written" in said and f"rledit ledger replay {home / 'ledger'} --out MODEL" in said


def test_a_comparison_that_cannot_be_written_after_all_has_said_its_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], disk_full_at: Callable[[str, int], None]
) -> None:
    disk_full_at("agents.running.comparison.Comparison._write", 10)
    assert cli.main([*COMPARE, "--out", str(tmp_path / "out")]) != 0
    said = capsys.readouterr().err
    assert "no edit, stream 0: efficacy " in said and "seed-0.json cannot be written" in said


def test_a_probe_whose_pictures_cannot_be_written_has_said_its_recommendation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], disk_full_at: Callable[[str, int], None]
) -> None:
    disk_full_at("rledit_env.cli.probe._draw", 10)
    assert cli.main([*PROBE, "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert "recommended: --edit-modules" in out and "probe.png cannot be written" in err


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
@pytest.mark.parametrize(
    ("arguments", "place"),
    [(TRAIN, "agents.rledit.trainer.write_checkpoint"), (PROBE, "agents.running.probe.Probe._score")],
    ids=["train", "probe"],
)  # fmt: skip
def test_a_training_and_a_probe_say_that_they_go_on_when_the_disk_is_full(
    arguments: list[str], place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    disk_full_at: Callable[[str, int], None],
) -> None:  # fmt: skip
    disk_full_at(place, 10)
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "cannot be written" in said and "the same command then goes on from what was written" in said


def test_a_ledger_on_a_full_disk_is_gone_on_with(
    home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    disk_full_at: Callable[[str, int], None], file_size_limit: Callable[[int], None],
) -> None:  # fmt: skip
    arguments = [*home.edit, "--batch-size", "1", "--out", str(home / "new"), "--ledger", str(home / "recorded")]
    disk_full_at("rledit_env.ledger.store.EditLedger.append", 10)
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "cannot be written" in said and "the same command with --resume then goes on from what was written" in said
    monkeypatch.undo()
    file_size_limit(2**40)
    assert cli.main([*arguments, "--resume"]) == 0
