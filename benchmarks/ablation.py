"""What each part of RLEdit contributes: the paper's Table 4, single settings, T × n, and longer streams.

    python benchmarks/ablation.py --data ../shared/data
    python benchmarks/ablation.py --data ../shared/data --only "without"

Every row is an agent trained with one change, from the same seeds and on the same facts, and scored on streams of the
evaluation split after the last edit. "Without the RL framework" trains on single batches, each edited into the unedited
model, as MEND and MALMEN do; an update has as many batches as a whole stream. The T × n rows train and test on streams
with the same number of facts. The length rows edit streams of different lengths with the agent of "whole".

The numbers are stored as cells in results.json: an interrupted run computes only the missing cells when it is started
again. The table shows the cells that exist. Several processes can share the work, each with its own --only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import torch
import tyro
from learning import ENV_IDS, Cells, table

import rledit_env.own_agents  # noqa: F401 - checks that `agents` is this package
from agents import HypernetworkConfig, RLEditAgent, RLEditConfig, edit_stream
from agents.rledit.config import Aggregation
from rledit_env.evaluation.metrics import METRICS_VERSION, evaluate
from rledit_env.knowledge import KnowledgeDataset, load_knowledge
from rledit_env.lm.editable import EditableLM
from rledit_env.reward import RewardConfig


@dataclass(frozen=True)
class Args:
    """Trains agents with one change each and prints a table of their scores."""

    data: str
    """Folder with {kind}_train.jsonl and {kind}_eval.jsonl, or anything else that the environment reads."""
    kind: Literal["counterfact", "zsre", "fever"] = "counterfact"
    """Form of the facts."""
    out: Path = Path("runs/ablation")
    """Folder for results and trained agents, with a subfolder for each kind."""
    model: str = "smollm2-135m"
    """Registry name, hub id or folder of the model."""
    edit_modules: tuple[str, ...] = ("model.layers.[6-12].mlp.{gate,up}_proj",)
    """Modules to edit."""
    token: str = "subject"
    """Positions whose keys and value gradients are observed."""
    steps_per_batch: int = 3
    """Presentations of a batch."""
    aggregation: Aggregation = "recursive"
    """How the rows of a batch are combined into an update; the paper uses "least_squares"."""
    step_size: float = 1e-3
    """Initial step size of the policy."""
    rank: int = 256
    """Rank of the policy's network."""
    num_batches: int = 10
    """T, batches in the training and test streams."""
    batch_size: int = 20
    """n, facts in a batch."""
    trajectories: int = 20
    """Training streams; each gives one update."""
    samples: int = 1
    """Earlier batches scored in a step's reward, sampled by their weight; 0 scores all k of them."""
    depths: tuple[int, ...] = (1, 5, 20)
    """Values of k, in addition to the default of 10."""
    decays: tuple[float, ...] = (0.5, 0.8, 1.0)
    """Values of μ, in addition to 0.95."""
    localities: tuple[float, ...] = (0.0, 0.3, 1.0, 2.0)
    """Values of λ_loc, in addition to 0.6."""
    grid: tuple[int, ...] = (2, 5, 20, 40, 100)
    """T of the T × n rows; n is such that T × n is num_batches × batch_size."""
    lengths: tuple[int, ...] = (5, 20, 40, 80)
    """T of the length rows."""
    seeds: int = 3
    """Number of seeds; each has an agent and a test stream."""
    threads: int = 1
    """Number of torch's threads."""
    only: str = ""
    """Compute only the cells whose name contains this text."""


@dataclass(frozen=True)
class Variation:
    """A row of the table: the change in training, and the test stream."""

    name: str
    reward: dict[str, Any] = field(default_factory=dict)
    locality: float = 0.6
    agent: dict[str, Any] = field(default_factory=dict)
    num_batches: int | None = None
    batch_size: int | None = None
    single_batches: bool = False
    test_batches: int | None = None
    trained: bool = True
    trained_as: str = ""
    """The row whose agent is tested, if it is another one."""


