"""Facts asked in four ways."""

from __future__ import annotations

from collections.abc import Callable

from rledit_env.evaluation.four_ways import ask, questions_of
from rledit_env.knowledge import EditRecord, UnrelatedFact
from rledit_env.lm.editable import EditableLM
from rledit_env.reporting import question_table

FACT = EditRecord("The capital of Canada is", "Vancouver", ("Canada's capital is",),
                  (UnrelatedFact("The capital of Norway is", "Oslo"),), "Ottawa", "Canada")  # fmt: skip


def test_the_neighbour_must_keep_its_own_answer_and_the_others_give_the_new_one() -> None:
    questions = questions_of(FACT, "What is the capital of Canada?")
    assert [(q.way, q.answer) for q in questions] == [
        ("prompt", "Vancouver"), ("paraphrase", "Vancouver"), ("neighbour", "Oslo"), ("chat", "Vancouver"),
    ]  # fmt: skip
    said = [" Vancouver. It", " Ottawa", " Oslo, Norway", "The capital is Vancouver.\nYes"]
    _, rows = question_table(questions, [" Ottawa"] * 4, said)
    assert [row[3] for row in rows] == ["Vancouver", "Ottawa", "Oslo", "The capital is Vancouver."]
    assert [row[5] for row in rows] == [True, False, True, True]


def test_a_sentence_is_an_answer_only_in_a_chat() -> None:
    prompt, *_, chat = questions_of(FACT, "What is the capital of Canada?")
    assert not prompt.is_right("It is Vancouver.") and chat.is_right("It is Vancouver.")


def test_the_model_is_asked_as_it_is_now_and_no_message_is_put_to_a_model_without_a_chat(
    tiny_lm: Callable[..., EditableLM]
) -> None:
    lm = tiny_lm("tiny-llama")
    questions = questions_of(FACT, "What is the capital of Canada?")
    answers = ask(lm, questions)
    assert answers[0] == lm.generate([FACT.prompt], extra=10)[0] and answers[3] == ""
    assert len(question_table(questions, answers, answers)[1]) == sum(map(bool, answers))
