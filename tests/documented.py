"""The blocks of code in the README and in docs/, and how they are run: as they are written, with smaller values."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from rledit_env.lm.loading.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))

# What makes an example short: the same code and commands with other values.
SHORT_PYTHON = {
    r'"smollm2-135m"': '"tiny-llama"',
    r"num_batches=(?:\d\d+|[3-9])": "num_batches=2",
    r'"num_batches": \d+': '"num_batches": 2',
    r"\bbatch_size=(?:\d\d+|[3-9])": "batch_size=2",
    r"total_timesteps=\d+": "total_timesteps=8",
    r"streams=32": "streams=2",
    r"num_envs=(?:\d\d+|[3-9])": "num_envs=2",
    r"n_steps=\d+, batch_size=2": "n_steps=4, batch_size=4",
    r"range\(20\)": "range(2)",
}
SHORT_RLEDIT = {
    "fetch": "",
    "train": "--model tiny-llama --num-batches 2 --batch-size 2 --trajectories 1",
    "evaluate": "--model tiny-llama --num-batches 2 --batch-size 2",
    "edit": "--model tiny-llama",
    "probe": "--model tiny-llama --num-batches 1 --batch-size 2 --step-sizes 0.01 --layer-stride 4 --run-lengths 2 "
             "--finalists 1",
    "compare": "--model tiny-llama --batches 2 --batch-size 2 --seeds 1 --no-generate",
    "report": "",
    "ledger": "",
}
# Why a block is not run, on the line above it: <!-- not run: REASON; twin: WHERE --> or "; no twin: WHY".
NOT_RUN = re.compile(r"<!-- not run: ([^;]+); ((?:no )?twin: [^>]+) -->\s*\Z")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: what stands behind the fence.
        name: the file that it is, for a block that is written to one.
        text: its text.
        line: the line it begins on.
        not_run: why it is not run; "" for one that is.
    """

    language: str
    name: str
    text: str
    line: int
    not_run: str


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, those inside admonitions and tabs too."""
    markdown = page.read_text(encoding="utf-8")
    fence = re.compile(r"^( *)```(\w+)(?: (?:title=\"([^\"]+)\"|(\S+)))?\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
    found = []
    for m in fence.finditer(markdown):
        text = re.sub(rf"^{m[1]}", "", m[5], flags=re.MULTILINE)
        reason = NOT_RUN.search(markdown, 0, m.start())
        line = markdown.count("\n", 0, m.start()) + 2
        found.append(Block(m[2], m[3] or m[4] or "", text, line, reason[1] if reason else ""))
    assert len(found) * 2 == len(re.findall(r"^ *```", markdown, re.MULTILINE)), f"{page}: a block has no language"
    return found


def commands(block: Block) -> list[str]:
    """The commands of a shell block, without their comments."""
    text = block.text.replace("\\\n", " ")
    return [line for raw in text.splitlines() if (line := re.sub(r"(^|\s+)#.*", "", raw).strip())]


def shortened(code: str) -> str:
    """Python with smaller values."""
    for pattern, short in SHORT_PYTHON.items():
        code = re.sub(pattern, short, code)
    return code


def shortened_command(command: str, tiny: Path) -> list[str]:
    """The arguments of an `rledit` command with smaller values; ``tiny`` is a folder with a tiny model."""
    # The agent that ships is for one model; a tiny one is edited by an editor that needs no training.
    command = command.replace("--agent default", "--editor fine-tuning --step-size 0.01")
    _, verb, *arguments = shlex.split(command)
    if verb == "fetch":  # the tiny models are not fetched; a folder is the least that is
        arguments = [str(tiny)]
    if {"--help", "--version"} & {verb, *arguments}:
        return [verb, *arguments]
    return [verb, *arguments, *shlex.split(SHORT_RLEDIT[verb])]


def write_tiny_model(folder: Path) -> None:
    """A folder as `save_pretrained` writes it."""
    tiny_model("tiny-llama").save_pretrained(folder)
    tiny_tokenizer("tiny-llama").save_pretrained(folder)
