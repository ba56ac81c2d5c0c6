"""Computes the cost of data-parallel training of large models from their architectures: the memory of a process, the
bytes sent between processes, and the expected efficiency.

    python benchmarks/scaling.py > benchmarks/SCALING.md

Shapes and parameter counts are those of transformers' models, built on the meta device; sizes of the hypernetwork are
counted by the agent's own code. The speeds of the machines are assumptions, listed in the output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

import rledit_env.own_agents  # noqa: F401 - checks that `agents` is this package
from agents.rledit.config import HypernetworkConfig
from agents.rledit.hypernetwork import Hypernetwork
from rledit_env.knowledge import load_knowledge
from rledit_env.lm.loading.registry import default_edit_modules
from rledit_env.lm.names import expand_globs

GIB = 2**30
# Published configurations, limited to the fields that determine sizes.
MODELS: dict[str, PretrainedConfig] = {
    "Llama 3.1 8B": LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                                num_key_value_heads=8, vocab_size=128256),
    "Qwen 2.5 32B": Qwen2Config(hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40,
                                num_key_value_heads=8, vocab_size=152064),
    "Llama 3.1 70B": LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                                 num_attention_heads=64, num_key_value_heads=8, vocab_size=128256),
}


@dataclass(frozen=True)
class Training:
    """A training run and its machines."""

    batches: int = 20
    batch_size: int = 20
    steps_per_batch: int = 5
    rows: int = 20
    """Observed positions of a batch; with token="subject", one per fact."""
    passage_tokens: int = 24
    """Tokens of a prompt with its answer."""
    scored_batches: int = 2
    """Batches scored in a reward: the current one and one sampled earlier one."""
    scored_passages: int = 3
    """Scored passages of a fact: the edit, a paraphrase, an unrelated pair."""
    flops: float = 4e14
    """Sustained FLOP/s of all devices of a process together, bfloat16."""
    bandwidth: float = 25e9
    """Bytes per second between two processes, in each direction."""
    latency: float = 50e-6
    """Minimum seconds of a message in the ring."""

    @property
    def spread(self) -> float:
        """Standard deviation of a trajectory's time divided by the mean.

        It is estimated from the text lengths of the bundled CounterFact facts. For independent facts it falls with the
        square root of their number.
        """
        records = load_knowledge("counterfact").records
        length = [len(f"{r.prompt} {r.target}{r.paraphrases[0]}{r.unrelated[0].prompt}") for r in records]
        return float(np.std(length) / np.mean(length)) / math.sqrt(self.batches * self.batch_size)


def module_shapes(config: PretrainedConfig) -> tuple[int, dict[str, tuple[int, int]]]:
    """The model's number of parameters and the shapes (d_in, d_out) of its default modules, without allocating it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    names = expand_globs(default_edit_modules("a model", model), list(linear))
    shapes = {n: (int(linear[n].in_features), int(linear[n].out_features)) for n in names}
    return sum(p.numel() for p in model.parameters()), shapes


def memory(parameters: int, shapes: Mapping[str, tuple[int, int]], network: HypernetworkConfig, t: Training) -> dict[
    str, float
]:
    """Memory of a process in bytes, by purpose."""
    edited = sum(d_in * d_out for d_in, d_out in shapes.values())
    square = sum(d_in**2 for d_in, _ in shapes.values())
    policy = Hypernetwork.parameter_count(shapes, network)
    steps = t.batches * t.steps_per_batch
    factors = sum(t.rows * (d_in + d_out) for d_in, d_out in shapes.values())
    return {
        "frozen weights, bfloat16": 2.0 * parameters,
        "edited weights: float32 W and W₀, bfloat16 W₀": 10.0 * edited,
        "gradient of the reward, float32": 4.0 * edited,
        "recursion: S⁻¹, its start, C": 12.0 * square,
        "policy, its gradient and Adam's moments": 16.0 * policy,
        "a trajectory's inputs, factors and cotangents": 3 * 4.0 * steps * factors,
        "caches of states (their bounds)": 2.0 * GIB,
    }


def step_flops(parameters: int, t: Training) -> float:
    """FLOP of an environment step with P parameters: 4 P per traced token, 6 P per scored token.

    A trace has a forward pass and a backward pass for the inputs; a reward also needs the gradients of the weights.
    """
    trace = t.batch_size * t.passage_tokens
    scored = t.scored_batches * t.batch_size * t.scored_passages * t.passage_tokens / t.steps_per_batch
    return 4.0 * parameters * trace + 6.0 * parameters * scored


