"""A model that only evaluates while it is edited, and what it was before."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel


class Freeze:
    """Puts a model into evaluation mode and takes its parameters out of training; :meth:`undo` gives both back.

    RWKV divides some weights by powers of two when it first runs without training, and its states with them, against
    overflows of float16. What is edited would then be saved divided, so this is switched off.

    Args:
        model: a causal LM.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._training = [module for module in model.modules() if module.training]
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._dividing: list[Any] = [module for module in model.modules() if hasattr(module, "_rescale_layers")]
        self._divided = [module.layers_are_rescaled for module in self._dividing]
        self._rescale_every = getattr(model.config, "rescale_every", None)
        model.requires_grad_(False)
        self._set_divided(False)
        if self._dividing:
            model.config.rescale_every = 0
        model.eval()

    def _set_divided(self, divided: bool) -> None:
        """Let the modules divide their weights, or take an earlier division back."""
        for module in self._dividing:
            module.train(not divided)
            module._rescale_layers()

    def undo(self) -> None:
        """Give the model its modes back."""
        self._set_divided(False)  # while it runs undivided, it takes itself for divided
        if self._dividing:
            self._model.config.rescale_every = self._rescale_every
        self._set_divided(any(self._divided))
        self._model.eval()
        for module in self._training:
            module.training = True
        for parameter in self._trained:
            parameter.requires_grad_(True)
