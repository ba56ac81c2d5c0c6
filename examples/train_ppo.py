"""Use a standard RL algorithm: PPO on the low-dimensional wrappers, compared with its baselines.

    python examples/train_ppo.py
    python examples/train_ppo.py --algorithm sac --data path/to/counterfact

All start from the same rule, ridge least squares on the gradient, learn from as many environment steps, and are tested
on the same held-out streams: the zero action (the rule itself), the best constant action found by random search, the
algorithm, and the RLEdit agent, which differentiates the return of the whole stream, before and after learning.
"""

from __future__ import annotations

import copy
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import tyro
from tqdm import tqdm

import rledit_env.own_agents  # noqa: F401 - checks that `agents` is this package
from agents import Agent, RandomSearchAgent, RLEditAgent, StandardAgent, StandardConfig, rledit_ridge
from agents.base import run_stream
from rledit_env import reporting
from rledit_env.files import mark
from rledit_env.knowledge import load_knowledge
from rledit_env.lm.editable import EditableLM
from rledit_env.outputs import growing, try_or_exit


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
    """The algorithm, from Stable-Baselines3."""
    step_size: float = 1.0
    """Step size of the base rule, ridge least squares: the zero action and the untrained RLEdit agent."""
    share: Literal["all", "kind", "module"] = "all"
    """Which modules share a step size and a damping: all, those of a kind, or none."""
    num_batches: int = 5
    """Batches in a stream."""
    batch_size: int = 1
    """Facts in a batch."""
    token: str = "subject"
    """Positions whose keys and value gradients are observed."""
    steps: int = 960
    """Environment steps for training the algorithm, and for the random search."""
    rledit_steps: int = 960
    """Environment steps for training the RLEdit agent; 0 leaves it out."""
    baseline_streams: int = 32
    """Training streams of the algorithm; their rewards are relative to those of the zero action."""
    test_streams: int = 30
    """Held-out streams on which all agents are tested."""
    curve_streams: int = 6
    """Other held-out streams, for the learning curves."""
    out: Path = Path("runs/train_ppo")
    """Folder for report.html with the learning curves, TensorBoard's logs, the agents and returns.json."""
    seed: int = 0
    """Seed of the agents and of the training streams."""


def returns(env: gym.Env[Any, Any], agent: Agent, seeds: range) -> list[float]:
    """The agent's return on the stream of each seed."""
    return [run_stream(env, agent, seed=seed)[0] for seed in tqdm(seeds, leave=False, desc="streams", disable=None)]


def main(args: Args) -> None:  # noqa: PLR0915  one function, to be read from top to bottom
    warnings.filterwarnings("ignore", category=UserWarning, module="gymnasium")
    try_or_exit([growing("--out", args.out, "run of train_ppo", ("random_search/", f"{args.algorithm}/", "rledit/"))])
    args.out.mkdir(parents=True, exist_ok=True)
    mark(args.out, "run of train_ppo")  # so that the next run may overwrite the folder
    started, kind, lm = time.monotonic(), gym.spec(args.env).kwargs["kind"], EditableLM.load(args.model)

    def stream(split: str, **more: Any) -> gym.Env[Any, Any]:
        return gym.make(args.env, model=lm, data=load_knowledge(kind, args.data, split), num_batches=args.num_batches,
                        batch_size=args.batch_size, token=args.token, reward="efficacy", array_backend="torch",
                        disable_env_checker=True, **more)

    env, held_out = stream("train"), stream("eval")
    curve_seeds = range(500, 500 + args.curve_streams)
    curves: dict[str, list[tuple[float, float]]] = {}

    def curve_callback(name: str, tested: Agent, steps: Callable[[], int], total: int) -> Callable[[Any], None]:
        """A callback for `learn` that adds six points to the learning curve in ``total`` steps."""
        points, streams, every = curves.setdefault(name, []), [0], max(1, total // args.num_batches // 6)

        def callback(numbers: dict[str, float]) -> None:
            if streams[0] % every == 0 and args.curve_streams:
                with lm.preserved():  # a training stream may be in progress on the same LLM
                    points.append((steps(), float(np.mean(returns(held_out, tested, curve_seeds)))))
            streams[0] += 1

        callback({})
        return callback

    config = StandardConfig(args.algorithm, step_size=args.step_size, share=args.share,
                            baseline_streams=args.baseline_streams)
    zero = RandomSearchAgent(held_out, config, args.seed)
    random_search = RandomSearchAgent(env, config, args.seed).learn(args.steps)
    random_search.save(args.out / "random_search")
    random_search.set_env(held_out)
    agent, name = StandardAgent(env, config, args.seed), args.algorithm.upper()
    held_out_agent = copy.copy(agent)  # the same policy, in the held-out environment
    held_out_agent.set_env(held_out)
    callback = curve_callback(name, held_out_agent, lambda: agent.timesteps, args.steps)
    agent.learn(args.steps, callback, log_dir=args.out / args.algorithm)
    agent.save(args.out / args.algorithm)
    editors: dict[str, Agent] = {"zero action": zero, "random search": random_search, name: held_out_agent}
    training_steps = {"zero action": 0, "random search": random_search.timesteps, name: agent.timesteps}
    if args.rledit_steps:
        ridge = rledit_ridge(args.step_size, config.damping)
        rledit = RLEditAgent(stream("train", reward_gradient=True), ridge, seed=args.seed)
        editors["RLEdit, untrained"] = RLEditAgent(held_out, ridge, seed=args.seed)
        callback = curve_callback("RLEdit", rledit, lambda: rledit.timesteps, args.rledit_steps)
        rledit.learn(args.rledit_steps, callback, log_dir=args.out / "rledit", resume=False)
        editors["RLEdit"], training_steps["RLEdit"] = rledit, rledit.timesteps
    seeds = range(1000, 1000 + args.test_streams)
    test_returns = {row: returns(held_out, editor, seeds) for row, editor in editors.items()}
    constant = list(editors)[:2] if args.curve_streams else []  # horizontal lines in the learning curves
    levels = {row: float(np.mean(returns(held_out, editors[row], curve_seeds))) for row in constant}
    source = held_out.unwrapped.dataset.source
    print(f"Returns on {args.test_streams} held-out streams; {source}")
    print(reporting.text_table(*reporting.return_table(test_returns, training_steps)))
    if args.rledit_steps:
        above = np.subtract(test_returns["RLEdit"], test_returns[name])
        interval = "{:+.1f} to {:+.1f}".format(*reporting.bootstrap_interval(above))
        print(f"above {name}, stream by stream: RLEdit by {above.mean():+.1f} ({interval})")
    (args.out / "returns.json").write_text(json.dumps(test_returns, indent=1) + "\n")
    lead = (f"{name}, which scales a base rule given {len(agent.model.observation_space.low)} features, and its "
            f"baselines: {lm.name}, {args.num_batches} batches of {args.batch_size} facts a stream.")
    page = reporting.returns_report(lead, test_returns, training_steps, curves, levels, asdict(args), source)
    print(f"report: {page.write(args.out / 'report.html')}\n{(time.monotonic() - started) / 60:.1f} minutes in total")


if __name__ == "__main__":
    main(tyro.cli(Args))
