"""A recorded editing run, killed at any moment or spoilt by a bad update, ends as it would have ended."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killing import assert_killed_runs_end_alike, die_at, forked
from torch import Tensor

from agents import HypernetworkConfig, RLEditAgent, RLEditConfig, edit_facts
from agents.base import Agent
from agents.running.editing import EditLog
from rledit_env.env import LifelongEditEnv
from rledit_env.evaluation.guard import DriftGuard
from rledit_env.files import MARKER
from rledit_env.knowledge import KnowledgeDataset, load_knowledge
from rledit_env.ledger import EditLedger, LedgerError, weights_hash
from rledit_env.lm.editable import EditableLM

MODULES = "model.layers.[1-2].mlp.{gate,up}_proj"
RUN: dict[str, Any] = {"batch_size": 2, "steps_per_batch": 2, "token": "answer"}


def load() -> tuple[EditableLM, KnowledgeDataset]:
    """Seven facts: three batches of two, and one that is left."""
    facts = load_knowledge("zsre")
    lm = EditableLM.load("tiny-llama", MODULES, dtype="float32", device="cpu")
    return lm, replace(facts, records=facts.records[:7])


def rledit(lm: EditableLM, step_size: float = 3e-2, memory_weight: float = 1.0) -> RLEditAgent:
    network = HypernetworkConfig(rank=4, step_size=step_size, normaliser="stream", aggregation="recursive",
                                 memory_weight=memory_weight)  # fmt: skip
    return RLEditAgent(shapes=lm.module_shapes, config=RLEditConfig(network=network))


class Forgetful(Agent):
    """An agent with a memory that it cannot speak of: its steps shrink as it sees more batches."""

    def __init__(self) -> None:
        self.seen = 0

    def reset(self) -> None:
        self.seen = 0

    def predict(self, observation: Any, deterministic: bool = True) -> tuple[Any, None]:
        self.seen += 1
        values = {m: -0.1 / self.seen * g for m, g in observation["value_gradients"].items()}
        return {"keys": observation["keys"], "values": values}, None

    def learn(self, *_: Any, **__: Any) -> Agent:
        return self

    def save(self, path: str | Path) -> None:
        raise NotImplementedError

    @classmethod
    def load(cls, path: str | Path, env: Any = None) -> Agent:
        raise NotImplementedError


class Dense(Forgetful):
    """The same updates, dense: added in even steps, accumulated in odd ones."""

    def __init__(self, lm: EditableLM) -> None:
        super().__init__()
        self.lm = lm

    def predict(self, observation: Any, deterministic: bool = True) -> tuple[Any, None]:
        action, _ = super().predict(observation)
        dense = {m: action["values"][m].T @ action["keys"][m] for m in action["keys"]}
        if self.seen % 2:
            return {"updates": dense}, None
        return {"accumulated": {m: self.lm.weight(m) - self.lm.original_weight(m) + d for m, d in dense.items()}}, None


class Interrupted(Exception):
    """What stands for a kill within this process."""


class Breaking(EditLedger):
    """A ledger whose process dies at a given append, before or after the entry is on the disk."""

    left = 0
    after = False

    def append(self, *arguments: Any, **named: Any) -> None:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise Interrupted
        super().append(*arguments, **named)
        if self.left == 0:
            raise Interrupted


AGENTS: dict[str, Callable[[EditableLM], Agent]] = {
    "rledit": rledit, "weighted": lambda lm: rledit(lm, memory_weight=50.0), "forgetful": lambda lm: Forgetful(),
    "dense": Dense,
}  # fmt: skip


@pytest.mark.parametrize("name", AGENTS)
def test_recording_a_run_does_not_change_it(tmp_path: Path, name: str) -> None:
    lm, facts = load()
    plain = edit_facts(lm, AGENTS[name](lm), facts, **RUN)
    wanted = lm.snapshot()
    ledger = EditLedger.create(tmp_path / "l", lm)
    recorded = edit_facts(lm, AGENTS[name](lm), facts, ledger=ledger, **RUN)
    assert all(torch.equal(lm.weight(m), w) for m, w in wanted.items())
    assert len(ledger) == 8, "four batches, each presented twice"
    assert (recorded.batch_sizes, recorded.update_norms) == (plain.batch_sizes, plain.update_norms)
    assert ledger.verify(lm) is None
    lm.restore()
    ledger.replay(lm)
    assert all(torch.equal(lm.weight(m), w) for m, w in wanted.items())


@pytest.mark.parametrize("name", AGENTS)
def test_facts_edited_in_two_calls_end_as_in_one(tmp_path: Path, name: str) -> None:
    lm, facts = load()
    plain = edit_facts(lm, AGENTS[name](lm), facts, **RUN)
    wanted = lm.snapshot()
    agent, ledger = AGENTS[name](lm), EditLedger.create(tmp_path / "l", lm)
    log = edit_facts(lm, agent, replace(facts, records=facts.records[:4]), ledger=ledger, **RUN)
    again = edit_facts(lm, agent, facts, ledger=ledger, log=log, **RUN)
    assert again is log and log.batch_sizes == plain.batch_sizes == [2, 2, 2, 1]
    assert log.update_norms == plain.update_norms
    assert all(torch.equal(lm.weight(m), w) for m, w in wanted.items())
    assert [entry.facts for entry in ledger.entries()][-4:] == [(4, 5), (4, 5), (6,), (6,)]
    assert ledger.verify(lm) is None


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", range(1, 9))
@pytest.mark.parametrize("name", AGENTS)
def test_a_run_that_ends_at_any_step_goes_on_to_the_same_weights(
    tmp_path: Path, name: str, at: int, after: bool
) -> None:
    lm, facts = load()
    whole = edit_facts(lm, AGENTS[name](lm), facts, **RUN)
    wanted = lm.snapshot()
    lm.restore()
    breaking = Breaking.create(tmp_path / "l", lm)
    assert isinstance(breaking, Breaking)
    breaking.left, breaking.after = at, after
    with pytest.raises(Interrupted):
        edit_facts(lm, AGENTS[name](lm), facts, ledger=breaking, **RUN)
    breaking.close()

    lm, facts = load()  # as in a new process
    seen: list[int] = []
    ledger = EditLedger.resume(tmp_path / "l", lm)
    assert len(ledger) == at - (not after), "at most the step in flight is lost"
    log = edit_facts(lm, AGENTS[name](lm), facts, ledger=ledger, progress=seen.append, **RUN)
    assert all(torch.equal(lm.weight(m), w) for m, w in wanted.items())
    assert (log.batch_sizes, log.update_norms, log.drift) == (whole.batch_sizes, whole.update_norms, whole.drift)
    assert seen == [2, 2, 2, 1]
    assert ledger.verify(lm) is None and len(ledger) == 8
    ledger.close()


def test_a_finished_run_is_only_replayed(tmp_path: Path) -> None:
    lm, facts = load()
    edit_facts(lm, rledit(lm), facts, ledger=EditLedger.create(tmp_path / "l", lm), **RUN)
    wanted = weights_hash(lm.snapshot())
    lm, facts = load()

    class Watched(RLEditAgent):
        def predict(self, observation: Any, deterministic: bool = True) -> tuple[Any, None]:
            raise AssertionError("every step has been taken")

    agent = Watched(shapes=lm.module_shapes, config=rledit(lm).config)
    (tmp_path / "l" / ".lock").unlink()  # the first ledger of this test is still open
    edit_facts(lm, agent, facts, ledger=EditLedger.resume(tmp_path / "l", lm), **RUN)
    assert weights_hash(lm.snapshot()) == wanted


def test_another_agent_does_not_go_on_with_a_run_that_it_would_not_repeat(tmp_path: Path) -> None:
    lm, facts = load()
    breaking = Breaking.create(tmp_path / "l", lm)
    breaking.left = 5  # type: ignore[attr-defined]
    with pytest.raises(Interrupted):
        edit_facts(lm, Forgetful(), facts, ledger=breaking, **RUN)
    breaking.close()
    ledger = EditLedger.resume(tmp_path / "l", lm)
    other = Forgetful()
    other.reset = lambda: setattr(other, "seen", 3)  # type: ignore[method-assign]
    with pytest.raises(LedgerError, match="does not repeat what"):
        edit_facts(lm, other, facts, ledger=ledger, **RUN)


def test_a_batch_is_undone_and_the_run_goes_on(tmp_path: Path) -> None:
    lm, facts = load()
    breaking = Breaking.create(tmp_path / "l", lm)
    breaking.left = 7  # type: ignore[attr-defined]
    with pytest.raises(Interrupted):
        edit_facts(lm, rledit(lm), facts, ledger=breaking, **RUN)
    breaking.close()
    ledger = EditLedger(tmp_path / "l")
    states = [ledger.weights(lm, count) for count in range(len(ledger) + 1)]
    ledger.lock()
    ledger.undo(lm, 1)
    for m, weight in lm.snapshot().items():
        torch.testing.assert_close(weight, states[-1][m] - (states[4][m] - states[2][m]), rtol=0, atol=1e-6)
    ledger.close()
    ledger = EditLedger.resume(tmp_path / "l", lm)
    log = edit_facts(lm, rledit(lm), facts, ledger=ledger, **RUN)
    assert log.facts == 7
    assert ledger.verify(lm) is None
    with pytest.raises(LedgerError, match="batches were undone"):
        edit_facts(lm, Forgetful(), facts, ledger=ledger, **RUN)


def test_a_damaged_memory_costs_one_step_more(tmp_path: Path) -> None:
    lm, facts = load()
    edit_facts(lm, rledit(lm), facts, **RUN)
    wanted = lm.snapshot()
    breaking = Breaking.create(tmp_path / "l", lm)
    breaking.left = 6  # type: ignore[attr-defined]
    with pytest.raises(Interrupted):
        edit_facts(lm, rledit(lm), facts, ledger=breaking, **RUN)
    breaking.close()
    memories = sorted((tmp_path / "l").glob("memory-*"))
    assert len(memories) == 2
    os.truncate(memories[-1], 100)
    ledger = EditLedger.resume(tmp_path / "l", lm)
    edit_facts(lm, rledit(lm), facts, ledger=ledger, **RUN)
    assert all(torch.equal(lm.weight(m), w) for m, w in wanted.items())


# -- killed processes -------------------------------------------------------------------------------------------------


def edit_and_die(folder: Path) -> str:
    """Edit, or go on editing, in a folder "at N", killed just before the N-th change of its files; a hash of the
    final weights."""
    die_at(folder, int(folder.name.split()[1]))
    lm, facts = load()
    facts = replace(facts, records=facts.records * 2)
    edit_facts(lm, rledit(lm), facts, ledger=EditLedger.resume(folder, lm), **RUN)
    return weights_hash(lm.snapshot())


def test_a_run_killed_at_any_write_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    # From the folder on, through the header, to the second entry; one kill in a later entry, and one near the end.
    moments = [*range(2, 24), 37, 58]
    with forked(__file__, "edit_and_die") as runner:
        left = assert_killed_runs_end_alike(runner, tmp_path, moments)
    for moment in moments:
        ledger = EditLedger(tmp_path / f"at -{moment}")
        assert ledger.verify() is None and len(ledger) == 14
    assert set() in left and {".lock", f".{MARKER}.partial"} in left and {".lock", MARKER} in left
    assert {".lock", MARKER, ".ledger.json.partial"} in left and {".lock", MARKER, "ledger.json"} in left
    assert {".lock", MARKER, "ledger.json", "memory", "00000000"} in left


# -- numerical safety -------------------------------------------------------------------------------------------------


class Bursting(Forgetful):
    """Breaks the LLM at one of its steps."""

    def __init__(self, at: int, with_what: float = 1e30) -> None:
        super().__init__()
        self.at, self.with_what = at, with_what

    def predict(self, observation: Any, deterministic: bool = True) -> tuple[Any, None]:
        action, _ = super().predict(observation)
        if self.seen == self.at:
            action["values"] = {m: self.with_what * torch.ones_like(v) for m, v in action["values"].items()}
        return action, None


def environment(on_divergence: str, reward: str | None = "none", **more: Any) -> LifelongEditEnv:
    lm, facts = load()
    return LifelongEditEnv(
        "zsre", lm, data=facts, num_batches=3, batch_size=2, reward=reward, array_backend="torch",
        on_divergence=on_divergence, **more,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize("reward", ["none", "paper"])
@pytest.mark.parametrize("mode", ["end", "skip", "raise"])
def test_an_update_that_breaks_the_llm_is_taken_back_bit_for_bit(mode: str, reward: str) -> None:
    env = environment(mode, reward)
    observation, _ = env.reset(seed=0)
    agent = Bursting(at=2)
    observation, *_ = env.step(agent.predict(observation)[0])
    before, random_before = env.lm.snapshot(), env.np_random.bit_generator.state
    burst = agent.predict(observation)[0]
    if mode == "raise":
        with pytest.raises(ArithmeticError, match="the update of batch 1 .* broke the LLM"):
            env.step(burst)
        assert env.np_random.bit_generator.state == random_before
    else:
        shown, _, terminated, _, info = env.step(burst)
        assert info["diverged"] and info["batch"] == 1
        assert terminated == (mode == "end")
        assert np.isfinite(info["drift"])
    assert all(torch.equal(env.lm.weight(m), w) for m, w in before.items())
    if mode == "raise":  # another action for the same step
        _, _, terminated, _, info = env.step(agent.predict(observation)[0])
        assert info["batch"] == 1 and not info["diverged"] and not terminated
    elif mode == "skip":
        clean = env.lm.trace(env.episode.edits(), env.token)
        assert all(torch.equal(shown["keys"][m], clean.keys[m]) for m in clean.keys), "seen at the weights put back"
        _, _, terminated, _, info = env.step(agent.predict(shown)[0])
        assert info["batch"] == 2 and not info["diverged"] and terminated


def test_an_action_that_is_not_finite_is_skipped_where_that_is_asked_for() -> None:
    env = environment("skip")
    observation, _ = env.reset(seed=0)
    before = env.lm.snapshot()
    _, _, terminated, _, info = env.step(Bursting(1, float("nan")).predict(observation)[0])
    assert info["diverged"] and not terminated
    assert all(torch.equal(env.lm.weight(m), w) for m, w in before.items())


def test_an_editing_run_skips_a_bad_batch_names_it_and_resumes_the_same(tmp_path: Path) -> None:
    lm, facts = load()
    run = {**RUN, "on_divergence": "skip"}
    with pytest.warns(UserWarning, match=r"the update of batch 1 \(facts 3 to 4\) broke the LLM"):
        log = edit_facts(lm, Bursting(4), facts, **run)
    assert log.skipped == [1] and not log.diverged and log.facts == 7
    wanted = lm.snapshot()
    for at, after in ((4, True), (5, False), (5, True), (7, True)):  # around the update and its taking back
        lm, facts = load()
        folder = tmp_path / f"{at} {after}"
        breaking = Breaking.create(folder, lm)
        breaking.left, breaking.after = at, after  # type: ignore[attr-defined]
        with pytest.raises(Interrupted), pytest.warns(UserWarning, match="broke the LLM") if at == 7 else _nothing():
            edit_facts(lm, Bursting(4), facts, ledger=breaking, **run)
        breaking.close()
        ledger = EditLedger.resume(folder, lm)
        with pytest.warns(UserWarning, match="broke the LLM"):
            log = edit_facts(lm, Bursting(4), facts, ledger=ledger, **run)
        assert log.skipped == [1]
        assert all(torch.equal(lm.weight(m), w) for m, w in wanted.items())
        assert [e.kind for e in ledger.entries()] == ["edit"] * 4 + ["rollback"] + ["edit"] * 4
        assert ledger.verify(lm) is None


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def guarded(bound: float, on_excess: str, tmp_path: Path) -> tuple[EditLog, DriftGuard]:
    lm, facts = load()
    guard = DriftGuard(lm, bound, on_excess, texts=["The kettle is on.", "It rained all day."])  # type: ignore[arg-type]
    return edit_facts(lm, rledit(lm), facts, guard=guard, **RUN), guard


def test_the_guard_stops_or_warns_when_the_llm_drifts_on_held_text(tmp_path: Path) -> None:
    log, guard = guarded(1e6, "stop", tmp_path)
    assert not log.stopped and log.facts == 7
    values = [value for _, value in guard.history]
    assert len(values) == 4 and all(v > 0 for v in values)
    bound = (values[0] + max(values)) / 2  # passed by some batch, not by the first
    first = next(batch for batch, value in guard.history if value > bound)
    log, _ = guarded(bound, "stop", tmp_path)
    assert log.stopped and len(log.batch_sizes) == first + 1
    with pytest.warns(UserWarning, match="nats a token on held text, more than the bound"):
        log, _ = guarded(bound, "warn", tmp_path)
    assert not log.stopped and log.facts == 7


def test_the_guards_measure_is_the_kl_divergence_of_the_whole_models(tmp_path: Path) -> None:
    lm, facts = load()
    guard = DriftGuard(lm, texts=["The kettle is on."])
    assert guard.divergence() == pytest.approx(0, abs=1e-6)
    ids = torch.tensor([lm.tokenizer("The kettle is on.")["input_ids"]])

    def log_probabilities() -> Tensor:
        return lm.model(input_ids=ids).logits[0, :-1].log_softmax(-1)

    before = log_probabilities()
    edit_facts(lm, rledit(lm), facts, **RUN)
    after = log_probabilities()
    wanted = (before.exp() * (before - after)).sum(-1).mean()
    assert guard.divergence() == pytest.approx(float(wanted), rel=1e-4)
