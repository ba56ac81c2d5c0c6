"""What drift is measured on: human-written text and answers in a chat, beside the LLM's own text."""

from __future__ import annotations

import builtins
import copy
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch

from agents import selection
from agents.corpus import generated_corpus, text_corpus
from agents.running import strength
from rledit_env.evaluation.general import (
    GeneralAbility,
    chat_text,
    drifts,
    human_text,
    scored_texts,
    self_drift,
    self_text,
)
from rledit_env.evaluation.general.scored_text import QUESTIONS
from rledit_env.evaluation.guard import HELD_TEXTS
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage
from rledit_env.preservation import OwnText

CHAT = "{% for m in messages %}<bos>{{ m.role }}\n{{ m.content }}<eos>\n{% endfor %}"
CHAT += "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
SENTENCE = "Nobody had seen the river so high since the old mill was built. "


def change(lm: EditableLM, size: float) -> None:
    lm.add({m: torch.full(shape[::-1], size) for m, shape in lm.module_shapes.items()})


@pytest.fixture
def chat_lm(tiny_lm: Callable[..., EditableLM]) -> EditableLM:
    """tiny-llama with a chat template, of which the other tests' one knows nothing."""
    lm = copy.copy(tiny_lm())
    lm.tokenizer = copy.deepcopy(lm.tokenizer)
    lm.tokenizer.chat_template = CHAT
    return lm


def ids(passages: list[Passage]) -> list[tuple[int, ...]]:
    return [(*p.input_ids, p.targets[-1]) for p in passages]


def runs(rows: Sequence[Sequence[int]]) -> set[tuple[int, ...]]:
    """All runs of 24 tokens."""
    return {tuple(row[i : i + 24]) for row in rows for i in range(max(0, len(row) - 23))}


def text_of(lm: EditableLM, passage: Passage) -> str:
    return str(lm.tokenizer.decode(ids([passage])[0], skip_special_tokens=True))


# -- text that people wrote ----------------------------------------------------------------------------------------


def test_the_default_is_32_passages_of_64_tokens_each_of_another_help_topic(tiny_lm: Any) -> None:
    lm = tiny_lm()
    passages = human_text(lm)
    assert [len(p.targets) for p in passages] == [64] * 32
    of = [[name for name, text in topics.items() if text_of(lm, p) in text] for p in passages]
    assert all(of) and not any(runs([a]) & runs([b]) for a, b in itertools.combinations(ids(passages), 2))
    names = sorted(topics)  # the topic, or another one that it is a part of
    assert min(map(names.index, of[0])) < len(names) / 8 and max(map(names.index, of[-1])) > len(names) * 7 / 8
    assert len({min(found) for found in of}) > 24
    change(lm, 0.3)
    assert ids(human_text(lm)) == ids(passages)  # whatever the weights


def test_every_token_of_a_passage_but_the_first_is_predicted(tiny_lm: Any) -> None:
    for passage in human_text(tiny_lm(), passages=4, tokens=10):
        assert len(passage.input_ids) == 10 and passage.input_ids[1:] == passage.targets[:-1]


def test_a_file_gives_passages_spread_over_it_from_words_starts(tiny_lm: Any, tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    content = "\ufeff" + "".join(f"{number} {SENTENCE}" for number in range(1000, 1400))
    file.write_text(content, encoding="utf-8")
    lm, content = tiny_lm(), content[1:].strip()
    passages = human_text(lm, file, passages=8, tokens=32)
    texts = [text_of(lm, p) for p in passages]
    places = [content.index(text) for text in texts]
    assert [len(p.targets) for p in passages] == [32] * 8 and places[0] == 0
    for i, place in enumerate(places):
        assert 0 <= place - i * len(content) // 8 < 20 and (place == 0 or content[place - 1] == " ")


def test_a_short_file_gives_fewer_passages_that_do_not_overlap_and_a_shorter_one_is_one(
    tiny_lm: Any, tmp_path: Path
) -> None:
    lm, file = tiny_lm(), tmp_path / "short.txt"
    file.write_text(SENTENCE * 3, encoding="utf-8")
    passages = human_text(lm, file, passages=32, tokens=40)  # of 192 bytes, a token each
    assert 2 <= len(passages) <= 4 and all(len(p.targets) == 40 for p in passages)
    file.write_text("Hello", encoding="utf-8")
    assert [text_of(lm, p) for p in human_text(lm, file)] == ["Hello"]


def test_text_in_scripts_without_spaces_is_cut_anywhere(tiny_lm: Any, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("河水从来没有涨得这么高" * 100, encoding="utf-8")
    assert len(human_text(tiny_lm(), file, passages=4, tokens=16)) == 4


def test_a_passage_is_no_longer_than_the_context(tiny_lm: Any) -> None:
    lm = tiny_lm()
    assert {len(p.input_ids) + 1 for p in human_text(lm, passages=2, tokens=10 * lm.context_length)} == {
        lm.context_length
    }


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "there is no text file .*text.txt; name one"),
        (b"caf\xe9", ValueError, r"text.txt is no text in UTF-8 \(.* at byte 3\); convert it"),
        (b" \n", ValueError, "text.txt: no text of two tokens or more"),
    ],
)
def test_a_file_that_is_no_text_is_named(
    tiny_lm: Any, tmp_path: Path, content: bytes | None, error: type[Exception], message: str
) -> None:
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(error, match=message):
        scored_texts(tiny_lm(), tmp_path / "text.txt")


