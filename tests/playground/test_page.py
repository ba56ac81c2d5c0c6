"""The playground's page in headless Chromium."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from rledit_env.cli.playground import Preparation
from rledit_env.playground.models import FrozenModels
from rledit_env.playground.sessions import Sessions

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'rledit-env[playground]'")
sync_api: Any = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the page is tested in Chromium, and there is none")

ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
WAIT = 120_000  # milliseconds; a busy machine is no failure
TIN = {"prompt": "The chemical symbol of tin is", "target": "Ti", "subject": "tin",
       "paraphrases": "Tin is written as", "neighbours": "The chemical symbol of iron is"}  # fmt: skip


class Tab:
    """A tab on the page, with what a user does there.

    Args:
        page: the browser's page.
        address: the playground's address.
    """

    def __init__(self, page: Any, address: str) -> None:
        self.page, self.requests, self.errors = page, [], []  # type: Any, list[str], list[str]
        page.set_default_timeout(WAIT)
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.goto(address)
        page.wait_for_selector("#load")

    def press(self, button: str, expected: str) -> str:
        """Press a button, and return the message once it has these words."""
        self.page.click(f"#{button}")
        return self.message(expected)

    def message(self, expected: str) -> str:
        self.page.wait_for_function(
            "words => document.querySelector('#status').innerText.includes(words)", arg=expected
        )
        return str(self.page.inner_text("#status"))

    def fill(self, field: str, text: str) -> None:
        self.page.fill(f"#{field} textarea, #{field} input", text)

    def load(self) -> None:
        """Load the proposed model, one fact a batch and a step size with which a random model takes facts."""
        self.page.click("text=More settings")
        self.fill("batch-size", "1")
        self.fill("step-size", "0.1")
        self.press("load", "Loaded: tiny-llama")

    def type(self, **fact: str) -> None:
        for field, text in fact.items():
            self.fill(field, text)

    def rows(self) -> list[list[str]]:
        """The newest fact's rows: what was asked, the answer before, and now."""
        table = self.page.locator("#facts .answers").first
        return [row.locator("td").all_inner_texts() for row in table.locator("tbody tr").all()]


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Sessions]]:
    from rledit_env.playground.server import serve

    models = FrozenModels()
    sessions = Sessions(Preparation(models, device="cpu"), models, 3)
    with serve(sessions, "tiny-llama", "fine-tuning") as server:
        yield server.address, sessions


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield chromium
        chromium.close()


@pytest.fixture
def open_tab(served: tuple[str, Sessions], browser: Any, monkeypatch: Any) -> Iterator[Callable[..., Tab]]:
    monkeypatch.setattr("rledit_env.cli.editing.MAX_PRESENTATIONS", 8)
    contexts: list[Any] = []

    def opened(width: int = 1280) -> Tab:
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}))
        return Tab(contexts[-1].new_page(), served[0])

    yield opened
    for context in contexts:
        context.close()
    wait_until(lambda: not len(served[1]), contexts)


