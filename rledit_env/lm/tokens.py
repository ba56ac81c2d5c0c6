"""Text as token ids of one LLM: the one place that decides how a prompt and its answer become tokens."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rledit_env.knowledge.text import find_subject, separator
from rledit_env.lm.forward import Passage

CONTEXT_SETTINGS = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length", "max_sequence_length",
    "context_length", "max_target_positions",
)  # fmt: skip
NO_BOUND = 10**9  # tokens; tokenizers without a bound name a larger number

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


class PassageEncoder:
    """Prompts and answers as passages of one LLM.

    Args:
        tokenizer: a fast one, which tells which characters a token covers.
        model: the LLM, for the tokens that it takes.
        name: what to call it in messages.

    Attributes:
        tokenizer: the tokenizer.
        text: how texts become its token ids.
        context_length: the most tokens that the model takes; ``sys.maxsize`` where nothing bounds them, as with ALiBi
            and state spaces.

    Raises:
        ValueError: the tokenizer is a slow one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, name: str = "") -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"{name or type(model).__name__}: a fast tokenizer is needed, since it tells which characters a token "
                "covers; convert it with the tokenizers library or choose another model"
            )
        self.tokenizer, self.text, self._name = tokenizer, TextEncoder(tokenizer), name
        self.context_length = _context_length(model.config.get_text_config(), tokenizer)
        embeddings: Any = model.get_input_embeddings()
        self._embedded = len(embeddings.weight)

    @property
    def pad_token_id(self) -> int:
        """What fills up rows of token ids, which no token sees: the tokenizer's pad token, or another one where it has
        none, or none that the model has an embedding for."""
        tokenizer = self.tokenizer
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
        return next((token for token in candidates if token is not None and token < self._embedded), 0)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that is to be continued (see :class:`TextEncoder`)."""
        return self.text.encode(text)

    def tokenize(
        self, prompt: str, answer: str, subject: str | tuple[int, int] | None = None, origin: str = ""
    ) -> Passage:
        """The passage of a prompt and its answer, joined as :class:`TextEncoder` joins them.

        Args:
            prompt, answer: texts.
            subject: what the prompt is about: its text, sought in the prompt (`find_subject`), or its first character
                there and the one after its last.
            origin: the place of the fact, for messages.

        Raises:
            ValueError: the passage is longer than the model's context, or the answer has no token.
        """
        return self.tokenize_all([prompt], [answer], [subject], [origin])[0]

    def tokenize_all(
        self,
        prompts: Sequence[str],
        answers: Sequence[str],
        subjects: Sequence[str | tuple[int, int] | None],
        origins: Sequence[str],
    ) -> list[Passage]:
        """:meth:`tokenize` for many texts at once."""
        passages = []
        rows = zip(self.text.pairs(prompts, answers), prompts, answers, subjects, origins, strict=True)
        for (ids, offsets, first), prompt, answer, subject, origin in rows:
            if not 0 < first < len(ids):
                raise ValueError(f"{origin}: the prompt {prompt!r} or its answer {answer!r} has no token")
            if len(ids) > self.context_length:
                raise ValueError(
                    f"{origin}: prompt and answer have {len(ids)} tokens, but the context of "
                    f"{self._name or 'the model'} holds {self.context_length}; shorten or leave out {prompt[:60]!r}"
                )
            position = _last_token(offsets[:first], _span(prompt, subject))
            passages.append(Passage(tuple(ids[:-1]), tuple(ids[first:]), position))
        return passages


def _context_length(config: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    named = (getattr(config, name, None) for name in CONTEXT_SETTINGS)
    bounds = [bound for bound in named if isinstance(bound, int) and bound > 0]
    if not bounds and tokenizer.model_max_length < NO_BOUND:
        bounds = [tokenizer.model_max_length]
    return bounds[0] if bounds else sys.maxsize


def _span(prompt: str, subject: str | tuple[int, int] | None) -> tuple[int, int] | None:
    """Where the subject stands in the prompt."""
    if not isinstance(subject, str):
        return subject
    start = find_subject(prompt, subject)
    return None if start is None else (start, start + len(subject))


def _last_token(offsets: Offsets, span: tuple[int, int] | None) -> int | None:
    """The index of the last token that covers a character of the span."""
    if span is None:
        return None
    return max((i for i, (start, end) in enumerate(offsets) if start < span[1] and end > start), default=None)
