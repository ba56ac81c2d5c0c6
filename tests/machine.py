"""Measures one step of the tests' usual work on this machine, and says whether the slow tests run here.

    python tests/machine.py --limit-ms 90

The step: an environment step on tiny-llama (a batch of two facts, with the reward), one thread, the fastest of fifty.
The exit code is 0 where it takes less than the limit, else 1. `.ci/run` asks it before `make test-slow`.
"""

from __future__ import annotations

import argparse
import sys
import time

import gymnasium as gym
import torch

STEP = "an environment step on tiny-llama"


def step_milliseconds(repeats: int = 50) -> float:
    """The fastest of ``repeats`` environment steps, in milliseconds."""
    torch.set_num_threads(1)
    env = gym.make(
        "rledit_env:RLEdit-ZsRE-v0", model="tiny-llama", num_batches=repeats, batch_size=2, array_backend="torch",
        device="cpu", disable_env_checker=True,
    )  # fmt: skip
    observation, _ = env.reset(seed=0)
    fastest = float("inf")
    for _ in range(repeats):
        values = {m: -0.01 * gradient for m, gradient in observation["value_gradients"].items()}
        started = time.perf_counter()
        observation, *_ = env.step({"keys": observation["keys"], "values": values})
        fastest = min(fastest, time.perf_counter() - started)
    return 1000 * fastest


def main() -> int:
    parser = argparse.ArgumentParser(description=STEP)
    parser.add_argument("--limit-ms", type=float, required=True, help="the slow tests run below this time")
    limit = parser.parse_args().limit_ms
    taken = step_milliseconds()
    what = "are run" if taken < limit else "are left out: this machine is too slow for them (make test-slow runs them)"
    print(f"{STEP} takes {taken:.1f} ms (limit {limit:g} ms): the slow tests {what}", flush=True)
    return 0 if taken < limit else 1


if __name__ == "__main__":
    sys.exit(main())
