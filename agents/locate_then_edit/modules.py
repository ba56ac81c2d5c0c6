"""The modules that locate-then-edit methods edit: the last projections of MLPs."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from rledit_env.lm.editable import EditableLM
from rledit_env.lm.names import module_layer


def output_projections(lm: EditableLM) -> list[str]:
    """The edited modules, checked for locate-then-edit: at most one a layer, with outputs as wide as the residual
    stream.

    Raises:
        ValueError: a module is not of this kind.
    """
    modules = list(lm.module_shapes)
    width = lm.model.config.get_text_config().hidden_size
    wrong = next((m for m in modules if lm.module_shapes[m][1] != width), None)
    if wrong is not None or len({module_layer(m) for m in modules}) < len(modules):
        raise ValueError(
            f"edit_modules has {wrong or ', '.join(modules)}; locate-then-edit takes the last projection of MLPs, one "
            "a layer, such as 'model.layers.[4-8].mlp.down_proj' or 'transformer.h.[3-8].mlp.c_proj'"
        )
    return modules


def default_output_projections(lm: EditableLM) -> list[str]:
    """The last projections of the MLPs whose first projections are edited by default.

    Args:
        lm: the LLM, with its default modules edited (:func:`rledit_env.lm.loading.registry.default_edit_modules`).

    Raises:
        ValueError: no such projection is found.
    """
    width = lm.model.config.get_text_config().hidden_size
    projections: dict[str, str] = {}  # MLP → its last projection
    for first_projection, (_, inner) in lm.module_shapes.items():
        block = first_projection.rpartition(".")[0]
        for name, module in lm.model.get_submodule(block).named_children():
            # A first projection that computes gate and up at once is twice as wide.
            if linear_shape(module) in ((inner, width), (inner // 2, width)):
                projections[block] = f"{block}.{name}"
    if not projections:
        raise ValueError(
            f"no last projection of an MLP is known for {lm.name or 'this model'}, which locate-then-edit methods "
            "edit; name them with edit_modules"
        )
    return list(projections.values())


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear module; None for any other."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return None
