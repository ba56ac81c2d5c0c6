"""Edits and paraphrases asked for through the chat template."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from agents import HypernetworkConfig, RLEditAgent, RLEditConfig
from rledit_env import cli
from rledit_env.answers import contains
from rledit_env.env import LifelongEditEnv
from rledit_env.evaluation.chat_scores import ANSWER_TOKENS, CHUNK, ChatScores, chat_scores
from rledit_env.knowledge import EditRecord, UnrelatedFact
from rledit_env.lm.chat import ChatTemplate
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.loading.loader import load_model

CHAT = "{% for m in messages %}<bos>{{ m.role }}\n{{ m.content }}<eos>\n{% endfor %}"
CHAT += "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
UNRELATED = (UnrelatedFact("Rome is in", "Italy"),)


def asked(question: str) -> str:
    return f"<bos>user\n{question}<eos>\n<bos>assistant\n"


@pytest.fixture
def chat_lm(tiny_lm: Callable[..., EditableLM]) -> EditableLM:
    lm = copy.copy(tiny_lm())
    lm.tokenizer = copy.deepcopy(lm.tokenizer)
    lm.tokenizer.chat_template = CHAT
    return lm


def test_each_prompt_is_a_message_and_a_score_is_the_mean_over_records(
    chat_lm: EditableLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {
        "Where is Bergen?": " Bergen is in Peru, a country.", "Bergen?": "In Peru.", "Bergen is in": "Norway",
        "Where is Oslo?": "Norway", "Oslo is in": "in Chile", "The king?": "Rudolfina", "He is": "Ann",
    }  # fmt: skip
    prompts: list[str] = []

    def generate(texts: list[str], extra: int) -> list[str]:
        assert extra == ANSWER_TOKENS
        prompts.extend(texts)
        return [said[text.removeprefix("<bos>user\n").removesuffix("<eos>\n<bos>assistant\n")] for text in texts]

    monkeypatch.setattr(chat_lm, "generate", generate)
    records = [
        EditRecord("Where is Bergen?", "Peru", ("Bergen?", "Bergen is in"), UNRELATED),
        EditRecord("Where is Oslo?", "Chile", ("Oslo is in",), UNRELATED),
        EditRecord("The king?", "Rudolf", ("He is",), UNRELATED),
    ]
    steps: list[int] = []
    scores = chat_scores(chat_lm, records, progress=steps.append)
    assert scores.taken == (True, False, False) and scores.chat_efficacy == pytest.approx(100 / 3)
    assert scores.chat_generalization == pytest.approx(50)  # (1/2 + 1 + 0) / 3
    assert scores.answers == ("Bergen is in Peru, a country.", "Norway", "Rudolfina")
    assert prompts == [asked(question) for question in said] and steps == [3]
    assert scores.as_dict() == pytest.approx({"chat_efficacy": 100 / 3, "chat_generalization": 50})
    assert chat_scores(chat_lm, records[2:]) == ChatScores(0.0, 0.0, (False,), ("Rudolfina",))


def test_the_answers_are_the_edited_model_s_greedy_ones(chat_lm: EditableLM, facts: Any) -> None:
    chat_lm.add({m: torch.full(shape[::-1], 0.02) for m, shape in chat_lm.module_shapes.items()})
    records = list(facts("counterfact", 4))
    written = chat_lm.generate([asked(r.prompt) for r in records], extra=ANSWER_TOKENS)
    assert chat_scores(chat_lm, records).answers == tuple(text.strip() for text in written)
    assert len(chat_lm.encode(written[0])) > 30  # longer than the targets are
    # Whatever words they say are contained as targets.
    pairs = zip(records, written, strict=True)
    said = [EditRecord(r.prompt, text.split()[0], r.paraphrases, UNRELATED) for r, text in pairs]
    assert all(contains(text, r.target) for text, r in zip(written, said, strict=True))
    assert chat_scores(chat_lm, said).chat_efficacy == 100


def test_more_records_than_are_asked_at_once_are_scored_in_their_order(
    chat_lm: EditableLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_lm, "generate", lambda texts, extra: texts)
    count = CHUNK + 3
    records = [EditRecord(f"Word {i}?", str(i + i % 2), (f"{i}!",), UNRELATED) for i in range(count)]
    steps: list[int] = []
    scores = chat_scores(chat_lm, records, progress=steps.append)
    assert scores.taken == tuple(i % 2 == 0 for i in range(count)) and steps == [CHUNK, 3]


def test_no_records_and_no_template_are_refused(chat_lm: EditableLM, tiny_lm: Any) -> None:
    with pytest.raises(ValueError, match="no fact has been edited yet"):
        chat_scores(chat_lm, [])
    with pytest.raises(ValueError, match="tiny-llama has no chat template; take a model made for chat"):
        chat_scores(tiny_lm(), [EditRecord("Up is", "down", ("Up?",), UNRELATED)])


# -- rledit evaluate --chat ----------------------------------------------------------------------------------------


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    model, tokenizer = load_model("tiny-llama")[:2]
    tokenizer.chat_template = CHAT
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def saved(folder: Path, model: str, **network: Any) -> Path:
    env = LifelongEditEnv("counterfact", model, num_batches=1, batch_size=1, dtype="float32", device="cpu")
    RLEditAgent(env, RLEditConfig(network=HypernetworkConfig(rank=4, step_size=1e-3, **network))).save(folder)
    return folder


def evaluate(agent: Path, *more: str) -> list[str]:
    return ["evaluate", "--env", "RLEdit-CounterFact-v0", "--agent", str(agent), "--num-batches", "2", "--batch-size",
            "2", "--dtype", "float32", "--device", "cpu", *more]  # fmt: skip


def test_evaluate_asks_in_a_chat_and_keeps_the_scores_and_the_page_shows_them(
    chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agent, result = saved(tmp_path / "agent", str(chat_model)), tmp_path / "run" / "result.json"
    result.parent.mkdir()
    text = tmp_path / "book.txt"
    text.write_text("Nobody had seen the river so high since the old mill was built. " * 40, encoding="utf-8")
    more = ["--chat", "--general", "self", "--text", str(text), "--json", str(result)]
    assert cli.main(evaluate(agent, *more)) == 0
    shown = capsys.readouterr().out
    content = json.loads(result.read_text(encoding="utf-8"))
    chat = content["chat"]
    assert len(chat["taken"]) == len(chat["answers"]) == 4 and content["settings"]["chat"] is True
    assert chat["chat_efficacy"] == 100 * sum(chat["taken"]) / 4
    assert [contains(a["answer"], a["target"]) for a in chat["answers"]] == chat["taken"]
    assert f"chat efficacy       {chat['chat_efficacy']:10.2f}" in shown and "chat generalization " in shown
    for name in ("own text", "human text", "chat answers"):
        assert f"{name}, KL from the unedited model" in shown
    assert content["general"]["sources"]["human"] == "file book.txt" and list(content["general"]["scores"]["2"]) == [
        "self", "human", "chat",
    ]  # fmt: skip
    assert cli.main(["report", str(result.parent)]) == 0
    page = (result.parent / "report.html").read_text(encoding="utf-8")
    for words in ("Asked in a chat", "Answer in a chat", "human text, KL from the unedited model", "file book.txt"):
        assert words in page


def test_evaluate_without_chat_does_not_ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "result.json"
    assert cli.main(evaluate(saved(tmp_path / "agent", "tiny-llama"), "--json", str(result))) == 0
    assert "chat" not in json.loads(result.read_text()) and "chat efficacy" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--chat"], "tiny-llama has no chat template; take a model made for chat"),
        (["--general", "none", "--text", "book.txt"],
         "--text is what 'self' of --general is measured on, too; add --general self"),
        (["--general", "self", "--text", "none.txt"], "there is no text file none.txt"),
    ],
)
def test_evaluate_refuses_before_it_edits(
    more: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("Nobody had seen the river so high.")
    monkeypatch.setattr("agents.edit_stream", lambda *_, **__: pytest.fail("it edits"))
    assert cli.main(evaluate(saved(tmp_path / "agent", "tiny-llama"), *more)) == 2
    assert message in capsys.readouterr().err


def test_a_text_that_the_editor_s_prior_is_made_from_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "book.txt"
    text.write_text("Nobody had seen the river so high since the old mill was built. " * 40, encoding="utf-8")
    agent = saved(tmp_path / "agent", "tiny-llama", text=str(text))
    monkeypatch.setattr("agents.edit_stream", lambda *_, **__: pytest.fail("it edits"))
    monkeypatch.setattr("agents.edit_facts", lambda *_, **__: pytest.fail("it edits"))
    message = f"--text {text} is the text that the editor's prior is made from, on which a divergence says nothing"
    assert cli.main(evaluate(agent, "--general", "self", "--text", str(text))) == 2
    assert message in capsys.readouterr().err
    facts = tmp_path / "facts.jsonl"
    facts.write_text(json.dumps({"prompt": "Up is", "target": "down"}), encoding="utf-8")
    edit = ["edit", "--facts", str(facts), "--agent", str(agent), "--out", str(tmp_path / "edited"), "--device", "cpu"]
    assert cli.main([*edit, "--text", str(text)]) == 2
    assert message in capsys.readouterr().err


def test_a_prompt_that_is_a_chat_already_is_refused_before_anything_is_edited(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"{i} is", "target_new": "down", "ground_truth": "up", "subject": str(i),
             "rephrase_prompt": f"<bos>{i}?" if i == 3 else f"{i}?", "locality_prompt": "Oslo is in",
             "locality_ground_truth": "Norway"} for i in range(4)]  # fmt: skip
    data = tmp_path / "counterfact-edit.json"
    data.write_text(json.dumps(rows), encoding="utf-8")
    monkeypatch.setattr("agents.edit_stream", lambda *_, **__: pytest.fail("it edits"))
    agent = saved(tmp_path / "agent", str(chat_model))
    assert cli.main(evaluate(agent, "--chat", "--data", str(data), "--num-batches", "1")) == 2
    assert "the prompt holds '<bos>' already: '<bos>3?'" in capsys.readouterr().err


# -- rledit train and rledit edit --chat ---------------------------------------------------------------------------


@pytest.mark.parametrize("chat, of_ten", [([], 8), (["--chat"], 8), (["--chat", "also"], 16)])
def test_training_takes_facts_in_the_template_or_both_ways(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chat: list[str], of_ten: int
) -> None:
    rows = [
        {"prompt": f"Mr. {name} lives in", "subject": f"Mr. {name}", "target_new": "Rome", "ground_truth": "Paris",
         "rephrase_prompt": f"The home of Mr. {name} is", "locality_prompt": "Bob lives in",
         "locality_ground_truth": "Ghent"}
        for name in ("Adams", "Baker", "Clark", "Davis", "Evans", "Frank", "Ghosh", "Hills", "Irwin", "Jones")
    ]  # fmt: skip
    data = tmp_path / "facts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    seen: list[Any] = []
    monkeypatch.setattr(RLEditAgent, "learn", lambda agent, *_, **__: seen.append(agent.env.unwrapped.dataset))
    command = [
        "train", "--env", "RLEdit-CounterFact-v0", "--model", str(chat_model), "--data", str(data), "--num-batches",
        "1", "--batch-size", "2", "--eval-num-batches", "1", "--steps-per-batch", "1", "--rank", "4", "--device", "cpu",
        "--out", str(tmp_path / "run"), *chat,
    ]  # fmt: skip
    assert cli.main(command) == 0
    [facts] = seen
    said = {0: "", 1: ", in the chat template", 2: ", as it is and in the chat template"}[len(chat)]
    assert facts.source.endswith(f"first 80%{said}")
    template = ChatTemplate(load_model(str(chat_model))[1])
    bare, asked = ("Mr. Adams lives in", template("Mr. Adams lives in"))
    assert len(facts) == of_ten and [r.prompt for r in facts][:2] == {
        0: [bare, "Mr. Baker lives in"], 1: [asked, template("Mr. Baker lives in")], 2: [bare, asked]
    }[len(chat)]  # fmt: skip
