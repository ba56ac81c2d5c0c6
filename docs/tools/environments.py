"""The environments' pages: sections of `LifelongEditEnv`'s docstring in the place of `<!-- docstring -->`."""

from __future__ import annotations

import ast
import re

from docstrings import DOTTED, ROLE, linked
from site_parts import DOCS, ROOT

MARKER = "<!-- docstring -->"
EPISODE = "<!-- episode -->"
HERE = {"index", "vector"}  # pages of the folder that are written by hand


def docstring() -> str:
    """The docstring of the environment's class, read without importing it."""
    tree = ast.parse((ROOT / "rledit_env" / "env.py").read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "LifelongEditEnv"]
    return ast.get_docstring(classes[0]) or ""


def sections(text: str) -> dict[str, str]:
    """Heading → text of a docstring's sections."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def complete(markdown: str, name: str) -> str:
    """The page with the docstring's sections, roles as links."""
    if name in HERE:
        return markdown
    if MARKER not in markdown:
        raise ValueError(f"docs/environments/{name}.md has no line {MARKER}")
    text = "\n".join(f"## {heading}\n{body}" for heading, body in sections(docstring()).items())
    pieces = re.split(r"(^ *```.*?^ *```$)", text, flags=re.MULTILINE | re.DOTALL)
    pieces[::2] = [DOTTED.sub(linked, ROLE.sub(linked, piece)) for piece in pieces[::2]]
    return markdown.replace(MARKER, "".join(pieces)).replace(EPISODE, episode(name))


def episode(name: str) -> str:
    """The picture of an episode that `episode_gif.py` has drawn; "" where it has not."""
    if not (DOCS / "assets" / f"{name}.gif").exists():
        return ""
    return (
        f"![An episode: the facts of each step with the answers before and after, and the reward](../assets/{name}.gif)"
        "\n\nAn episode of the default model with the agent that ships, on bundled facts, at most five presentations "
        "of a batch (`python docs/tools/episode_gif.py`)."
    )
