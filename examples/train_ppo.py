"""Plug in a standard RL algorithm: PPO on the low-dimensional view, beside what it has to beat.

    python examples/train_ppo.py
    python examples/train_ppo.py --algorithm sac --model tiny-llama --steps 16 --test-streams 2

Everybody is tested on the same held-out streams: the zero action (the base rule as it is), the best of random constant
actions found with as many environment steps, the algorithm, and the RLEdit agent, which sees ∂r/∂W as well.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import tyro
from tqdm import tqdm

from agents import RLEditAgent, StandardAgent, StandardConfig
from agents.base import run_stream
from rledit_env.knowledge import load_knowledge
from rledit_env.lm.editable import EditableLM


@dataclass(frozen=True)
class Args:
    """Trains a standard algorithm to edit and compares its returns."""

    env: str = "RLEdit-CounterFact-v0"
    """The environment."""
    model: str = "smollm2-135m"
    """Registry name, hub id or folder of the model to edit."""
    data: str = "bundled"
    """A file, a folder, a hub id, or "bundled", the sample that ships with the package."""
    algorithm: Literal["ppo", "a2c", "sac", "td3"] = "ppo"
    """Of Stable-Baselines3."""
    rule: Literal["gradient", "least_squares"] = "least_squares"
    """The base rule whose step size and damping the actions scale."""
    step_size: float = 0.01
    """Of the base rule."""
    num_batches: int = 5
    """Batches in a stream."""
    batch_size: int = 4
    """Facts in a batch."""
    token: str = "subject"
    """Positions whose keys and value gradients everybody sees."""
    steps: int = 512
    """Environment steps to learn from, for the algorithm and for the random search."""
    rledit_steps: int = 100
    """Environment steps for the RLEdit agent; 0 leaves it out."""
    test_streams: int = 20
    """Held-out streams that everybody is tested on."""
    out: Path = Path("runs/train_ppo")
    """Folder of TensorBoard's logs, the agents and returns.json."""
    seed: int = 0
    """Of the agents and of all streams."""


def returns(env: gym.Env[Any, Any], policy: Any, seeds: range) -> list[float]:
    """One return a seed."""
    return [run_stream(env, policy, seed=seed)[0] for seed in tqdm(seeds, leave=False, desc="streams")]


class Constant:
    """The same action at every step: the base rule with one step size and damping a module."""

    def __init__(self, agent: StandardAgent, action: np.ndarray) -> None:
        self.agent, self.action = agent, action

    def reset(self) -> None:
        """Nothing is remembered."""

    def predict(self, observation: Any, deterministic: bool = True) -> tuple[Any, None]:
        return self.agent.scaled.factors(observation, self.action), None


def random_search(env: gym.Env[Any, Any], agent: StandardAgent, args: Args) -> np.ndarray:
    """The best of as many random constant actions as the steps allow, tried on four streams each."""
    rng = np.random.default_rng(args.seed)
    streams = min(4, max(1, args.steps // args.num_batches))
    actions = [rng.uniform(-1, 1, agent.scaled.action_space.shape).astype(np.float32)
               for _ in range(max(1, args.steps // args.num_batches // streams))]  # fmt: skip
    tried = [np.mean(returns(env, Constant(agent, a), range(streams))) for a in tqdm(actions, desc="random search")]
    return actions[int(np.argmax(tried))]


def bootstrap(differences: np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    """95 % interval of the mean of paired differences."""
    drawn = np.random.default_rng(0).choice(differences, (draws, len(differences))).mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def main(args: Args) -> None:
    lm = EditableLM.load(args.model)
    kind = gym.spec(args.env).kwargs["kind"]

    def stream(split: str, **more: Any) -> gym.Env[Any, Any]:
        return gym.make(
            args.env, model=lm, data=load_knowledge(kind, args.data, split), num_batches=args.num_batches,
            batch_size=args.batch_size, token=args.token, reward="efficacy", array_backend="torch",
            disable_env_checker=True, **more,
        )  # fmt: skip

    env, held_out = stream("train"), stream("eval")
    config = StandardConfig(args.algorithm, args.rule, args.step_size)
    if args.steps < 128:  # a trial run
        few = {"n_steps": 8, "batch_size": 8} if args.algorithm == "ppo" else {}
        config = replace(config, hyperparameters=few)
    agent = StandardAgent(env, config, args.seed)
    on_test, zero = agent.on(held_out), np.zeros(agent.scaled.action_space.shape, np.float32)
    found = random_search(env, agent, args)
    agent.learn(args.steps, log_dir=args.out)
    agent.save(args.out / args.algorithm)
    everybody: dict[str, Any] = {
        "zero action": Constant(on_test, zero),
        "random search": Constant(on_test, found),
        args.algorithm.upper(): on_test,
    }
    if args.rledit_steps:
        rledit = RLEditAgent(stream("train", reward_gradient=True), seed=args.seed)
        rledit.learn(args.rledit_steps, log_dir=args.out / "rledit")
        everybody["RLEdit"] = rledit
    tested = {name: returns(held_out, one, range(1000, 1000 + args.test_streams)) for name, one in everybody.items()}
    for name, values in tested.items():
        above = np.subtract(values, tested["zero action"])
        low, high = bootstrap(above)
        print(f"{name:<14} mean return {np.mean(values):8.2f}, {above.mean():+7.2f} beside the zero action "
              f"(95 % interval {low:+.2f} to {high:+.2f})")
    (args.out / "returns.json").write_text(json.dumps(tested, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
