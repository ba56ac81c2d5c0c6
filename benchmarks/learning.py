"""Does the agent learn? Compares trained RLEdit with its baselines on the same model, modules and streams of new facts.

    python benchmarks/learning.py --data ../shared/data
    python benchmarks/learning.py --data ../shared/data --kind zsre --seeds 1

Every baseline edits with its best step size, found on held-out training facts in a stream as long as the test. Agents
train on the rest of the training split. Their checkpoints are chosen on the same held-out facts; so is the factor that
adapts their step sizes to streams longer than those of training ("calibrated"). All editors are then scored on streams
of the evaluation split, after the last edit.

The numbers are stored as cells in results.json: an interrupted run computes only the missing cells when it is started
again. The table shows the cells that exist. Several processes can share the work, each with its own --only; on a CPU,
two with one thread each are faster than one with two.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import gymnasium as gym
import torch
import tyro
from filelock import FileLock

import rledit_env.own_agents  # noqa: F401 - checks that `agents` is this package
from agents import FineTuningAgent, FineTuningConfig, HypernetworkConfig, RLEditAgent, RLEditConfig, edit_stream
from agents.rledit.config import Aggregation
from rledit_env.evaluation.metrics import METRICS_VERSION, Metrics, evaluate
from rledit_env.knowledge import KnowledgeDataset, load_knowledge
from rledit_env.lm.editable import EditableLM
from rledit_env.reporting import text_table
from rledit_env.reward import RewardConfig

ENV_IDS = {"counterfact": "RLEdit-CounterFact-v0", "zsre": "RLEdit-ZsRE-v0", "fever": "RLEdit-FEVER-v0"}
SCORES = ("efficacy", "generalization", "specificity", "mean", "top1")


@dataclass(frozen=True)
class Training:
    """How the agent with one of the aggregations is trained."""

    steps: int
    """Presentations of a batch."""
    num_batches: int
    """Batches in a training stream."""
    batch_stride: int
    """One in this many batches of a training stream is scored."""
    trajectories: int
    """Training streams."""
    select_batches: int
    """Batches in the held-out streams that select the initial step size and the checkpoint."""


@dataclass(frozen=True)
class Args:
    """Trains and compares editors and prints a table of their scores."""

    data: str
    """Folder with {kind}_train.jsonl and {kind}_eval.jsonl, or anything else that the environment reads."""
    kind: Literal["counterfact", "zsre", "fever"] = "counterfact"
    """Form of the facts."""
    out: Path = Path("runs/learning")
    """Folder for results and trained agents, with a subfolder for each kind."""
    model: str = "smollm2-135m"
    """Registry name, hub id or folder of the model."""
    edit_modules: tuple[str, ...] = ("model.layers.[6-12].mlp.{gate,up}_proj",)
    """Modules to edit."""
    token: str = "subject"
    """Positions whose keys and value gradients are observed."""
    seeds: int = 3
    """Number of seeds; each has an evaluation stream and trained agents."""
    num_batches: int = 20
    """Batches in an evaluation stream."""
    batch_size: int = 20
    """Facts in a batch."""
    longer: int = 5
    """The recursive agents also edit a stream this many times as long as their training streams."""
    eval_every: int = 10
    """Updates between two evaluations for selecting the checkpoint."""
    recursive: Training = Training(steps=5, num_batches=5, batch_stride=1, trajectories=20, select_batches=10)
    """Training of the agent with recursive least squares."""
    paper: Training = Training(steps=1, num_batches=20, batch_stride=5, trajectories=20, select_batches=20)
    """Training of the agent with the paper's aggregation and one presentation per batch. This aggregation forgets the
    keys of earlier batches, so that a policy for short streams fails on long ones: training streams are as long as
    the test."""
    paper_repeated: Training = Training(steps=3, num_batches=20, batch_stride=5, trajectories=20, select_batches=20)
    """The same, with more presentations per batch."""
    steps_most: int = 12
    """Presentations of a batch in the test of the calibrated recursive agent."""
    learning_rate: float = 2e-3
    """Learning rate of Adam for the networks of the trained agents."""
    step_size_learning_rate: float = 4e-2
    """Learning rate of Adam for their step sizes."""
    efficacy: float = 1.0
    """Weight of the loss of the edit prompt in the reward."""
    rank: int = 256
    """Rank of the networks of the trained agents."""
    held_out: int = 2000
    """Facts at the end of the training split for selecting step sizes and checkpoints; at most half of the split."""
    threads: int = 1
    """Number of torch's threads."""
    only: str = ""
    """Compute only the cells whose name contains this text."""


