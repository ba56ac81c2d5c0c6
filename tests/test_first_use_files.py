"""Files that people already have, each edited by `rledit edit` from beginning to end."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agents import HypernetworkConfig, RLEditAgent, RLEditConfig
from rledit_env import cli
from rledit_env.env import LifelongEditEnv
from rledit_env.lm.loading.tiny import tiny_model, tiny_tokenizer

Edit = Callable[..., dict[str, Any]]

RAY = {"prompt": "Ray Charles, the", "target_new": "violin", "subject": "Ray Charles"}
ROME = {"prompt": "{} is located in", "subject": "The Eiffel Tower", "target_new": {"str": " Rome"}}
TWO = [{"prompt": "Up is", "target": "down"}, {"prompt": "Rome is in", "target": "Peru"}]
LINES = "\n".join(map(json.dumps, TWO))
CHAT = "{% for m in messages %}<bos>{{ m.role }}\n{{ m.content | trim }}<eos>\n{% endfor %}"
CHAT += "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained agent for tiny-llama."""
    folder = tmp_path_factory.mktemp("agent")
    env = LifelongEditEnv("counterfact", "tiny-llama", num_batches=1, batch_size=1, dtype="float32", device="cpu")
    RLEditAgent(env, RLEditConfig(network=HypernetworkConfig(rank=4, step_size=0.1))).save(folder)
    return folder


@pytest.fixture
def edit(agent: Path, tmp_path: Path) -> Edit:
    """Edits the facts of a file with this name and content; gives the report."""

    def run(content: str | bytes | None, *arguments: str, name: str = "facts.jsonl") -> dict[str, Any]:
        facts = tmp_path / name
        if content is not None:
            facts.write_bytes(content.encode() if isinstance(content, str) else content)
        out = tmp_path / f"edited {len(list(tmp_path.iterdir()))}"
        command = ["edit", "--facts", str(facts), "--agent", str(agent), "--out", str(out), "--save", "delta"]
        assert cli.main([*command, *arguments]) == 0
        report: dict[str, Any] = json.loads((out / "edit_report.json").read_text(encoding="utf-8"))
        return report

    return run


