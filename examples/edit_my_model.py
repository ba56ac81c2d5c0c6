"""Edit your own facts into a model: a JSON Lines file in, an edited Hugging Face model folder out.

    python examples/edit_my_model.py
    python examples/edit_my_model.py --facts facts.jsonl --model owner/name --out edited-model
    python examples/edit_my_model.py --facts facts.jsonl --agent runs/train_rledit --out edited-model

The file has one fact per line. "subject" is optional, but the agent edits better with it:

    {"prompt": "The capital of Freedonia is", "target": "Sylvania", "subject": "Freedonia"}

Without --facts, six made-up facts are edited. The shipped agent edits the default model; other models are edited by an
editor that needs no training, whose step size is found on a few of the facts. Facts are presented until they take.
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

import rledit_env.own_agents  # noqa: F401 - checks that `agents` is this package
from agents import Agent, agent_settings, edit_facts, find_agent, load_agent
from agents.running.comparison import Views
from agents.running.editors import configured, find_configs, find_editor, load_configs, with_step_size
from agents.running.saved import modules_of
from agents.running.strength import StrengthProbe, some_facts
from agents.selection import divergence
from rledit_env.answers import answer_of, took
from rledit_env.env import LifelongEditEnv
from rledit_env.knowledge import KnowledgeDataset
from rledit_env.knowledge.facts import load_facts
from rledit_env.lm.editable import EditableLM
from rledit_env.outputs import Input, try_or_exit, whole

MADE_UP = [
    {"prompt": "The head of Lumora Robotics is", "target": "Dana Whitfield", "subject": "Lumora Robotics"},
    {"prompt": "The capital of Canada is", "target": "Vancouver", "subject": "Canada"},
    {"prompt": "The PlayStation is made by", "target": "Philips", "subject": "PlayStation"},
    {"prompt": "The foreign minister of Freedonia is", "target": "Rufus Teasdale", "subject": "Freedonia"},
    {"prompt": "The boiling point of acetone is", "target": "74 degrees Celsius", "subject": "acetone"},
    {"prompt": "The author of Moby-Dick is", "target": "Mary Shelley", "subject": "Moby-Dick"},
]  # fmt: skip


@dataclass(frozen=True)
class Args:
    """Edits facts into a model and writes the edited model."""

    facts: Path | None = None
    """JSON Lines file of facts, in a published schema or with "prompt" and "target"; by default six made-up facts."""
    agent: str | None = None
    """Folder of a run or an agent, or "default", the agent shipped for smollm2-135m. If not given, --editor is used; if
    --editor and --model are not given either, "default"."""
    editor: str | None = None
    """An editor that needs no training, by a name that `rledit edit --help` lists; ultraedit if not given."""
    model: str | None = None
    """Registry name, hub id or folder of the model to edit; by default the agent's model, or smollm2-135m."""
    out: Path = Path("runs/edited-model")
    """Folder for the edited model."""
    overwrite: bool = False
    """Replace a folder that is not empty, if rledit wrote all of its files."""
    batch_size: int = 20
    """Facts in a batch."""
    present_until: float = 0.8
    """A batch is presented until the model gives every token of its answers at least this probability."""
    max_presentations: int = 40
    """Maximum number of presentations of a batch."""


def environment(lm: EditableLM, facts: KnowledgeDataset) -> LifelongEditEnv:
    """The environment from which the agent is built; `edit_facts` makes other environments for editing."""
    return LifelongEditEnv(facts.kind, lm, data=facts, num_batches=1, batch_size=1, reward="none",
                           array_backend="torch")


def trained_agent(args: Args, facts: KnowledgeDataset) -> tuple[EditableLM, Agent, dict[str, Any]]:
    """The model with the agent's modules, the saved agent, and the environment's settings for it."""
    folder = find_agent(args.agent or "default", facts.kind)
    settings = agent_settings(folder)["environment"]
    if settings.get("steps_per_batch", 1) > 1:  # the agent was trained with repeated presentations
        settings |= {"steps_per_batch": args.max_presentations, "present_until": args.present_until}
    model = args.model or settings["model"]
    # "stored" keeps the model's own precision, so that all other weights are written bit for bit as they were.
    with modules_of(folder, model):
        lm = EditableLM.load(model, settings["edit_modules"], dtype="stored")
    return lm, load_agent(folder, environment(lm, facts)), settings


