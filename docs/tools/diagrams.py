"""Draw the Mermaid blocks of docs/ as pictures: `make diagrams`, after a diagram has changed.

    python docs/tools/diagrams.py --mermaid node_modules/@mermaid-js/tiny/dist/mermaid.tiny.js

It needs Chromium and the script of Mermaid, which `make diagrams` fetches with npm. The site shows the pictures, so
that its readers need neither a script nor a network; a code host draws the blocks itself.
"""

from __future__ import annotations

import argparse
import html
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from site_parts import DOCS, MERMAID, digest

PAGE = """<!doctype html><meta charset="utf-8"><body><div id="drawn"></div><script src="{script}"></script><script>
mermaid.initialize({{startOnLoad: false, theme: "neutral", htmlLabels: false,
                    flowchart: {{htmlLabels: false, padding: 10}},
                    sequence: {{actorMargin: 30, width: 150, wrap: true, messageFontSize: 17, actorFontSize: 16}},
                    fontFamily: "Helvetica, Arial, sans-serif"}});
mermaid.render("diagram", {source}).then(r => {{ document.getElementById("drawn").innerHTML = r.svg; }});
</script>"""


def draw(source: str, script: Path, browser: str) -> str:
    """The diagram as SVG."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        literal = "`" + source.replace("\\", "\\\\").replace("`", "\\`") + "`"
        page.write_text(PAGE.format(script=script.resolve().as_uri(), source=literal), encoding="utf-8")
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom",
                   page.as_uri()]  # fmt: skip
        dom = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    svg = re.search(r"<svg.*</svg>", dom, re.DOTALL)
    if svg is None:
        raise SystemExit(f"Mermaid could not draw the block that begins with {source.splitlines()[0]!r}")
    drawn = svg[0].replace("&nbsp;", "&#160;").replace("<br>", "<br/>")
    size = re.search(r'viewBox="[-\d.]+ [-\d.]+ ([\d.]+) ([\d.]+)"', drawn)
    if size is not None:  # a width in pixels, so that a page shows the picture in its own size
        drawn = re.sub(r'<svg([^>]*?) width="100%"', rf'<svg\1 width="{size[1]}" height="{size[2]}"', drawn, count=1)
    if 'xmlns="http://www.w3.org/2000/svg"' not in drawn:
        drawn = drawn.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    return html.unescape(drawn) if "&lt;svg" in drawn else drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mermaid", type=Path, required=True, help="mermaid.tiny.js or mermaid.min.js")
    parser.add_argument("--browser", default=shutil.which("chromium") or shutil.which("google-chrome") or "chromium")
    arguments = parser.parse_args()
    folder = DOCS / "diagrams"
    folder.mkdir(exist_ok=True)
    sources = [m[1] for page in sorted(DOCS.rglob("*.md")) for m in MERMAID.finditer(page.read_text("utf-8"))]
    names = {f"{digest(source)}.svg": source for source in sources}
    for name, source in names.items():
        if not (folder / name).exists():
            (folder / name).write_text(draw(source, arguments.mermaid, arguments.browser) + "\n", encoding="utf-8")
            print(f"drawn: docs/diagrams/{name}")
    for old in {path.name for path in folder.glob("*.svg")} - set(names):
        (folder / old).unlink()


if __name__ == "__main__":
    main()
