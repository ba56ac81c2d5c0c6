"""Puts a model into evaluation mode while it is edited, and restores its modes afterwards."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel


class Freeze:
    """Puts a model into evaluation mode and stops its parameters from requiring gradients; :meth:`undo` restores both.

    When RWKV first runs in evaluation mode, it divides some weights, and with them its states, by powers of two against
    overflow in float16. Edited weights would then be saved divided, so this is switched off.

    Args:
        model: a causal LM.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._training_modules = [module for module in model.modules() if module.training]
        self._trainable_parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._rescaling_modules: list[Any] = [m for m in model.modules() if hasattr(m, "_rescale_layers")]
        self._were_rescaled = [module.layers_are_rescaled for module in self._rescaling_modules]
        self._rescale_every = getattr(model.config, "rescale_every", None)
        model.requires_grad_(False)
        self._set_rescaled(False)
        if self._rescaling_modules:
            model.config.rescale_every = 0
        model.eval()

    def _set_rescaled(self, rescaled: bool) -> None:
        """Let RWKV's modules divide their weights, or undo that."""
        for module in self._rescaling_modules:
            module.train(not rescaled)
            module._rescale_layers()

    def undo(self) -> None:
        """Restore the model's modes."""
        self._set_rescaled(False)  # RWKV set its flag when it ran, though nothing was divided
        if self._rescaling_modules:
            self._model.config.rescale_every = self._rescale_every
        self._set_rescaled(any(self._were_rescaled))
        self._model.eval()
        for module in self._training_modules:
            module.training = True
        for parameter in self._trainable_parameters:
            parameter.requires_grad_(True)
