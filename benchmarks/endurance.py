"""Endurance: thousands of sequential edits in one process. Memory and step time must stay flat, and the edited weights
must be W₀ plus the sum of the ledger's updates.

    python benchmarks/endurance.py --edits 2000 --out runs/endurance
    python benchmarks/endurance.py --model tiny-llama --steps-per-batch 1 --batch-size 1 --edits 5000

It writes endurance.json and, if matplotlib is installed, endurance.png. The exit code is 1 if a check fails. The facts
are those of the training split, repeated if there are not enough. The agent is untrained (recursion with a small step
size), since the test is of the software, not of the policy.
"""

from __future__ import annotations

import gc
import itertools
import json
import platform
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

import rledit_env.own_agents  # noqa: F401 - checks that `agents` is this package
from agents import HypernetworkConfig, RLEditAgent, RLEditConfig, find_agent, load_agent
from agents.running.editing import EditLog, edit_stream
from rledit_env.env import LifelongEditEnv
from rledit_env.evaluation.clock import resident_bytes
from rledit_env.evaluation.metrics import METRICS_VERSION, evaluate
from rledit_env.files import read_marker, write_text
from rledit_env.knowledge import KnowledgeDataset, load_knowledge
from rledit_env.ledger import LEDGER, EditLedger
from rledit_env.lm.editable import EditableLM
from rledit_env.updates import RankOne


@dataclass(frozen=True)
class Args:
    """Edits many facts in one process and checks that nothing grows."""

    model: str = "smollm2-135m"
    """Registry name, hub id or folder of the model to edit."""
    kind: str = "counterfact"
    """Form of the facts."""
    data: str = "bundled"
    """A file, a folder, a hub id, or "bundled"."""
    agent: str = ""
    """Folder of a saved agent or a run, or "default"; if empty, an untrained agent."""
    edits: int = 2000
    """Number of edits; a fact that is edited twice counts twice."""
    distinct_facts: int = 0
    """Number of different facts, which are repeated; 0: all. Forward passes cache data for each length of passage; the
    cache is bounded, but grows while new lengths occur."""
    batch_size: int = 20
    """Facts in a batch."""
    steps_per_batch: int = 1
    """How often each batch is presented."""
    token: str = "subject"
    """Positions whose keys and value gradients the agent sees."""
    step_size: float = 1e-4
    """Step size of the untrained agent."""
    measure_every: int = 500
    """Edits between two evaluations of the metrics."""
    measured_facts: int = 100
    """Number of facts to evaluate: this many of the latest, and this many of the first."""
    ledger: bool = True
    """Record every update; needed to check the sum of the updates."""
    warm_up: float = 0.3
    """Share of the run after which memory and step time must be flat."""
    out: Path = Path("runs/endurance")
    """Folder for the results; an earlier ledger in it is replaced."""


def repeated(facts: KnowledgeDataset, count: int, distinct: int = 0) -> KnowledgeDataset:
    """The data set with ``count`` records: its own, or the first ``distinct`` of them, repeated as often as needed."""
    records = facts.records[:distinct] if distinct else facts.records
    return replace(facts, records=tuple(itertools.islice(itertools.cycle(records), count)))


def drift_of_sum(lm: EditableLM, ledger: EditLedger) -> float:
    """The largest difference between W and W₀ + Σ ΔW of the ledger, summed in float64.

    The unit is the float32 rounding of the module's largest weight.
    """
    total = {m: lm.original_weight(m).double() for m in lm.module_shapes}
    rolled_back = {e.index - 1 for e in ledger.entries() if e.kind == "rollback"}
    for index in range(len(ledger)):
        entry = ledger.read(index)
        if entry.kind == "edit" and index not in rolled_back:
            assert isinstance(entry.update, RankOne)
            for m, keys in entry.update.keys.items():
                total[m].addmm_(entry.update.values[m].double().t().to(lm.device), keys.double().to(lm.device))
    unit = torch.finfo(torch.float32).eps
    return max(
        float((lm.weight(m).double() - total[m]).abs().max()) / (unit * float(total[m].abs().max())) for m in total
    )


def flatness(values: np.ndarray, warm_up: float) -> float:
    """The largest deviation of the medians of ten parts of the run after warm-up from their median, relative to it."""
    parts = [float(np.median(p)) for p in np.array_split(values[int(warm_up * len(values)) :], 10) if len(p)]
    middle = float(np.median(parts))
    return max(abs(p - middle) for p in parts) / middle


class Course:
    """Time, memory and scores over the edits of a run.

    Attributes:
        seconds: of each batch.
        memory: resident bytes after each batch.
        metrics: scores of the latest and of the first facts, after every ``measure_every`` edits.
    """

    def __init__(self, args: Args, lm: EditableLM, facts: KnowledgeDataset) -> None:
        self.args, self.lm, self.facts = args, lm, facts
        self.seconds: list[float] = []
        self.memory: list[int] = []
        self.metrics: list[dict[str, Any]] = []
        self.edits = 0
        self.measure()
        self.since = time.perf_counter()

    def after_batch(self, size: int) -> None:
        """Note a batch of ``size`` edits, and evaluate when it is time to."""
        self.edits += size
        self.seconds.append(time.perf_counter() - self.since)
        if self.edits % self.args.measure_every < size:
            self.measure()
        resident = resident_bytes()
        if resident is None:
            raise OSError("this system does not say how much memory a process has; run this on Linux")
        self.memory.append(resident)
        self.since = time.perf_counter()

    def measure(self) -> None:
        """Evaluate the latest and the first facts."""
        count, records = self.args.measured_facts, self.facts.records
        groups = {"latest": records[max(0, self.edits - count) : self.edits], "first": records[:count]}
        for which, group in groups.items():
            if not group:
                continue
            scores = evaluate(self.lm, group, self.args.kind, generate=False).as_dict()
            drift = np.mean([*self.lm.drift().values()])
            self.metrics.append({"edits": self.edits, "facts": which, **scores, "drift": drift})
            shown = ", ".join(f"{name} {score:.1f}" for name, score in scores.items() if score is not None)
            print(f"{self.edits:>6} edits, {which:<6} {len(group)}: {shown}", flush=True)
        gc.collect()


