"""How many facts take if each is edited alone into the unedited model, by an agent with the defaults of `rledit edit`.

    python benchmarks/lone_facts.py --data ../shared/data/counterfact_eval.jsonl
    python benchmarks/lone_facts.py --data bundled
    python benchmarks/lone_facts.py --facts 12 --batch-size 12  # the same facts in one batch
    python benchmarks/lone_facts.py --facts 10 --stream         # one after the other, without restoring the weights

The first facts of the evaluation split are edited batch by batch. Without --stream the weights are restored before each
batch. Whether a fact took is decided right after its batch. KL, in nats a token, is the mean divergence from the
unedited model on text that it wrote.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import tyro
from tqdm import tqdm

import rledit_env.own_agents  # noqa: F401 - checks that `agents` is this package
from agents import agent_settings, edit_stream, find_agent, load_agent
from rledit_env.answers import is_exact, took
from rledit_env.cli.editor_options import MAX_PRESENTATIONS, PRESENT_UNTIL
from rledit_env.env import LifelongEditEnv
from rledit_env.evaluation.metrics import continuations
from rledit_env.files import write_text
from rledit_env.knowledge import load_knowledge
from rledit_env.lm.editable import EditableLM
from rledit_env.self_text import OPENINGS, self_drift, self_text

TEXTS = 8  # of the unedited model, for the divergence


@dataclass(frozen=True)
class Args:
    """Edits facts, each alone by default, and prints how many took."""

    data: str = "bundled"
    """A file, a folder, a hub id or "bundled"."""
    kind: str = "counterfact"
    """Form of the facts."""
    facts: int = 50
    """Number of facts, the first of the evaluation split."""
    batch_size: int = 1
    """Facts edited at once."""
    stream: bool = False
    """Keep the weights and the agent's memory from batch to batch."""
    agent: str = "default"
    """Folder of an agent or a run, or "default"."""
    dtype: str = "stored"
    """Precision of the frozen weights."""
    out: Path | None = None
    """JSON file for the results of each fact."""


def edit(args: Args) -> list[dict[str, Any]]:
    """The result of each fact: the model's answer, whether it took and is exact, and the drift and KL of its batch."""
    folder = find_agent(args.agent, args.kind)
    settings = agent_settings(folder)["environment"]
    repeated = settings["steps_per_batch"] > 1
    presentation = {"present_until": PRESENT_UNTIL, "steps_per_batch": MAX_PRESENTATIONS} if repeated else {}
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
            array_backend="torch", token=settings["token"], contexts=settings.get("contexts", 0), **presentation,
        )  # fmt: skip
        agent.set_env(env)
        if not args.stream:
            agent.reset()
        options = {"indices": list(range(len(batch))), "keep_weights": args.stream}
        log = edit_stream(env, agent, seed=0, options=options)
        kl = self_drift(lm, text).kl
        for record, answer in zip(batch, continuations(lm, batch), strict=True):
            results.append({
                "prompt": record.prompt, "target": record.target, "answer": answer,
                "took": took(answer, record.target), "exact": is_exact(answer, record.target),
                "update_norm": log.update_norms[0], "drift": log.drift, "kl": kl,
            })  # fmt: skip
        bar.set_postfix_str(f"{sum(result['took'] for result in results)} of {len(results)} took")
    return results


def main(args: Args) -> None:
    results = edit(args)
    for number, fact in enumerate(results, start=1):
        if args.stream:
            print(f"fact {number}: {'took' if fact['took'] else 'did not take'}, update {fact['update_norm']:.2f}")
        if not fact["took"]:
            print(f"did not take: {fact['prompt']!r}, wanted {fact['target']!r}, answers {fact['answer']!r}")
    taken, exact = (sum(fact[key] for fact in results) for key in ("took", "exact"))
    drift, kl = ([fact[key] for fact in results] for key in ("drift", "kl"))
    print(f"{taken} of {len(results)} took, {exact} exact matches; "
          f"drift {fmean(drift):.4f}, KL {fmean(kl):.4f}, at most {max(kl):.4f}")
    if args.out is not None:
        write_text(args.out, json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
