"""Teach an agent to edit a language model, then let it edit: what `make demo` runs.

Fetches the model once, trains the RLEdit agent for some minutes on the bundled facts (Ctrl-C ends the training early),
edits a stream of facts that were not used in training, and writes a report with figures.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import tyro
from tqdm import tqdm

import rledit_env.own_agents  # noqa: F401 - checks that `agents` is this package
from agents import RLEditAgent, edit_stream
from agents.files import remove_run
from agents.rledit.config import RECOMMENDED
from rledit_env import reporting
from rledit_env.evaluation.general import GeneralAbility, GeneralEvery
from rledit_env.evaluation.metrics import continuations, evaluate
from rledit_env.evaluation.retention import DriftProbe, RetentionProbe
from rledit_env.files import mark
from rledit_env.knowledge import load_knowledge
from rledit_env.lm.editable import EditableLM
from rledit_env.outputs import growing, try_or_exit
from rledit_env.reward import RewardConfig

ENV_ID = "RLEdit-CounterFact-v0"


# Minutes of training, facts in a batch, and batches in the streams for training, checkpoint selection ("check") and the
# final edits; RECOMMENDED has the presentations of a batch.
SIZES = {"minutes": 6.0, "batch_size": 20, "train": 4, "check": 8, "edit": 10, **RECOMMENDED}
QUICK = {**RECOMMENDED, "minutes": 0.02, "batch_size": 4, "steps_per_batch": 1, "train": 2, "check": 2, "edit": 2}


@dataclass(frozen=True)
class Settings:
    """Trains an editor of a language model and shows what it does."""

    minutes: float | None = None
    """Time for training, 6 if not given; the current stream is finished first."""
    out: Path = Path("runs/demo")
    """Folder of the trained agent and of the report."""
    quick: bool = False
    """Use a tiny random model and train for seconds: shows that everything runs, but learns nothing."""
    seed: int = 0
    """Seed of the agent and of all streams."""
    model: str = "smollm2-135m"
    """Registry name, hub id or folder of the model; its default modules are edited."""


class Clock(gym.Wrapper[Any, Any, Any, Any]):
    """Shows the time spent in training as a progress bar, updated at every step."""

    def __init__(self, env: gym.Env[Any, Any], seconds: float) -> None:
        super().__init__(env)
        self.seconds, self.start = seconds, time.monotonic()
        bar_format = "training {percentage:3.0f}%|{bar}| {elapsed} of " + f"{seconds / 60:.3g} min{{postfix}}"
        self.bar = tqdm(total=seconds, bar_format=bar_format, disable=None)  # shown only in a terminal

    def step(self, action: Any) -> Any:
        self.bar.n = min(self.seconds, time.monotonic() - self.start)
        self.bar.refresh()
        return super().step(action)

    def learned(self, numbers: dict[str, float]) -> bool:
        """The agent's callback: shows the loss of an update; returns False once the time is over."""
        self.bar.set_postfix_str(f"paraphrase loss {numbers.get('generalization', float('nan')):.2f}")
        return time.monotonic() - self.start < self.seconds


def train(lm: EditableLM, sizes: dict[str, Any], out: Path, seed: int) -> RLEditAgent:
    """Train for the given time and return the best agent; every tenth training fact is held out to choose it."""
    facts = load_knowledge("counterfact", "bundled", "train")
    held_out = replace(facts, records=facts.records[::10])
    training = replace(facts, records=tuple(r for i, r in enumerate(facts.records) if i % 10))
    # The Efficacy term scores the edit prompt itself. Only the last presentation of a batch is scored, to save time.
    reward = replace(RewardConfig.with_efficacy(), every_step=False)
    clock = Clock(make_env(lm, training, sizes, "train", reward=reward, reward_gradient=True), 60 * sizes["minutes"])
    check_env = make_env(lm, held_out, sizes, "check", reward="none")
    agent = RLEditAgent(clock, seed=seed)
    remove_run(out)  # of an earlier demo
    try:
        agent.learn(10**9, clock.learned, progress_bar=False, log_dir=out, eval_env=check_env, patience=10**9)
    except KeyboardInterrupt:
        tqdm.write("training stopped by hand; editing with the best policy so far")
        if (out / "best" / "agent.json").exists():
            agent = RLEditAgent.load(out / "best", clock)
    finally:
        clock.bar.close()
    return agent


