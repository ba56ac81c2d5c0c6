"""The promises about the data that ships with the package; they read the files themselves, not through the readers."""

from __future__ import annotations

import gzip
import json
import re
import string
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from rledit_env.knowledge import load_knowledge
from rledit_env.knowledge.bundled import build
from rledit_env.knowledge.bundled.relations import RELATIONS, Relation

FOLDER = Path(build.__file__).parent
KINDS = ("zsre", "counterfact", "fever")
SPLITS = ("train", "eval")
FILES = [f"{kind}_{split}" for kind in KINDS for split in SPLITS]
FORMS = ("cloze", "questions", "claims")

Row = dict[str, Any]


def read(name: str) -> list[Row]:
    with gzip.open(FOLDER / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


ROWS = {name: read(name) for name in FILES}


def prompts(row: Row) -> list[str]:
    """The texts of a row that speak of the edited subject."""
    for prompt, others in (("src", "rephrase"), ("prompt", "rephrase_prompt"), ("claim", "paraphrases")):
        if prompt in row:
            return [row[prompt], *row[others]]
    raise AssertionError(row)


def neighbours(row: Row) -> list[str]:
    return [row["loc"]] if "loc" in row else row.get("locality_prompt", [])


def subject_matcher() -> dict[tuple[str, str], re.Pattern[str]]:
    """For every wording, a pattern that finds the subject in a text with that wording."""
    patterns = {}
    for relation in RELATIONS:
        for template in (*relation.cloze, *relation.questions):
            before, after = template.removesuffix("?").split("{s}")
            patterns[relation.name, template] = re.compile(
                f"(?:nq question: )?{re.escape(before)}(?:[Tt]he )?(?P<subject>.+){re.escape(after)}\\??"
            )
    return patterns


MATCHER = subject_matcher()


def subjects_in(text: str) -> set[str]:
    """Every subject that the text may be about; wordings that fit by chance give more than one."""
    return {match["subject"] for pattern in MATCHER.values() if (match := pattern.fullmatch(text))}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_at_least_2000_training_and_1000_evaluation_records(kind: str) -> None:
    assert len(ROWS[f"{kind}_train"]) >= 2000
    assert len(ROWS[f"{kind}_eval"]) >= 1000


@pytest.mark.parametrize("name", FILES)
def test_each_file_has_at_least_25_relations_and_none_dominates(name: str) -> None:
    count = Counter(row["relation"] for row in ROWS[name])
    assert len(count) >= 25
    assert set(count) <= {relation.name for relation in RELATIONS}
    assert max(count.values()) <= 0.15 * len(ROWS[name])


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda relation: relation.name)
def test_each_relation_has_at_least_four_different_wordings_in_every_form(relation: Relation) -> None:
    for form in FORMS:
        wordings = getattr(relation, form)
        assert len(set(wordings)) == len(wordings) >= 4
        for wording in wordings:
            fields = sorted(field for _, field, _, _ in string.Formatter().parse(wording) if field)
            assert fields == (["o", "s"] if form == "claims" else ["s"])
    assert all(wording.endswith("?") for wording in relation.questions)
    assert all(wording.endswith(".") for wording in relation.claims)
    assert not any(wording.endswith((".", "?", " ")) for wording in relation.cloze)


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda relation: relation.name)
def test_no_relation_has_more_than_one_entry(relation: Relation) -> None:
    assert [other.name for other in RELATIONS].count(relation.name) == 1


def test_no_subject_is_in_both_splits_of_any_kind() -> None:
    subjects = {
        split: {row["subject"].casefold() for kind in KINDS for row in ROWS[f"{kind}_{split}"]} for split in SPLITS
    }
    assert not subjects["train"] & subjects["eval"]


@pytest.mark.parametrize("kind", ["zsre", "counterfact"])
def test_no_subject_of_one_split_is_a_neighbour_in_the_other(kind: str) -> None:
    for split, other in (("train", "eval"), ("eval", "train")):
        edited = {row["subject"] for row in ROWS[f"{kind}_{other}"]}
        for row in ROWS[f"{kind}_{split}"]:
            for text in neighbours(row):
                found = subjects_in(text)
                assert found, f"no wording fits {text!r}"
                assert not found & edited, text


@pytest.mark.parametrize("name", FILES)
def test_no_fact_is_edited_twice_in_a_file(name: str) -> None:
    count = Counter((row["relation"], row["subject"]) for row in ROWS[name])
    assert max(count.values()) == 1


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("fever")])
def test_targets_are_not_the_original_answers(name: str) -> None:
    for row in ROWS[name]:
        if "alt" in row:
            assert row["alt"].casefold() not in {answer.casefold() for answer in row["answers"]}, row
            assert row["pred"] == row["answers"][0]
        else:
            assert row["target_new"].casefold() != row["ground_truth"].casefold(), row


@pytest.mark.parametrize("name", FILES)
def test_every_prompt_and_paraphrase_holds_the_subject_as_it_is_spelled(name: str) -> None:
    for row in ROWS[name]:
        texts = prompts(row)
        assert len(set(texts)) == len(texts) == 1 + build.PARAPHRASES
        for text in texts:
            assert row["subject"] in text, row


