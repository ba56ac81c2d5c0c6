"""Contexts: facts behind short texts that the LLM wrote, which are presented beside the plain prompts."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from rledit_env.knowledge import EditRecord
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage
from rledit_env.self_text import until_end

WORDS = ("The", "Therefore", "Because", "I", "You")  # that texts begin with, as in MEMIT's code
TEXTS = 40  # different texts, which a stream's facts take in turn
TOKENS = 10  # of a text, its first word included
LONGEST = 400  # bytes of a text; what is longer is cut
_written: WeakKeyDictionary[EditableLM, list[str]] = WeakKeyDictionary()  # by model: they take a second


class Contexts:
    """Texts in front of edit prompts, as ROME and MEMIT use them: what is learned behind several of them is less of one
    prompt and more of its fact.

    Args:
        lm: it writes the texts, with its pre-trained weights, when they are first needed.
        count: K, the texts that each fact is presented behind.
    """

    def __init__(self, lm: EditableLM, count: int) -> None:
        self.lm, self.count = lm, count

    @property
    def texts(self) -> list[str]:
        """The texts, each with the full stop and the space that end it."""
        if self.lm not in _written:
            _written[self.lm] = _write(self.lm)
        return _written[self.lm]

    def passages(self, record: EditRecord, place: int) -> list[Passage]:
        """A fact's edit behind each of its K texts.

        Args:
            record: the fact.
            place: its place in the stream, which says which texts are its own.
        """
        texts = self.texts
        own = [texts[(place * self.count + k) % len(texts)] for k in range(self.count)]
        return [self._behind(record, text) for text in own]

    def _behind(self, record: EditRecord, text: str) -> Passage:
        prompt = record.prompt[: record.lead] + text + record.prompt[record.lead :]
        span = record.subject_span
        moved = None if span is None else (span[0] + len(text), span[1] + len(text))
        return self.lm.tokenize(prompt, record.target, moved, record.origin)


@torch.no_grad()
def _write(lm: EditableLM) -> list[str]:
    """The texts of an LLM. Each token is drawn from the five likeliest, as in the published code: the texts are to be
    ordinary ones. They are the same each time; torch's own random state is left alone."""
    rows = [lm.encode(word) for word in WORDS] * (TEXTS // len(WORDS))
    written = [list(row) for row in rows]
    devices = [lm.device] if lm.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), lm.original_weights():
        torch.manual_seed(0)
        for members in lm.decoded_together(rows):
            most = max(TOKENS - min(len(rows[i]) for i in members), 1)  # a tokenizer may make letters of words
            tokens = lm.decode([rows[i] for i in members], most, do_sample=True, temperature=1.0, top_k=5, top_p=1.0)
            for i, continuation in zip(members, tokens.tolist(), strict=True):
                written[i] += until_end(lm, continuation)
    texts = lm.tokenizer.batch_decode(written, skip_special_tokens=True)
    return [" ".join(text.split())[: LONGEST // 4].rstrip(" .") + ". " for text in texts]