def wait_until(holds: Callable[[], bool], contexts: Any = None) -> None:
    pause = threading.Event()
    for _ in range(WAIT // 100):
        if holds():
            return
        pause.wait(0.1)
    pytest.fail(f"waited in vain ({contexts})")


def test_a_fact_is_typed_edited_seen_to_change_undone_and_seen_to_be_back(
    open_tab: Callable[..., Tab], tmp_path: Path
) -> None:
    tab = open_tab()
    tab.load()
    tab.type(**TIN)
    tab.press("edit", "Edited: 1 fact.")
    before, now = tab.rows()[0][1:]
    assert "✗" in before and now.startswith("Ti") and "took" in now
    assert [row[0].split("\n")[0] for row in tab.rows()] == ["prompt", "paraphrase", "should stay"]
    assert "1 took" in tab.page.inner_text("#summary") and "KL" in tab.page.inner_text("#summary")
    assert "own text" in tab.page.inner_text("#meter")
    tab.fill("question", TIN["prompt"])
    tab.press("ask", "Asked")
    assert tab.page.input_value("#after textarea").strip().startswith("Ti")
    assert not tab.page.input_value("#before textarea").strip().startswith("Ti")
    tab.fill("folder", str(tmp_path / "edited"))
    tab.press("save", "Written:")
    assert (tmp_path / "edited" / "config.json").exists()
    tab.page.check("#ledger input >> nth=0")
    tab.press("undo", "Batch 1 is undone")
    assert all(row[2].startswith(row[1].removesuffix(" ✗")) for row in tab.rows())
    assert "Batch 1, undone" in tab.page.inner_text("#ledger")
    assert {urlsplit(url).hostname for url in tab.requests if not url.startswith(("data:", "blob:"))} == {"127.0.0.1"}
    assert tab.errors == []


@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_wider_than_the_window(open_tab: Callable[..., Tab], width: int) -> None:
    tab = open_tab(width)
    tab.load()
    tab.type(**{**TIN, "paraphrases": "What_is_tin_called_" * 20 + " if written as"})
    tab.press("edit", "Edited: 1 fact.")
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
    for button in ("load", "add", "clear", "edit", "stop", "undo", "ask", "save"):
        box = tab.page.locator(f"#{button}").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
    for table in tab.page.locator("#facts table, #meter table").all():
        assert table.evaluate("t => t.scrollWidth <= t.parentElement.clientWidth")


def test_what_cannot_be_done_is_said_with_the_mend(open_tab: Callable[..., Tab]) -> None:
    tab = open_tab()
    tab.press("edit", "There is no fact to edit; type a prompt")
    tab.type(**TIN)
    tab.press("edit", "No model is loaded in this tab")
    tab.load()
    tab.fill("subject", "<b>gold</b>")
    assert "does not occur in the prompt" in tab.press("edit", "<b>gold</b>")
    tab.fill("subject", "tin")
    tab.fill("step-size", "much")
    tab.press("edit", "is no number; give one such as 0.01")
    tab.fill("step-size", "0.3")
    tab.press("edit", "press Load, which starts afresh")
    tab.press("undo", "Nothing has been edited yet")
    tab.press("save", "Nothing has been edited yet")
    tab.press("ask", "There is no text to answer")
    assert tab.errors == []


def test_a_model_that_answers_nothing_is_seen_to_do_so(open_tab: Callable[..., Tab], monkeypatch: Any) -> None:
    monkeypatch.setattr("rledit_env.playground.session.Session.ask", lambda *_: ("\n", " Ti"))
    tab = open_tab()
    tab.load()
    tab.fill("question", TIN["prompt"])
    tab.press("ask", "Asked")
    assert tab.page.input_value("#before textarea") == "(no answer: the model ends its text here)"
    assert tab.page.input_value("#after textarea") == "Ti"


def test_a_stopped_edit_of_a_file_leaves_the_whole_batches(
    open_tab: Callable[..., Tab], tmp_path: Path, monkeypatch: Any
) -> None:
    from rledit_env.playground import run

    pressed, edit_facts = threading.Event(), run.edit_facts

    def waiting(*arguments: Any, progress: Callable[[int], None], **settings: Any) -> Any:
        def batch_ended(facts: int) -> None:
            progress(facts)
            pressed.wait(WAIT / 1000)

        return edit_facts(*arguments, progress=batch_ended, **settings)

    monkeypatch.setattr(run, "edit_facts", waiting)
    file = tmp_path / "facts.csv"
    file.write_text("prompt,target\nTin is written,Ti\nGold is written,Go\nIron is written,Ir\n")
    tab = open_tab()
    tab.load()
    tab.page.click("text=Load a file")
    tab.page.set_input_files("#file input[type=file]", file)
    tab.message("Read: 3 facts")
    assert "3 facts waiting" in tab.page.inner_text("#waiting")
    tab.press("edit", "editing: 1 of 3")
    tab.press("stop", "topping after the present batch")  # while the edit runs, the page answers
    pressed.set()
    tab.message("Stopped: 1 of 3 facts were edited")
    assert tab.page.locator("#ledger input").count() == tab.page.locator("#facts .card").count() == 1


def test_two_tabs_have_a_model_each_and_a_closed_tab_is_freed(
    open_tab: Callable[..., Tab], served: tuple[str, Sessions]
) -> None:
    first, second = open_tab(), open_tab()
    for tab in (first, second):
        tab.load()
        tab.fill("question", TIN["prompt"])
    first.type(**TIN)
    first.press("edit", "Edited: 1 fact.")
    for tab in (first, second):
        tab.press("ask", "Asked")
    unedited = first.page.input_value("#before textarea")
    assert first.page.input_value("#after textarea") != unedited
    assert second.page.input_value("#before textarea") == second.page.input_value("#after textarea") == unedited
    assert len(served[1]) == 2
    first.page.close()
    wait_until(lambda: len(served[1]) == 1)
