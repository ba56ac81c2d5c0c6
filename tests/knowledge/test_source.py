import gzip
import json

import pytest

from rledit_env.knowledge import KnowledgeError, load_knowledge, source

ROW = {
    "src": "What is made by UniFirst?",
    "rephrase": "What is the product of UniFirst?",
    "ans": "aircraft",
    "loc": "nq question: who wrote hamlet",
    "loc_ans": "Shakespeare",
}


def row(number: int) -> dict:
    return ROW | {"src": f"question {number}?"}


def prompts(dataset) -> list[str]:
    return [record.prompt for record in dataset]


FAULTS = {
    "malformed JSON": (b'{"src": "cut off', r"facts\.jsonl, line 2: malformed JSON"),
    "bad UTF-8": (b'{"src": "caf\xe9"}', r"facts\.jsonl, line 2: bad UTF-8 \(byte 0xe9\)"),
    "not an object": (b"[1, 2]", r"facts\.jsonl, line 2: not an object \(\[1, 2\]\)"),
    "field 'loc' is missing": (
        json.dumps({name: value for name, value in ROW.items() if name != "loc"}).encode(),
        r"facts\.jsonl, line 2, field 'loc': is missing; .*RLEdit's ZsRE \(src, rephrase, ans, loc, loc_ans\)",
    ),
    "field 'ans' is empty": (
        json.dumps(ROW | {"ans": "  "}).encode(),
        r"facts\.jsonl, line 2, field 'ans': is empty \('  '\); correct it",
    ),
    "field 'ans' has the wrong type int": (
        json.dumps(ROW | {"ans": 1987}).encode(),
        r"facts\.jsonl, line 2, field 'ans': has the wrong type int \(1987\); give a string",
    ),
    "field 'ans' is not valid Unicode text": (
        json.dumps(ROW).replace("aircraft", "\\ud800").encode(),
        r"facts\.jsonl, line 2, field 'ans': is not valid Unicode text",
    ),
    "unknown schema": (
        b'{"question": "Who?", "answer": "Ann"}',
        r"facts\.jsonl, line 2: unknown schema, with the fields question, answer; .*MEND's flat ZsRE: src, rephrase",
    ),
}


@pytest.mark.parametrize("reason", FAULTS)
def test_a_faulty_line_names_file_line_and_field(write_rows, reason):
    line, message = FAULTS[reason]
    with pytest.raises(KnowledgeError, match=message):
        load_knowledge("zsre", write_rows("facts.jsonl", row(1), line, row(3)))


def test_faulty_lines_can_be_skipped_with_counts_and_one_warning(write_rows):
    lines = [line for line, _ in FAULTS.values()]
    path = write_rows("facts.jsonl", row(1), *lines, lines[0], row(3))
    with pytest.warns(
        UserWarning, match=r"file facts\.jsonl: 9 faulty rows skipped: 2 × malformed JSON, 1 ×"
    ) as caught:
        dataset = load_knowledge("zsre", path, on_error="skip")
    assert len(caught) == 1
    assert prompts(dataset) == ["question 1?", "question 3?"]
    assert dataset.skipped == {reason: 2 if reason == "malformed JSON" else 1 for reason in FAULTS}


def test_a_file_with_nothing_usable_is_an_error_even_when_skipping(write_rows):
    path = write_rows("facts.jsonl", b"oops")
    with (
        pytest.warns(UserWarning, match="1 faulty rows"),
        pytest.raises(KnowledgeError, match=r"facts\.jsonl: no usable record \(skipped: 1 × malformed JSON\)"),
    ):
        load_knowledge("zsre", path, on_error="skip")


def test_an_empty_file_is_an_error(write_rows):
    with pytest.raises(KnowledgeError, match=r"facts\.jsonl: no usable record"):
        load_knowledge("zsre", write_rows("facts.jsonl"))


def test_blank_lines_are_passed_over_and_still_counted_in_line_numbers(write_rows):
    dataset = load_knowledge("zsre", write_rows("facts.jsonl", row(1), b"", row(2), b"  \r", b""))
    assert [record.origin for record in dataset] == ["facts.jsonl, line 1", "facts.jsonl, line 3"]


def test_a_byte_order_mark_and_windows_line_ends_are_read(write_rows):
    first = b"\xef\xbb\xbf" + json.dumps(row(1)).encode() + b"\r"
    assert prompts(load_knowledge("zsre", write_rows("facts.jsonl", first, row(2)))) == ["question 1?", "question 2?"]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_list_is_read_with_the_line_of_every_entry(tmp_path, indent):
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([row(1), row(2)], indent=indent))
    dataset = load_knowledge("zsre", path)
    assert prompts(dataset) == ["question 1?", "question 2?"]
    assert [r.origin for r in dataset] == [f"facts.json, line {n}" for n in ((2, 9) if indent else (1, 1))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"[{json.dumps(ROW)},\n 7]", "facts.json, line 2: not an object"),
        (f"[{json.dumps(ROW)},\n {{]", "facts.json, line 2: malformed JSON"),
        (f"[{json.dumps(ROW)}", "facts.json, line 1: malformed JSON .the list breaks off"),
        ("[]", "facts.json: no usable record"),
    ],
)
def test_a_faulty_json_list_names_file_and_line(tmp_path, text, message):
    path = tmp_path / "facts.json"
    path.write_text(text)
    with pytest.raises(KnowledgeError, match=message):
        load_knowledge("zsre", path)


def test_a_json_list_that_breaks_off_is_an_error_even_when_skipping(tmp_path):
    path = tmp_path / "facts.json"
    path.write_text(f"[{json.dumps(ROW)},")
    with pytest.raises(KnowledgeError, match="malformed JSON"):
        load_knowledge("zsre", path, on_error="skip")