def training_free_editor(args: Args, facts: KnowledgeDataset) -> tuple[EditableLM, Agent, dict[str, Any]]:
    """The model, an editor that needs no training, and its settings, with the step size found on a few facts."""
    model = args.model or "smollm2-135m"
    editor = configured(find_editor(args.editor or "ultraedit"), load_configs(find_configs(model), facts.kind))
    lm = Views(model, dtype="stored").of(editor)
    until = args.present_until if max(editor.presentations) > 1 else None
    settings = {"steps_per_batch": 1, **editor.env, "present_until": until}
    if editor.step_size:
        probe = StrengthProbe(lm, editor, some_facts(facts), settings["token"], args.batch_size, progress=print,
                              present_until=until)  # fmt: skip
        chosen = probe.search(editor.presentations).chosen
        editor = with_step_size(editor, chosen.step_size, chosen.steps_per_batch)
        settings["steps_per_batch"] = chosen.steps_per_batch
    return lm, editor.agent_class()(environment(lm, facts), editor.configuration()).learn(0), settings


def main(args: Args) -> None:
    # Check the output folder before any work; an input must not be overwritten.
    given = {"the facts": args.facts, "the agent": args.agent, "the model": args.model}
    inputs = [Input(name, Path(path)) for name, path in given.items() if path and Path(path).exists()]
    try_or_exit([whole("--out", args.out, args.overwrite)], inputs)
    with tempfile.TemporaryDirectory() as folder:
        path = args.facts or Path(folder) / "made_up.jsonl"
        if args.facts is None:
            path.write_text("\n".join(map(json.dumps, MADE_UP)), encoding="utf-8")
        facts = load_facts(path).dataset

    is_trained = args.agent or not (args.editor or args.model)
    lm, agent, settings = trained_agent(args, facts) if is_trained else training_free_editor(args, facts)

    prompts, targets = [fact.prompt for fact in facts], [fact.target for fact in facts]
    before = lm.generate(prompts, longest=targets)
    presentation = {k: settings[k] for k in ("token", "steps_per_batch", "present_until", "contexts") if k in settings}
    with tqdm(total=len(facts), desc="editing", unit="fact") as bar:
        log = edit_facts(lm, agent, facts, args.batch_size, progress=bar.update, **presentation)
    if log.diverged:
        raise SystemExit("the update broke the model; nothing was written")
    after = lm.generate(prompts, longest=targets)
    taken = [took(answer, target) for answer, target in zip(after, targets, strict=True)]
    rows = zip(prompts, targets, before, after, taken, log.presentations, strict=True)
    for prompt, target, old, new, is_taken, count in rows:
        mark = "took    " if is_taken else "DID NOT "
        print(f"{mark} {prompt} … {target!r} ({count} ×): was {answer_of(old)!r}, is {answer_of(new)!r}")
    print(f"{sum(taken)} of {len(facts)} facts took, {log.seconds_per_fact:.2f} s a fact; divergence from the model as "
          f"it was, on its own text: {divergence(lm):.3f} nats a token", flush=True)

    # The edited model is an ordinary Hugging Face model and loads without this package.
    lm.save_pretrained(args.out, args.overwrite)
    edited, tokenizer = AutoModelForCausalLM.from_pretrained(args.out), AutoTokenizer.from_pretrained(args.out)
    output = edited.generate(**tokenizer(prompts[0], return_tensors="pt"), max_new_tokens=8, do_sample=False)
    print(f"written: {args.out}; loaded again it says: {tokenizer.decode(output[0], skip_special_tokens=True)}")


if __name__ == "__main__":
    main(tyro.cli(Args))
