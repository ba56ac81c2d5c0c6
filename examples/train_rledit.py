"""Train the RLEdit agent, then edit a stream of facts that were not used in training.

    python examples/train_rledit.py
    python examples/train_rledit.py --model tiny-llama --num-batches 2 --batch-size 4 --trajectories 2

An interrupted run resumes when the same command is started again. Watch it with: tensorboard --logdir runs
On several GPUs or machines, start it with accelerate launch or torchrun --nproc-per-node 4 instead of python.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import tyro

import rledit_env.own_agents  # noqa: F401 - checks that `agents` is this package
from agents import HypernetworkConfig, RLEditAgent, RLEditConfig, edit_stream
from agents.files import RUN, RUN_PARTS
from agents.rledit.config import RECOMMENDED, Aggregation
from agents.rledit.distributed import Processes
from rledit_env.evaluation.metrics import score_text
from rledit_env.knowledge import load_knowledge
from rledit_env.lm.editable import EditableLM
from rledit_env.outputs import growing, try_or_exit
from rledit_env.reward import RewardConfig

KINDS = {"RLEdit-ZsRE-v0": "zsre", "RLEdit-CounterFact-v0": "counterfact", "RLEdit-FEVER-v0": "fever"}


@dataclass(frozen=True)
class Args:
    """Trains the RLEdit agent on streams of the training split and tests it on the evaluation split."""

    env: str = "RLEdit-CounterFact-v0"
    """The environment: RLEdit-ZsRE-v0, RLEdit-CounterFact-v0 or RLEdit-FEVER-v0."""
    model: str = "smollm2-135m"
    """Registry name, hub id or folder of the model to edit."""
    edit_modules: tuple[str, ...] = ()
    """Modules to edit, by name or glob; by default those of the model."""
    data: str = "bundled"
    """A file, a folder, a hub id, or "bundled", the sample that ships with the package."""
    out: Path = Path("runs/train_rledit")
    """The run's folder."""
    num_batches: int = 5
    """Batches in a training stream; streams for selecting and testing the checkpoint are twice as long."""
    batch_size: int = 20
    """Facts in a batch."""
    token: str = RECOMMENDED["token"]
    """Positions whose keys and value gradients the agent sees."""
    steps_per_batch: int = RECOMMENDED["steps_per_batch"]
    """How often each batch is presented."""
    trajectories: int = 20
    """Training streams."""
    aggregation: Aggregation = "recursive"
    """How the rows of a batch are combined into an update; the paper uses "least_squares"."""
    rank: int = 256
    """Inner width of the network's residual blocks."""
    learning_rate: float = 2e-3
    """Learning rate of Adam."""
    eval_every: int = 5
    """Policy updates between two evaluations."""
    patience: int = 4
    """Number of evaluations without a better score after which training stops."""
    seed: int = 0
    """Seed of the network and of all streams."""


def main(args: Args) -> None:
    processes = Processes.started()  # all processes of accelerate launch or torchrun, or this one alone
    if processes.first:  # check the output folder before training
        try_or_exit([growing("--out", args.out, RUN, RUN_PARTS)])
    facts = load_knowledge(KINDS[args.env], args.data, "train")
    cut = int(0.8 * len(facts))  # the last fifth selects the checkpoint; the evaluation split is used only for testing
    training, selection = replace(facts, records=facts[:cut]), replace(facts, records=facts[cut:])
    lm = EditableLM.load(args.model, args.edit_modules or None, device=processes.device)

    def stream(data: Any, batches: int, **more: Any) -> gym.Env[Any, Any]:
        return gym.make(
            args.env, model=lm, data=data, num_batches=batches, batch_size=args.batch_size, token=args.token,
            steps_per_batch=args.steps_per_batch, array_backend="torch", disable_env_checker=True, **more,
        )  # fmt: skip

    # The Efficacy term scores the edit prompt itself. Only the last presentation of a batch is scored, to save time.
    reward = replace(RewardConfig.with_efficacy(), every_step=False)
    env = stream(training, args.num_batches, reward=reward, reward_gradient=True)
    longer = 2 * args.num_batches
    network = HypernetworkConfig(aggregation=args.aggregation, rank=args.rank)
    agent = RLEditAgent(env, RLEditConfig(network=network, learning_rate=args.learning_rate), seed=args.seed)
    print(f"data: {facts.source}, {len(training)} facts to train on, {len(selection)} to select the checkpoint on")
    agent.learn(
        args.trajectories * args.num_batches * args.steps_per_batch,
        log_dir=args.out,
        eval_env=stream(selection, longer, reward="none"),
        eval_every=args.eval_every,
        patience=args.patience,
        processes=processes,
    )
    if not processes.first:
        return

    test = stream(load_knowledge(KINDS[args.env], args.data, "eval"), longer, reward="none")
    untrained = RLEditAgent(env, agent.config, seed=args.seed)
    for name, editor in (("untrained", untrained), ("trained", agent)):
        editor.reset()
        log = edit_stream(test, editor, seed=args.seed)
        scores = test.unwrapped.evaluate(generate=False)
        print(f"{name:<10} {log.facts} facts of the evaluation split: efficacy {scores.efficacy:.1f}, generalization "
              f"{score_text(scores.generalization)}, specificity {scores.specificity:.1f}, mean {scores.mean:.1f}")
    print(f"the agent is in {args.out / 'best'}; load it with RLEditAgent.load")


if __name__ == "__main__":
    main(tyro.cli(Args))