def test_lists_and_objects_one_after_the_other_are_read_with_their_lines(tmp_path):
    path = tmp_path / "facts.txt"
    texts = [json.dumps([row(1)]), json.dumps(row(2), indent=1), json.dumps([row(3), row(4)])]
    path.write_text("\n".join(texts))
    dataset = load_knowledge("zsre", path)
    assert prompts(dataset) == [f"question {n}?" for n in (1, 2, 3, 4)]
    assert [r.origin for r in dataset] == [f"facts.txt, line {n}" for n in (1, 2, 9, 9)]


def test_a_table_is_read_with_the_line_of_every_row(tmp_path):
    path = tmp_path / "facts.csv"
    path.write_text('src,rephrase,ans,loc,loc_ans\n"a\nb",c,d,e,f\n\ng,h,i,j,k\n')
    assert [(r.prompt, r.origin) for r in load_knowledge("zsre", path)] == [
        ("a\nb", "facts.csv, line 2"), ("g", "facts.csv, line 5")
    ]


def test_a_table_s_row_with_more_cells_than_columns_is_named(tmp_path):
    path = tmp_path / "facts.csv"
    path.write_text("src,rephrase,ans,loc,loc_ans\na,b,c,d,e\na, or b,c,d,e,f\n")
    with pytest.raises(KnowledgeError, match="line 3: has 6 cells for 5 columns; put quotes around a text"):
        load_knowledge("zsre", path)


def test_bad_utf8_in_a_json_list_names_the_line(tmp_path):
    path = tmp_path / "facts.json"
    path.write_bytes(b'[\n{"src": "caf\xe9"}]')
    with pytest.raises(KnowledgeError, match=r"facts\.json, line 2: bad UTF-8 \(byte 0xe9\)"):
        load_knowledge("zsre", path)


def test_json_lines_may_be_called_json(write_rows):
    assert len(load_knowledge("zsre", write_rows("facts.json", row(1), row(2)))) == 2


def test_compressed_files_are_read(write_rows, tmp_path):
    packed = tmp_path / "facts.jsonl.gz"
    packed.write_bytes(gzip.compress(write_rows("facts.jsonl", row(1), row(2)).read_bytes()))
    dataset = load_knowledge("zsre", packed)
    assert (dataset.source, dataset[1].origin) == ("file facts.jsonl.gz", "facts.jsonl.gz, line 2")


def test_a_broken_compressed_file_is_named(write_rows, tmp_path):
    packed = tmp_path / "facts.jsonl.gz"
    packed.write_bytes(gzip.compress(write_rows("facts.jsonl", row(1)).read_bytes())[:-12])
    with pytest.raises(KnowledgeError, match=r"facts\.jsonl\.gz: cannot be read"):
        load_knowledge("zsre", packed)


def test_a_folder_is_read_by_kind_and_split(write_rows):
    folder = write_rows("zsre_train.jsonl", row(1)).parent
    write_rows("zsre_eval.json", row(2))
    assert prompts(load_knowledge("zsre", folder)) == ["question 1?"]
    evaluation = load_knowledge("zsre", str(folder), "test")
    assert (prompts(evaluation), evaluation.split, evaluation.source) == (
        ["question 2?"],
        "eval",
        "file zsre_eval.json",
    )


def test_a_mapping_chooses_the_data_of_a_split(write_rows):
    path = write_rows("mine.jsonl", row(1))
    data = {"train": path, "test": [row(2), row(3)]}
    assert prompts(load_knowledge("zsre", data)) == ["question 1?"]
    assert prompts(load_knowledge("zsre", data, "eval")) == ["question 2?", "question 3?"]


def test_a_mapping_without_the_split_says_which_it_has():
    with pytest.raises(KnowledgeError, match="no split 'eval', only train"):
        load_knowledge("zsre", {"train": [ROW]}, "eval")


def test_a_single_record_given_as_data_is_explained():
    with pytest.raises(KnowledgeError, match="key 'src', which is no split.*a single record goes in a list"):
        load_knowledge("zsre", ROW)


def test_a_list_is_named_as_the_source_and_its_items_as_the_place():
    dataset = load_knowledge("zsre", [row(1), row(2)])
    assert (dataset.source, dataset[1].origin) == ("list of 2 dictionaries", "list item 1")


def test_something_that_is_no_dictionary_in_a_list_is_named():
    with pytest.raises(KnowledgeError, match="list item 1: not an object .'What"):
        load_knowledge("zsre", [ROW, "What is made by UniFirst?"])


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/no/such/folder"])
def test_a_missing_path_is_never_asked_of_the_hub(name):
    with pytest.raises(KnowledgeError, match="there is no such file or folder"):
        load_knowledge("zsre", name)


def test_data_of_another_type_is_an_error():
    with pytest.raises(KnowledgeError, match="data is 7"):
        load_knowledge("zsre", 7)


def test_bundled_data_says_that_it_is_not_the_published_data(write_rows, tmp_path, monkeypatch):
    write_rows("zsre_train.jsonl", row(1))
    monkeypatch.setattr(source, "BUNDLED", tmp_path)
    dataset = load_knowledge("zsre")
    assert dataset.source == "bundled sample (open fact tables; not the published ZsRE)"
    assert dataset[0].origin == "bundled zsre_train.jsonl, line 1"


def test_missing_bundled_data_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "BUNDLED", tmp_path)
    with pytest.raises(KnowledgeError, match="bundled data fever_eval is missing"):
        load_knowledge("fever", split="eval")
