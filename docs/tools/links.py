"""Ask every web address in the README and the documentation whether it is still there: `make links`.

Outside `.ci/run`, which reaches no network. Exit code 1 if an address is gone (404, 410, or no such host), or if
there is no network.
"""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from site_parts import ROOT

ADDRESS = re.compile(r"https?://[^\s)>\]\"'`]+[^\s)>\]\"'`.,;:]")
GONE = (404, 410)


def documents() -> list[Path]:
    """All Markdown files of the project."""
    left_out = {"site", "build", "runs"}
    paths = {path: path.relative_to(ROOT).parts for path in ROOT.rglob("*.md")}
    return sorted(p for p, parts in paths.items() if not any(part in left_out or part[0] == "." for part in parts))


def answer(address: str) -> str:
    """What the server says: "200", another status, or the error."""
    request = urllib.request.Request(address, headers={"User-Agent": "Mozilla/5.0"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return str(response.status)
    except urllib.error.HTTPError as error:
        return str(error.code)
    except OSError as error:
        return str(error)


def main() -> int:
    where: dict[str, list[str]] = {}
    for path in documents():
        for address in ADDRESS.findall(path.read_text(encoding="utf-8")):
            where.setdefault(address.split("#")[0], []).append(path.relative_to(ROOT).as_posix())
    with ThreadPoolExecutor(8) as pool:
        answers = dict(zip(where, pool.map(answer, where), strict=True))
    for address, status in sorted(answers.items()):
        print(f"{status:<6} {address}  ({', '.join(sorted(set(where[address])))})")
    if not any(status.isdigit() for status in answers.values()):
        print(f"none of the {len(answers)} addresses answered: nothing is known of them without a network")
        return 1
    gone = [a for a, status in answers.items() if not status.isdigit() or int(status) in GONE]
    print(f"{len(answers)} addresses, {len(gone)} gone")
    return bool(gone)


if __name__ == "__main__":
    raise SystemExit(main())
