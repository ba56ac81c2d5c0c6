"""``python -m agents.running.ship_moments MODEL``: compute the second moments of keys that ship with the package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from agents.corpus import text_key
from agents.key_statistics import key_statistics
from agents.shipped_moments import FOLDER, ship
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.loading.registry import ModelError

TOKENS = 65_536  # as the agents' configurations have it


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m agents.running.ship_moments MODEL``."""
    parser = argparse.ArgumentParser(
        prog="python -m agents.running.ship_moments",
        description="Compute the second moments of modules' inputs on text that the model writes, and write them in "
        "half precision into the package, where editors find them.",
    )  # fmt: skip
    parser.add_argument("model", help="registry name, hub id or folder")
    parser.add_argument("--modules", nargs="+", required=True, metavar="GLOB", help="the modules")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens of the text (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder (default: the package's, by the model's name)")
    options = parser.parse_args(arguments)
    try:
        lm = EditableLM.load(options.model, options.modules)
        modules = list(lm.module_shapes)
        statistics = key_statistics(lm, modules, tokens=options.tokens, shipped=False)
        out = options.out or FOLDER / options.model / "moments"
        ship(lm, statistics.second_moments, statistics.seconds, text_key(options.tokens), out)
    except (OSError, ValueError, ModelError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    print(f"written: {out}, the moments of {len(modules)} modules over {statistics.source}, {size:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
