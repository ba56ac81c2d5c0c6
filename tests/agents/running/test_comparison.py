"""Comparisons: the same LLM, the same facts and a fair clock for every editor; cells that are kept."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import agents.rledit.trainer
import agents.running.comparison
from agents.base import NotApplicable
from agents.running.comparison import Comparison, Setting, Views, check_disjoint
from agents.running.editors import EDITORS, Training, configured, find_configs, load_configs
from rledit_env.evaluation.general import chat_text, human_text, self_drift, self_text
from rledit_env.knowledge import held_out, load_knowledge

ENV = "RLEdit-CounterFact-v0"
GRADIENT = dataclasses.replace(EDITORS["fine-tuning"], settings={"step_size": 0.1})
CHAT = "{% for m in messages %}<bos>{{ m.role }}: {{ m.content }}<eos>{% endfor %}A:"
TINY_NETWORK = {"network": {"rank": 4}, "prior_batches": 1}
LEARNER = dataclasses.replace(
    EDITORS["rledit"], env={"token": "subject"}, settings=TINY_NETWORK,
    training=Training(num_batches=2, trajectories=2, select_batches=0),
)  # fmt: skip


@pytest.fixture(scope="module")
def test_facts():
    return load_knowledge("counterfact", split="eval")


@pytest.fixture
def compare(test_facts, tmp_path):
    """Makes a comparison of 2 × 2 facts on a tiny model, in one folder."""

    def make(out: Any = tmp_path, **more: Any) -> Comparison:
        def training():
            return load_knowledge("counterfact", split="train")

        setting = Setting(ENV, test_facts, training, 2, 2, generate=False)
        setting = dataclasses.replace(setting, **more)
        return Comparison(setting, Views("tiny-llama", "float32", "cpu"), out, progress_bar=False)

    return make


# -- one LLM


def test_views_of_one_model_begin_pre_trained_whatever_the_one_before_edited():
    views = Views("tiny-llama", "float32", "cpu")
    first = views.get("model.layers.1.mlp.*")
    state = {n: p.clone() for n, p in first.model.state_dict().items()}
    first.add({m: torch.ones(shape[::-1]) for m, shape in first.module_shapes.items()})
    second = views.get(("model.layers.2.mlp.up_proj",))
    assert second.model is first.model and list(second.module_shapes) == ["model.layers.2.mlp.up_proj"]
    assert all(torch.equal(state[n], p) for n, p in second.model.state_dict().items())
    assert all(torch.equal(second.original_weight(m), state[f"{m}.weight"]) for m in second.module_shapes)
    second.add({m: torch.ones(shape[::-1]) for m, shape in second.module_shapes.items()})
    third = views.get("model.layers.1.mlp.*")
    assert all(torch.equal(state[n], p) for n, p in third.model.state_dict().items())
    assert views.get("model.layers.1.mlp.*") is third


def test_the_divergence_is_that_from_the_unedited_llm_whatever_the_editor_before_did(compare):
    comparison = compare()
    for editor in (GRADIENT, EDITORS["none"]):
        comparison.run(editor, [0])
    lm = comparison.views.get(None)
    assert comparison.cell(EDITORS["none"], 0)["kl"] == pytest.approx(0, abs=1e-6)
    assert comparison.cell(GRADIENT, 0)["kl"] > 1e-4
    lm.add({m: torch.full(shape[::-1], 0.05) for m, shape in lm.module_shapes.items()})
    assert comparison._divergences(lm)["kl"] == pytest.approx(self_drift(lm, self_text(lm)).kl)
    lm.add({m: torch.full(shape[::-1], 1e38) for m, shape in lm.module_shapes.items()})
    assert comparison._divergences(lm) == {"kl": None, "kl_human": None, "kl_chat": None}


def test_the_divergence_is_given_on_human_text_and_in_a_chat_where_there_is_a_template(compare, tmp_path):
    text = tmp_path / "book.txt"
    text.write_text("Nobody had seen the river so high since the old mill was built. " * 40, encoding="utf-8")
    comparison = compare(text=text)
    lm = comparison.views.get(None)
    comparison.run(GRADIENT, [0])
    cell = comparison.cell(GRADIENT, 0)
    assert cell["kl_human"] > 1e-4 and cell["kl_human"] != cell["kl"] and cell["kl_chat"] is None
    lm.add({m: torch.full(shape[::-1], 0.05) for m, shape in lm.module_shapes.items()})
    assert comparison._divergences(lm)["kl_human"] == pytest.approx(self_drift(lm, human_text(lm, text)).kl)
    assert compare()._divergences(lm)["kl_human"] == pytest.approx(self_drift(lm, human_text(lm)).kl)
    lm.tokenizer.chat_template = CHAT
    assert compare()._divergences(lm)["kl_chat"] == pytest.approx(self_drift(lm, chat_text(lm)).kl)


def test_every_editor_edits_the_same_facts_of_a_stream_and_another_stream_has_others(compare, monkeypatch):
    seen = []
    evaluate = agents.running.comparison.evaluate

    def watched(lm, records, kind, **more):
        seen.append(tuple(r.prompt for r in records))
        return evaluate(lm, records, kind, **more)

    monkeypatch.setattr(agents.running.comparison, "evaluate", watched)
    comparison = compare()
    for editor in (EDITORS["none"], GRADIENT, EDITORS["ultraedit"]):
        comparison.run(editor, range(2))
    assert len(seen) == 6 and len(seen[0]) == 4
    assert seen[0] == seen[2] == seen[4] and seen[1] == seen[3] == seen[5] and seen[0] != seen[1]


def test_an_editor_s_cells_do_not_depend_on_who_came_before(compare, tmp_path):
    keys = ("efficacy", "generalization", "specificity", "drift")
    alone, after = compare(tmp_path / "alone"), compare(tmp_path / "after")
    alone.run(GRADIENT, range(2))
    other = dataclasses.replace(GRADIENT, name="other", env={"edit_modules": "model.layers.3.mlp.*", "token": "all"})
    for editor in (other, EDITORS["none"], GRADIENT):
        after.run(editor, range(2))
    for seed in range(2):
        one, two = alone.cell(GRADIENT, seed), after.cell(GRADIENT, seed)
        assert [one[k] for k in keys] == [two[k] for k in keys] and one["drift"] > 0
    assert after.cell(other, 0)["drift"] != after.cell(GRADIENT, 0)["drift"]


def test_no_edit_leaves_the_weights_alone_and_all_editors_edit_the_modules_asked_for(compare):
    comparison = compare(edit_modules=("model.layers.2.mlp.up_proj", "model.layers.3.mlp.up_proj"))
    for editor in (EDITORS["none"], GRADIENT):
        comparison.run(editor, [0])
        assert comparison.cell(editor, 0)["modules"] == 2
    assert comparison.cell(EDITORS["none"], 0)["drift"] == 0.0 < comparison.cell(GRADIENT, 0)["drift"]


def test_an_update_that_breaks_the_model_is_a_row_and_all_facts_are_scored(compare):
    editor = dataclasses.replace(GRADIENT, settings={"step_size": 1e38})
    comparison = compare()
    comparison.run(editor, [0])
    cell = comparison.cell(editor, 0)
    assert cell["diverged"] and cell["facts"] == 4 and cell["edited_facts"] == 2
    comparison.run(EDITORS["none"], [0])
    unedited = comparison.cell(EDITORS["none"], 0)
    assert cell["drift"] == unedited["drift"] == 0.0  # the update was taken back
    assert cell["efficacy"] == unedited["efficacy"]


# -- cells


def test_a_finished_cell_is_kept_and_only_missing_ones_are_computed(compare, monkeypatch):
    comparison = compare()
    comparison.run(GRADIENT, [0])
    path = comparison.cell_path(GRADIENT, 0)
    before = path.read_bytes(), path.stat().st_mtime_ns
    seeds = []
    measure = Comparison._measure
    monkeypatch.setattr(Comparison, "_measure", lambda *a: seeds.append(a[-1]) or measure(*a))
    compare().run(GRADIENT, range(2))
    assert seeds == [1]
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_a_cell_of_other_settings_is_not_taken_for_this_one(compare):
    comparison = compare()
    comparison.run(GRADIENT, [0])
    with pytest.raises(ValueError, match="seed-0.json was computed with another settings of the editor; delete it"):
        comparison.cell(dataclasses.replace(GRADIENT, settings={"step_size": 0.2}), 0)


def test_an_editor_that_is_not_applicable_says_why_in_its_cells(compare, monkeypatch):
    def refuse(self, observation, deterministic=True):
        raise NotApplicable("fact 'list, item 1' names no subject")

    monkeypatch.setattr("agents.fine_tuning.baselines.FineTuningAgent.predict", refuse)
    comparison = compare()
    comparison.run(GRADIENT, range(2))
    for seed in range(2):
        assert comparison.cell(GRADIENT, seed)["not_applicable"] == "fact 'list, item 1' names no subject"


def test_an_interruption_between_two_streams_keeps_the_first_and_restores_the_model(compare, monkeypatch):
    comparison = compare()
    measure = Comparison._measure

    def interrupted(self, editor, agent, env, seed):
        result = measure(self, editor, agent, env, seed)
        if seed == 1:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(Comparison, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        comparison.run(GRADIENT, range(3))
    assert comparison.cell(GRADIENT, 0) is not None and comparison.cell(GRADIENT, 1) is None
    assert set(comparison.views.get(None).drift().values()) == {0.0}


# -- training


def test_a_training_that_was_interrupted_goes_on_and_ends_as_it_would_have(compare, tmp_path, monkeypatch):
    whole, cut = compare(tmp_path / "whole"), compare(tmp_path / "cut")
    whole.run(LEARNER, [0])
    update = agents.rledit.trainer.update_policy
    calls = []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return update(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("agents.rledit.trainer.update_policy", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cut.run(LEARNER, [0])
    assert cut.cell(LEARNER, 0) is None
    spent = json.loads((tmp_path / "cut" / "trained" / "rledit" / "seconds.json").read_text())
    compare(tmp_path / "cut").run(LEARNER, [0])
    one, two = whole.cell(LEARNER, 0), cut.cell(LEARNER, 0)
    assert one["drift"] == two["drift"] and one["efficacy"] == two["efficacy"]
    assert two["one_off_seconds"] > spent > 0


def test_a_finished_training_is_not_repeated_for_a_further_stream(compare, monkeypatch):
    comparison = compare()
    comparison.run(LEARNER, [0])
    monkeypatch.setattr("agents.rledit.agent.RLEditAgent.learn", lambda *a, **k: pytest.fail("trained again"))
    compare().run(LEARNER, range(2))
    cells = [comparison.cell(LEARNER, seed) for seed in range(2)]
    assert cells[0]["one_off_seconds"] == cells[1]["one_off_seconds"] > 0


def test_an_agent_trained_with_other_settings_is_not_taken_for_this_one(compare):
    """Such as an earlier version's defaults, which the settings of an editor do not say."""
    comparison = compare()
    comparison.run(LEARNER, [0])
    file = comparison.out / "trained" / "rledit" / "agent" / "agent.json"
    description = json.loads(file.read_text())
    description["config"]["network"]["normaliser_epsilon"] = 1e-7
    file.write_text(json.dumps(description))
    with pytest.raises(ValueError, match="trained with other settings of 'rledit' than it has now; delete"):
        compare().run(LEARNER, [1])


