"""Efficacy, Generalization and Specificity per data set (Appendix A.3), and free-running exact match.

Every score is a mean over records. A passage's score is the share of its answer tokens that are right (for CounterFact:
whether one answer is more probable than the other). A record's score is the mean over its passages of a kind, such as
its paraphrases; the data's score is the mean over the records that have such passages. Long answers therefore count no
more than short ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from rledit_env.answers import answer_of, is_exact, took
from rledit_env.evaluation.groups import Edits, by_group, edits_of, that_follow
from rledit_env.knowledge import EditRecord
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage
from rledit_env.lm.losses import negative_log_likelihood

CHUNK = 256  # passages whose logits are in memory at once

METRICS_VERSION = 2
"""The version of the scores' computation; saved with every score, so that scores of two versions never share a table.
1: answer tokens and prompts pooled over all records. 2: the mean over records."""

METRICS = {
    "paper": "as the paper defines them (Appendix A.3)",
    "rledit-code": "as the paper's released code computes them",
}
"""The ways to score, by name."""


@dataclass(frozen=True, repr=False)
class Metrics:
    """Scores in percent: each record's, then the mean over the records that have one.

    Attributes:
        efficacy, generalization: on x and on x̃. CounterFact: whether P(y*) > P(y_old); else the share of the answer's
            tokens that are the model's top-1 token, teacher-forced. Generalization is None without paraphrases.
        specificity: whether unrelated facts are kept, on x′. CounterFact: whether P(y_old) > P(y*); else the share of
            the answer's tokens where the top-1 token is the *original model's*.
        specificity_answer: specificity against the data set's answer (what published ZsRE and FEVER code reports). For
            CounterFact it equals ``specificity``.
        exact_match: share of edit prompts whose greedy, free-running continuation begins with the target and ends there
            (`rledit_env.answers.is_exact`); None if it was not asked for.
        top1: share of the target's tokens that are the model's top-1 token on x (teacher-forced), for every kind.
        taken: for each record, whether that continuation begins with the target (`rledit_env.answers.took`); empty if
            it was not asked for.
        portability: for facts that an edit implies (KnowEdit), the share of the answer's tokens that are the top-1
            token; None if the data has no such facts. One that needs further edits is scored if all were made.
        groups: the scores of the groups that the data set itself names, each as what it is a part of and its own name:
            "portability/multi_hop", "specificity/Forgetfulness". "generalization/personas" and the like are of the
            edited fact, asked in a way that has a name; they are not part of `generalization`.
        metrics: a name in ``METRICS``, by which the first four were scored.
    """

    efficacy: float
    generalization: float | None
    specificity: float
    specificity_answer: float
    exact_match: float | None
    top1: float
    taken: tuple[bool, ...]
    portability: float | None = None
    metrics: str = "paper"
    groups: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean of Efficacy, Generalization and Specificity; without Generalization if the data has no paraphrases."""
        return fmean(s for s in (self.efficacy, self.generalization, self.specificity) if s is not None)

    def as_dict(self) -> dict[str, float | None]:
        """The scores by name, without ``taken``; portability and the scores of groups only if the data has them."""
        scores: dict[str, Any] = asdict(self)
        del scores["taken"], scores["metrics"], scores["groups"]
        if self.portability is None:
            del scores["portability"]
        return {**scores, **self.groups, "mean": self.mean}

    def __repr__(self) -> str:
        """The scores in one line, to one decimal, without `taken`."""
        names = ("efficacy", "generalization", "specificity", "mean", "exact_match", "portability")
        shown = [f"{name}={value:.1f}" for name in names if (value := getattr(self, name)) is not None]
        shown += [f"{name}={value:.1f}" for name, value in self.groups.items() if value is not None]
        if self.metrics != "paper":
            shown.append(f"metrics={self.metrics!r}")
        return f"Metrics({', '.join(shown)})"


def score_text(score: float | None) -> str:
    """A score to one decimal; "–" if there is none."""
    return "–" if score is None else f"{score:.1f}"


RecordScores = Mapping[str, Sequence[float | None]]
"""Score → for each record a share from 0 to 1; None for a record without such passages."""


def check_metrics(metrics: str) -> None:
    """Check that this is a name in ``METRICS``.

    Raises:
        ValueError: it is not.
    """
    if metrics not in METRICS:
        known = ", ".join(f"{name!r} ({meaning})" for name, meaning in METRICS.items())
        raise ValueError(f"metrics {metrics!r} is unknown; give one of {known}")


