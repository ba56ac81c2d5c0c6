"""The names that published data sets and editing tools give to the parts of a fact."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection

# In order of precedence: the first name in a row is used. The plain schema's name comes first.
PROMPT = (
    "prompt", "src", "edit_prompt", "prompts", "question", "update", "instruction", "input", "query", "cloze", "text",
    "questions", "sentence",
)  # fmt: skip
TARGET = (
    "target", "target_new", "new_target", "targets", "new_answer", "answer_new", "alt", "edit_target", "ans", "answer",
    "answers", "output", "response", "completion", "labels", "object", "label",
)  # fmt: skip
SUBJECT = ("subject", "subjects", "concept", "entity")
ORIGINAL = (
    "original", "target_true", "target_old", "ground_truth", "old_answer", "answer_old", "original_answer", "answers",
    "answer",
)  # fmt: skip
PARAPHRASES = (
    "paraphrases", "paraphrase_prompts", "paraphrase_prompt", "rephrase_prompts", "rephrase_prompt", "rephrases",
    "rephrase", "equiv_prompt", "filtered_rephrases", "para_question", "paraphrased_question", "question",
)  # fmt: skip
UNRELATED = ("unrelated", "locality", "locality_inputs")  # groups of facts
UNRELATED_PAIRS = (  # names of the prompts' field, names of their answers' field
    (("locality_prompt", "locality_prompts"),
     ("locality_ground_truth", "locality_ground_truths", "locality_answer", "locality_answers")),
    (("loc",), ("loc_ans",)),
    (("unrel_prompt",), ("unrel_ans",)),
)  # fmt: skip
NEIGHBOURS = "neighborhood_prompts"  # their answer is the original one
IMPLIED = ("implied", "portability", "portability_inputs")
IMPLIED_PAIRS = (
    (("portability_prompt", "portability_prompts"),
     ("portability_ground_truth", "portability_ground_truths", "portability_answer", "portability_answers")),
    (("mhop",), ("mhop_ans",)),
    (("sub_question",), ("sub_answer",)),
)  # fmt: skip
Pair = tuple[tuple[str, ...], tuple[str, ...]]
REWRITE = "requested_rewrite"
INNER_PROMPT = ("prompt", "new_question", "question", "src", "input", "query", "prompts", "text")
INNER_ANSWER = (
    "answer", "ground_truth", "new_answer", "ans", "answers", "target", "target_new", "output", "labels",
)  # fmt: skip

# Published fields that do not describe the edit, or that no score uses.
UNUSED = frozenset((
    "case_id", "id", "pararel_idx", "relation_id", "relation", "cond", "pred", "prediction", "tag", "personas",
    "generation_prompts", "attribute_prompts", "alternatives", "target_neg", "loc_prompt", "loc_prompts", "idx",
    "index", "fact_id",
))  # fmt: skip
_FEVER = ("claim", "label", "equiv_prompt")
_PAIRED = tuple(name for pair in (*UNRELATED_PAIRS, *IMPLIED_PAIRS) for part in pair for name in part)
USED = frozenset((
    *PROMPT, *TARGET, *SUBJECT, *ORIGINAL, *PARAPHRASES, *UNRELATED, *_PAIRED, NEIGHBOURS, *IMPLIED, REWRITE, *_FEVER,
))  # fmt: skip


def plain(name: object) -> str:
    """A field's name in lower case, with underscores: "Target New" and "target-new" are target_new."""
    return re.sub(r"[\s-]+", "_", str(name).strip().casefold())


def did_you_mean(name: object, known: Collection[str] = USED) -> str | None:
    """The known name that is closest to an unknown name; None if the name is known or no known name is close."""
    if plain(name) in known:
        return None
    matches = difflib.get_close_matches(plain(name), sorted(known, key=_plain_schema_first), n=1, cutoff=0.8)
    return matches[0] if matches else None


def _plain_schema_first(name: str) -> tuple[bool, str]:
    return name not in ("prompt", "target", "subject", "paraphrases", "unrelated", "original", "implied"), name
