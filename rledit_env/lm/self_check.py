"""Compares our forward passes with a model's own on a short text, and chooses the fastest that gives the same."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from rledit_env.lm.forward import FAILURES, Forward
from rledit_env.lm.head import AfterHead, OutputHead, read_after_head
from rledit_env.lm.hooks import module_hooks
from rledit_env.lm.kernels.layout import Layout
from rledit_env.lm.kernels.products import FASTER
from rledit_env.lm.kernels.switch import FastModules
from rledit_env.lm.module_calls import execution_device
from rledit_env.lm.modules import LinearModule, decoder_layers
from rledit_env.lm.precision import at_least_float32, same_numbers
from rledit_env.lm.suffix import SuffixForward
from rledit_env.lm.tokens import embedded_tokens
from rledit_env.lm.whole import WholeForward

_TEXT = "The capital of France is Paris, and that of Peru is Lima."
_TOKENS, _SHARED = 8, 5  # tokens of the text, and of its beginning, which is run in the same batch
_PLAIN = {*FASTER, *FASTER.values()}  # classes that only multiply by their weight
# Ways to run a model, the fastest first: whether with our faster modules, and whether layer by layer.
_WAYS = [(True, True), (True, False), (False, True), (False, False)]
_SLOWER = {
    (True, False): "the layers of {} cannot be run one by one to its own logits; its own forward is used, which is "
    "slower",
    (False, True): "our faster modules do not give the logits of {}; its own modules are used, which are slower",
    (False, False): "neither our faster modules nor its layers one by one give the logits of {}; its own forward is "
    "used, which is slower",
}


class OwnPass:
    """The results of a model's own forward for one short text, before any module is replaced.

    Args:
        model: a causal LM in evaluation mode.
        tokenizer: its tokenizer.
        linear: its linear modules that might be edited, by name.

    Attributes:
        output: the output head, with the scale or cap after it.
        unfit: name of a linear module that cannot be edited → why.
        overwritten: names of linear modules whose outputs the model changes in place (Falcon, Llama 4).

    Raises:
        ValueError: the model is no causal LM, or its logits do not come from an output head.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, linear: Mapping[str, LinearModule]
    ) -> None:
        head = output_head(model)
        self.kind, self.unfit = type(model).__name__, dict[str, str]()
        self.overwritten: set[str] = set()
        self._ids = _text_ids(tokenizer, len(head.weight)).to(execution_device(head))
        head_outputs: list[Tensor] = []
        keep_output = [(head, lambda _module, _args, output: head_outputs.append(output))]
        with torch.no_grad(), module_hooks(keep_output), self._watch_calls(linear):
            logits = model(input_ids=self._ids, use_cache=False).logits
        if not head_outputs or head_outputs[-1].shape != logits.shape:
            raise ValueError(f"{self.kind} cannot be edited: its logits do not come from one output head")
        is_unchanged = torch.equal(head_outputs[-1].to(logits.dtype), logits)
        after = AfterHead() if is_unchanged else read_after_head(model, head, self._ids)
        if after is None:
            raise ValueError(
                f"{self.kind} cannot be edited: it changes the logits of its output head in a way that is neither a "
                "factor nor a cap"
            )
        self.output = OutputHead(head, after)
        self._logits: Tensor | None = at_least_float32(logits[0])  # until :meth:`forward` has compared its ways
        self._precision = logits.dtype
        self._chosen_ways: dict[bool, tuple[bool, bool]] = {}  # ``optimize`` → the way chosen for it

    def forward(
        self, model: PreTrainedModel, modules: Mapping[str, LinearModule], name: str, optimize: bool
    ) -> tuple[SuffixForward | WholeForward, FastModules | None]:
        """The fastest way to run the model that gives its own logits, and the faster modules now in it, if any.

        The ways are tried once per model. A warning says so where the chosen way is slower than the one asked for.

        Args:
            model: the model.
            modules: the edited modules by name.
            name: the model's name in messages.
            optimize: whether its modules may be replaced by faster ones with the same results.

        Raises:
            ValueError: no way gives the model's own logits.
        """
        _, layers = decoder_layers(model)
        edited = [i for i, layer in enumerate(layers) if set(modules.values()) & set(layer.modules())]
        known_way, failure = self._chosen_ways.get(optimize), None
        if known_way is None and self._logits is None:  # the ways for the other ``optimize`` were tried before
            self._logits = self._compute_logits(model)
        for has_kernels, is_split in [known_way] if known_way else [way for way in _WAYS if optimize or not way[0]]:
            fast, is_chosen = FastModules(model) if has_kernels else None, False
            try:
                forward: SuffixForward | WholeForward = WholeForward(model, layers, self.output)
                if is_split:
                    forward = SuffixForward(model, min(edited), max(edited), self.output)
                if known_way or self._agrees(forward, modules):
                    self._remember((has_kernels, is_split), name or self.kind, optimize)
                    is_chosen = True
                    return forward, fast
            except FAILURES as error:  # an unfamiliar architecture
                failure = None if is_split else error
            finally:
                if fast is not None and not is_chosen:
                    fast.undo()
        detail = "" if failure is None else f" ({' '.join(str(failure).split())[:200]})"
        raise ValueError(
            f"{name or self.kind} ({self.kind}) cannot be edited: what it gives for a token depends on later tokens or "
            f"on other texts beside it{detail}; give a decoder-only model, one that is made to continue texts"
        )

    @torch.no_grad()
    def _compute_logits(self, model: PreTrainedModel) -> Tensor:
        """The text's logits (_TOKENS, |V|) by the model's own forward."""
        return at_least_float32(model(input_ids=self._ids, use_cache=False).logits[0])

    def _remember(self, way: tuple[bool, bool], name: str, optimize: bool) -> None:
        """Remember the chosen way, and warn where it is a slow one."""
        if optimize not in self._chosen_ways:
            slower = _SLOWER.get((way[0] or not optimize, way[1]))
            if slower is not None:
                warnings.warn(f"{name}: {slower.format(self.kind)}", stacklevel=5)
        self._chosen_ways[optimize], self._logits = way, None

    @torch.no_grad()
    def _agrees(self, forward: Forward, modules: Mapping[str, LinearModule]) -> bool:
        """Whether one pass of the text and its beginning, padded to the same length, gives the model's own logits for
        both, and the inputs of the edited modules are the batch's tokens row by row."""
        assert self._logits is not None
        layout = Layout.padded([_TOKENS, _SHARED])
        places = layout.places([range(_TOKENS), range(_SHARED)], forward.device)
        batch = layout.batch([self._ids[0], self._ids[0, :_SHARED]]).to(forward.device)
        all_inputs: list[Tensor] = []

        def record(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            all_inputs.append(args[0])

        with module_hooks(before=[(module, record) for module in modules.values()]):
            logits = forward.logits(forward.final_states(forward.prefix(batch, layout), places, layout))
        rows = [inputs.reshape(2, -1, inputs.shape[-1])[:, :_SHARED] for inputs in all_inputs]
        return same_numbers(logits, torch.cat([self._logits, self._logits[:_SHARED]]), self._precision) and all(
            same_numbers(second, first, self._precision) for first, second in rows
        )

    @contextmanager
    def _watch_calls(self, linear: Mapping[str, LinearModule]) -> Iterator[None]:
        """Context that fills :attr:`unfit` and :attr:`overwritten` by how a forward of the text calls these modules."""
        calls: Counter[str] = Counter()
        outputs: dict[str, tuple[Tensor, int]] = {}  # name → output, and its version when it was returned

        def watch(name: str, module: LinearModule, args: tuple[object, ...], output: object) -> None:
            calls[name] += 1
            if (reason := _why_unfit(module, args, output)) is not None:
                self.unfit[name] = reason
            elif isinstance(output, Tensor):
                outputs[name] = output, output._version

        with module_hooks([(module, partial(watch, name)) for name, module in linear.items()]):
            yield
        self.overwritten = {name for name, (output, version) in outputs.items() if output._version > version}
        for name in linear:
            if calls[name] == 0:
                self.unfit[name] = "the model's forward does not call it"
            elif calls[name] > 1:
                self.unfit[name] = f"the model's forward calls it {calls[name]} times in one pass"


_own_passes: WeakKeyDictionary[PreTrainedModel, OwnPass] = WeakKeyDictionary()


def own_pass(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, linear: Mapping[str, LinearModule]
) -> OwnPass:
    """The model's :class:`OwnPass`, which is made once per model."""
    known_pass = _own_passes.get(model)
    if known_pass is None or known_pass.output.module is not output_head(model):
        known_pass = _own_passes[model] = OwnPass(model, tokenizer, linear)
    return known_pass


def output_head(model: PreTrainedModel) -> Any:
    """The linear module that gives a model's logits.

    Raises:
        ValueError: there is none.
    """
    head: Any = model.get_output_embeddings()
    if head is None:
        heads = [m for m in model.modules() if isinstance(m, nn.Linear) and len(m.weight) == embedded_tokens(model)]
        if not heads:
            raise ValueError(f"{type(model).__name__} has no output head; give a causal language model")
        head = heads[-1]
    return head


def _text_ids(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Tensor:
    """Token ids (1, _TOKENS) of the text."""
    ids = [*tokenizer(_TEXT)["input_ids"], *range(1, _TOKENS)]
    return torch.tensor([[i % vocabulary for i in ids[:_TOKENS]]])


def _why_unfit(module: LinearModule, args: tuple[object, ...], output: object) -> str | None:
    """Why a linear module cannot be edited, judging by this call of it for the text; None where it can."""
    if len(args) != 1 or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
        return "it takes more than its input, or gives more than its output"
    keys, width = args[0], args[0].shape[-1]
    if keys.numel() != _TOKENS * width:
        return "it does not see every token once"
    if type(module) in _PLAIN:
        return None
    weight = module.weight.t() if isinstance(module, Conv1D) else module.weight
    if weight.is_meta or weight.shape != (output.shape[-1], width):
        return f"{type(module).__name__} keeps its weight in another form"
    product = F.linear(keys, weight, module.bias)
    same = same_numbers(product, output, keys.dtype)
    return None if same else f"{type(module).__name__} does more than multiply by its weight"