def evaluate(
    lm: EditableLM, records: Sequence[EditRecord], kind: str, generate: bool = True, metrics: str = "paper"
) -> Metrics:
    """Metrics of the current weights on these records.

    Args:
        lm: the edited LLM.
        records: the facts that were edited.
        kind: "zsre", "counterfact" or "fever", which decides how records are scored.
        generate: also decode freely, for ``taken`` and ``exact_match`` (much slower than the teacher-forced scores).
        metrics: "paper", or "rledit-code" for the scores of the paper's released code, to compare with its tables.
            CounterFact: the share of the first min(m, m_old) answer tokens where P(y*ᵢ) > P(y_oldᵢ), both after the
            prompt and y*₁…y*ᵢ₋₁ (m tokens in y*, m_old in y_old); on x′ the answers' roles are swapped:
            P(y_oldᵢ) > P(y*ᵢ) after y_old's own tokens. ZsRE and FEVER: Specificity is `specificity_answer`.

    Raises:
        ValueError: there are no records, a CounterFact record has no original answer, or ``metrics`` is unknown.
    """
    check_metrics(metrics)
    if not records:
        raise ValueError("no fact has been edited yet; take at least one step first")
    scores = averaged(score_records(lm, records, kind, metrics), metrics)
    return with_answers(scores, records, continuations(lm, records)) if generate else scores


def score_records(
    lm: EditableLM, records: Sequence[EditRecord], kind: str, metrics: str = "paper", edits: Edits | None = None
) -> dict[str, list[float | None]]:
    """All teacher-forced scores of all records, for :func:`averaged`; arguments and errors as for :func:`evaluate`.

    `edits` are those that were made, if the records are only some of them: questions that need further ones are scored
    if these are among them.
    """
    check_metrics(metrics)
    top1: list[float | None] = [*top1_by_record(lm, records)]
    if kind == "counterfact":
        scores = _comparison_scores(lm, records, metrics)
    else:
        scores = {"efficacy": top1, **_token_scores(lm, records, metrics)}
    edits = edits_of(records) if edits is None else edits
    pairs = zip(records, scores["generalization"], strict=True)
    generalization = [None if "paraphrases" in record.lacks else score for record, score in pairs]
    return {**scores, "generalization": generalization, "top1": top1, **_further_scores(lm, records, edits)}


def averaged(scores: RecordScores, metrics: str = "paper") -> Metrics:
    """The means of :func:`score_records` over records, without the scores of free answers."""
    means: dict[str, Any] = {}
    for name, shares in scores.items():
        known = [share for share in shares if share is not None]
        means[name] = 100 * fmean(known) if known else None
    groups = {name: means.pop(name) for name in scores if "/" in name}
    return Metrics(**means, exact_match=None, taken=(), metrics=metrics, groups=groups)


def with_answers(metrics: Metrics, records: Sequence[EditRecord], answers: Sequence[str]) -> Metrics:
    """The metrics with ``taken`` and ``exact_match``, given the :func:`continuations` of the records' prompts."""
    pairs = [(answer, record.target) for answer, record in zip(answers, records, strict=True)]
    exact = 100 * sum(is_exact(*pair) for pair in pairs) / len(pairs)
    return replace(metrics, exact_match=exact, taken=tuple(took(*pair) for pair in pairs))


def record_efficacy(
    lm: EditableLM, records: Sequence[EditRecord], kind: str, metrics: str = "paper"
) -> list[float]:
    """Efficacy of each record, from 0 to 1."""
    if kind == "counterfact":
        return _preferred(lm, _edit_rows(records), metrics).tolist()
    return top1_by_record(lm, records)


def top1_by_record(lm: EditableLM, records: Sequence[EditRecord]) -> list[float]:
    """`Metrics.top1` of each record, from 0 to 1."""
    return _share_right(lm, [lm.tokenize(r.prompt, r.target, origin=r.origin) for r in records]).tolist()


def _by_record(shares: Tensor, counts: Sequence[int]) -> list[float | None]:
    """The mean of each record's shares, given each record's number of passages; None for a record without passages."""
    return [float(part.mean()) if len(part) else None for part in shares.split(list(counts))]


# (prompt, the answer that should be more probable, the other one, the record's origin)
Comparison = tuple[str, str, str, str]


def _edit_rows(records: Sequence[EditRecord]) -> list[Comparison]:
    missing = next((r for r in records if r.original is None), None)
    if missing is not None:
        raise ValueError(f"{missing.origin}: CounterFact's metrics compare with the answer before the edit, and it "
                         "has none; give the field of its schema that holds it")
    return [(r.prompt, r.target, str(r.original), r.origin) for r in records]


def _further_scores(
    lm: EditableLM, records: Sequence[EditRecord], edits: Edits
) -> dict[str, list[float | None]]:
    """Scores of what follows from the edits, and of the facts asked in ways that have a name."""
    implied, variants = that_follow(records, edits), [record.variants for record in records]
    implied_shares, variant_shares = (
        _share_right(lm, [lm.tokenize(fact.prompt, fact.answer, origin=record.origin)
                          for record, facts in zip(records, asked, strict=True) for fact in facts])
        for asked in (implied, variants)
    )  # fmt: skip
    return {
        "portability": _by_record(implied_shares, [len(facts) for facts in implied]),
        **by_group("portability", implied, implied_shares.tolist()),
        **by_group("generalization", variants, variant_shares.tolist()),
    }


