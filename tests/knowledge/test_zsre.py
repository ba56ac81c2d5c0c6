import pytest

from rledit_env.knowledge import ImpliedFact, KnowledgeError, UnrelatedFact, load_knowledge

MEND_FLAT = {
    "subject": "UniFirst",
    "src": "What is made by UniFirst?",
    "pred": "uniform",
    "rephrase": "What is the product of UniFirst?",
    "alt": " aircraft ",
    "answers": ["uniform", "clothes"],
    "loc": "nq question: who wrote hamlet",
    "loc_ans": "Shakespeare",
    "cond": "uniform >> aircraft || What is made by UniFirst?",
}
RLEDIT = {
    "src": "What is made by UniFirst?",
    "rephrase": "What is the product of UniFirst?",
    "ans": "aircraft",
    "loc": "nq question: who wrote hamlet",
    "loc_ans": "Shakespeare",
}
KNOWEDIT = {
    "subject": "UniFirst",
    "prompt": "What is made by UniFirst?",
    "target_new": "aircraft",
    "ground_truth": ["uniform"],
    "rephrase_prompt": "What is the product of UniFirst?",
    "locality": {
        "Relation_Specificity": [
            {"prompt": "The seat of UniFirst is", "ground_truth": ["Wilmington", "Wilmington, MA"]},
            {"prompt": "UniFirst country", "ground_truth": [["United States"]]},
        ],
        "Forgetfulness": None,
    },
    "portability": {},
}


def mend(question: str, answer: str) -> dict:
    return {
        "input": question,
        "prediction": "x",
        "alternatives": ["aircraft", "boat"],
        "filtered_rephrases": [question, f"Say: {question}"],
        "output": [{"provenance": [{"title": "a page"}]}, {"answer": answer}],
    }


def one(row):
    (record,) = load_knowledge("zsre", [row])
    return record


def test_mend_flat_edits_src_to_alt():
    record = one(MEND_FLAT)
    assert (record.prompt, record.target) == ("What is made by UniFirst?", " aircraft ")
    assert record.paraphrases == ("What is the product of UniFirst?",)
    assert (record.original, record.subject, record.origin) == ("uniform", "UniFirst", "list item 0")


def test_natural_questions_keep_their_prefix_and_gain_a_question_mark():
    expected = (UnrelatedFact("nq question: who wrote hamlet?", "Shakespeare"),)
    assert one(MEND_FLAT).unrelated == expected
    assert one(MEND_FLAT | {"loc": "nq question: who wrote hamlet?"}).unrelated == expected


def test_a_locality_prompt_without_the_prefix_stays_as_it_is():
    assert one(MEND_FLAT | {"loc": "Hamlet was written by"}).unrelated[0].prompt == "Hamlet was written by"


def test_rledit_edits_src_to_ans():
    record = one(RLEDIT)
    assert (record.prompt, record.target, record.original) == ("What is made by UniFirst?", "aircraft", None)
    assert record.unrelated == (UnrelatedFact("nq question: who wrote hamlet?", "Shakespeare"),)


def test_knowedit_takes_every_locality_group_and_the_first_alias():
    record = one(KNOWEDIT)
    assert (record.prompt, record.target, record.original) == ("What is made by UniFirst?", "aircraft", "uniform")
    assert record.unrelated == (
        UnrelatedFact("The seat of UniFirst is", "Wilmington", "Relation_Specificity"),
        UnrelatedFact("UniFirst country", "United States", "Relation_Specificity"),
    )


def test_knowedit_s_portability_is_what_the_edit_implies():
    groups = {"Reasoning": [{"prompt": "Who flies UniFirst's?", "ground_truth": "pilots"}], "Other": None, "None": []}
    implied = one(KNOWEDIT | {"portability": groups}).implied
    assert implied == (ImpliedFact("Who flies UniFirst's?", "pilots", "Reasoning"),)
    assert one(KNOWEDIT).implied == one({k: v for k, v in KNOWEDIT.items() if k != "portability"}).implied == ()
    with pytest.raises(KnowledgeError, match=r"field 'portability\.Reasoning\[0\]\.ground_truth': is missing"):
        one(KNOWEDIT | {"portability": {"Reasoning": [{"prompt": "Who?"}]}})


