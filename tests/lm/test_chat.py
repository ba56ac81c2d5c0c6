"""Plain prompts in a model's chat template."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rledit_env.knowledge import EditRecord, ImpliedFact, UnrelatedFact
from rledit_env.lm.chat import ChatTemplate, in_chat
from rledit_env.lm.loading.tiny import tiny_tokenizer

PLAIN = "{% for m in messages %}<bos>{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
PLAIN += "{% if add_generation_prompt %}A:{% endif %}"
TRIMMING = PLAIN.replace("m.content", "m.content | trim")
SYSTEM = "<bos>You help. Ann is here.<eos>" + PLAIN
RECORD = EditRecord(
    "Anna knows Ann, who is", "tall", ("She is",), (UnrelatedFact("Bob is", "old"),), "small", "Ann", "line 1",
    (ImpliedFact("Her son is", "tall"),),
)  # fmt: skip


def tokenizer(template: str | None) -> Any:
    made = tiny_tokenizer()
    made.chat_template = template
    return made


@pytest.mark.parametrize("template, before", [(PLAIN, ""), (SYSTEM, "<bos>You help. Ann is here.<eos>")])
def test_every_prompt_is_wrapped_and_the_subject_keeps_its_place(template: str, before: str) -> None:
    (record,) = in_chat([RECORD], tokenizer(template), "tiny")
    lead, tail = before + "<bos>user: ", "<eos>A:"
    assert record.prompt == f"{lead}Anna knows Ann, who is{tail}"
    assert record.paraphrases == (f"{lead}She is{tail}",)
    assert record.unrelated == (UnrelatedFact(f"{lead}Bob is{tail}", "old"),)
    assert record.implied == (ImpliedFact(f"{lead}Her son is{tail}", "tall"),)
    assert record.subject_span == (len(lead) + 11, len(lead) + 14)
    assert record.lead == len(lead)
    assert (record.target, record.original, record.origin) == ("tall", "small", "line 1")


def test_questions_keep_their_groups_and_the_edits_that_they_need() -> None:
    asked = ImpliedFact("Whose?", "Ann's", "multi_hop", (("Bob is", "old"),))
    record = replace(RECORD, implied=(asked,), variants=(ImpliedFact("Yo, who?", "tall", "personas"),))
    (wrapped,) = in_chat([record], tokenizer(PLAIN), "tiny")
    assert wrapped.implied[0].group == "multi_hop"
    assert wrapped.implied[0].needs == (("<bos>user: Bob is<eos>A:", "old"),)
    assert wrapped.variants == (ImpliedFact("<bos>user: Yo, who?<eos>A:", "tall", "personas"),)


def test_a_template_that_trims_moves_the_subject_with_the_prompt() -> None:
    wrapped = ChatTemplate(tokenizer(TRIMMING)).wrapped(replace(RECORD, prompt="  Ann is "))
    start, stop = wrapped.subject_span or (0, 0)
    assert wrapped.prompt[start:stop] == "Ann" and wrapped.prompt == "<bos>user: Ann is<eos>A:"


@pytest.mark.parametrize(
    "template, message",
    [
        (None, "tiny has no chat template; take a model made for chat"),
        ("{{ raise_exception('a system message first') }}", "does not take a user's message .*a system message first"),
        ("{{ 'hello' }}", "leaves a user's message out"),
    ],
)
def test_a_template_that_does_not_fit_is_named(template: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatTemplate(tokenizer(template), "tiny")


def test_a_template_that_changes_the_prompt_is_refused() -> None:
    shouting = tokenizer(PLAIN.replace("m.content", "m.content | upper"))
    with pytest.raises(ValueError, match="line 1: the chat template of tiny changes the prompt 'Anna knows"):
        ChatTemplate(shouting, "tiny").wrapped(RECORD)


def test_a_prompt_that_is_a_chat_already_is_refused() -> None:
    with pytest.raises(ValueError, match="line 3: the prompt holds '<bos>' already"):
        ChatTemplate(tokenizer(PLAIN), "tiny")("<bos>user: Ann?", "line 3")


def test_facts_are_asked_in_the_template_or_both_ways() -> None:
    made = tokenizer(PLAIN)
    (wrapped,) = in_chat([RECORD], made, "tiny")
    assert in_chat([RECORD, RECORD], made, "tiny", "also") == (RECORD, wrapped, RECORD, wrapped)
    with pytest.raises(ValueError, match="chat is 'never'; give one of 'only', 'also'"):
        in_chat([RECORD], made, "tiny", "never")
