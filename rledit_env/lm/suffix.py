"""The forward pass of an edited LLM, computing only what an edit can change.

Layers below the first edited one see weights that never change: their output is computed once per passage and cached
(`rledit_env.lm.passes.PrefixCache`). The layers above run on cached states (:class:`SuffixForward.run`), and the output
head is applied at the positions that predict an answer token only.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rledit_env.lm.head import OutputHead
from rledit_env.lm.kernels.layout import Layout
from rledit_env.lm.kernels.packing import NAME, SHORT, packed
from rledit_env.lm.kernels.products import compiled
from rledit_env.lm.module_calls import Reached, execution_device, replaced_forward
from rledit_env.lm.modules import decoder_layers
from rledit_env.lm.whole import WholeForward

FINAL_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "norm_f", "layer_norm")
ATTENTIONS = ("self_attn", "attn", "attention", "self_attention")


class Stub:
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
    padded on the right (with causal attention no real token sees the padding, hence no padding mask is needed), or lie
    end to end in one row where the attention is known to keep them apart (:attr:`longest_packed`).

    Args:
        model: a causal LM in evaluation mode.
        first_layer: index of the first layer of the suffix.
        last_edited: index of the last layer that holds an edited module.
        output: the model's output head.

    Raises:
        ValueError: the model has no layers or no final norm where they are sought.
    """

    def __init__(self, model: PreTrainedModel, first_layer: int, last_edited: int, output: OutputHead) -> None:
        self.model, self.output = model, output
        self._config = model.config.get_text_config()
        self.base, self.layers = decoder_layers(model)
        self.first_layer, self.last_edited = first_layer, last_edited
        self._attention = ""  # the name of a layer's attention, once needed
        self.continues: bool | None = None  # whether passages' tails can be run alone, once tried
        norm_name = next((name for name in FINAL_NORMS if hasattr(self.base, name)), None)
        if norm_name is None:
            raise ValueError(f"{type(self.base).__name__} has no final norm under any of the names {FINAL_NORMS}")
        self.norm = getattr(self.base, norm_name)
        self._arguments: OrderedDict[tuple[int, int], list[Stub]] = OrderedDict()

    @property
    def quantum(self) -> int:
        """Rows of matrix products are kept to multiples of this (see `rledit_env.lm.kernels.products`).

        In float32 a size costs more memory than in bfloat16: 32 instead of 16 is 50 to 100 MB less at the peak of a
        training step of 135M parameters, and 1 % of its time.
        """
        weight = self.output.module.weight  # (|V|, d)
        if not compiled(weight, 16 * weight.shape[1] ** 2):
            return 1
        return 16 if weight.dtype.itemsize == 2 else 32

    @property
    def device(self) -> torch.device:
        """Where the final states are computed, wherever the weights rest."""
        return execution_device(self.norm if hasattr(self.norm, "weight") else self.output.module)

    @property
    def cache_argument(self) -> str:
        """What this release of transformers calls the decoder's argument for cached keys and values."""
        names = inspect.signature(self.base.forward).parameters
        return "cache" if "cache" in names else "past_key_values"

    def _run_stubbed(self, input_ids: Tensor, first_stub: int, **options: Any) -> list[Stub]:
        """The model's forward (given ``options`` too) with layers ``first_stub`` and above replaced by stubs, which
        are returned."""
        stubs = [Stub() for _ in self.layers[first_stub:]]
        with ExitStack() as stack, torch.no_grad():
            for layer, stub in zip(self.layers[first_stub:], stubs, strict=True):
                stack.enter_context(replaced_forward(layer, stub))
            self.base(input_ids=input_ids, **{"use_cache": False, **options})
        return stubs

    def run_below(self, input_ids: Tensor, layer: int) -> None:
        """Run the layers below one, and no others, on token ids (B, L): for what hooks on their modules see."""
        self._run_stubbed(input_ids, layer)

    def prefix(self, input_ids: Tensor, layout: Layout) -> Tensor:
        """States that enter the first suffix layer, for token ids (B, L): (B, L, d)."""
        hidden = self._run_laid_out(input_ids, self.first_layer, layout)[0].hidden
        assert hidden is not None
        return hidden

    def _run_laid_out(self, input_ids: Tensor, first_stub: int, layout: Layout) -> list[Stub]:
        """:meth:`_run_stubbed` of passages that lie so in the batch."""
        options = {"position_ids": layout.position_ids(input_ids.device)} if layout.packed else {}
        with packed(layout.packing):
            return self._run_stubbed(input_ids, first_stub, **options)

    def _layer_arguments(self, layout: Layout) -> list[Stub]:
        stubs = None if layout.packed else self._arguments.get(layout.shape)
        if stubs is None:
            ids = torch.zeros(layout.shape, dtype=torch.long, device=self.device)
            stubs = self._run_laid_out(ids, 0, layout)[self.first_layer :]
            for stub in stubs:
                stub.hidden = None
            if layout.packed:  # such a row hardly ever comes again
                return stubs
            self._arguments[layout.shape] = stubs
            if len(self._arguments) > 256:
                self._arguments.popitem(last=False)
        else:
            self._arguments.move_to_end(layout.shape)
        return stubs

    def run(self, hidden: Tensor, layout: Layout) -> Tensor:
        """Final states before the last norm, from states (B, L, d) that enter the first suffix layer."""
        with packed(layout.packing):
            return self._through(self.layers[self.first_layer :], self._layer_arguments(layout), hidden)

    def run_to(self, hidden: Tensor, places: Tensor, layout: Layout) -> Tensor:
        """:meth:`run` at some of the batch's tokens only, (P, d), counted row by row: in the last layer, whatever
        follows the attention is computed for them alone."""
        if not self.narrows:
            return self.run(hidden, layout).flatten(0, 1)[places]
        arguments = self._layer_arguments(layout)
        with packed(layout.packing):
            hidden = self._through(self.layers[self.first_layer : -1], arguments, hidden)
            return self._last_at(hidden, arguments[-1], places)

    @staticmethod
    def _through(layers: Iterable[Any], arguments: Iterable[Stub], hidden: Tensor) -> Tensor:
        for layer, stub in zip(layers, arguments, strict=False):
            output = layer(hidden, *stub.args, **stub.kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden

    def _last_at(self, hidden: Tensor, stub: Stub, places: Tensor) -> Tensor:
        """The last layer's states (P, d) at some tokens, from those (B, L, d) that enter it.

        The layer runs twice: for all tokens as far as its attention, which alone looks at other tokens, and for the
        chosen ones (as one sequence) with the attention's output given.
        """
        layer: Any = self.layers[-1]
        attention: Any = getattr(layer, self._attention)
        called: list[Any] = []

        def stop(*args: Any, **kwargs: Any) -> Any:
            called.extend((args, kwargs))
            raise Reached

        with replaced_forward(attention, stop), suppress(Reached):
            layer(hidden, *stub.args, **stub.kwargs)
        output = attention(*called[0], **called[1])
        chosen = (output[0] if isinstance(output, tuple) else output).flatten(0, 1)[places][None]
        given = (chosen, *output[1:]) if isinstance(output, tuple) else chosen
        with replaced_forward(attention, lambda *_args, **_kwargs: given):
            return self._through([layer], [stub], hidden.flatten(0, 1)[places][None])[0]

    @cached_property
    def narrows(self) -> bool:
        """Whether the last layer can be computed at some positions only: no edited module is in it, and doing so gives
        what the whole layer gives (tried once, on this very model)."""
        found = [name for name in ATTENTIONS if hasattr(self.layers[-1], name)]
        if self.last_edited >= len(self.layers) - 1 or not found:
            return False
        self._attention = found[0]
        layout = Layout.padded([3, 3])
        hidden, places = self._numbers(layout), torch.tensor([2, 3, 4])
        stub = self._layer_arguments(layout)[-1]
        with torch.no_grad():
            whole = self._through(self.layers[-1:], [stub], hidden).flatten(0, 1)[places]
            try:
                mine = self._last_at(hidden, stub, places)
            except (IndexError, RuntimeError, TypeError, ValueError):  # a layer of another make
                return False
        return self._agree(mine, whole)

    @cached_property
    def _attends_only(self) -> bool:
        """Whether every layer has an attention, so that keys and values are all that it keeps of earlier tokens."""
        return all(any(hasattr(layer, name) for name in ATTENTIONS) for layer in self.layers)

    @property
    def batching(self) -> str:
        """All texts together, where keys and values are all that is kept; else what the model's own forward allows."""
        return "padded" if self._attends_only else self._whole().batching

    def _whole(self) -> WholeForward:
        return WholeForward.of(self)

    @property
    def shares(self) -> bool:
        """Whether passages end to end may hold once what they begin with: on a CPU. A GPU has a kernel of its own for
        sequences end to end, which takes each whole; what sharing would gain there was not measured."""
        return self.device.type == "cpu"

    @property
    def longest_packed(self) -> int:
        """Tokens of the longest passages that may lie end to end in one row; 0 where none may: where the attention is
        not (or no longer) `rledit_env.lm.kernels.attention`'s, which alone keeps them apart, or :attr:`packs` says so.
        """
        return self.packs if self._config._attn_implementation == NAME else 0

    @cached_property
    def packs(self) -> int:
        """:attr:`longest_packed` with that attention: 0 where the model, embeddings and all, does not give passages
        that lie so what it gives each alone (tried once, on this very model)."""
        if any(hasattr(layer, "_hf_hook") for layer in self.layers):
            return 0
        # Of tokens that are all different, but for one beginning, which the row holds once where rows may.
        texts = [torch.arange(1, 6), torch.tensor([1, 2, 6, 7]), torch.arange(8, 15)]
        lengths = [len(text) for text in texts]
        row = Layout.sharing([text.tolist() for text in texts], [0] * 3) if self.shares else Layout.end_to_end(lengths)
        found = []
        for layout in (row, Layout.padded(lengths)):
            with torch.no_grad():
                try:
                    final = self.run(self.prefix(layout.batch(texts).to(self.device), layout), layout)
                except (IndexError, RuntimeError, TypeError, ValueError):  # a model of another make
                    return 0
            found.append(torch.cat(layout.split(final)).double())
        mine, whole = found
        # Token by token, since some have states a thousand times as large as the others'.
        tolerance = 0.1 if final.dtype in (torch.bfloat16, torch.float16) else 1e-3
        same = bool(((mine - whole).norm(dim=1) <= tolerance * whole.norm(dim=1)).all())
        windows = [getattr(self._config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        return min([SHORT, *(w for w in windows if w)]) if same else 0

    def _numbers(self, layout: Layout) -> Tensor:
        """States (B, L, d) to try something on."""
        weight = self.output.module.weight
        generator = torch.Generator().manual_seed(0)
        return torch.randn(*layout.shape, weight.shape[1], generator=generator).to(self.device, weight.dtype)

    @staticmethod
    def _agree(mine: Tensor, whole: Tensor) -> bool:
        tolerance = 0.05 if mine.dtype in (torch.bfloat16, torch.float16) else 1e-4
        return mine.shape == whole.shape and float((mine - whole).abs().max()) <= tolerance * float(whole.abs().max())

    def final_states(self, prefix: Tensor, places: Tensor, layout: Layout) -> Tensor:
        """Normalised final states (P, d) at some of the batch's tokens, counted row by row, from the states (B, L, d)
        that enter the first suffix layer."""
        return self.norm(self.run_to(prefix, places, layout))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (P, |V|), at least in float32, from normalised final states (P, d)."""
        return self.output.logits(hidden)

    def extended(self, input_ids: Tensor, length: int, draw: Callable[[Tensor], Tensor]) -> Tensor:
        """Texts (R, L + length) from their first tokens (R, L), each next token drawn from the logits (R, |V|)."""
        if not self._attends_only:
            return self._whole().extended(input_ids, length, draw)
        cache, ids, text = DynamicCache(), input_ids, [input_ids]
        for _ in range(length):
            options: dict[str, Any] = {"use_cache": True, self.cache_argument: cache}
            hidden = self.base(input_ids=ids, **options).last_hidden_state[:, -1]
            ids = draw(self.logits(hidden.contiguous()))
            text.append(ids)
        return torch.cat(text, dim=1)
