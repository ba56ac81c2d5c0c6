"""The page: its components, and what happens on each button."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from agents.running.editors import training_free_editors
from agents.running.saved import DEFAULT
from rledit_env.lm.forms import FORMS
from rledit_env.lm.loading.registry import MODELS
from rledit_env.playground.actions import Actions
from rledit_env.playground.choice import BATCH_SIZE
from rledit_env.playground.session import MOST_TOKENS
from rledit_env.playground.sessions import Sessions
from rledit_env.playground.tables import facts_html, meter_html, status_html, waiting_html
from rledit_env.playground.view import View

TITLE = "rledit playground"
CHATS = [("as plain text", ""), ("as a chat question", "only"), ("both", "also")]
SAVED_AS = {"model": "the whole model", "delta": "the change, as a delta", "lora": "the change, as a LoRA adapter"}
HIDDEN: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}


def playground(sessions: Sessions, model: str, editor: str) -> gr.Blocks:
    """The page.

    Args:
        sessions: the sessions of its tabs.
        model, editor: what the page proposes.
    """
    actions = Actions(sessions)
    page = gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 600))  # seconds, of files loaded
    with page:
        gr.Markdown(f"# {TITLE}\nEdit facts into a language model, and see what changed. Everything stays on this "
                    "computer, and this tab has a model of its own.")
        with gr.Row():
            with gr.Column(min_width=320, scale=2):
                choice = _choice(model, editor)
                typed, waiting, facts_buttons = _facts()
            with gr.Column(min_width=320, scale=3):
                shown, undo = _results()
        asking, saving = _asking(), _saving()
        # The last in the document, so that it is in front of the others; it is at the window's lower edge.
        status = gr.HTML(status_html("Choose a model and an editor, and press Load."), elem_id="status", padding=False)
        _connect(actions, Parts(status, choice, typed, waiting, facts_buttons, shown, undo, asking, saving))
        page.unload(actions.closed)
    return page


@dataclass(frozen=True)
class Parts:
    """The page's components.

    Attributes:
        status: the message.
        choice: model, editor, chat, batch size, step size, and the button Load.
        typed: prompt, target, subject, paraphrases, neighbours.
        waiting: the facts that wait, their list, and the file.
        facts_buttons: by name, "add", "clear", "edit" and "stop".
        shown: the facts, the meter and the ledger.
        undo: the button.
        asking: text, chat, tokens, the button, and the two answers.
        saving: form, folder, and the button.
    """

    status: gr.HTML
    choice: list[Any]
    typed: list[Any]
    waiting: list[Any]
    facts_buttons: dict[str, gr.Button]
    shown: list[Any]
    undo: gr.Button
    asking: list[Any]
    saving: list[Any]


def _choice(model: str, editor: str) -> list[Any]:
    gr.Markdown("## 1. Model and editor")
    models, editors = list(MODELS), [DEFAULT, *training_free_editors()]
    return [
        gr.Dropdown(models if model in models else [model, *models], value=model, allow_custom_value=True,
                    label="Model", info="A name, a hub id owner/name, or a folder", elem_id="model"),
        gr.Dropdown(editors if editor in editors else [editor, *editors], value=editor, allow_custom_value=True,
                    label="Editor", elem_id="editor",
                    info="default is the trained agent for smollm2-135m; or a trained agent's folder"),
        *_more_choices(),
        gr.Button("Load", variant="primary", elem_id="load"),
    ]  # fmt: skip


def _more_choices() -> list[Any]:
    with gr.Accordion("More settings", open=False):
        return [
            gr.Radio(CHATS, value="", label="Facts are edited", elem_id="chat"),
            gr.Number(BATCH_SIZE, precision=0, label="Facts a batch", elem_id="batch-size",
                      info="A batch is stopped at and undone as a whole"),
            gr.Textbox("", label="Step size", info="Of an editor that needs no training; empty: it is searched for, in "
                       "about a minute", elem_id="step-size"),
        ]  # fmt: skip


def _facts() -> tuple[list[Any], list[Any], dict[str, gr.Button]]:
    gr.Markdown("## 2. Facts")
    typed = [
        gr.Textbox("", label="Prompt", placeholder="The capital of Iceland is", elem_id="prompt"),
        gr.Textbox("", label="New answer", placeholder="Akureyri", elem_id="target"),
        gr.Textbox("", label="Subject, as written in the prompt (optional, helps)", placeholder="Iceland",
                   elem_id="subject"),
        gr.Textbox("", label="Paraphrases, one a line (optional)", lines=2, elem_id="paraphrases",
                   placeholder="Iceland's seat of government is"),
        gr.Textbox("", label="Neighbours whose answers should stay, one a line (optional)", lines=2,
                   elem_id="neighbours", placeholder="The capital of Norway is"),
    ]  # fmt: skip
    with gr.Accordion("Load a file", open=False):
        file = gr.File(label="JSON Lines, JSON, CSV, YAML or Parquet", height=110, elem_id="file")
    state, listed = gr.State([]), gr.HTML(waiting_html([]), elem_id="waiting", padding=False)
    with gr.Row():
        add = gr.Button("Add another fact", min_width=130, elem_id="add")
        clear = gr.Button("Clear", min_width=90, elem_id="clear")
    with gr.Row():
        edit = gr.Button("Edit", variant="primary", min_width=130, elem_id="edit")
        stop = gr.Button("Stop", variant="stop", min_width=90, elem_id="stop")
    return typed, [state, listed, file], {"add": add, "clear": clear, "edit": edit, "stop": stop}


def _results() -> tuple[list[Any], gr.Button]:
    nothing = View("", "", False)
    gr.Markdown("## 3. What changed")
    facts = gr.HTML(facts_html(nothing), elem_id="facts", padding=False)
    gr.Markdown("## 4. What it cost the model")
    meter = gr.HTML(meter_html(nothing), elem_id="meter", padding=False)
    gr.Markdown("## 5. Ledger")
    ledger = gr.Radio([], label="Batches; choose one to undo it", elem_id="ledger")
    return [facts, meter, ledger], gr.Button("Undo the chosen batch", elem_id="undo")


def _asking() -> list[Any]:
    gr.Markdown("## 6. Ask both models")
    text = gr.Textbox("", label="Text", lines=2, placeholder="What is the capital of Iceland?", elem_id="question")
    with gr.Row():
        chat = gr.Checkbox(label="As a chat question", elem_id="question-chat", min_width=160)
        tokens = gr.Slider(1, MOST_TOKENS, value=32, step=1, label="Tokens at most", min_width=160)
    button = gr.Button("Ask", elem_id="ask")
    with gr.Row():
        before = gr.Textbox("", label="Unedited model", lines=4, interactive=False, min_width=280, elem_id="before")
        after = gr.Textbox("", label="Edited model", lines=4, interactive=False, min_width=280, elem_id="after")
    return [text, chat, tokens, button, before, after]


def _saving() -> list[Any]:
    gr.Markdown("## 7. Save")
    form = gr.Radio([(SAVED_AS[form], form) for form in FORMS], value="model", label="What", elem_id="form")
    folder = gr.Textbox("", label="New folder on this computer", placeholder="edited-model", elem_id="folder")
    return [form, folder, gr.Button("Save", elem_id="save")]


def _connect(actions: Actions, parts: Parts) -> None:
    """Connect every button with its action."""
    status, shown = parts.status, parts.shown
    *choice, load = parts.choice
    state, listed, file = parts.waiting
    *asked, ask, before, after = parts.asking
    *saved, save = parts.saving
    buttons, waiting, seen = parts.facts_buttons, [state, listed], [status, *shown]
    load.click(actions.load, choice, seen, **HIDDEN)
    buttons["add"].click(actions.add, [state, *parts.typed], [status, *waiting, *parts.typed], **HIDDEN)
    buttons["clear"].click(actions.clear, None, [status, *waiting, *parts.typed], **HIDDEN)
    file.upload(actions.add_file, [state, file], [status, *waiting, file], **HIDDEN)
    buttons["edit"].click(actions.edit, [state, *choice, *parts.typed], [*seen, *waiting, *parts.typed], **HIDDEN)
    buttons["stop"].click(actions.stop, None, status, **HIDDEN)
    parts.undo.click(actions.undo, shown[2], seen, **HIDDEN)
    ask.click(actions.ask, asked, [status, before, after], **HIDDEN)
    save.click(actions.save, saved, status, **HIDDEN)