@pytest.mark.parametrize("split", SPLITS)
def test_counterfact_neighbours_are_other_subjects_of_the_same_relation(split: str) -> None:
    cloze = {relation.name: relation.cloze for relation in RELATIONS}
    for row in ROWS[f"counterfact_{split}"]:
        texts, answers = row["locality_prompt"], row["locality_ground_truth"]
        assert len(texts) == len(answers) == len(row["rephrase_prompt"]) == build.NEIGHBOURS
        for text, answer in zip(texts, answers, strict=True):
            fits = [MATCHER[row["relation"], wording].fullmatch(text) for wording in cloze[row["relation"]]]
            found = {match["subject"] for match in fits if match}
            assert found and row["subject"] not in found, row
            assert answer != row["target_new"], row


@pytest.mark.parametrize("split", SPLITS)
def test_counterfact_neighbours_often_have_the_original_answer(split: str) -> None:
    rows = ROWS[f"counterfact_{split}"]
    same = [row["ground_truth"] in row["locality_ground_truth"] for row in rows]
    assert sum(same) > 0.3 * len(rows)


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("fever")])
def test_no_neighbour_is_a_fact_that_the_same_file_edits(name: str) -> None:
    texts: dict[str, set[str]] = defaultdict(set)
    form = "questions" if name.startswith("zsre") else "cloze"
    for row in ROWS[name]:
        for relation in RELATIONS:
            if relation.name == row["relation"]:
                for article in ("", "the ", "The "):
                    subject = article + row["subject"]
                    texts[row["relation"]] |= {wording.format(s=subject) for wording in getattr(relation, form)}
    edited = set().union(*texts.values())
    for row in ROWS[name]:
        for text in neighbours(row):
            question = text.removeprefix("nq question: ") + "?" if name.startswith("zsre") else text
            assert question not in edited, row


@pytest.mark.parametrize("split", SPLITS)
def test_zsre_unrelated_questions_have_the_published_mark_and_another_subject(split: str) -> None:
    for row in ROWS[f"zsre_{split}"]:
        assert row["loc"].startswith("nq question: ") and not row["loc"].endswith("?")
        assert row["subject"] not in subjects_in(row["loc"])
        assert row["src"].endswith("?") and row["loc_ans"]


@pytest.mark.parametrize("split", SPLITS)
def test_fever_labels_are_balanced(split: str) -> None:
    count = Counter(row["label"] for row in ROWS[f"fever_{split}"])
    assert set(count) == {"SUPPORTS", "REFUTES"}
    assert count["SUPPORTS"] == count["REFUTES"]


@pytest.mark.parametrize("kind", ["counterfact", "fever"])
def test_case_numbers_are_unique_over_both_splits(kind: str) -> None:
    numbers = [row["case_id" if kind == "counterfact" else "id"] for s in SPLITS for row in ROWS[f"{kind}_{s}"]]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("name", FILES)
def test_answers_are_short_and_texts_are_clean(name: str) -> None:
    for row in ROWS[name]:
        answers = [row[field] for field in ("alt", "pred", "target_new", "ground_truth", "loc_ans") if field in row]
        for answer in answers:
            assert 1 <= len(answer.removeprefix("the ").split()) <= 6, row
        for text in [*prompts(row), *neighbours(row), *answers]:
            assert text == text.strip() and "  " not in text and "{" not in text, row
            assert "the the " not in text.casefold(), row


def test_the_sources_file_names_every_package_and_the_rows_of_every_relation() -> None:
    text = (FOLDER / "SOURCES.md").read_text(encoding="utf-8")
    for package, version in build.SOURCE_PACKAGES.items():
        assert f"| {package} | {version} |" in text
    for relation in RELATIONS:
        train, evaluation = (
            sum(row["relation"] == relation.name for row in ROWS[f"counterfact_{split}"]) for split in SPLITS
        )
        assert f"| {relation.name} | {relation.source} | {train} | {evaluation} |" in text


def test_the_files_together_are_smaller_than_1500_kilobytes() -> None:
    assert sum((FOLDER / f"{name}.jsonl.gz").stat().st_size for name in FILES) < 1_500_000


def test_the_files_hold_no_name_and_no_time_in_their_header() -> None:
    for name in FILES:
        header = (FOLDER / f"{name}.jsonl.gz").read_bytes()[:10]
        assert header[3] == 0 and header[4:8] == bytes(4)


def test_rebuilding_gives_the_shipped_records(tmp_path: Path) -> None:
    if missing := build.missing_packages():
        pytest.skip(f"needs the packages the data was built from (extra bundled-data): {', '.join(missing)}")
    build.write(build.build(), tmp_path)
    for name in FILES:
        # The text, since another build of zlib may pack the same text into other bytes.
        rebuilt = gzip.decompress((tmp_path / f"{name}.jsonl.gz").read_bytes())
        assert rebuilt == gzip.decompress((FOLDER / f"{name}.jsonl.gz").read_bytes()), name


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_readers_accept_every_record(kind: str, split: str) -> None:
    dataset = load_knowledge(kind, split=split)
    assert len(dataset) >= (2000 if split == "train" else 1000)
    assert "bundled" in dataset.source
    assert not set(dataset.skipped) - {"kept as an unrelated fact"}
