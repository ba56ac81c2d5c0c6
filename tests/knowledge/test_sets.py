"""Published data sets that any environment takes: small rows of our own in their forms."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import pytest

from rledit_env.knowledge import EditRecord, ImpliedFact, KnowledgeError, UnrelatedFact, load_knowledge
from rledit_env.knowledge.facts import load_facts
from rledit_env.knowledge.fields import Row
from rledit_env.knowledge.forms import OWN, SHARED, shared_form

WIKIBIGEDIT = {
    "tag": "update", "subject": "Port Amber", "update": "Who is the mayor of Port Amber?", "ans": "Ida Voss",
    "rephrase": "Which person governs Port Amber?", "personas": "Tell me, lad, who runs Port Amber these days?",
    "loc": "Who is the mayor of Port Cobalt?", "loc_ans": "Tom Reed",
    "mhop": "Where was the mayor of Port Amber born?", "mhop_ans": "Elmfield",
}  # fmt: skip
ULTRAEDITBENCH = {
    "prompt": "Which river crosses Elmfield?", "rephrase_prompt": "What river runs through Elmfield?", "ans": "Lorn",
    "loc": "Which river crosses Oakfield?", "loc_ans": "Marn",
}  # fmt: skip
WIKI_RECENT = {
    "subject": "Ida Voss", "prompt": "The place of death of Ida Voss is", "target_new": "Elmfield",
    "portability": {
        "Logical_Generalization": [{"prompt": "Is Ida Voss alive?", "ground_truth": [["no"], ["false"]]}],
        "Reasoning": [{"prompt": "The river of the place of death of Ida Voss is", "ground_truth": [["Lorn"]]}],
        "Subject_Aliasing": [{"prompt": "The place of death of I. Voss is", "ground_truth": [["Elmfield", "Elm"]]}],
    },
    "locality": {"Relation_Specificity": [
        {"prompt": "The father of Ida Voss is", "ground_truth": [["Karl Voss"]]},
        {"prompt": "The mother of Ida Voss is", "ground_truth": [""]},
    ]},
}  # fmt: skip
WIKI_COUNTERFACT = {
    "subject": "Tom Reed", "prompt": "The position held by Tom Reed is", "target_new": "bishop",
    "ground_truth": "mayor", "portability": {},
    "locality": {"Forgetfulness": [{"prompt": "The position held by Tom Reed, which is not bishop, is",
                                    "ground_truth": "mayor"}]},
}  # fmt: skip
WIKIBIO = {
    "text": "This is a passage about ida voss. Ida Voss was a mayor.", "labels": "She was born in Elmfield.",
    "concept": "ida voss",
    "locality": {"Relation_Specificity": [{"prompt": "The work of ida voss is", "ground_truth": ["politics"]}]},
}  # fmt: skip
CONVSENT = {"ent": "tea", "pos": ["Tea is lovely."], "neg": ["Tea is awful."]}
SANITATION = {"question": "What bird is it?", "ground_truth": "Birds", "target_new": "I don't know."}


def rewrite(subject: str, new: str, old: str) -> dict[str, Any]:
    return {
        "prompt": "{} lies in", "relation_id": "P17", "target_new": {"str": new, "id": "Q1"},
        "target_true": {"str": old, "id": "Q2"}, "subject": subject, "question": f"In which land is {subject}?",
    }  # fmt: skip


MQUAKE = {
    "case_id": 1,
    "requested_rewrite": [rewrite("Elmfield", "Norland", "Sudland"), rewrite("Lorn", "Ostland", "Westland")],
    "questions": ["What is spoken where Elmfield lies?", "Which tongue has Elmfield's land?"],
    "answer": "Sudish", "answer_alias": [], "new_answer": "Norlandic", "new_answer_alias": ["Norsk"],
    "single_hops": [], "new_single_hops": [], "orig": {},
}  # fmt: skip


def query(prompt: str, *answers: str, subject: str = "Q7") -> dict[str, Any]:
    return {
        "prompt": prompt, "answers": [{"value": answer, "aliases": [f"{answer} the Great"]} for answer in answers],
        "query_type": "regular", "subject_id": subject, "relation": "X", "target_ids": ["Q9"], "phrase": None,
    }  # fmt: skip


def cases(*queries: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"test_queries": [one], "test_condition": "OR", "condition_queries": []} for one in queries]


RIPPLEEDITS = {
    "example_type": "popular",
    "edit": {
        "prompt": "The name of the mother of Ida Voss is United Anna.", "subject_id": "Q7", "relation": "MOTHER",
        "target_id": "Q8",
        "original_fact": {"prompt": "The name of the mother of Ida Voss is United Berta.", "subject_id": "Q7",
                          "relation": "MOTHER", "target_id": "Q5"},
    },
    "Relation_Specificity": cases(query("The name of the father of Ida Voss is", "Karl Voss"),
                                  query("The gender of Ida Voss is", "female")),
    "Logical_Generalization": cases(query("The name of the child of United Anna is", "Ida Voss", subject="Q8")),
    "Subject_Aliasing": cases(query("The name of the mother of I. Voss is", "United Anna")),
    "Compositionality_I": cases(query("The place of birth of the mother of Ida Voss is", "Oakfield")),
    "Compositionality_II": cases(query("The mother of the mayor of Port Amber is", "United Anna", subject="Q3"),
                                 query("It has no answer", subject="Q3")),
    "Forgetfulness": cases(query("The name of the mother of Ida Voss, which is not United Anna, is", "United Berta")),
}  # fmt: skip
RECENT = {k: v for k, v in RIPPLEEDITS.items() if k != "Forgetfulness"} | {
    "example_type": "recent", "edit": {k: v for k, v in RIPPLEEDITS["edit"].items() if k != "original_fact"},
}  # fmt: skip
MZSRE = {
    "en": {"subject": "Elmfield", "src": "Which river crosses Elmfield?", "rephrase": "What river is in Elmfield?",
           "alt": "Lorn", "loc": "nq question: who wrote it", "loc_ans": "Ann",
           "portability": {"New Question": "Where does Elmfield's river end?", "New Answer": "the sea"}},
    "de": {"subject": "Elmfeld", "src": "Welcher Fluss durchquert Elmfeld?", "rephrase": "Elmfelds Fluss heißt?",
           "alt": "die Lorn", "loc": "Wer hat es geschrieben?", "loc_ans": "Anna",
           "portability": {"New Question": "Wo endet Elmfelds Fluss?", "New Answer": "im Meer"}},
}  # fmt: skip
UNKE = {
    "id": 0, "question": "What did Ida Voss do?", "para_question": "What was Ida Voss's work?",
    "answer": "Ida Voss governed Port Amber for ten years. She built its harbour.",
    "sub_question": ["How long did she govern?", "What did she build?"], "sub_answer": ["Ten years.", "Its harbour."],
}  # fmt: skip
TRIPLETS = [{"subject": "Elmfield", "prompt": f"{{}} part {i} is", "target": f"part {i}"} for i in range(7)]
AKEW = {
    "case_id": 4,
    "requested_rewrite": {**rewrite("Elmfield", "Norland", "Sudland"),
                          "prompt_full": "In which land does Elmfield lie?",
                          "fact_new_uns": "Elmfield is a town in the north of Norland.",
                          "unsfact_triplets_GPT": TRIPLETS},
    "paraphrase_prompts": ["Elmfield belongs to"], "neighborhood_prompts": ["Oakfield lies in"],
}  # fmt: skip
WIKIUPDATE = {
    "case_id": 5,
    "requested_rewrite": {"prompt": "{} held the office of", "subject": "Ida Voss", "question": "Which office had she?",
                          "answer_new": "mayor", "answer_true": "clerk", "fact_new_uns": "Ida Voss became mayor.",
                          "unsfact_triplets_GPT": TRIPLETS[:1]},
    "loc": "Who was clerk?", "loc_ans": "Tom Reed",
}  # fmt: skip
TRACING = {
    "relation": "P17", "relation_prefix": "", "relation_suffix": " lies in", "prompt": "Elmfield lies in",
    "relation_id": "P17", "target_true": " Sudland", "target_false": " Norland", "subject": "Elmfield",
    "target_true_id": "Q1", "target_false_id": "Q2",
}  # fmt: skip

SETS = {
    "WikiBigEdit": WIKIBIGEDIT, "UltraEditBench": ULTRAEDITBENCH, "KnowEdit's WikiBio": WIKIBIO,
    "KnowEdit's wiki_recent and wiki_counterfact": WIKI_RECENT, "MQuAKE": MQUAKE, "RippleEdits": RIPPLEEDITS,
    "MzsRE": MZSRE, "UnKE": UNKE, "AKEW": AKEW,
}  # fmt: skip


def read(row: dict[str, Any], kind: str = "zsre", *others: dict[str, Any]) -> EditRecord:
    """The first record of a row, among others of which a loose fact can borrow."""
    return load_knowledge(kind, [row, *(others or [ULTRAEDITBENCH if kind == "zsre" else row])])[0]


def without(row: dict[str, Any], *path: str) -> dict[str, Any]:
    changed = deepcopy(row)
    inner = changed
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    return changed


# -- which form a row follows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETS)
def test_a_row_is_recognised_by_its_fields(name: str) -> None:
    form = shared_form(Row(SETS[name], "here"))
    assert form is not None and form.name == name


def test_every_shared_form_has_a_row_here() -> None:
    refused = {"KnowEdit's ConvSent", "KnowEdit's Sanitation"}
    assert {form.name for form in SHARED} == {*SETS, *refused}


@pytest.mark.filterwarnings("ignore:.* no paraphrases")
@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("name", SETS)
def test_every_environment_takes_every_set_or_says_what_it_lacks(kind: str, name: str) -> None:
    has_original = {"MQuAKE", "RippleEdits", "AKEW"}
    if kind == "counterfact" and name not in has_original:
        with pytest.raises(KnowledgeError, match=f"list item 0, field 'original answer': {name} does not say what was"):
            load_knowledge(kind, [SETS[name]])
    else:
        assert load_knowledge(kind, [SETS[name], MQUAKE]).kind == kind


def test_facts_without_an_original_answer_are_skipped_on_request() -> None:
    with pytest.warns(UserWarning, match="1 faulty rows skipped: 1 × no original answer to compare with"):
        dataset = load_knowledge("counterfact", [WIKIBIGEDIT, MQUAKE], on_error="skip")
    assert (len(dataset), dataset.skipped) == (2, {"no original answer to compare with": 1})


def test_counterfact_s_environment_refuses_a_target_that_was_the_answer() -> None:
    with pytest.raises(KnowledgeError, match="list item 0, field 'target': is the same as the original answer"):
        load_knowledge("counterfact", [WIKI_COUNTERFACT | {"target_new": "Mayor"}])


def test_an_unknown_form_names_what_could_have_been_read() -> None:
    with pytest.raises(KnowledgeError, match="unknown schema, with the fields colour; .*also read are RippleEdits"):
        load_knowledge("zsre", [{"colour": "red"}])


# -- WikiBigEdit and UltraEditBench ------------------------------------------------------------------------------------


def test_wikibigedit_has_persona_and_multi_hop_questions_under_their_names() -> None:
    record = read(WIKIBIGEDIT)
    assert (record.prompt, record.target, record.subject) == (WIKIBIGEDIT["update"], "Ida Voss", "Port Amber")
    assert record.paraphrases == (WIKIBIGEDIT["rephrase"],)
    assert record.unrelated == (UnrelatedFact(WIKIBIGEDIT["loc"], "Tom Reed"),)
    assert record.variants == (ImpliedFact(WIKIBIGEDIT["personas"], "Ida Voss", "personas"),)
    assert record.implied == (ImpliedFact(WIKIBIGEDIT["mhop"], "Elmfield", "multi_hop"),)
    assert record.lacks == ()


@pytest.mark.parametrize("nothing", [None, float("nan"), ""])
def test_wikibigedit_s_null_fields_are_no_questions(nothing: object) -> None:
    record = read(WIKIBIGEDIT | {"mhop": nothing, "mhop_ans": nothing, "personas": nothing})
    assert record.implied == record.variants == ()


def test_a_multi_hop_question_without_its_answer_is_an_error() -> None:
    with pytest.raises(KnowledgeError, match="list item 0, field 'mhop_ans': is missing; correct it, or pass on_error"):
        read(WIKIBIGEDIT | {"mhop_ans": None})


def test_a_row_without_locality_borrows_another_s() -> None:
    record = read(WIKIBIGEDIT | {"loc": None, "loc_ans": None})
    assert record.unrelated == (UnrelatedFact("Which river crosses Oakfield?", "Marn"),)


@pytest.mark.parametrize(
    ("row", "field", "value", "problem"),
    [
        (WIKIBIGEDIT, "ans", None, "is missing"),
        (WIKIBIGEDIT, "update", 7, "has the wrong type int"),
        (WIKIBIGEDIT, "loc_ans", None, "is missing"),
        (ULTRAEDITBENCH, "ans", "", "is empty"),
        (ULTRAEDITBENCH, "loc_ans", None, "is missing"),
        (WIKI_RECENT, "target_new", None, "is missing"),
        (WIKI_RECENT, "portability", "none", "is not an object"),
        (WIKIBIO, "labels", "", "is empty"),
        (MQUAKE, "new_answer", None, "is missing"),
        (MQUAKE, "requested_rewrite", [], "is empty"),
        (UNKE, "answer", None, "is missing"),
        (UNKE, "sub_answer", ["one"], "has 1 answers for 2 questions in 'sub_question'"),
    ],
)
def test_a_faulty_field_is_named(row: dict[str, Any], field: str, value: object, problem: str) -> None:
    with pytest.raises(KnowledgeError, match=f"list item 0, field '{field}': {problem}"):
        load_knowledge("zsre", [row | {field: value}])


@pytest.mark.parametrize(
    ("row", "path", "named"),
    [
        (MQUAKE, ("requested_rewrite", 1, "target_new", "str"), r"requested_rewrite\[1\]\.target_new\.str"),
        (RIPPLEEDITS, ("edit", "prompt"), r"edit"),
        (MZSRE, ("de", "alt"), r"de\.alt"),
        (AKEW, ("requested_rewrite", "unsfact_triplets_GPT", 0, "target"), r"\S+unsfact_triplets_GPT\[0\]\.target"),
        (WIKI_RECENT, ("locality", "Relation_Specificity", 0, "prompt"), r"\S+Relation_Specificity\[0\]\.prompt"),
    ],
)
def test_a_missing_nested_field_is_named(row: dict[str, Any], path: tuple[Any, ...], named: str) -> None:
    with pytest.raises(KnowledgeError, match=rf"list item 0(, field '{named}': is missing|: unknown schema)"):
        load_knowledge("zsre", [without(row, *path)])


def test_ultraeditbench_is_a_question_with_a_rephrasing_and_an_unrelated_one() -> None:
    record = load_knowledge("zsre", [ULTRAEDITBENCH])[0]
    assert (record.prompt, record.target) == ("Which river crosses Elmfield?", "Lorn")
    assert record.paraphrases == ("What river runs through Elmfield?",)
    assert record.unrelated == (UnrelatedFact("Which river crosses Oakfield?", "Marn"),)


# -- KnowEdit ----------------------------------------------------------------------------------------------------------


def test_knowedit_s_groups_keep_their_names_and_blank_answers_are_left_out() -> None:
    with pytest.warns(UserWarning, match="1 facts have no paraphrases; their own prompt stands in"):
        dataset = load_knowledge("zsre", [WIKI_RECENT])
    (record,) = dataset
    assert record.paraphrases == (record.prompt,)
    assert (record.lacks, dataset.lacks) == (("paraphrases",), {"paraphrases": 1})
    assert record.unrelated == (UnrelatedFact("The father of Ida Voss is", "Karl Voss", "Relation_Specificity"),)
    assert [(fact.group, fact.answer) for fact in record.implied] == [
        ("Logical_Generalization", "no"), ("Reasoning", "Lorn"), ("Subject_Aliasing", "Elmfield"),
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.* no paraphrases")
def test_wiki_counterfact_has_the_answer_before_the_edit() -> None:
    (record,) = load_knowledge("counterfact", [WIKI_COUNTERFACT])
    assert (record.target, record.original, record.subject) == ("bishop", "mayor", "Tom Reed")
    assert record.unrelated[0].group == "Forgetfulness"


@pytest.mark.filterwarnings("ignore:.* no paraphrases")
def test_wikibio_continues_a_passage_about_its_concept() -> None:
    (record,) = load_knowledge("zsre", [WIKIBIO])
    assert (record.target, record.subject) == ("She was born in Elmfield.", "ida voss")
    assert record.subject_span == (24, 32)


@pytest.mark.parametrize(
    ("row", "field", "task"),
    [
        (CONVSENT, "ent", "ConvSent, which edits the sentiment on a topic and no fact"),
        (SANITATION, "question", "Sanitation, which makes a model withhold answers and edits no fact"),
        ({"K_F": [SANITATION], "K_R": [SANITATION]}, "K_F", "Sanitation"),
    ],
)
def test_knowedit_s_tasks_without_facts_say_so(row: dict[str, Any], field: str, task: str, tmp_path) -> None:
    message = f"field '{field}': belongs to KnowEdit's {task}.*give one of KnowEdit's fact tasks"
    with pytest.raises(KnowledgeError, match=message):
        load_knowledge("zsre", [row])
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(row))
    with pytest.raises(KnowledgeError, match=message):
        load_facts(path)


# -- MQuAKE ------------------------------------------------------------------------------------------------------------


def test_mquake_s_rewrites_are_facts_and_its_questions_need_all_of_them() -> None:
    first, second = load_knowledge("counterfact", [MQUAKE])
    assert (first.prompt, first.target, first.original) == ("Elmfield lies in", "Norland", "Sudland")
    assert first.paraphrases == ("In which land is Elmfield?",)
    assert first.subject_span == (0, 8)
    assert first.unrelated == (UnrelatedFact("Lorn lies in", "Westland"),)
    assert second.implied == ()
    needs = (("Lorn lies in", "Ostland"),)
    assert first.implied == tuple(ImpliedFact(asked, "Norlandic", "multi_hop", needs) for asked in MQUAKE["questions"])


def test_a_rewrite_that_two_cases_share_keeps_both_cases_questions() -> None:
    alone = MQUAKE | {"requested_rewrite": MQUAKE["requested_rewrite"][:1], "questions": ["Third?"], "new_answer": "X"}
    dataset = load_knowledge("zsre", [MQUAKE, alone])
    assert [fact.prompt for fact in dataset[0].implied] == [*MQUAKE["questions"], "Third?"]
    assert dataset[0].implied[-1].needs == ()
    assert dataset.skipped == {"same prompt as an earlier row": 1}


# -- RippleEdits -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.* no paraphrases")
def test_rippleedits_sentence_is_split_and_its_criteria_keep_their_names() -> None:
    (record,) = load_knowledge("counterfact", [RIPPLEEDITS])
    assert (record.prompt, record.target) == ("The name of the mother of Ida Voss is", "United Anna")
    assert (record.original, record.subject) == ("United Berta", "Ida Voss")
    assert [(fact.group, fact.answer) for fact in record.unrelated] == [
        ("Relation_Specificity", "Karl Voss"), ("Relation_Specificity", "female"), ("Forgetfulness", "United Berta"),
    ]  # fmt: skip
    assert [(fact.group, fact.answer) for fact in record.implied] == [
        ("Logical_Generalization", "Ida Voss"), ("Subject_Aliasing", "United Anna"), ("Compositionality_I", "Oakfield"),
        ("Compositionality_II", "United Anna"),
    ]  # fmt: skip
    assert record.lacks == ("paraphrases",)


@pytest.mark.filterwarnings("ignore:.* no paraphrases")
@pytest.mark.parametrize(
    ("sentence", "answer", "expected"),
    [
        ("The name of the mother of It is Ida is Anna.", "Anna", ("The name of the mother of It is Ida is", "Anna")),
        ("The name of the author of It is Life is Good.", "Life is Good",
         ("The name of the author of It is", "Life is Good")),
        ("The names of the siblings of Ida are Karl.", None, ("The names of the siblings of Ida are", "Karl")),
        ("Port Amber is followed by Port Cobalt.", None, ("Port Amber is followed by", "Port Cobalt")),
        ("The number of children Ida has is 3.", None, ("The number of children Ida has is", "3")),
    ],
)  # fmt: skip
def test_a_sentence_without_an_original_is_split_at_its_verb(sentence, answer, expected) -> None:
    row = deepcopy(RECENT)
    row["edit"]["prompt"] = sentence
    row["Subject_Aliasing"] = cases(query("The same of I. Voss is", answer)) if answer else []
    (record,) = load_knowledge("zsre", [row])
    assert (record.prompt, record.target) == expected
    assert record.original is None


@pytest.mark.parametrize("sentence", ["Nothing here.", "The mother of Ida Voss is ."])
def test_a_sentence_without_an_answer_is_an_error(sentence: str) -> None:
    row = deepcopy(RECENT)
    row["edit"]["prompt"] = sentence
    with pytest.raises(KnowledgeError, match=r"list item 0, field 'edit\.prompt': is no sentence of the form"):
        load_knowledge("zsre", [row])


# -- MzsRE -------------------------------------------------------------------------------------------------------------


def test_mzsre_edits_the_first_language_and_asks_in_the_others() -> None:
    (record,) = load_knowledge("zsre", [MZSRE])
    assert (record.prompt, record.target, record.subject) == ("Which river crosses Elmfield?", "Lorn", "Elmfield")
    assert record.paraphrases == ("What river is in Elmfield?",)
    assert record.variants == (
        ImpliedFact("Welcher Fluss durchquert Elmfeld?", "die Lorn", "de"),
        ImpliedFact("Elmfelds Fluss heißt?", "die Lorn", "de"),
    )
    assert record.unrelated == (
        UnrelatedFact("nq question: who wrote it?", "Ann", "en"),
        UnrelatedFact("Wer hat es geschrieben?", "Anna", "de"),
    )
    assert [(fact.group, fact.answer) for fact in record.implied] == [("en", "the sea"), ("de", "im Meer")]
    (turned,) = load_knowledge("zsre", [{"de": MZSRE["de"], "en": MZSRE["en"]}])
    assert (turned.target, [fact.group for fact in turned.variants]) == ("die Lorn", ["en", "en"])


def test_twelve_languages_in_one_row_are_read() -> None:
    codes = ("en", "cz", "de", "du", "es", "fr", "pt", "ru", "th", "tr", "vi", "zh")
    (record,) = load_knowledge("zsre", [dict.fromkeys(codes, MZSRE["en"])])
    assert {fact.group for fact in record.variants} == set(codes[1:])


# -- unstructured facts ------------------------------------------------------------------------------------------------


def test_unke_s_answer_is_a_paragraph_with_questions_on_its_parts() -> None:
    other = UNKE | {"question": "What did Tom Reed do?", "answer": "Tom Reed kept the books of Port Amber."}
    record, _ = load_knowledge("zsre", [UNKE, other])
    assert record.target == UNKE["answer"]
    assert record.paraphrases == ("What was Ida Voss's work?",)
    assert record.unrelated == (UnrelatedFact("What did Tom Reed do?", other["answer"]),)
    assert record.implied == (
        ImpliedFact("How long did she govern?", "Ten years.", "sub_questions"),
        ImpliedFact("What did she build?", "Its harbour.", "sub_questions"),
    )


def test_akew_edits_the_text_and_in_counterfact_s_environment_the_short_answer() -> None:
    (text,) = load_knowledge("zsre", [AKEW])
    assert (text.prompt, text.target) == (
        "In which land does Elmfield lie?", "Elmfield is a town in the north of Norland.",
    )  # fmt: skip
    assert text.unrelated == (UnrelatedFact("Oakfield lies in", "Sudland"),)
    assert [fact.prompt for fact in text.implied] == [f"Elmfield part {i} is" for i in range(5)]
    (short,) = load_knowledge("counterfact", [AKEW])
    assert (short.prompt, short.target, short.original) == ("Elmfield lies in", "Norland", "Sudland")


def test_wikiupdate_s_prompt_becomes_a_question() -> None:
    (record,) = load_knowledge("zsre", [WIKIUPDATE])
    assert (record.prompt, record.target) == ("Ida Voss held the office of?", "Ida Voss became mayor.")
    assert record.paraphrases == ("Which office had she?",)
    assert record.unrelated == (UnrelatedFact("Who was clerk?", "Tom Reed"),)


# -- CounterFact's other forms -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.* no paraphrases")
def test_counterfact_for_tracing_lacks_paraphrases_and_borrows_unrelated_facts() -> None:
    other = TRACING | {"prompt": "Oakfield lies in", "subject": "Oakfield"}
    record, _ = load_knowledge("counterfact", [TRACING, other])
    assert (record.target, record.original) == (" Norland", " Sudland")
    assert record.unrelated == (UnrelatedFact("Oakfield lies in", " Sudland"),)


# -- a user's own file -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.* no paraphrases")
@pytest.mark.parametrize("name", SETS)
def test_rledit_edit_reads_the_same_records(name: str, tmp_path) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([SETS[name]]))
    facts = load_facts(path)
    ours, theirs = facts.dataset[0], load_knowledge("zsre", [SETS[name], ULTRAEDITBENCH])[0]
    assert (ours.prompt, ours.target, ours.implied, ours.variants) == (
        theirs.prompt, theirs.target, theirs.implied, theirs.variants,
    )  # fmt: skip
    assert not facts.ignored
    assert facts.without_paraphrases == len(facts.dataset) * ("paraphrases" in ours.lacks)