@dataclass(frozen=True)
class Editor:
    """A row of the table.

    Attributes:
        name: its name in the table.
        aggregation: how the rows of a batch are combined into an update; None for the plain fine-tuning gradient.
        steps: presentations of a batch.
        step_size: the step size from which the search for the best one starts.
        training: how its policy is trained, starting from the best step size of the untrained policy; None for editors
            without training.
        calibrated: whether its step sizes are then adapted to longer streams.
    """

    name: str
    aggregation: Aggregation | None
    steps: int
    step_size: float
    training: Training | None = None
    calibrated: bool = False


class Cells:
    """Results by name. Each is written when it is computed, and existing ones are not computed again."""

    def __init__(self, path: Path, settings: dict[str, Any], only: str) -> None:
        self.path, self.settings, self.only = path, settings, only
        self._computing = 0
        different = [k for k, v in settings.items() if self._stored()["settings"].get(k) != v]
        if different:
            raise SystemExit(f"{path} holds results of other settings ({', '.join(different)}); give another --out")

    def _stored(self) -> dict[str, Any]:
        if not self.path.exists():
            return {"settings": self.settings, "cells": {}}
        return json.loads(self.path.read_text(encoding="utf-8"))

    def get(self, name: str, compute: Callable[[], Any]) -> Any:
        """The cell, computed if it is missing; None if it is missing and ``only`` excludes it."""
        cells = self._stored()["cells"]
        if name in cells:
            return cells[name]
        if not self._computing and self.only not in name:
            return None
        self._computing += 1  # cells on which a requested cell depends are computed, too
        started = time.monotonic()
        value = compute()
        self._computing -= 1
        with FileLock(f"{self.path}.lock"):
            stored = self._stored()
            stored["cells"][name] = value
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
            partial.replace(self.path)
        print(f"[{time.monotonic() - started:4.0f} s] {name}: {_shown(value)}", flush=True)
        return value


def _shown(value: Any) -> str:
    return ", ".join(f"{k} {v:.3g}" for k, v in value.items() if isinstance(v, float))


