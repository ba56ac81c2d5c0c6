"""Large data sets, whose records stay on disk."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from rledit_env.knowledge import (
    KnowledgeError,
    KnowledgeStream,
    StoredRecords,
    collecting,
    held_out,
    load_knowledge,
    source,
)

FACTS = 60


def wiki(number: int) -> dict[str, Any]:
    return {
        "subject": f"Town {number}", "update": f"Who governs Town {number}?", "ans": f"Mayor {number}é",
        "rephrase": f"Which person rules Town {number}?", "personas": None, "loc": f"Who governs City {number}?",
        "loc_ans": "Ann", "mhop": None, "mhop_ans": None,
    }  # fmt: skip


def loose(number: int) -> dict[str, Any]:
    """A claim, which has no unrelated facts; some are repeated, some are left out."""
    label = "NOT ENOUGH INFO" if number % 7 == 3 else "SUPPORTS"
    return {"claim": f"Town {number % 50} is old", "label": label}


def mquake(number: int) -> dict[str, Any]:
    rewrites = [
        {"prompt": "{} lies in", "subject": f"{name} {number}", "target_new": {"str": "A"}, "target_true": {"str": "B"}}
        for name in ("Town", "River")
    ]
    return {"requested_rewrite": rewrites, "questions": [f"Which land has Town {number}?"], "new_answer": "C"}


@pytest.fixture(autouse=True)
def few_are_many(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Makes every data set of these tests a large one, and keeps what `datasets` prepares out of the user's cache."""
    monkeypatch.setattr(source, "LARGE", 1)
    monkeypatch.setattr(collecting, "HELD", 10)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def as_lines(rows: list[dict[str, Any]]) -> str:
    return "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"


def as_list(rows: list[dict[str, Any]]) -> str:
    return json.dumps(rows, ensure_ascii=False, indent=1)


def as_objects(rows: list[dict[str, Any]]) -> str:
    return "\n".join(json.dumps(row, indent=2) for row in rows)


FORMS = {"lines": as_lines, "list": as_list, "objects": as_objects}
KINDS = {"wiki": ("zsre", wiki), "loose": ("fever", loose), "mquake": ("counterfact", mquake)}


