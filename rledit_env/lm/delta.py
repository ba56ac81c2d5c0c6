"""Saves only what editing changed: as a safetensors delta, or as a LoRA adapter that the peft library reads.

A change ΔW = W − W₀ is known up to the rounding of W itself. So r factors ΔW_r count as exact if their error is at most
a few roundings: ‖ΔW − ΔW_r‖_F ≤ 8 ε ‖W₀‖_F.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rledit_env.files import whole_folder, write_tensors, write_text
from rledit_env.lm.editable import EditableLM

DELTA_FILE = "delta.safetensors"
FORMAT = "rledit-delta-1"
ROUNDINGS = 8  # factors are exact if their error is at most this many times ε ‖W₀‖
SAMPLED = 64  # entries of each original weight in the file, to recognise the model that a delta was made for
OTHER_PRECISION = 0.01  # largest relative difference of these entries where the model has another precision


@dataclass(frozen=True)
class LowRank:
    """A change factorised as up @ down.

    Attributes:
        up: (d_out, r).
        down: (r, d_in).
        error: ‖ΔW − up @ down‖_F / ‖ΔW‖_F; 0 where ΔW is zero.
        exact: whether the error is within a few roundings of the weights themselves.
    """

    up: Tensor
    down: Tensor
    error: float
    exact: bool

    @property
    def rank(self) -> int:
        return self.up.shape[1]


def changes(lm: EditableLM) -> dict[str, Tensor]:
    """ΔW = W_t − W₀ by module, (d_out, d_in), in the precision of the edited weights."""
    return {name: lm.weight(name) - lm.original_weight(name) for name in lm.module_shapes}


def low_rank(change: Tensor, weight_norm: float, rank: int | None = None) -> LowRank:
    """The best factors of a change (truncated SVD, Eckart and Young).

    Args:
        change: ΔW, (d_out, d_in).
        weight_norm: ‖W₀‖_F, whose rounding sets what counts as exact.
        rank: largest number of factors; None means as many as are exact.
    """
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    left_out = s.square().flip(0).cumsum(0).flip(0)  # [i]: the squared error of the first i factors
    allowed = (ROUNDINGS * torch.finfo(change.dtype).eps * weight_norm) ** 2
    needed = int((left_out > allowed).sum())
    count = max(needed if rank is None else min(needed, rank), 1)
    root = s[:count].sqrt()
    error = math.sqrt(float(left_out[count])) if count < len(s) else 0.0
    norm = float(s.norm())
    return LowRank(u[:, :count] * root, root[:, None] * vh[:count], error / norm if norm else 0.0, count >= needed)


def save_delta(lm: EditableLM, folder: str | Path, overwrite: bool = False) -> Path:
    """Write ΔW of every edited module as a safetensors file; :func:`load_delta` adds it to the model again.

    A module is written as factors where they are exact and smaller, else dense; its weights are restored to float32
    rounding. The file also has the base model's name and some entries of its weights, so that a delta is not added to
    another model, or twice.

    Raises:
        FileExistsError: the folder is not empty. With ``overwrite`` it is replaced, if rledit wrote all of it in one
            piece, as its marker says (`rledit_env.files.check_free`).
    """
    tensors: dict[str, Tensor] = {}
    for name, change in changes(lm).items():
        factors = low_rank(change, float(lm.original_weight(name).norm()))
        if factors.rank * sum(change.shape) < change.numel():
            tensors |= {f"{name}.up": factors.up, f"{name}.down": factors.down}
        else:
            tensors[f"{name}.change"] = change
        tensors[f"{name}.sample"] = _sample(lm.original_weight(name))
    metadata = {
        "format": FORMAT, "base_model": lm.name, "dtype": str(lm.dtype), "modules": json.dumps(list(lm.module_shapes)),
    }  # fmt: skip
    with whole_folder(folder, overwrite, "weight change") as work:
        write_tensors(work / DELTA_FILE, tensors, metadata)
    return Path(folder)


@torch.no_grad()
def load_delta(model: PreTrainedModel | EditableLM, folder: str | Path) -> PreTrainedModel | EditableLM:
    """Add a delta written by :func:`save_delta` to the weights of the model that it was made for.

    Args:
        model: the base model as it is, or an `EditableLM` of it that edits the delta's modules.
        folder: the delta's folder, or its file.

    Returns:
        The given model.

    Raises:
        FileNotFoundError: there is no delta at that path.
        ValueError: the file is damaged or of another format; or the model lacks a module of the delta, or has other
            weights than the base model. The model is then unchanged.
    """
    path = Path(folder) / DELTA_FILE if Path(folder).is_dir() else Path(folder)
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no {DELTA_FILE}; give the folder that save_delta() wrote")
    metadata, tensors = _read(path)
    names: list[str] = json.loads(metadata["modules"])
    weights = _weights(model, names, path, metadata["base_model"])
    same_precision = metadata["dtype"] == str((model.model if isinstance(model, EditableLM) else model).dtype)
    for name, weight in weights.items():
        _check_base(name, weight, tensors[f"{name}.sample"], same_precision, path, metadata["base_model"])
    changed = {
        n: w.to(tensors[f"{n}.sample"].dtype) + _dense_change(tensors, n).to(w.device) for n, w in weights.items()
    }
    if isinstance(model, EditableLM):
        model.restore(model.snapshot() | changed)
    else:
        for name, weight in weights.items():
            weight.copy_(changed[name])
    return model


def save_lora(
    lm: EditableLM, folder: str | Path, rank: int | None = None, overwrite: bool = False
) -> dict[str, LowRank]:
    """Write the change as a LoRA adapter: ``peft.PeftModel.from_pretrained(base_model, folder)`` loads it.

    Args:
        lm: the edited LLM.
        folder: the adapter's folder.
        rank: largest rank of a module; None means as large as an exact adapter needs.
        overwrite: replace a folder that is not empty, as in :func:`save_delta`.

    Returns:
        Module → its factors, with the error of cutting them to ``rank``; :func:`relative_error` sums them up.

    Raises:
        ValueError: ``rank`` is less than 1.
        FileExistsError: as :func:`save_delta`.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank is {rank}; give 1 or more, or None for an exact adapter")
    factors = {n: low_rank(c, float(lm.original_weight(n).norm()), rank) for n, c in changes(lm).items()}
    ranks = {name: change.rank for name, change in factors.items()}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": lm.name,
        "revision": lm.revision,
        "target_modules": list(ranks),
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),  # alpha = r makes the adapter's scale 1
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(m, Conv1D) for n, m in lm.model.named_modules() if n in ranks),
        "inference_mode": True,
    }
    tensors = {f"base_model.model.{n}.lora_A.weight": change.down for n, change in factors.items()}
    tensors |= {f"base_model.model.{n}.lora_B.weight": change.up for n, change in factors.items()}
    with whole_folder(folder, overwrite, "adapter") as work:
        write_text(work / "adapter_config.json", json.dumps(config, indent=1) + "\n")
        write_tensors(work / "adapter_model.safetensors", tensors, {"format": "pt"})
    return factors


