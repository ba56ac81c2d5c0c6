import json

import datasets
import pytest

from rledit_env.knowledge import KnowledgeError, load_knowledge


def row(number: int) -> dict:
    return {
        "src": f"question {number}?",
        "rephrase": f"rephrased {number}?",
        "ans": "aircraft",
        "loc": "nq question: who wrote hamlet",
        "loc_ans": "Shakespeare",
    }


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keeps what `datasets` prepares out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def saved(tmp_path):
    splits = {"train": [row(1), row(2)], "test": [row(3)]}
    folder = tmp_path / "saved"
    datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(folder)
    return folder


def prompts(dataset) -> list[str]:
    return [record.prompt for record in dataset]


def test_a_folder_written_by_save_to_disk_is_read_by_split(saved):
    train, evaluation = (load_knowledge("zsre", saved, split) for split in ("train", "eval"))
    assert (prompts(train), prompts(evaluation)) == (["question 1?", "question 2?"], ["question 3?"])
    assert train.source == "data set folder saved, split train"
    assert evaluation[0].origin == "data set folder saved, split test, row 0"


def test_a_single_saved_split_is_used_whole(tmp_path):
    datasets.Dataset.from_list([row(1)]).save_to_disk(tmp_path / "one")
    assert prompts(load_knowledge("zsre", tmp_path / "one", "eval")) == ["question 1?"]


def test_a_folder_of_json_files_is_loaded_by_split(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for name, number in (("train", 1), ("validation", 2), ("test", 3)):
        (folder / f"{name}.json").write_text(json.dumps([row(number)]))
    assert prompts(load_knowledge("zsre", folder, "train")) == ["question 1?"]
    assert prompts(load_knowledge("zsre", folder, "eval")) == ["question 2?"]


def test_fields_that_a_table_fills_with_nothing_count_as_absent(tmp_path):
    mend_flat = {name: value for name, value in row(2).items() if name != "ans"} | {"alt": "boat"}
    datasets.Dataset.from_list([row(1) | {"alt": None}, mend_flat | {"ans": None}]).save_to_disk(tmp_path / "mixed")
    assert [record.target for record in load_knowledge("zsre", tmp_path / "mixed")] == ["aircraft", "boat"]


def test_a_missing_split_names_those_there_are(tmp_path):
    only = datasets.DatasetDict({"test": datasets.Dataset.from_list([row(1)])})
    only.save_to_disk(tmp_path / "only")
    with pytest.raises(KnowledgeError, match="has the splits test, none of which serves as 'train'"):
        load_knowledge("zsre", tmp_path / "only", "train")


def test_a_folder_without_data_names_the_file_that_was_looked_for(tmp_path):
    (tmp_path / "bare").mkdir()
    with pytest.raises(KnowledgeError, match=r"bare: holds no zsre_train\.jsonl and no data set"):
        load_knowledge("zsre", tmp_path / "bare")


def test_usual_names_stand_for_hub_ids_and_the_source_names_the_id(monkeypatch):
    asked = []

    def load_dataset(path, **arguments):
        asked.append((path, arguments))
        return {"train": [row(1)]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_knowledge("zsre", "zsre").source == "hub data set wangzn2001/zsre, split train"
    assert load_knowledge("zsre", "someone/zsre").source == "hub data set someone/zsre, split train"
    assert asked == [("wangzn2001/zsre", {"streaming": True}), ("someone/zsre", {"streaming": True})]


def test_a_hub_data_set_that_cannot_be_fetched_says_what_to_do(monkeypatch):
    def load_dataset(path, **arguments):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(KnowledgeError, match=r"azhx/counterfact: cannot be loaded \(ConnectionError.*pass the file's"):
        load_knowledge("counterfact", "azhx/counterfact")
