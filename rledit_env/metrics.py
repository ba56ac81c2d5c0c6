"""Efficacy, Generalization and Specificity per data set (Appendix A.3), and free-running exact match."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from rledit_env.answers import answer_of, is_exact, took
from rledit_env.knowledge import EditRecord
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage
from rledit_env.lm.losses import negative_log_likelihood

CHUNK = 256  # passages whose logits are held at once


@dataclass(frozen=True)
class Metrics:
    """Scores in percent, over all records (and over all their paraphrases and unrelated pairs).

    Attributes:
        efficacy, generalization: CounterFact: share of prompts with P(y*) > P(y_old); else share of answer tokens
            whose top-1 token is the target's, on x and on x̃.
        specificity: share of unrelated facts kept. CounterFact: P(y_old) > P(y*) on x′; else share of answer tokens
            of x′ where the top-1 token is the *original model's*.
        specificity_answer: the same against the data set's answer (what published ZsRE and FEVER code reports). For
            CounterFact the two readings are one.
        exact_match: share of edit prompts whose greedy, free-running continuation begins with the target and ends there
            (`rledit_env.answers.is_exact`); None if it was not asked for.
        top1: share of edit prompts' answer tokens whose top-1 token is the target's (teacher-forced).
        taken: one entry a record: does that continuation begin with the target (`rledit_env.answers.took`); empty if
            that was not asked for.
        portability: share of answer tokens of what the edits imply whose top-1 token is the answer's (KnowEdit); None
            where the data implies nothing.
    """

    efficacy: float
    generalization: float
    specificity: float
    specificity_answer: float
    exact_match: float | None
    top1: float
    taken: tuple[bool, ...]
    portability: float | None = None

    @property
    def mean(self) -> float:
        """Mean of Efficacy, Generalization and Specificity."""
        return (self.efficacy + self.generalization + self.specificity) / 3

    def as_dict(self) -> dict[str, float | None]:
        """The scores by name, without the per-record list; portability only where the data has it."""
        scores = asdict(self)
        del scores["taken"]
        if self.portability is None:
            del scores["portability"]
        return {**scores, "mean": self.mean}


def evaluate(lm: EditableLM, records: Sequence[EditRecord], kind: str, generate: bool = True) -> Metrics:
    """Metrics of the current weights on these records.

    Args:
        lm: the edited LM.
        records: the facts that were edited.
        kind: "zsre", "counterfact" or "fever", which decides the metrics' form.
        generate: also decode freely, for ``taken`` and ``exact_match`` (much slower than the teacher-forced scores).

    Raises:
        ValueError: no records, or a CounterFact record without the answer it had before.
    """
    if not records:
        raise ValueError("no fact has been edited yet; take at least one step first")
    edits = [lm.tokenize(r.prompt, r.target, origin=r.origin) for r in records]
    top1 = _percent(torch.cat(_token_matches(lm, edits)))
    answers = continuations(lm, records) if generate else None
    if kind == "counterfact":
        scores = _comparison_metrics(lm, records)
    else:
        scores = _token_metrics(lm, records, edits)
    implied = [lm.tokenize(fact.prompt, fact.answer, origin=r.origin) for r in records for fact in r.implied]
    portability = _percent(torch.cat(_token_matches(lm, implied))) if implied else None
    metrics = Metrics(*scores, exact_match=None, top1=top1, taken=(), portability=portability)
    return metrics if answers is None else with_answers(metrics, records, answers)


def with_answers(metrics: Metrics, records: Sequence[EditRecord], answers: Sequence[str]) -> Metrics:
    """The metrics with ``taken`` and ``exact_match`` of these :func:`continuations` of the records' prompts."""
    pairs = [(answer, record.target) for answer, record in zip(answers, records, strict=True)]
    exact = 100 * sum(is_exact(*pair) for pair in pairs) / len(pairs)
    return replace(metrics, exact_match=exact, taken=tuple(took(*pair) for pair in pairs))


def _percent(hits: Tensor) -> float:
    return 100 * float(hits.float().mean())


def efficacy_counts(lm: EditableLM, records: Sequence[EditRecord], kind: str) -> tuple[Tensor, Tensor]:
    """What Efficacy is made of, by record: (hits, of how many), (records,) each, so that it is their sums' ratio.

    CounterFact: one comparison of P(y*) with P(y_old) a record; else its answer tokens.
    """
    if kind == "counterfact":
        _require_originals(records)
        hits = _preferred(lm, [(r.prompt, r.target, str(r.original), r.origin) for r in records])
        return hits, torch.ones_like(hits)
    matches = _token_matches(lm, [lm.tokenize(r.prompt, r.target, origin=r.origin) for r in records])
    counts = [len(tokens) for tokens in matches]
    return torch.stack([tokens.sum() for tokens in matches]), torch.tensor(counts, device=matches[0].device)


