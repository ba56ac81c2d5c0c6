"""Plug in a standard RL algorithm: PPO on the low-dimensional view, beside what it has to beat.

    python examples/train_ppo.py
    python examples/train_ppo.py --algorithm sac --data path/to/counterfact

Everybody begins with the same rule, ridge least squares on the gradient, learns from as many environment steps, and is
tested on the same held-out streams: the zero action (the rule as it is), the best constant action that a random search
finds, the algorithm, and the RLEdit agent, which differentiates the whole stream's return, before and after learning.
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

import rledit_env.own_agents  # noqa: F401 - says so where another package is called agents
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
    """Of Stable-Baselines3."""
    step_size: float = 1.0
    """Of the base rule, ridge least squares, which the zero action and the untrained RLEdit agent are."""
    share: Literal["all", "kind", "module"] = "all"
    """Modules that share a step size and a damping: all, those of one kind, or none."""
    num_batches: int = 5
    """Batches in a stream."""
    batch_size: int = 1
    """Facts in a batch."""
    token: str = "subject"
    """Positions whose keys and value gradients everybody sees."""
    steps: int = 960
    """Environment steps to learn from, for the algorithm and for the random search."""
    rledit_steps: int = 960
    """Environment steps for the RLEdit agent to learn from; 0 leaves it out."""
    baseline_streams: int = 32
    """Training streams of the algorithm, whose rewards are relative to the zero action's."""
    test_streams: int = 30
    """Held-out streams that everybody is tested on."""
    curve_streams: int = 6
    """Other held-out streams that the learning curves are measured on."""
    out: Path = Path("runs/train_ppo")
    """Folder of report.html with the learning curves, TensorBoard's logs, the agents and returns.json."""
    seed: int = 0
    """Of the agents and of all streams."""


def returns(env: gym.Env[Any, Any], agent: Agent, seeds: range) -> list[float]:
    """One return a seed."""
    return [run_stream(env, agent, seed=seed)[0] for seed in tqdm(seeds, leave=False, desc="streams", disable=None)]


def main(args: Args) -> None:  # noqa: PLR0915  an example is read from top to bottom
    warnings.filterwarnings("ignore", category=UserWarning, module="gymnasium")
    try_or_exit([growing("--out", args.out, "run of train_ppo", ("random_search/", f"{args.algorithm}/", "rledit/"))])
    args.out.mkdir(parents=True, exist_ok=True)
    mark(args.out, "run of train_ppo")  # so that the next run knows its folder
    started, kind = time.monotonic(), gym.spec(args.env).kwargs["kind"]
    lm = EditableLM.load(args.model)

    def stream(split: str, **more: Any) -> gym.Env[Any, Any]:
        return gym.make(args.env, model=lm, data=load_knowledge(kind, args.data, split), num_batches=args.num_batches,
                        batch_size=args.batch_size, token=args.token, reward="efficacy", array_backend="torch",
                        disable_env_checker=True, **more)

    env, held_out = stream("train"), stream("eval")
    on_curve = range(500, 500 + args.curve_streams)
    curves: dict[str, list[tuple[float, float]]] = {}

    def measured(name: str, on_held_out: Agent, steps: Callable[[], int], total: int) -> Callable[[Any], None]:
        """A callback that puts a point on the learning curve six times in so many steps."""
        points, streams, every = curves.setdefault(name, []), [0], max(1, total // args.num_batches // 6)

        def callback(numbers: dict[str, float]) -> None:
            if streams[0] % every == 0 and args.curve_streams:
                with lm.preserved():  # the next training stream may be under way on the same LLM
                    points.append((steps(), float(np.mean(returns(held_out, on_held_out, on_curve)))))
            streams[0] += 1

        callback({})
        return callback

    config = StandardConfig(args.algorithm, step_size=args.step_size, share=args.share,
                            baseline_streams=args.baseline_streams)
    zero = RandomSearchAgent(held_out, config, args.seed)
    found = RandomSearchAgent(env, config, args.seed).learn(args.steps)
    found.save(args.out / "random_search")
    found.set_env(held_out)
    agent, name = StandardAgent(env, config, args.seed), args.algorithm.upper()
    looking_on = copy.copy(agent)  # the same policy, in the environment that the curve is measured in
    looking_on.set_env(held_out)
    watch = measured(name, looking_on, lambda: agent.timesteps, args.steps)
    agent.learn(args.steps, watch, log_dir=args.out / args.algorithm)
    agent.save(args.out / args.algorithm)
    everybody: dict[str, Agent] = {"zero action": zero, "random search": found, name: looking_on}
    learned_from = {"zero action": 0, "random search": found.timesteps, name: agent.timesteps}
    if args.rledit_steps:
        ridge = rledit_ridge(args.step_size, config.damping)
        rledit = RLEditAgent(stream("train", reward_gradient=True), ridge, seed=args.seed)
        everybody["RLEdit, untrained"] = RLEditAgent(held_out, ridge, seed=args.seed)
        watch = measured("RLEdit", rledit, lambda: rledit.timesteps, args.rledit_steps)
        rledit.learn(args.rledit_steps, watch, log_dir=args.out / "rledit", resume=False)
        everybody["RLEdit"], learned_from["RLEdit"] = rledit, rledit.timesteps
    tested = {who: returns(held_out, one, range(1000, 1000 + args.test_streams)) for who, one in everybody.items()}
    flat = list(tested)[:2] if args.curve_streams else []
    levels = {who: float(np.mean(returns(held_out, everybody[who], on_curve))) for who in flat}
    source = held_out.unwrapped.dataset.source
    print(f"Returns on {args.test_streams} held-out streams; {source}")
    print(reporting.text_table(*reporting.return_table(tested, learned_from)))
    if args.rledit_steps:
        above = np.subtract(tested["RLEdit"], tested[name])
        interval = "{:+.1f} to {:+.1f}".format(*reporting.bootstrap_interval(above))
        print(f"above {name}, stream by stream: RLEdit by {above.mean():+.1f} ({interval})")
    (args.out / "returns.json").write_text(json.dumps(tested, indent=1) + "\n")
    lead = (f"{name}, which scales a base rule by what {len(agent.model.observation_space.low)} features say, beside "
            f"what it has to beat: {lm.name}, {args.num_batches} batches of {args.batch_size} facts a stream.")
    page = reporting.returns_report(lead, tested, learned_from, curves, levels, asdict(args), source)
    print(f"report: {page.write(args.out / 'report.html')}\n{(time.monotonic() - started) / 60:.1f} minutes in all")


if __name__ == "__main__":
    main(tyro.cli(Args))
