"""One fact under whatever names its parts were published."""

from __future__ import annotations

from typing import Any

import pytest

from rledit_env.knowledge import EditRecord, ImpliedFact, KnowledgeError, UnrelatedFact, names
from rledit_env.knowledge.fields import Row
from rledit_env.knowledge.lenient import facts_of, read_fact, unwrapped, with_numbers_as_text

BARE = {"prompt": "Ann is", "target": "tall"}


def record(**values: Any) -> EditRecord:
    return read_fact(Row({**BARE, **values}, "here")).record


def single(**values: Any) -> EditRecord:
    return read_fact(Row(values, "here")).record


@pytest.mark.parametrize("prompt", [n for n in names.PROMPT if n not in ("update", "instruction")])
@pytest.mark.parametrize("target", ["target", "target_new", "new_answer", "alt", "ans", "labels", "answer", "output"])
def test_a_prompt_and_a_target_have_many_names(prompt: str, target: str) -> None:
    fact = single(**{prompt: "Ann is", target: "tall"})
    assert (fact.prompt, fact.target) == ("Ann is", "tall")


@pytest.mark.parametrize(
    "target", [{"str": "tall"}, ["tall", "big"], [["tall"]], {"text": ["tall"], "answer_start": [3]}, [{"str": "tall"}]]
)
def test_a_target_may_be_an_object_or_a_list_whose_first_counts(target: Any) -> None:
    assert single(prompt="Ann is", target_new=target).target == "tall"


def test_the_new_answer_goes_before_the_true_ones() -> None:
    fact = single(src="Ann is", alt="tall", answers=["small"], pred="x")
    assert (fact.target, fact.original) == ("tall", "small")
    assert single(question="Ann is", answer="tall", label="people").target == "tall"
    fact = single(question="Ann is", answer="small", new_answer="tall")
    assert (fact.target, fact.original) == ("tall", "small")


def test_an_empty_new_answer_is_not_replaced_by_the_true_one() -> None:
    with pytest.raises(KnowledgeError, match="here, field 'alt': is empty"):
        single(src="Ann is", alt="", answers=["small"])


def test_text_is_not_trimmed() -> None:
    fact = record(prompt="\n Ann is\n", target=" tall\n", paraphrases=["She is "], subject=" Ann ")
    assert (fact.prompt, fact.target, fact.paraphrases, fact.subject) == ("\n Ann is\n", " tall\n", ("She is ",), "Ann")


def test_a_subject_goes_to_the_place_of_the_braces_and_stays_there() -> None:
    fact = record(prompt="Ann knows {}, who is", subject="Ann", paraphrases=["{} is"])
    assert (fact.prompt, fact.subject_span, fact.paraphrases) == ("Ann knows Ann, who is", (10, 13), ("Ann is",))


def test_without_braces_the_subject_is_the_first_whole_word() -> None:
    assert record(prompt="Anna knows Ann, who is", subject="Ann").subject_span == (11, 14)
    assert record(subject="Bob").subject_span is None
    assert record(subject="").subject is None


def test_paraphrases_come_from_wherever_they_are() -> None:
    fact = record(rephrase_prompt="a", paraphrase_prompts=["b", "c"], question="d?")
    assert fact.paraphrases == ("b", "c", "a", "d?")
    assert single(prompts=["Ann is", "She is"], target="tall").paraphrases == ("She is",)
    fact = read_fact(Row({**BARE, "rephrase": []}, "here"))
    assert (fact.record.paraphrases, fact.has_paraphrases, fact.has_unrelated) == (("Ann is",), False, False)


LOCALITY: list[tuple[dict[str, Any], list[tuple[str, str]]]] = [
    ({"locality": {"a": [{"prompt": "p", "ground_truth": [["x", "y"]]}], "b": None, "c": []}}, [("p", "x")]),
    ({"locality": {"a": {"prompt": "p", "ground_truth": "x"}}}, [("p", "x")]),
    ({"locality_inputs": {"a": {"prompt": ["p", "q"], "ground_truth": ["x", ["y", "z"]]}}}, [("p", "x"), ("q", "y")]),
    ({"locality": [{"prompt": "p", "answer": "x"}]}, [("p", "x")]),
    ({"locality": {"a": [{"prompt": ["p"], "ground_truth": ["x", "y"]}]}}, [("p", "x")]),
    ({"locality": {"a": [{"prompt": "p", "ground_truth": []}, {"prompt": "q", "ground_truth": "y"}]}}, [("q", "y")]),
    ({"locality_prompt": "p", "locality_ground_truth": "x"}, [("p", "x")]),
    ({"locality_prompt": ["p", "q"], "locality_ground_truth": ["x", "y"]}, [("p", "x"), ("q", "y")]),
    ({"locality_prompts": ["p"], "locality_answers": ["x"]}, [("p", "x")]),
    ({"loc": "nq question: p", "loc_ans": ["x"]}, [("nq question: p?", "x")]),
    ({"neighborhood_prompts": ["p", "q"], "target_true": {"str": "x"}}, [("p", "x"), ("q", "x")]),
]


