"""How well single facts take, each alone from the pre-trained weights, with an agent and the defaults of `rledit edit`.

    python benchmarks/lone_facts.py --data ../shared/data/counterfact_eval.jsonl
    python benchmarks/lone_facts.py --data bundled

The first facts of the evaluation split are edited one by one, the weights restored in between. Beside what took stands
what else changed: the mean divergence from the unedited model on text that it wrote (KL, in nats a token).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import tyro
from tqdm import tqdm

from agents import agent_settings, edit_facts, find_agent, load_agent
from rledit_env.answers import is_exact, took
from rledit_env.files import write_text
from rledit_env.general.self_text import OPENINGS, self_drift, self_text
from rledit_env.knowledge import load_knowledge
from rledit_env.lm.editable import EditableLM
from rledit_env.metrics import continuations

TEXTS = 8  # of the model's own, which show what else changed


@dataclass(frozen=True)
class Args:
    """Edits facts alone, one after the other; prints what took."""

    data: str = "bundled"
    """As the environment's: a file, a folder, a hub id or "bundled"."""
    kind: str = "counterfact"
    """Whose facts."""
    facts: int = 50
    """How many: the first of the evaluation split."""
    agent: str = "default"
    """The agent's folder, or a run's."""
    dtype: str = "stored"
    """Precision of the frozen weights."""
    out: Path | None = None
    """A JSON file for the results of every fact."""


def edit_alone(args: Args) -> list[dict[str, Any]]:
    """Each fact's result: what the model answers, whether it took and matches exactly, the drift and KL."""
    folder = find_agent(args.agent)
    settings = agent_settings(folder)["environment"]
    lm = EditableLM.load(settings["model"], settings["edit_modules"], args.dtype)
    agent = load_agent(folder)
    dataset = load_knowledge(args.kind, args.data, split="eval")
    text = self_text(lm, OPENINGS[:TEXTS])
    results = []
    for record in tqdm(dataset.records[: args.facts], "editing single facts", unit="fact"):
        alone = replace(dataset, records=(record,))
        log = edit_facts(lm, agent, alone, 1, settings["token"], settings["steps_per_batch"])
        [answer] = continuations(lm, [record])
        results.append({
            "prompt": record.prompt, "target": record.target, "answer": answer, "took": took(answer, record.target),
            "exact": is_exact(answer, record.target), "drift": log.drift, "kl": self_drift(lm, text).kl,
        })  # fmt: skip
    return results


def main(args: Args) -> None:
    results = edit_alone(args)
    for one in results:
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