def _comparison_scores(
    lm: EditableLM, records: Sequence[EditRecord], metrics: str
) -> dict[str, list[float | None]]:
    edited = _edit_rows(records)
    general = [(p, r.target, str(r.original), r.origin) for r in records for p in r.paraphrases]
    specific = [(u.prompt, u.answer, r.target, r.origin) for r in records for u in r.unrelated]
    kept = _preferred(lm, specific, metrics)
    specificity = _by_record(kept, [len(r.unrelated) for r in records])
    return {
        "efficacy": _preferred(lm, edited, metrics).tolist(),
        "generalization": _by_record(_preferred(lm, general, metrics), [len(r.paraphrases) for r in records]),
        "specificity": specificity,
        "specificity_answer": specificity,
        **by_group("specificity", [r.unrelated for r in records], kept.tolist()),
    }


def _preferred(lm: EditableLM, rows: Sequence[Comparison], metrics: str = "paper") -> Tensor:
    """Whether each row's first answer is preferred to its second, (rows,) float64: 1 if its mean log-probability is
    higher, else 0; with "rledit-code" the share of its tokens that are more probable than the second answer's token at
    the same place."""
    first = [lm.tokenize(p, a, origin=o) for p, a, _, o in rows]
    second = [lm.tokenize(p, b, origin=o) for p, _, b, o in rows]
    if metrics == "rledit-code":
        return _tokens_preferred(lm, first, second)
    return (sequence_losses(lm, first) < sequence_losses(lm, second)).double().cpu()


@torch.no_grad()
def _tokens_preferred(lm: EditableLM, first: Sequence[Passage], second: Sequence[Passage]) -> Tensor:
    shares: list[float] = []
    for start in range(0, len(first), CHUNK):
        chunk = first[start : start + CHUNK]
        logits = lm.forward.logits(lm.answer_states(chunk).hidden).split([len(p.targets) for p in chunk])
        for scores, preferred, other in zip(logits, chunk, second[start : start + CHUNK], strict=True):
            pairs = list(zip(preferred.targets, other.targets, strict=False))  # up to the shorter answer's end
            first_tokens, second_tokens = torch.tensor(pairs, device=scores.device).T
            rows = torch.arange(len(pairs), device=scores.device)
            shares.append(float((scores[rows, first_tokens] > scores[rows, second_tokens]).double().mean()))
    return torch.tensor(shares, dtype=torch.float64)


def _token_scores(
    lm: EditableLM, records: Sequence[EditRecord], metrics: str
) -> dict[str, list[float | None]]:
    paraphrases = [lm.tokenize(p, r.target, origin=r.origin) for r in records for p in r.paraphrases]
    unrelated = [lm.tokenize(u.prompt, u.answer, origin=r.origin) for r in records for u in r.unrelated]
    predicted = top_tokens(lm, unrelated)
    with lm.original_weights():
        original = top_tokens(lm, unrelated)
    counts = [len(r.unrelated) for r in records]
    answers = [torch.tensor(p.targets, device=b.device) for p, b in zip(unrelated, predicted, strict=True)]
    against_answer, against_original = _share_equal(predicted, answers), _share_equal(predicted, original)
    kept = against_answer if metrics == "rledit-code" else against_original
    return {
        "generalization": _by_record(_share_right(lm, paraphrases), [len(r.paraphrases) for r in records]),
        "specificity": _by_record(kept, counts),
        "specificity_answer": _by_record(against_answer, counts),
        **by_group("specificity", [r.unrelated for r in records], kept.tolist()),
    }


def _share_right(lm: EditableLM, passages: Sequence[Passage]) -> Tensor:
    """Share of each passage's answer tokens that are the top-1 token, (passages,) float64."""
    best = top_tokens(lm, passages)
    return _share_equal(best, [torch.tensor(p.targets, device=b.device) for b, p in zip(best, passages, strict=True)])


def _share_equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Share of equal tokens, passage by passage, (passages,) float64."""
    shares = [(a == b).double().mean() for a, b in zip(first, second, strict=True)]
    return torch.stack(shares).cpu() if shares else torch.zeros(0, dtype=torch.float64)


@torch.no_grad()
def top_tokens(lm: EditableLM, passages: Sequence[Passage]) -> list[Tensor]:
    """The most probable token at each answer position; for each passage a tensor (answer tokens,)."""
    tokens: list[Tensor] = []
    for start in range(0, len(passages), CHUNK):
        chunk = passages[start : start + CHUNK]
        best = lm.forward.logits(lm.answer_states(chunk).hidden).argmax(-1)
        tokens.extend(best.split([len(p.targets) for p in chunk]))
    return tokens


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
    """The LLM's free, greedy continuations of the edit prompts, some tokens longer than the targets."""
    return lm.generate([r.prompt for r in records], longest=[r.target for r in records], batch_size=batch_size)


def free_answers(lm: EditableLM, records: Sequence[EditRecord], batch_size: int = 64) -> list[str]:
    """The LLM's free, greedy answers to the edit prompts, cut for display (`rledit_env.answers.answer_of`)."""
    return [answer_of(text) for text in continuations(lm, records, batch_size)]


def exact_matches(lm: EditableLM, records: Sequence[EditRecord], batch_size: int = 64) -> list[bool]:
    """Whether each edit prompt's free, greedy continuation begins with the target and ends there."""
    answers = continuations(lm, records, batch_size)
    return [is_exact(answer, r.target) for answer, r in zip(answers, records, strict=True)]
