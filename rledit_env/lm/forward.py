"""The forward pass of an edited LLM, computing only what an edit can change.

Layers below the first edited one see weights that never change: their output is computed once per passage and cached
(:class:`PrefixCache`). The layers above run on cached states (:class:`SuffixForward.run`), and the output head is
applied at the positions that predict an answer token only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

TOKEN_CHOICES = ("answer", "subject", "subject+answer", "all")
FINAL_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm")


@dataclass(frozen=True, slots=True, eq=False)
class Passage:
    """A prompt and its answer as token ids.

    ``input_ids`` leaves out the last answer token, whose state predicts nothing that is scored. ``positions`` are the
    indices whose states predict ``targets``; both have one entry an answer token.
    """

    input_ids: tuple[int, ...]
    targets: tuple[int, ...]
    subject_position: int | None = None

    @property
    def positions(self) -> range:
        return range(len(self.input_ids) - len(self.targets), len(self.input_ids))

    def chosen_positions(self, token: str) -> Sequence[int]:
        """The positions that one of :data:`TOKEN_CHOICES` means, in order."""
        if token == "all":
            return range(len(self.input_ids))
        if token == "answer" or self.subject_position is None:
            return self.positions
        if token == "subject":
            return [self.subject_position]
        return sorted({*self.positions, self.subject_position})

    def __len__(self) -> int:
        return len(self.input_ids)


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is where it is float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def length_sorted_chunks(lengths: Sequence[int], max_tokens: int, max_waste: float = 0.15) -> Iterator[list[int]]:
    """Indices of ``lengths`` in chunks of similar length: at most ``max_tokens`` padded tokens and about
    ``max_waste`` of them padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    chunk: list[int] = []
    tokens = 0
    for index in order:
        padded = (len(chunk) + 1) * lengths[index]
        wasteful = len(chunk) >= 8 and padded - tokens - lengths[index] > max_waste * padded
        if chunk and (padded > max_tokens or wasteful):
            yield chunk
            chunk, tokens = [], 0
        chunk.append(index)
        tokens += lengths[index]
    if chunk:
        yield chunk


class PrefixCache:
    """Tensors by passage, evicted least recently used first once ``max_bytes`` is reached."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._entries: OrderedDict[Any, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Any) -> Tensor | None:
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def put(self, key: Any, value: Tensor) -> None:
        if key in self._entries:
            self.bytes -= self._entries.pop(key).nbytes
        self._entries[key] = value
        self.bytes += value.nbytes
        while self.bytes > self.max_bytes and len(self._entries) > 1:
            self.bytes -= self._entries.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        self._entries.clear()
        self.bytes = 0


class _Stub:
    """Stands for a decoder layer's ``forward``: notes what the layer was called with and passes the states on."""

    def __init__(self) -> None:
        self.hidden: Tensor | None = None
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.hidden, self.args, self.kwargs = hidden_states, args, kwargs
        return hidden_states


class SuffixForward:
    """Splits a Hugging Face causal LM at a decoder layer.

    The arguments that the model gives its layers (masks, rotary embeddings, windows) are recorded from the model's own
    forward with its layers replaced by stubs, so that nothing of an architecture is written again here. Passages are
    padded on the right: with causal attention no real token sees the padding, hence no padding mask is needed.

    Args:
        model: a causal LM in evaluation mode.
        first_layer: index of the first layer of the suffix.
    """

    def __init__(self, model: PreTrainedModel, first_layer: int) -> None:
        self.model = model
        self.base, self.layers = decoder_layers(model)
        self.first_layer = first_layer
        norm_name = next((name for name in FINAL_NORMS if hasattr(self.base, name)), None)
        if norm_name is None:
            raise ValueError(f"{type(self.base).__name__} has no final norm under any of the names {FINAL_NORMS}")
        self.norm = getattr(self.base, norm_name)
        self.head: Any = model.get_output_embeddings()
        self.softcap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self._arguments: OrderedDict[tuple[int, int], list[_Stub]] = OrderedDict()

    def _run_stubbed(self, input_ids: Tensor, first_stub: int) -> list[_Stub]:
        """The model's forward with layers ``first_stub`` and above replaced by stubs, which are returned."""
        stubs = [_Stub() for _ in self.layers[first_stub:]]
        replaced = self.layers[first_stub:]
        for layer, stub in zip(replaced, stubs, strict=True):
            layer.forward = stub
        try:
            with torch.no_grad():
                self.base(input_ids=input_ids, use_cache=False)
        finally:
            for layer in replaced:
                del layer.forward
        return stubs

    def prefix(self, input_ids: Tensor) -> Tensor:
        """States that enter the first suffix layer, for token ids (B, L): (B, L, d)."""
        stubs = self._run_stubbed(input_ids, self.first_layer)
        hidden = stubs[0].hidden
        assert hidden is not None
        return hidden

    def _layer_arguments(self, batch: int, length: int) -> list[_Stub]:
        shape = (batch, length)
        stubs = self._arguments.get(shape)
        if stubs is None:
            device = self.norm.weight.device
            stubs = self._run_stubbed(torch.zeros(shape, dtype=torch.long, device=device), 0)[self.first_layer :]
            for stub in stubs:
                stub.hidden = None
            self._arguments[shape] = stubs
            if len(self._arguments) > 256:
                self._arguments.popitem(last=False)
        else:
            self._arguments.move_to_end(shape)
        return stubs

    def run(self, hidden: Tensor) -> Tensor:
        """Final states before the last norm, from states (B, L, d) that enter the first suffix layer."""
        for layer, stub in zip(
            self.layers[self.first_layer :], self._layer_arguments(hidden.shape[0], hidden.shape[1]), strict=True
        ):
            output = layer(hidden, *stub.args, **stub.kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (P, |V|), at least in float32, from normalised final states (P, d)."""
        return self.capped(self.head(hidden))

    def capped(self, raw: Tensor) -> Tensor:
        """Logits, at least in float32, from the output head's (P, |V|)."""
        logits = at_least_float32(raw)
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def softcap_slope(self, logits: Tensor) -> Tensor | None:
        """Derivative of capped logits with respect to the head's output, by entry; None where nothing is capped."""
        return None if self.softcap is None else 1 - (logits / self.softcap).square()


def decoder_layers(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """The decoder of a causal LM and its list of layers.

    Raises:
        ValueError: the model has no list of as many layers as its configuration says.
    """
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return module, child
    raise ValueError(f"{type(model).__name__} has no list of its {count} decoder layers; it cannot be edited")
