"""Contexts: short texts that the LLM wrote. Facts are presented behind them, and with their plain prompts."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from rledit_env.knowledge import EditRecord
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage
from rledit_env.self_text import until_end

WORDS = ("The", "Therefore", "Because", "I", "You")  # first words of the texts, as in MEMIT's code
TEXTS = 40  # number of texts, which an episode's facts use in turn
TOKENS = 10  # tokens of a text, its first word included
LONGEST = 400  # most bytes of a text; a longer one is cut
_texts_by_lm: WeakKeyDictionary[EditableLM, list[str]] = WeakKeyDictionary()  # texts take a second to write


class Contexts:
    """Texts in front of edit prompts, as in ROME and MEMIT. What an LLM learns behind several of them depends less on
    one prompt and more on the fact.

    Args:
        lm: the LLM. It writes the texts, with its pre-trained weights, when they are first needed.
        count: K, the number of texts for each fact.
    """

    def __init__(self, lm: EditableLM, count: int) -> None:
        self.lm, self.count = lm, count

    @property
    def texts(self) -> list[str]:
        """The texts; each ends with a full stop and a space."""
        if self.lm not in _texts_by_lm:
            _texts_by_lm[self.lm] = _write_texts(self.lm)
        return _texts_by_lm[self.lm]

    def passages(self, record: EditRecord, place: int) -> list[Passage]:
        """A fact's edit behind each of its K texts.

        Args:
            record: the fact.
            place: its index in the episode, which determines its texts.
        """
        texts = self.texts
        fact_texts = [texts[(place * self.count + k) % len(texts)] for k in range(self.count)]
        return [self._behind(record, text) for text in fact_texts]

    def _behind(self, record: EditRecord, text: str) -> Passage:
        prompt = record.prompt[: record.lead] + text + record.prompt[record.lead :]
        span = record.subject_span
        shifted_span = None if span is None else (span[0] + len(text), span[1] + len(text))
        return self.lm.tokenize(prompt, record.target, shifted_span, record.origin)


@torch.no_grad()
def _write_texts(lm: EditableLM) -> list[str]:
    """The texts of an LLM, the same each time; torch's own random state is not changed.

    Each token is drawn from the five likeliest, as in the published code, so that the texts are ordinary.
    """
    rows = [lm.encode(word) for word in WORDS] * (TEXTS // len(WORDS))
    written = [list(row) for row in rows]
    devices = [lm.device] if lm.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), lm.original_weights():
        torch.manual_seed(0)
        for members in lm.decoded_together(rows):
            most = max(TOKENS - min(len(rows[i]) for i in members), 1)  # a tokenizer may split words into letters
            tokens = lm.decode([rows[i] for i in members], most, do_sample=True, temperature=1.0, top_k=5, top_p=1.0)
            for i, continuation in zip(members, tokens.tolist(), strict=True):
                written[i] += until_end(lm, continuation)
    texts = lm.tokenizer.batch_decode(written, skip_special_tokens=True)
    return [" ".join(text.split())[: LONGEST // 4].rstrip(" .") + ". " for text in texts]
