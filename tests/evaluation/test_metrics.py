"""Tests of the metrics, against values computed with the whole model."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from rledit_env.evaluation.metrics import Metrics, evaluate, exact_matches
from rledit_env.knowledge import EditRecord, ImpliedFact, UnrelatedFact


@pytest.fixture
def edited(tiny_lm):
    """Gives an LM whose weights have moved enough to change many answers, and its unedited twin."""

    def make(name: str = "tiny-llama", dtype: torch.dtype = torch.float32):
        lm = tiny_lm(name, dtype=dtype)
        original = copy.copy(lm)
        original.model = copy.deepcopy(lm.model)
        generator = torch.Generator().manual_seed(0)
        lm.apply(*({m: 0.15 * torch.randn(2, s[side], generator=generator) for m, s in lm.module_shapes.items()}
                   for side in (0, 1)))
        return lm, original

    return make


def percent(hits) -> float:
    hits = [float(h) for h in hits]
    return 100 * sum(hits) / len(hits)


def over_records(groups) -> float:
    """The mean over records of the mean over each one's shares, in percent; records without any do not count."""
    return percent(sum(map(float, group)) / len(group) for group in groups if group)


@torch.no_grad()
def share_hit(lm, full_logits, prompt, answer) -> float:
    """Share of the answer's tokens that the whole model finds the most probable."""
    passage = lm.tokenize(prompt, answer)
    hits = full_logits(lm, passage).argmax(-1) == torch.tensor(passage.targets)
    return float(hits.double().mean())


@torch.no_grad()
def share_kept(lm, original, full_logits, prompt, answer) -> float:
    """Share of the answer's positions where the most probable token is the unedited model's."""
    passage = lm.tokenize(prompt, answer)
    return float((full_logits(lm, passage).argmax(-1) == full_logits(original, passage).argmax(-1)).double().mean())


@torch.no_grad()
def tokens_preferred(lm, full_logits, prompt, first, second) -> float:
    """Share of the tokens of the first answer, up to the shorter one's end, that are more probable than the second's at
    the same place, after the prompt and the first answer's tokens so far."""
    one, other = lm.tokenize(prompt, first), lm.tokenize(prompt, second)
    logits = full_logits(lm, one)
    pairs = list(zip(one.targets, other.targets, strict=False))
    return sum(float(logits[i, a] > logits[i, b]) for i, (a, b) in enumerate(pairs)) / len(pairs)


@torch.no_grad()
def prefers(lm, full_logits, prompt, first, second) -> bool:
    means = []
    for answer in (first, second):
        passage = lm.tokenize(prompt, answer)
        chances = full_logits(lm, passage).log_softmax(-1).gather(1, torch.tensor(passage.targets)[:, None])
        means.append(float(chances.mean()))
    return means[0] > means[1]


@pytest.mark.parametrize("kind", ["zsre", "fever"])
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma2", "tiny-gpt2"])
def test_zsre_and_fever_score_each_record_s_share_of_right_answer_tokens(
    edited, facts, uneven_facts, full_logits, name, kind
):
    lm, original = edited(name)
    records = [*facts(kind, 8), *uneven_facts]
    # Random weights know nothing: ask for what they do answer, so that no score is 0 or 100.
    with torch.no_grad():
        texts = [text.strip() for text in lm.generate([r.prompt for r in records], extra=2)]
    known = [dataclasses.replace(r, target=t) for r, t in zip(records, texts, strict=True) if t and t.isascii()]
    records = [*records, *known]
    metrics = evaluate(lm, records, kind, generate=False)

    def share(groups):
        return over_records([share_hit(lm, full_logits, *pair) for pair in group] for group in groups)

    assert metrics.efficacy == pytest.approx(share([(r.prompt, r.target)] for r in records))
    assert metrics.top1 == metrics.efficacy
    assert metrics.generalization == pytest.approx(share([(p, r.target) for p in r.paraphrases] for r in records))
    unrelated = [[(u.prompt, u.answer) for u in r.unrelated] for r in records]
    assert metrics.specificity_answer == pytest.approx(share(unrelated))
    kept = over_records([share_kept(lm, original, full_logits, *pair) for pair in group] for group in unrelated)
    assert metrics.specificity == pytest.approx(kept)
    assert 0 < metrics.specificity < 100
    assert metrics.mean == pytest.approx((metrics.efficacy + metrics.generalization + metrics.specificity) / 3)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma3", "tiny-gpt2"])
