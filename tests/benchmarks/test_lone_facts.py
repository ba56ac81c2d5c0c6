"""The table of single facts: what each of its modes edits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from agents import HypernetworkConfig, RLEditAgent, RLEditConfig

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import lone_facts


@pytest.fixture(params=[1.0, 5.0], ids=["equal", "earlier count for more"])
def folder(request: pytest.FixtureRequest, tiny_lm: Any, make_env: Any, tmp_path: Path) -> Path:
    """A saved agent with moments."""
    lm = tiny_lm(modules="model.layers.2.mlp.{gate,up}_proj")
    env = make_env("counterfact", model=lm, batch_size=4, array_backend="torch", token="subject", reward="none")
    network = HypernetworkConfig(rank=2, blocks=0, prior=0.0, step_size=1e-2, memory_weight=request.param)
    agent = RLEditAgent(env, RLEditConfig(network=network, prior_batches=2))
    agent.gather_moments(env, progress_bar=False)
    agent.save(tmp_path / "agent")
    return tmp_path / "agent"


def edited(folder: Path, **more: Any) -> list[dict[str, Any]]:
    settings = {"agent": str(folder), "facts": 3, "dtype": "float32", **more}
    return lone_facts.edit(lone_facts.Args(**settings))


def test_facts_are_edited_alone_in_batches_or_in_a_stream(folder: Path) -> None:
    alone, together, stream = edited(folder), edited(folder, batch_size=3), edited(folder, stream=True)
    assert [len(results) for results in (alone, together, stream)] == [3, 3, 3]
    assert len({one["drift"] for one in together}) == 1 and all(one["kl"] > 0 for one in together)
    assert stream[0]["drift"] == pytest.approx(alone[0]["drift"], rel=1e-3)
    assert stream[2]["drift"] > 1.2 * alone[2]["drift"]  # the weights hold three facts, not one
    assert edited(folder, facts=1)[0]["drift"] == pytest.approx(alone[0]["drift"], rel=1e-3)


def test_the_sum_is_printed_and_every_fact_written(folder: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "facts.json"
    lone_facts.main(lone_facts.Args(agent=str(folder), facts=2, dtype="float32", stream=True, out=out))
    shown = capsys.readouterr().out
    assert "0 of 2 took, 0 exact matches; drift " in shown and "fact 2: did not take, update " in shown
    assert shown.count("wanted ") == 2 and out.read_text(encoding="utf-8").count('"took": false') == 2


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.data
def test_48_of_50_single_facts_take_with_the_shipped_agent() -> None:
    data = Path(__file__).parents[3] / "shared" / "data" / "counterfact_eval.jsonl"
    if not data.exists():
        pytest.skip("the published data (../shared/data) is not beside the project")
    results = lone_facts.edit(lone_facts.Args(data=str(data)))
    assert len(results) == 50 and sum(one["took"] for one in results) >= 48
