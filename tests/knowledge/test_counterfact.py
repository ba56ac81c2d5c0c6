import pytest

from rledit_env.knowledge import KnowledgeError, UnrelatedFact, load_knowledge

FLAT = {
    "case_id": 0,
    "prompt": "The mother tongue of Danielle Darrieux is",
    "target_new": "English",
    "subject": "Danielle Darrieux",
    "ground_truth": "French",
    "rephrase_prompt": "Danielle Darrieux speaks",
    "locality_prompt": "Michel Rocard is a native speaker of",
    "locality_ground_truth": "French",
}
ROME = {
    "case_id": 0,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["Danielle Darrieux speaks", "Danielle Darrieux's language:"],
    "neighborhood_prompts": ["Michel Rocard is a native speaker of", "Colette spoke"],
}


def one(row):
    (record,) = load_knowledge("counterfact", [row])
    return record


def test_the_flat_schema_edits_prompt_to_target_new():
    record = one(FLAT)
    assert (record.prompt, record.target) == ("The mother tongue of Danielle Darrieux is", "English")
    assert (record.original, record.subject) == ("French", "Danielle Darrieux")
    assert record.paraphrases == ("Danielle Darrieux speaks",)
    assert record.unrelated == (UnrelatedFact("Michel Rocard is a native speaker of", "French"),)


def test_the_flat_schema_may_hold_lists():
    lists = {"rephrase_prompt": ["a", "b"], "locality_prompt": ["c", "d"], "locality_ground_truth": ["e", "f"]}
    record = one(FLAT | lists)
    assert record.paraphrases == ("a", "b")
    assert record.unrelated == (UnrelatedFact("c", "e"), UnrelatedFact("d", "f"))


def test_lists_of_unlike_length_are_an_error():
    with pytest.raises(KnowledgeError, match="field 'locality_ground_truth': has 1 answers for 2 locality prompts"):
        one(FLAT | {"locality_prompt": ["c", "d"], "locality_ground_truth": ["e"]})


def test_the_subject_s_place_is_that_of_romes_braces():
    template = {"prompt": "Danielle Darrieux's mother is {}, who is", "subject": "Danielle Darrieux"}
    record = one(ROME | {"requested_rewrite": ROME["requested_rewrite"] | template})
    assert record.subject_span == (30, 47)
    assert record.prompt[30:] == "Danielle Darrieux, who is"


def test_romes_schema_puts_the_subject_in_and_its_neighbours_keep_the_original():
    record = one(ROME)
    assert (record.prompt, record.target) == ("The mother tongue of Danielle Darrieux is", "English")
    assert (record.original, record.subject) == ("French", "Danielle Darrieux")
    assert record.paraphrases == ("Danielle Darrieux speaks", "Danielle Darrieux's language:")
    assert record.unrelated == (
        UnrelatedFact("Michel Rocard is a native speaker of", "French"),
        UnrelatedFact("Colette spoke", "French"),
    )


def test_a_subject_with_braces_is_put_in_as_it_is():
    row = ROME | {"requested_rewrite": ROME["requested_rewrite"] | {"subject": "f{x}{}"}}
    assert one(row).prompt == "The mother tongue of f{x}{} is"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"prompt": "The mother tongue of Ann is"}, r"prompt': has no \{\} for the subject"),
        ({"target_new": "English"}, "target_new': is not an object"),
        ({"target_new": {"id": "Q1860"}}, r"target_new\.str': is missing"),
        ({"target_true": {"str": " "}}, r"target_true\.str': is empty"),
        ({"target_true": {"str": "English"}}, r"target_new\.str': is the same as the original answer \('English'\)"),
    ],
)
def test_a_faulty_nested_field_is_named_with_its_path(change, problem):
    with pytest.raises(KnowledgeError, match=rf"list item 0, field 'requested_rewrite\.{problem}"):
        one(ROME | {"requested_rewrite": ROME["requested_rewrite"] | change})


def test_a_target_that_is_the_original_answer_is_an_error_whatever_its_case():
    with pytest.raises(KnowledgeError, match="field 'target_new': is the same as the original answer"):
        one(FLAT | {"target_new": "french"})


@pytest.mark.parametrize("field", [field for field in FLAT if field not in ("case_id", "subject")])
@pytest.mark.parametrize(("value", "problem"), [("", "is empty"), (7, "has the wrong type int"), (None, "is missing")])
def test_a_faulty_required_field_is_named(field, value, problem):
    with pytest.raises(KnowledgeError, match=f"list item 0, field '{field}': {problem}"):
        one(FLAT | {field: value})


@pytest.mark.data
def test_the_published_files_are_read_whole(published):
    train, evaluation = (load_knowledge("counterfact", published, split) for split in ("train", "eval"))
    assert (len(train), len(evaluation), train.skipped, evaluation.skipped) == (10000, 5000, {}, {})
    assert not {(r.prompt, r.target) for r in train} & {(r.prompt, r.target) for r in evaluation}