def test_counterfact_compares_the_mean_log_probabilities_of_the_new_and_the_old_answer(
    edited, facts, uneven_facts, full_logits, name
):
    lm, _ = edited(name)
    records = [*facts("counterfact", 10), *uneven_facts]
    metrics = evaluate(lm, records, "counterfact", generate=False)

    def share(groups):
        return over_records([prefers(lm, full_logits, *row) for row in group] for group in groups)

    assert metrics.efficacy == pytest.approx(share([(r.prompt, r.target, r.original)] for r in records))
    assert metrics.generalization == pytest.approx(
        share([(p, r.target, r.original) for p in r.paraphrases] for r in records)
    )
    expected = share([(u.prompt, u.answer, r.target) for u in r.unrelated] for r in records)
    assert metrics.specificity == metrics.specificity_answer == pytest.approx(expected)
    assert all(0 < score < 100 for score in (metrics.efficacy, metrics.generalization, metrics.specificity))


def test_the_original_model_keeps_all_its_answers(tiny_lm, facts):
    metrics = evaluate(tiny_lm(), facts("zsre", 6), "zsre", generate=False)
    assert metrics.specificity == 100
    assert metrics.exact_match is None


def test_groups_that_a_data_set_names_have_scores_of_their_own(edited, facts, full_logits):
    lm, original = edited()
    records = facts("zsre", 4)
    pairs = [(r.prompt, r.target) for r in records]
    first = dataclasses.replace(
        records[0],
        unrelated=(UnrelatedFact(*pairs[1], "Forgetfulness"), *records[0].unrelated),
        implied=(ImpliedFact(*pairs[2], "multi_hop"), ImpliedFact(*pairs[3], "Reasoning"), ImpliedFact(*pairs[1])),
        variants=(ImpliedFact(*pairs[3], "personas"), ImpliedFact(*pairs[0], "personas")),
    )
    second = dataclasses.replace(records[1], implied=(ImpliedFact(*pairs[3], "multi_hop"),))
    metrics = evaluate(lm, [first, second], "zsre", generate=False)
    hits = [share_hit(lm, full_logits, *pair) for pair in pairs]
    assert metrics.groups == {
        "specificity/Forgetfulness": pytest.approx(100 * share_kept(lm, original, full_logits, *pairs[1])),
        "portability/multi_hop": pytest.approx(over_records([[hits[2]], [hits[3]]])),
        "portability/Reasoning": pytest.approx(100 * hits[3]),
        "generalization/personas": pytest.approx(over_records([[hits[3], hits[0]]])),
    }
    assert metrics.portability == pytest.approx(over_records([[hits[2], hits[3], hits[1]], [hits[3]]]))
    assert metrics.as_dict()["portability/multi_hop"] == metrics.groups["portability/multi_hop"]
    plain = [dataclasses.replace(r, variants=()) for r in (first, second)]
    assert metrics.generalization == evaluate(lm, plain, "zsre", generate=False).generalization
    assert f"portability/Reasoning={100 * hits[3]:.1f}" in repr(metrics)


def test_counterfact_s_groups_of_unrelated_facts_are_compared(edited, facts):
    lm, _ = edited()
    (record,) = facts("counterfact", 1)
    grouped = tuple(dataclasses.replace(fact, group="Near") for fact in record.unrelated)
    metrics = evaluate(lm, [dataclasses.replace(record, unrelated=grouped)], "counterfact", generate=False)
    assert metrics.groups == {"specificity/Near": metrics.specificity}


