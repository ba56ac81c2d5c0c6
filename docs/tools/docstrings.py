"""A Griffe extension: Sphinx roles in docstrings become links of the API reference, where it has what they name."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|meth|func|attr|mod|data|exc):`~?([\w.]+)`")
DOTTED = re.compile(r"(?<![`\w])`((?:rledit_env|agents)(?:\.\w+)+|[A-Z]\w+Env)`(?!`)")
ENVIRONMENTS = ("LifelongEditEnv",)


def linked(name: re.Match[str]) -> str:
    """The name as code, with a link if the reference has it."""
    return f'<autoref optional identifier="{name[1]}"><code>{name[1]}</code></autoref>'


class Roles(griffe.Extension):
    """Rewrites the docstrings when they have been read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        text = obj.docstring.value
        if obj.name in ENVIRONMENTS:
            text = text.split("\n## ")[0].strip() + "\n\nThe environments' pages have the whole docstring."
        obj.docstring.value = DOTTED.sub(linked, ROLE.sub(linked, text))
