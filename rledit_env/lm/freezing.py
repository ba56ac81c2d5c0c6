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
        self._rescale_every = getattr(model.config, "rescale_every", None)
        model.eval().requires_grad_(False)
        for module in model.modules():
            rescale: Any = getattr(module, "_rescale_layers", None)
            if rescale is not None:
                module.train()
                rescale()  # takes an earlier division back
                module.eval()
                model.config.rescale_every = 0

    def undo(self) -> None:
        """Give the model its modes back."""
        for module in self._training:
            module.training = True
        for parameter in self._trained:
            parameter.requires_grad_(True)
        if self._rescale_every is not None:
            self._model.config.rescale_every = self._rescale_every