@pytest.mark.filterwarnings("ignore:.* no paraphrases")
@pytest.mark.parametrize("write", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(("kind", "row"), KINDS.values(), ids=KINDS)
def test_stored_records_are_those_that_a_small_data_set_holds(
    write: Callable[..., str], kind: str, row: Callable[[int], dict[str, Any]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = tmp_path / "facts.json"
    path.write_text(write([row(i) for i in range(FACTS)]), encoding="utf-8")
    stored = load_knowledge(kind, path)
    monkeypatch.setattr(source, "LARGE", 1 << 30)
    monkeypatch.setattr(collecting, "HELD", 1 << 30)
    held = load_knowledge(kind, path)
    assert isinstance(stored.records, StoredRecords) and isinstance(held.records, tuple)
    assert list(stored) == list(held)
    assert (stored.skipped, stored.lacks, stored.source) == (held.skipped, held.lacks, held.source)


def test_rows_are_read_across_the_chunks_of_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rledit_env.knowledge.scanning.CHUNK", 7)
    path = tmp_path / "facts.json"
    path.write_text(as_list([wiki(i) for i in range(FACTS)]), encoding="utf-8")
    dataset = load_knowledge("zsre", path)
    assert [record.target for record in dataset] == [f"Mayor {i}é" for i in range(FACTS)]
    assert dataset[FACTS - 1].origin == f"facts.json, line {2 + 11 * (FACTS - 1)}"


def test_the_same_seed_gives_the_same_batches(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text(as_lines([wiki(i) for i in range(FACTS)]), encoding="utf-8")
    dataset, drawn = load_knowledge("zsre", path), []
    for seed in (0, 0, 1):
        stream = KnowledgeStream(dataset, 5, 4)
        stream.reset(np.random.default_rng(seed))
        drawn.append([record.prompt for t in range(5) for record in stream.batch(t)])
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 20


def test_parts_of_stored_records_stay_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text(as_lines([wiki(i) for i in range(FACTS)]), encoding="utf-8")
    first, last = held_out(load_knowledge("zsre", path))
    assert (len(first), len(last)) == (48, 12)
    assert isinstance(last.records, StoredRecords)
    assert last[0].prompt == "Who governs Town 48?"
    assert [record.prompt for record in last[-2:]] == ["Who governs Town 58?", "Who governs Town 59?"]
    with pytest.raises(IndexError):
        last[12]


def test_stored_records_are_copied_and_pickled(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text(as_lines([loose(i) for i in range(FACTS)]), encoding="utf-8")
    dataset = load_knowledge("fever", path)
    for other in (copy.deepcopy(dataset), pickle.loads(pickle.dumps(dataset))):
        assert list(other) == list(dataset)


def test_a_file_that_has_changed_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text(as_lines([wiki(i) for i in range(FACTS)]), encoding="utf-8")
    dataset = load_knowledge("zsre", path)
    path.write_text(as_lines([wiki(i) for i in range(FACTS + 1)]), encoding="utf-8")
    with pytest.raises(KnowledgeError, match="a row cannot be read again .it has changed since it was read"):
        dataset[0]
    path.unlink()
    with pytest.raises(KnowledgeError, match="a row cannot be read again"):
        dataset[0]


# -- bad rows ----------------------------------------------------------------------------------------------------------


def test_a_bad_row_far_down_is_named_before_any_work(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text(as_lines([wiki(i) | ({"ans": 3} if i == 40 else {}) for i in range(FACTS)]), encoding="utf-8")
    with pytest.raises(KnowledgeError, match=r"facts\.jsonl, line 81, field 'ans': has the wrong type int"):
        load_knowledge("zsre", path)


def test_bad_rows_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    lines = as_lines([wiki(i) | ({"ans": 3} if i % 20 == 10 else {}) for i in range(FACTS)])
    path.write_text(lines + "{broken\n[1]\n", encoding="utf-8")
    with pytest.warns(UserWarning, match="5 faulty rows skipped: 3 × field 'ans' has the wrong type int, 1 × "):
        dataset = load_knowledge("zsre", path, on_error="skip")
    assert isinstance(dataset.records, StoredRecords)
    assert [record.prompt for record in dataset] == [f"Who governs Town {i}?" for i in range(FACTS) if i % 20 != 10]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (as_list([wiki(i) for i in range(20)])[:-1], "line 221: malformed JSON .the list breaks off after this entry"),
        (as_list([wiki(i) for i in range(20)])[:-30], "line 211: malformed JSON"),
        (as_list([wiki(0), wiki(1)])[:-1] + "{}]", "line 24: malformed JSON .the list breaks off before this"),
    ],
)
def test_a_list_that_breaks_off_is_an_error(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(KnowledgeError, match=rf"facts\.json, {message}"):
        load_knowledge("zsre", path)


def test_bad_utf_8_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_bytes(as_list([wiki(i) for i in range(20)]).encode().replace("Mayor 19é".encode(), b"Mayor \xff"))
    with pytest.raises(KnowledgeError, match=r"facts\.json, line 214: bad UTF-8 .byte 0xff"):
        load_knowledge("zsre", path)


# -- the datasets library ----------------------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[dict[str, Any]]], None]:
    """Serves rows under any hub id: from a JSON file, through the library's own streaming."""
    load_dataset = datasets.load_dataset

    def serve(rows: list[dict[str, Any]]) -> None:
        path = tmp_path / "served.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows))

        def load(name: str, streaming: bool, **arguments: Any) -> Any:
            assert streaming
            return load_dataset("json", data_files={"train": str(path)}, streaming=True)

        monkeypatch.setattr(datasets, "load_dataset", load)

    return serve


def test_a_hub_data_set_is_streamed_to_disk(served: Callable[..., None]) -> None:
    served([wiki(i) for i in range(FACTS)])
    dataset = load_knowledge("zsre", "someone/wiki")
    assert isinstance(dataset.records, StoredRecords)
    assert [record.prompt for record in dataset] == [f"Who governs Town {i}?" for i in range(FACTS)]
    assert dataset[59].origin == "hub data set someone/wiki, split train, row 59"


def test_a_small_hub_data_set_is_held(served: Callable[..., None]) -> None:
    served([wiki(i) for i in range(10)])
    assert isinstance(load_knowledge("zsre", "someone/wiki").records, tuple)


def test_the_temporary_file_goes_with_the_data_set(served: Callable[..., None]) -> None:
    served([wiki(i) for i in range(FACTS)])
    dataset = load_knowledge("zsre", "someone/wiki")
    path = dataset.records.rows.path
    assert path.is_file()
    part, dataset = dataset[:3], None
    gc.collect()
    assert path.is_file() and part[0].target == "Mayor 0é"
    del part
    gc.collect()
    assert not path.exists()


def test_a_temporary_file_is_removed_after_an_error(served: Callable[..., None], monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    served([wiki(i) | ({"ans": ""} if i == 40 else {}) for i in range(FACTS)])
    with pytest.raises(KnowledgeError, match="hub data set someone/wiki, split train, row 40, field 'ans': is empty"):
        load_knowledge("zsre", "someone/wiki")
    gc.collect()
    assert not list(tmp_path.glob("rledit-*"))


def test_a_stream_that_breaks_off_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield wiki(0)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", lambda name, **arguments: {"train": rows()})
    with pytest.raises(KnowledgeError, match="cannot be read after row 0 .ConnectionError: no route.*try again"):
        load_knowledge("zsre", "someone/wiki")


def test_without_a_network_the_library_s_cached_copy_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, streaming: bool = False) -> Any:
        if streaming:
            raise ConnectionError("no route to host")
        return {"train": [wiki(0)]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_knowledge("zsre", "someone/wiki")[0].target == "Mayor 0é"


@pytest.mark.parametrize(
    ("name", "path"),
    [("wikibigedit", "lukasthede/WikiBigEdit"), ("ultraeditbench", "XiaojieGu/UltraEditBench"),
     ("wiki_recent", "zjunlp/KnowEdit")],
)  # fmt: skip
def test_short_names_stand_for_hub_ids_in_any_environment(name: str, path: str, monkeypatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda id, **more: asked.append(id) or {"train": [wiki(0)]})
    load_knowledge("fever", name)
    assert asked == [path]


# -- memory ------------------------------------------------------------------------------------------------------------

MEASURE = """
import json, re, sys
from pathlib import Path
import numpy as np
from rledit_env.knowledge import KnowledgeStream, collecting, load_knowledge, source
how, path, collecting.HELD, source.LARGE = *sys.argv[1:3], *map(int, sys.argv[3:])
load_knowledge("zsre", "bundled")  # what a first call imports
if how == "hub":
    import datasets
    load, files = datasets.load_dataset, {"train": path}
    datasets.load_dataset = lambda name, streaming: load("json", data_files=files, streaming=True)
    for row in load("json", data_files=files, streaming=True)["train"].take(1): pass
    path = "someone/wiki"
def memory(key): return int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = memory("VmRSS")
dataset = load_knowledge("zsre", path)
stream = KnowledgeStream(dataset, 20, 20)
stream.reset(np.random.default_rng(0))
assert len({record.prompt for t in range(20) for record in stream.batch(t)}) == 400
print(json.dumps([len(dataset), type(dataset.records).__name__, round(memory("VmHWM") - before, 1)]))
"""


def peak(how: str, path: Path, most_held: int = 20_000, large: int = 32 << 20) -> list[Any]:
    """The facts, how they are kept, and by how many MiB a fresh process grew at most while it read and drew."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a part of a process is measured on Linux only")
    arguments = [sys.executable, "-c", MEASURE, how, str(path), str(most_held), str(large)]
    result = subprocess.run(arguments, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def write_many(path: Path, count: int) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            file.write(json.dumps(wiki(i) | {"note": "x" * 400}) + "\n")
    return path


def test_five_times_as_many_facts_need_little_more_memory_than_those_that_are_held(tmp_path: Path) -> None:
    held = peak("file", write_many(tmp_path / "held.jsonl", 5_000), 5_000)
    stored = peak("file", write_many(tmp_path / "stored.jsonl", 25_000), 5_000, large=1)
    assert (held[:2], stored[:2]) == ([5_000, "tuple"], [25_000, "StoredRecords"])
    assert stored[2] < held[2] + 10, (held, stored)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["file", "hub"])
def test_half_a_million_facts_need_less_than_a_hundred_bytes_each(how: str, tmp_path: Path) -> None:
    # Both are stored: the buffers of `datasets`, some 50 MiB, are full with 25,000 facts.
    few = peak(how, write_many(tmp_path / "few.jsonl", 25_000), 20_000, large=1)
    many = peak(how, write_many(tmp_path / "many.jsonl", 500_000), 20_000, large=1)
    assert (few[:2], many[:2]) == ([25_000, "StoredRecords"], [500_000, "StoredRecords"])
    assert many[2] - few[2] < 475_000 * 100 / 2**20, (few, many)
