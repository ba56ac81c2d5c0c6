"""Tests of agents.running.editors: the registry, and the files of hyperparameters that ship."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict, replace

import pytest

from agents.base import Agent
from agents.rledit.config import RLEditConfig
from agents.running.editors import (
    CONFIGS,
    EDITORS,
    changed,
    chosen_editors,
    configured,
    configured_step_size,
    find_configs,
    find_editor,
    load_configs,
    training_free_editors,
    with_step_size,
    with_strength,
)
from agents.running.saved import agent_settings, find_agent
from rledit_env.preservation import Constraint, Continuation, OwnText
from rledit_env.reward import RewardConfig

KINDS = ("zsre", "counterfact", "fever")


@pytest.mark.parametrize("name", EDITORS)
def test_every_editor_is_an_agent_whose_default_configuration_and_reward_can_be_made(name):
    editor = configured(EDITORS[name], {})
    assert issubclass(editor.agent_class(), Agent)
    assert editor.configuration() is None or dataclasses.is_dataclass(editor.configuration())
    assert isinstance(editor.reward(), RewardConfig)
    assert json.loads(json.dumps(editor.description())) == editor.description()
    assert EDITORS[editor.trained_as].training is not None if editor.trained_as else True


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
@pytest.mark.parametrize("kind", KINDS)
def test_every_file_of_hyperparameters_that_ships_configures_every_editor(path, kind):
    entries = load_configs(path, kind)
    assert entries
    for editor in EDITORS.values():
        configured(editor, entries)


@pytest.mark.parametrize(
    ("model", "file"),
    [
        ("smollm2-135m", "smollm2-135m"),
        ("tiny-gpt2", "tiny"),
        ("openai-community/gpt2-xl", "gpt2-xl"),
        ("EleutherAI/gpt-j-6b", "gpt-j-6b"),
        ("EleutherAI/gpt-j-6B", "gpt-j-6b"),
        ("openai-community/gpt2", None),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3-8b"),
        ("google/gemma-2-9b-it", "gemma-2-9b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b"),
        ("someone/else", None),
    ],
)
def test_a_model_has_the_file_that_names_it(model, file):
    path = find_configs(model)
    assert (path and path.stem) == file


@pytest.mark.parametrize(
    ("model", "kind", "modules", "rank", "locality"),
    [
        ("Meta-Llama-3-8B", "zsre",
         ["model.layers.[11-15].mlp.gate_proj", "model.layers.[18-24].mlp.up_proj"], 1024, 0.6),
        ("Meta-Llama-3-8B", "counterfact", ["model.layers.[22-30].mlp.{gate,up}_proj"], 512, 0.6),
        ("gemma-2-9b", "zsre", ["model.layers.[32-40].mlp.{gate,up}_proj"], 512, 0.6),
        ("Mistral-7B-v0.3", "counterfact", ["model.layers.[17-19].mlp.down_proj"], 1024, 0.8),
        ("Mistral-7B-v0.3", "fever", ["model.layers.[17-18].mlp.down_proj"], 1024, 0.6),
    ],
)  # fmt: skip
def test_the_paper_s_table_of_hyperparameters_is_what_its_models_get(model, kind, modules, rank, locality):
    editor = configured(EDITORS["rledit-paper"], load_configs(find_configs(model), kind))
    assert (editor.env["edit_modules"], editor.configuration().network.rank) == (modules, rank)
    reward = editor.reward()
    assert reward.components["locality"][0] == locality and reward.components["generalization"][0] == 1.0
    assert (reward.backtracking_depth, reward.backtracking_decay, reward.regularisation) == (10, 0.95, 1e-4)
    assert editor.configuration().network.step_size == 1e-6
    assert editor.configuration().learning_rate == editor.configuration().step_size_learning_rate == 1e-5


def test_editors_are_chosen_by_name_or_group_once_and_in_the_table_s_order():
    assert [e.name for e in chosen_editors(["rledit", "none", "rledit"])] == ["none", "rledit"]
    assert {e.group for e in chosen_editors(["trajectory"])} == {"trajectory"}
    assert [e.name for e in chosen_editors(["all"])] == list(EDITORS)
    assert not set(EDITORS) & {e.group for e in EDITORS.values()}
    with pytest.raises(ValueError, match="'romeo' is unknown; editors are none, .*; groups are reference, .*all"):
        chosen_editors(["none", "romeo"])


def test_settings_are_nested_and_what_is_not_named_stays():
    config = changed(RLEditConfig(), {"learning_rate": 0.5, "network": {"rank": 7}}, "here")
    assert config == dataclasses.replace(
        RLEditConfig(), learning_rate=0.5, network=dataclasses.replace(RLEditConfig().network, rank=7)
    )


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"config": {"learning_rat": 1}}, "editor 'rledit', config: 'learning_rat' is unknown; known are network"),
        ({"config": {"network": {"ranks": 1}}}, r"config.network: 'ranks' is unknown; known are rank"),
        ({"config": {"network": {"rank": 0}}}, "config.network: rank is 0; give a positive number"),
        ({"env": {"batch": 1}}, "env: 'batch' is unknown; known are edit_modules, token, steps_per_batch"),
        ({"train": {"epochs": 1}}, "train: 'epochs' is unknown; known are num_batches"),
        ({"train": {"reward": {"components": {"truth": 1}}}}, "reward.components: 'truth' is unknown; known are eff"),
        ({"train": {"reward": {"batch_stride": 0}}}, "reward: batch_stride is 0; give 1"),
        ({"train": {"reward": {"constraint": {"limit": 1}}}}, "reward.constraint: 'limit' is unknown; known are comp"),
        ({"train": {"reward": {"constraint": {"bound": -1}}}}, "reward.constraint: the bound on 'own_text' is -1"),
        ({"train": {"reward": {"constraint": {"component": "truth"}}}}, "reward: the constraint is on 'truth'"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named_with_its_place(entry, message):
    with pytest.raises(ValueError, match=message):
        configured(EDITORS["rledit"], {"rledit": entry})


def test_a_file_of_hyperparameters_can_ask_for_preservation():
    weights = {"generalization": 1.0, "own_text": 0.5, "continuation": 0.25}
    reward = {"components": weights, "constraint": {"bound": 0.2, "rate": 3.0}}
    editor = configured(EDITORS["rledit"], {"rledit": {"train": {"reward": reward}}})
    found = editor.reward()
    assert {name: weight for name, (weight, _) in found.components.items()} == weights
    assert found.components["own_text"][1] == OwnText() and found.components["continuation"][1] == Continuation()
    assert found.constraint == Constraint("own_text", bound=0.2, rate=3.0)
    assert json.loads(json.dumps(editor.description()))["training"]["reward"] == reward


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no file of hyperparameters"),
        ("[]", "is no file of hyperparameters"),
        ('{"models": []}', "is no file of hyperparameters .*'editors'"),
        ('{"editors": {"rledit": 3}}', "is no file of hyperparameters"),
        ('{"editors": {"romeo": {}}}', "editors: 'romeo' is unknown"),
        ('{"editors": {"rledit": {"environment": {}}}}', "editor 'rledit': 'environment' is unknown; known are env"),
    ],
)
def test_a_file_of_hyperparameters_that_makes_no_sense_is_named(tmp_path, text, message):
    path = tmp_path / "mine.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_configs(path, "zsre")


def test_what_an_entry_says_of_a_kind_holds_for_that_kind_only(tmp_path):
    path = tmp_path / "mine.json"
    entry = {"config": {"step_size": 2.0}, "env": {"token": "all"}, "kinds": {"zsre": {"config": {"step_size": 3.0}}}}
    path.write_text(json.dumps({"editors": {"fine-tuning": entry}}), encoding="utf-8")
    for kind, expected in (("zsre", 3.0), ("fever", 2.0)):
        editor = configured(EDITORS["fine-tuning"], load_configs(path, kind))
        assert editor.configuration().step_size == expected and editor.env["token"] == "all"


def test_a_starred_editor_has_its_trainer_s_settings_and_its_own():
    entries = {
        "mend": {"config": {"network": {"rank": 5}}, "env": {"edit_modules": ["a"]}, "train": {"trajectories": 3}},
        "mend*": {"config": {"retrain_steps": 2}},
    }
    starred = configured(EDITORS["mend*"], entries)
    config = starred.configuration()
    assert (config.network.rank, config.retrain_every, config.retrain_steps) == (5, 3, 2)
    assert starred.env["edit_modules"] == ["a"]
    assert starred.trainer == configured(EDITORS["mend"], entries)
    assert starred.trainer.training.trajectories == 3 and starred.trainer.configuration().retrain_every == 0


def test_the_editors_without_training_are_those_of_the_registry_that_nothing_trains():
    free = training_free_editors()
    assert {"none", "fine-tuning", "ft-l", "ft-m", "crispedit", "ultraedit"} <= set(free)
    assert {"rome", "memit", "prune", "rect", "alphaedit"} <= set(free)
    assert {"mend", "mend*", "malmen", "dafnet", "rledit", "rledit-paper"}.isdisjoint(free)


def test_an_editor_is_found_by_its_name_or_short_name_and_a_misspelt_one_is_suggested():
    assert find_editor("recursion") is EDITORS["ultraedit+recursion"] is chosen_editors(["recursion"])[0]
    with pytest.raises(ValueError, match="did you mean 'ultraedit'"):
        find_editor("ultraedits")


def test_a_step_size_scales_all_numbers_that_an_editor_moves_by():
    editor = with_step_size(EDITORS["ft-l"], 1e-3, 1)
    config = editor.configuration()
    assert (config.learning_rate, config.epsilon) == (1e-3, pytest.approx(1e-3))
    small = configured(EDITORS["ft-l"], load_configs(find_configs("smollm2-135m"), "zsre"))
    config = with_step_size(small, 1e-3, 2).configuration()
    assert (config.learning_rate, config.epsilon) == (1e-3, pytest.approx(2e-3))  # its file says 0.005 and 0.01
    assert with_step_size(small, 1e-3, 2).env["steps_per_batch"] == 2
    assert configured_step_size(with_step_size(EDITORS["ultraedit"], 0.5, 1)) == 0.5


@pytest.mark.parametrize(("name", "size", "message"), [
    ("memit", 1.0, "has no step size"), ("ultraedit", 0.0, "give a positive number"),
    ("ultraedit", float("nan"), "give a positive number"), ("ft-l", float("inf"), "give a positive number"),
])  # fmt: skip
def test_a_step_size_that_cannot_be_is_refused(name, size, message):
    with pytest.raises(ValueError, match=message):
        with_step_size(EDITORS[name], size, 1)


def test_a_saved_agent_keeps_its_own_settings_but_those_that_its_entry_names():
    editor = EDITORS["rledit"]
    assert {"token", "steps_per_batch"} <= set(configured(editor, {}).env)
    assert configured(editor, {"rledit": {"saved": "elsewhere"}}).env == {}
    named = {"saved": "elsewhere", "env": {"present_until": 0.9}}
    assert configured(editor, {"rledit": named}).env == {"present_until": 0.9}


@pytest.mark.parametrize(("kind", "weight"), [("zsre", 5.0), ("counterfact", 4.0)])
def test_the_shipped_agents_and_what_they_started_from_are_compared_on_their_own_settings(kind, weight):
    entries = load_configs(find_configs("smollm2-135m"), kind)
    shipped, rule = (configured(EDITORS[name], entries) for name in ("rledit", "rledit-untrained"))
    settings = agent_settings(find_agent("default", kind))
    trained = settings["environment"]
    assert (shipped.saved, shipped.env) == ("default", {})
    for name in ("token", "present_until", "contexts"):
        assert rule.env.get(name) == (trained.get(name) or None), name
    assert rule.env["edit_modules"] == "model.layers.[2-20].mlp.{gate,up}_proj"
    assert rule.configuration().network.memory_weight == weight
    assert settings["config"]["network"].get("memory_weight", 1.0) == weight
    both = {f"model.layers.{layer}.mlp.{name}_proj" for layer in range(2, 21) for name in ("gate", "up")}
    assert set(trained["edit_modules"]) == both


def test_what_names_the_step_size_changes_no_description_of_a_finished_comparison():
    assert not {"step_size", "presentations"} & set(EDITORS["ultraedit"].description())


def test_every_editor_but_none_has_a_strength_and_says_what_it_tries():
    assert [name for name, editor in EDITORS.items() if editor.strength is None] == ["none"]
    for editor in EDITORS.values():
        if editor.strength is not None:
            assert len(set(editor.strength.factors)) == 3 and 1.0 in editor.strength.factors
            trained = editor.training is not None or editor.trained_as is not None
            assert editor.scales_trained == editor.strength.of_training == trained


STRENGTHS = {  # number → its power of the factor
    "fine-tuning": {"step_size": 1}, "ultraedit": {"step_size": 1}, "stableedit": {"step_size": 1},
    "ft-l": {"learning_rate": 1, "epsilon": 1},
    "crispedit": {"learning_rate": 1}, "rome": {"value.learning_rate": 1, "value.clamp": 1},
    "memit": {"covariance_weight": -1},
    "memit+recursion": {"covariance_weight": -1, "anchor": -1}, "prune": {"covariance_weight": -1},
    "alphaedit+nas": {"ridge": -1}, "malmen": {}, "rledit": {},
}  # fmt: skip


@pytest.mark.parametrize(("name", "powers"), STRENGTHS.items())
def test_a_strength_scales_its_numbers_and_no_other(name, powers):
    editor = EDITORS[name]
    before, after = flat(asdict(editor.configuration())), flat(asdict(with_strength(editor, 3.0).configuration()))
    assert {k for k in before if before[k] != after[k]} == set(powers)
    for number, power in powers.items():
        assert after[number] == pytest.approx(before[number] * 3.0**power)


def flat(numbers: dict, prefix: str = "") -> dict:
    found: dict = {}
    for name, value in numbers.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def test_a_strength_has_a_folder_and_a_description_of_its_own_and_one_is_the_editor_itself():
    editor = EDITORS["ultraedit"]
    assert with_strength(editor, 1.0) is editor and "factor" not in editor.description()
    strong = with_strength(editor, 2.0)
    assert (strong.label, strong.title, strong.description()["factor"]) == ("ultraedit@2", "UltraEdit ×2", 2.0)
    assert with_step_size(strong, 0.5, 1).configuration().step_size == 0.5  # a step size is what it says


@pytest.mark.parametrize(("name", "factor", "message"), [
    ("none", 2.0, "has no strength"), ("ultraedit", 0.0, "give a positive number"),
    ("ultraedit", float("nan"), "give a positive number"), ("rledit", float("inf"), "give a positive number"),
])  # fmt: skip
def test_a_strength_that_cannot_be_is_refused(name, factor, message):
    with pytest.raises(ValueError, match=message):
        with_strength(EDITORS[name], factor)


@pytest.mark.parametrize("name", ["mend", "malmen", "dafnet", "rledit", "rledit-paper"])
def test_the_strength_of_a_trained_editor_is_a_factor_of_its_trained_step_sizes(name, make_env):
    from agents.running.comparison import scaled

    entries = load_configs(find_configs("tiny-llama"), "zsre")
    editor = configured(EDITORS[name], entries)
    env = make_env(array_backend="torch", **editor.env)
    agent = editor.agent_class()(env, editor.configuration())
    before = agent.network.step_sizes().detach().clone()
    assert scaled(agent, editor) is agent and agent.network.step_sizes().equal(before)
    scaled(agent, with_strength(editor, 4.0))
    assert agent.network.step_sizes().tolist() == pytest.approx((4 * before).tolist())


def test_an_agent_without_step_sizes_has_no_strength_but_its_own(make_env):
    from agents import NoEditAgent
    from agents.running.comparison import scaled

    editor = replace(EDITORS["rledit"], saved="elsewhere")
    agent = NoEditAgent(make_env())
    assert scaled(agent, editor) is agent
    with pytest.raises(ValueError, match="is a trained NoEditAgent, which has no step sizes to multiply by 2"):
        scaled(agent, with_strength(editor, 2.0))
