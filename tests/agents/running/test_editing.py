"""Tests of agents.running.editing: what the log of a stream says of actions of every form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from agents import FTLAgent, FTLConfig, MEMITAgent, MEMITConfig, ValueConfig, edit_facts, edit_stream
from rledit_env.env import LifelongEditEnv


class Constant:
    """Answers every observation with fine-tuning's update, in one of the forms that an action may have."""

    def __init__(self, env: Any, form: str) -> None:
        self.lm, self.form = env.lm, form

    def reset(self) -> None:
        """Nothing is remembered."""

    def predict(self, observation: Any, deterministic: bool = True) -> tuple[Any, None]:
        factors = {"keys": observation["keys"], "values": {m: -g for m, g in observation["value_gradients"].items()}}
        dense = {m: factors["values"][m].T @ factors["keys"][m] for m in factors["keys"]}
        if self.form == "factors":
            return factors, None
        if self.form == "updates":
            return {"updates": dense}, None
        total = {m: self.lm.weight(m) - self.lm.original_weight(m) + d for m, d in dense.items()}
        return {"accumulated": total}, None


@pytest.mark.parametrize("form", ["factors", "updates", "accumulated"])
def test_the_norm_of_an_update_is_that_of_the_change_whatever_the_actions_form(make_env, form):
    env = make_env(array_backend="torch", reward="none", num_batches=2, steps_per_batch=2)
    weights = [env.lm.snapshot()]
    step = env.step

    def watched(action: Any) -> Any:
        result = step(action)
        weights.append(env.lm.snapshot())
        return result

    env.step = watched
    log = edit_stream(env, Constant(env, form), seed=0)
    squares = [
        sum(float((b[m] - a[m]).double().square().sum()) for m in a)
        for a, b in zip(weights, weights[1:], strict=False)
    ]
    assert len(squares) == 4 and min(squares) > 0
    expected = [math.sqrt(sum(squares[:2])), math.sqrt(sum(squares[2:]))]
    assert log.update_norms == pytest.approx(expected, rel=1e-3)
    assert not torch.equal(*[w[next(iter(w))] for w in weights[:2]])


@pytest.mark.parametrize("form", ["updates", "accumulated"])
def test_a_dense_action_that_the_environment_rejects_is_named_while_a_stream_is_edited(make_env, form):
    class Wrong(Constant):
        def predict(self, observation: Any, deterministic: bool = True) -> tuple[Any, None]:
            return {form: {"lm_head": torch.zeros(1, 1)}}, None

    env = make_env(array_backend="torch", reward="none")
    with pytest.raises(ValueError, match="names 'lm_head', which is not edited"):
        edit_stream(env, Wrong(env, form), seed=0)


@pytest.mark.parametrize("agent_class", [FTLAgent, MEMITAgent])
def test_an_editor_that_reads_the_facts_itself_reads_those_of_each_batch_of_a_file(
    agent_class, tiny_lm, facts, tmp_path, monkeypatch
):
    monkeypatch.setenv("RLEDIT_CACHE", str(tmp_path))
    few = facts("counterfact", 3, single=True)
    lm = tiny_lm(modules="model.layers.1.mlp.down_proj")
    env = LifelongEditEnv(few.kind, lm, data=few, num_batches=1, batch_size=1, reward="none", array_backend="torch")
    config = FTLConfig(steps=2)
    if agent_class is MEMITAgent:
        config = MEMITConfig(ValueConfig(steps=2), contexts=1, corpus_tokens=512, recursion=True)
    read = []
    batch = LifelongEditEnv.current_batch

    def watched(self: LifelongEditEnv) -> Any:
        read.append([encoded.record.prompt for encoded in batch(self)])
        return batch(self)

    monkeypatch.setattr(LifelongEditEnv, "current_batch", watched)
    agent = agent_class(env, config)
    log = edit_facts(lm, agent, few, 2, "subject")
    assert read == [[r.prompt for r in few.records[:2]], [few.records[2].prompt]]
    assert log.batch_sizes == [2, 1] and min(log.update_norms) > 0
