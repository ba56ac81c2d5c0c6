"""A single edit of the default model takes with every locate-then-edit editor."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import pytest
import torch

import rledit_env  # noqa: F401  (registers the environments)
from agents import (
    AlphaEditAgent,
    AlphaEditConfig,
    MEMITAgent,
    MEMITConfig,
    PRUNEAgent,
    PRUNEConfig,
    RECTAgent,
    RECTConfig,
    ROMEAgent,
    ROMEConfig,
)
from agents.locate_then_edit.locate import LocateAgent

pytestmark = pytest.mark.real

FACT = {
    "prompt": "The mother tongue of Danielle Darrieux is",
    "target_new": "English",
    "subject": "Danielle Darrieux",
    "ground_truth": "French",
    "rephrase_prompt": "Where Danielle Darrieux is from, people speak",
    "locality_prompt": "The mother tongue of Léon Blum is",
    "locality_ground_truth": "French",
}
# An eighth of the default text for C, which the model writes in an eighth of the time.
TEXT: dict[str, Any] = {"corpus_tokens": 8192}
# λ for this model: at the published 15,000 a single edit is written to about 40 % (k'C⁻¹k is 3,000 to 4,500 here).
SMALL: dict[str, Any] = {"covariance_weight": 300.0, **TEXT}


@pytest.mark.parametrize(
    ("editor", "config"),
    [
        (ROMEAgent, ROMEConfig(**TEXT)),
        (MEMITAgent, MEMITConfig(**SMALL)),
        (MEMITAgent, MEMITConfig(recursion=True, **SMALL)),
        (PRUNEAgent, PRUNEConfig(**SMALL)),
        (RECTAgent, RECTConfig(**SMALL)),
        (AlphaEditAgent, AlphaEditConfig(**TEXT)),
    ],
    ids=["rome", "memit", "memit+recursion", "prune", "rect", "alphaedit"],
)
def test_a_single_edit_of_the_default_model_takes(editor: type[LocateAgent], config: Any) -> None:
    layers = "8" if editor is ROMEAgent else "[4-8]"
    env = gym.make(
        "rledit_env:RLEdit-CounterFact-v0", data=[FACT], num_batches=1, batch_size=1, reward="none",
        array_backend="torch", edit_modules=f"model.layers.{layers}.mlp.down_proj", token="subject",
    )  # fmt: skip
    agent = editor(env, config)
    observation, _ = env.reset(seed=0)
    inner: Any = env.unwrapped
    assert inner.lm.generate([FACT["prompt"]], extra=1)[0].strip() == "French"
    with torch.no_grad():
        action, _ = agent.predict(observation)
    env.step(action)
    metrics = inner.evaluate(generate=True)
    assert metrics.top1 == 100 and metrics.efficacy == 100 and metrics.taken == (True,)
