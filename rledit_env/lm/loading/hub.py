"""Fetches models from the Hugging Face hub, into the hub's own cache."""

from __future__ import annotations

from pathlib import Path

from rledit_env.lm.loading.registry import ModelError


def fetch_from_hub(name: str, revision: str | None, with_code: bool) -> Path:
    """The folder of a hub id's files, which are fetched if needed.

    Raises:
        ModelError: the hub does not give the model.
    """
    from huggingface_hub import snapshot_download

    files = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", *(["*.py"] if with_code else [])]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=files, ignore_patterns=["*/*"]))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(name, revision=revision, allow_patterns=["*.bin"], ignore_patterns=["*/*"])
    except Exception as error:  # the hub's client raises its own, its HTTP library's and the system's errors
        # `from None`: the chain is pages of connection retries that say nothing more.
        raise ModelError(
            f"there is no folder '{name}', and the Hugging Face hub did not give a model of that name"
            f"{f' at revision {revision!r}' if revision else ''} "
            f"({type(error).__name__}: {first_line(error)}); check the name, the network and, for a gated model, "
            f"'hf auth login'. Without a network: run 'hf download {name}' on a machine that has one and pass the "
            f"downloaded folder, or use the default model 'smollm2-135m'"
        ) from None
    return folder


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
