"""Agents where batches are presented until their facts have taken: editing, ledgers, and training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_recording import AGENTS, Breaking, Interrupted, load, rledit

from agents import HypernetworkConfig, RLEditAgent, RLEditConfig, edit_facts
from agents.rledit.trajectory import trajectory
from agents.running.editing import have_taken
from rledit_env.env import LifelongEditEnv
from rledit_env.ledger import EditLedger, LedgerError
from rledit_env.reward import RewardConfig

RUN: dict[str, Any] = {"batch_size": 2, "steps_per_batch": 4, "token": "answer", "present_until": 2e-3}
UNTIL = {"rledit": 2e-3, "forgetful": 1e-4, "dense": 1e-4}  # some facts reach it, some do not


def test_the_log_says_how_often_each_fact_was_presented_and_which_have_taken() -> None:
    lm, facts = load()
    agent, shown = rledit(lm), []
    predict = agent.predict

    def noting(observation: Any, deterministic: bool = True) -> Any:
        shown.append(len(observation["mask"]))
        return predict(observation, deterministic)

    agent.predict = noting  # type: ignore[method-assign]
    done: list[int] = []
    log = edit_facts(lm, agent, facts, progress=done.append, **RUN)
    assert log.batch_sizes == done == [2, 2, 2, 1] and len(log.update_norms) == 4
    assert len(log.presentations) == len(log.taken) == 7
    assert len(set(log.presentations)) > 2 and max(log.presentations) == 4 and 0 < sum(log.taken) < 7
    assert max(log.presentations[:2]) + max(log.presentations[2:4]) + max(log.presentations[4:6]) + \
        log.presentations[6] <= len(shown) < 16
    assert min(shown) > 0, "no agent is asked where there is nothing to edit"
    for record, taken in zip(facts, log.taken, strict=True):
        passage = lm.tokenize(record.prompt, record.target)
        with torch.no_grad():
            logits = lm.model(input_ids=torch.tensor([passage.input_ids])).logits[0, list(passage.positions)]
        least = logits.softmax(-1).gather(1, torch.tensor(passage.targets)[:, None]).min()
        assert (float(least) >= 2e-3) == taken
    assert have_taken(lm, facts, 2e-3) == log.taken


def test_a_fixed_number_of_presentations_is_the_same_for_all_facts() -> None:
    lm, facts = load()
    log = edit_facts(lm, rledit(lm), facts, **{**RUN, "present_until": None})
    assert log.presentations == [4] * 7 and log.taken == []


def test_facts_that_have_taken_beforehand_are_not_presented_and_change_nothing() -> None:
    lm, facts = load()
    log = edit_facts(lm, rledit(lm), facts, **{**RUN, "present_until": 1e-12})
    assert log.presentations == [0] * 7 and log.taken == [True] * 7
    assert log.update_norms == [0.0] * 4 and log.drift == 0.0


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("name", UNTIL)
def test_a_recorded_run_is_the_same_is_replayed_and_goes_on_from_any_step(
    tmp_path: Path, name: str, after: bool
) -> None:
    lm, facts = load()
    run = {**RUN, "present_until": UNTIL[name]}
    plain = edit_facts(lm, AGENTS[name](lm), facts, **run)
    wanted = lm.snapshot()
    lm, facts = load()
    whole = EditLedger.create(tmp_path / "whole", lm)
    recorded = edit_facts(lm, AGENTS[name](lm), facts, ledger=whole, **run)
    assert (recorded.presentations, recorded.taken) == (plain.presentations, plain.taken)
    assert all(torch.equal(lm.weight(m), w) for m, w in wanted.items())
    steps = len(whole)
    counts = [0] * 7
    for entry in whole.entries():
        assert entry.presented is not None
        for place in entry.presented:
            counts[2 * entry.batch + place] += 1
    assert counts == recorded.presentations and 4 < steps < 16
    assert [e.presentation for e in whole.entries() if e.batch == 0] == list(range(sum(
        e.batch == 0 for e in whole.entries())))
    assert whole.verify(lm) is None
    for at in range(1, steps + 1):
        lm, facts = load()
        breaking = Breaking.create(tmp_path / f"{at}", lm)
        assert isinstance(breaking, Breaking)
        breaking.left, breaking.after = at, after
        with pytest.raises(Interrupted):
            edit_facts(lm, AGENTS[name](lm), facts, ledger=breaking, **run)
        breaking.close()
        lm, facts = load()  # as in a new process
        ledger = EditLedger.resume(tmp_path / f"{at}", lm)
        log = edit_facts(lm, AGENTS[name](lm), facts, ledger=ledger, **run)
        assert len(ledger) == steps
        assert all(torch.equal(lm.weight(m), w) for m, w in wanted.items()), f"killed at {at}"
        assert (log.presentations, log.taken, log.batch_sizes) == (plain.presentations, plain.taken, plain.batch_sizes)
        assert log.update_norms == pytest.approx(recorded.update_norms)
        lm.restore()
        ledger.replay(lm)
        assert all(torch.equal(lm.weight(m), w) for m, w in wanted.items())


def test_ledgers_of_fixed_presentations_say_nothing_of_presented_facts_and_forged_ones_are_found(
    tmp_path: Path,
) -> None:
    lm, facts = load()
    ledger = EditLedger.create(tmp_path / "fixed", lm)
    edit_facts(lm, rledit(lm), facts, ledger=ledger, **{**RUN, "present_until": None})
    assert all(entry.presented is None for entry in ledger.entries())
    lm.restore()
    forged = EditLedger.create(tmp_path / "forged", lm)
    weights = {m: lm.weight(m) for m in lm.module_shapes}
    for shown in ([0, 2], [1, 0], [0, 0]):
        name = forged._write("00000000-", {}, {"entry": json.dumps({
            "index": 0, "kind": "edit", "batch": 0, "presentation": 0, "facts": [3, 4], "norm": 0.0,
            "weights_after": "0" * 64, "random": None, "previous": "", "presented": shown,
        })})  # fmt: skip
        forged.names = [name]
        with pytest.raises(LedgerError, match=r"damaged or forged: it presented .* of 2 facts"):
            forged.read(0)
    assert weights.keys() == lm.module_shapes.keys()


@pytest.mark.parametrize("aggregation", ["mend", "least_squares", "recursive"])
def test_training_counts_the_steps_that_were_taken(aggregation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, facts = load()
    env = LifelongEditEnv(
        facts.kind, lm, data=facts, num_batches=3, batch_size=2, steps_per_batch=4, present_until=2e-3,
        array_backend="torch", reward_gradient=True, reward=RewardConfig(every_step=False),
    )
    network = HypernetworkConfig(rank=4, step_size=3e-2, aggregation=aggregation)
    agent = RLEditAgent(env, RLEditConfig(network=network, prior_batches=3, drift_limit=100.0))
    taken: list[int] = []

    def noting(*arguments: Any) -> Any:
        result = trajectory(*arguments)
        taken.append(len(env.history))
        return result

    monkeypatch.setattr("agents.rledit.trainer.trajectory", noting)
    agent.learn(20, progress_bar=False)
    assert agent.timesteps == sum(taken) >= 20 and sum(taken[:-1]) < 20
    assert all(3 <= steps <= 12 for steps in taken) and min(taken) < 12
