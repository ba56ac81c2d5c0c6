"""The forward pass of an edited LLM, computing only what an edit can change.

Layers below the first edited one see weights that never change: their output is computed once per passage and cached
(:class:`PrefixCache`). The layers above run on cached states (:class:`SuffixForward.run`), and the output head is
applied at the positions that predict an answer token only.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rledit_env.lm.products import compiled, linear

TOKEN_CHOICES = ("answer", "subject", "subject+answer", "all")
FINAL_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm")
ATTENTIONS = ("self_attn", "attn", "attention", "self_attention")


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


@cache
def even_shape(rows: int, length: int, quantum: int) -> tuple[int, int]:
    """The smallest batch (rows, length) that holds this one and whose tokens are a multiple of ``quantum``, or of four
    times as many where there are more than 32 of them."""
    if rows * length > 32 * quantum > 32:
        quantum *= 4
    shapes = [
        (-(-rows // step) * step, wide)
        for wide in range(length, length + quantum)
        for step in [quantum // math.gcd(wide, quantum)]
    ]
    return min(shapes, key=lambda shape: shape[0] * shape[1])


def cheapest_chunks(
    lengths: Sequence[int],
    max_tokens: int,
    streams: Sequence[int] | None = None,
    pass_tokens: int = 64,
    quantum: int = 1,
) -> Iterator[list[int]]:
    """Indices of ``lengths`` in chunks of at most ``max_tokens`` padded tokens (or one passage), each stream's members
    side by side.

    Of the ways to cut the passages, sorted by length, into chunks, the one whose passes cost least is taken. A pass
    costs its tokens, padded to :func:`even_shape`, and as much as ``pass_tokens`` more for being one (measured with
    135M parameters in bfloat16 on a CPU). Passages of one length are sorted by stream, so that a chunk meets few
    streams' weights. Chunks of more than 32 passages are multiples of 16, which keeps the search short.
    """
    streams = [0] * len(lengths) if streams is None else streams
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], streams[i]))
    cost, first = [0], [0]  # of the first k passages: the least cost, and where the last chunk of that begins
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        best, chosen = -1, end - 1
        most = min(end, max(1, max_tokens // longest))
        for size in chain(range(1, min(most, 32) + 1), range(48, most + 1, 16)):
            begin = end - size
            rows, wide = even_shape(size, longest, quantum)
            if best < 0 or cost[begin] + rows * wide < best:
                best, chosen = cost[begin] + rows * wide, begin
        cost.append(best + pass_tokens)
        first.append(chosen)
    chunks: list[list[int]] = []
    end = len(order)
    while end:
        chunks.append(sorted(order[first[end] : end], key=streams.__getitem__))
        end = first[end]
    yield from reversed(chunks)


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


class _Reached(Exception):
    """A layer's attention was called."""


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within it, calling the module calls this instead of its ``forward``."""
    earlier = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if earlier is None:
            del module.forward
        else:
            module.forward = earlier


class SuffixForward:
    """Splits a Hugging Face causal LM at a decoder layer.

    The arguments that the model gives its layers (masks, rotary embeddings, windows) are recorded from the model's own
    forward with its layers replaced by stubs, so that nothing of an architecture is written again here. Passages are
    padded on the right: with causal attention no real token sees the padding, hence no padding mask is needed.

    Args:
        model: a causal LM in evaluation mode.
        first_layer: index of the first layer of the suffix.
        last_edited: index of the last layer that holds an edited module.
    """

    def __init__(self, model: PreTrainedModel, first_layer: int, last_edited: int) -> None:
        self.model = model
        self.base, self.layers = decoder_layers(model)
        self.first_layer, self.last_edited = first_layer, last_edited
        self._attention = ""  # the name of a layer's attention, once needed
        norm_name = next((name for name in FINAL_NORMS if hasattr(self.base, name)), None)
        if norm_name is None:
            raise ValueError(f"{type(self.base).__name__} has no final norm under any of the names {FINAL_NORMS}")
        self.norm = getattr(self.base, norm_name)
        self.head: Any = model.get_output_embeddings()
        self.softcap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self._arguments: OrderedDict[tuple[int, int], list[_Stub]] = OrderedDict()

    @property
    def quantum(self) -> int:
        """Rows of matrix products are kept to multiples of this (see `rledit_env.lm.products`).

        In float32 a size costs more memory than in bfloat16: 32 instead of 16 is 50 to 100 MB less at the peak of a
        training step of 135M parameters, and 1 % of its time.
        """
        weight = self.norm.weight
        if not compiled(weight, 16 * len(weight) ** 2):
            return 1
        return 16 if weight.dtype.itemsize == 2 else 32

    @property
    def device(self) -> torch.device:
        """Where the final states are computed, wherever the weights rest."""
        hook = getattr(self.norm, "_hf_hook", None)  # of a model loaded with a device map
        given = getattr(hook, "execution_device", None)
        return self.norm.weight.device if given is None else torch.device(given)

    def _run_stubbed(self, input_ids: Tensor, first_stub: int, **options: Any) -> list[_Stub]:
        """The model's forward (given ``options`` too) with layers ``first_stub`` and above replaced by stubs, which
        are returned."""
        stubs = [_Stub() for _ in self.layers[first_stub:]]
        with ExitStack() as stack, torch.no_grad():
            for layer, stub in zip(self.layers[first_stub:], stubs, strict=True):
                stack.enter_context(replaced_forward(layer, stub))
            self.base(input_ids=input_ids, **{"use_cache": False, **options})
        return stubs

    def run_below(self, input_ids: Tensor, layer: int) -> None:
        """Run the layers below one, and no others, on token ids (B, L): for what hooks on their modules see."""
        self._run_stubbed(input_ids, layer)

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
            stubs = self._run_stubbed(torch.zeros(shape, dtype=torch.long, device=self.device), 0)[self.first_layer :]
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
        arguments = self._layer_arguments(hidden.shape[0], hidden.shape[1])
        return self._through(self.layers[self.first_layer :], arguments, hidden)

    def run_to(self, hidden: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """:meth:`run` at some positions only, (P, d): in the last layer, whatever follows the attention is computed
        for them alone."""
        if not self.narrows:
            return self.run(hidden)[rows, columns]
        arguments = self._layer_arguments(hidden.shape[0], hidden.shape[1])
        hidden = self._through(self.layers[self.first_layer : -1], arguments, hidden)
        return self._last_at(hidden, arguments[-1], rows, columns)

    @staticmethod
    def _through(layers: Iterable[Any], arguments: Iterable[_Stub], hidden: Tensor) -> Tensor:
        for layer, stub in zip(layers, arguments, strict=False):
            output = layer(hidden, *stub.args, **stub.kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden

    def _last_at(self, hidden: Tensor, stub: _Stub, rows: Tensor, columns: Tensor) -> Tensor:
        """The last layer's states (P, d) at some positions, from those (B, L, d) that enter it.

        The layer runs twice: for all positions as far as its attention, which alone looks at other positions, and for
        the chosen ones (as one sequence) with the attention's output given.
        """
        layer: Any = self.layers[-1]
        attention: Any = getattr(layer, self._attention)
        called: list[Any] = []

        def stop(*args: Any, **kwargs: Any) -> Any:
            called.extend((args, kwargs))
            raise _Reached

        with replaced_forward(attention, stop), suppress(_Reached):
            layer(hidden, *stub.args, **stub.kwargs)
        output = attention(*called[0], **called[1])
        chosen = (output[0] if isinstance(output, tuple) else output)[rows, columns][None]
        given = (chosen, *output[1:]) if isinstance(output, tuple) else chosen
        with replaced_forward(attention, lambda *_args, **_kwargs: given):
            return self._through([layer], [stub], hidden[rows, columns][None])[0]

    @cached_property
    def narrows(self) -> bool:
        """Whether the last layer can be computed at some positions only: no edited module is in it, and doing so gives
        what the whole layer gives (tried once, on this very model)."""
        found = [name for name in ATTENTIONS if hasattr(self.layers[-1], name)]
        if self.last_edited >= len(self.layers) - 1 or not found:
            return False
        self._attention = found[0]
        weight = self.norm.weight
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(2, 3, len(weight), generator=generator).to(self.device, weight.dtype)
        rows, columns = torch.tensor([0, 1, 1]), torch.tensor([2, 0, 1])
        stub = self._layer_arguments(2, 3)[-1]
        with torch.no_grad():
            whole = self._through(self.layers[-1:], [stub], hidden)[rows, columns]
            try:
                mine = self._last_at(hidden, stub, rows, columns)
            except (IndexError, RuntimeError, TypeError, ValueError):  # a layer of another make
                return False
        tolerance = 0.05 if weight.dtype in (torch.bfloat16, torch.float16) else 1e-4
        return mine.shape == whole.shape and float((mine - whole).abs().max()) <= tolerance * float(whole.abs().max())

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (P, |V|), at least in float32, from normalised final states (P, d)."""
        return self.capped(self.head(hidden))

    def back_through_head(self, cotangents: Tensor) -> Tensor:
        """Gradients (P, d) for the head's input from those (P, |V|) for its output."""
        if not self.head.weight.is_meta:
            return linear(cotangents, self.head.weight.t())
        from accelerate.utils import align_module_device  # the weight rests on the host or the disk

        with align_module_device(self.head, self.device):
            return linear(cotangents, self.head.weight.t())

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
