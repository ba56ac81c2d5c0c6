"""Several editors edit the same facts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import pytest

from agents import (
    FineTuningAgent,
    FineTuningConfig,
    HypernetworkConfig,
    NoEditAgent,
    RLEditAgent,
    RLEditConfig,
    load_agent,
)
from agents.running.same_stream import NO_EDIT, SameStream
from rledit_env.evaluation.metrics import evaluate
from rledit_env.interface import editing_env
from rledit_env.lm.editable import EditableLM
from rledit_env.self_text import OPENINGS, self_text


@pytest.fixture
def stream(tiny_lm: Callable[..., EditableLM]) -> SameStream:
    lm = tiny_lm("tiny-llama")
    env = gym.make("rledit_env:RLEdit-CounterFact-v0", model=lm, num_batches=2, batch_size=2, reward="none",
                   array_backend="torch", disable_env_checker=True)  # fmt: skip
    return SameStream(env, {"self": self_text(lm, OPENINGS[:2])}, seed=3)


def test_every_editor_starts_from_the_unedited_model_on_the_same_facts(stream: SameStream) -> None:
    stream.edit("larger", FineTuningAgent(stream.env, FineTuningConfig(step_size=50.0)))
    inner = editing_env(stream.env)
    facts = list(inner.edited_records())
    assert facts == stream.facts and len(facts) == 4
    now = evaluate(inner.lm, facts, "counterfact").as_dict()
    assert {key: stream.scores["larger"][key] for key in now} == now
    stream.edit("nothing", NoEditAgent(stream.env))
    for key in ("efficacy", "specificity", "exact_match", "kl"):
        assert stream.scores["nothing"][key] == pytest.approx(stream.scores[NO_EDIT][key], abs=1e-6)
    assert stream.scores["larger"]["kl"] > 0


def test_the_first_editor_is_measured_along_the_stream(stream: SameStream) -> None:
    stream.edit("first", FineTuningAgent(stream.env, FineTuningConfig(step_size=5.0)))
    stream.edit("second", NoEditAgent(stream.env))
    assert stream.retention is not None and stream.retention.edited == (1, 2)
    assert list(stream.general) == [0, 2]
    assert [facts for facts, _ in stream.drifts["first"]] == [0, 2, 4] and stream.drifts["first"][-1][1] > 0
    assert {drift for _, drift in stream.drifts["second"]} == {0.0}


def test_an_editor_that_asks_its_environment_is_asked_in_the_streams(stream: SameStream, tmp_path: Path) -> None:
    """As the agents that ship, whose memory weighs earlier facts more, and which are loaded without an environment."""
    RLEditAgent(stream.env, RLEditConfig(HypernetworkConfig(rank=4, memory_weight=4.0))).save(tmp_path / "agent")
    agent = load_agent(tmp_path / "agent")
    stream.edit("loaded", agent)
    assert stream.drifts["loaded"][-1][1] > 0 and agent.env is None
    own = gym.make("rledit_env:RLEdit-CounterFact-v0", model=editing_env(stream.env).lm, num_batches=1, batch_size=2,
                   array_backend="torch", disable_env_checker=True)  # fmt: skip
    agent.set_env(own)
    stream.edit("again", agent)
    assert agent.env is own and stream.scores["again"]["kl"] == pytest.approx(stream.scores["loaded"]["kl"])


def test_editors_are_compared_fact_by_fact(stream: SameStream) -> None:
    stream.edit("first", FineTuningAgent(stream.env, FineTuningConfig(step_size=50.0)))
    above = stream.above("first", NO_EDIT)
    means = [(s["efficacy"] + s["generalization"] + s["specificity"]) / 3 for s in stream.scores.values()]
    assert len(above) == 4 and sum(above) / 4 == pytest.approx(means[1] - means[0])