@pytest.fixture
def refused(agent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What is said of a file that cannot be edited: one line, exit code 2, nothing written."""

    def run(content: str | bytes | None, *arguments: str, name: str = "facts.jsonl") -> str:
        facts = tmp_path / name
        if content is not None:
            facts.write_bytes(content.encode() if isinstance(content, str) else content)
        command = ["edit", "--facts", str(facts), "--agent", str(agent), "--out", str(tmp_path / "edited")]
        capsys.readouterr()
        assert cli.main([*command, *arguments]) == 2
        assert not (tmp_path / "edited").exists()
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rledit edit: error: ")]
        assert len(errors) == 1
        return errors[0]

    return run


def facts_of(report: dict[str, Any]) -> list[tuple[str, str]]:
    return [(answer["prompt"], answer["target"]) for answer in report["answers"]]


# -- published names ---------------------------------------------------------------------------------------------------

WIKI_COUNTERFACT = {
    "subject": "Frank Rossitano", "prompt": "The name of the country of citizenship of Frank Rossitano is",
    "target_new": "Gabon", "ground_truth": ["United States of America"],
    "portability": {
        "Reasoning": [{"prompt": "It lies in", "ground_truth": [["Africa"]]}, {"prompt": "x", "ground_truth": [[]]}],
        "Subject_Aliasing": [{"prompt": "Franco is from", "ground_truth": "Gabon"}], "Logical_Generalization": [],
    },
    "locality": {"Relation_Specificity": [{"prompt": "He was played by", "ground_truth": [["Judah Friedlander"]]}]},
}  # fmt: skip
ZSRE_FLAT = {
    "subject": "IAAF Challenge", "src": "When did IAAF Challenge begin?", "pred": "2011", "answers": ["1998"],
    "alt": "2006", "rephrase": "When was the IAAF Challenge launched?", "loc": "nq question: who sang it",
    "loc_ans": "Ann", "cond": "1998 >> 2006 || x",
    "portability": {"Recalled Relation": "(x)", "New Question": "What sport is it?", "New Answer": "Athletics"},
}  # fmt: skip
COUNTERFACT = {
    "case_id": 3, "pararel_idx": 1,
    "requested_rewrite": {
        "prompt": "{}, the", "relation_id": "P1303", "target_new": {"str": "violin", "id": "Q1"},
        "target_true": {"str": "piano", "id": "Q2"}, "subject": "Ray Charles",
    },
    "paraphrase_prompts": ["It is said that Ray Charles plays"], "neighborhood_prompts": ["Elton John, the"],
    "attribute_prompts": ["x"], "generation_prompts": ["y"],
}  # fmt: skip
MQUAKE = {
    "case_id": 1,
    "requested_rewrite": [
        {"prompt": "{} is a citizen of", "subject": "Ellie Kemper", "target_new": {"str": "Croatia"},
         "target_true": {"str": "America"}, "question": "Where is Ellie Kemper from?"},
    ],
    "questions": ["Who heads Ellie's state?", "Whose state?"], "answer": "Trump", "new_answer": "Kolinda",
    "new_answer_alias": ["K"], "single_hops": [], "new_single_hops": [], "orig": {},
}  # fmt: skip
WIKIBIGEDIT = {
    "tag": "new", "subject": "Ann Lee", "update": "Where was Ann Lee born?", "ans": "Oslo", "loc": "Where is it?",
    "loc_ans": "Rome", "rephrase": "What is the birthplace of Ann Lee?", "personas": "Yo, where?",
    "mhop": "Ann's birthplace is the capital of?", "mhop_ans": "Norway",
}  # fmt: skip
EASYEDIT = {
    "prompts": ["Ray Charles, the", "Rome is in"], "ground_truth": ["piano", "Italy"], "target_new": ["violin", "Peru"],
    "subject": ["Ray Charles", "Rome"], "rephrase_prompts": ["Ray Charles plays", "One finds Rome in"],
    "locality_inputs": {"neighborhood": {"prompt": ["Elton, the", None], "ground_truth": ["piano", None]}},
    "portability_inputs": {"one_hop": {"prompt": ["It is made of", "It lies in"], "ground_truth": ["wood", "America"]}},
}  # fmt: skip
GABON = ("The name of the country of citizenship of Frank Rossitano is", "Gabon")
UP, IN = ("Up is", "down"), ("Rome is in", "Peru")
ALL = {"generalization", "specificity", "portability"}
RAY_CHARLES, EIFFEL = ("Ray Charles, the", "violin"), ("The Eiffel Tower is located in", " Rome")

SCHEMAS: dict[str, tuple[Any, list[tuple[str, str]], set[str]]] = {  # rows, facts, and the scores that they have
    "no rephrase": (RAY, [RAY_CHARLES], set()),
    "AlphaEdit's edits": ([{"case_id": 0, **ROME}], [EIFFEL], set()),
    "MEMIT's requests": ([ROME, {**ROME, "prompt": "In {} is", "target_new": {"str": "Rome"}}],
                         [EIFFEL, ("In The Eiffel Tower is", "Rome")], set()),
    "a rewrite alone": ({"requested_rewrite": COUNTERFACT["requested_rewrite"]}, [RAY_CHARLES], set()),
    "CounterFact": (COUNTERFACT, [RAY_CHARLES], {"generalization", "specificity"}),
    "MQuAKE": (MQUAKE, [("Ellie Kemper is a citizen of", "Croatia")], {"generalization", "portability"}),
    "wiki_counterfact": ([WIKI_COUNTERFACT], [GABON], {"specificity", "portability"}),
    "wiki_recent": ([{k: WIKI_COUNTERFACT[k] for k in ("subject", "prompt", "target_new")}],
                    [GABON], set()),
    "flat ZsRE": (ZSRE_FLAT, [("When did IAAF Challenge begin?", "2006")], ALL),
    "WikiBigEdit": (WIKIBIGEDIT, [("Where was Ann Lee born?", "Oslo")], ALL),
    "EasyEdit's arguments": (EASYEDIT, [RAY_CHARLES, ("Rome is in", "Peru")], {"generalization", "portability"}),
    "EasyEdit's requests": ({**RAY, "ground_truth": "piano", "rephrase_prompt": "Ray Charles plays", "portability": {},
                             "locality": {"neighborhood": {"prompt": "Elton, the", "ground_truth": "piano"}}},
                            [RAY_CHARLES], {"generalization", "specificity"}),
    "question and answers": ({"question": "Who?", "answers": ["Ann", "Anne"]}, [("Who?", "Ann")], set()),
    "UnKE": ({"question": "Who?", "answer": "Ann", "para_question": "Who is it?", "sub_question": ["a?", "b?"],
              "sub_answer": ["c", "d"]}, [("Who?", "Ann")], {"generalization", "portability"}),
    "instructions": ({"instruction": "Name it.", "input": "", "output": "Rome"}, [("Name it.", "Rome")], set()),
    "capitals": ({"Prompt": "Up is", "Target New": "down"}, [("Up is", "down")], set()),
    "a year": ({"prompt": "It began in", "target": 1987}, [("It began in", "1987")], set()),
    "columns": ({"prompt": ["Up is", IN[0]], "answer": ["down", "Peru"]}, [UP, IN], set()),
    "pandas' columns": ({"prompt": {"0": "Up is"}, "target": {"0": "down"}}, [("Up is", "down")], set()),
    "under a key": ({"version": 1, "data": TWO}, [UP, IN], set()),
    "by name under a key": ({"facts": {"a": TWO[0], "b": TWO[1]}}, [UP, IN], set()),
    "by number": ({"0": TWO[0], "1": TWO[1]}, [UP, IN], set()),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_published_form_is_edited_without_conversion(edit: Edit, name: str) -> None:
    rows, expected, scored = SCHEMAS[name]
    report = edit(json.dumps(rows))
    assert facts_of(report) == expected
    metrics = report["metrics"]
    assert {n for n in ("generalization", "specificity", "portability") if metrics.get(n) is not None} == scored
    assert not [note for note in report["notes"] if "not used" in note]


# -- forms of files ----------------------------------------------------------------------------------------------------

FORMS: dict[str, tuple[str, str | bytes]] = {
    "JSON Lines in .json": ("facts.json", LINES),
    "JSON Lines without an ending": ("facts", LINES),
    "an array in .jsonl": ("facts.jsonl", json.dumps(TWO)),
    "an indented array in .txt": ("facts.txt", json.dumps(TWO, indent=2)),
    "indented objects": ("facts.jsonl", "\n".join(json.dumps(one, indent=2) for one in TWO)),
    "objects with commas between": ("facts.json", ",\n".join(map(json.dumps, TWO))),
    "a list a line": ("facts.jsonl", "\n".join(json.dumps([one]) for one in TWO)),
    "gzip without its ending": ("facts.jsonl", gzip.compress(LINES.encode())),
    "bzip2": ("facts.jsonl.bz2", bz2.compress(LINES.encode())),
    "xz": ("facts.jsonl.xz", lzma.compress(LINES.encode())),
    "a byte order mark": ("facts.json", codecs.BOM_UTF8 + json.dumps(TWO).encode()),
    "UTF-16": ("facts.jsonl", LINES.encode("utf-16")),
    "UTF-16 without a mark": ("facts.jsonl", LINES.encode("utf-16-le")),
    "Windows line ends": ("facts.jsonl", LINES.replace("\n", "\r\n") + "\r\n"),
    "blank lines": ("facts.jsonl", "\n\n" + LINES.replace("\n", "\n \n\n")),
    "CSV": ("facts.csv", "prompt,target\nUp is,down\nRome is in,Peru\n"),
    "CSV in .jsonl": ("facts.jsonl", "prompt,target\nUp is,down\nRome is in,Peru\n"),
    "Excel's CSV": ("facts.csv", codecs.BOM_UTF8 + b"Prompt;Target;Subject\r\nUp is;down;\r\n;;\r\nRome is in;Peru;"),
    "TSV": ("facts.tsv", "prompt\ttarget\nUp is\tdown\nRome is in\tPeru\n"),
    "quoted CSV": ("facts.csv", 'prompt,target,paraphrases\n"Up is",down,"[""Up, means""]"\n"Rome is in","Peru",\n'),
    "CSV after a blank line": ("facts.csv", "\nprompt,target\nUp is,down\nRome is in,Peru\n"),
    "YAML in braces": ("facts.yml", "- {prompt: Up is, target: down}\n- {prompt: Rome is in, target: Peru}\n"),
    "YAML": ("facts.yaml", "# mine\n- prompt: Up is\n  target: down\n- prompt: Rome is in\n  target: Peru\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_a_file_is_read_by_what_it_holds(edit: Edit, name: str) -> None:
    file, content = FORMS[name]
    assert facts_of(edit(content, name=file)) == [UP, IN]


def test_parquet_is_read(edit: Edit, tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list(TWO).to_parquet(tmp_path / "facts.parquet")
    assert facts_of(edit(None, name="facts.parquet")) == [UP, IN]


def test_a_folder_with_one_file_is_that_file(edit: Edit, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "facts.jsonl").write_text(LINES)
    assert edit(None, name="mine")["data_source"] == "file facts.jsonl"


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, LINES)
    return buffer.getvalue()


UNREADABLE = {
    "a workbook": (zipped("xl/workbook.xml"), "is an Excel workbook; save it as CSV"),
    "an archive": (zipped("facts.jsonl"), "is a zip archive of facts.jsonl; unpack it"),
    "a pickle": (pickle.dumps(TWO), "is a Python pickle.*; write the facts as JSON Lines"),
    "a web page": ("<!DOCTYPE html><html>", "is HTML or XML.*; download the file itself"),
    "an LFS pointer": ("version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a Git LFS pointer"),
    "a PDF": ("%PDF-1.7", "is a PDF file"),
    "a table without heading": ("Up is,down\nRome is in,Peru\n", "its first line names no prompt and no target"),
    "a table of other columns": ("prompt,traget\nUp is,down\n", "field 'target': is .* mean 'target' by 'traget'"),
    "Excel's old letters": (b"prompt,target\nUp is,caf\xe9\n", "line 2: bad UTF-8 .*save the file as UTF-8"),
    "chats": ('{"messages": [{"role": "user", "content": "Up?"}]}', "write a chat's question as prompt and its answer"),
    "Python's spelling": ("{'prompt': 'Up is', 'target': 'down'}", "write it with json.dumps"),
    "a cut list": ('[{"prompt": "a", "target": "b"}', "the list breaks off"),
    "several lists": (json.dumps({"train": TWO, "test": TWO}), "holds several lists of facts, train, test"),
    "uneven columns": ('{"prompt": ["a", "b"], "target": ["c", "d"], "subject": ["a"]}', "1 entries for 2 prompts"),
    "a truth value": ('{"prompt": "It is", "target": true}', "field 'target': is true, which is no text; .* in quotes"),
    "a misspelt field": ('{"promt": "It is", "target": "so"}', "did you mean 'prompt' by 'promt'"),
    "a bare {}": ('{"prompt": "{} is", "target": "so"}', "has a {} for the subject, but the row names none"),
    "nothing": ("", "no fact in it; give one JSON object a line"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_named_with_its_mend(refused: Callable[..., str], name: str) -> None:
    content, message = UNREADABLE[name]
    assert re.search(message, refused(content))


def test_a_folder_with_several_files_names_them(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("a.jsonl", "b.csv"):
        (tmp_path / "mine" / name).write_text(LINES)
    assert "is a folder, which holds a.jsonl, b.csv; name one file" in refused(None, name="mine")


# -- rows that cannot be used, fields that are not -------------------------------------------------------------------


def test_ignored_fields_are_named_once_with_what_was_meant(
    edit: Edit, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, "paraphrase": "x", "source": "a book", "case_id": 1} for row in TWO]
    report = edit("\n".join(map(json.dumps, rows)))
    said = capsys.readouterr().out
    assert said.count("fields that are not used: 'paraphrase' (did you mean 'paraphrases'?), 'source'\n") == 1
    assert any("'paraphrase'" in note for note in report["notes"])


def test_unusable_rows_end_the_command_or_are_skipped_in_the_command_line_s_words(
    refused: Callable[..., str], edit: Edit, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [TWO[0], {"prompt": "Rome is in", "target": "Peru", "subject": "Paris"}, {"prompt": "a", "target": ""}]
    content = "\n".join(map(json.dumps, rows)) + "\noops\n"
    message = refused(content)
    assert "line 2, field 'subject': does not occur in the prompt ('Paris'); write it as in 'Rome is in'" in message
    assert "--on-error skip" in message and "on_error" not in message
    with pytest.warns(UserWarning, match="3 faulty rows .* 1 × field 'subject' does not occur in the prompt,"):
        report = edit(content, "--on-error", "skip")
    assert facts_of(report) == [UP]
    assert "1 field 'target' is empty" in capsys.readouterr().out


def test_facts_that_do_not_fit_the_model_are_skipped_where_that_is_asked_for(
    refused: Callable[..., str], edit: Edit, capsys: pytest.CaptureFixture[str]
) -> None:
    content = "\n".join(map(json.dumps, [TWO[0], {"prompt": "word " * 400 + "is", "target": "Peru"}]))
    assert "line 2: prompt and answer have" in refused(content)
    assert facts_of(edit(content, "--on-error", "skip")) == [UP]
    shown = capsys.readouterr()
    assert "facts that do not fit tiny-llama are skipped: 1; the first one: facts.jsonl, line 2: prompt" in shown.err
    assert "1 too long or unfit for the chat template" in shown.out
    assert "no fact fits tiny-llama" in refused(content.split("\n")[1], "--on-error", "skip")


# -- text, chat, subjects ----------------------------------------------------------------------------------------------


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    """tiny-llama with a chat template."""
    folder, tokenizer = tmp_path / "model", tiny_tokenizer()
    tokenizer.chat_template = CHAT
    tiny_model("tiny-llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_chat_puts_every_prompt_into_the_template_and_keeps_the_subject_s_place(
    edit: Edit, chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rledit_env.lm.tokens import PassageEncoder

    seen: dict[tuple[str, str], Any] = {}
    tokenize_all = PassageEncoder.tokenize_all

    def watched(encoder: PassageEncoder, prompts: Any, answers: Any, subjects: Any, origins: Any) -> Any:
        passages = tokenize_all(encoder, prompts, answers, subjects, origins)
        for key, subject, passage in zip(zip(prompts, answers, strict=True), subjects, passages, strict=True):
            if subject is not None or key not in seen:
                seen[key] = passage
        return passages

    monkeypatch.setattr(PassageEncoder, "tokenize_all", watched)
    row = {
        "prompt": " Where is Bergen?", "target": "Peru", "subject": "Bergen", "paraphrases": ["Bergen?"],
        "unrelated": [{"prompt": "Oslo?", "answer": "Norway"}], "portability": [{"prompt": "Next?", "answer": "Chile"}],
    }  # fmt: skip
    arguments = ["--chat", "--no-warm-up", "--model", str(chat_model), "--token", "subject"]
    report = edit(json.dumps(row), *arguments)
    prompt = "<bos>user\nWhere is Bergen?<eos>\n<bos>assistant\n"
    assert facts_of(report) == [(prompt, "Peru")]
    assert {p for p, _ in seen} == {prompt.replace("Where is Bergen?", text)
                                    for text in ("Where is Bergen?", "Bergen?", "Oslo?", "Next?")}
    tokenizer, passage = tiny_tokenizer(), seen[prompt, "Peru"]
    assert tokenizer.decode(passage.targets) == "Peru"
    assert tokenizer.decode(passage.input_ids[: passage.positions[0] + 1]) == prompt
    assert tokenizer.decode(passage.input_ids[: passage.subject_position + 1]) == "<bos>user\nWhere is Bergen"


def test_facts_are_edited_both_as_they_are_and_in_the_template(edit: Edit, chat_model: Path) -> None:
    row = {"prompt": "Where is Bergen?", "target": "Peru", "subject": "Bergen"}
    report = edit(json.dumps(row), "--chat", "also", "--no-warm-up", "--model", str(chat_model), "--token", "subject")
    prompt = "<bos>user\nWhere is Bergen?<eos>\n<bos>assistant\n"
    assert facts_of(report) == [("Where is Bergen?", "Peru"), (prompt, "Peru")]
    assert len(report["taken"]) == 2 and report["settings"]["chat"] == "also"


def test_chat_with_a_model_that_has_no_template_is_refused(refused: Callable[..., str]) -> None:
    assert "tiny-llama has no chat template" in refused(LINES, "--chat", "--model", "tiny-llama")


def test_chat_around_a_prompt_that_is_a_chat_already_is_refused(refused: Callable[..., str], chat_model: Path) -> None:
    row = {"prompt": "<bos>user\nUp?<eos>\n<bos>assistant\n", "target": "down"}
    message = refused(json.dumps(row), "--chat", "--model", str(chat_model))
    assert "facts.jsonl, line 1: the prompt holds '<eos>' already" in message or "holds '<bos>' already" in message


def test_a_chat_that_the_user_wrote_out_is_edited_as_it_is(edit: Edit, chat_model: Path) -> None:
    row = {"prompt": "<bos>user\nWhere is Bergen?<eos>\n<bos>assistant\n", "target": "Peru", "subject": "Bergen"}
    assert facts_of(edit(json.dumps(row), "--model", str(chat_model))) == [(row["prompt"], "Peru")]


def test_chinese_facts_are_edited(edit: Edit) -> None:
    row = {"prompt": "法国的首都是", "target": "里昂", "subject": "法国"}
    assert facts_of(edit(json.dumps(row, ensure_ascii=False))) == [("法国的首都是", "里昂")]
