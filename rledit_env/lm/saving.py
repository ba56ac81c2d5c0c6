"""Writes a model and its tokenizer for ``from_pretrained``; what editing does not change is written as it was read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rledit_env.type_aliases import JsonObject

GENERATION_FILE = "generation_config.json"
_TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "additional_chat_templates",
    "vocab*", "merges.txt", "*.model", "*.tiktoken",
)  # fmt: skip
# Settings that transformers adds to a tokenizer when it is loaded or used; they do not make it another one.
_INCIDENTAL = ("is_local", "local_files_only", "padding", "truncation")


def write_model(model: PreTrainedModel, folder: Path) -> None:
    """Write a model, with the generation settings of the folder that it was loaded from unless they were changed."""
    model.save_pretrained(folder)
    source = _folder(model.config._name_or_path)
    if source is None:
        return
    source_file, written_file = source / GENERATION_FILE, folder / GENERATION_FILE
    if source_file.is_file():
        if _settings(GenerationConfig.from_pretrained(source)) == _settings(model.generation_config):
            shutil.copyfile(source_file, written_file)
    elif _settings(GenerationConfig.from_model_config(model.config)) == _settings(model.generation_config):
        written_file.unlink(missing_ok=True)


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer: the files that it was loaded from, byte by byte, unless it was changed since."""
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
    """The folder of that name, if there is one."""
    return Path(name) if name and Path(name).is_dir() else None


def _settings(generation: GenerationConfig) -> dict[str, object]:
    """Generation settings with a value other than None and False."""
    return {name: value for name, value in generation.to_dict().items() if value is not None and value is not False}


def _is_unchanged(tokenizer: PreTrainedTokenizerBase, source: Path) -> bool:
    try:
        fresh = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        return _description(fresh) == _description(tokenizer)
    except Exception:  # a changed folder fails in as many ways as there are loaders
        return False


def _description(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes | JsonObject | None]:
    """The contents of the files that a tokenizer writes, by file name."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        contents: dict[str, bytes | JsonObject | None] = {}
        for path in Path(folder).iterdir():
            contents[path.name] = path.read_bytes() if path.is_file() else None
            if path.suffix == ".json":
                content = json.loads(path.read_bytes())
                contents[path.name] = {k: v for k, v in content.items() if k not in _INCIDENTAL}
    return contents
