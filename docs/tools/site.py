"""MkDocs hooks: pages from files outside docs/, links between them, diagrams and formulas.

- The environments' pages are docs/environments/*.md with the docstring of `LifelongEditEnv` (`environments.py`).
- MIRRORED files of the repository are pages, too, at the same path; examples/*.py are one page.
- A relative link may lead to any file of the repository, as on a code host. Here it leads to that file's page, or loses
  its link where the site has no such page.
- `<!-- README: NAME -->` stands for the part of the README between `<!-- NAME -->` and `<!-- end of NAME -->`.
- A Mermaid block is shown as the picture of docs/diagrams that was drawn of the same source (`make diagrams`).
- Formulas become MathML, which browsers show without a script.
"""

from __future__ import annotations

import ast
import html
import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
import environments
from site_parts import DOCS, MERMAID, ROOT, digest

# File of the repository → page of the site.
MIRRORED = {
    **{name: name for name in ("CHANGELOG.md", "CONTRIBUTING.md")},
    **{f"benchmarks/{name}.md": f"benchmarks/{name}.md" for name in ("RESULTS", "SCALING", "NOTES")},
    "agents/pretrained/README.md": "pretrained.md",
    "rledit_env/knowledge/bundled/SOURCES.md": "bundled-data.md",
}
PICTURES = "benchmarks/results/*.png"
EXAMPLES = "examples.md"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
PARTS = re.compile(r"^<!-- README: (.+) -->$", re.MULTILINE)
CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and pictures that are not in docs/."""
    for name, page in MIRRORED.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    for path in sorted(ROOT.glob(PICTURES)):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    files.append(File.generated(config, EXAMPLES, content=examples_page()))
    return files


def examples_page() -> str:
    """All scripts of examples/, with the first paragraph of their docstrings."""
    parts = ["# Examples\n\nEach script is read from top to bottom. `--help` lists its settings.\n"]
    for path in sorted((ROOT / "examples").glob("*.py")):
        source = path.read_text(encoding="utf-8")
        lead = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0].replace("\n", " ")
        block = "\n".join(f"    {line}".rstrip() for line in ("```python", *source.splitlines(), "```"))
        parts.append(f"\n## {path.name}\n\n{lead}\n\n??? example \"examples/{path.name}\"\n\n{block}\n")
    return "\n".join(parts)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Complete the environments' pages, draw the diagrams and turn the links."""
    uri = page.file.src_uri
    if uri.startswith("environments/"):
        markdown = environments.complete(markdown, Path(uri).stem)
    markdown = PARTS.sub(lambda m: part_of_the_readme(m[1]), markdown)
    markdown = MERMAID.sub(lambda m: picture(m[1], uri), markdown)
    outside = Path(page.file.abs_src_path or DOCS / uri)
    source = outside if not outside.is_relative_to(DOCS) else DOCS / uri
    pieces = CODE.split(markdown)
    pieces[::2] = [LINK.sub(lambda m: turned(m, source, uri, files), piece) for piece in pieces[::2]]
    return "".join(pieces)


def part_of_the_readme(name: str) -> str:
    """What the README has between its comments of this name, with links as from docs/."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- end of {name} -->", text, re.DOTALL)
    if found is None:
        raise PluginError(f"README.md has no <!-- {name} --> ... <!-- end of {name} -->")
    return re.sub(r"\]\((?!https?:)(?:docs/)?", "](", found[1])


def turned(link: re.Match[str], source: Path, uri: str, files: Files) -> str:
    """A link from a file of the repository as a link between pages."""
    mark, text, address = link.groups()
    target, _, anchor = address.partition("#")
    if not target or re.match(r"[a-z]+:", address):
        return link[0]
    path = Path(os.path.normpath(source.parent / target))
    if path.is_relative_to(DOCS):
        page = path.relative_to(DOCS).as_posix()
    elif path.is_relative_to(ROOT):
        page = path.relative_to(ROOT).as_posix()
        page = MIRRORED.get(page, page)
        if path.parent == ROOT / "examples" and path.suffix == ".py":
            page, anchor = EXAMPLES, path.name.replace(".", "")
        elif page in ("examples", "README.md"):
            page = EXAMPLES if page == "examples" else "index.md"
    else:
        raise PluginError(f"{source}: the link {address} leads out of the project")
    if files.get_file_from_path(page) is None and path.exists():
        if mark:
            raise PluginError(f"{source}: the picture {address} is not in the site")
        return text
    relative = posixpath.relpath(page, posixpath.dirname(uri) or ".")
    return f"{mark}[{text}]({relative}{'#' + anchor if anchor else ''})"


def picture(source: str, uri: str) -> str:
    name = f"diagrams/{digest(source)}.svg"
    if not (DOCS / name).exists():
        raise PluginError(f"{uri}: docs/{name} is missing, the picture of a Mermaid block that begins with "
                          f"{source.splitlines()[0]!r}; draw it with: make diagrams")
    return f"![Diagram]({posixpath.relpath(name, posixpath.dirname(uri) or '.')}){{ .diagram }}"


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Refuse a page that would load something from another server."""
    loaded = re.search(r"<(?:script|img|link|iframe)\b[^>]*?(?:src|href)=[\"']?(?:https?:)?//[^>]*>", output)
    if loaded is not None:
        raise PluginError(f"{page.file.src_uri}: the page loads {loaded[0]}; ship it with the site")
    return output


def on_page_content(content: str, page: Any, config: Any, files: Files) -> str:
    """Formulas as MathML."""
    inline = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
    block = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
    content = inline.sub(lambda m: convert(html.unescape(m[1]).strip()), content)
    return block.sub(lambda m: convert(html.unescape(m[1]).strip(), display="block"), content)
