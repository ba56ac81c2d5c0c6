"""Sessions of the playground: what a tab's model goes through, without a browser."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from agents import FineTuningAgent
from rledit_env.cli.playground import Preparation
from rledit_env.knowledge.facts import Facts, load_facts
from rledit_env.lm.delta import load_delta
from rledit_env.lm.loading.loader import load_model
from rledit_env.playground import session as session_module
from rledit_env.playground.choice import Choice
from rledit_env.playground.models import FrozenModels
from rledit_env.playground.session import Busy, Session, Stopped
from rledit_env.playground.sessions import Sessions
from rledit_env.playground.turns import Turns
from rledit_env.playground.typed import joined, typed_fact

# A step so large that a random model takes the fact; what else it changes is what the meter is there to show.
CHOICE = Choice("tiny-llama", "fine-tuning", batch_size=1, step_size=0.1)
TIN = typed_fact("The chemical symbol of tin is", "Ti", "tin", "Tin is written as", "The chemical symbol of iron is")
GOLD = typed_fact("The chemical symbol of gold is", "Go", "gold")


def silent(message: str) -> None:
    """Progress that nobody looks at."""


@pytest.fixture(scope="module")
def models() -> FrozenModels:
    return FrozenModels()


@pytest.fixture(autouse=True)
def few_presentations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rledit_env.cli.editing.MAX_PRESENTATIONS", 8)


@pytest.fixture
def sessions(models: FrozenModels) -> Iterator[Sessions]:
    opened = Sessions(Preparation(models, device="cpu"), models, 2)
    yield opened
    opened.close_all()


@pytest.fixture
def session(sessions: Sessions) -> Session:
    return sessions.open("tab", CHOICE)


def weights(session: Session) -> dict[str, torch.Tensor]:
    lm = session._lm
    return {module: lm.weight(module).clone() for module in lm.module_shapes}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


# -- editing and undoing -------------------------------------------------------------------------------------------


def test_a_fact_is_edited_seen_to_change_undone_and_seen_to_be_back(session: Session) -> None:
    assert session.edit(TIN, silent) == "Edited: 1 fact."
    (fact,) = session.view.facts
    assert not fact.before.prompt.took and fact.after.prompt.took and fact.after.prompt.text.startswith("Ti")
    assert len(fact.after.paraphrases) == len(fact.after.neighbours) == 1 and fact.after.chat is None
    assert session.view.meter["self"].kl > 0.01
    assert [batch.state for batch in session.view.batches] == ["edited"]
    session.undo(1, silent)
    (fact,) = session.view.facts
    assert fact.after == fact.before and not fact.is_edited
    assert session.view.meter["self"].kl == pytest.approx(0, abs=1e-6)
    assert [batch.state for batch in session.view.batches] == ["undone"]


def test_later_facts_go_on_from_the_edited_model_and_any_batch_can_be_undone(session: Session) -> None:
    session.edit(TIN, silent)
    one = weights(session)
    session.edit(GOLD, silent)
    both = weights(session)
    assert not same(one, both)
    session.undo(1, silent)
    assert [batch.state for batch in session.view.batches] == ["undone", "edited"]
    now, original = weights(session), session._lm.original_weight
    for module, weight in now.items():  # W₀ + the second batch's update
        torch.testing.assert_close(weight - original(module), both[module] - one[module], atol=1e-5, rtol=1e-4)
    session.edit(TIN, silent)
    assert [batch.facts[0].split(" → ")[1] for batch in session.view.batches] == ["Ti", "Go", "Ti"]


def test_an_agent_without_a_memory_to_give_goes_on_after_an_undo(session: Session, monkeypatch: Any) -> None:
    monkeypatch.setattr(FineTuningAgent, "memory", lambda self: None)
    session.edit(TIN, silent)
    session.undo(1, silent)
    assert session.edit(GOLD, silent) == "Edited: 1 fact."


def test_a_stop_leaves_the_last_whole_batch(session: Session) -> None:
    states: list[dict[str, torch.Tensor]] = []

    def stop_after_the_first(message: str) -> None:
        if message == "editing: 1 of 2":
            states.append(weights(session))
            session.stop()

    assert session.edit(joined([TIN, GOLD]), stop_after_the_first).startswith("Stopped: 1 of 2 facts were edited")
    assert same(weights(session), states[0])
    assert [batch.number for batch in session.view.batches] == [1] and len(session.view.facts) == 1
    assert session.edit(GOLD, silent) == "Edited: 1 fact."


def test_a_stop_before_the_first_batch_changes_nothing(session: Session) -> None:
    before = weights(session)

    def stop(message: str) -> None:
        session.stop()

    with pytest.raises(Stopped, match="the model was not changed"):
        session.edit(TIN, stop)
    assert same(weights(session), before)
    assert session.edit(TIN, silent) == "Edited: 1 fact."


@pytest.mark.parametrize("calls", [1, 3])  # an error before the batch's first update, and after two of them
def test_an_error_takes_the_interrupted_batch_back(session: Session, monkeypatch: Any, calls: int) -> None:
    session.edit(TIN, silent)
    before = weights(session)
    predict, left = FineTuningAgent.predict, [calls]

    def failing(self: Any, observation: Any, deterministic: bool = True) -> Any:
        left[0] -= 1
        if not left[0]:
            raise RuntimeError("out of memory")
        return predict(self, observation, deterministic)

    with monkeypatch.context() as patch:
        patch.setattr(FineTuningAgent, "predict", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            session.edit(GOLD, silent)
    for module, weight in weights(session).items():
        torch.testing.assert_close(weight, before[module], atol=1e-5, rtol=0)
    assert [batch.state for batch in session.view.batches] == ["edited", *["taken back"] * (calls > 1)]
    assert session.edit(GOLD, silent) == "Edited: 1 fact."
    assert session.view.batches[-1].state == "edited"


def test_an_update_that_breaks_the_model_is_taken_back(sessions: Sessions) -> None:
    session = sessions.open("tab", Choice("tiny-llama", "fine-tuning", batch_size=1, step_size=1e30))
    with pytest.warns(UserWarning, match="broke the LLM"):
        said = session.edit(TIN, silent)
    assert "broke the model and was taken back" in said and "a smaller step size" in said
    assert [batch.state for batch in session.view.batches] == ["taken back"]
    assert all(torch.equal(weight, session._lm.original_weight(m)) for m, weight in weights(session).items())


@pytest.mark.parametrize("chat", ["only", "also"])
def test_a_model_without_a_chat_template_is_not_edited_as_a_chat(sessions: Sessions, chat: str) -> None:
    session = sessions.open("tab", Choice("tiny-llama", "fine-tuning", chat=chat, step_size=0.1))
    with pytest.raises(ValueError, match="has no chat template"):
        session.edit(TIN, silent)
    assert session.view.batches == ()


def test_facts_edited_both_ways_count_once(sessions: Sessions, models: FrozenModels, tmp_path: Path) -> None:
    model, tokenizer = load_model("tiny-llama")
    tokenizer.chat_template = "{% for m in messages %}Q: {{ m.content }}\nA: {% endfor %}"
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    choice = Choice(str(tmp_path), "fine-tuning", chat="also", batch_size=1, step_size=0.1)
    session = sessions.open("tab", choice)
    assert session.view.chat
    assert session.edit(joined([TIN, GOLD]), silent) == "Edited: 2 facts."
    assert [len(batch.facts) for batch in session.view.batches] == [1, 1]
    assert [fact.batch for fact in session.view.facts] == [1, 2]
    assert session.view.facts[0].after.chat is not None
    assert len(session.ask("Tin?", chat=True, tokens=4)) == 2


# -- asking and saving ---------------------------------------------------------------------------------------------


def test_both_models_answer_a_free_question(session: Session) -> None:
    before, after = session.ask("The chemical symbol of tin is", tokens=4)
    assert before == after
    session.edit(TIN, silent)
    unedited, edited = session.ask("The chemical symbol of tin is", tokens=4)
    assert unedited == before and edited.strip().startswith("Ti")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((" ",), "there is no text"),
        (("tin", False, 0), "give 1 to 400"),
        (("tin", True), "has no chat template"),
        (("tin " * 5000,), "Shorten the text"),
    ],
)
def test_a_question_that_cannot_be_asked_says_why(session: Session, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        session.ask(*arguments)


def test_the_edited_model_and_its_change_are_saved(session: Session, tmp_path: Path) -> None:
    session.edit(TIN, silent)
    for form in ("model", "delta", "lora"):
        assert str(tmp_path / form) in session.save(form, str(tmp_path / form))
    edited = weights(session)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    changed, _ = load_model("tiny-llama")
    load_delta(changed, tmp_path / "delta")
    for module, weight in edited.items():
        for model in (saved, changed):
            torch.testing.assert_close(model.get_submodule(module).weight, weight, atol=1e-6, rtol=1e-5)
    assert (tmp_path / "lora" / "adapter_config.json").exists()


def test_saving_destroys_nothing_and_needs_an_edit(session: Session, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to save; edit a fact first"):
        session.save("model", str(tmp_path / "new"))
    session.edit(TIN, silent)
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(OSError, match="not empty"):
        session.save("model", str(tmp_path))
    with pytest.raises(ValueError, match="no folder is named"):
        session.save("model", " ")
    assert (tmp_path / "mine").read_text() == "mine"


# -- what cannot be used ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice("tiny-lama", "fine-tuning"), "did you mean 'tiny-llama'"),
        (Choice("tiny-llama", "no-such-run"), "no-such-run does not exist"),
        (Choice("tiny-llama", "mend"), "has to be trained"),
        (Choice("tiny-llama", "fine-tuning", step_size=-1.0), "give a positive number"),
        (Choice("tiny-llama", "default", step_size=1.0), "the step size is for the editor"),
        (Choice("tiny-llama", "fine-tuning", batch_size=0), "give 1 or more"),
    ],
)
def test_a_choice_that_cannot_be_used_leaves_the_tab_as_it_was(
    sessions: Sessions, choice: Choice, message: str
) -> None:
    first = sessions.open("tab", CHOICE)
    with pytest.raises((ValueError, OSError, RuntimeError), match=message):
        sessions.open("tab", choice)
    assert sessions.get("tab") is first
    with pytest.raises((ValueError, OSError, RuntimeError), match=message):
        sessions.open("another", choice)
    assert len(sessions) == 1


def test_an_agent_of_another_model_says_the_mend_and_changes_nothing(sessions: Sessions) -> None:
    session = sessions.open("tab", Choice("tiny-llama", "default"))
    with pytest.raises(ValueError, match="was trained for .* modules .* --editor ultraedit"):
        session.edit(TIN, silent)
    assert session.view.facts == ()


def test_facts_that_cannot_be_edited_change_nothing(session: Session, monkeypatch: Any) -> None:
    with pytest.raises(ValueError, match="subject.*does not occur in the prompt"):
        typed_fact("The symbol of tin is", "Ti", "gold")
    with pytest.raises(ValueError, match="target"):
        typed_fact("The symbol of tin is", " ")
    with pytest.raises(ValueError, match="tokens"):
        session.edit(typed_fact("tin " * 5000, "Ti"), silent)
    monkeypatch.setattr(session_module, "MOST_FACTS", 1)
    with pytest.raises(ValueError, match="a tab takes 1 facts"):
        session.edit(joined([TIN, GOLD]), silent)
    assert session.view.batches == ()
    with pytest.raises(ValueError, match="nothing to undo"):
        session.undo(1, silent)


def test_a_batch_is_undone_once_and_must_exist(session: Session) -> None:
    session.edit(TIN, silent)
    session.undo(1, silent)
    with pytest.raises(ValueError, match="batch 1 is undone already"):
        session.undo(1, silent)
    with pytest.raises(ValueError, match="there are batches 1 to 1"):
        session.undo(2, silent)


def test_facts_of_a_file_and_typed_ones_are_edited_together(session: Session, tmp_path: Path) -> None:
    file = tmp_path / "facts.json"
    file.write_text(json.dumps([{"prompt": "Gold is written", "target": "Go", "locality_prompt": "Iron is written",
                                 "locality_ground_truth": "Fe"}]))  # fmt: skip
    facts: Facts = joined([load_facts(file), TIN])
    session.edit(facts, silent)
    assert [len(fact.after.neighbours) for fact in session.view.facts] == [1, 1]


# -- several tabs ----------------------------------------------------------------------------------------------------


def test_tabs_do_not_share_edits(sessions: Sessions) -> None:
    first, second = sessions.open("first", CHOICE), sessions.open("second", CHOICE)
    untouched = weights(second)
    first.edit(TIN, silent)
    alone = weights(first)
    assert same(weights(second), untouched)
    frozen = "model.embed_tokens"
    pointers = {s._lm.model.get_submodule(frozen).weight.data_ptr() for s in (first, second)}
    assert len(pointers) == 1  # what is not edited is in memory once
    first.undo(1, silent)
    second.edit(TIN, silent)
    assert same(weights(second), alone)


def test_two_tabs_that_edit_at_once_end_as_one_after_the_other(sessions: Sessions) -> None:
    facts, ended = joined([TIN, GOLD]), []

    def edit(session: Session) -> None:
        ended.append(session.edit(facts, silent))

    both = [sessions.open(name, CHOICE) for name in ("first", "second")]
    threads = [threading.Thread(target=edit, args=(session,)) for session in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ended == ["Edited: 2 facts."] * 2
    assert same(*map(weights, both))


def test_another_tab_is_answered_between_the_batches_of_an_edit(sessions: Sessions) -> None:
    first, second = sessions.open("first", CHOICE), sessions.open("second", CHOICE)
    order: list[str] = []
    threads: list[threading.Thread] = []

    def ask() -> None:
        second.ask("tin", tokens=1)
        order.append("asked")

    def progress(message: str) -> None:
        order.append(message)
        if message == "editing: 0 of 2":
            threads.append(threading.Thread(target=ask))
            threads[0].start()

    first.edit(joined([TIN, GOLD]), progress)
    threads[0].join()
    assert "asked" in order and order.index("asked") < order.index("editing: 2 of 2")


def test_a_tab_that_is_at_work_refuses_a_second_edit_but_answers(session: Session) -> None:
    seen: list[Any] = []

    def meanwhile(message: str) -> None:
        if message == "editing: 1 of 1":
            with pytest.raises(Busy, match="at work already"):
                session.undo(1, silent)
            seen.append(message)

    session.edit(TIN, meanwhile)
    assert seen


def test_too_many_tabs_are_refused_and_a_closed_one_makes_room(sessions: Sessions) -> None:
    sessions.open("first", CHOICE)
    folder = sessions.open("second", CHOICE)._folder
    with pytest.raises(ValueError, match="2 tabs have a model.*--max-tabs 3"):
        sessions.open("third", CHOICE)
    assert folder.exists()
    sessions.close("second")
    assert not folder.exists()
    sessions.open("third", CHOICE)
    with pytest.raises(ValueError, match="press Load"):
        sessions.get("second")


def test_a_tab_closed_during_an_edit_is_freed_after_the_batch(sessions: Sessions) -> None:
    session = sessions.open("tab", CHOICE)

    def close(message: str) -> None:
        if message == "editing: 1 of 2":
            sessions.close("tab")

    assert session.edit(joined([TIN, GOLD]), close).startswith("Stopped")
    assert not session._folder.exists() and len(sessions) == 0
    with pytest.raises(Stopped, match="closed"):
        session.edit(TIN, silent)


def test_turns_come_in_the_order_of_asking() -> None:
    turns, order = Turns(), []
    inside = threading.Event()

    def wait(name: str) -> None:
        with turns.turn():
            order.append(name)

    threads: list[threading.Thread] = []
    with turns.turn():
        for name in "abc":
            threads.append(threading.Thread(target=wait, args=(name,)))
            threads[-1].start()
            while len(turns._waiting) < len(threads):
                inside.wait(0.001)
        turns.pass_on()
        assert order == ["a", "b", "c"]
    for thread in threads:
        thread.join()


# -- the search of a step size -----------------------------------------------------------------------------------------


def test_the_search_of_a_step_size_can_be_stopped_and_is_told(sessions: Sessions, monkeypatch: Any) -> None:
    monkeypatch.setattr("agents.running.strength.SECONDS", 0.0)
    session = sessions.open("tab", Choice("tiny-llama", "fine-tuning", batch_size=1))
    stopping: Callable[[str], None] = lambda message: session.stop() if "was tried" in message else None  # noqa: E731
    with pytest.raises(Stopped):
        session.edit(TIN, stopping)
    assert session.view.batches == ()
    session.edit(TIN, silent)
    assert any("step size" in note for note in session.view.notes)
