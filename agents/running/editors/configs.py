"""Files of hyperparameters: finding the one that ships for a model, reading it, and configuring editors with it."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from agents.running.editors.editor import Editor, Training
from agents.running.editors.overrides import changed, check_known, merged
from agents.running.editors.table import EDITORS
from rledit_env.type_aliases import JsonObject, Settings

CONFIGS = Path(__file__).parents[2] / "configs"
# Settings of the environment that an editor may choose.
ENVIRONMENT = ("edit_modules", "token", "steps_per_batch", "present_until", "contexts")


def find_configs(model: str) -> Path | None:
    """The file of hyperparameters that ships for a model; None if there is none, which leaves the editors' defaults."""
    for path in sorted(CONFIGS.glob("*.json")):
        patterns = json.loads(path.read_text(encoding="utf-8"))["models"]
        if any(fnmatch.fnmatch(model.lower(), pattern) for pattern in patterns):
            return path
    return None


def load_configs(path: str | Path | None, kind: str) -> dict[str, JsonObject]:
    """Hyperparameters by editor for a kind of facts, from a file ``{"models": [...], "editors": {name: entry}}``.

    An entry may have "env", "config", "train" and "saved" (see `Editor`), "kinds" with overrides for some kinds of
    facts, and "note" for the reader.

    Raises:
        ValueError: the file is damaged, or a name in it is unknown.
        OSError: the file cannot be read.
    """
    if path is None:
        return {}
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))["editors"]
        by_editor = {name: merged(entry, entry.get("kinds", {}).get(kind, {})) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} is no file of hyperparameters ({error!r}); it is {{"editors": {{NAME: {{"env": …, '
                         '"config": …, "train": …}}}}') from error
    check_known(by_editor, EDITORS, f"{path}, editors")
    for name, entry in by_editor.items():
        check_known(entry, ("env", "config", "train", "saved", "kinds", "note"), f"{path}, editor {name!r}")
    return by_editor


def configured(editor: Editor, entries: Mapping[str, Settings]) -> Editor:
    """The editor with the settings of its entry from :func:`load_configs`.

    Raises:
        ValueError: a setting is unknown or out of range.
    """
    place, entry = f"editor {editor.name!r}", entries.get(editor.name, {})
    if editor.variant_of is not None:
        entry = merged(entries.get(editor.variant_of, {}), entry)
    saved = entry.get("saved", editor.saved)
    env = {} if saved is not None else dict(editor.env)  # a saved agent brings its own settings
    settings, training, trainer = dict(editor.settings), editor.training, None
    if editor.trained_as is not None:
        trainer = configured(EDITORS[editor.trained_as], entries)
        training = trainer.training
        env, settings = env | dict(trainer.env), merged(trainer.settings, settings)
    env |= entry.get("env", {})
    check_known(env, ENVIRONMENT, f"{place}, env")
    if "train" in entry:
        training = changed(training or Training(), entry["train"], f"{place}, train")
    configured_editor = replace(
        editor, env=env, settings=merged(settings, entry.get("config", {})), training=training, trainer=trainer,
        saved=saved,
    )  # fmt: skip
    configured_editor.configuration()  # raises ValueError for a wrong setting, and so does reward()
    configured_editor.reward()
    return configured_editor
