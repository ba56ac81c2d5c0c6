"""The training state of a standard algorithm, from which an interrupted run resumes: tensors and numbers, no pickle."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer
from torch import Tensor

from agents.files import moments_of
from rledit_env.type_aliases import JsonObject

BUFFER = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


def training_state(model: BaseAlgorithm) -> tuple[dict[str, Tensor], JsonObject]:
    """Copies of everything that the rest of the training depends on: networks, optimisers, replay buffer and the states
    of the random generators."""
    tensors: dict[str, Tensor] = {}
    for name, state in model.get_parameters().items():
        flat = state if "param_groups" not in state else {
            f"{place}.{what}": value for place, moments in state["state"].items() for what, value in moments.items()
        }
        tensors |= {f"{name}/{key}": torch.as_tensor(value).clone() for key, value in flat.items()}
    if isinstance(coefficient := getattr(model, "log_ent_coef", None), Tensor):  # SAC's
        tensors["log_ent_coef"] = coefficient.detach().clone()
    numbers: JsonObject = {"timesteps": model.num_timesteps, "updates": getattr(model, "_n_updates", 0)}
    if isinstance(buffer := getattr(model, "replay_buffer", None), ReplayBuffer):
        tensors |= {f"buffer/{name}": torch.tensor(getattr(buffer, name)[: buffer.size()]) for name in BUFFER}
        numbers |= {"position": buffer.pos, "full": buffer.full}
    # Stable-Baselines3 uses NumPy's global random generator.
    kind, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    tensors |= {"random/torch": torch.get_rng_state(), "random/numpy": torch.tensor(np.asarray(keys, np.int64))}
    return tensors, {**numbers, "numpy": [kind, place, has_gauss, gauss]}


def load_training_state(model: Any, tensors: Mapping[str, Tensor], numbers: JsonObject) -> None:
    """Load what :func:`training_state` returned into a new model with the same settings.

    Raises:
        ValueError: an optimiser's moments do not fit its parameters; the model is unchanged.
    """
    parameters: dict[str, object] = {}
    for name, current in model.get_parameters().items():
        saved = {k.removeprefix(f"{name}/"): v for k, v in tensors.items() if k.startswith(f"{name}/")}
        if "param_groups" in current:
            moments = moments_of(attrgetter(name)(model), saved)
            parameters[name] = {"state": moments, "param_groups": current["param_groups"]}
        else:
            parameters[name] = saved
    model.set_parameters(parameters)
    if "log_ent_coef" in tensors:
        model.log_ent_coef.data.copy_(tensors["log_ent_coef"])
    model.num_timesteps, model._n_updates = numbers["timesteps"], numbers["updates"]
    if isinstance(buffer := getattr(model, "replay_buffer", None), ReplayBuffer):
        buffer.pos, buffer.full = numbers["position"], numbers["full"]
        for name in BUFFER:
            getattr(buffer, name)[: buffer.size()] = tensors[f"buffer/{name}"].numpy()
    kind, place, has_gauss, gauss = numbers["numpy"]
    keys = tensors["random/numpy"].numpy().astype(np.uint32)
    np.random.set_state((kind, keys, place, has_gauss, gauss))  # noqa: NPY002
    torch.set_rng_state(tensors["random/torch"])
