"""Text generation, many prompts at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rledit_env.lm.kernels.layout import padded_on_left
from rledit_env.lm.passes import Passes
from rledit_env.lm.tokens import PassageEncoder


class Decoder:
    """Continues texts by the model's own generation.

    Args:
        passes: runs the LLM, at the weights that are used.
        tokens: encodes the LLM's texts.
    """

    def __init__(self, passes: Passes, tokens: PassageEncoder) -> None:
        self._passes, self._tokens = passes, tokens

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[str], longest: Sequence[str] | None = None, extra: int = 4, batch_size: int = 64
    ) -> list[str]:
        """Greedy continuations, batched over prompts of similar length with a KV cache.

        Args:
            prompts: texts to continue.
            longest: expected answers; the continuation may be ``extra`` tokens longer than the longest of its batch.
            extra: tokens beyond that (without ``longest``: tokens in all).
            batch_size: prompts decoded together.
        """
        encode, tokenizer = self._tokens.encode, self._tokens.tokenizer
        answers = [len(encode(" " + text.strip(" "))) for text in longest] if longest else [0] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: (answers[i], len(prompts[i])))
        texts = [""] * len(prompts)
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            rows = [encode(prompts[i]) for i in chunk]
            for members in self.decoded_together(rows):
                output = self.decode([rows[m] for m in members], max(answers[i] for i in chunk) + extra)
                for m, row in zip(members, output, strict=True):
                    texts[chunk[m]] = str(tokenizer.decode(row, skip_special_tokens=True))
        return texts

    def decoded_together(self, rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Yield batches of row indices; in such a batch, the model continues each row as it does alone."""
        batching = self._passes.forward.batching
        keys = [0 if batching == "padded" else len(row) if batching == "by length" else i for i, row in enumerate(rows)]
        for key in sorted(set(keys)):
            yield [i for i, row_key in enumerate(keys) if row_key == key]

    def decode(self, rows: Sequence[Sequence[int]], most: int, /, **sampling: Any) -> Tensor:
        """Continuations (B, ``most`` or fewer) of rows of token ids in one batch (see :meth:`decoded_together`).

        They are greedy unless ``sampling``, which has options of transformers' ``generate``, says otherwise.
        """
        ids, mask = self.pad_on_left(rows)
        forward = self._passes.forward
        model: Any = forward.model
        with self._passes.routing.routed([0], [0]), forward.output.of_generation():
            output: Tensor = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=most, pad_token_id=self._tokens.pad_token_id,
                **{"do_sample": False, **sampling},
            )  # fmt: skip
        return output[:, ids.shape[1] :]

    def pad_on_left(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids (B, L), padded on the left, and their attention mask (B, L)."""
        ids, mask = padded_on_left(rows, self._tokens.pad_token_id)
        return ids.to(self._passes.device), mask.to(self._passes.device)
