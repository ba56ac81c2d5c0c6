"""A model and its tokenizer as a folder for ``from_pretrained``: what editing leaves alone is written as read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

GENERATION_FILE = "generation_config.json"
_TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "additional_chat_templates",
    "vocab*", "merges.txt", "*.model", "*.tiktoken",
)  # fmt: skip
# What transformers adds to a tokenizer's settings or leaves in it after use; it says nothing of the tokenizer.
_INCIDENTAL = ("is_local", "local_files_only", "padding", "truncation")


def write_model(model: PreTrainedModel, folder: Path) -> None:
    """Write a model, with the generation settings of the folder that it was loaded from if they are still its own."""
    model.save_pretrained(folder)
    source = _folder(model.config._name_or_path)
    if source is None:
        return
    kept, written = source / GENERATION_FILE, folder / GENERATION_FILE
    if kept.is_file():
        if GenerationConfig.from_pretrained(source).to_dict() == _settings(model):
            shutil.copyfile(kept, written)
    elif GenerationConfig.from_model_config(model.config).to_dict() == _settings(model):
        written.unlink(missing_ok=True)


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer: byte by byte the files that it was loaded from, unless it was changed since."""
    source = _folder(tokenizer.name_or_path)
    if source is None or not _is_unchanged(tokenizer, source):
        tokenizer.save_pretrained(folder)
        return
    patterns = {*_TOKENIZER_FILES, *tokenizer.vocab_files_names.values()}
    for path in {path for pattern in patterns for path in source.glob(pattern)}:
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)


def _folder(name: str | None) -> Path | None:
    """The folder that something was loaded from, if it was and there still is one."""
    return Path(name) if name and Path(name).is_dir() else None


def _settings(model: Any) -> dict[str, Any]:
    return dict(model.generation_config.to_dict())


def _is_unchanged(tokenizer: PreTrainedTokenizerBase, source: Path) -> bool:
    try:
        fresh = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        return _description(fresh) == _description(tokenizer)
    except Exception:  # the folder has changed, in as many ways as there are loaders
        return False


def _description(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a tokenizer is, by file that it would write."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        found: dict[str, Any] = {}
        for path in Path(folder).iterdir():
            found[path.name] = path.read_bytes() if path.is_file() else None
            if path.suffix == ".json":
                content = json.loads(found[path.name])
                found[path.name] = {k: v for k, v in content.items() if k not in _INCIDENTAL}
    return found