@pytest.mark.parametrize("values, expected", LOCALITY)
def test_what_should_stay_comes_in_many_forms(values: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert record(**values).unrelated == tuple(UnrelatedFact(*pair) for pair in expected)


@pytest.mark.parametrize(
    "values",
    [
        {"portability": {"Reasoning": [{"prompt": "p", "ground_truth": [["x"]]}], "Logical_Generalization": []}},
        {"portability": {"Recalled Relation": "r", "New Question": "p", "New Answer": "x"}},
        {"portability_inputs": {"one_hop": {"prompt": "p", "ground_truth": "x"}}},
        {"portability_prompt": "p", "portability_ground_truth": "x"},
        {"mhop": "p", "mhop_ans": "x"},
        {"implied": [{"prompt": "p", "answer": "x"}]},
    ],
)
def test_what_follows_from_the_edit_comes_in_many_forms(values: dict[str, Any]) -> None:
    assert record(**values).implied == (ImpliedFact("p", "x"),)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"locality": {"a": [{"prompt": "p"}]}}, r"field 'locality\.a\[0\]\.answer': is missing"),
        ({"locality": {"a": [{"ground_truth": "x"}]}}, r"field 'locality\.a\[0\]\.prompt': is missing"),
        ({"locality": {"a": "p"}}, r"field 'locality\.a': is not an object with a prompt and an answer \('p'\)"),
        ({"locality_prompt": ["p", "q"], "locality_ground_truth": "x"}, "1 answers for 2 prompts"),
        ({"loc": "p"}, "field 'loc_ans': is missing"),
        ({"neighborhood_prompts": ["p"]}, "does not say what was true before"),
        ({"target": True}, "field 'target': is true, which is no text; write it .* in quotes"),
        ({"target": []}, "field 'target': is empty"),
        ({"prompt": "{} is"}, r"has a \{\} for the subject, but the row names none"),
    ],
)
def test_what_cannot_be_used_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(KnowledgeError, match=message):
        record(**values)


def test_names_are_read_however_they_are_spelled() -> None:
    fact = single(**{"Prompt": "Ann is", "Target New": "tall", "SUBJECT": "Ann", "Rephrase-Prompt": "She is"})
    assert (fact.target, fact.subject, fact.paraphrases) == ("tall", "Ann", ("She is",))


def test_fields_that_nothing_is_made_of_are_known() -> None:
    row = Row({**BARE, "paraphrase": "x", "note": "y", "case_id": 3, "cond": "z", "empty": ""}, "here")
    assert read_fact(row).ignored == ("paraphrase", "note")
    assert names.did_you_mean("paraphrase") == "paraphrases"
    assert names.did_you_mean("Subjct") == "subject"
    assert names.did_you_mean("note") is names.did_you_mean("input") is None


def test_several_rewrites_are_as_many_facts() -> None:
    rewrites = [{"prompt": "{} is", "subject": s, "target_new": {"str": "tall"}} for s in ("Ann", "Bob")]
    row = Row({"requested_rewrite": rewrites, "paraphrases": ["p"]}, "here")
    facts = [read_fact(one).record for one in facts_of(row)]
    assert [fact.prompt for fact in facts] == ["Ann is", "Bob is"]
    assert all(fact.paraphrases == ("p",) and fact.original is None for fact in facts)


def test_columns_are_as_many_facts_with_what_they_share() -> None:
    values = {"prompts": ["a", "b"], "target_new": ["x", "y"], "relation": "r", "rephrase": [["c"], ["d", "e"]]}
    row = Row(values, "here")
    facts = [read_fact(one).record for one in facts_of(row)]
    assert [(f.prompt, f.target, f.paraphrases) for f in facts] == [("a", "x", ("c",)), ("b", "y", ("d", "e"))]
    assert facts[1].origin == "here, entry 1"


@pytest.mark.parametrize(
    "values",
    [
        {"data": [BARE]}, {"version": 2, "facts": [BARE], "note": "x"}, {"0": BARE}, {"first": BARE},
        {"edits": [{"requested_rewrite": {}}]},
    ],
)  # fmt: skip
def test_facts_in_an_object_are_found(values: dict[str, Any]) -> None:
    (row,) = unwrapped([Row(values, "here")])
    assert isinstance(row, Row) and row.values in (BARE, {"requested_rewrite": {}})
    assert row.where.startswith("here, entry ")


def test_numbers_are_taken_as_they_are_written_and_truth_values_are_not() -> None:
    values = {"a": [1987, 2.5, True, None, {"b": -1}]}
    assert with_numbers_as_text(values) == {"a": ["1987", "2.5", True, None, {"b": "-1"}]}
