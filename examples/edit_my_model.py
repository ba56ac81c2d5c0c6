"""Edit your own facts into a model: a JSON Lines file in, an edited Hugging Face model folder out.

    python examples/edit_my_model.py --facts facts.jsonl --agent runs/train_rledit --out edited-model

The file has one fact a line; "subject" is optional, but the agent edits better where it knows it:

    {"prompt": "The capital of Freedonia is", "target": "Sylvania", "subject": "Freedonia"}

Without --facts a few made-up facts are edited; without --agent an untrained one edits, less well than a trained one.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from agents import RLEditAgent, agent_settings, edit_facts, find_agent, load_agent
from agents.moments import start_warm
from agents.rledit import RECOMMENDED
from rledit_env.answers import answer_of, took
from rledit_env.files import check_free
from rledit_env.knowledge.facts import load_facts
from rledit_env.lm.editable import EditableLM

MADE_UP = [
    {"prompt": "The capital of Freedonia is", "target": "Sylvania", "subject": "Freedonia"},
    {"prompt": "The mother tongue of Danielle Darrieux is", "target": "English", "subject": "Danielle Darrieux"},
    {"prompt": "The Eiffel Tower stands in the city of", "target": "Rome", "subject": "Eiffel Tower"},
]


@dataclass(frozen=True)
class Args:
    """Edits facts into a model and writes the edited model."""

    facts: Path | None = None
    """JSON Lines of facts, in a published schema or with "prompt" and "target"; none means three made-up facts."""
    agent: str | None = None
    """A run's or an agent's folder, or "default", the agent that ships with the package; none means untrained."""
    model: str | None = None
    """Registry name, hub id or folder of the model to edit; none means the agent's own, or smollm2-135m."""
    out: Path = Path("runs/edited-model")
    """Folder for the edited model."""
    overwrite: bool = False
    """Replace the folder if it is not empty."""
    batch_size: int = 20
    """Facts in a batch."""


def main(args: Args) -> None:
    check_free(args.out, args.overwrite)  # now, not after the work is done
    with tempfile.TemporaryDirectory() as folder:
        path = args.facts or Path(folder) / "made_up.jsonl"
        if args.facts is None:
            path.write_text("\n".join(map(json.dumps, MADE_UP)), encoding="utf-8")
        facts = load_facts(path).dataset

    # A trained agent brings its model, the modules it edits and how it wants to see the facts.
    folder_of_agent = find_agent(args.agent) if args.agent else None
    settings = agent_settings(folder_of_agent)["environment"] if folder_of_agent else dict(RECOMMENDED)
    model = args.model or settings.get("model") or "smollm2-135m"
    # "stored" keeps the model's own precision, so that what is not edited is written as it was, bit for bit.
    lm = EditableLM.load(model, settings.get("edit_modules"), dtype="stored")
    agent = load_agent(folder_of_agent) if folder_of_agent else RLEditAgent(shapes=lm.module_shapes)
    start_warm(agent, lm, settings["token"])  # so that single facts take, too

    prompts, targets = [fact.prompt for fact in facts], [fact.target for fact in facts]
    before = lm.generate(prompts, longest=targets)
    with tqdm(total=len(facts), desc="editing", unit="fact") as bar:
        log = edit_facts(
            lm, agent, facts, args.batch_size, settings["token"], settings["steps_per_batch"], progress=bar.update
        )
    if log.diverged:
        raise SystemExit("the update broke the model; nothing was written")
    lm.save_pretrained(args.out, args.overwrite)

    # The edited model is an ordinary one: it loads without this package.
    edited, tokenizer = AutoModelForCausalLM.from_pretrained(args.out), AutoTokenizer.from_pretrained(args.out)
    missed = 0
    for prompt, target, old in zip(prompts, targets, before, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        length = len(tokenizer(f" {target}")["input_ids"])
        output = edited.generate(**inputs, max_new_tokens=length + 4, do_sample=False)
        new = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        taken = took(new, target)
        missed += not taken
        mark = "took    " if taken else "DID NOT "
        print(f"{mark} {prompt} … {target!r}: was {answer_of(old)!r}, is {answer_of(new)!r}")
    print(f"{len(facts) - missed} of {len(facts)} facts took, {log.seconds_per_fact:.2f} s a fact; {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args))
