import pytest

from rledit_env.knowledge import KnowledgeError, UnrelatedFact, load_knowledge
from rledit_env.knowledge.fever import PARAPHRASE_TEMPLATES, ask

SUN = {"id": 1, "label": "SUPPORTS", "claim": "The Sun is a star."}
MOON = {"id": 2, "label": "REFUTES", "claim": "The Moon is a planet."}
UNCLEAR = {"id": 3, "label": "NOT ENOUGH INFO", "claim": "The Moon is lonely."}
RLEDIT = {
    "prompt": "The Sun is a star.",
    "equiv_prompt": ["Our Sun is a star.", "A star is what the Sun is."],
    "unrel_prompt": "The Moon is a planet.",
    "alt": "REFUTES",
    "unrel_ans": "REFUTES",
}


def mend(claim: str, label: str, **changes) -> dict:
    other = {"SUPPORTS": "REFUTES", "REFUTES": "SUPPORTS"}.get(label)
    row = {"input": claim, "prediction": label, "alternatives": [other], "filtered_rephrases": [f"Well, {claim}"]}
    return row | {"output": [{"answer": label}], "logit": 0.5} | changes


def test_the_edit_flips_the_label():
    sun, moon = load_knowledge("fever", [SUN, MOON])
    assert (sun.prompt, sun.original, sun.target) == (ask("The Sun is a star."), "True", "False")
    assert (moon.prompt, moon.original, moon.target) == (ask("The Moon is a planet."), "False", "True")


def test_the_unrelated_pair_is_another_claim_with_its_true_label():
    sun, moon = load_knowledge("fever", [SUN, MOON])
    assert sun.unrelated == (UnrelatedFact(moon.prompt, "False"),)
    assert moon.unrelated == (UnrelatedFact(sun.prompt, "True"),)


def test_claims_with_not_enough_info_are_left_out_and_counted():
    dataset = load_knowledge("fever", [SUN, UNCLEAR, MOON, UNCLEAR])
    assert (len(dataset), dataset.skipped) == (2, {"NOT ENOUGH INFO": 2})


def test_without_other_wordings_the_paraphrases_are_other_templates_around_the_claim():
    sun, _ = load_knowledge("fever", [SUN, MOON])
    assert len({sun.prompt, *sun.paraphrases}) == 1 + len(PARAPHRASE_TEMPLATES) >= 4
    assert all("The Sun is a star." in prompt for prompt in sun.paraphrases)


def test_claims_may_carry_their_own_wordings():
    sun, _ = load_knowledge("fever", [SUN | {"paraphrases": ["Our Sun is a star."]}, MOON])
    assert sun.paraphrases == (ask("Our Sun is a star."),)


def test_a_claim_without_a_full_stop_gets_one_in_its_prompt():
    assert ask("The Sun is a star") == ask("The Sun is a star.")


def test_a_claim_with_braces_is_put_in_as_it_is():
    assert "{0} is a set." in ask("{0} is a set.")


def test_rledits_schema_has_wordings_and_an_unrelated_claim_of_its_own():
    (record,) = load_knowledge("fever", [RLEDIT])
    assert (record.prompt, record.original, record.target) == (ask("The Sun is a star."), "True", "False")
    assert record.paraphrases == (ask("Our Sun is a star."), ask("A star is what the Sun is."))
    assert record.unrelated == (UnrelatedFact(ask("The Moon is a planet."), "False"),)


@pytest.mark.parametrize(
    ("label", "target"), [("supports", "True"), ("False", "False"), (True, "True"), (False, "False")]
)
def test_labels_may_be_words_or_booleans(label, target):
    assert load_knowledge("fever", [RLEDIT | {"alt": label}])[0].target == target


def test_mends_schema_edits_to_its_alternative_and_keeps_the_true_label_for_others():
    # The classifier was wrong about the Sun, so the edit makes the claim true.
    rows = [mend("The Sun is a star.", "SUPPORTS", alternatives=["SUPPORTS"]), mend("The Moon is a planet.", "REFUTES")]
    sun, moon = load_knowledge("fever", rows)
    assert (sun.target, sun.original, sun.paraphrases) == ("True", "False", (ask("Well, The Sun is a star."),))
    assert (moon.target, moon.unrelated) == ("True", (UnrelatedFact(sun.prompt, "True"),))


def test_mends_schema_without_alternative_and_rephrases_flips_the_label_and_uses_templates():
    bare = mend("The Sun is a star.", "SUPPORTS", alternatives=[], filtered_rephrases=[])
    sun, _ = load_knowledge("fever", [bare, mend("The Moon is a planet.", "REFUTES")])
    assert (sun.target, len(sun.paraphrases)) == ("False", len(PARAPHRASE_TEMPLATES))


def test_mends_schema_leaves_out_not_enough_info():
    rows = [mend("The Sun is a star.", "SUPPORTS"), mend("The Moon is a planet.", "REFUTES")]
    dataset = load_knowledge("fever", [*rows, mend("It is odd.", "NOT ENOUGH INFO")])
    assert (len(dataset), dataset.skipped) == (2, {"NOT ENOUGH INFO": 1})


@pytest.mark.parametrize("label", ["MAYBE", 1, ["SUPPORTS"]])
def test_an_unknown_label_is_named(label):
    with pytest.raises(KnowledgeError, match="list item 0, field 'label': is not a known label"):
        load_knowledge("fever", [SUN | {"label": label}, MOON])


@pytest.mark.parametrize("field", ["prompt", "equiv_prompt", "unrel_prompt", "alt", "unrel_ans"])
def test_a_missing_field_of_rledits_schema_is_named(field):
    row = {name: value for name, value in RLEDIT.items() if name != field}
    with pytest.raises(KnowledgeError, match=f"list item 0, field '{field}': is missing"):
        load_knowledge("fever", [row])


@pytest.mark.data
def test_the_published_files_are_read_whole(published):
    for split, used, unclear, again, kept in (("train", 2953, 1678, 41, 328), ("eval", 1471, 853, 13, 163)):
        dataset = load_knowledge("fever", published, split)
        assert len(dataset) == used
        assert dataset.skipped == {
            "NOT ENOUGH INFO": unclear,
            "same prompt as an earlier row": again,
            "kept as an unrelated fact": kept,
        }
        edited = {record.prompt for record in dataset}
        assert not edited & {fact.prompt for record in dataset for fact in record.unrelated}
