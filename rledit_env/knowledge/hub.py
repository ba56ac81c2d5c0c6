"""Opens data sets with the `datasets` library: by hub id, or from a folder that the library wrote or can load.

A hub data set is streamed: its rows are read one by one, so that it is never held whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rledit_env.knowledge.fields import Row, row_of
from rledit_env.knowledge.record import KnowledgeError

EVAL_SPLITS = ("eval", "validation", "dev", "labelled_dev", "test")


@dataclass(frozen=True, slots=True)
class HubData:
    """A data set's place on the hub; `arguments` are for `load_dataset`."""

    path: str
    arguments: Mapping[str, object]


def _knowedit(train: str, test: str) -> HubData:
    return HubData("zjunlp/KnowEdit", {"data_files": {"train": f"benchmark/{train}", "test": f"benchmark/{test}"}})


# Short names, and ids that need an argument: a configuration, or one file of several in a repository.
USUAL = {
    ("zsre", "zsre"): HubData("wangzn2001/zsre", {}),
    ("zsre", "zjunlp/KnowEdit"): HubData(
        "zjunlp/KnowEdit", {"data_files": {"test": "benchmark/ZsRE/ZsRE-test-all.json"}}
    ),
    ("counterfact", "counterfact"): HubData("azhx/counterfact", {}),
    # SUPPORTS and REFUTES only. The original fever/fever needs a loading script, which `datasets` no longer runs.
    ("fever", "fever"): HubData("pminervini/hl-fever", {"name": "v1.0"}),
    ("fever", "fever/fever"): HubData("fever/fever", {"name": "v1.0"}),
}
# Short names of the data sets that any environment takes.
ANY = {
    "wikibigedit": HubData("lukasthede/WikiBigEdit", {}),
    "ultraeditbench": HubData("XiaojieGu/UltraEditBench", {}),
    "wiki_recent": _knowedit("wiki_recent/recent_train.json", "wiki_recent/recent_test.json"),
    "wiki_counterfact": _knowedit("wiki_counterfact/train_cf.json", "wiki_counterfact/test_cf.json"),
    "wikibio": _knowedit("WikiBio/wikibio-train-all.json", "WikiBio/wikibio-test-all.json"),
}


def open_hub(kind: str, name: str, split: str) -> tuple[str, Iterable[Mapping[str, object]]]:
    """A description of the place, and the rows of a hub data set's split: streamed, or without a network from the copy
    in the library's cache.

    Raises:
        KnowledgeError: the data set cannot be downloaded or loaded, or lacks the split.
    """
    known = USUAL.get((kind, name)) or ANY.get(name) or HubData(name, {})
    place = f"hub data set {known.path}"
    try:
        loaded = _streamed(known)
    except Exception as error:  # the library passes on the errors of dozens of modules
        raise KnowledgeError(
            f"{place}: cannot be loaded ({type(error).__name__}: {error}); if {name!r} was meant as a file, check the "
            "path; without a network, download the data elsewhere and pass the file's path",
            reason="hub data set not loaded",
        ) from error
    return _choose(loaded, split, place)


def _streamed(data: HubData) -> Any:
    import datasets  # here, since it takes a second and other sources do not need it

    try:
        return datasets.load_dataset(data.path, streaming=True, **data.arguments)
    except Exception as error:
        try:
            # Without a network this reads the library's cache. A set that cannot be streamed is downloaded whole.
            return datasets.load_dataset(data.path, **data.arguments)
        except Exception:  # whatever the library raises here, the first error says why
            raise error from None


def open_folder(folder: Path, split: str, hint: str) -> tuple[str, Iterable[Mapping[str, object]]]:
    """A description of the place, and the rows of a folder that `save_to_disk` wrote or `load_dataset` can read.

    `hint` is the file name that would be read without the library, for the error message.

    Raises:
        KnowledgeError: the folder contains no such data set, or lacks the split.
    """
    import datasets

    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    try:
        loaded = datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(str(folder))
    except Exception as error:  # as in open_hub
        raise KnowledgeError(
            f"{folder}: holds no {hint} and no data set that can be loaded ({type(error).__name__}: {error}); "
            "name the file, or give a folder with one of these",
            reason="folder not loaded",
        ) from error
    return _choose(loaded, split, f"data set folder {folder.name}")


def rows_of(rows: Iterable[Mapping[str, object]], place: str) -> Iterator[Row | KnowledgeError]:
    """A data set's rows with their places.

    Raises:
        KnowledgeError: the rows cannot be read further, such as when the network fails.
    """
    number = 0
    try:
        for number, value in enumerate(rows):
            yield row_of(value, f"{place}, row {number}")
    except Exception as error:  # as in open_hub
        if isinstance(error, KnowledgeError):
            raise
        raise KnowledgeError(
            f"{place}: cannot be read after row {number} ({type(error).__name__}: {error}); try again, or download the "
            "data and pass the file's path",
            reason="hub data set not read",
        ) from error


def _choose(loaded: Any, split: str, place: str) -> tuple[str, Iterable[Mapping[str, object]]]:
    if not isinstance(loaded, Mapping):  # a single split that was saved by itself
        return place, loaded
    split_names = ("train",) if split == "train" else EVAL_SPLITS
    for name in split_names:
        if name in loaded:
            return f"{place}, split {name}", loaded[name]
    raise KnowledgeError(
        f"{place}: has the splits {', '.join(loaded)}, none of which serves as {split!r} "
        f"(that is {' or '.join(split_names)}); ask for another split, or pass a mapping such as {{{split!r}: path}}",
        reason="no such split",
    )
