"""The free answers of a model to a fact's prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rledit_env.answers import answer_of, contains, is_exact, took
from rledit_env.evaluation.chat_scores import ANSWER_TOKENS
from rledit_env.knowledge import EditRecord
from rledit_env.lm.chat import ChatTemplate
from rledit_env.lm.editable import EditableLM

CHUNK = 8  # facts that are asked for at once
NEIGHBOUR_TOKENS = 6


@dataclass(frozen=True)
class Answer:
    """A greedy answer.

    Attributes:
        text: for display.
        took: whether it begins with the target (in a chat: contains it).
        exact: whether it also ends there.
    """

    text: str
    took: bool = False
    exact: bool = False


@dataclass(frozen=True)
class Answers:
    """A model's answers to one fact: on its prompt, its paraphrases, as a chat question (None: the model has no chat
    template), and to the neighbours that should stay."""

    prompt: Answer
    paraphrases: tuple[Answer, ...]
    chat: Answer | None
    neighbours: tuple[Answer, ...]


def paraphrases_of(record: EditRecord) -> tuple[str, ...]:
    """A fact's paraphrases, without the stand-in that a fact without paraphrases has."""
    return tuple(text for text in record.paraphrases if text != record.prompt)


def neighbours_of(record: EditRecord) -> tuple[str, ...]:
    """The prompts of a fact's neighbours, without the stand-in that a fact without neighbours has."""
    return tuple(fact.prompt for fact in record.unrelated if fact.prompt != record.prompt)


def chat_template(lm: EditableLM) -> ChatTemplate | None:
    """The model's chat template; None if it has none that takes a user's message."""
    try:
        return ChatTemplate(lm.tokenizer, lm.name)
    except ValueError:
        return None


def answers_to(
    lm: EditableLM, records: Sequence[EditRecord], progress: Callable[[int], None] = lambda done: None
) -> list[Answers]:
    """The answers at the present weights.

    Args:
        lm: the model.
        records: the facts, with plain prompts.
        progress: called after every few facts with the number that have been asked for; may raise.
    """
    template = chat_template(lm)
    answers: list[Answers] = []
    for start in range(0, len(records), CHUNK):
        chunk = records[start : start + CHUNK]
        answers += _asked(lm, chunk, template)
        progress(len(answers))
    return answers


def _asked(lm: EditableLM, records: Sequence[EditRecord], template: ChatTemplate | None) -> list[Answers]:
    """The answers of a few facts, decoded together."""
    asked = [(prompt, r.target) for r in records for prompt in (r.prompt, *paraphrases_of(r))]
    written = iter(lm.generate([prompt for prompt, _ in asked], longest=[target for _, target in asked]))
    kept = iter(lm.generate([prompt for r in records for prompt in neighbours_of(r)], extra=NEIGHBOUR_TOKENS))
    chats = iter(lm.generate([template(r.prompt, r.origin) for r in records], extra=ANSWER_TOKENS) if template else ())
    return [
        Answers(
            prompt=_answer(next(written), record.target),
            paraphrases=tuple(_answer(next(written), record.target) for _ in paraphrases_of(record)),
            chat=_in_chat(next(chats), record.target) if template else None,
            neighbours=tuple(Answer(answer_of(next(kept))) for _ in neighbours_of(record)),
        )
        for record in records
    ]


def _answer(text: str, target: str) -> Answer:
    return Answer(answer_of(text), took(text, target), is_exact(text, target))


def _in_chat(text: str, target: str) -> Answer:
    return Answer(" ".join(text.split()), contains(text, target))