def efficiency(processes: int, trajectory: float, gradient_bytes: float, t: Training) -> float:
    """Share of the processes' time that is spent on trajectories.

    If times are normally distributed, the slowest of n trajectories takes about σ √(2 ln n) longer than the mean. A
    ring all-reduce sends 2 (n − 1)/n of the gradient over every link, in 2 (n − 1) messages.
    """
    if processes == 1:
        return 1.0
    waiting = trajectory * t.spread * math.sqrt(2 * math.log(processes))
    ring = 2 * (processes - 1)
    sending = ring / processes * gradient_bytes / t.bandwidth + ring * t.latency
    return trajectory / (trajectory + waiting + sending)


def report(t: Training | None = None) -> str:
    t = t or Training()
    network = HypernetworkConfig(rank=1024, blocks=4)
    lines = [
        "# Large models on several devices, on paper",
        "",
        "Written by `python benchmarks/scaling.py`. Nothing here was measured; RESULTS.md has a measured step of a",
        "model with 8B parameters on one GPU. Shapes and counts are computed from the models' architectures. The",
        "speeds below are assumptions; replace them by those of your machines.",
        "",
        "Each process holds a whole LLM (on one device or, with `device_map=\"auto\"`, on several), edits its own",
        "streams, and sends the hypernetwork's gradient once per update. The LLM's weights and ΔW are not sent.",
        "",
        f"Training: trajectories of {t.batches} × {t.batch_size} facts, {t.steps_per_batch} steps per batch, {t.rows} "
        "observed rows;",
        f"hypernetwork of rank {network.rank} with {network.blocks} blocks; recursive aggregation; the modules edited "
        "by default.",
        f"Assumptions for a process: {t.flops:.0e} FLOP/s sustained; {t.bandwidth / 1e9:.0f} GB/s and "
        f"{t.latency * 1e6:.0f} µs to the next process.",
        f"The relative standard deviation of trajectory times is {t.spread:.1%}, from the text lengths of the facts.",
        "",
    ]
    rows: list[list[str]] = []
    sums: list[list[str]] = []
    for name, config in MODELS.items():
        parameters, shapes = module_shapes(config)
        parts = memory(parameters, shapes, network, t)
        policy = Hypernetwork.parameter_count(shapes, network)
        steps = t.batches * t.steps_per_batch
        trajectory = steps * step_flops(parameters, t) / t.flops
        sent = 4.0 * policy
        sums.append([name, f"{parameters / 1e9:.1f}", str(len(shapes)), *(f"{v / GIB:.1f}" for v in parts.values()),
                     f"**{sum(parts.values()) / GIB:.0f}**"])
        rows.append([name, f"{policy / 1e6:.0f}", f"{sent / GIB:.2f}", f"{trajectory:.0f}",
                     *(f"{efficiency(n, trajectory, sent, t):.1%}" for n in (2, 8, 64))])
    part_names = list(memory(1, {"m": (1, 1)}, network, t))
    lines += ["## Memory of a process, GiB", "",
              *_table(["model", "parameters, 10⁹", "edited modules", *part_names, "sum"], sums), ""]
    lines += ["Activations of a forward pass (bounded by `max_tokens_per_pass`) are not included.", ""]
    sent_head = "sent per process and update, GiB (float32, before the ring's factor 2(n−1)/n)"
    efficiency_head = ["efficiency, 2 processes", "8", "64"]
    head = ["model", "policy, 10⁶ parameters", sent_head, "seconds per trajectory", *efficiency_head]
    lines += ["## An update", "", *_table(head, rows), ""]
    lines += [
        "Efficiency = T / (T + waiting + sending). T is the time of a trajectory. Waiting for the slowest of n",
        "processes takes T · spread · √(2 ln n); spread is the relative standard deviation above. Sending is a ring",
        "all-reduce. Other differences between machines are not included. With m trajectories per update",
        "(`trajectories_per_update`), waiting shrinks by √m and sending by m, relative to the time of trajectories.",
    ]
    return "\n".join(lines)


def _table(head: list[str], rows: list[list[Any]]) -> list[str]:
    return ["| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows]]


if __name__ == "__main__":
    print(report())