def test_no_passages_is_refused(tiny_lm: Any) -> None:
    with pytest.raises(ValueError, match="passages is 0 and tokens is 64; give 1 or more"):
        human_text(tiny_lm(), passages=0)


# -- through the chat template -------------------------------------------------------------------------------------


def test_the_unedited_llm_answers_each_question_in_the_template(chat_lm: EditableLM) -> None:
    before = chat_text(chat_lm, QUESTIONS[:3], tokens=8)
    for question, passage in zip(QUESTIONS, before, strict=False):
        asked = chat_lm.encode(f"<bos>user\n{question}<eos>\n<bos>assistant\n")
        assert passage.input_ids == (*asked, *passage.targets[:-1])  # only the answer is predicted
    change(chat_lm, 0.5)
    assert ids(chat_text(chat_lm, QUESTIONS[:3], tokens=8)) == ids(before)


def test_an_llm_without_a_template_cannot_be_asked(tiny_lm: Any) -> None:
    with pytest.raises(ValueError, match="tiny-llama has no chat template"):
        chat_text(tiny_lm())


# -- together ------------------------------------------------------------------------------------------------------


def test_chat_is_measured_only_where_there_is_a_template(tiny_lm: Any, chat_lm: EditableLM) -> None:
    assert list(scored_texts(tiny_lm())) == ["self", "human"]
    assert {key: len(text) for key, text in scored_texts(chat_lm, passages=5).items()} == {
        "self": 5, "human": 5, "chat": 5,
    }  # fmt: skip
    texts = scored_texts(chat_lm)
    assert list(texts) == ["self", "human", "chat"]
    change(chat_lm, 0.1)
    found = drifts(chat_lm, texts)
    assert found == {key: self_drift(chat_lm, passages) for key, passages in texts.items()}
    assert len({drift.kl for drift in found.values()}) == 3 and min(drift.kl for drift in found.values()) > 1e-3


def test_a_template_that_does_not_fit_and_missing_topics_leave_their_texts_out(
    chat_lm: EditableLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat_lm.tokenizer.chat_template = "hello"
    imported = builtins.__import__

    def without_topics(name: str, *args: Any) -> Any:
        if name.startswith("pydoc_data"):
            raise ImportError("No module named 'pydoc_data'")
        return imported(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_topics)
    with pytest.warns(UserWarning, match="is not measured") as warned:
        assert list(scored_texts(chat_lm)) == ["self"]
    assert [str(w.message).split(":")[0] for w in warned] == [
        "the divergence on human text is not measured", "the divergence on chat answers is not measured",
    ]  # fmt: skip
    assert "name a text file" in str(warned[0].message) and "leaves a user's message out" in str(warned[1].message)


def test_no_passage_that_is_scored_is_one_that_something_learns_or_chooses_by(
    chat_lm: EditableLM, tmp_path: Path
) -> None:
    """Not even in part: no run of 24 tokens is in both."""
    texts = scored_texts(chat_lm)
    scored = runs([row for passages in texts.values() for row in ids(passages)])
    assert len(scored) > 3000
    used = {
        "the reward and its multiplier": ids(OwnText().texts(chat_lm)),
        "selection": ids(selection.TEXT.texts(chat_lm)),
        "an editor's strength": ids(self_text(chat_lm, strength.TEXTS, strength.TEXT_TOKENS)),
        "the guard": [chat_lm.encode(text) for text in HELD_TEXTS],
        "prior and statistics": generated_corpus(chat_lm, 8192).tolist(),
    }
    for what, rows in used.items():
        assert runs(rows), what
        assert not scored & runs(rows), what
    openings = {row[:10] for row in ids(texts["self"])}
    assert len(openings) > 24
    for what in ("the reward and its multiplier", "selection", "an editor's strength"):
        assert not openings & {row[:10] for row in used[what]}, what
    # The measure sees what it is to see: a prior from the very text that is scored.
    file = tmp_path / "own.txt"
    file.write_text(SENTENCE * 20, encoding="utf-8")
    own = runs(ids(human_text(chat_lm, file)))
    assert own & runs(text_corpus(chat_lm, file, 640).tolist())


def test_general_ability_measures_all_three_and_says_what_they_are(chat_lm: EditableLM, tmp_path: Path) -> None:
    ability = GeneralAbility(chat_lm)
    assert list(ability.measure()) == ["self", "human", "chat"] == list(ability.sources)
    assert ability.sources["human"] == "help topics of Python's standard library"
    file = tmp_path / "book.txt"
    file.write_text(SENTENCE * 40, encoding="utf-8")
    other = GeneralAbility(chat_lm, text=file)
    assert other.sources["human"] == "file book.txt"
    first, second = ability.measure(), other.measure()
    assert first["self"] == second["self"] and first["chat"] == second["chat"]
    assert first["human"]["perplexity"] != second["human"]["perplexity"]
