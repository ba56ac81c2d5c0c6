"""Edit your own facts into a model: a JSON Lines file in, an edited Hugging Face model folder out.

    python examples/edit_my_model.py --facts facts.jsonl --model owner/name --out edited-model
    python examples/edit_my_model.py --facts facts.jsonl --agent runs/train_rledit --out edited-model

The file has one fact a line; "subject" is optional, but the agent edits better where it knows it:

    {"prompt": "The capital of Freedonia is", "target": "Sylvania", "subject": "Freedonia"}

Without --facts a few made-up facts are edited; without --agent an editor that needs no training edits, whose step size
is found on a few of the facts.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import rledit_env.own_agents  # noqa: F401 - says so where another package is called agents
from agents import Agent, agent_settings, edit_facts, find_agent, load_agent
from agents.comparison import Views
from agents.editors import configured, find_configs, find_editor, load_configs, with_step_size
from agents.saved import modules_of
from agents.strength import StrengthProbe, some_facts
from rledit_env.answers import answer_of, took
from rledit_env.env import LifelongEditEnv
from rledit_env.knowledge import KnowledgeDataset
from rledit_env.knowledge.facts import load_facts
from rledit_env.lm.editable import EditableLM
from rledit_env.outputs import Input, try_or_exit, whole

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
    """A run's or an agent's folder, or "default", the agent that ships for smollm2-135m; none means --editor."""
    editor: str = "ultraedit"
    """An editor that edits without training: a name that `rledit edit --help` lists."""
    model: str | None = None
    """Registry name, hub id or folder of the model to edit; none means the agent's own, or smollm2-135m."""
    out: Path = Path("runs/edited-model")
    """Folder for the edited model."""
    overwrite: bool = False
    """Replace the folder if it is not empty and rledit wrote all that is in it."""
    batch_size: int = 20
    """Facts in a batch."""


def environment(lm: EditableLM, facts: KnowledgeDataset) -> LifelongEditEnv:
    """What an agent is built in; `edit_facts` makes its own for each part of the facts."""
    return LifelongEditEnv(
        facts.kind, lm, data=facts, num_batches=1, batch_size=1, reward="none", array_backend="torch"
    )


def trained_agent(args: Args, facts: KnowledgeDataset) -> tuple[EditableLM, Agent, dict[str, Any]]:
    """A trained agent brings its model, the modules it edits and how it wants to see the facts."""
    folder = find_agent(args.agent)
    settings = agent_settings(folder)["environment"]
    model = args.model or settings["model"]
    # "stored" keeps the model's own precision, so that what is not edited is written as it was, bit for bit.
    with modules_of(folder, model):
        lm = EditableLM.load(model, settings["edit_modules"], dtype="stored")
    return lm, load_agent(folder, environment(lm, facts)), settings


def training_free_editor(args: Args, facts: KnowledgeDataset) -> tuple[EditableLM, Agent, dict[str, Any]]:
    """An editor without training edits any model; how strongly it must, a few of the facts tell."""
    model = args.model or "smollm2-135m"
    editor = configured(find_editor(args.editor), load_configs(find_configs(model), facts.kind))
    lm = Views(model, dtype="stored").of(editor)
    settings = {"steps_per_batch": 1, **editor.env}
    if editor.step_size:
        probe = StrengthProbe(lm, editor, some_facts(facts), settings["token"], args.batch_size, progress=print)
        chosen = probe.search(editor.presentations).chosen
        editor = with_step_size(editor, chosen.step_size, chosen.steps_per_batch)
        settings["steps_per_batch"] = chosen.steps_per_batch
    return lm, editor.agent_class()(environment(lm, facts), editor.configuration()).learn(0), settings


def main(args: Args) -> None:
    # What cannot be written, or would be lost, is found now, not after the work is done.
    read = {"the facts": args.facts, "the agent": args.agent, "the model": args.model}
    inputs = [Input(name, Path(path)) for name, path in read.items() if path and Path(path).exists()]
    try_or_exit([whole("--out", args.out, args.overwrite)], inputs)
    with tempfile.TemporaryDirectory() as folder:
        path = args.facts or Path(folder) / "made_up.jsonl"
        if args.facts is None:
            path.write_text("\n".join(map(json.dumps, MADE_UP)), encoding="utf-8")
        facts = load_facts(path).dataset

    lm, agent, settings = trained_agent(args, facts) if args.agent else training_free_editor(args, facts)

    prompts, targets = [fact.prompt for fact in facts], [fact.target for fact in facts]
    before = lm.generate(prompts, longest=targets)
    with tqdm(total=len(facts), desc="editing", unit="fact") as bar:
        log = edit_facts(
            lm, agent, facts, args.batch_size, settings["token"], settings["steps_per_batch"], progress=bar.update
        )
    if log.diverged:
        raise SystemExit("the update broke the model; nothing was written")
    after = lm.generate(prompts, longest=targets)
    taken = [took(answer, target) for answer, target in zip(after, targets, strict=True)]
    for prompt, target, old, new, is_taken in zip(prompts, targets, before, after, taken, strict=True):
        mark = "took    " if is_taken else "DID NOT "
        print(f"{mark} {prompt} … {target!r}: was {answer_of(old)!r}, is {answer_of(new)!r}")
    print(f"{sum(taken)} of {len(facts)} facts took, {log.seconds_per_fact:.2f} s a fact", flush=True)

    # The edited model is an ordinary one: it loads without this package.
    lm.save_pretrained(args.out, args.overwrite)
    edited, tokenizer = AutoModelForCausalLM.from_pretrained(args.out), AutoTokenizer.from_pretrained(args.out)
    output = edited.generate(**tokenizer(prompts[0], return_tensors="pt"), max_new_tokens=8, do_sample=False)
    print(f"written: {args.out}; loaded again it says: {tokenizer.decode(output[0], skip_special_tokens=True)}")


if __name__ == "__main__":
    main(tyro.cli(Args))
