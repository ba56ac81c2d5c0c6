"""Text as token ids of one tokenizer: the one place that decides how a prompt and its answer become tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from rledit_env.knowledge.text import separator

_TRAILING_SPACE = re.compile(r"(?<=\S) +\Z")

Offsets = Sequence[tuple[int, int]]


class TextEncoder:
    """Texts and pairs of prompt and answer as token ids.

    What the tokenizer puts at the beginning of a text is kept (once: a text that holds it already gets no second one);
    what it appends, such as an end-of-sequence token, is not.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def prefix(self) -> list[int]:
        """What the tokenizer puts before every text, such as a beginning-of-sequence token."""
        plain = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self.tokenizer("a")["input_ids"]
        starts = [i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain]
        return list(whole[: starts[0]]) if starts else []

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """The texts of the tokenizer's special tokens, which chat templates are made of."""
        added = self.tokenizer.added_tokens_decoder.values()
        return tuple(token.content for token in added if token.special and token.content.strip())

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that is to be continued."""
        return self._encoded([text])[0][0]

    def joined(self, prompt: str, answer: str) -> str:
        """The prompt and its answer as one text."""
        return prompt + self._continuation(prompt, answer)

    def pairs(self, prompts: Sequence[str], answers: Sequence[str]) -> list[tuple[list[int], Offsets, int]]:
        """Each prompt with its answer: token ids, the characters of the joined text that each token covers, and the
        index of the first token of the answer (the number of tokens where it has none)."""
        tails = [self._continuation(*pair) for pair in zip(prompts, answers, strict=True)]
        encoded = self._encoded([prompt + tail for prompt, tail in zip(prompts, tails, strict=True)])
        rows = [
            (ids, offsets, next((i for i, (_, end) in enumerate(offsets) if end > len(prompt)), len(ids)))
            for (ids, offsets), prompt in zip(encoded, prompts, strict=True)
        ]
        # Where no white space of the answer's parts them, a token may reach over the border, which the prompt alone,
        # as it is generated from, never has.
        close = [i for i, tail in enumerate(tails) if not tail[:1].isspace() or prompts[i][-1:].isspace()]
        for i, (ids, offsets) in zip(close, self._encoded([prompts[i] for i in close]), strict=True):
            if rows[i][0][: len(ids)] == ids:
                rows[i] = (*rows[i][:2], len(ids))
            else:
                more, places = self._continued(tails[i])
                shifted = [(start + len(prompts[i]), end + len(prompts[i])) for start, end in places]
                rows[i] = (ids + more, [*offsets, *shifted], len(ids))
        return rows

    def _continuation(self, prompt: str, answer: str) -> str:
        """The answer with what parts it from the prompt. A space that it brings parts it from a word, and is left out
        where white space or a special token does so already. A space behind its last word is left out, too: a model
        writes it before the next word."""
        answer = _TRAILING_SPACE.sub("", answer)
        if prompt[-1:].isspace() or prompt.endswith(self.special_tokens):
            return answer.lstrip(" ")
        return separator(prompt, answer) + answer

    def _continued(self, text: str) -> tuple[list[int], Offsets]:
        """Tokens of a text that goes on without a space, without the space that some tokenizers put before a text."""
        anchor = "a" if text[:1].isspace() else "\n"  # tokenizers join neither a line end with a word nor the reverse
        ids, offsets = self._plain([anchor + text])[0]
        first = next((i for i, (_, end) in enumerate(offsets) if end > 1), len(ids))
        return ids[first:], [(max(start - 1, 0), end - 1) for start, end in offsets[first:]]

    def _encoded(self, texts: Sequence[str]) -> list[tuple[list[int], Offsets]]:
        prefix = self.prefix
        return [
            (ids, offsets) if ids[: len(prefix)] == prefix else (prefix + ids, [(0, 0)] * len(prefix) + list(offsets))
            for ids, offsets in self._plain(texts)
        ]

    def _plain(self, texts: Sequence[str]) -> list[tuple[list[int], Offsets]]:
        if not texts:
            return []
        encoding = self.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
        return list(zip(encoding["input_ids"], encoding["offset_mapping"], strict=True))
