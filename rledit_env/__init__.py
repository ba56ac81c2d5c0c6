"""Lifelong knowledge editing of language models as a Gymnasium environment."""

from __future__ import annotations

import gymnasium as gym

__version__ = "0.1.0"

for _name, _kind in (("ZsRE", "zsre"), ("CounterFact", "counterfact"), ("FEVER", "fever")):
    gym.register(
        id=f"RLEdit-{_name}-v0",
        entry_point="rledit_env.env:LifelongEditEnv",
        vector_entry_point="rledit_env.vector:LifelongEditVectorEnv",
        kwargs={"kind": _kind},
        # The environment checks actions itself; Gymnasium's checker knows NumPy only and would warn of every tensor.
        disable_env_checker=True,
    )
