"""The metrics give the numbers that published code gives on the same model and facts.

ZsRE and FEVER: MEND, MALMEN, KnowEdit and RLEdit score the share of right answer tokens record by record. CounterFact:
ROME compares the mean log-probabilities of two answers, which is the default; RLEdit's released code compares token by
token.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from agents.distributed import Processes, evaluate_sharded
from rledit_env.knowledge import EditRecord, ImpliedFact, UnrelatedFact, load_knowledge
from rledit_env.lm.editable import EditableLM
from rledit_env.metrics import evaluate, top_tokens
from rledit_env.retention import batch_efficacy

DATA = Path(__file__).parents[3] / "shared" / "data"
SHORT, LONG = ("Rome is in", "P"), ("Bananas are", "zzzzzz")  # answers of two and of seven tokens


@pytest.fixture
def lm(tiny_lm: Any) -> EditableLM:
    """A tiny LM that gives the short answer and nothing of the long one."""
    lm = tiny_lm()
    short, long = lm.tokenize(*SHORT), lm.tokenize(*LONG)
    assert (len(short.targets), len(long.targets)) == (2, 7)
    for _ in range(60):
        trace = lm.trace([short])
        lm.apply(trace.keys, {m: -0.01 * g for m, g in trace.value_gradients.items()})
    said = [tokens == torch.tensor(p.targets) for tokens, p in zip(top_tokens(lm, [short, long]), (short, long))]
    assert said[0].all() and not said[1].any()
    assert round(100 * float(torch.cat(said).double().mean()), 1) == 22.2  # what pooling the tokens would give
    return lm


def record(pair: tuple[str, str], other: tuple[str, str] | None = None, **more: Any) -> EditRecord:
    """A fact whose every passage asks for ``pair``."""
    return EditRecord(*pair, (pair[0],), (UnrelatedFact(*pair),), "old", implied=(ImpliedFact(*pair),), **more)


TWO = (record(SHORT), record(LONG))


@pytest.mark.parametrize("kind", ["zsre", "fever"])
def test_a_right_answer_of_two_tokens_and_a_wrong_one_of_seven_are_50(lm: EditableLM, kind: str) -> None:
    metrics = evaluate(lm, TWO, kind, generate=False)
    for score in ("efficacy", "generalization", "specificity_answer", "top1", "portability"):
        assert getattr(metrics, score) == 50.0, score
    assert evaluate_sharded(Processes(), lm, TWO, kind) == metrics
    assert batch_efficacy(lm, [TWO, TWO[:1], TWO[1:]], kind).tolist() == [50.0, 100.0, 0.0]


def test_counterfact_s_top_1_and_portability_are_by_record_too(lm: EditableLM) -> None:
    metrics = evaluate(lm, TWO, "counterfact", generate=False)
    assert (metrics.top1, metrics.portability) == (50.0, 50.0)


@pytest.mark.parametrize("kind", ["zsre", "counterfact"])
def test_a_record_with_many_passages_counts_as_one(lm: EditableLM, kind: str) -> None:
    """Both metrics average a record's paraphrases, and its unrelated pairs, before the records."""
    single, several = TWO
    several = dataclasses.replace(several, paraphrases=(LONG[0],) * 3, unrelated=several.unrelated * 3)
    once, thrice = (evaluate(lm, [single, r], kind, generate=False) for r in (TWO[1], several))
    assert once == thrice
    if kind == "zsre":
        assert thrice.generalization == thrice.specificity_answer == 50.0  # 25 over all passages


@pytest.fixture(scope="session")
def default_model() -> EditableLM:
    return EditableLM.load("smollm2-135m", dtype="float32", device="cpu")
