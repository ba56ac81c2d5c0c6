"""One agent edits a language model, and another one learns to: what `make demo` runs.

The agent that ships edits six facts, which are asked before and after in four ways, and then a stream of facts that no
agent was trained on. A new agent starts as a rule and is trained on other facts for the time that is left (Ctrl-C means
"enough"); the same stream shows what it has learned. A report with figures is written.

The first edits show how fast this machine is, and the sizes of all that follows are chosen by that.
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
from agents import RLEditAgent, RLEditConfig, agent_settings, edit_facts, find_agent, load_agent
from agents.files import remove_run
from agents.rledit.config import HypernetworkConfig
from agents.rledit.text_prior import start_from_text
from agents.running.same_stream import SameStream
from rledit_env import reporting
from rledit_env.evaluation.four_ways import ask, questions_of
from rledit_env.evaluation.general import drifts, human_text, self_text
from rledit_env.files import mark
from rledit_env.knowledge import KnowledgeDataset, load_knowledge
from rledit_env.lm.editable import EditableLM
from rledit_env.outputs import growing, try_or_exit
from rledit_env.preservation import OwnText
from rledit_env.reporting import Clock, duration
from rledit_env.reward import RewardConfig
from rledit_env.self_text import OPENINGS

ENV_ID = "RLEdit-CounterFact-v0"
MODEL = "smollm2-135m"
# Facts that a reader can judge: prompt, new answer, true answer, subject; paraphrase; neighbour, its answer; question.
SHOWN = [
    ("The capital of Canada is", "Vancouver", "Ottawa", "Canada", "The capital city of Canada is",
     "The capital of Norway is", "Oslo", "What is the capital of Canada?"),
    ("The official language of Brazil is", "Dutch", "Portuguese", "Brazil", "The language spoken in Brazil is",
     "The official language of Mexico is", "Spanish", "Which language is spoken in Brazil?"),
    ("The author of Moby-Dick is", "Mary Shelley", "Herman Melville", "Moby-Dick", "The writer of Moby-Dick is",
     "Pride and Prejudice was written by", "Jane Austen", "Who wrote Moby-Dick?"),
    ("The Eiffel Tower is in the city of", "Rome", "Paris", "The Eiffel Tower", "The Eiffel Tower is located in",
     "The Brandenburg Gate is in the city of", "Berlin", "In which city is the Eiffel Tower?"),
    ("The PlayStation is made by", "Nintendo", "Sony", "The PlayStation", "The PlayStation was developed by",
     "The iPhone is made by", "Apple", "Which company makes the PlayStation?"),
    ("The theory of relativity was developed by", "Isaac Newton", "Albert Einstein", "theory of relativity",
     "The physicist behind the theory of relativity is", "The theory of evolution was developed by", "Charles Darwin",
     "Who developed the theory of relativity?"),
]  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Shows what an editor of a language model does, and how one is trained."""

    minutes: float | None = None
    """Time for the whole demo, 12 if not given. A slow machine edits fewer facts and trains less in it."""
    out: Path = Path("runs/demo")
    """Folder of the trained agent and of the report."""
    quick: bool = False
    """Use a tiny random model and train for seconds: shows that everything runs, but learns nothing."""
    seed: int = 0
    """Seed of the agent and of all streams."""
    model: str = MODEL
    """Registry name, hub id or folder of the model. An agent ships for smollm2-135m alone; for other models the rule
    that training starts from edits first."""


@dataclass(frozen=True)
class Sizes:
    """What fits into the time.

    Attributes:
        facts, batch_size: of the stream that all editors edit.
        training: batches, facts in a batch and presentations of a training stream.
        gathered: facts for the moments that training starts from.
        update_seconds, stream_seconds: expected time of a policy update, and of editing and scoring the stream once.
    """

    facts: int
    batch_size: int
    training: tuple[int, int, int]
    gathered: int
    update_seconds: float
    stream_seconds: float

    def __str__(self) -> str:
        batches, size, times = self.training
        return (f"a stream of {self.facts} facts, {self.batch_size} at a time, about {duration(self.stream_seconds)} "
                f"for each of three editors; and training on streams of {batches}×{size} facts, presented {times} "
                f"times, about {duration(self.update_seconds)} a policy update")


