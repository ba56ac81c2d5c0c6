"""The text from which the second moments of keys are gathered: written by an LLM itself, or from a file."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from rledit_env.lm.editable import EditableLM

GENERATED = "generated"
ROW = 64  # tokens of one text of the corpus
GIVEN = 4  # tokens of a text's beginning; the same for all texts, so that none needs padding
OPENINGS = (
    "The history of", "A short introduction to", "In recent years,", "Most people think that", "She was born in",
    "The city of", "According to the report,", "He is best known for", "The company was founded by",
    "Scientists have discovered that", "Question: What is", "The first step in", "During the war,",
    "Located in the north of", "My favourite thing about", "The main difference between", "For example,",
    "In the novel,", "The government of", "Many languages of",
)  # fmt: skip
TOPICS = (
    "music", "France", "physics", "football", "the law", "food", "art", "animals", "a river", "India", "trade",
    "medicine", "the Roman Empire", "film", "space", "a king", "software", "religion", "a school", "the ocean",
    "poetry", "railways", "Africa", "mathematics", "farming", "a painter", "politics", "the weather", "chess",
    "a novelist", "Japan", "energy", "birds", "an island", "the economy", "psychology", "a battle", "language",
    "television", "gardens",
)  # fmt: skip


def text_key(tokens: int, seed: int = 0) -> str:
    """The settings of a text that an LLM writes, as a hash."""
    settings = (max(1, tokens // ROW) * ROW, seed, ROW, GIVEN, OPENINGS, TOPICS)
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]


def texts_at_once(lm: EditableLM) -> int:
    """Texts that are written in one batch."""
    return 64 if lm.device.type == "cpu" else 512


@torch.no_grad()
def generated_corpus(
    lm: EditableLM, tokens: int, seed: int = 0, progress: bool = False, length: int = ROW
) -> Tensor:
    """Texts that the LLM writes under its current weights, (R, ``length``) int64 on the host.

    Each continues the first tokens of a short beginning. Every token is drawn from the LLM's own distribution without
    its special tokens. The same seed gives the same texts.
    """
    beginnings = [f"{opening} {topic}" for topic, opening in itertools.product(TOPICS, OPENINGS)]
    starts = torch.tensor([row[:GIVEN] for row in map(lm.encode, beginnings) if len(row) >= GIVEN])
    count = max(1, tokens // ROW)
    starts = starts.repeat(-(-count // len(starts)), 1)[:count]
    generator = torch.Generator().manual_seed(seed)
    starts = starts[torch.randperm(count, generator=generator)]
    batches = starts.split(texts_at_once(lm))
    bar = tqdm(batches, "writing a corpus", disable=None if progress else True, leave=False)  # None: on a terminal
    return torch.cat([sample_continuations(lm, part, length - GIVEN, generator) for part in bar])


@torch.no_grad()
def sample_continuations(
    lm: EditableLM, starts: Tensor, length: int, generator: torch.Generator, top_k: int | None = None
) -> Tensor:
    """Texts (R, L + length), on the host, that continue their first tokens (R, L). Each next token is drawn from the
    LLM's distribution over the ``top_k`` likeliest tokens (None: all), without special tokens."""
    special = torch.tensor(sorted(lm.tokenizer.all_special_ids), device=lm.device)

    def draw(logits: Tensor) -> Tensor:  # (R, |V|) → (R, 1)
        logits[:, special] = -torch.inf
        if top_k is not None:
            logits[logits < logits.topk(top_k).values[:, -1:]] = -torch.inf
        # The inverse cumulative distribution needs one random number a text, not one a token of the vocabulary.
        cumulative = logits.softmax(-1).cumsum(-1)
        drawn = torch.rand(len(logits), 1, generator=generator).to(cumulative) * cumulative[:, -1:]
        return torch.searchsorted(cumulative, drawn, right=True).clamp(max=logits.shape[1] - 1)

    return lm.forward.extended(starts.to(lm.device), length, draw).cpu()


def text_corpus(lm: EditableLM, path: str | Path, tokens: int) -> Tensor:
    """The first tokens of a text file in rows, (R, 64) int64.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the text has fewer than 64 tokens.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no text file {path}; name one, or 'generated' for text of the LLM's own")
    ids: list[int] = []
    with path.open(encoding="utf-8") as file:
        for line in _pieces(file):
            ids += lm.tokenizer(line, add_special_tokens=False)["input_ids"]
            if len(ids) >= tokens:
                break
    rows = min(len(ids), max(tokens, ROW)) // ROW
    if rows == 0:
        raise ValueError(f"{path} has {len(ids)} tokens; give a text of {ROW} or more, better of {tokens:,}")
    return torch.tensor(ids[: rows * ROW]).view(rows, ROW)


def _pieces(file: Iterator[str]) -> Iterator[str]:
    """The text in pieces of a few thousand characters."""
    piece = ""
    for line in file:
        piece += line
        if len(piece) > 4000:
            yield piece
            piece = ""
    if piece:
        yield piece
