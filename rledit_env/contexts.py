"""Contexts: facts behind short texts that the LLM wrote, which are presented beside the plain prompts."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from rledit_env.evaluation.general.self_text import REWARD_OPENINGS, self_text
from rledit_env.knowledge import EditRecord
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage

TEXTS = 32  # different texts, which a stream's facts take in turn
TOKENS = 5  # that the LLM writes after an opening
LONGEST = 400  # bytes of a text, its opening included; what is longer is cut
_written: WeakKeyDictionary[EditableLM, list[str]] = WeakKeyDictionary()  # by model: they take seconds


class Contexts:
    """Texts in front of edit prompts, as ROME and MEMIT use them: what is learned behind several of them is less of one
    prompt and more of its fact.

    The texts go on from the last of `REWARD_OPENINGS`, none of which begins a text that is scored.

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
            _written[self.lm] = self._write()
        return _written[self.lm]

    def _write(self) -> list[str]:
        written = self_text(self.lm, REWARD_OPENINGS[-TEXTS:], TOKENS)
        texts = self.lm.tokenizer.batch_decode(
            [[*p.input_ids, p.targets[-1]] for p in written], skip_special_tokens=True
        )
        return [" ".join(text.split())[: LONGEST // 4].rstrip(" .") + ". " for text in texts]

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
