"""What the tests share: tiny LMs, small data sets, environments, and the full model to compare with."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from torch import Tensor

import rledit_env  # noqa: F401  (registers the environments)
from rledit_env.knowledge import EditRecord, KnowledgeDataset, UnrelatedFact, load_knowledge
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage

# Workers share the cores: one thread each, in this process and in those that it starts.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

EVERY_LINEAR = "{model.layers,transformer.h}.[1-3].*"  # all linear modules of the tiny models' last three layers

_bundled = functools.cache(load_knowledge)
_LMS: dict[tuple[Any, ...], EditableLM] = {}


@pytest.fixture
def tiny_lm() -> Iterator[Callable[..., EditableLM]]:
    """Gives the tiny LM ``name``, by default with every linear module above the first layer edited.

    The LMs are built once and handed out with their pre-trained weights and empty caches.
    """

    def get(
        name: str = "tiny-llama", modules: str | None = EVERY_LINEAR, dtype: torch.dtype = torch.float32
    ) -> EditableLM:
        key = (name, modules, dtype)
        if key not in _LMS:
            _LMS[key] = EditableLM.load(name, modules, dtype=dtype, device="cpu")
        return _LMS[key]

    yield get
    for lm in _LMS.values():
        lm.restore()
        lm.prefix_cache.clear()
        lm.reference_cache.clear()


@pytest.fixture(scope="session")
def facts() -> Callable[..., KnowledgeDataset]:
    """Gives the first ``count`` bundled records; ``single``: with one paraphrase and one unrelated pair each."""

    def first(kind: str = "zsre", count: int = 12, single: bool = False) -> KnowledgeDataset:
        dataset = _bundled(kind)
        records: tuple[EditRecord, ...] = dataset.records[:count]
        if single:
            records = tuple(
                dataclasses.replace(r, paraphrases=r.paraphrases[:1], unrelated=r.unrelated[:1]) for r in records
            )
        return dataclasses.replace(dataset, records=records)

    return first


@pytest.fixture(scope="session")
def uneven_facts() -> KnowledgeDataset:
    """Four facts whose prompts and answers differ much in length, some with several paraphrases and unrelated pairs."""
    fruit = UnrelatedFact("Bananas are", "yellow")
    records = (
        EditRecord("Rome is in", "Peru", ("One finds Rome in",), (fruit,), "Italy", "Rome", "list, item 1"),
        EditRecord(
            "The mother tongue of Danielle Darrieux, who was born in Bordeaux, is",
            "Old Church Slavonic",
            ("Danielle Darrieux speaks", "At home Danielle Darrieux would always talk in"),
            (fruit, UnrelatedFact("The mother tongue of Léon Blum is", "French")),
            "French",
            "Danielle Darrieux",
            "list, item 2",
        ),
        EditRecord("2 + 2 =", "5", ("Two and two make",), (UnrelatedFact("3 + 3 =", "6"),), "4", None, "list, item 3"),
        EditRecord(
            "Ångström comes from",
            "Łódź",
            ("The home of Ångström is", "Where is Ångström from? From", "Ångström was born in"),
            (UnrelatedFact("The home of the United States Congress, both of its houses, is", "Washington"),),
            "Sweden",
            "Ångström",
            "list, item 4",
        ),
    )
    return KnowledgeDataset("counterfact", "list of 4 facts", "train", records)


@pytest.fixture(scope="session")
def few_facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the first 40 bundled facts of CounterFact's form in each split: what a script makes many
    environments over."""
    folder = tmp_path_factory.mktemp("few_facts")
    for split in ("train", "eval"):
        rows = [
            {
                "case_id": i, "prompt": r.prompt, "subject": r.subject, "target_new": r.target,
                "ground_truth": r.original, "rephrase_prompt": list(r.paraphrases),
                "locality_prompt": [u.prompt for u in r.unrelated],
                "locality_ground_truth": [u.answer for u in r.unrelated],
            }
            for i, r in enumerate(load_knowledge("counterfact", split=split).records[:40])
        ]  # fmt: skip
        (folder / f"counterfact_{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


@pytest.fixture
def make_env(tiny_lm: Callable[..., EditableLM], facts: Callable[..., KnowledgeDataset]) -> Callable[..., Any]:
    """Makes an environment over a tiny LM and a small data set: 3 batches of 2 facts unless said otherwise."""

    def make(kind: str = "zsre", **arguments: Any) -> Any:
        names = {"zsre": "ZsRE", "counterfact": "CounterFact", "fever": "FEVER"}
        arguments = {"num_batches": 3, "batch_size": 2, **arguments}
        model = arguments.pop("model", None) or tiny_lm()
        data = arguments.pop("data", None) or facts(kind)
        return gym.make(f"RLEdit-{names[kind]}-v0", model=model, data=data, **arguments).unwrapped

    return make


@pytest.fixture
def file_size_limit() -> Iterator[Callable[[int], None]]:
    """Gives a function after which no file can grow beyond so many bytes, as if the disk were full."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="session")
def random_action() -> Callable[..., Any]:
    """Gives an action of the environment's action space: factors of ``scale``, padded rows not zero."""

    def draw(env: Any, seed: int = 0, scale: float = 0.03) -> dict[str, dict[str, Any]]:
        env.action_space.seed(seed)
        return {part: {m: scale * f for m, f in fs.items()} for part, fs in env.action_space.sample().items()}

    return draw


@pytest.fixture(scope="session")
def full_logits() -> Callable[[EditableLM, Passage], Tensor]:
    """Logits (answer tokens, |V|) of one passage from the whole Hugging Face model, unpadded and uncached."""

    def compute(lm: EditableLM, passage: Passage) -> Tensor:
        output = lm.model(input_ids=torch.tensor([passage.input_ids]), use_cache=False)
        return output.logits[0, list(passage.positions)]

    return compute
