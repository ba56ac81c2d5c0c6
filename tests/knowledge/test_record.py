import dataclasses

import pytest

from rledit_env.knowledge import EditRecord, KnowledgeError, UnrelatedFact

RECORD = EditRecord("The capital of France is", "Lyon", ("France's capital:",), (UnrelatedFact("1 + 1 =", "2"),))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", " "),
        ("target", ""),
        ("target", None),
        ("paraphrases", ()),
        ("paraphrases", "bare"),
        ("paraphrases", ("",)),
        ("unrelated", ()),
        ("unrelated", (UnrelatedFact("1 + 1 =", ""),)),
    ],
)
def test_a_record_with_an_empty_part_names_origin_and_field(field, value):
    with pytest.raises(KnowledgeError, match=f"facts.jsonl, line 3, field '{field}'"):
        dataclasses.replace(RECORD, **{field: value}, origin="facts.jsonl, line 3")


def test_a_record_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECORD.target = "Paris"
