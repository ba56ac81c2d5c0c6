"""The forward pass of an edited LLM whose layers cannot be run apart from it: the model's own, from its token ids on.

It computes more than `rledit_env.lm.forward.SuffixForward` (every layer in every pass, padding too), but asks nothing
of the model than that its forward ends in its output head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from rledit_env.lm.forward import Forward, Passage, Reached, replaced_forward
from rledit_env.lm.head import OutputHead, own_head_inputs
from rledit_env.lm.layout import Layout


class WholeForward:
    """The model's own forward, as a `rledit_env.lm.forward.Forward`. Passages are padded on the right, each in a row.

    Args:
        model: a causal LM in evaluation mode.
        layers: its decoder layers.
        output: its output head.
    """

    quantum, shares, longest_packed = 1, False, 0

    def __init__(self, model: PreTrainedModel, layers: nn.ModuleList, output: OutputHead) -> None:
        self.model, self.layers, self.output = model, layers, output

    @classmethod
    def of(cls, forward: Forward) -> WholeForward:
        """The one of another pass's model."""
        return cls(forward.model, forward.layers, forward.output)

    @property
    def device(self) -> torch.device:
        return self.output.device

    def prefix(self, input_ids: Tensor, layout: Layout) -> Tensor:
        """The token ids (B, L) themselves."""
        return input_ids

    def final_states(self, prefix: Tensor, places: Tensor, layout: Layout) -> Tensor:
        """States (P, d) that the output head takes, at some tokens, counted row by row, of token ids (B, L)."""
        return own_head_inputs(self.model, self.output.module, prefix).flatten(0, 1)[places]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (P, |V|), at least in float32, from final states (P, d)."""
        return self.output.logits(hidden)

    def run_below(self, input_ids: Tensor, layer: int) -> None:
        """Run the layers below one, and no others, on token ids (B, L): for what hooks on their modules see."""

        def stop(*_args: Any, **_kwargs: Any) -> None:
            raise Reached

        with ExitStack() as stack, torch.no_grad():
            for above in self.layers[layer:]:
                stack.enter_context(replaced_forward(above, stop))
            stack.enter_context(suppress(Reached))
            own_head_inputs(self.model, self.output.module, input_ids)

    def extended(self, input_ids: Tensor, length: int, draw: Callable[[Tensor], Tensor]) -> Tensor:
        """Texts (R, L + length) from their first tokens (R, L), each next token drawn from the logits (R, |V|); the
        model keeps what it needs from token to token in its own way."""
        if length < 1:
            return input_ids
        settings = GenerationConfig(
            max_new_tokens=length, min_new_tokens=length, do_sample=False, num_beams=1, pad_token_id=0
        )
        model: Any = self.model
        output: Tensor = model.generate(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), generation_config=settings,
            logits_processor=LogitsProcessorList([_Drawing(draw)]),
        )  # fmt: skip
        return output


class _Drawing(LogitsProcessor):
    """Lets greedy decoding take the tokens that are drawn."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        self.draw = draw

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn = self.draw(scores.clone())
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


class WholePassages:
    """Passages run whole, again and again: what `rledit_env.lm.continued.ContinuedForward` does with their tails.

    Args:
        forward: the LLM's.
        passages: B passages.
        starts: of each, the place of its subject's last token.
        input_ids: their tokens (B, L), padded on the right.
    """

    def __init__(
        self, forward: WholeForward, passages: Sequence[Passage], starts: Sequence[int], input_ids: Tensor
    ) -> None:
        self.output, self.layers, self.quantum = forward.output, forward.layers, forward.quantum
        self._forward, self._ids = forward, input_ids
        self._layout = Layout.padded([len(p) for p in passages])
        self.subjects = torch.tensor(starts, device=input_ids.device)

    def places(self, passages: Sequence[Passage]) -> Tensor:
        """Where these passages' answer positions (the first passages of those run) lie among all tokens."""
        rest = len(self.subjects) - len(passages)
        return self._layout.places([p.positions for p in passages] + [range(0)] * rest, self._ids.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (P, |V|), at least in float32, from final states (P, d)."""
        return self.output.logits(hidden)

    def states(self, places: Tensor) -> Tensor:
        """Final states (P, d) at those places."""
        return self._forward.final_states(self._ids, places, self._layout)
