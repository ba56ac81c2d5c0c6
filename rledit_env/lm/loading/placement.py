"""Resolves the device and the precision of a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Spread:
    """Arguments of ``from_pretrained`` that spread a model's weights over several devices, the host and the disk.

    With None for all, they are not spread.
    """

    device_map: str | Mapping[str, int | str | torch.device] | None = None
    offload_folder: str | os.PathLike[str] | None = None
    max_memory: Mapping[int | str, int | str] | None = None

    def options(self) -> dict[str, Any]:
        """The arguments that are not None."""
        return {name: value for name, value in vars(self).items() if value is not None}


def resolve_device(device: torch.device | str) -> torch.device:
    """The device; ``"auto"`` is the accelerator if there is one, else the CPU."""
    if device != "auto":
        try:
            resolved = torch.device(device)
            torch.empty(0, device=resolved)
        except (RuntimeError, AssertionError, TypeError) as error:
            raise ValueError(
                f"device is {str(device)!r}, which this machine or build of torch does not have "
                f"({' '.join(str(error).split())[:200]}); give 'auto', 'cpu' or one that is there"
            ) from error
        return resolved
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_dtype(dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    """The precision of the frozen weights.

    ``"auto"`` is bfloat16 where the device multiplies it natively (CUDA, and processors with AVX512-BF16 or AMX), else
    float32. Names are torch's, such as ``"float32"``.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        native = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_has_bfloat16()
        return torch.bfloat16 if native else torch.float32
    resolved = getattr(torch, dtype, None)
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise ValueError(f"dtype is {dtype!r}; give 'auto', 'float32', 'bfloat16' or another floating torch dtype")
    return resolved


def cpu_has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices natively."""
    capabilities = torch.cpu.get_capabilities()
    allowed = torch.backends.cpu.get_cpu_capability() == "AVX512"  # ATEN_CPU_CAPABILITY=avx2 turns the instructions off
    return allowed and bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
