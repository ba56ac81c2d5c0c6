from collections import Counter

import pytest

from rledit_env.knowledge import EditRecord, KnowledgeError, UnrelatedFact
from rledit_env.knowledge.pairing import DUPLICATE, KEPT, pair
from rledit_env.knowledge.record import LooseFact


def loose(number: int) -> LooseFact:
    return LooseFact(
        f"question {number}", "new", (f"rephrased {number}",), truth=f"true {number}", origin=f"row {number}"
    )


def test_of_twenty_facts_every_tenth_is_never_edited_and_serves_the_others():
    skipped = Counter()
    records = pair([loose(i) for i in range(20)], skipped)
    assert [record.prompt for record in records] == [f"question {i}" for i in range(20) if i not in (9, 19)]
    served = {record.unrelated for record in records}
    assert served == {(UnrelatedFact("question 9", "true 9"),), (UnrelatedFact("question 19", "true 19"),)}
    assert skipped == {KEPT: 2}


def test_of_fewer_than_twenty_all_are_edited_and_each_borrows_the_next():
    skipped = Counter()
    records = pair([loose(i) for i in range(19)], skipped)
    assert [record.unrelated[0].answer for record in records] == [f"true {(i + 1) % 19}" for i in range(19)]
    assert not skipped


def test_repeated_prompts_count_once():
    skipped = Counter()
    records = pair([loose(0), loose(0), loose(1), loose(0)], skipped)
    assert [record.prompt for record in records] == ["question 0", "question 1"]
    assert skipped == {DUPLICATE: 2}


def test_records_with_their_own_unrelated_fact_pass_through_in_order():
    whole = EditRecord("p", "t", ("q",), (UnrelatedFact("u", "a"),))
    records = pair([loose(0), whole, loose(1)], Counter())
    assert records[1] is whole
    assert [record.prompt for record in records] == ["question 0", "p", "question 1"]


def test_a_single_fact_has_nothing_to_borrow():
    with pytest.raises(KnowledgeError, match="row 0: no other row can serve as its unrelated fact"):
        pair([loose(0), loose(0)], Counter())
