"""The model's own forward pass, for LLMs whose layers cannot be run one by one.

It computes more than `rledit_env.lm.suffix.SuffixForward` (every layer in every pass, and padding), but only requires
that the model's forward ends in its output head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel

from rledit_env.lm.forward import FAILURES, Forward, Passage
from rledit_env.lm.head import OutputHead, own_head_inputs
from rledit_env.lm.kernels.layout import Layout, padded_on_left
from rledit_env.lm.kernels.packing import Past
from rledit_env.lm.module_calls import Reached, replaced_forward
from rledit_env.lm.precision import same_numbers

if TYPE_CHECKING:
    from transformers.generation import GenerateDecoderOnlyOutput


class WholeForward:
    """The model's own forward, as a `rledit_env.lm.forward.Forward`. Passages are padded on the right, each in a row.

    Args:
        model: a causal LM in evaluation mode.
        layers: its decoder layers.
        output: its output head.
    """

    quantum, shares, longest_packed, continues_packed = 1, False, 0, False

    def __init__(self, model: PreTrainedModel, layers: nn.ModuleList, output: OutputHead) -> None:
        self.model, self.layers, self.output = model, layers, output

    @classmethod
    def of(cls, forward: Forward) -> WholeForward:
        """The model's own forward pass, for the model of another forward pass."""
        return cls(forward.model, forward.layers, forward.output)

    @property
    def device(self) -> torch.device:
        return self.output.device

    def prefix(self, input_ids: Tensor, layout: Layout) -> Tensor:
        """The token ids (B, L) themselves."""
        return input_ids

    def run_past(self, prefix: Tensor, layout: Layout) -> Past:
        """Not for this pass, in which no passages are packed."""
        raise NotImplementedError("a model's own forward does not run packed passages")

    def final_states(self, prefix: Tensor, places: Tensor, layout: Layout) -> Tensor:
        """Inputs (P, d) of the output head at some of the token ids (B, L), given by indices counted row by row."""
        return own_head_inputs(self.model, self.output.module, prefix).flatten(0, 1)[places]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (P, |V|), at least in float32, from final states (P, d)."""
        return self.output.logits(hidden)

    def run_below(self, input_ids: Tensor, layer: int) -> None:
        """Run only the layers below ``layer`` on token ids (B, L), for hooks on their modules."""

        def stop(*_args: object, **_kwargs: object) -> None:
            raise Reached

        with ExitStack() as stack, torch.no_grad():
            for above in (*self.layers[layer:], self.output.module):
                stack.enter_context(replaced_forward(above, stop))
            stack.enter_context(suppress(Reached))
            self.model(input_ids=input_ids, use_cache=False)

    def extended(self, input_ids: Tensor, length: int, draw: Callable[[Tensor], Tensor]) -> Tensor:
        """Texts (R, L + length) that begin with tokens (R, L); ``draw`` picks next tokens (R, 1) by logits (R, |V|).

        The model's own generation keeps the state from token to token.
        """
        if length < 1:
            return input_ids
        parts = input_ids.split(1) if self.batching == "alone" else [input_ids]
        return torch.cat([self._generate(part, length, logits_processor=[_Drawing(draw)]).sequences for part in parts])

    @cached_property
    def batching(self) -> str:
        """Which texts the model continues in one batch as it does alone (tried once, see `Forward`).

        Some models keep no state for each row, or treat padding as text.
        """
        first, second, longer = list(range(3, 9)), list(range(9, 15)), list(range(3, 12))
        try:
            alone = self._next_logits([first])
            for other, batching in ((longer, "padded"), (second, "by length")):
                if same_numbers(self._next_logits([first, other]), alone, alone.dtype):
                    return batching
        except FAILURES:  # a model that takes one text at a time
            pass
        return "alone"

    def _next_logits(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Logits of the next three tokens of the first row, (3, |V|)."""
        ids, mask = (part.to(self.device) for part in padded_on_left(rows, 0))
        output = self._generate(ids, 3, attention_mask=mask, output_logits=True)
        assert output.logits is not None
        return torch.stack([logits[0] for logits in output.logits])

    @torch.no_grad()
    def _generate(self, input_ids: Tensor, length: int, **options: object) -> GenerateDecoderOnlyOutput:
        """The output of the model's own generation of exactly ``length`` tokens."""
        settings = GenerationConfig(
            max_new_tokens=length, min_new_tokens=length, do_sample=False, num_beams=1, pad_token_id=0,
            return_dict_in_generate=True,
        )  # fmt: skip
        options = {"attention_mask": torch.ones_like(input_ids), **options}
        model: Any = self.model
        with self.output.of_generation():
            output: GenerateDecoderOnlyOutput = model.generate(
                input_ids=input_ids, generation_config=settings, **options
            )
        return output


class _Drawing(LogitsProcessor):
    """Makes greedy decoding take the tokens that ``draw`` picks."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        self.draw = draw

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn = self.draw(scores.clone())
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


class WholePassages:
    """Runs whole passages repeatedly, as `rledit_env.lm.continued.ContinuedForward` runs their tails.

    Args:
        forward: the LLM's forward pass.
        passages: B passages.
        starts: index of the subject's last token in each passage.
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
        """Indices of the answer positions of these passages, the first of those run, among all tokens."""
        rest = len(self.subjects) - len(passages)
        return self._layout.places([p.positions for p in passages] + [range(0)] * rest, self._ids.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (P, |V|), at least in float32, from final states (P, d)."""
        return self.output.logits(hidden)

    def states(self, places: Tensor) -> Tensor:
        """Final states (P, d) at the tokens with indices ``places``."""
        return self._forward.final_states(self._ids, places, self._layout)
