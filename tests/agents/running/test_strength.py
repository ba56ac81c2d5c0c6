"""Tests of agents.running.strength: how the strength of an editor without training is found on a few facts."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings

import pytest
import torch

from agents.running import strength
from agents.running.editing import EditLog, edit_facts
from agents.running.editors import EDITORS, with_step_size
from agents.running.strength import Bracket, StrengthProbe, StrengthSearch, Trial, best_of, some_facts
from rledit_env.evaluation.guard import DriftGuard
from rledit_env.evaluation.metrics import evaluate
from rledit_env.knowledge import EditRecord, KnowledgeDataset, UnrelatedFact

EDITOR = with_step_size(EDITORS["ft-m"], 1e-2, 1)
RECORDS = tuple(
    EditRecord(f"{name} is", target, (f"{name} is",), (UnrelatedFact("Up is", "up"),), subject=name, origin="list")
    for name, target in (("Ruritania", "a."), ("Freedonia", "b."))
)


def trial(step_size=1.0, taken=1, kl=0.01, top1=50.0, steps=1):
    return Trial(step_size, steps, taken, top1, kl)


def agent_of(one):
    return EDITOR.agent_class()(None, with_step_size(EDITOR, one.step_size, one.steps_per_batch).configuration())


@pytest.fixture
def probe(tiny_lm, monkeypatch):
    monkeypatch.setattr(strength, "TEXTS", strength.TEXTS[:2])
    monkeypatch.setattr(strength, "TEXT_TOKENS", 8)
    lm = tiny_lm(modules="model.layers.[1-3].mlp.*")
    lm.restore()
    return StrengthProbe(lm, EDITOR, KnowledgeDataset("zsre", "list", "train", RECORDS), "answer", 2, bound=1.0)


def test_the_smallest_step_size_with_which_all_facts_take_is_found_and_named_with_its_cost(probe):
    search = probe.search((1,))
    assert search.chosen.taken == search.facts == 2 and search.complete
    assert 0 < search.chosen.kl < math.inf
    weaker = [t for t in search.trials if t.step_size < search.chosen.step_size]
    edit_facts(probe.lm, agent_of(search.chosen), probe.facts, 2, "answer")
    metrics = evaluate(probe.lm, RECORDS, "zsre")
    assert (sum(metrics.taken), metrics.top1) == (2, pytest.approx(search.chosen.top1))
    assert weaker and max(t.taken for t in weaker) < 2
    assert search.chosen.step_size / max(t.step_size for t in weaker) <= 2.01
    assert "all facts take" in search.reason


def test_nothing_of_a_probe_is_left_in_the_model(probe):
    lm = probe.lm
    before = lm.snapshot()
    probe.search((1, 2))
    after = lm.snapshot()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(lm.prefix_cache) == len(lm.reference_cache) == 0


def test_an_interrupted_probe_leaves_the_model_unedited(probe):
    def stop(_):
        raise KeyboardInterrupt

    before = probe.lm.snapshot()
    with pytest.raises(KeyboardInterrupt):
        dataclasses.replace(probe, progress=stop).search((1,))
    assert all(torch.equal(weight, probe.lm.snapshot()[name]) for name, weight in before.items())


def test_a_tight_bound_holds_even_if_fewer_facts_take(probe):
    free = probe.search((1,)).chosen
    bound = free.kl / 30
    search = dataclasses.replace(probe, bound=bound).search((1,))
    assert search.chosen.kl <= bound < free.kl
    assert search.chosen.taken < free.taken
    assert f"within {bound:g} nats a token" in search.reason


def test_a_search_whose_time_is_up_chooses_among_what_it_has_tried(probe):
    seen = []
    search = dataclasses.replace(probe, seconds=0.0, progress=seen.append).search((1, 2))
    assert search.trials == tuple(seen) and len(seen) == strength.LEAST
    assert search.chosen in seen and not search.complete


def test_a_step_size_that_breaks_the_model_is_a_finding_and_not_a_warning(probe, monkeypatch, recwarn):
    real = strength.edit_facts

    def breaking(lm, agent, *arguments, **options):
        if agent.config.learning_rate > 1:
            warnings.warn("broke the LLM", stacklevel=1)
            return EditLog(diverged=True)
        return real(lm, agent, *arguments, **options)

    monkeypatch.setattr(strength, "edit_facts", breaking)
    search = dataclasses.replace(probe, editor=with_step_size(EDITOR, 2.0, 1)).search((1,))
    assert search.trials[0] == Trial(2.0, 1, 0, 0.0, None)
    assert search.chosen.taken == 2 and search.chosen.step_size < 1
    assert not recwarn.list


def test_a_guarded_probe_holds_the_text_of_the_guard_to_the_bound_too(probe):
    held = DriftGuard(probe.lm, 0.02)
    search = dataclasses.replace(probe, bound=0.02, guarded=True).search((1,))
    assert search.chosen.kl is not None
    for one in search.trials:
        edit_facts(probe.lm, agent_of(one), probe.facts, 2, "answer")
        assert (held.divergence() <= 0.02) == (one.kl is not None)
    assert any(one.kl is None for one in search.trials)


def test_more_facts_taken_come_first_and_less_divergence_second_within_the_bound():
    few, many, wild = trial(taken=1, kl=0.001), trial(taken=3, kl=0.09), trial(taken=4, kl=0.2)
    assert best_of([few, many, wild], 0.1) is many
    assert best_of([many, gentle := trial(taken=3, kl=0.03), few], 0.1) is gentle
    assert best_of([trial(taken=0, kl=0.0, top1=0.0), nearer := trial(taken=0, kl=0.05, top1=40.0)], 0.1) is nearer
    assert best_of([wild, broken := trial(kl=None)], 0.1) is wild
    assert best_of([broken], 0.1) is broken


@pytest.mark.parametrize("start", [1e-6, 0.04, 0.3, 700.0])
def test_the_bracket_closes_around_the_threshold_from_wherever_it_starts(start):
    bracket, tried = Bracket(start), []
    while not bracket.closed:
        size = bracket.step_size
        tried.append(trial(size, taken=4 if size >= 0.05 else 0, kl=size / 100))
        bracket.narrow(tried[-1], 4, 0.1)
    assert best_of(tried, 0.1).taken == 4
    assert 0.05 <= best_of(tried, 0.1).step_size < 0.1
    assert len(tried) <= 14


def test_the_bracket_ends_where_nothing_changes_anything():
    bracket, count = Bracket(1e-6), 0
    while not bracket.closed:
        bracket.narrow(trial(bracket.step_size, taken=0, kl=0.0), 4, 0.1)
        count += 1
    assert count < 20


def test_a_search_is_the_same_after_a_round_trip_through_json():
    search = StrengthSearch(3, 0.1, (trial(), trial(kl=None)), trial(), 2.5, True)
    stored = json.loads(json.dumps(search.as_dict()))
    assert StrengthSearch.from_dict(stored) == search
    assert stored["reason"] == search.reason


def test_a_search_says_when_every_strength_moves_the_model_too_far():
    search = StrengthSearch(3, 0.1, (trial(kl=5.0),), trial(kl=5.0), 2.5, True)
    assert "moves the model further than 0.1 nats" in search.reason


def test_the_facts_that_are_tried_come_from_the_whole_file(facts):
    dataset = facts("zsre", 12)
    few = some_facts(dataset, 4)
    assert [r.prompt for r in few] == [dataset.records[i].prompt for i in (0, 3, 6, 9)]
    assert len(some_facts(dataset, 50)) == 12
