"""Reads MzsRE (Wang et al. 2024): ZsRE in twelve languages, in files of two languages each.

The first language of a row is edited. The same question and its rephrasing in the others are variants of the fact under
the language's code; their unrelated and portability questions are scored under it, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from rledit_env.knowledge.fields import Row, Schema
from rledit_env.knowledge.record import EditRecord, ImpliedFact
from rledit_env.knowledge.zsre import read_mend_flat

CODE = re.compile(r"[a-z]{2,3}(-[a-z]{2,4})?$", re.IGNORECASE)  # "cz", "zh", "zh-cn"


def _read(row: Row) -> EditRecord:
    codes = [code for code in row.values if row.has(code)]
    edited, *others = (_in_language(row, code) for code in codes)
    return replace(
        edited,
        unrelated=tuple(fact for record in (edited, *others) for fact in record.unrelated),
        implied=tuple(fact for record in (edited, *others) for fact in record.implied),
        variants=tuple(
            ImpliedFact(asked, record.target, code)
            for code, record in zip(codes[1:], others, strict=True)
            for asked in (record.prompt, *record.paraphrases)
        ),
    )


def _in_language(row: Row, code: str) -> EditRecord:
    """One language's part, with the language's code as the group of its questions."""
    record = read_mend_flat(row.inner(code))
    return replace(
        record,
        unrelated=tuple(replace(fact, group=code) for fact in record.unrelated),
        implied=tuple(replace(fact, group=code) for fact in record.implied),
    )


def _is_by_language(row: Row) -> bool:
    parts = [value for value in row.values.values() if isinstance(value, Mapping)]
    return bool(parts) and all(
        CODE.match(str(code)) and (value is None or isinstance(value, Mapping)) for code, value in row.values.items()
    ) and any("src" in part or "alt" in part for part in parts)  # fmt: skip


SCHEMA = Schema("MzsRE", ("en",), _read, _is_by_language)
