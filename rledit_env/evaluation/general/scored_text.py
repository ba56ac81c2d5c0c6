"""The passages on which the divergence is reported: the LLM's own text, human-written text, and answers in a chat.

No editor, reward or selection uses any of these passages. There are three kinds, since an editor that preserves the
LLM's own text on purpose could still change everything else.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rledit_env.lm.chat import ChatTemplate
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage
from rledit_env.self_text import OPENINGS, SelfDrift, self_drift, self_text

NAMES = {"self": "own text", "human": "human text", "chat": "chat answers"}
"""Kinds of text: key in results → name in tables."""

PASSAGES, TOKENS = 32, 64
QUESTIONS = (
    "How do I boil an egg?", "What should I pack for a weekend trip?", "Can you explain how a bicycle stays upright?",
    "Why is the sky blue?", "How can I fall asleep faster?", "What is a good present for my grandmother?",
    "How do I remove a coffee stain from a shirt?", "What does it mean to save money?",
    "Can you help me write a birthday card?", "What is the difference between a cold and the flu?",
    "How do I start learning the guitar?", "Which vegetables are easy to grow on a balcony?",
    "How do I ask my boss for a day off?", "Why do cats purr?", "What can I cook with rice and tomatoes?",
    "How much water should I drink a day?", "How do I tie a tie?", "What makes a good friend?",
    "How do I write a list in Python?", "Why do leaves change colour in autumn?", "What is 15 percent of 80?",
    "How can I make my flat warmer?", "Tell me a short story about a lost umbrella.", "How do vaccines work?",
    "What should I say in a job interview?", "How do I keep bread fresh?", "Is it better to run or to walk?",
    "Can you translate 'good morning' into Spanish?", "What are some games for a rainy day?",
    "How do I change a flat tyre?", "Why does music make people happy?", "What should I do if I lose my keys?",
)  # fmt: skip
"""Everyday questions of users, for `chat_text`."""


def scored_texts(
    lm: EditableLM, file: str | Path | None = None, seed: int = 0, passages: int = PASSAGES
) -> dict[str, list[Passage]]:
    """The passages on which the divergence is reported, by the keys of ``NAMES``.

    "self" is `self_text`, "human" `human_text`, and "chat" `chat_text`, if the LLM has a chat template. A kind without
    text is left out, with a warning.

    Args:
        lm: the LLM, edited or not; its pre-trained weights write the texts.
        file: the human-written text, in UTF-8; None takes the help topics of Python's standard library.
        seed: of the texts that the LLM writes.
        passages: number of passages of each kind, 1 to 32.

    Raises:
        FileNotFoundError, ValueError: ``file`` does not exist, or has too little text.
    """
    # Read first, so that errors of the file are raised before the LLM writes.
    from_file = None if file is None else human_text(lm, file, passages)
    sources: dict[str, Callable[[], list[Passage]]] = {
        "self": lambda: self_text(lm, OPENINGS[:passages], seed=seed),
        "human": lambda: human_text(lm, None, passages) if from_file is None else from_file,
    }
    if lm.tokenizer.chat_template:
        sources["chat"] = lambda: chat_text(lm, QUESTIONS[:passages], seed=seed)
    texts = {}
    for key, text in sources.items():
        try:
            texts[key] = text()
        except (ImportError, ValueError) as error:
            warnings.warn(f"the divergence on {NAMES[key]} is not measured: {error}", stacklevel=2)
    return texts


def drifts(lm: EditableLM, texts: Mapping[str, Sequence[Passage]]) -> dict[str, SelfDrift]:
    """`self_drift` at the current weights on each of `scored_texts`."""
    return {key: self_drift(lm, passages) for key, passages in texts.items()}


def human_text(
    lm: EditableLM, file: str | Path | None = None, passages: int = PASSAGES, tokens: int = TOKENS
) -> list[Passage]:
    """Human-written passages, the same at every call: from places spread evenly over a text file, or without a file
    from different help topics of Python's standard library (`pydoc_data.topics`).

    The help topics differ between versions of Python: compare only divergences of one version, or name a file.

    Args:
        lm: the LLM, for its tokens.
        file: a text in UTF-8.
        passages: the largest number of passages; a short text gives fewer.
        tokens: number of predicted tokens of a passage; fewer if the text or the LLM's context is shorter.

    Raises:
        FileNotFoundError: the file does not exist.
        ImportError: this Python has no help topics.
        ValueError: the file is not UTF-8, or has less than two tokens; a number is below 1.
    """
    if passages < 1 or tokens < 1:
        raise ValueError(f"passages is {passages} and tokens is {tokens}; give 1 or more of each")
    length = min(tokens + 1, lm.context_length)
    rows = _topic_rows(lm, passages, length) if file is None else _text_rows(lm, read_text(file), passages, length)
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise ValueError(f"{file or 'the help topics'}: no text of two tokens or more; give a longer text")
    return [Passage(tuple(row[:-1]), tuple(row[1:])) for row in rows]


def chat_text(
    lm: EditableLM, questions: Sequence[str] = QUESTIONS, tokens: int = TOKENS, seed: int = 0
) -> list[Passage]:
    """The answers of the pre-trained weights to a user's questions in the LLM's chat template.

    Args:
        lm: the LLM, edited or not.
        questions: a user's messages, one for each passage; only the answers' tokens are predicted.
        tokens: the largest number of tokens of an answer; the LLM may end it earlier.
        seed: of the sampling.

    Raises:
        ValueError: the LLM has no chat template, or one that does not fit (`ChatTemplate`), or it answers nothing.
    """
    template = ChatTemplate(lm.tokenizer, lm.name or "the model")
    return self_text(lm, [template(question) for question in questions], tokens, seed)


def read_text(file: str | Path) -> str:
    """Read a text file in UTF-8.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not UTF-8.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no text file {path}; name one, or none for the help topics of Python")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error.reason} at byte {error.start}); convert it") from error


def source_of(file: str | Path | None) -> str:
    """A description of `human_text`'s source."""
    return "help topics of Python's standard library" if file is None else f"file {Path(file).name}"


def _topic_rows(lm: EditableLM, count: int, length: int) -> list[list[int]]:
    """A paragraph's beginning after a third of the topic, for ``count`` topics spread evenly over the long ones."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ImportError(f"this Python comes without its help topics ({error}); name a text file") from error
    rows = []
    for _, text in sorted(topics.items()):
        row = _cut(lm, text[max(0, text.find("\n\n", len(text) // 3)) :].lstrip("\n"), length)
        if len(row) == length and row not in rows:  # some topics repeat others
            rows.append(row)
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def _text_rows(lm: EditableLM, text: str, count: int, length: int) -> list[list[int]]:
    """The beginnings of ``count`` equal parts of a text, each at a word's start; of fewer parts if they are short."""
    text = text.strip()
    rows: list[list[int]] = []
    for parts in range(count, 0, -1):
        rows = []
        for i in range(parts):
            part = text[i * len(text) // parts : (i + 1) * len(text) // parts]
            start = re.search(r"\s(?=\S)", part[:200]) if i else None
            rows.append(_cut(lm, part[start.end() :] if start else part, length))
            if len(rows[-1]) < length and parts > 1:
                break
        else:
            return rows
    return rows


def _cut(lm: EditableLM, text: str, length: int) -> list[int]:
    """The first tokens of a text."""
    if not text.strip():
        return []
    characters = 4 * length
    while True:
        row = lm.encode(text[:characters])
        if len(row) > length or characters >= len(text):
            return row[:length]
        characters *= 2