class Benchmark:
    """The cells of one data set's table."""

    def __init__(self, args: Args) -> None:
        self.args = args
        self.lm = EditableLM.load(args.model, args.edit_modules)
        train_split = self._facts("train")
        held_out = min(args.held_out, len(train_split) // 2)
        self.training = replace(train_split, records=train_split.records[:-held_out])
        self.selection = replace(train_split, records=train_split.records[-held_out:])
        self.test = self._facts("eval")
        self.folder = args.out / args.kind
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = {k: v for k, v in asdict(args).items() if k not in ("data", "out", "seeds", "only", "threads")}
        settings |= {"train": self.training.source, "test": self.test.source, "dtype": str(self.lm.dtype)}
        settings |= {"metrics_version": METRICS_VERSION}
        self.cells = Cells(self.folder / "results.json", json.loads(json.dumps(settings, default=str)), args.only)

    def _facts(self, split: str) -> KnowledgeDataset:
        file = Path(self.args.data) / f"{self.args.kind}_{split}.jsonl"
        return load_knowledge(self.args.kind, file if file.exists() else self.args.data, split, on_error="skip")

    def stream(self, data: KnowledgeDataset, batches: int, steps: int, **more: Any) -> gym.Env[Any, Any]:
        """An environment of these facts."""
        return gym.make(
            ENV_IDS[self.args.kind], model=self.lm, data=data, num_batches=batches, batch_size=self.args.batch_size,
            token=self.args.token, steps_per_batch=steps, array_backend="torch", disable_env_checker=True, **more,
        )  # fmt: skip

    def network(self, editor: Editor, step_size: float) -> RLEditConfig:
        """The configuration of the policy with this initial step size."""
        assert editor.aggregation is not None
        network = HypernetworkConfig(
            aggregation=editor.aggregation, step_size=step_size, blocks=2 if editor.training else 0,
            rank=self.args.rank,
        )  # fmt: skip
        rates = (self.args.learning_rate, self.args.step_size_learning_rate)
        return RLEditConfig(network=network, learning_rate=rates[0], step_size_learning_rate=rates[1])

    def score(self, editor: Editor, policy: Any, data: KnowledgeDataset, batches: int, seed: int) -> dict[str, Any]:
        """Edit a stream and return the metrics after it."""
        env = self.stream(data, batches, editor.steps, reward="none")
        policy.reset()
        log = edit_stream(env, policy, seed=seed)
        inner: Any = env.unwrapped
        return _cell(inner.evaluate(generate=False)) | {
            "drift": log.drift, "diverged": log.diverged, "seconds_per_fact": log.seconds_per_fact,
        }  # fmt: skip

    def untrained(self, editor: Editor, step_size: float) -> Any:
        """The untrained agent of an editor."""
        if editor.aggregation is None:
            return FineTuningAgent(config=FineTuningConfig(step_size))
        env = self.stream(self.test, 1, editor.steps, reward="none")
        return RLEditAgent(env, self.network(editor, step_size))

    def best_step_size(self, editor: Editor, batches: int) -> float:
        """The best step size on a stream of held-out training facts.

        Starts at ``editor.step_size`` and moves by factors of two as long as the mean score grows.
        """

        def mean_score(exponent: int) -> float:
            size = editor.step_size * 2.0**exponent
            cell = self.cells.get(
                f"sweep, {batches} batches/{editor.name}/{size:g}",
                lambda: self.score(editor, self.untrained(editor, size), self.selection, batches, 0),
            )
            return -math.inf if cell["diverged"] else float(cell["mean"])

        scores = {e: mean_score(e) for e in (-1, 0, 1)}
        while True:
            best = max(scores, key=scores.__getitem__)
            missing = [e for e in (best - 1, best + 1) if e not in scores]
            if not missing:
                return editor.step_size * 2.0**best
            scores |= {e: mean_score(e) for e in missing}

    def trained(self, editor: Editor, seed: int) -> RLEditAgent:
        """The trained agent, loaded from its folder if it exists."""
        args, training = self.args, editor.training
        assert training is not None
        steps = training.steps
        baseline = untrained(editor.aggregation, steps)
        name = f"{editor.aggregation} {_steps(steps)}"
        folder = self.folder / name.replace(" ", "_") / str(seed)
        rewards = replace(
            RewardConfig.with_efficacy(args.efficacy), every_step=False, batch_stride=training.batch_stride
        )
        env = self.stream(self.training, training.num_batches, steps, reward=rewards, reward_gradient=True)

        def train() -> dict[str, Any]:
            step_size = self.best_step_size(baseline, training.select_batches)
            agent = RLEditAgent(env, self.network(editor, step_size), seed=seed)
            agent.learn(
                training.trajectories * training.num_batches * steps, log_dir=folder, eval_every=args.eval_every,
                eval_env=self.stream(self.selection, training.select_batches, steps, reward="none"),
            )  # fmt: skip
            return {"step_size": step_size, "best_score": agent.best_score, "updates": agent.updates}

        self.cells.get(f"training/{name}/seed {seed}", train)
        return RLEditAgent.load(folder / "best", env)

    def calibration(self, editor: Editor) -> float:
        """The factor for the trained step sizes, found with the agent of the first seed and used for all seeds."""

        def compute() -> dict[str, Any]:
            env = self.stream(self.selection, self.args.num_batches, editor.steps, reward="none")
            agent = self.trained(editor, 0)
            scores = agent.calibrate(env, seed=0)
            return {"factor": max(scores, key=scores.__getitem__)} | {str(k): v for k, v in scores.items()}

        return float(self.cells.get(f"calibration/{editor.name}", compute)["factor"])

    def row(self, editor: Editor, seed: int, batches: int, name: str) -> dict[str, Any] | None:
        """An editor's scores on one stream of the evaluation split."""

        def compute() -> dict[str, Any]:
            if not editor.training:
                policy = self.untrained(editor, self.best_step_size(editor, self.args.num_batches))
                return self.score(editor, policy, self.test, batches, seed)
            factor = self.calibration(editor) if editor.calibrated else 1.0
            policy = self.trained(editor, seed)
            policy.scale_step_sizes(factor)
            return self.score(editor, policy, self.test, batches, seed) | {"factor": factor}

        return self.cells.get(f"{name}/{editor.name}/seed {seed}", compute)

    def no_edit(self, seed: int) -> dict[str, Any] | None:
        """The scores of the unedited model."""

        def compute() -> dict[str, Any]:
            env: Any = self.stream(self.test, self.args.num_batches, 1, reward="none").unwrapped
            env.reset(seed=seed)
            facts = [fact for t in range(self.args.num_batches) for fact in env.stream.batch(t)]
            return _cell(evaluate(self.lm, facts, self.args.kind, generate=False))

        return self.cells.get(f"test/no edit/seed {seed}", compute)

    def rows(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """The name of every row with its cells, one per seed."""
        args, seeds = self.args, range(self.args.seeds)
        all_editors = editors(args)
        yield "no edit", [c for s in seeds if (c := self.no_edit(s))]
        for editor in all_editors:
            yield editor.name, [c for s in seeds if (c := self.row(editor, s, args.num_batches, "test"))]
        batches = args.longer * args.recursive.num_batches
        for editor in all_editors:
            if editor.training and editor.aggregation == "recursive":
                name = f"test, {batches} batches"
                cells = [c for s in seeds if (c := self.row(editor, s, batches, name))]
                yield f"{editor.name}, {batches} batches", cells


def untrained(aggregation: Aggregation | None, steps: int) -> Editor:
    """The untrained policy, a network without blocks, as an editor."""
    kind = "per-batch" if aggregation == "least_squares" else "recursive"
    return Editor(f"{kind} least squares, {_steps(steps)}", aggregation, steps, 2e-3 if steps < 3 else 1e-3)


def editors(args: Args) -> list[Editor]:
    """The baselines and the trained agents."""
    papers, recursive, most = (args.paper, args.paper_repeated), args.recursive, args.steps_most
    baselines = [Editor("fine-tuning gradient, 1 step", None, 1, 1.0)]
    baselines += [untrained("least_squares", n) for n in sorted({1, 2, 3, *(paper.steps for paper in papers)})]
    baselines += [untrained("recursive", n) for n in sorted({1, 2, 3, recursive.steps, most})]
    agents = [
        *(
            Editor(f"RLEdit, per-batch, {_steps(p.steps)}{name}", "least_squares", p.steps, 0.0, p, bool(name))
            for p in papers
            for name in ("", ", calibrated")
        ),
        Editor(f"RLEdit, recursive, {_steps(recursive.steps)}", "recursive", recursive.steps, 0.0, recursive),
        Editor(f"RLEdit, recursive, {_steps(most)}, calibrated", "recursive", most, 0.0, recursive, True),
    ]
    return baselines + agents


def _steps(count: int) -> str:
    return f"{count} step" + "s" * (count > 1)


def _cell(metrics: Metrics) -> dict[str, Any]:
    return {k: v for k, v in metrics.as_dict().items() if v is not None}


def table(rows: Iterator[tuple[str, list[dict[str, Any]]]]) -> str:
    """The rows as text: mean ± standard deviation over the seeds, scores in percent."""

    def formatted(cells: list[dict[str, Any]], score: str) -> str:
        values = [cell[score] for cell in cells if score in cell]
        digits = 3 if score == "drift" else 1
        if not values:
            return ""
        spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{mean(values):.{digits}f}{spread}"

    columns = (*SCORES, "drift", "seconds_per_fact")
    return text_table(
        ["editor", *columns, "seeds"],
        [[name, *(formatted(cells, c) for c in columns), len(cells)] for name, cells in rows if cells],
    )


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    benchmark = Benchmark(args)
    print(f"{benchmark.test.source}: {args.num_batches}×{args.batch_size} facts, {args.model}, {args.edit_modules}")
    text = table(benchmark.rows())
    print(text)
    (benchmark.folder / "table.txt").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