def test_flat_zsre_s_new_question_is_what_the_edit_implies():
    asked = {"Recalled Relation": "(x)", "New Question": "Where does it fly?", "New Answer": "north"}
    assert one(MEND_FLAT | {"portability": asked}).implied == (ImpliedFact("Where does it fly?", "north"),)
    assert one(MEND_FLAT).implied == ()
    with pytest.raises(KnowledgeError, match=r"field 'portability\.New Answer': is missing"):
        one(MEND_FLAT | {"portability": {"New Question": "Where?"}})


def test_knowedit_without_any_locality_borrows_another_row_s():
    bare = KNOWEDIT | {"prompt": "What is made by Airbus?", "locality": {"Relation_Specificity": None}}
    record, other = load_knowledge("zsre", [bare, KNOWEDIT])
    assert record.unrelated == other.unrelated[:1]
    with pytest.raises(KnowledgeError, match="list item 0: no other row can serve as its unrelated fact"):
        one(bare)


def test_knowedit_names_the_nested_field_that_is_empty():
    row = KNOWEDIT | {"locality": {"Relation_Specificity": [{"prompt": "UniFirst is", "ground_truth": []}]}}
    with pytest.raises(KnowledgeError, match=r"field 'locality\.Relation_Specificity\[0\]\.ground_truth': is empty"):
        one(row)


def test_mend_takes_the_first_alternative_and_drops_the_rephrase_that_is_the_question():
    first, second = load_knowledge("zsre", [mend("Who?", "Ann"), mend("Where?", "Rome")])
    assert (first.prompt, first.target, first.paraphrases, first.original) == (
        "Who?",
        "aircraft",
        ("Say: Who?",),
        "Ann",
    )
    assert first.unrelated == (UnrelatedFact("Where?", "Rome"),)
    assert second.unrelated == (UnrelatedFact("Who?", "Ann"),)


@pytest.mark.parametrize("lack", [{"alternatives": []}, {"filtered_rephrases": []}, {"filtered_rephrases": ["When?"]}])
def test_mend_rows_that_its_own_loader_leaves_out_are_counted(lack):
    dataset = load_knowledge("zsre", [mend("Who?", "Ann"), mend("Where?", "Rome"), mend("When?", "1900") | lack])
    assert len(dataset) == 2
    assert dataset.skipped == {"no alternatives or no rephrases": 1}


def test_a_target_that_is_also_the_original_answer_is_kept():
    assert one(MEND_FLAT | {"alt": "uniform"}).target == "uniform"


@pytest.mark.parametrize("row", [MEND_FLAT, RLEDIT, KNOWEDIT], ids=["mend flat", "rledit", "knowedit"])
@pytest.mark.parametrize(("value", "problem"), [("", "is empty"), (7, "has the wrong type int"), (None, "is missing")])
def test_a_faulty_required_field_is_named(row, value, problem):
    required = [f for f in row if f in ("src", "rephrase", "alt", "ans", "loc", "loc_ans", "prompt", "rephrase_prompt")]
    for field in required:
        if field == "ans" and value is None:
            continue  # without it the row is as near to MEND's flat schema; see the next test
        with pytest.raises(KnowledgeError, match=f"list item 0, field '{field}': {problem}"):
            one(row | {field: value})


def test_a_row_without_any_target_names_the_field_and_the_schema_it_was_taken_for():
    row = {name: value for name, value in RLEDIT.items() if name != "ans"}
    with pytest.raises(KnowledgeError, match="field 'alt': is missing; the row looks like MEND's flat ZsRE"):
        one(row)


@pytest.mark.data
def test_the_published_files_are_read_whole(published):
    with pytest.warns(UserWarning, match="2 faulty rows skipped: 2 × field 'alt' is empty"):
        train = load_knowledge("zsre", published, "train", on_error="skip")
    assert (len(train), train.skipped) == (998, {"field 'alt' is empty": 2})
    assert all(fact.prompt.startswith("nq question: ") for record in train for fact in record.unrelated)
    assert all(fact.prompt.endswith("?") for record in train for fact in record.unrelated)
    evaluation = load_knowledge("zsre", published, "eval")
    assert (len(evaluation), evaluation.skipped) == (650, {})
    assert all(len(record.unrelated) == 2 for record in evaluation)


@pytest.mark.data
def test_the_published_training_file_names_its_first_empty_target(published):
    with pytest.raises(KnowledgeError, match=r"zsre_train\.jsonl, line 535, field 'alt': is empty"):
        load_knowledge("zsre", published, "train")