def test_a_question_that_needs_further_edits_is_asked_where_all_were_made(edited, facts, full_logits):
    lm, _ = edited()
    first, second, third = facts("zsre", 3)
    asked = ImpliedFact(third.prompt, third.target, "multi_hop", ((second.prompt, second.target),))
    first = dataclasses.replace(first, implied=(asked,))
    both = evaluate(lm, [first, second], "zsre", generate=False)
    assert both.portability == pytest.approx(100 * share_hit(lm, full_logits, third.prompt, third.target))
    alone = evaluate(lm, [first, third], "zsre", generate=False)
    assert (alone.portability, alone.groups) == (None, {})


def test_facts_without_paraphrases_have_no_generalization(edited, facts):
    lm, _ = edited()
    first, second = facts("zsre", 2)
    bare = dataclasses.replace(first, paraphrases=(first.prompt,), lacks=("paraphrases",))
    alone = evaluate(lm, [bare], "zsre", generate=False)
    assert alone.generalization is None and alone.as_dict()["generalization"] is None
    assert alone.mean == pytest.approx((alone.efficacy + alone.specificity) / 2)
    both, other = (evaluate(lm, records, "zsre", generate=False) for records in ([bare, second], [second]))
    assert both.generalization == other.generalization is not None


def test_portability_is_the_mean_over_the_records_that_imply_something_and_absent_without_any(
    edited, facts, full_logits
):
    lm, _ = edited()
    records = facts("zsre", 6)
    without = evaluate(lm, records, "zsre", generate=False)
    assert without.portability is None and "portability" not in without.as_dict()
    # Their hits differ from the others'.
    implied = [[(r.prompt, r.target) for r in records[start:stop]] for start, stop in ((0, 3), (3, 4))]
    some = [dataclasses.replace(r, implied=tuple(ImpliedFact(*pair) for pair in pairs))
            for r, pairs in zip(records[4:], implied, strict=True)]
    metrics = evaluate(lm, [*some, *records[:4]], "zsre", generate=False)
    expected = over_records([share_hit(lm, full_logits, *pair) for pair in pairs] for pairs in implied)
    assert metrics.as_dict()["portability"] == pytest.approx(expected)
    assert metrics.efficacy == pytest.approx(without.efficacy)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
def test_the_released_code_scores_counterfact_token_by_token_after_the_answer_that_should_win(
    edited, facts, uneven_facts, full_logits, name
):
    lm, _ = edited(name)
    records = [*facts("counterfact", 10), *uneven_facts]
    metrics = evaluate(lm, records, "counterfact", generate=False, metrics="rledit-code")

    def share(groups):
        return over_records([tokens_preferred(lm, full_logits, *row) for row in group] for group in groups)

    assert metrics.efficacy == pytest.approx(share([(r.prompt, r.target, r.original)] for r in records))
    assert metrics.generalization == pytest.approx(
        share([(p, r.target, r.original) for p in r.paraphrases] for r in records)
    )
    expected = share([(u.prompt, u.answer, r.target) for u in r.unrelated] for r in records)
    assert metrics.specificity == metrics.specificity_answer == pytest.approx(expected)
    paper = evaluate(lm, records, "counterfact", generate=False)
    assert metrics.top1 == paper.top1
    assert (metrics.efficacy, metrics.specificity) != (paper.efficacy, paper.specificity)


@pytest.mark.parametrize("kind", ["zsre", "fever"])
def test_the_released_code_compares_zsre_s_and_fever_s_specificity_with_the_data_s_answer(edited, facts, kind):
    lm, _ = edited()
    paper, code = (evaluate(lm, facts(kind, 6), kind, generate=False, metrics=m) for m in ("paper", "rledit-code"))
    assert code.specificity == code.specificity_answer == paper.specificity_answer != paper.specificity
    assert (code.efficacy, code.generalization) == (paper.efficacy, paper.generalization)


def test_metrics_that_are_unknown_are_refused_with_those_that_are_known(tiny_lm, facts):
    with pytest.raises(ValueError, match="metrics 'rome' is unknown; give one of 'paper' .*, 'rledit-code' "):
        evaluate(tiny_lm(), facts("zsre", 2), "zsre", metrics="rome")