def _require_originals(records: Sequence[EditRecord]) -> None:
    missing = next((r for r in records if r.original is None), None)
    if missing is not None:
        raise ValueError(f"{missing.origin}: CounterFact's metrics compare with the answer before the edit, and it "
                         "has none; give the field of its schema that holds it")


def _preferred(lm: EditableLM, rows: Sequence[tuple[str, str, str, str]]) -> Tensor:
    """For each (prompt, first answer, second answer, origin): is the first the more probable."""
    first = sequence_losses(lm, [lm.tokenize(p, a, origin=o) for p, a, _, o in rows])
    second = sequence_losses(lm, [lm.tokenize(p, b, origin=o) for p, _, b, o in rows])
    return first < second


def _comparison_metrics(lm: EditableLM, records: Sequence[EditRecord]) -> tuple[float, float, float, float]:
    _require_originals(records)
    efficacy = [(r.prompt, r.target, str(r.original), r.origin) for r in records]
    general = [(p, r.target, str(r.original), r.origin) for r in records for p in r.paraphrases]
    specific = [(u.prompt, u.answer, r.target, r.origin) for r in records for u in r.unrelated]
    scores = [_percent(_preferred(lm, rows)) for rows in (efficacy, general, specific)]
    return scores[0], scores[1], scores[2], scores[2]


def _token_metrics(
    lm: EditableLM, records: Sequence[EditRecord], edits: Sequence[Passage]
) -> tuple[float, float, float, float]:
    paraphrases = [lm.tokenize(p, r.target, origin=r.origin) for r in records for p in r.paraphrases]
    unrelated = [lm.tokenize(u.prompt, u.answer, origin=r.origin) for r in records for u in r.unrelated]
    predicted = torch.cat(top_tokens(lm, unrelated))
    with lm.original_weights():
        original = torch.cat(top_tokens(lm, unrelated))
    answers = torch.tensor([t for p in unrelated for t in p.targets], device=predicted.device)
    return (
        _percent(torch.cat(_token_matches(lm, edits))),
        _percent(torch.cat(_token_matches(lm, paraphrases))),
        _percent(predicted == original),
        _percent(predicted == answers),
    )


@torch.no_grad()
def top_tokens(lm: EditableLM, passages: Sequence[Passage]) -> list[Tensor]:
    """The most probable token at each answer position, a tensor of (answer tokens,) a passage."""
    tokens: list[Tensor] = []
    for start in range(0, len(passages), CHUNK):
        chunk = passages[start : start + CHUNK]
        best = lm.forward.logits(lm.answer_states(chunk).hidden).argmax(-1)
        tokens.extend(best.split([len(p.targets) for p in chunk]))
    return tokens


def _token_matches(lm: EditableLM, passages: Sequence[Passage]) -> list[Tensor]:
    best = top_tokens(lm, passages)
    return [b == torch.tensor(p.targets, device=b.device) for b, p in zip(best, passages, strict=True)]


@torch.no_grad()
def sequence_losses(lm: EditableLM, passages: Sequence[Passage]) -> Tensor:
    """Mean negative log-probability of each passage's answer tokens, (passages,)."""
    losses: list[Tensor] = []
    for start in range(0, len(passages), CHUNK):
        chunk = passages[start : start + CHUNK]
        states = lm.answer_states(chunk)
        nll = negative_log_likelihood(lm.forward, states.hidden, states.targets)
        sums = torch.zeros(len(chunk), device=nll.device).index_add_(0, states.owner, nll)
        losses.append(sums / torch.bincount(states.owner, minlength=len(chunk)))
    return torch.cat(losses)


def continuations(lm: EditableLM, records: Sequence[EditRecord], batch_size: int = 64) -> list[str]:
    """What the LLM writes after the edit prompts, freely and greedily, some tokens more than the target has."""
    return lm.generate([r.prompt for r in records], longest=[r.target for r in records], batch_size=batch_size)


def free_answers(lm: EditableLM, records: Sequence[EditRecord], batch_size: int = 64) -> list[str]:
    """The LLM's answers to the edit prompts, decoded freely and greedily, as they are shown."""
    return [answer_of(text) for text in continuations(lm, records, batch_size)]


def exact_matches(lm: EditableLM, records: Sequence[EditRecord], batch_size: int = 64) -> list[bool]:
    """Whether each edit prompt's greedy continuation begins with the target and ends there, decoded freely."""
    answers = continuations(lm, records, batch_size)
    return [is_exact(answer, r.target) for answer, r in zip(answers, records, strict=True)]
