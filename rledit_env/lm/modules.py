"""A model's decoder layers, which of their modules can be edited, and why others cannot."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rledit_env.lm.names import expand_globs

LinearModule = nn.Linear | Conv1D

# Names of the projections that widen a feed-forward block's states → a glob for them. A model's first match is used.
_FEED_FORWARD: dict[tuple[str, ...], str] = {
    ("gate_proj", "up_proj"): "{gate,up}_proj",
    **{(name,): name for name in ("gate_up_proj", "up_proj", "c_fc", "fc_in", "fc1", "dense_h_to_4h")},
}
_READING = re.compile(r"\b([qkv]|query|key|value|gate|router)(_|\b)")  # modules that read the residual stream


def decoder_layers(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """The decoder of a causal LM and its list of layers: as many as its configuration says, or else the longest list.

    Raises:
        ValueError: the model has no list of layers.
    """
    decoder, count = model, None
    if isinstance(model, PreTrainedModel):
        decoder = model.get_decoder()  # without an image encoder
        count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [
        (module, child)
        for root in (decoder, model)
        for module in root.modules()
        for child in module.children()
        if isinstance(child, nn.ModuleList) and len(child)
    ]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of decoder layers; it cannot be edited")
    return next((pair for pair in lists if len(pair[1]) == count), max(lists, key=lambda pair: len(pair[1])))


def linear_modules(model: PreTrainedModel) -> dict[str, LinearModule]:
    """The linear modules inside a model's decoder layers by name, in the model's order.

    Raises:
        ValueError: the weights are quantised, or there is no such module.
    """
    kind = type(model).__name__
    _, layers = decoder_layers(model)
    if getattr(model, "is_quantized", False) or any(p.dtype.itemsize < 2 for p in layers.parameters()):
        raise ValueError(
            f"the weights of {kind} are quantised, and a quantised weight cannot be edited; load the model in float32 "
            "or bfloat16, or dequantise it first (model.dequantize())"
        )
    inside = {id(module) for module in layers.modules()}
    linear = {n: m for n, m in model.named_modules() if isinstance(m, LinearModule) and id(m) in inside}
    if not linear:
        raise ValueError(f"{kind} has no linear modules inside its decoder layers, so there is nothing to edit")
    return linear


def linear_module(model: PreTrainedModel, name: str) -> LinearModule:
    """A linear module of a model, by name."""
    module = model.get_submodule(name)
    assert isinstance(module, LinearModule), f"{name} is no linear module"
    return module


def chosen_modules(
    model: PreTrainedModel, linear: Mapping[str, LinearModule], unfit: Mapping[str, str], patterns: Sequence[str]
) -> dict[str, LinearModule]:
    """The modules to edit, by name or glob.

    Args:
        model: the model.
        linear: its linear modules by name.
        unfit: name of a module that cannot be edited → why.
        patterns: names or globs; a glob matches only modules that can be edited.

    Raises:
        ValueError: a pattern matches nothing, or nothing that can be edited.
    """
    fit = [name for name in linear if name not in unfit]
    if not fit:
        name, reason = next(iter(unfit.items()))
        raise ValueError(f"{type(model).__name__} has no linear module that can be edited: {name}: {reason}; …")
    for pattern in patterns:
        refused = _matches([pattern], list(unfit))
        if refused and not _matches([pattern], fit):
            raise ValueError(
                f"edit_modules: {refused[0]} cannot be edited: {unfit[refused[0]]}. {_examples(fit)}"
            )
        if not refused and "expert" in pattern and not _matches([pattern], fit) and (fused := _fused_experts(model)):
            raise ValueError(
                f"edit_modules: {pattern!r}: the experts of {type(model).__name__} cannot be edited: all those of a "
                f"layer are one parameter ({fused}), and each sees a part of the tokens. {_examples(fit)}"
            )
    return {name: linear[name] for name in expand_globs(patterns, fit)}


def _matches(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    try:
        return expand_globs(patterns, names) if names else []
    except ValueError:
        return []


def _fused_experts(model: PreTrainedModel) -> str | None:
    """Name of a parameter that holds the weights of all experts of a layer, if there is one."""
    return next((name for name, p in model.named_parameters() if p.dim() == 3 and "expert" in name), None)


def _examples(fit: Sequence[str]) -> str:
    """A hint at what can be edited instead: one module of each kind."""
    kinds: dict[tuple[str, ...], str] = {}
    for name in fit:
        kinds.setdefault(tuple(part for part in name.split(".") if not part.isdigit()), name)
    return f"What can be edited: {', '.join(kinds.values())}"


def middle_modules(model: PreTrainedModel) -> tuple[str, ...]:
    """Patterns of the modules that are edited by default.

    These are the widening projections of the feed-forward blocks (gate and up, or their equivalent) in the layers from
    1/5 to 2/5 of the depth. There, knowledge of a subject gathers at its last token (Meng et al., NeurIPS 2022), and
    edits generalise best (benchmarks/NOTES.md). In a model without projections of known names, they are the modules
    outside the attention that widen the residual stream; without these (where all experts of a layer are one
    parameter), the modules that write to the residual stream.

    Raises:
        ValueError: the model has no such modules, or quantised ones.
    """
    linear = linear_modules(model)
    # A path with one number in it is a layer's own module; a second number would be an expert among several.
    named = [match for name in linear if (match := re.fullmatch(r"(\D+)\.(\d+)\.((?:(?!\d+\.).)+)", name))]
    stem, depth = named[0][1], 1 + max(int(match[2]) for match in named)
    middle = range(depth // 5, 2 * depth // 5 + 1)
    kinds: dict[str, list[int]] = {}  # name of a module inside a layer → the layers that have it
    for match in named:
        kinds.setdefault(match[3], []).append(int(match[2]))
    shapes = {kind: _shape(linear[f"{stem}.{layers[0]}.{kind}"]) for kind, layers in kinds.items()}
    patterns: list[str] = []
    for choice in _groups(shapes, model):
        for kinds_together, pattern in choice.items():
            layers = sorted(set.intersection(*(set(kinds[kind]) for kind in kinds_together)))
            if inside := [layer for layer in layers if layer in middle]:
                patterns.append(f"{stem}.{_span(inside)}.{pattern}")
        if patterns:
            return tuple(patterns)
    raise ValueError(
        f"no modules of {type(model).__name__} are known to be good to edit; name some in edit_modules. "
        f"{_examples(list(linear))}"
    )


def _groups(shapes: Mapping[str, tuple[int, int]], model: PreTrainedModel) -> Iterator[dict[tuple[str, ...], str]]:
    """Yield choices of modules, the best first: kinds of modules that are edited together → a pattern for them.

    Args:
        shapes: kind → (d_in, d_out).
        model: the model.
    """
    for names, pattern in _FEED_FORWARD.items():
        blocks = [kind.removesuffix(names[0]) for kind in shapes if kind.split(".")[-1] == names[0]]
        patterns = {tuple(block + name for name in names): block + pattern for block in blocks}
        yield {kinds: pattern for kinds, pattern in patterns.items() if set(kinds) <= set(shapes)}
    width = model.get_input_embeddings().get_parameter("weight").shape[1]  # of the residual stream
    yield {(k,): k for k, (d_in, d_out) in shapes.items() if d_in == width < d_out and "att" not in k}
    yield {(k,): k for k, (_, d_out) in shapes.items() if d_out == width and not _READING.search(k)}


def _shape(module: LinearModule) -> tuple[int, int]:
    """(d_in, d_out) of a linear module."""
    rows, columns = module.weight.shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def _span(layers: Sequence[int]) -> str:
    """A glob for layer numbers."""
    if len(layers) == 1:
        return str(layers[0])
    if list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"[{layers[0]}-{layers[-1]}]"
    return f"{{{','.join(map(str, layers))}}}"
