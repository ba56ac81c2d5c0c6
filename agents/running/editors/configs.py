"""Files of hyperparameters: which one ships for a model, what it says of each editor, and editors configured by it."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from agents.running.editors.editor import Editor, Training
from agents.running.editors.overrides import changed, check_known, merged
from agents.running.editors.table import EDITORS

CONFIGS = Path(__file__).parents[2] / "configs"
# Settings of the environment that an editor may choose.
ENVIRONMENT = ("edit_modules", "token", "steps_per_batch", "present_until", "contexts")


def find_configs(model: str) -> Path | None:
    """The file of hyperparameters that ships for a model; None if there is none, and the editors' defaults hold."""
    for path in sorted(CONFIGS.glob("*.json")):
        patterns = json.loads(path.read_text(encoding="utf-8"))["models"]
        if any(fnmatch.fnmatch(model.lower(), pattern) for pattern in patterns):
            return path
    return None


def load_configs(path: str | Path | None, kind: str) -> dict[str, dict[str, Any]]:
    """Hyperparameters by editor for a kind of facts, from a file ``{"models": [...], "editors": {name: entry}}``.

    An entry may hold "env", "config", "train" and "saved" (see `Editor`), and "kinds", which says for some kinds of
    facts what is otherwise. "note" is for the reader.

    Raises:
        ValueError: the file is damaged, or a name in it is unknown.
        OSError: it cannot be read.
    """
    if path is None:
        return {}
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))["editors"]
        found = {name: merged(entry, entry.get("kinds", {}).get(kind, {})) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} is no file of hyperparameters ({error!r}); it is {{"editors": {{NAME: {{"env": …, '
                         '"config": …, "train": …}}}}') from error
    check_known(found, EDITORS, f"{path}, editors")
    for name, entry in found.items():
        check_known(entry, ("env", "config", "train", "saved", "kinds", "note"), f"{path}, editor {name!r}")
    return found


def configured(editor: Editor, entries: Mapping[str, Mapping[str, Any]]) -> Editor:
    """The editor with what the entries of :func:`load_configs` say otherwise.

    Raises:
        ValueError: a setting is unknown or out of its range.
    """
    place, entry = f"editor {editor.name!r}", entries.get(editor.name, {})
    if editor.variant_of is not None:
        entry = merged(entries.get(editor.variant_of, {}), entry)
    saved = entry.get("saved", editor.saved)
    env = {} if saved is not None else dict(editor.env)  # a saved agent knows its own
    settings, training, trainer = dict(editor.settings), editor.training, None
    if editor.trained_as is not None:
        trainer = configured(EDITORS[editor.trained_as], entries)
        training = trainer.training
        env, settings = env | dict(trainer.env), merged(trainer.settings, settings)
    env |= entry.get("env", {})
    check_known(env, ENVIRONMENT, f"{place}, env")
    if "train" in entry:
        training = changed(training or Training(), entry["train"], f"{place}, train")
    made = replace(
        editor, env=env, settings=merged(settings, entry.get("config", {})), training=training, trainer=trainer,
        saved=saved,
    )  # fmt: skip
    made.configuration()
    made.reward()
    return made