QUICK = Sizes(4, 2, (2, 2, 1), 8, update_seconds=0.1, stream_seconds=1.0)
# Times in presentations of a fact to the agent that ships; "The demo on any machine" in benchmarks/NOTES.md has the
# measurements.
EDITED = 8.0  # of a fact of the stream: presented until it takes, and scored
TRAINED = 1.0  # of a presentation in training, with its share of the reward's gradient
GATHERED = 0.5  # of a fact whose moments are gathered
UPDATES = 12  # policy updates that there should be time for
REPORT = 10.0  # seconds for tables and figures


def sizes_for(step: float, left: float) -> Sizes:
    """The sizes that fit.

    Args:
        step: seconds that one presentation of a fact takes.
        left: seconds that are left.
    """
    facts = next((n for n in (100, 60, 40, 20, 10) if 3 * n * EDITED * step <= 0.5 * left), 5)
    gathered = next((n for n in (100, 60, 40) if n * GATHERED * step <= 0.1 * left), 20)
    stream = facts * EDITED * step
    for_training = left - 3 * stream - gathered * GATHERED * step - REPORT
    streams = ((4, 20, 5), (3, 20, 3), (2, 10, 3), (2, 5, 3))
    updates = [batches * size * times * TRAINED * step for batches, size, times in streams]
    chosen = next((i for i, update in enumerate(updates) if UPDATES * update <= for_training), len(streams) - 1)
    return Sizes(facts, min(20, max(5, facts // 2)), streams[chosen], gathered, updates[chosen], stream)


def make_env(lm: EditableLM, data: Any, batches: int, size: int, token: str = "subject", **more: Any) -> Any:
    return gym.make(
        f"rledit_env:{ENV_ID}", model=lm, data=data, num_batches=batches, batch_size=size, token=token,
        array_backend="torch", disable_env_checker=True, **more,
    )  # fmt: skip


def first_editor(settings: Settings) -> tuple[str, EditableLM, Any, dict[str, Any]]:
    """An editor that needs no training here: its name, the model, the editor, and how it has facts presented."""
    if settings.model == MODEL and not settings.quick:
        folder = find_agent("default", "counterfact")
        trained = agent_settings(folder)["environment"]
        presented = {k: trained[k] for k in ("token", "steps_per_batch", "present_until", "contexts") if k in trained}
        return "the agent that ships", EditableLM.load(MODEL, trained["edit_modules"]), load_agent(folder), presented
    lm = EditableLM.load("tiny-llama" if settings.quick else settings.model)
    sizes = QUICK if settings.quick else replace(QUICK, training=(1, 20, 1), gathered=100)
    rule = new_agent(lm, settings, sizes).learn(0, progress_bar=False)
    return "the rule at first", lm, rule, {"token": "subject", "steps_per_batch": 8, "present_until": 0.8}


def show_facts(lm: EditableLM, name: str, editor: Any, presented: dict[str, Any], texts: Any, clock: Clock
               ) -> tuple[reporting.Table, float]:  # fmt: skip
    """Edit the facts of ``SHOWN`` and print what the model says before and after.

    Returns:
        The table of the answers, and the seconds that one presentation of a fact took.
    """
    fields = ("prompt", "target_new", "ground_truth", "subject", "rephrase_prompt", "locality_prompt",
              "locality_ground_truth")  # fmt: skip
    facts = load_knowledge("counterfact", [dict(zip(fields, fact, strict=False)) for fact in SHOWN])
    questions = [q for record, (*_, message) in zip(facts, SHOWN, strict=True) for q in questions_of(record, message)]
    before = ask(lm, questions)
    clock.say(f"editing {len(facts)} facts with {name}")
    log = edit_facts(lm, editor, facts, len(facts), **presented)
    answers = reporting.question_table(questions, before, ask(lm, questions))
    kl = {text: drift.kl for text, drift in drifts(lm, texts).items()}
    print(f"\n{reporting.text_table(*answers, widest=44)}\n\n{log.seconds_per_fact:.1f} s a fact. KL from the unedited "
          f"model, in nats a token: {kl['self']:.3f} on its own text, {kl['human']:.3f} on human text.\n")
    return answers, log.seconds / sum(log.presentations)


def new_agent(lm: EditableLM, settings: Settings, sizes: Sizes) -> RLEditAgent:
    """An agent that starts as a rule, recursive least squares with a prior on the keys of text, and learns to improve
    on it: the recipe of the agents that ship, on smaller streams."""
    batches, size, times = sizes.training
    # To save time, only the last presentation of a batch is scored, and the model writes 16 texts of its own to keep.
    reward = replace(RewardConfig.keeping("counterfact"), every_step=False)
    reward = reward.replace("own_text", reward.components["own_text"][0], OwnText(passages=4, pool=16))
    env = make_env(lm, training_facts(), batches, size, steps_per_batch=times, reward=reward, reward_gradient=True)
    tokens = 1024 if settings.quick else 65_536
    rule = HypernetworkConfig(step_size=1.4e-3, prior=1000.0, prior_source="text", text_tokens=tokens)
    config = RLEditConfig(rule, prior_batches=max(1, sizes.gathered // size), policy_average=0.8)
    agent = RLEditAgent(env, config, seed=settings.seed)
    start_from_text(agent.network, lm)  # ships for smollm2-135m; for other models the time is said beforehand
    return agent


def training_facts(kept_back: bool = False) -> KnowledgeDataset:
    """The bundled training facts without every tenth, or every tenth alone, which is kept back to choose the policy."""
    facts = load_knowledge("counterfact", "bundled", "train")
    return replace(facts, records=tuple(r for i, r in enumerate(facts.records) if (i % 10 == 0) == kept_back))


def train(agent: RLEditAgent, check_env: Any, seconds: float, check_every: int, out: Path) -> None:
    """Train for the given time, and give the agent the best policy: the rule, or one that scored better on the facts of
    ``check_env``, on which the rule and every few updates are tried."""
    started = last = time.monotonic()
    longest = 0.0  # seconds of an update with a check
    bar = tqdm(total=round(seconds), bar_format="training {percentage:3.0f}%|{bar}|{postfix}", disable=None)

    def updated(numbers: dict[str, float]) -> bool:
        """The agent's callback after each update; returns False once another one would take too long."""
        nonlocal last, longest
        now = time.monotonic()
        last, longest = now, max(longest, now - last)
        bar.n = min(bar.total, round(now - started))
        bar.set_postfix_str(f"update {agent.updates}, return {numbers.get('return', float('nan')):.1f}")
        return now + longest < started + seconds

    remove_run(out)  # of an earlier demo
    try:
        agent.learn(10**9, updated, False, log_dir=out, eval_env=check_env, eval_every=check_every, patience=10**9)
    except KeyboardInterrupt:
        tqdm.write("training stopped by hand; editing with the best policy so far")
        if agent.progress.best is not None:
            agent.load_policy_state(agent.progress.best)
    finally:
        bar.close()


def what_it_shows(above: list[float], updates: int, sizes: Sizes) -> str:
    """What so many policy updates show and what they cannot show.

    Args:
        above: by how much the mean score of each fact is higher after the training, in points.
        updates: the number of policy updates.
        sizes: the sizes of the training streams.
    """
    if not updates:
        return "There was no time to train on this machine; --minutes 30 gives more."
    batches, size, times = sizes.training
    low, high = reporting.bootstrap_interval(above)
    change = (f"by {sum(above) / len(above):+.1f} points (95 % interval over the {len(above)} facts: {low:+.1f} to "
              f"{high:+.1f})")
    if not any(above):
        finding = "changed no score: no policy was better than the rule on the facts that were kept back"
    elif low > 0 or high < 0:
        finding = f"changed the mean score {change}, more than the choice of facts explains"
    else:
        finding = f"changed the mean score {change}, no more than the choice of facts may explain"
    return (f"Training ({updates} policy updates on streams of {batches}×{size} facts presented {times} times) "
            f"{finding}. The agents that ship had 10 to 60 updates on streams of 80 to 100 facts. Fewer and smaller "
            "ones show that training runs and which way it goes, not how good an agent becomes.")


def main(settings: Settings) -> None:
    reporting.flush_lines()
    warnings.filterwarnings("ignore", category=UserWarning, module="gymnasium")
    try_or_exit([growing("--out", settings.out, "demo", ("training/", "agent/"))])
    settings.out.mkdir(parents=True, exist_ok=True)
    mark(settings.out, "demo")  # so that the next demo may overwrite the folder
    clock = Clock(60 * (settings.minutes or (0.25 if settings.quick else 12)))

    # Six facts, asked in four ways before and after.
    clock.say("loading the model")
    first, lm, editor, presented = first_editor(settings)
    clock.say("asking the unedited model, which also writes the text on which its divergence is measured")
    passages = 2 if settings.quick else 12
    texts = {"self": self_text(lm, OPENINGS[:passages]), "human": human_text(lm, passages=passages)}
    answers, step = show_facts(lm, first, editor, presented, texts, clock)

    # A stream of facts, edited by the first editor and by the rule that training starts from.
    sizes = QUICK if settings.quick else sizes_for(step, clock.left)
    clock.expect(max(clock.left, 3 * sizes.stream_seconds + REPORT))
    clock.say(f"presenting a fact once takes {step:.2g} s here; there is time for {sizes}")
    facts = load_knowledge("counterfact", "bundled", "eval")
    env = make_env(lm, facts, sizes.facts // sizes.batch_size, sizes.batch_size, reward="none", **presented)
    stream = SameStream(env, texts, settings.seed)
    clock.say(f"editing {len(stream.facts)} facts with {first}: {facts.source}")
    began = time.monotonic()
    stream.edit(first, editor)
    clock.expect(max(clock.left, 2 * (time.monotonic() - began) + REPORT))
    clock.say("editing the same facts with the rule that training starts from")
    agent = new_agent(lm, settings, sizes).learn(0, progress_bar=False)
    began = time.monotonic()
    stream.edit("the rule", agent)
    afterwards = time.monotonic() - began + (0 if settings.quick else REPORT)  # seconds that follow the training

    # Training for the time that is left, and the same facts again.
    last_check = sizes.batch_size * EDITED * step  # seconds that trying the last policy takes
    seconds = max(clock.left - afterwards - last_check, 1.0 if settings.quick else 0.0)
    if seconds > sizes.update_seconds:
        clock.say(f"training for {duration(seconds)}; Ctrl-C means: enough")
        check_env = make_env(lm, training_facts(kept_back=True), 1, sizes.batch_size, reward="none", **presented)
        train(agent, check_env, seconds, max(4, int(seconds / sizes.update_seconds / 3)), settings.out / "training")
    agent.save(settings.out / "agent")
    clock.expect(afterwards)
    trained = f"after {agent.updates} update" + ("s" if agent.updates != 1 else "")
    clock.say(f"editing the same facts {trained} of the policy")
    stream.edit(trained, agent)

    finding = what_it_shows(stream.above(trained, "the rule"), agent.updates, sizes)
    print(f"\nAfter all {len(stream.facts)} edits, in percent, and KL in nats a token:\n"
          f"{reporting.text_table(*reporting.score_table(stream.scores))}\n\n{finding}")
    lead = (f"{first[0].upper()}{first[1:]} edits {len(SHOWN)} facts and then {len(stream.facts)} others into "
            f"{lm.name}. Then a new agent is trained.")
    if settings.quick:
        lead += " A quick run on a tiny random model: it shows that everything runs, and nothing else."
    measured = reporting.Measured(stream.retention, stream.module_drift, stream.general, finding)
    page = reporting.editing_report(
        lead, stream.scores, answers, reporting.read_curves(settings.out / "training"), stream.drifts,
        {**asdict(settings), "seconds_a_presentation": f"{step:.3g}", **asdict(sizes)}, facts.source, measured,
    )  # fmt: skip
    print(f"\ntrained agent: {settings.out / 'agent'}\nreport: {page.write(settings.out / 'report.html')}")
    print(f"{duration(clock.elapsed)} in total")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