def run(args: Args) -> dict[str, Any]:
    """Edit all facts and return the measurements."""
    torch.manual_seed(0)
    lm = EditableLM.load(args.model)
    facts = repeated(load_knowledge(args.kind, args.data, "train"), args.edits, args.distinct_facts)
    batches = args.edits // args.batch_size
    env = LifelongEditEnv(
        args.kind, lm, data=facts, num_batches=batches, batch_size=args.batch_size, token=args.token, reward="none",
        steps_per_batch=args.steps_per_batch, array_backend="torch",
    )  # fmt: skip
    if args.agent:
        agent: Any = load_agent(find_agent(args.agent, args.kind), env)
    else:
        agent = RLEditAgent(env, RLEditConfig(network=HypernetworkConfig(blocks=0, step_size=args.step_size)))
    agent.reset()
    marker = read_marker(args.out / "ledger")
    if marker is not None and marker.what == LEDGER:  # of an earlier run; anything else is refused below
        shutil.rmtree(args.out / "ledger")
    ledger = EditLedger.create(args.out / "ledger", lm, {}) if args.ledger else None

    course = Course(args, lm, facts)
    log: EditLog = edit_stream(env, agent, progress=course.after_batch, ledger=ledger, seed=0,
                               options={"indices": list(range(batches * args.batch_size))})
    result: dict[str, Any] = {
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {lm.device}",
        "edits": log.facts,
        "updates": batches * args.steps_per_batch,
        "diverged": log.diverged,
        "drift": log.drift,
        "seconds_per_edit": sum(course.seconds) / max(log.facts, 1),
        "memory_deviation": flatness(np.asarray(course.memory, float), args.warm_up),
        "memory_growth": course.memory[-1] / course.memory[int(args.warm_up * len(course.memory))] - 1,
        "step_time_deviation": flatness(np.asarray(course.seconds), args.warm_up),
        "metrics_version": METRICS_VERSION,
        "metrics": course.metrics,
        "memory_bytes": course.memory,
        "batch_seconds": course.seconds,
    }
    if ledger is not None:
        result["weights_off_sum_in_roundings"] = drift_of_sum(lm, ledger)
        result["ledger_bytes"] = sum(p.stat().st_size for p in ledger.folder.iterdir())
        result["ledger_damage"] = ledger.verify(lm)
        ledger.close()
    return result


def plot(result: dict[str, Any], path: Path) -> None:
    """Memory, batch time and scores over the edits."""
    from matplotlib.figure import Figure

    size = result["settings"]["batch_size"]
    edits = size * np.arange(1, len(result["memory_bytes"]) + 1)
    figure = Figure(figsize=(8, 8), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    axes[0].plot(edits, np.asarray(result["memory_bytes"]) / 2**20)
    axes[0].set(ylabel="memory, MiB", ylim=(0, None))
    axes[1].plot(edits, result["batch_seconds"], linewidth=0.6)
    axes[1].set(ylabel="seconds a batch", ylim=(0, None))
    for which, style in (("latest", "-"), ("first", "--")):
        rows = [m for m in result["metrics"] if m["facts"] == which]
        for name in ("efficacy", "generalization", "specificity"):
            axes[2].plot([m["edits"] for m in rows], [m[name] for m in rows], style, label=f"{name}, {which} facts")
    axes[2].set(xlabel="edits", ylabel="%", ylim=(0, 100))
    axes[2].legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=120)


def main(args: Args) -> int:
    result = run(args)
    write_text(args.out / "endurance.json", json.dumps(result, indent=1, default=float) + "\n")
    try:
        plot(result, args.out / "endurance.png")
    except ImportError:
        print("matplotlib is not installed: no plot", file=sys.stderr)
    updates = result["updates"]
    print(f"{result['edits']} edits, {updates} updates, {result['seconds_per_edit']:.4f} s an edit")
    checks = {
        "the run was not broken off": not result["diverged"],
        f"memory flat within 5 % after warm-up: {result['memory_deviation']:.1%}": result["memory_deviation"] <= 0.05,
        f"memory grew by less than 5 % since: {result['memory_growth']:.1%}": result["memory_growth"] <= 0.05,
        f"step time flat within 15 %: {result['step_time_deviation']:.1%}": result["step_time_deviation"] <= 0.15,
    }
    if "ledger_damage" in result:
        off, allowed = result["weights_off_sum_in_roundings"], max(4.0, updates**0.5)
        checks[f"weights are W₀ + the ledger's sum: off by {off:.1f} roundings"] = off <= allowed
        checks["the ledger is whole and replays to these weights"] = result["ledger_damage"] is None
    for what, holds in checks.items():
        print(("ok    " if holds else "FAILED ") + what)
    return int(not all(checks.values()))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
