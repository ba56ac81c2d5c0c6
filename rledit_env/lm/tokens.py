"""Prompts and answers as token ids of one LLM. No other module decides how they become tokens."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from functools import cached_property

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rledit_env.knowledge.text import find_subject, separator
from rledit_env.lm.forward import Passage

CONTEXT_SETTINGS = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length", "max_sequence_length",
    "context_length", "max_target_positions",
)  # fmt: skip
NO_BOUND = 10**9  # tokens; a tokenizer without a bound has a larger ``model_max_length``

_TRAILING_SPACE = re.compile(r"(?<=\S) +\Z")

Offsets = Sequence[tuple[int, int]]


class TextEncoder:
    """Texts and pairs of prompt and answer as token ids.

    Tokens that the tokenizer puts before every text are kept, but not added again to a text that begins with them.
    Tokens that it appends, such as an end-of-sequence token, are left out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def prefix(self) -> list[int]:
        """Tokens that the tokenizer puts before every text, such as a beginning-of-sequence token."""
        plain = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        with_special = self.tokenizer("a")["input_ids"]
        starts = [i for i in range(len(with_special) - len(plain) + 1) if with_special[i : i + len(plain)] == plain]
        return list(with_special[: starts[0]]) if starts else []

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """The texts of the tokenizer's special tokens, which chat templates consist of."""
        added = self.tokenizer.added_tokens_decoder.values()
        return tuple(token.content for token in added if token.special and token.content.strip())

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that is to be continued."""
        return self._encode_all([text])[0][0]

    def joined(self, prompt: str, answer: str) -> str:
        """The prompt and its answer as one text."""
        return prompt + self._continuation(prompt, answer)

    def pairs(self, prompts: Sequence[str], answers: Sequence[str]) -> list[tuple[list[int], Offsets, int]]:
        """Each prompt with its answer: token ids, the characters of the joined text that each token covers, and the
        index of the first token of the answer (the number of tokens where it has none)."""
        tails = [self._continuation(*pair) for pair in zip(prompts, answers, strict=True)]
        encoded = self._encode_all([prompt + tail for prompt, tail in zip(prompts, tails, strict=True)])
        rows = [
            (ids, offsets, next((i for i, (_, end) in enumerate(offsets) if end > len(prompt)), len(ids)))
            for (ids, offsets), prompt in zip(encoded, prompts, strict=True)
        ]
        # An answer that does not begin with white space may share a token with the prompt's end. The model, which
        # generates from the prompt alone, never sees that token; so both are encoded separately where that happens.
        adjoining = [i for i, tail in enumerate(tails) if not tail[:1].isspace() or prompts[i][-1:].isspace()]
        for i, (ids, offsets) in zip(adjoining, self._encode_all([prompts[i] for i in adjoining]), strict=True):
            if rows[i][0][: len(ids)] == ids:
                rows[i] = (*rows[i][:2], len(ids))
            else:
                tail_ids, tail_offsets = self._encode_continuation(tails[i])
                shifted = [(start + len(prompts[i]), end + len(prompts[i])) for start, end in tail_offsets]
                rows[i] = (ids + tail_ids, [*offsets, *shifted], len(ids))
        return rows

    def _continuation(self, prompt: str, answer: str) -> str:
        """The answer, with its separator from the prompt in front.

        Spaces at its start are left out where the prompt ends with white space or a special token. Spaces at its end
        are always left out, since a model writes a space before the next word.
        """
        answer = _TRAILING_SPACE.sub("", answer)
        if prompt[-1:].isspace() or prompt.endswith(self.special_tokens):
            return answer.lstrip(" ")
        return separator(prompt, answer) + answer

    def _encode_continuation(self, text: str) -> tuple[list[int], Offsets]:
        """Tokens of a text that follows another, without the space that some tokenizers put before every text."""
        anchor = "a" if text[:1].isspace() else "\n"  # tokenizers join neither a line end with a word nor the reverse
        ids, offsets = self._encode_plain([anchor + text])[0]
        first = next((i for i, (_, end) in enumerate(offsets) if end > 1), len(ids))
        return ids[first:], [(max(start - 1, 0), end - 1) for start, end in offsets[first:]]

    def _encode_all(self, texts: Sequence[str]) -> list[tuple[list[int], Offsets]]:
        prefix = self.prefix
        return [
            (ids, offsets) if ids[: len(prefix)] == prefix else (prefix + ids, [(0, 0)] * len(prefix) + list(offsets))
            for ids, offsets in self._encode_plain(texts)
        ]

    def _encode_plain(self, texts: Sequence[str]) -> list[tuple[list[int], Offsets]]:
        if not texts:
            return []
        encoding = self.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
        return list(zip(encoding["input_ids"], encoding["offset_mapping"], strict=True))


class PassageEncoder:
    """Prompts and answers as passages of one LLM.

    Args:
        tokenizer: a fast tokenizer, which tells which characters a token covers.
        model: the LLM, which bounds the number of tokens and their ids.
        name: the LLM's name in messages.

    Attributes:
        tokenizer: the tokenizer.
        text: encodes texts.
        context_length: most tokens that the model takes; ``sys.maxsize`` where nothing bounds them, as with ALiBi
            and state spaces.

    Raises:
        ValueError: the tokenizer is slow.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, name: str = "") -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"{name or type(model).__name__}: a fast tokenizer is needed, since it tells which characters a token "
                "covers; convert it with the tokenizers library or choose another model"
            )
        self.tokenizer, self.text, self._name = tokenizer, TextEncoder(tokenizer), name
        self.context_length = _context_length(model.config.get_text_config(), tokenizer)
        self._embedded = embedded_tokens(model)

    @property
    def pad_token_id(self) -> int:
        """Token id for padding, which no token attends to: the tokenizer's pad token, or, where the model has no
        embedding for that, another token."""
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
            subject: what the prompt is about: its text, which is searched for in the prompt (`find_subject`), or the
                index of its first character there and of the one after its last.
            origin: where the fact was read from, for messages.

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


def embedded_tokens(model: PreTrainedModel) -> int:
    """The number of token ids that a model has embeddings for."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return len(weight)


def _context_length(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    named = (getattr(config, name, None) for name in CONTEXT_SETTINGS)
    bounds = [bound for bound in named if isinstance(bound, int) and bound > 0]
    if not bounds and tokenizer.model_max_length < NO_BOUND:
        bounds = [tokenizer.model_max_length]
    return bounds[0] if bounds else sys.maxsize


def _span(prompt: str, subject: str | tuple[int, int] | None) -> tuple[int, int] | None:
    """First character of the subject in the prompt, and the one after its last."""
    if not isinstance(subject, str):
        return subject
    start = find_subject(prompt, subject)
    return None if start is None else (start, start + len(subject))


def _last_token(offsets: Offsets, span: tuple[int, int] | None) -> int | None:
    """The index of the last token that covers a character of the span."""
    if span is None:
        return None
    return max((i for i, (start, end) in enumerate(offsets) if start < span[1] and end > start), default=None)
