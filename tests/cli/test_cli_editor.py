"""`rledit edit --editor`: any model edited at once, without a trained agent."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from agents import UltraEditAgent, find_agent, load_agent
from agents.running import strength
from agents.running.editors import EDITORS, training_free_editors
from rledit_env import cli
from rledit_env.cli import editing, editor_strength
from rledit_env.env import LifelongEditEnv
from rledit_env.ledger import EditLedger
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.loading.tiny import tiny_model, tiny_tokenizer

FACTS = [
    {"prompt": "The king of Ruritania is", "target": "a.", "subject": "Ruritania"},
    {"prompt": "The capital of Freedonia is", "target": "b.", "subject": "Freedonia"},
    {"prompt": "The river of Zenda is", "target": "c.", "subject": "Zenda"},
]
LOCATE = [name for name in training_free_editors() if EDITORS[name].group == "locate"]


@pytest.fixture(autouse=True)
def quick(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache for these tests, and little text to measure the divergence on."""
    monkeypatch.setenv("RLEDIT_CACHE", str(tmp_path_factory.getbasetemp() / "editor-cache"))
    monkeypatch.setattr(strength, "TEXTS", strength.TEXTS[:2])
    monkeypatch.setattr(strength, "TEXT_TOKENS", 8)


@pytest.fixture(scope="module")
def unlisted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder that nothing is known of."""
    folder = tmp_path_factory.mktemp("models") / "mine"
    tiny_model("tiny-gpt2", torch.float32).save_pretrained(folder)
    tiny_tokenizer("tiny-gpt2").save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """An edit of three facts in batches of two, without its editor."""
    facts = tmp_path / "facts.jsonl"
    facts.write_text("\n".join(map(json.dumps, FACTS)))
    return ["edit", "--facts", str(facts), "--model", "tiny-llama", "--batch-size", "2", "--device", "cpu",
            "--out", str(tmp_path / "out")]  # fmt: skip


def report(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "out" / "edit_report.json").read_text(encoding="utf-8"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert cli.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("rledit ")
    return lines[-1]


# -- which editor --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", training_free_editors())
def test_every_editor_without_training_edits_a_model_that_nothing_is_known_of(
    name: str, arguments: list[str], unlisted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--statistics-tokens", "1024"] if name in LOCATE else ["--step-size", "1e-3"]
    more = [] if name == "none" else more
    assert cli.main([*arguments, "--model", str(unlisted), "--editor", name, *more]) == 0
    shown = capsys.readouterr()
    assert f"editor {EDITORS[name].title}" in shown.out
    written = report(tmp_path)
    assert (written["editor"]["name"], written["agent"]) == (name, None)
    assert written["settings"]["batch_size"] == 2
    before, after = weights(unlisted), weights(tmp_path / "out")
    changed = {key.removesuffix(".weight") for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed <= set(written["settings"]["edit_modules"])
    assert bool(changed) == (name != "none")
    if name in LOCATE:
        assert all(module.endswith("mlp.c_proj") for module in changed)


def test_what_text_second_moments_need_is_said_beforehand_once_per_model(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RLEDIT_CACHE", str(tmp_path / "fresh"))
    arguments += ["--editor", "memit", "--statistics-tokens", "1024", "--overwrite"]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "second moments of 2 modules' inputs over 1,024 tokens of text that the model writes, about" in shown
    assert cli.main(arguments) == 0
    assert "second moments" not in capsys.readouterr().out
    assert report(tmp_path)["editor"]["config"]["corpus_tokens"] == 1024


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--agent and --editor are both missing"),
        ([], "alphaedit"),
        (["--agent", "default", "--editor", "ultraedit"], "--agent and --editor exclude each other"),
        (["--agent", "ultraedit"], "give --editor ultraedit"),
        (["--editor", "default"], "give --agent default"),
        (["--editor", "."], "is a trained agent: give --agent ."),
        (["--editor", "ultraedti"], "did you mean 'ultraedit'"),
        (["--editor", "mend"], "train an agent with 'rledit train'"),
        (["--editor", "malmen*"], "has to be trained"),
        (["--editor", "rledit"], "has to be trained"),
        (["--editor", "memit", "--step-size", "1"], "--step-size: memit has none"),
        (["--editor", "ultraedit", "--step-size", "-1"], "--step-size is -1; give a positive number"),
        (["--editor", "ultraedit", "--step-size", "nan"], "give a positive number"),
        (["--editor", "ft-l", "--statistics-tokens", "99"], "--statistics-tokens: ft-l needs no text"),
        (["--editor", "memit", "--statistics-tokens", "20"], "second moments of 48 inputs need more tokens"),
        (["--agent", "default", "--step-size", "1"], "--step-size is for --editor"),
        (["--editor", "ultraedit", "--steps-per-batch", "0"], "--steps-per-batch is 0"),
        (["--editor", "rome", "--edit-modules", "model.layers.[1-2].mlp.down_proj"], "ROME edits one module"),
    ],
)
def test_a_choice_that_cannot_be_is_refused_in_one_line_and_nothing_is_written(
    options: list[str], message: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error_of([*arguments, *options], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", LOCATE)
def test_facts_without_subjects_are_refused_before_the_model_is_loaded_by_editors_that_need_them(
    name: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, [FACTS[0], {"prompt": "Up is", "target": "d."}])))
    said = error_of([*arguments, "--model", "no/where", "--editor", name], capsys)
    assert "1 of 2 facts name none, such as 'Up is'" in said and "--editor ultraedit" in said
    assert "line 2" in said


# -- its strength --------------------------------------------------------------------------------------------------


def test_without_a_step_size_one_is_found_shown_with_its_cost_and_kept_in_the_report(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments += ["--editor", "ft-m", "--drift-bound", "2.5", "--edit-modules", "model.layers.[2-3].mlp.*"]
    arguments += ["--batch-size", "3"]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "FT-M is tried on 3 of the facts, for about 60 seconds" in shown
    assert "presentations  step size  facts that took  KL on own text" in shown
    found = report(tmp_path)["editor"]
    search = found["probe"]
    assert search["bound"] == 2.5 and search["facts"] == 3
    assert search["chosen"] in search["trials"] and search["chosen"]["taken"] == 3
    assert found["step_size"] == found["config"]["learning_rate"] == search["chosen"]["step_size"]
    assert search["reason"] in shown
    assert all(report(tmp_path)["taken"])


def test_what_a_probe_found_gives_the_same_weights_as_the_same_step_size_given(
    arguments: list[str], tmp_path: Path
) -> None:
    arguments += ["--editor", "ultraedit", "--steps-per-batch", "2"]
    assert cli.main(arguments) == 0
    found = report(tmp_path)["editor"]["step_size"]
    probed = weights(tmp_path / "out")
    assert cli.main([*arguments, "--step-size", repr(found), "--overwrite"]) == 0
    given = weights(tmp_path / "out")
    assert report(tmp_path)["editor"]["probe"] is None
    assert all(torch.equal(probed[name], given[name]) for name in probed)


def test_facts_that_take_with_no_strength_are_said_with_what_else_may_help(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments += ["--editor", "fine-tuning", "--steps-per-batch", "1", "--drift-bound", "1e-6", "--on-drift", "warn"]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().err
    assert "with no strength tried do all 3 facts take within 1e-06 nats a token" in said and "rledit train" in said


def test_a_resumed_run_takes_the_strength_that_its_ledger_recorded_and_probes_no_more(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments += ["--editor", "ultraedit", "--steps-per-batch", "1", "--ledger", str(tmp_path / "ledger")]
    assert cli.main(arguments) == 0
    first, before = report(tmp_path)["editor"], weights(tmp_path / "out")
    (tmp_path / "ledger" / EditLedger(tmp_path / "ledger").names[-1]).unlink()  # as if interrupted after one batch
    monkeypatch.setattr(editor_strength, "_probed", lambda *_: pytest.fail("probed again"))
    capsys.readouterr()
    assert cli.main([*arguments, "--resume", "--overwrite"]) == 0
    assert "going on after 1 recorded updates" in capsys.readouterr().out
    assert report(tmp_path)["editor"] == first
    assert all(torch.equal(before[name], weight) for name, weight in weights(tmp_path / "out").items())
    other = [*arguments, "--resume", "--overwrite"]
    assert f"--step-size: {first['step_size']} there, 0.5 here" in error_of([*other, "--step-size", "0.5"], capsys)
    assert "editor.warm_up: True there, False here" in error_of([*other, "--no-warm-up"], capsys)
    assert "1 there, 2 here" in error_of([*other, "--steps-per-batch", "2"], capsys)
    other[other.index("ultraedit")] = "ft-l"
    assert "--editor: ultraedit there, ft-l here" in error_of(other, capsys)


@pytest.mark.parametrize("name", ["memit", "ft-l", "ft-m", "recursion"])
def test_an_editor_s_interrupted_run_is_resumed_to_the_same_weights(
    name: str, arguments: list[str], tmp_path: Path
) -> None:
    more = ["--statistics-tokens", "1024"] if name == "memit" else ["--step-size", "1e-3"]
    arguments += ["--editor", name, *more, "--ledger", str(tmp_path / "ledger")]
    assert cli.main(arguments) == 0
    before = weights(tmp_path / "out")
    (tmp_path / "ledger" / EditLedger(tmp_path / "ledger").names[-1]).unlink()
    assert cli.main([*arguments, "--resume", "--overwrite"]) == 0
    assert all(torch.equal(before[name], weight) for name, weight in weights(tmp_path / "out").items())


@pytest.mark.parametrize(("name", "mend"), [
    ("ultraedit", "Give a smaller --step-size or another --editor, or give fewer facts"),
    ("rome", "Take another --editor, or give fewer facts"),
])  # fmt: skip
def test_an_editor_that_goes_too_far_writes_nothing_and_names_what_helps(
    name: str, mend: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--step-size", "1"] if name == "ultraedit" else ["--statistics-tokens", "1024"]
    assert cli.main([*arguments, "--editor", name, *more, "--drift-bound", "1e-9"]) == 1
    assert mend in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -- agents of other models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["edit", "evaluate"])
@pytest.mark.parametrize("model", ["tiny-llama", "tiny-gpt2"])
def test_an_agent_with_another_model_than_its_own_names_its_model_and_the_two_ways(
    command: str, model: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "evaluate":
        arguments = ["evaluate", "--device", "cpu", "--num-batches", "1", "--batch-size", "2"]
    said = error_of([*arguments, "--model", model, "--agent", "default"], capsys)
    assert "belongs to smollm2-135m" in said
    assert f"rledit edit --editor ultraedit --model {model}" in said
    assert f"rledit train --model {model}" in said


@pytest.mark.parametrize("command", ["edit", "evaluate"])
def test_modules_that_the_user_names_wrongly_are_not_said_to_be_another_model_s(
    command: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "evaluate":
        arguments = ["evaluate", "--device", "cpu", "--model", "tiny-llama"]
    said = error_of([*arguments, "--agent", "default", "--edit-modules", "model.layers.*.mpl.up_proj"], capsys)
    assert "pattern 'model.layers.*.mpl.up_proj' matches no linear module" in said


def test_an_agent_of_the_same_model_but_other_modules_is_mended_by_leaving_them_out(tmp_path: Path) -> None:
    lm = EditableLM.load("tiny-llama", dtype="float32", device="cpu")
    env = LifelongEditEnv("counterfact", lm, num_batches=1, batch_size=1)
    UltraEditAgent(env).save(tmp_path)
    other = EditableLM.load("tiny-llama", "model.layers.3.mlp.up_proj", dtype="float32", device="cpu")
    with pytest.raises(ValueError, match="was trained for 4 modules.*leave edit_modules .--edit-modules. out, or edit"):
        load_agent(tmp_path, LifelongEditEnv("counterfact", other, num_batches=1, batch_size=1))


def test_an_agent_for_modules_of_other_shapes_names_the_two_ways_in_python_too() -> None:
    lm = EditableLM.load("tiny-llama", dtype="float32", device="cpu")
    env = LifelongEditEnv("counterfact", lm, num_batches=1, batch_size=1)
    with pytest.raises(ValueError, match="smollm2-135m.*--editor ultraedit --model tiny-llama.*rledit train --mod"):
        load_agent(find_agent("default"), env)


# -- on the default model ------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize("name", ["ultraedit", "recursion"])
def test_a_single_fact_takes_at_once_on_the_default_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RLEDIT_CACHE")
    facts, out = tmp_path / "one.jsonl", tmp_path / "out"
    facts.write_text(json.dumps({"prompt": "The mother tongue of Danielle Darrieux is", "target": "English",
                                 "subject": "Danielle Darrieux"}))
    arguments = ["edit", "--facts", str(facts), "--editor", name, "--steps-per-batch", "8", "--save", "delta"]
    assert cli.main([*arguments, "--out", str(out)]) == 0
    written = report(tmp_path)
    assert written["taken"] == [True]
    assert written["editor"]["probe"]["chosen"]["kl"] <= 0.1


def test_a_method_without_second_moments_wants_no_text_for_them(tiny_lm: Any) -> None:
    lm = tiny_lm("tiny-llama", "model.layers.1.mlp.down_proj")
    options = argparse.Namespace(statistics_tokens=1024)
    editing._check_statistics(EDITORS["rome"], lm, options)
    with pytest.raises(ValueError, match="--statistics-tokens: rome .* takes no second moments.*leave it out"):
        editing._check_statistics(replace(EDITORS["rome"], settings={"second_moment": False}), lm, options)


# -- presentations


def test_facts_are_presented_until_they_have_taken_and_the_report_says_how_often(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    until = ["--present-until", "0.02", "--max-presentations", "5"]
    assert cli.main([*arguments, "--editor", "fine-tuning", "--step-size", "3", *until]) == 0
    shown, found = capsys.readouterr().out, report(tmp_path)
    assert "at most 5 presentations of a batch" in shown
    assert "facts were presented until every answer token at p ≥ 0.02, at most 5 times; facts by presenta" in shown
    assert (found["settings"]["present_until"], found["settings"]["steps_per_batch"]) == (0.02, 5)
    counts = [one["presentations"] for one in found["answers"]]
    assert all(0 < n <= 5 for n in counts) and len(set(counts)) > 1
    said = found["presentations"]
    assert (said["until"], said["at_most"]) == (0.02, 5)
    assert said["facts_by_count"] == {str(n): counts.count(n) for n in sorted(set(counts))}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    lm = EditableLM(model, tiny_tokenizer("tiny-llama"), ["*.mlp.up_proj"])
    for place, fact in enumerate(FACTS):
        passage = lm.tokenize(fact["prompt"], fact["target"])
        with torch.no_grad():
            logits = lm.model(input_ids=torch.tensor([passage.input_ids])).logits[0, list(passage.positions)]
        least = float(logits.softmax(-1).gather(1, torch.tensor(passage.targets)[:, None]).min())
        assert (least < 0.02) == (place in said["never"] + said["lost"])
        assert (place in said["never"]) <= (counts[place] == 5)


def test_facts_that_never_get_there_are_named(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*arguments, "--editor", "fine-tuning", "--step-size", "1e-6"]) == 0
    shown, found = capsys.readouterr().out, report(tmp_path)
    assert "at most 16 times; facts by presentations: 16 times: 3" in shown
    assert "3 of 3 facts never got there; give a larger --max-presentations or --step-size:" in shown
    assert all(repr(fact["prompt"]) in shown.split("never got there")[1] for fact in FACTS)
    assert found["presentations"]["never"] == [0, 1, 2] and found["presentations"]["lost"] == []
    assert found["settings"]["present_until"] == 0.8


@pytest.mark.parametrize(
    ("more", "count"),
    [(["--steps-per-batch", "2"], 2), (["--present-until", "none"], 1), (["--present-until", "0"], 1)],
)
def test_a_fixed_number_of_presentations_can_still_be_had(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], count: int
) -> None:
    assert cli.main([*arguments, "--editor", "fine-tuning", "--step-size", "0.1", *more]) == 0
    shown, found = capsys.readouterr().out, report(tmp_path)
    assert "presented until" not in shown and "present_until" not in found["settings"]
    assert found["settings"]["steps_per_batch"] == count
    assert found["presentations"]["facts_by_count"] == {str(count): 3}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--editor", "ultraedit", "--max-presentations", "3", "--steps-per-batch", "3"], "exclude each other"),
        (["--editor", "ultraedit", "--max-presentations", "3", "--present-until", "none"], "exclude each other"),
        (["--editor", "ultraedit", "--max-presentations", "0"], "max-presentations is 0"),
        (["--editor", "rome", "--present-until", "0.5"], "--present-until: rome presents a batch once"),
        (["--editor", "ft-l", "--max-presentations", "5"], "--max-presentations: ft-l presents a batch once"),
    ],
)  # fmt: skip
def test_presentations_that_cannot_be_are_refused(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert cli.main([*arguments, *more]) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_resumed_run_is_presented_as_its_ledger_recorded(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit = [*arguments, "--editor", "fine-tuning", "--step-size", "3", "--overwrite"]
    old, new = (["--ledger", str(tmp_path / name)] for name in ("old", "new"))
    assert cli.main([*edit, *old, "--steps-per-batch", "2"]) == 0
    assert "present_until" not in EditLedger(tmp_path / "old").header["settings"]
    assert cli.main([*edit, *new, "--present-until", "0.02", "--max-presentations", "5"]) == 0
    for ledger, settings in ((old, (None, 2)), (new, (0.02, 5))):
        assert cli.main([*edit, *ledger, "--resume"]) == 0
        found = report(tmp_path)["settings"]
        assert (found.get("present_until"), found["steps_per_batch"]) == settings
