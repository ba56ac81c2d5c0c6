"""A user's own facts, in any published schema or as prompts and targets alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rledit_env.knowledge import KnowledgeError
from rledit_env.knowledge.facts import Facts, load_facts

CAPITAL = {"prompt": "The capital of Freedonia is", "target": "Sylvania", "subject": "Freedonia"}
COUNTERFACT = {
    "prompt": "a is", "target_new": "b", "subject": "a", "ground_truth": "c", "rephrase_prompt": "A is",
    "locality_prompt": "d is", "locality_ground_truth": "e",
}  # fmt: skip
KNOWEDIT = {
    "subject": "a", "prompt": "what is a?", "target_new": "b", "ground_truth": ["c"], "rephrase_prompt": "and a?",
    "locality": {"Relation_Specificity": [{"prompt": "what is d?", "ground_truth": "e"}]},
}  # fmt: skip


def written(folder: Path, *rows: Any) -> Path:
    path = folder / "facts.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def mend(answer: str) -> dict[str, Any]:
    return {
        "input": f"is it {answer}", "prediction": "x", "alternatives": ["x" if answer == "y" else "REFUTES"],
        "filtered_rephrases": ["is it so"], "output": [{"answer": answer}],
    }  # fmt: skip


def test_a_prompt_and_a_target_are_enough(tmp_path: Path) -> None:
    facts = load_facts(written(tmp_path, CAPITAL, {"prompt": "Up is", "target": "down", "paraphrases": "Up means"}))
    first, second = facts.dataset
    assert (first.prompt, first.target, first.subject) == ("The capital of Freedonia is", "Sylvania", "Freedonia")
    assert first.paraphrases == (first.prompt,)
    assert second.paraphrases == ("Up means",)
    assert (facts.without_paraphrases, facts.without_unrelated, facts.dataset.kind) == (1, 2, "facts")
    assert second.origin == "facts.jsonl, line 2"


def test_unrelated_facts_may_be_given(tmp_path: Path) -> None:
    facts = load_facts(written(tmp_path, {**CAPITAL, "unrelated": [{"prompt": "Paris is in", "answer": "France"}]}))
    assert facts.dataset[0].unrelated[0].answer == "France"
    assert facts.without_unrelated == 0


@pytest.mark.parametrize(
    "row, kind",
    [
        (CAPITAL, "facts"),
        (COUNTERFACT, "counterfact"),
        (KNOWEDIT, "zsre"),
        ({"src": "q", "rephrase": "r", "alt": "a", "loc": "l", "loc_ans": "m"}, "zsre"),
        ({"label": "SUPPORTS", "claim": "It rains"}, "fever"),
        (mend("SUPPORTS"), "fever"),
        (mend("y"), "zsre"),
    ],
)
def test_the_schema_is_told_by_the_fields(tmp_path: Path, row: dict[str, Any], kind: str) -> None:
    assert load_facts(written(tmp_path, row)).dataset.kind == kind


def test_every_claim_is_edited_and_none_is_set_aside(tmp_path: Path) -> None:
    claims = [{"label": "SUPPORTS", "claim": f"Claim {i}"} for i in range(30)]
    facts = load_facts(written(tmp_path, *claims))
    assert len(facts.dataset) == 30
    assert facts.without_unrelated == 30
    assert facts.without_paraphrases == 0


def test_rows_that_are_left_out_are_counted(tmp_path: Path) -> None:
    rows = {"label": "SUPPORTS", "claim": "a"}, {"label": "NOT ENOUGH INFO", "claim": "b"}
    facts = load_facts(written(tmp_path, *rows))
    assert facts.dataset.skipped == {"NOT ENOUGH INFO": 1}


def test_one_prompt_with_two_targets_is_a_conflict(tmp_path: Path) -> None:
    facts: Facts = load_facts(written(tmp_path, CAPITAL, {**CAPITAL, "target": "Osterlich"}, CAPITAL))
    assert facts.conflicts == {CAPITAL["prompt"]: 2}


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "a is", "target": ""}, r"facts\.jsonl, line 1, field 'target': is empty"),
        ({"prompt": "a is", "target": "b", "subject": "c"}, "does not occur in the prompt"),
        ({"prompt": "a", "target": "b", "unrelated": [{"prompt": "x"}]}, r"field 'unrelated\[0\]\.answer': is missing"),
        ({"question": "a?", "reply": "b"}, "give every row a prompt and a target"),
    ],
)
def test_an_unusable_row_is_named_with_its_mend(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(KnowledgeError, match=message):
        load_facts(written(tmp_path, row))


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KnowledgeError, match="no fact in it"):
        load_facts(written(tmp_path))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file of facts"):
        load_facts(tmp_path / "none.jsonl")


def test_the_kind_can_be_given(tmp_path: Path) -> None:
    assert load_facts(written(tmp_path, mend("SUPPORTS")), "zsre").dataset.kind == "zsre"
    with pytest.raises(ValueError, match="kind 'x' is unknown"):
        load_facts(written(tmp_path, CAPITAL), "x")
