"""Environment steps a second, and memory, of many streams: one vectorised environment beside separate ones.

    python benchmarks/vector.py
    python benchmarks/vector.py --streams 8 --batch-sizes 2 --reward efficacy

The other side is `gymnasium.vector.SyncVectorEnv` of separate environments, each with an LLM of its own, which is what
`gym.make_vec(..., vectorization_mode="sync")` makes. Both sides edit the same facts by plain fine-tuning, whole
episodes in turn in one process, so that what disturbs the machine disturbs both; every episode has other facts, and its
reset is part of its time. Medians count. Memory is the peak of a process of its own.
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
    """Times the vectorised environment beside separate ones."""

    env: str = "RLEdit-ZsRE-v0"
    """The environment's id."""
    model: str = "smollm2-135m"
    """Registry name, hub id or folder of the model."""
    streams: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers of streams."""
    batch_sizes: tuple[int, ...] = (2, 20)
    """Facts in a batch."""
    num_batches: int = 5
    """Batches in an episode, one step each."""
    reward: str = "paper"
    """The environment's reward: "paper", "efficacy" or "none"."""
    reward_gradient: bool = False
    """Have the reward's gradient computed, too."""
    repeats: int = 3
    """Timed episodes of each side."""
    threads: int = 2
    """torch's threads."""
    memory: bool = True
    """Measure memory, too."""
    out: Path = Path("runs/vector")
    """Folder of vector.json."""
    peak_of: Literal["", "separate", "vectorised"] = ""
    """Only print the memory of one side, in bytes; used to measure it."""


SIDES = {"separate": "sync", "vectorised": "vector_entry_point"}  # → Gymnasium's vectorization_mode


def made(args: Args, side: str, streams: int, batch_size: int) -> VectorEnv[Any, Any, Any]:
    """One side's environment, in the NumPy backend, which `SyncVectorEnv` needs."""
    return gym.make_vec(
        args.env, num_envs=streams, vectorization_mode=SIDES[side], model=args.model, num_batches=args.num_batches,
        batch_size=batch_size, reward=args.reward, reward_gradient=args.reward_gradient,
    )  # fmt: skip


def episode(env: VectorEnv[Any, Any, Any], steps: int, seed: int) -> tuple[float, np.ndarray]:
    """Seconds of an episode of plain fine-tuning, reset included, and its rewards (steps, streams)."""
    rewards = []
    started = time.perf_counter()
    observation, _ = env.reset(seed=seed)
    for _ in range(steps):
        values = {m: -1e-3 * g for m, g in observation["value_gradients"].items()}
        observation, reward, *_ = env.step({"keys": observation["keys"], "values": values})
        rewards.append(reward)
    return time.perf_counter() - started, np.stack(rewards)


def timed(args: Args, streams: int, batch_size: int) -> dict[str, Any]:
    """Both sides' steps a second, and how far their rewards are apart."""
    envs = {side: made(args, side, streams, batch_size) for side in SIDES}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    deviation = 0.0
    for repeat in range(args.repeats + 1):
        rewards = {}
        for side, env in envs.items():
            # The first, a warm-up, is short: only what is allocated or compiled once has to happen.
            steps = args.num_batches if repeat else 1
            spent, rewards[side] = episode(env, steps, seed=1000 * repeat)
            if repeat:
                seconds[side].append(spent)
        first, second = rewards.values()
        deviation = max(deviation, float((np.abs(first - second) / np.maximum(np.abs(first), 1e-9)).max()))
    for env in envs.values():
        env.close()
    rate = {side: streams * args.num_batches / statistics.median(times) for side, times in seconds.items()}
    ratios = [a / b for a, b in zip(seconds["separate"], seconds["vectorised"], strict=True)]
    return {
        "separate, steps a second": rate["separate"],
        "vectorised, steps a second": rate["vectorised"],
        "ratio": statistics.median(ratios),
        "greatest relative deviation of a reward": deviation,
    }


def memory(args: Args, streams: int, batch_size: int) -> dict[str, float]:
    """Peak memory of each side in MiB, in processes of their own."""
    peaks = {}
    for side in SIDES:
        command = [
            sys.executable, __file__, "--peak-of", side, "--streams", str(streams), "--batch-sizes", str(batch_size),
            "--env", args.env, "--model", args.model, "--reward", args.reward, "--num-batches", "1", "--threads",
            str(args.threads), "--reward-gradient" if args.reward_gradient else "--no-reward-gradient",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[f"{side}, MiB"] = int(done.stdout.splitlines()[-1]) / 2**20
    return peaks


def peak(args: Args) -> int:
    """The greatest resident memory of this process, in bytes, after one episode of one side."""
    env = made(args, args.peak_of, args.streams[0], args.batch_sizes[0])
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
        for streams in args.streams:
            row: dict[str, Any] = {"batch size": batch_size, "streams": streams, **timed(args, streams, batch_size)}
            if args.memory:
                row |= memory(args, streams, batch_size)
            rows.append(row)
            print(json.dumps(row), flush=True)
    columns = list(rows[0])
    print(text_table(columns, [[f"{row[c]:.3g}" if isinstance(row[c], float) else str(row[c]) for c in columns]
                               for row in rows]))
    settings = json.loads(json.dumps(asdict(args), default=str))
    whole = {"settings": settings, "versions": versions(), "rows": rows}
    write_text(args.out / "vector.json", json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    print(f"written: {args.out / 'vector.json'}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
