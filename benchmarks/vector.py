"""Compares steps per second and memory of a vector environment with those of separate environments.

    python benchmarks/vector.py
    python benchmarks/vector.py --num-envs 8 --batch-sizes 2 --reward efficacy

The separate environments, each with its own LLM, are those of a `gymnasium.vector.SyncVectorEnv`, which
`gym.make_vec(..., vectorization_mode="sync")` makes. Both sides edit the same facts by plain fine-tuning. They run
episodes in turn in one process, so that disturbances of the machine affect both. Every episode has other facts, and
its reset is timed, too. Medians are reported. Memory is the peak of a separate process for each side.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.vector import VectorEnv

import rledit_env  # noqa: F401  (registers the environments)
from rledit_env.files import write_text
from rledit_env.reporting import text_table, versions


@dataclass(frozen=True)
class Args:
    """Compares a vector environment with separate environments."""

    env: str = "RLEdit-ZsRE-v0"
    """The environment's id."""
    model: str = "smollm2-135m"
    """Registry name, hub id or folder of the model."""
    num_envs: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers of environments."""
    batch_sizes: tuple[int, ...] = (2, 20)
    """Facts in a batch."""
    num_batches: int = 5
    """Batches in an episode, one step each."""
    reward: str = "paper"
    """The environment's reward: "paper", "efficacy" or "none"."""
    reward_gradient: bool = False
    """Also compute the gradient of the reward."""
    repeats: int = 3
    """Timed episodes of each side."""
    threads: int = 2
    """Number of torch's threads."""
    memory: bool = True
    """Also measure memory."""
    out: Path = Path("runs/vector")
    """Folder for vector.json."""
    peak_of: Literal["", "separate", "vectorised"] = ""
    """Only print the peak memory of one side, in bytes; used internally."""


SIDES = {"separate": "sync", "vectorised": "vector_entry_point"}  # → Gymnasium's vectorization_mode


def make_env(args: Args, side: str, num_envs: int, batch_size: int) -> VectorEnv[Any, Any, Any]:
    """The environment of one side, with the NumPy backend, which `SyncVectorEnv` needs."""
    return gym.make_vec(
        args.env, num_envs=num_envs, vectorization_mode=SIDES[side], model=args.model, num_batches=args.num_batches,
        batch_size=batch_size, reward=args.reward, reward_gradient=args.reward_gradient,
    )  # fmt: skip


def episode(env: VectorEnv[Any, Any, Any], steps: int, seed: int) -> tuple[float, np.ndarray]:
    """Seconds of an episode of plain fine-tuning, including the reset, and its rewards (steps, num_envs)."""
    rewards = []
    started = time.perf_counter()
    observation, _ = env.reset(seed=seed)
    for _ in range(steps):
        values = {m: -1e-3 * g for m, g in observation["value_gradients"].items()}
        observation, reward, *_ = env.step({"keys": observation["keys"], "values": values})
        rewards.append(reward)
    return time.perf_counter() - started, np.stack(rewards)


def timed(args: Args, num_envs: int, batch_size: int) -> dict[str, Any]:
    """The steps per second of both sides, and the greatest relative deviation between their rewards."""
    envs = {side: make_env(args, side, num_envs, batch_size) for side in SIDES}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    deviation = 0.0
    for repeat in range(args.repeats + 1):
        rewards = {}
        for side, env in envs.items():
            # The first episode is a warm-up of one step, for allocations and compilations that happen once.
            steps = args.num_batches if repeat else 1
            episode_seconds, rewards[side] = episode(env, steps, seed=1000 * repeat)
            if repeat:
                seconds[side].append(episode_seconds)
        first, second = rewards.values()
        deviation = max(deviation, float((np.abs(first - second) / np.maximum(np.abs(first), 1e-9)).max()))
    for env in envs.values():
        env.close()
    rate = {side: num_envs * args.num_batches / statistics.median(times) for side, times in seconds.items()}
    ratios = [a / b for a, b in zip(seconds["separate"], seconds["vectorised"], strict=True)]
    return {
        "separate, steps a second": rate["separate"],
        "vectorised, steps a second": rate["vectorised"],
        "ratio": statistics.median(ratios),
        "greatest relative deviation of a reward": deviation,
    }


def memory(args: Args, num_envs: int, batch_size: int) -> dict[str, float]:
    """Peak memory of each side in MiB, each in its own process."""
    peaks = {}
    for side in SIDES:
        command = [
            sys.executable, __file__, "--peak-of", side, "--num-envs", str(num_envs), "--batch-sizes", str(batch_size),
            "--env", args.env, "--model", args.model, "--reward", args.reward, "--num-batches", "1", "--threads",
            str(args.threads), "--reward-gradient" if args.reward_gradient else "--no-reward-gradient",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[f"{side}, MiB"] = int(done.stdout.splitlines()[-1]) / 2**20
    return peaks


def peak(args: Args) -> int:
    """Peak resident memory of this process in bytes, after one episode of one side."""
    env = make_env(args, args.peak_of, args.num_envs[0], args.batch_sizes[0])
    episode(env, args.num_batches, seed=0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    if args.peak_of:
        print(peak(args))
        return
    rows: list[dict[str, Any]] = []
    for batch_size in args.batch_sizes:
        for num_envs in args.num_envs:
            row: dict[str, Any] = {"batch size": batch_size, "environments": num_envs}
            row |= timed(args, num_envs, batch_size)
            if args.memory:
                row |= memory(args, num_envs, batch_size)
            rows.append(row)
            print(json.dumps(row), flush=True)
    columns = list(rows[0])
    print(text_table(columns, [[f"{row[c]:.3g}" if isinstance(row[c], float) else str(row[c]) for c in columns]
                               for row in rows]))
    settings = json.loads(json.dumps(asdict(args), default=str))
    content = {"settings": settings, "versions": versions(), "rows": rows}
    write_text(args.out / "vector.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    print(f"written: {args.out / 'vector.json'}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
