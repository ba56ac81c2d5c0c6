"""Tests of edit records as token passages."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace

import numpy as np
import pytest

from rledit_env.encoding import EncodedDataset, encode, largest_batch
from rledit_env.knowledge import EditRecord, KnowledgeDataset, UnrelatedFact, load_knowledge
from rledit_env.lm.forward import TOKEN_CHOICES
from rledit_env.lm.loading.tiny import TINY_NAMES


def text_of(lm, ids) -> str:
    return lm.tokenizer.decode(list(ids), skip_special_tokens=True)


@pytest.mark.parametrize("name", TINY_NAMES)
def test_a_record_becomes_its_edit_every_paraphrase_and_every_unrelated_pair(tiny_lm, uneven_facts, name):
    lm, record = tiny_lm(name), uneven_facts[1]
    encoded = encode(lm, record)
    assert text_of(lm, encoded.edit.targets) == " Old Church Slavonic"
    assert text_of(lm, encoded.edit.input_ids + encoded.edit.targets[-1:]) == f"{record.prompt} {record.target}"
    assert [text_of(lm, p.input_ids[: p.positions[0] + 1]) for p in encoded.paraphrases] == list(record.paraphrases)
    assert {text_of(lm, p.targets) for p in encoded.paraphrases} == {" Old Church Slavonic"}
    assert [text_of(lm, p.targets) for p in encoded.unrelated] == [" yellow", " French"]


def test_the_subject_is_found_in_the_prompt_and_in_its_paraphrases(tiny_lm):
    lm = tiny_lm()
    wordings, unrelated = ("Nigerian and Niger", "Elsewhere"), (UnrelatedFact("a", "b"),)
    record = EditRecord("Nigeria borders Niger, which is", "Peru", wordings, unrelated, subject="Niger")
    encoded = encode(lm, record)
    assert encoded.edit.subject_position == len("Nigeria borders Niger") - 1
    assert [p.subject_position for p in encoded.paraphrases] == [len("Nigerian and Niger") - 1, None]
    given = dataclasses.replace(record, subject_start=0)  # the place of a schema's {}
    assert encode(lm, given).edit.subject_position == len("Niger") - 1
    assert EncodedDataset(lm, KnowledgeDataset("zsre", "list", "train", (given,))).traced_positions("subject") == [1]


def test_text_is_joined_as_the_model_needs_it(tiny_lm):
    lm = tiny_lm()
    record = EditRecord("a:\n", "b ", ("法国的首都是",), (UnrelatedFact("(", "c"), UnrelatedFact("a ", " b")))
    encoded = encode(lm, record)
    passages = (encoded.edit, *encoded.paraphrases, *encoded.unrelated)
    assert [text_of(lm, p.input_ids + p.targets[-1:]) for p in passages] == ["a:\nb", "法国的首都是b", "(c", "a b"]


def test_each_record_is_tokenised_once(tiny_lm, uneven_facts):
    dataset = EncodedDataset(tiny_lm(), uneven_facts)
    assert dataset[np.int64(2)] is dataset[2]


def test_a_long_data_set_does_not_fill_the_memory(tiny_lm, uneven_facts, monkeypatch):
    monkeypatch.setattr("rledit_env.encoding.KEPT", 2)
    dataset = EncodedDataset(tiny_lm(), uneven_facts)
    first, second = dataset[0], dataset[1]
    assert dataset[0] is first
    dataset[2]  # takes the place of the one that was asked for longest ago
    assert dataset[0] is first and len(dataset._encoded) == 2
    assert dataset[1] is not second and dataset[1].record is second.record


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma3"])
@pytest.mark.parametrize("token", TOKEN_CHOICES)
def test_the_counted_positions_are_those_that_a_trace_returns(tiny_lm, uneven_facts, name, token):
    lm = tiny_lm(name)
    dataset = EncodedDataset(lm, uneven_facts)
    counts = dataset.traced_positions(token)
    trace = lm.trace([dataset[i].edit for i in range(len(uneven_facts))], token)
    assert counts.tolist() == np.bincount(trace.owner.numpy()).tolist()


def test_the_largest_batch_takes_the_records_with_the_most_positions():
    assert largest_batch([3, 9, 1, 4], 2) == 13
    assert largest_batch([3, 9, 1, 4], 4) == 17


@pytest.mark.parametrize("field", ["prompt", "paraphrases", "unrelated"])
def test_a_passage_longer_than_the_context_is_named_by_its_place(tiny_lm, uneven_facts, field):
    long = "very " * 120
    changed = {"prompt": long, "paraphrases": ("ok", long), "unrelated": (UnrelatedFact(long, "yes"),)}[field]
    records = (uneven_facts[0], dataclasses.replace(uneven_facts[1], **{field: changed}))
    dataset = dataclasses.replace(uneven_facts, records=records)
    with pytest.raises(ValueError, match=r"list, item 2: .* tokens, but the context of tiny-llama holds 512"):
        EncodedDataset(tiny_lm(), dataset).check_lengths()


def test_a_passage_that_just_fits_the_context_is_taken(tiny_lm, uneven_facts):
    lm = tiny_lm("tiny-gemma2")
    fits = "x" * (lm.context_length - len(" Peru") - 1)  # and the start token
    for prompt, good in ((fits, True), (fits + "x", False)):
        dataset = dataclasses.replace(uneven_facts, records=(dataclasses.replace(uneven_facts[0], prompt=prompt),))
        if good:
            EncodedDataset(lm, dataset).check_lengths()
            assert np.isfinite(lm.trace([EncodedDataset(lm, dataset)[0].edit]).loss)
        else:
            with pytest.raises(ValueError, match="513 tokens"):
                EncodedDataset(lm, dataset).check_lengths()


def test_of_records_that_stay_on_disk_only_the_latest_passages_are_kept(tiny_lm, tmp_path, monkeypatch):
    monkeypatch.setattr("rledit_env.knowledge.source.LARGE", 1)
    monkeypatch.setattr("rledit_env.knowledge.collecting.HELD", 5)
    monkeypatch.setattr("rledit_env.encoding.KEPT", 3)
    monkeypatch.setattr("rledit_env.encoding.CHUNK", 4)
    rows = [{"prompt": f"Town {i} is in", "rephrase_prompt": f"Where is town {i}?", "ans": "Peru, far away"[: 4 + i],
             "loc": "Up is", "loc_ans": "down"} for i in range(10)]
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    lm, dataset = tiny_lm(), load_knowledge("zsre", path)
    encoded, held = EncodedDataset(lm, dataset), EncodedDataset(lm, replace(dataset, records=tuple(dataset)))
    encoded.check_lengths()
    assert encoded.traced_positions("answer").tolist() == held.traced_positions("answer").tolist()
    for index in (0, 1, 2, 0, 3, 4):
        assert encoded[index].edit.input_ids == held[index].edit.input_ids
    kept = encoded[0]  # still the same
    assert encoded[0] is kept
    assert encoded[1] is not kept and len(encoded._encoded) == 3