def variations(args: Args) -> list[Variation]:
    """The rows of the table."""
    facts = args.num_batches * args.batch_size
    rows = [
        Variation("no training", trained=False),
        Variation("whole"),
        Variation("without the RL framework", single_batches=True),
        Variation("without backtracking", reward={"backtracking_depth": 0}),
        Variation("without regularisation", reward={"regularisation": 0.0}),
        Variation("credit by step", agent={"credit": "step"}),
    ]
    rows += [Variation(f"k = {k}", reward={"backtracking_depth": k}) for k in args.depths]
    rows += [Variation(f"mu = {mu:g}", reward={"backtracking_decay": mu}) for mu in args.decays]
    rows += [Variation(f"lambda_loc = {weight:g}", locality=weight) for weight in args.localities]
    rows += [Variation(f"{t} x {facts // t}", num_batches=t, batch_size=facts // t) for t in args.grid if facts >= t]
    rows += [Variation(f"whole, {t} batches", test_batches=t, trained_as="whole") for t in args.lengths]
    return rows


class Ablation:
    """The cells of one data set's table."""

    def __init__(self, args: Args) -> None:
        self.args = args
        self.lm = EditableLM.load(args.model, args.edit_modules)
        self.training, self.test = (self._facts(split) for split in ("train", "eval"))
        self.folder = args.out / args.kind
        self.folder.mkdir(parents=True, exist_ok=True)
        independent = ("data", "out", "seeds", "only", "threads", "depths", "decays", "localities", "grid", "lengths")
        settings = {k: v for k, v in asdict(args).items() if k not in independent}  # the cells depend on all others
        settings |= {"train": self.training.source, "test": self.test.source, "dtype": str(self.lm.dtype)}
        settings |= {"metrics_version": METRICS_VERSION}
        self.cells = Cells(self.folder / "results.json", json.loads(json.dumps(settings, default=str)), args.only)

    def _facts(self, split: str) -> KnowledgeDataset:
        file = Path(self.args.data) / f"{self.args.kind}_{split}.jsonl"
        return load_knowledge(self.args.kind, file if file.exists() else self.args.data, split, on_error="skip")

    def stream(self, data: KnowledgeDataset, batches: int, size: int, **more: Any) -> gym.Env[Any, Any]:
        """An environment of these facts."""
        return gym.make(
            ENV_IDS[self.args.kind], model=self.lm, data=data, num_batches=batches, batch_size=size,
            token=self.args.token, steps_per_batch=self.args.steps_per_batch, array_backend="torch",
            disable_env_checker=True, **more,
        )  # fmt: skip

    def reward(self, row: Variation) -> RewardConfig:
        """The paper's reward with a term for the edit prompt; scored at the last presentation of a batch."""
        base = RewardConfig.with_efficacy(locality=row.locality, samples=self.args.samples or None)
        return replace(base, every_step=False, **row.reward)

    def agent(self, row: Variation, seed: int) -> RLEditAgent:
        """The trained agent of the row, loaded from its folder if it exists."""
        args = self.args
        batches, size = row.num_batches or args.num_batches, row.batch_size or args.batch_size
        length = 1 if row.single_batches else batches  # of a training stream; the batches of an update stay the same
        network = HypernetworkConfig(aggregation=args.aggregation, step_size=args.step_size, rank=args.rank)
        if not row.trained:
            config = RLEditConfig(network=replace(network, blocks=0))
            return RLEditAgent(self.stream(self.test, 1, size, reward="none"), config)
        env = self.stream(self.training, length, size, reward=self.reward(row), reward_gradient=True)
        config = RLEditConfig(network=network, trajectories_per_update=batches // length, **row.agent)
        folder = self.folder / row.name.replace(" ", "_") / str(seed)

        def train() -> dict[str, Any]:
            agent = RLEditAgent(env, config, seed=seed)
            agent.learn(args.trajectories * batches * args.steps_per_batch)
            agent.save(folder)
            return {"updates": agent.updates}

        self.cells.get(f"training/{row.name}/seed {seed}", train)
        return RLEditAgent.load(folder, env)

    def cell(self, row: Variation, seed: int) -> dict[str, Any] | None:
        """The row's scores on one stream of the evaluation split; None if there are too few facts."""
        batches = row.test_batches or row.num_batches or self.args.num_batches
        size = row.batch_size or self.args.batch_size
        if batches * size > len(self.test):
            return None

        def compute() -> dict[str, Any]:
            agent = self.agent(replace(row, name=row.trained_as) if row.trained_as else row, seed)
            agent.reset()
            env: Any = self.stream(self.test, batches, size, reward="none").unwrapped
            log = edit_stream(env, agent, seed=seed)
            metrics = evaluate(self.lm, env.edited_records(), self.args.kind, generate=False).as_dict()
            return {k: v for k, v in metrics.items() if v is not None} | {
                "drift": log.drift, "diverged": log.diverged, "seconds_per_fact": log.seconds_per_fact,
            }  # fmt: skip

        return self.cells.get(f"test/{row.name}/seed {seed}", compute)

    def rows(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """The name of every row with its cells, one per seed."""
        for row in variations(self.args):
            yield row.name, [c for s in range(self.args.seeds) if (c := self.cell(row, s))]


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    ablation = Ablation(args)
    print(f"{ablation.test.source}: {args.num_batches}×{args.batch_size} facts, {args.model}, {args.edit_modules}")
    text = table(ablation.rows())
    print(text)
    (ablation.folder / "table.txt").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
