"""Decides whether an LLM's free, greedy answer to a prompt is the target of an edit: whether the edit "took", and
whether the answer is an "exact match"."""

from __future__ import annotations

import re
import unicodedata

from rledit_env.knowledge.text import is_unspaced

MEANING = ("a fact took if the model's own greedy answer begins with the target, as a whole word; it is an exact match "
           "if the answer also ends there")
ENDS = ".,;:!?…。，、；：！？।؟،؛"  # punctuation that closes a phrase


def took(answer: str, target: str) -> bool:
    """Whether the answer begins with the target and the target's last word ends there.

    White space is ignored; upper and lower case is not, as the model distinguishes them. "Portugal" does not begin with
    "Port", nor "Saint-Denis" with "Saint", nor "3.5" with "3"; "Port, a city" and "Port's" do begin with "Port".
    """
    rest = _after(answer, target)
    return rest is not None and not _goes_on(unicodedata.normalize("NFC", target.strip()), rest)


def is_exact(answer: str, target: str) -> bool:
    """Whether the answer took and ends where the target ends: at its own end, a line's end or punctuation that closes a
    phrase."""
    rest = _after(answer, target)
    if rest is None or not took(answer, target):
        return False
    return re.match(rf"[^\S\n]*(?:$|\n|[{re.escape(ENDS)}])", rest) is not None


def contains(answer: str, target: str) -> bool:
    """Whether the target is anywhere in the answer, as whole words: the characters around it do not make its first or
    last word longer. White space and case are treated as in :func:`took`.

    "It is Port." contains "Port"; "It is Newport" and "Portugal" do not. Nor does "Saint-Denis" contain "Denis", "3.5"
    "5", or "-5" "5".
    """
    text, words = unicodedata.normalize("NFC", answer), unicodedata.normalize("NFC", target).split()
    if not words:
        return False
    starts = [match.start() for match in re.finditer(f"(?={re.escape(words[0])})", text)]
    return any(took(text[start:], target) and not _began_before(words[0], text[:start]) for start in starts)


def answer_of(continuation: str) -> str:
    """The answer in a free continuation, for display: its text up to the first line end or punctuation that closes a
    phrase (not that within "3.5" or "U.S.")."""
    return re.split(rf"\n|[{re.escape(ENDS)}]+(?=\s|$)|[。，、；：！？]", continuation.strip(), maxsplit=1)[0].strip()


def _after(answer: str, target: str) -> str | None:
    """The text after the target in an answer that begins with it; None in any other answer."""
    words = unicodedata.normalize("NFC", target).split()
    match = re.match(r"\s*" + r"\s+".join(map(re.escape, words)), unicodedata.normalize("NFC", answer))
    return None if match is None or not words else match.string[match.end() :]


def _goes_on(target: str, rest: str) -> bool:
    """Whether the target's last word is longer in the answer than in the target."""
    if not rest or not _in_word(target[-1]):
        return False
    if target[-1].isdigit() and re.match(r"[.,]\d", rest):
        return True
    rest = re.sub(r"^[-‐‑]", "", rest)
    return rest != "" and _in_word(rest[0]) and not (_unspaced(target[-1]) or _unspaced(rest[0]))


def _began_before(target: str, before: str) -> bool:
    """Whether the target's first word begins earlier in the answer than the target does."""
    if not before or not _in_word(target[0]):
        return False
    if target[0].isdigit() and re.search(r"\d[.,]$|(?:^|\s)[-−]$", before):
        return True
    before = re.sub(r"[-‐‑]$", "", before)
    return before != "" and _in_word(before[-1]) and not (_unspaced(target[0]) or _unspaced(before[-1]))


def _in_word(character: str) -> bool:
    return character == "_" or unicodedata.category(character)[0] in "LNM"


def _unspaced(character: str) -> bool:
    """Whether a letter next to this one may be of another word: in scripts without spaces, and in Korean."""
    return is_unspaced(character) or unicodedata.name(character, "").startswith("HANGUL")