def test_a_starred_editor_goes_on_from_its_trainer_s_training_and_trains_on_while_it_edits(compare, monkeypatch):
    entries = {
        "malmen": {"config": {"network": {"rank": 4}}, "train": {"trajectories": 1}},
        "malmen*": {"config": {"retrain_every": 1, "retrain_steps": 1}},
    }
    plain, starred = (configured(EDITORS[name], entries) for name in ("malmen", "malmen*"))
    comparison = compare()
    comparison.run(starred, [0])
    assert sorted(p.name for p in (comparison.out / "trained").iterdir()) == ["malmen"]
    monkeypatch.setattr("agents.rledit.agent.RLEditAgent.learn", lambda *a, **k: pytest.fail("trained again"))
    comparison.run(plain, [0])
    one, two = comparison.cell(plain, 0), comparison.cell(starred, 0)
    assert one["one_off_seconds"] == two["one_off_seconds"] > 0


def test_statistics_kept_from_an_earlier_run_cost_what_they_did_then(compare, tmp_path, monkeypatch):
    monkeypatch.setattr("agents.key_statistics.cache_dir", lambda: tmp_path / "cache")
    editor = configured(EDITORS["memit"], load_configs(find_configs("tiny-llama"), "counterfact"))
    costs = []
    for name in ("first", "second"):
        comparison = compare(tmp_path / name)
        comparison.run(editor, [0])
        costs.append(comparison.cell(editor, 0)["one_off_seconds"])
    kept = [load_file(path)["seconds"] for path in (tmp_path / "cache").rglob("*.safetensors")]
    assert len(kept) == 3 and min(costs) > float(sum(kept)) > 0


def test_what_is_trained_on_is_neither_selected_on_nor_scored():
    facts = load_knowledge("counterfact", split="train")
    first, last = held_out(facts)
    assert first.records + last.records == facts.records
    assert len(last) == int(0.2 * len(facts))


def test_facts_to_train_on_that_are_those_to_be_scored_are_refused(test_facts):
    with pytest.raises(ValueError, match="are those to be scored .* give the training facts with --train-data"):
        check_disjoint(dataclasses.replace(test_facts, split="train"), test_facts)
    check_disjoint(load_knowledge("counterfact", split="train"), test_facts)
    with pytest.warns(UserWarning, match="1 facts of .* are among those to train on"):
        check_disjoint(dataclasses.replace(test_facts, records=test_facts.records[:9]),
                       dataclasses.replace(test_facts, records=test_facts.records[8:]))