def relative_error(lm: EditableLM, factors: Mapping[str, LowRank]) -> float:
    """‖ΔW − ΔW_r‖_F / ‖ΔW‖_F over all modules together."""
    norms = {name: float(change.norm()) for name, change in changes(lm).items()}
    total = math.hypot(*norms.values())
    return math.hypot(*(change.error * norms[name] for name, change in factors.items())) / total if total else 0.0


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dictionary
    except Exception as error:  # safetensors' own error has no public name
        raise ValueError(f"{path} is damaged ({error}); save the delta again") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} has the format {metadata.get('format')!r}, not {FORMAT!r}; give a file that save_delta() of this "
            "version wrote"
        )
    return metadata, tensors


def _weights(model: PreTrainedModel | EditableLM, names: list[str], path: Path, base: str) -> dict[str, Tensor]:
    """The weights to change, (d_out, d_in), as views of the model's weights."""
    if isinstance(model, EditableLM):
        missing = [name for name in names if name not in model.module_shapes]
        if missing:
            raise ValueError(
                f"{path} changes {missing[0]}, which is not among the edited modules of {model.name or 'the model'}; "
                f"load it with edit_modules={names}"
            )
        return {name: model.weight(name) for name in names}
    modules: dict[str, Any] = dict(model.named_modules())
    missing = [name for name in names if not hasattr(modules.get(name), "weight")]
    if missing:
        raise ValueError(f"{path} changes {missing[0]}, which the model does not have; it was made for {base}")
    return {n: modules[n].weight.t() if isinstance(modules[n], Conv1D) else modules[n].weight for n in names}


def _sample(weight: Tensor) -> Tensor:
    """Evenly spaced entries of a weight, (SAMPLED,); all entries if it has fewer."""
    flat = weight.reshape(-1)
    return flat[torch.linspace(0, len(flat) - 1, min(SAMPLED, len(flat)), dtype=torch.float64).long()].clone()


def _check_base(name: str, weight: Tensor, sample: Tensor, same_precision: bool, path: Path, base: str) -> None:
    model_sample = _sample(weight).to(sample)
    difference = math.inf
    if model_sample.shape == sample.shape:
        difference = float((model_sample - sample).norm() / sample.norm())
    if difference > (0.0 if same_precision else OTHER_PRECISION):
        raise ValueError(
            f"{path} was made for other weights than the model has in {name}: it belongs to {base or 'another model'}, "
            "as it was before any editing"
        )


def _dense_change(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    dense = tensors.get(f"{name}.change")
    return tensors[f"{name}.up"] @ tensors[f"{name}.down"] if dense is None else dense
