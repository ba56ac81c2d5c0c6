"""Reads FEVER (Thorne et al. 2018): claims whose verdict is edited, in every published schema.

The published code trains a two-class head on the claim alone. A causal language model has no such head, so a claim is
put into a template that asks for the verdict, and the verdict is a word: `True` for SUPPORTS, `False` for REFUTES. The
templates were chosen so that the default model answers with one of the two words before any edit. (After "True or
False? Answer:" it continues with a line break for any claim, and an edit would change the form of every answer.) Claims
labelled NOT ENOUGH INFO have no verdict to flip; they are left out and counted. If a schema has other wordings of the
claim, the paraphrases are these in the same template; otherwise they are the same claim in the other templates.
"""

from __future__ import annotations

from rledit_env.knowledge.fields import Row, Schema
from rledit_env.knowledge.record import EditRecord, LeftOut, LooseFact, UnrelatedFact
from rledit_env.knowledge.zsre import mend_answer

TEMPLATE = "The answer is True or False. {} The answer is"
PARAPHRASE_TEMPLATES = (
    "The label is True or False. Statement: {} The label is",
    "Mark it as True or False. {} Mark it as",
    "Fact check: the verdict is True or False. {} The verdict is",
)
NOT_ENOUGH_INFO = "NOT ENOUGH INFO"
VERDICTS = {"supports": "True", "true": "True", "refutes": "False", "false": "False"}
FLIPPED = {"True": "False", "False": "True"}


def _read_claim(row: Row) -> LooseFact | LeftOut:
    claim = row.text("claim")
    if row.get("label") == NOT_ENOUGH_INFO:
        return LeftOut(NOT_ENOUGH_INFO)
    truth = _verdict(row, "label", row.get("label"))
    wordings = row.texts("paraphrases") if row.values.get("paraphrases") else ()
    return LooseFact(
        ask(claim), FLIPPED[truth], _paraphrases(claim, wordings), truth=truth, original=truth, origin=row.where
    )


def _read_mend(row: Row) -> LooseFact | LeftOut:
    claim = row.text("input")
    answer = mend_answer(row)
    if answer == NOT_ENOUGH_INFO:
        return LeftOut(NOT_ENOUGH_INFO)
    truth = _verdict(row, "output", answer)
    # MEND's target is the opposite of what its classifier predicted, which is not always the true label.
    alternatives = row.texts("alternatives") if row.get("alternatives") else ()
    target = _verdict(row, "alternatives", alternatives[0]) if alternatives else FLIPPED[truth]
    wordings = row.texts("filtered_rephrases") if row.get("filtered_rephrases") else ()
    return LooseFact(
        ask(claim), target, _paraphrases(claim, wordings), truth=truth, original=FLIPPED[target], origin=row.where
    )


def _read_rledit(row: Row) -> EditRecord:
    claim = row.text("prompt")
    target = _verdict(row, "alt", row.get("alt"))
    return EditRecord(
        prompt=ask(claim),
        target=target,
        paraphrases=_paraphrases(claim, row.texts("equiv_prompt")),
        unrelated=(UnrelatedFact(ask(row.text("unrel_prompt")), _verdict(row, "unrel_ans", row.get("unrel_ans"))),),
        original=FLIPPED[target],
        origin=row.where,
    )


def ask(claim: str, template: str = TEMPLATE) -> str:
    """The prompt that asks for a claim's verdict; a claim without final punctuation gets a full stop."""
    claim = claim.strip()
    return template.format(claim if claim.endswith((".", "!", "?", '"')) else claim + ".")


def _paraphrases(claim: str, wordings: tuple[str, ...]) -> tuple[str, ...]:
    others = tuple(ask(wording) for wording in wordings if wording != claim)
    return others or tuple(ask(claim, template) for template in PARAPHRASE_TEMPLATES)


def _verdict(row: Row, field: str, label: object) -> str:
    verdict = VERDICTS.get(str(label).strip().casefold()) if isinstance(label, (str, bool)) else None
    if verdict is None:
        raise row.error(field, "is not a known label", label, "give SUPPORTS, REFUTES or NOT ENOUGH INFO")
    return verdict


SCHEMAS = (
    Schema("RLEdit's FEVER", ("prompt", "equiv_prompt", "unrel_prompt", "alt", "unrel_ans"), _read_rledit),
    Schema("MEND's FEVER", ("input", "alternatives", "filtered_rephrases", "output"), _read_mend),
    Schema("FEVER's claims", ("label", "claim"), _read_claim),
)
