"""Word boundaries in a text, and the separator between a prompt and its answer."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

# First words of the Unicode names of letters in scripts without spaces between words.
_UNSPACED = (
    "CJK ", "IDEOGRAPHIC ", "HIRAGANA ", "KATAKANA", "HALFWIDTH KATAKANA", "BOPOMOFO ", "YI ", "THAI ", "LAO ",
    "KHMER ", "MYANMAR ", "TIBETAN ", "TAI ", "NEW TAI ", "JAVANESE ", "BALINESE ",
)  # fmt: skip
# The scripts among them that have no space before a word of another script either (Thai and others have one).
_EAST_ASIAN = ("CJK ", "IDEOGRAPHIC ", "HIRAGANA ", "KATAKANA", "HALFWIDTH KATAKANA", "BOPOMOFO ", "YI ")
_INVISIBLE = "\u200b\u2060\ufeff"  # zero-width characters that separate words
NQ_PREFIX = "nq question: "  # of the Natural Questions that ZsRE has as unrelated facts
_ELISION = re.compile(r"(?:\b[^\W\d_]|\b\w*l|\b\w*qu|\bun)['’]$", re.IGNORECASE)  # l', d', dell', qu', un'
_CLOSING = re.compile(r"[,;)\]}]|\.+(?!\w)|['’]s\b")  # beginnings of an answer that follow the prompt without a space


def is_unspaced(character: str) -> bool:
    """Whether the character belongs to a script without spaces between words (Chinese, Japanese, Thai, Khmer, …), its
    full-width punctuation included; Korean has spaces."""
    return unicodedata.name(character, "").startswith(_UNSPACED) or _is_wide_mark(character)


def _is_wide_mark(character: str) -> bool:
    return unicodedata.category(character)[0] == "P" and unicodedata.east_asian_width(character) in "WF"


def continues_word(before: str, after: str) -> bool:
    """Whether a word continues from the end of one text to the beginning of the next. False in scripts without spaces,
    whose words have no visible ends."""
    return bool(before and after) and _is_word(before[-1]) and _is_word(after[0])


def _is_word(character: str) -> bool:
    return (character.isalnum() or character == "_" or unicodedata.category(character)[0] == "M") and not is_unspaced(
        character
    )


def find_subject(text: str, subject: str) -> int | None:
    """The subject's first character in the text; None if the text does not contain the subject.

    The first occurrence as a whole word is taken (within a hyphenated word only if there is no other), else the first
    occurrence of any kind.
    """
    places = list(_occurrences(text, subject))
    whole_words = [at for at in places if _is_whole(text, at, at + len(subject))]
    unhyphenated = [at for at in whole_words if not _is_hyphenated(text, at, at + len(subject))]
    return next(iter(unhyphenated or whole_words or places), None)


def _occurrences(text: str, part: str) -> Iterator[int]:
    at = text.find(part) if part else -1
    while at >= 0:
        yield at
        at = text.find(part, at + 1)


def _is_whole(text: str, start: int, stop: int) -> bool:
    part = text[start:stop]
    return not continues_word(text[:start], part) and not continues_word(part, text[stop:])


def _is_hyphenated(text: str, start: int, stop: int) -> bool:
    before, after = text[max(start - 2, 0) : start], text[stop : stop + 2]
    return (len(before) == 2 and before[1] in "-‐‑" and _is_word(before[0])) or (
        len(after) == 2 and after[0] in "-‐‑" and _is_word(after[1])
    )


def with_question_mark(prompt: str) -> str:
    """A prompt of Natural Questions with a question mark; any other prompt unchanged."""
    return prompt + "?" if prompt.startswith(NQ_PREFIX) and not prompt.endswith("?") else prompt


def separator(prompt: str, answer: str) -> str:
    """The separator between a prompt and its answer: a space or nothing.

    It is nothing after white space, before an answer that begins with white space, within a script without spaces,
    after an opening bracket or quotation mark, a hyphen or slash that ends a word, an elision (l', dell') or a sign
    like $, and before a comma or full stop.
    """
    if not prompt or not answer or prompt[-1].isspace() or prompt[-1] in _INVISIBLE or answer[0].isspace():
        return ""
    if _in_unspaced_script(prompt, answer) or _opens(prompt) or _CLOSING.match(answer):
        return ""
    return " "


def _in_unspaced_script(prompt: str, answer: str) -> bool:
    last = prompt[-1]
    if unicodedata.name(last, "").startswith(_EAST_ASIAN) or _is_wide_mark(last):
        return True
    if not is_unspaced(answer[0]):
        return False
    letter = next((c for c in reversed(prompt) if c.isalpha() or is_unspaced(c)), "")
    return bool(letter) and is_unspaced(letter)


def _opens(prompt: str) -> bool:
    """Whether no space belongs after the prompt's last character."""
    last, before = prompt[-1], prompt[-2:-1]
    begins = not before or before.isspace() or unicodedata.category(before) == "Ps"
    kind = unicodedata.category(last)
    if kind == "Ps":  # an opening bracket
        return True
    if kind in ("Pi", "Pf") or last in "\"'`@#" or kind == "Sc":  # a mark that opens if nothing comes right before it
        return begins or (last in "'’" and bool(_ELISION.search(prompt)))
    return last in "-‐‑/_" and (before.isalnum() or before == last == "/")
