"""How well single facts take, each alone from the pre-trained weights, with an agent and the defaults of `rledit edit`.

    python benchmarks/lone_facts.py --data ../shared/data/counterfact_eval.jsonl
    python benchmarks/lone_facts.py --data bundled
    python benchmarks/lone_facts.py --facts 12 --batch-size 12  # the same facts in one batch
    python benchmarks/lone_facts.py --facts 10 --stream         # one after the other, none forgotten in between

The first facts of the evaluation split are edited batch by batch, the weights restored in between (but with --stream).
What took is decided right after each batch. Beside it stands what else changed: the mean divergence from the unedited
model on text that it wrote (KL, in nats a token).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import tyro
from tqdm import tqdm

import rledit_env.own_agents  # noqa: F401 - says so where another package is called agents
from agents import agent_settings, edit_stream, find_agent, load_agent
from rledit_env.answers import is_exact, took
from rledit_env.cli.editing import MAX_PRESENTATIONS, PRESENT_UNTIL
from rledit_env.env import LifelongEditEnv
from rledit_env.evaluation.general.self_text import OPENINGS, self_drift, self_text
from rledit_env.evaluation.metrics import continuations
from rledit_env.files import write_text
from rledit_env.knowledge import load_knowledge
from rledit_env.lm.editable import EditableLM

TEXTS = 8  # of the model's own, which show what else changed


@dataclass(frozen=True)
class Args:
    """Edits facts, each alone unless said otherwise; prints what took."""

    data: str = "bundled"
    """As the environment's: a file, a folder, a hub id or "bundled"."""
    kind: str = "counterfact"
    """Whose facts."""
    facts: int = 50
    """How many: the first of the evaluation split."""
    batch_size: int = 1
    """Facts edited at once."""
    stream: bool = False
    """Keep the weights and the agent's memory from batch to batch."""
    agent: str = "default"
    """The agent's folder, or a run's."""
    dtype: str = "stored"
    """Precision of the frozen weights."""
    out: Path | None = None
    """A JSON file for the results of every fact."""


def edit(args: Args) -> list[dict[str, Any]]:
    """Each fact's result: what the model answers, whether it took and matches exactly, and its batch's drift and KL."""
    folder = find_agent(args.agent, args.kind)
    settings = agent_settings(folder)["environment"]
    repeated = settings["steps_per_batch"] > 1
    presented = {"present_until": PRESENT_UNTIL, "steps_per_batch": MAX_PRESENTATIONS} if repeated else {}
    lm = EditableLM.load(settings["model"], settings["edit_modules"], args.dtype)
    agent = load_agent(folder)
    agent.reset()
    dataset = load_knowledge(args.kind, args.data, split="eval")
    records = dataset.records[: args.facts]
    text = self_text(lm, OPENINGS[:TEXTS])
    results: list[dict[str, Any]] = []
    bar = tqdm(range(0, len(records), args.batch_size), "editing", unit="batch")
    for start in bar:
        batch = records[start : start + args.batch_size]
        env = LifelongEditEnv(
            args.kind, lm, data=replace(dataset, records=batch), num_batches=1, batch_size=len(batch), reward="none",
            array_backend="torch", token=settings["token"], contexts=settings.get("contexts", 0), **presented,
        )  # fmt: skip
        if not args.stream:
            agent.reset()
        kept = {"indices": list(range(len(batch))), "keep_weights": args.stream}
        log = edit_stream(env, agent, seed=0, options=kept)
        kl = self_drift(lm, text).kl
        for record, answer in zip(batch, continuations(lm, batch), strict=True):
            results.append({
                "prompt": record.prompt, "target": record.target, "answer": answer,
                "took": took(answer, record.target), "exact": is_exact(answer, record.target),
                "update_norm": log.update_norms[0], "drift": log.drift, "kl": kl,
            })  # fmt: skip
        bar.set_postfix_str(f"{sum(one['took'] for one in results)} of {len(results)} took")
    return results


def main(args: Args) -> None:
    results = edit(args)
    for number, one in enumerate(results, start=1):
        if args.stream:
            print(f"fact {number}: {'took' if one['took'] else 'did not take'}, update {one['update_norm']:.2f}")
        if not one["took"]:
            print(f"did not take: {one['prompt']!r}, wanted {one['target']!r}, answers {one['answer']!r}")
    taken, exact = (sum(one[key] for one in results) for key in ("took", "exact"))
    drift, kl = ([one[key] for one in results] for key in ("drift", "kl"))
    print(f"{taken} of {len(results)} took, {exact} exact matches; "
          f"drift {fmean(drift):.4f}, KL {fmean(kl):.4f}, at most {max(kl):.4f}")
    if args.out is not None:
        write_text(args.out, json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