def make_env(lm: EditableLM, data: Any, sizes: dict[str, Any], stream: str, **more: Any) -> gym.Env[Any, Any]:
    return gym.make(
        f"rledit_env:{ENV_ID}", model=lm, data=data, num_batches=sizes[stream], batch_size=sizes["batch_size"],
        token=sizes["token"], steps_per_batch=sizes["steps_per_batch"], array_backend="torch",
        disable_env_checker=True, **more,
    )  # fmt: skip


def main(settings: Settings) -> None:
    given = {} if settings.minutes is None else {"minutes": settings.minutes}
    sizes: dict[str, Any] = {**(QUICK if settings.quick else SIZES), **given}
    warnings.filterwarnings("ignore", category=UserWarning, module="gymnasium")
    try_or_exit([growing("--out", settings.out, "demo", ("training/", "agent/"))])
    settings.out.mkdir(parents=True, exist_ok=True)
    mark(settings.out, "demo")  # so that the next demo may overwrite the folder
    started = time.monotonic()
    lm = EditableLM.load("tiny-llama" if settings.quick else settings.model)
    agent = train(lm, sizes, settings.out / "training", settings.seed)
    agent.save(settings.out / "agent")
    untrained = RLEditAgent(agent.env, agent.config, seed=settings.seed)

    held_out = load_knowledge("counterfact", "bundled", "eval")
    env: Any = make_env(lm, held_out, sizes, "edit", reward="none")
    env.reset(seed=settings.seed)
    facts = [fact for t in range(sizes["edit"]) for fact in env.unwrapped.stream.batch(t)]
    chosen = facts[:: max(1, len(facts) // 5)][:5]  # evenly spaced, whether or not they took
    print(f"editing {len(facts)} facts that were not used in training: {env.unwrapped.dataset.source}")
    answers = {"before": continuations(lm, chosen)}
    scores: dict[str, dict[str, Any]] = {"no edit": evaluate(lm, facts, "counterfact").as_dict()}
    drifts: dict[str, list[tuple[float, float]]] = {}
    probes = retention, drift, general = RetentionProbe(env), DriftProbe(env), GeneralEvery(env, GeneralAbility(lm))
    for name, editor in (("untrained policy", untrained), ("trained agent", agent)):
        editor.reset()
        log = edit_stream(env, editor, callbacks=probes if editor is agent else (), seed=settings.seed)
        scores[name] = {**env.unwrapped.evaluate().as_dict(), "seconds": log.seconds_per_fact}
        per_step = sizes["batch_size"] / sizes["steps_per_batch"]
        drifts[name] = [(0.0, 0.0)] + [((i + 1) * per_step, h["drift"]) for i, h in enumerate(env.unwrapped.history)]
        answers[name] = continuations(lm, chosen)
    env.close()
    table = reporting.answer_table(chosen, answers["before"], answers["trained agent"])
    print(f"\nAfter all {len(facts)} edits, in percent:\n{reporting.text_table(*reporting.score_table(scores))}")
    print(f"\nFive facts of the stream:\n{reporting.text_table(*table)}")
    lead = (f"An agent trained for {agent.updates} policy updates edits {len(facts)} new facts into {lm.name}, "
            f"{sizes['batch_size']} at a time; every score is taken after the last of them.")
    if settings.quick:
        lead += " A quick run on a tiny random model: it shows that everything runs, and nothing else."
    curves, source = reporting.read_curves(settings.out / "training"), env.unwrapped.dataset.source
    remembered = retention.result if retention.measured else None
    measured = reporting.Measured(remembered, drift.by_module, general.scores)
    made_with = {**asdict(settings), **sizes}
    page = reporting.editing_report(lead, scores, table, curves, drifts, made_with, source, measured)
    path = page.write(settings.out / "report.html")
    print(f"\ntrained agent: {settings.out / 'agent'}\nreport: {path}")
    print(f"{(time.monotonic() - started) / 60:.1f} minutes in total")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