def test_scores_are_shown_in_one_line_without_the_list_of_facts():
    metrics = Metrics(95.0, 80.0, 61.549, 61.549, 55.0, 90.0, (True, False) * 200)
    assert repr(metrics) == (
        "Metrics(efficacy=95.0, generalization=80.0, specificity=61.5, mean=78.8, exact_match=55.0)"
    )
    assert len(metrics.taken) == 400
    other = Metrics(95.0, 80.0, 61.549, 61.549, None, 90.0, (), portability=12.34, metrics="rledit-code")
    assert repr(other) == (
        "Metrics(efficacy=95.0, generalization=80.0, specificity=61.5, mean=78.8, portability=12.3, "
        "metrics='rledit-code')"
    )


@pytest.mark.parametrize("kind", ["zsre", "counterfact"])
def test_evaluating_changes_nothing(edited, facts, kind):
    lm, _ = edited()
    before = {n: p.clone() for n, p in lm.model.state_dict().items()}
    state = torch.get_rng_state()
    first = evaluate(lm, facts(kind, 6), kind)
    assert all(torch.equal(before[n], p) for n, p in lm.model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert evaluate(lm, facts(kind, 6), kind) == first


def test_a_fact_took_when_the_free_answer_begins_with_its_target_as_a_whole_word(tiny_lm):
    lm = tiny_lm()
    record = EditRecord("Rome is in", "Peru", ("One finds Rome in",), (UnrelatedFact("2 + 2 =", "4"),), "Italy")
    records = [record, dataclasses.replace(record, target="Per"), dataclasses.replace(record, prompt="Bananas are")]
    assert evaluate(lm, records, "zsre").taken == (False, False, False)
    passage = lm.tokenize(record.prompt, record.target)
    for _ in range(40):
        trace = lm.trace([passage])
        lm.apply(trace.keys, {m: -0.01 * g for m, g in trace.value_gradients.items()})
    assert lm.generate([record.prompt], longest=["Peru"])[0].startswith(" Peru")
    metrics = evaluate(lm, records, "zsre")
    assert metrics.taken == (True, False, False)
    assert metrics.efficacy > 100 / 3  # the first record's answer is right, and so are most tokens of the second's


def test_without_free_answers_nobody_says_which_facts_took(tiny_lm, facts):
    metrics = evaluate(tiny_lm(), facts("zsre", 3), "zsre", generate=False)
    assert metrics.taken == () and metrics.exact_match is None


def test_an_exact_match_is_the_whole_answer_and_nothing_more(tiny_lm, uneven_facts, monkeypatch):
    lm = tiny_lm()
    answers = {"Rome is in": " Peru. It", "2 + 2 =": " 5 and", "Ångström comes from": " Łódź\n"}
    asked = []

    def generate(prompts, longest, batch_size):
        asked.extend(longest)
        return [answers.get(p, " Old Church") for p in prompts]

    monkeypatch.setattr(lm, "generate", generate)
    assert exact_matches(lm, uneven_facts) == [True, False, False, True]
    assert asked == [r.target for r in uneven_facts]
    metrics = evaluate(lm, uneven_facts, "counterfact")
    assert metrics.exact_match == 50.0 and metrics.taken == (True, False, True, True)


def test_scores_by_name_leave_out_the_list_of_records(tiny_lm, facts):
    metrics = evaluate(tiny_lm(), facts("zsre", 3), "zsre")
    scores = metrics.as_dict()
    assert set(scores) == {
        "efficacy", "generalization", "specificity", "specificity_answer", "exact_match", "top1", "mean",
    }
    assert scores["mean"] == metrics.mean and len(metrics.taken) == 3


def test_no_records_are_an_error(tiny_lm):
    with pytest.raises(ValueError, match="no fact has been edited yet"):
        evaluate(tiny_lm(), [], "zsre")


def test_counterfact_without_the_earlier_answer_names_the_record(tiny_lm, uneven_facts):
    records = [uneven_facts[0], dataclasses.replace(uneven_facts[1], original=None)]
    with pytest.raises(ValueError, match="list, item 2: CounterFact's metrics compare"):
        evaluate(tiny_lm(), records, "counterfact")
