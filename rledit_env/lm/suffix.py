"""The forward pass of an edited LLM, computing only what an edit can change.

The weights of layers below the first edited one never change, so their output is computed once per passage and cached
(`rledit_env.lm.passes.PrefixCache`). The layers above run on the cached states (:meth:`SuffixForward.run`). The output
head is applied only at positions that predict an answer token.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from rledit_env.lm.forward import FAILURES
from rledit_env.lm.head import OutputHead
from rledit_env.lm.kernels.layout import Layout
from rledit_env.lm.kernels.packing import NAME, SHORT, Past, packed
from rledit_env.lm.kernels.products import compiled
from rledit_env.lm.module_calls import Reached, execution_device, replaced_forward
from rledit_env.lm.modules import decoder_layers
from rledit_env.lm.whole import WholeForward

FINAL_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "norm_f", "layer_norm")
ATTENTIONS = ("self_attn", "attn", "attention", "self_attention")


class Stub:
    """Replaces a decoder layer's ``forward``: records the layer's arguments and returns its input states."""

    def __init__(self) -> None:
        self.hidden: Tensor | None = None
        self.args: tuple[object, ...] = ()
        self.kwargs: dict[str, object] = {}

    def __call__(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        self.hidden, self.args, self.kwargs = hidden_states, args, kwargs
        return hidden_states


class SuffixForward:
    """Splits a Hugging Face causal LM at a decoder layer.

    The arguments that the model gives its layers (masks, rotary embeddings, windows) are recorded from the model's own
    forward with its layers replaced by stubs, so no architecture's code is repeated here. Passages are padded on the
    right (with causal attention no real token sees the padding, so no padding mask is needed), or packed in one row
    where the attention is known to keep them apart (:attr:`longest_packed`).

    Args:
        model: a causal LM in evaluation mode.
        first_layer: index of the first layer of the suffix.
        last_edited: index of the last layer that holds an edited module.
        output: the model's output head.

    Raises:
        ValueError: the model has no list of layers, or no final norm under a known name.
    """

    def __init__(self, model: PreTrainedModel, first_layer: int, last_edited: int, output: OutputHead) -> None:
        self.model, self.output = model, output
        self._config = model.config.get_text_config()
        self.base, self.layers = decoder_layers(model)
        self.first_layer, self.last_edited = first_layer, last_edited
        self._attention = ""  # name of the attention in a layer; :attr:`narrows` sets it
        self.continues: bool | None = None  # whether passages' tails can be run alone; None before a trial
        norm_name = next((name for name in FINAL_NORMS if hasattr(self.base, name)), None)
        if norm_name is None:
            raise ValueError(f"{type(self.base).__name__} has no final norm under any of the names {FINAL_NORMS}")
        self.norm = getattr(self.base, norm_name)
        self._arguments: OrderedDict[tuple[int, int], list[Stub]] = OrderedDict()

    @property
    def quantum(self) -> int:
        """The number of rows of matrix products is kept to multiples of this (see `rledit_env.lm.kernels.products`).

        In float32 each size takes more memory than in bfloat16: 32 instead of 16 saves 50 to 100 MB at the peak of a
        training step of 135M parameters, and costs 1 % of its time.
        """
        weight = self.output.module.weight  # (|V|, d)
        if not compiled(weight, 16 * weight.shape[1] ** 2):
            return 1
        return 16 if weight.dtype.itemsize == 2 else 32

    @property
    def device(self) -> torch.device:
        """The device that computes final states; the weights may be kept elsewhere."""
        return execution_device(self.norm if hasattr(self.norm, "weight") else self.output.module)

    @property
    def cache_argument(self) -> str:
        """Name of the decoder's argument for cached keys and values, which depends on the release of transformers."""
        names = inspect.signature(self.base.forward).parameters
        return "cache" if "cache" in names else "past_key_values"

    def _run_stubbed(self, input_ids: Tensor, first_stub: int, **options: object) -> list[Stub]:
        """Run the model's forward, with ``options``, and layers ``first_stub`` and above replaced by stubs.

        Returns the stubs.
        """
        stubs = [Stub() for _ in self.layers[first_stub:]]
        with ExitStack() as stack, torch.no_grad():
            for layer, stub in zip(self.layers[first_stub:], stubs, strict=True):
                stack.enter_context(replaced_forward(layer, stub))
            self.base(input_ids=input_ids, **{"use_cache": False, **options})
        return stubs

    def run_below(self, input_ids: Tensor, layer: int) -> None:
        """Run only the layers below ``layer`` on token ids (B, L), for hooks on their modules."""
        self._run_stubbed(input_ids, layer)

    def prefix(self, input_ids: Tensor, layout: Layout) -> Tensor:
        """States (B, L, d) that enter the first suffix layer, for token ids (B, L)."""
        hidden = self._run_batch(input_ids, self.first_layer, layout)[0].hidden
        assert hidden is not None
        return hidden

    def _run_batch(self, input_ids: Tensor, first_stub: int, layout: Layout) -> list[Stub]:
        """Call :meth:`_run_stubbed` for passages with this layout."""
        options = {"position_ids": layout.position_ids(input_ids.device)} if layout.packed else {}
        with packed(layout.packing):
            return self._run_stubbed(input_ids, first_stub, **options)

    def _layer_arguments(self, layout: Layout) -> list[Stub]:
        """The arguments of each suffix layer for a batch of this layout; those of padded batches are cached."""
        stubs = None if layout.packed else self._arguments.get(layout.shape)
        if stubs is None:
            ids = torch.zeros(layout.shape, dtype=torch.long, device=self.device)
            stubs = self._run_batch(ids, 0, layout)[self.first_layer :]
            for stub in stubs:
                stub.hidden = None
            if layout.packed:  # the same row hardly ever comes again
                return stubs
            self._arguments[layout.shape] = stubs
            if len(self._arguments) > 256:
                self._arguments.popitem(last=False)
        else:
            self._arguments.move_to_end(layout.shape)
        return stubs

    def run(self, hidden: Tensor, layout: Layout) -> Tensor:
        """Final states (B, L, d) before the last norm, from states (B, L, d) that enter the first suffix layer."""
        with packed(layout.packing):
            return self._run_layers(self.layers[self.first_layer :], self._layer_arguments(layout), hidden)

    def run_to(self, hidden: Tensor, places: Tensor, layout: Layout) -> Tensor:
        """:meth:`run` at some tokens only, (P, d); ``places`` are their indices in the batch, counted row by row.

        The last layer computes what follows its attention for these tokens only.
        """
        if not self.narrows:
            return self.run(hidden, layout).flatten(0, 1)[places]
        arguments = self._layer_arguments(layout)
        with packed(layout.packing):
            hidden = self._run_layers(self.layers[self.first_layer : -1], arguments, hidden)
            return self._run_last_layer(hidden, arguments[-1], places)

    @staticmethod
    def _run_layers(layers: Iterable[nn.Module], arguments: Iterable[Stub], hidden: Tensor) -> Tensor:
        for layer, stub in zip(layers, arguments, strict=False):
            output = layer(hidden, *stub.args, **stub.kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden

    def _run_last_layer(self, hidden: Tensor, stub: Stub, places: Tensor) -> Tensor:
        """Outputs (P, d) of the last layer at some tokens, from the states (B, L, d) that enter it.

        The layer runs twice: first for all tokens up to its attention, the only part that combines tokens, then for the
        chosen tokens, as one sequence, with the attention's output given.
        """
        layer = self.layers[-1]
        attention = layer.get_submodule(self._attention)
        called: list[Any] = []

        def stop(*args: object, **kwargs: object) -> NoReturn:
            called.extend((args, kwargs))
            raise Reached

        with replaced_forward(attention, stop), suppress(Reached):
            layer(hidden, *stub.args, **stub.kwargs)
        output = attention(*called[0], **called[1])
        chosen_output = (output[0] if isinstance(output, tuple) else output).flatten(0, 1)[places][None]
        attention_output = (chosen_output, *output[1:]) if isinstance(output, tuple) else chosen_output
        with replaced_forward(attention, lambda *_args, **_kwargs: attention_output):
            return self._run_layers([layer], [stub], hidden.flatten(0, 1)[places][None])[0]

    @cached_property
    def narrows(self) -> bool:
        """Whether the last layer can be computed at some positions only: it has no edited module, and the results are
        those of the whole layer (tried once, on this model)."""
        names = [name for name in ATTENTIONS if hasattr(self.layers[-1], name)]
        if self.last_edited >= len(self.layers) - 1 or not names:
            return False
        self._attention = names[0]
        layout = Layout.padded([3, 3])
        hidden, places = self._random_states(layout), torch.tensor([2, 3, 4])
        stub = self._layer_arguments(layout)[-1]
        with torch.no_grad():
            expected = self._run_layers(self.layers[-1:], [stub], hidden).flatten(0, 1)[places]
            try:
                narrowed = self._run_last_layer(hidden, stub, places)
            except (IndexError, RuntimeError, TypeError, ValueError):  # a layer of unfamiliar architecture
                return False
        return self._agree(narrowed, expected)

    @cached_property
    def _attends_only(self) -> bool:
        """Whether every layer has an attention, so that it keeps only keys and values of earlier tokens."""
        return all(any(hasattr(layer, name) for name in ATTENTIONS) for layer in self.layers)

    @property
    def batching(self) -> str:
        """Texts of any length where layers keep only keys and values; else what the model's own forward allows."""
        return "padded" if self._attends_only else self._own_forward().batching

    def _own_forward(self) -> WholeForward:
        return WholeForward.of(self)

    @property
    def shares(self) -> bool:
        """Whether packed passages may store a shared prefix once: only on a CPU.

        A GPU's kernel for packed sequences takes each of them whole; what sharing would gain there was not measured.
        """
        return self.device.type == "cpu"

    @property
    def longest_packed(self) -> int:
        """Tokens of the longest passages that may be packed in one row: :attr:`packs`, or 0 where the attention is not
        (or no longer) that of `rledit_env.lm.kernels.attention`, the only one that keeps packed passages apart."""
        return self.packs if self._config._attn_implementation == NAME else 0

    @cached_property
    def packs(self) -> int:
        """:attr:`longest_packed` with that attention: 0 where the model, embeddings included, gives packed passages
        other states than padded ones (tried once, on this model)."""
        if any(hasattr(layer, "_hf_hook") for layer in self.layers):
            return 0
        # The texts have no token in common but a prefix of two of them, which the row stores once if :attr:`shares`.
        texts = [torch.arange(1, 6), torch.tensor([1, 2, 6, 7]), torch.arange(8, 15)]
        lengths = [len(text) for text in texts]
        row = Layout.sharing([text.tolist() for text in texts], [0] * 3) if self.shares else Layout.end_to_end(lengths)
        layout_states = []
        for layout in (row, Layout.padded(lengths)):
            with torch.no_grad():
                try:
                    final = self.run(self.prefix(layout.batch(texts).to(self.device), layout), layout)
                except (IndexError, RuntimeError, TypeError, ValueError):  # an unfamiliar architecture
                    return 0
            layout_states.append(torch.cat(layout.split(final)))
        same = _same_states(*layout_states)
        windows = [getattr(self._config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        return min([SHORT, *(w for w in windows if w)]) if same else 0

    def _random_states(self, layout: Layout) -> Tensor:
        """Random states (B, L, d) for a trial."""
        weight = self.output.module.weight
        generator = torch.Generator().manual_seed(0)
        return torch.randn(*layout.shape, weight.shape[1], generator=generator).to(self.device, weight.dtype)

    @staticmethod
    def _agree(states: Tensor, expected: Tensor) -> bool:
        if states.shape != expected.shape:
            return False
        tolerance = 0.05 if states.dtype in (torch.bfloat16, torch.float16) else 1e-4
        return float((states - expected).abs().max()) <= tolerance * float(expected.abs().max())

    @cached_property
    def continues_packed(self) -> bool:
        """Whether packed passages' last tokens can be run over the keys and values of their first ones, which ran
        before (tried once, on this model)."""
        if not (self.shares and self.longest_packed):
            return False
        rows, counts, sets = [[1, 2, 3, 4, 5], [1, 2, 6, 7], [*range(8, 15)], [15, 16, 17]], [2, 2, 3, 0], [0] * 4
        whole, (ahead, paths) = Layout.sharing(rows, sets), Layout.heads(rows, counts, sets)
        positions = [range(count, len(row)) for row, count in zip(rows, counts, strict=True)]

        def run(states: Sequence[Tensor], layout: Layout) -> Tensor:
            final = self.run(layout.batch(states), layout).flatten(0, 1)
            return final[layout.places(positions, final.device)]

        with torch.no_grad():
            states = whole.split(self._random_states(whole))
            try:
                firsts = [s[:count] for s, count in zip(states, counts, strict=True) if count]
                tails = Layout.tails(whole.lengths, paths, self.run_past(ahead.batch(firsts), ahead))
                return _same_states(run(states, tails), run(states, whole))
            except FAILURES:  # an unfamiliar architecture
                return False

    def run_past(self, prefix: Tensor, layout: Layout) -> Past:
        """Keys and values of a packed row, from the states (1, L, d) that enter the first suffix layer; no gradient."""
        assert layout.packing is not None
        past = layout.packing.written = Past(layout.packing.tokens)
        with torch.no_grad():
            self.run_to(prefix, torch.zeros(1, dtype=torch.long, device=prefix.device), layout)
        layout.packing.written = None
        return past

    def final_states(self, prefix: Tensor, places: Tensor, layout: Layout) -> Tensor:
        """Normalised final states (P, d) at some tokens, given by indices counted row by row, from the states (B, L, d)
        that enter the first suffix layer."""
        states: Tensor = self.norm(self.run_to(prefix, places, layout))
        return states

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (P, |V|), at least in float32, from normalised final states (P, d)."""
        return self.output.logits(hidden)

    def extended(self, input_ids: Tensor, length: int, draw: Callable[[Tensor], Tensor]) -> Tensor:
        """Texts (R, L + length) that begin with tokens (R, L); ``draw`` picks next tokens (R, 1) by logits (R, |V|)."""
        if not self._attends_only:
            return self._own_forward().extended(input_ids, length, draw)
        cache, ids, text = DynamicCache(), input_ids, [input_ids]
        for _ in range(length):
            options: dict[str, object] = {"use_cache": True, self.cache_argument: cache}
            hidden = self.base(input_ids=ids, **options).last_hidden_state[:, -1]
            ids = draw(self.logits(hidden.contiguous()))
            text.append(ids)
        return torch.cat(text, dim=1)


def _same_states(states: Tensor, expected: Tensor) -> bool:
    """Whether states (P, d) are the expected ones. They are compared token by token, since some tokens' states are a
    thousand times as large as others'."""
    tolerance = 0.1 if states.dtype in (torch.bfloat16, torch.float16) else 1e-3
    states, expected = states.double(), expected.double()
    return bool(((states - expected).norm(dim=1) <= tolerance * expected.norm(dim=1)).all())
