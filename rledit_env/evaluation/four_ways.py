"""Asks an LLM for facts in four ways: the edit prompt, a paraphrase, a neighbouring fact, and a question in a chat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rledit_env.answers import answer_of, contains, took
from rledit_env.knowledge import EditRecord
from rledit_env.lm.chat import ChatTemplate
from rledit_env.lm.editable import EditableLM

PLAIN_TOKENS, CHAT_TOKENS = 10, 24  # tokens of an answer


@dataclass(frozen=True)
class Question:
    """One way to ask for a fact.

    Attributes:
        way: "prompt", "paraphrase", "neighbour" or "chat".
        text: the prompt, or the user's message.
        answer: what the LLM should say after the edit: the new answer, or the neighbour's own.
    """

    way: str
    text: str
    answer: str

    def is_right(self, said: str) -> bool:
        """Whether the LLM's answer is the one that it should give: it begins with it, or, in a chat, contains it."""
        return contains(said, self.answer) if self.way == "chat" else took(said, self.answer)

    def shown(self, said: str) -> str:
        """The LLM's answer for display: in a chat its first line, else up to the end of the phrase."""
        return said.strip().split("\n")[0] if self.way == "chat" else answer_of(said)


def questions_of(record: EditRecord, message: str) -> list[Question]:
    """The four ways to ask for a fact: its prompt, its first paraphrase, its first unrelated fact, and a message."""
    neighbour = record.unrelated[0]
    return [
        Question("prompt", record.prompt, record.target),
        Question("paraphrase", record.paraphrases[0], record.target),
        Question("neighbour", neighbour.prompt, neighbour.answer),
        Question("chat", message, record.target),
    ]


def ask(lm: EditableLM, questions: Sequence[Question]) -> list[str]:
    """The LLM's free, greedy answers at its current weights; "" to a message if the LLM has no chat template."""
    template = ChatTemplate(lm.tokenizer, lm.name) if lm.tokenizer.chat_template else None
    answers: dict[Question, str] = {}
    plain = [q for q in questions if q.way != "chat"]
    answers |= zip(plain, lm.generate([q.text for q in plain], extra=PLAIN_TOKENS), strict=True)
    if template is not None:
        chat = [q for q in questions if q.way == "chat"]
        answers |= zip(chat, lm.generate([template(q.text) for q in chat], extra=CHAT_TOKENS), strict=True)
    return [answers.get(question, "") for question in questions]
