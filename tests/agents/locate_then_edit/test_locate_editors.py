"""ROME, MEMIT, PRUNE, RECT, AlphaEdit and their plug-ins: each one's mathematics."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from agents import (
    AlphaEditAgent,
    AlphaEditConfig,
    KeyStatistics,
    MEMITAgent,
    MEMITConfig,
    NotApplicable,
    PRUNEAgent,
    PRUNEConfig,
    RECTAgent,
    RECTConfig,
    ROMEAgent,
    ROMEConfig,
    ValueConfig,
    load_agent,
)
from agents.base import run_stream
from agents.key_statistics import expected_seconds, key_statistics
from agents.locate_then_edit.alphaedit import null_space
from agents.locate_then_edit.keys import subject_keys, write_contexts
from agents.locate_then_edit.least_squares import dense, least_squares_keys
from agents.locate_then_edit.locate import LocateAgent, anchored, rescaled, trimmed_mean
from agents.locate_then_edit.modules import default_output_projections, linear_shape, output_projections
from agents.locate_then_edit.prune import restrained
from agents.locate_then_edit.rect import largest_changes
from agents.locate_then_edit.rome import sequential_rank_one
from agents.locate_then_edit.value_optimisation import Values, encode_request, optimise_values
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.loading.registry import MODELS, default_edit_modules
from rledit_env.lm.names import expand_globs, module_layer

ONE = "model.layers.1.mlp.down_proj"
TWO = "model.layers.[1-2].mlp.down_proj"
QUICK: dict[str, Any] = {"value": ValueConfig(steps=4), "corpus_tokens": 8192, "contexts": 2}
EDITORS: list[tuple[type[LocateAgent], Any]] = [
    (ROMEAgent, ROMEConfig(**QUICK)),
    (MEMITAgent, MEMITConfig(covariance_weight=1.0, **QUICK)),
    (PRUNEAgent, PRUNEConfig(covariance_weight=1.0, **QUICK)),
    (RECTAgent, RECTConfig(covariance_weight=1.0, **QUICK)),
    (AlphaEditAgent, AlphaEditConfig(threshold=0.3, ridge=0.1, **QUICK)),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLEDIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def make(tiny_lm: Callable[..., EditableLM], make_env: Callable[..., Any]) -> Callable[..., Any]:
    """Makes an environment that suits an editor."""

    def environment(editor: type[LocateAgent], name: str = "tiny-llama", **arguments: Any) -> Any:
        modules = ONE if editor is ROMEAgent else TWO
        if name == "tiny-gpt2":
            modules = modules.replace("model.layers", "transformer.h").replace("down_proj", "c_proj")
        arguments = {"token": "subject", "array_backend": "torch", "reward": "none", **arguments}
        return make_env(arguments.pop("kind", "counterfact"), model=tiny_lm(name, modules), **arguments)

    return environment


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moment(size: int) -> Tensor:
    keys = random(200, size, seed=9)
    return keys.T @ keys / 200


# -- ROME ------------------------------------------------------------------------------------------------------------


def test_a_rank_one_edit_gives_the_value_at_the_key_and_moves_ordinary_keys_least() -> None:
    weight, key, target, c = random(6, 9), random(1, 9, seed=1), random(1, 6, seed=2), moment(9)
    update_keys, residuals = sequential_rank_one(weight, key, target, c)
    update = residuals.T @ update_keys
    torch.testing.assert_close((weight + update) @ key[0], target[0])
    cost = torch.trace(update @ c @ update.T)
    for seed in range(5):  # any other update that gives the value moves ordinary keys' outputs more
        other = random(6, 9, seed=seed + 10)
        other -= torch.outer(other @ key[0], key[0]) / key.square().sum()  # none of it reaches the key
        moved = update + 0.1 * other
        assert torch.trace(moved @ c @ moved.T) > cost


def test_a_batch_is_the_sequence_of_its_single_edits() -> None:
    weight, keys, targets, c = random(6, 9), random(4, 9, seed=1), random(4, 6, seed=2), moment(9)
    update_keys, residuals = sequential_rank_one(weight, keys, targets, c)
    expected = weight.clone()
    for key, target in zip(keys, targets, strict=True):
        direction = torch.linalg.solve(c, key)
        expected += torch.outer(target - expected @ key, direction) / (key @ direction)
        torch.testing.assert_close(expected @ key, target)
    torch.testing.assert_close(weight + residuals.T @ update_keys, expected)


def test_the_published_formula_gives_the_value_at_the_key_in_the_mean_keys_direction() -> None:
    weight, keys, mean, targets, c = random(6, 9), random(3, 9, seed=1), random(3, 9, seed=2), random(3, 6), moment(9)
    update_keys, residuals = sequential_rank_one(weight, keys, targets, c, mean)
    expected = weight.clone()
    for key, other, target in zip(keys, mean, targets, strict=True):
        direction = torch.linalg.solve(c, other)
        expected += torch.outer(target - expected @ key, direction) / (key @ direction)
        torch.testing.assert_close(expected @ key, target)
    torch.testing.assert_close(weight + residuals.T @ update_keys, expected)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
# Without contexts the mean is the prompt's key.
@pytest.mark.parametrize("key", [{"key": "prompt"}, {"key": "mixed"}, {"contexts": 0}, {"second_moment": False}])
def test_rome_gives_a_fact_its_value_in_the_model(name: str, key: dict[str, Any], make: Callable[..., Any]) -> None:
    env = make(ROMEAgent, name, batch_size=1)
    agent = ROMEAgent(env, ROMEConfig(**{**QUICK, **key}))
    observation, _ = env.reset(seed=0)
    agent.learn(progress_bar=False)
    assert agent.contexts is not None
    requests = [encode_request(env.lm, r.record, agent.contexts) for r in env.current_batch()]
    action, _ = agent.predict(observation)
    seen: list[Tensor] = []
    (module,) = agent.modules
    passage = requests[0].rewrites[0]
    values = optimise_values(env.lm, module, requests, agent.config.value)
    env.step(action)
    handle = env.lm.model.get_submodule(module).register_forward_hook(lambda *given: seen.append(given[2][0]))
    with torch.no_grad():
        env.lm.model(input_ids=torch.tensor([passage.input_ids]))
    handle.remove()
    torch.testing.assert_close(seen[0][passage.subject_position], values.solved[0], atol=1e-4, rtol=1e-3)


def test_an_unknown_kind_of_key_is_refused() -> None:
    with pytest.raises(ValueError, match="'mixed' or 'mean' or 'prompt'"):
        ROMEConfig(key="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'mixed'; give 'balanced' or 'mean' or 'prompt'"):
        MEMITConfig(key="mixed")


def test_rome_refuses_several_modules(make: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="one module"):
        ROMEAgent(make(MEMITAgent))


# -- MEMIT -----------------------------------------------------------------------------------------------------------


def test_least_squares_satisfies_its_normal_equations_and_is_the_least() -> None:
    keys, residuals, system = random(4, 9), random(4, 6, seed=1), 0.3 * moment(9)
    update = residuals.T @ least_squares_keys(keys, system)
    torch.testing.assert_close(update @ (system + keys.T @ keys), residuals.T @ keys)

    def objective(w: Tensor) -> Tensor:
        return (w @ keys.T - residuals.T).square().sum() + torch.trace(w @ system @ w.T)

    assert all(objective(update) < objective(update + 1e-3 * random(6, 9, seed=s)) for s in range(5))


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
def test_memit_moves_the_last_layers_states_by_the_values_found(name: str, make: Callable[..., Any]) -> None:
    env = make(MEMITAgent, name)
    agent = MEMITAgent(env, MEMITConfig(covariance_weight=1e-6, **{**QUICK, "contexts": 0}))
    env.reset(seed=0)
    agent.learn(progress_bar=False)
    requests = [encode_request(env.lm, r.record) for r in env.current_batch()]
    delta = 0.1 * random(2, 32).float()
    none = torch.zeros(2)
    keys, residuals = agent.solve(requests, Values(torch.zeros(2, 32), delta, none, none))
    _, before = subject_keys(env.lm, agent.modules, requests, "balanced")
    env.lm.add(dense(keys, residuals))
    _, after = subject_keys(env.lm, agent.modules, requests, "balanced")
    # Nothing is preserved at this weight, and the last layer writes whatever the ones below have left.
    torch.testing.assert_close(after - before, delta, atol=1e-3, rtol=1e-2)
    assert all(float(residuals[m].norm()) > 0 for m in agent.modules)


def test_recursion_solves_for_all_facts_so_far_with_an_anchor_to_the_original_weight(make: Callable[..., Any]) -> None:
    env = make(MEMITAgent)
    agent = MEMITAgent(env, MEMITConfig(covariance_weight=0.2, recursion=True, anchor=0.5, **QUICK))
    agent.learn(progress_bar=False)
    module = agent.modules[0]
    d_in = env.lm.module_shapes[module][0]
    original = random(7, d_in)
    weight = original.clone()
    batches = [(random(3, d_in, seed=s), random(3, 7, seed=s + 50)) for s in (1, 2, 3)]
    for keys, targets in batches:
        weight += (targets - keys @ weight.T).T @ agent.update_keys(module, keys)
    every, values = (torch.cat(part) for part in zip(*batches, strict=True))
    anchor = 0.2 * agent.second_moment(module) + 0.5 * torch.eye(d_in, dtype=torch.float64)
    change = torch.linalg.solve(anchor + every.T @ every, every.T @ (values - every @ original.T)).T
    torch.testing.assert_close(weight - original, change)
    agent.reset()
    assert agent.key_moments == {}


# -- AlphaEdit -------------------------------------------------------------------------------------------------------


def preserved(size: int, rank: int) -> Tensor:
    return random(50, rank, seed=3) @ random(rank, size, seed=4)


def test_the_null_space_is_orthonormal_and_orthogonal_to_the_preserved_keys() -> None:
    keys = preserved(9, 5)
    basis = null_space(keys.T @ keys / 50, 1e-9)
    assert basis.shape == (9, 4)
    torch.testing.assert_close(basis.T @ basis, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(keys @ basis, torch.zeros(50, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="null space is empty"):
        null_space(torch.eye(9), 0.5)


def test_alphaedit_is_its_papers_formula_and_leaves_preserved_keys_outputs(make: Callable[..., Any]) -> None:
    env = make(AlphaEditAgent)
    agent = AlphaEditAgent(env, AlphaEditConfig(threshold=1e-9, ridge=0.4, **QUICK))
    d_in = env.lm.module_shapes[agent.modules[0]][0]
    kept = preserved(d_in, d_in // 2)
    agent.statistics = KeyStatistics(dict.fromkeys(agent.modules, kept.T @ kept / 50), 50, "a test")
    agent.learn(progress_bar=False)
    module = agent.modules[0]
    projection = agent.basis(module) @ agent.basis(module).T
    earlier, keys, residuals = random(3, d_in, seed=5), random(2, d_in, seed=6), random(2, 7, seed=7)
    agent.update_keys(module, earlier)
    update = residuals.T @ agent.update_keys(module, keys)
    system = earlier.T @ earlier @ projection + keys.T @ keys @ projection + 0.4 * torch.eye(d_in, dtype=torch.float64)
    torch.testing.assert_close(update, residuals.T @ keys @ projection @ torch.linalg.inv(system))
    torch.testing.assert_close(update @ kept.T, torch.zeros(7, 50, dtype=torch.float64), atol=1e-8, rtol=0)
    assert float((update @ keys.T).norm()) > 0.1


# -- PRUNE and RECT ----------------------------------------------------------------------------------------------------


def test_prune_restrains_only_singular_values_above_the_originals_largest() -> None:
    left, _, right = torch.linalg.svd(random(6, 9), full_matrices=False)
    values = torch.tensor([300.0, 40.0, 10.0, 9.0, 1.0, 0.1], dtype=torch.float64)
    change = restrained((left * values) @ right, 10.0, 1.2)
    expected = [10 + math.log(30, 1.2), 10 + math.log(4, 1.2), 10.0, 9.0, 1.0, 0.1]
    torch.testing.assert_close(torch.linalg.svdvals(change), torch.tensor(expected, dtype=torch.float64))
    assert torch.equal(restrained(change, 1000.0, 1.2), change)


def test_prune_never_enlarges_a_singular_value() -> None:
    change = torch.diag(torch.tensor([3.0, 1.5, 0.5], dtype=torch.float64))
    torch.testing.assert_close(restrained(change, 1.0, 1.2), change)  # log_1.2(3) + 1 = 7 > 3


def test_prune_replaces_the_accumulated_change(make: Callable[..., Any]) -> None:
    env = make(PRUNEAgent)
    agent = PRUNEAgent(env, PRUNEConfig(covariance_weight=1e-3, base=3.0, **QUICK))
    run_stream(env, agent, seed=0)
    observation, _ = env.reset(seed=1, options={"keep_weights": True})
    keys, values = {}, {}
    for module in agent.modules:  # an update that is far too large
        keys[module] = 100 * env.lm.original_weight(module)[:2]
        values[module] = torch.eye(2, 32)
    env.step(agent.action(observation, keys, values))
    for module in agent.modules:
        change = env.lm.weight(module) - env.lm.original_weight(module)
        largest = float(torch.linalg.matrix_norm(env.lm.original_weight(module), 2))
        found = float(torch.linalg.matrix_norm(change, 2))
        assert largest < found < largest + math.log(100 * 2, 3)


def test_rect_keeps_the_largest_relative_changes() -> None:
    update, weight = random(6, 10), random(6, 10, seed=1)
    kept = largest_changes(update, weight, 0.4)
    chosen = kept != 0
    assert int(chosen.sum()) == 24
    assert torch.equal(kept[chosen], update[chosen])
    relative = (update / weight).abs()
    assert relative[chosen].min() > relative[~chosen].max()


# -- NAS ---------------------------------------------------------------------------------------------------------------


def test_rescaled_values_have_one_norm_and_their_own_directions() -> None:
    values = random(5, 8)
    scaled = rescaled(values, 2.5)
    torch.testing.assert_close(scaled.norm(dim=1), torch.full((5,), 2.5, dtype=torch.float64))
    torch.testing.assert_close(torch.cosine_similarity(scaled, values), torch.ones(5, dtype=torch.float64))


def test_the_anchor_is_a_mean_without_the_largest_norms() -> None:
    assert trimmed_mean(torch.tensor([1.0] * 19 + [100.0])) == 1.0
    assert trimmed_mean(torch.tensor([3.0])) == 3.0
    assert trimmed_mean(torch.arange(39.0)) == 18.5  # the published code drops ⌊0.05 · 39⌋ = 1


def test_a_value_of_more_than_twice_the_anchors_norm_is_not_written() -> None:
    initial, solved = random(4, 8), random(4, 8, seed=1)
    solved *= torch.tensor([[1.0], [1.99], [2.01], [50.0]]) / solved.norm(dim=1, keepdim=True)
    values = Values(initial, solved - initial, torch.zeros(4), torch.zeros(4, dtype=torch.long))
    found = anchored(values, 1.0, outlier=2.0)
    torch.testing.assert_close(found.solved[:2].norm(dim=1), torch.ones(2, dtype=torch.float64))
    assert (found.delta[2:] == 0).all() and torch.equal(found.solved[2:], initial[2:])
    every = anchored(values, 1.0, outlier=None)
    torch.testing.assert_close(every.solved.norm(dim=1), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize(("editor", "config"), EDITORS)
def test_a_fact_whose_value_nas_leaves_out_changes_no_weight(
    editor: type[LocateAgent], config: Any, make: Callable[..., Any]
) -> None:
    env = make(editor)
    more: dict[str, Any] = {"norm_anchor": True, "anchor_facts": 3}
    if editor is AlphaEditAgent:
        more["threshold"] = 1e9
    changes = []
    for outlier in (1e-6, None):
        agent = editor(env, type(config)(**{**vars(config), **more, "anchor_outlier": outlier}))
        observation, _ = env.reset(seed=0)
        env.step(agent.predict(observation)[0])
        changes.append(max(float((env.lm.weight(m) - env.lm.original_weight(m)).norm()) for m in env.lm.module_shapes))
    assert changes[0] <= 1e-5 * changes[1] and changes[1] > 0


@pytest.mark.parametrize(("setting", "message"), [
    ({"anchor_outlier": 0.0}, "anchor_outlier is 0.0; give a positive number, or None"),
    ({"anchor_facts": 0}, "anchor_facts is 0; give 1 or more"),
])  # fmt: skip
def test_a_setting_of_nas_that_makes_no_sense_is_named(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MEMITConfig(norm_anchor=True, **setting)


def test_the_published_limits_are_twice_the_anchor_and_five_times_with_rome() -> None:
    assert MEMITConfig().anchor_outlier == 2.0 and ROMEConfig().anchor_outlier == 5.0


@pytest.mark.parametrize(("editor", "config"), [EDITORS[0], EDITORS[1], EDITORS[4]])
def test_nas_hands_values_of_the_anchors_norm_to_every_editor(
    editor: type[LocateAgent], config: Any, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make(editor)
    agent = editor(env, type(config)(**{**vars(config), "norm_anchor": True, "anchor_facts": 3}))
    observation, _ = env.reset(seed=0)
    given: list[Values] = []
    solve = agent.solve
    monkeypatch.setattr(agent, "solve", lambda requests, values: given.append(values) or solve(requests, values))
    agent.predict(observation)
    assert agent.anchor_norm is not None
    torch.testing.assert_close(given[0].solved.norm(dim=1), torch.full((2,), agent.anchor_norm))


def test_nas_takes_its_norm_from_the_original_model(make: Callable[..., Any]) -> None:
    env = make(ROMEAgent)
    norms = []
    for scale in (0.0, 3.0):
        env.lm.restore()
        env.lm.add({m: scale * torch.ones(s[::-1]) for m, s in env.lm.module_shapes.items()})
        agent = ROMEAgent(env, ROMEConfig(norm_anchor=True, anchor_facts=3, **QUICK)).learn(progress_bar=False)
        norms.append(agent.anchor_norm)
    assert norms[0] == norms[1]


# -- all of them -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("editor", "config"), EDITORS)
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
def test_an_editor_changes_the_model_only_through_its_actions(
    editor: type[LocateAgent], config: Any, name: str, make: Callable[..., Any]
) -> None:
    env = make(editor, name)
    config = type(config)(**{**vars(config), "threshold": 1e9}) if editor is AlphaEditAgent else config
    agent = editor(env, config)
    observation, _ = env.reset(seed=0)
    agent.reset()
    before = {n: p.clone() for n, p in env.lm.model.named_parameters()}
    action, _ = agent.predict(observation)
    assert all(torch.equal(before[n], p) for n, p in env.lm.model.named_parameters())
    observation, *_ = env.step(action)
    assert all(drift > 0 for drift in env.lm.drift().values())
    env.step(agent.predict(observation)[0])


@pytest.mark.parametrize(("editor", "config"), EDITORS)
def test_both_array_backends_and_any_traced_tokens_give_the_same_edits(
    editor: type[LocateAgent], config: Any, make: Callable[..., Any]
) -> None:
    config = type(config)(**{**vars(config), "threshold": 1e9}) if editor is AlphaEditAgent else config
    found = []
    for settings in ({}, {"array_backend": "numpy"}, {"token": "answer"}):
        env = make(editor, **settings)
        run_stream(env, editor(env, config), seed=0)
        found.append(env.lm.snapshot())
    for other in found[1:]:
        for module, weight in other.items():
            torch.testing.assert_close(weight, found[0][module], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("editor", "config"), EDITORS)
def test_a_saved_editor_goes_on_with_the_stream_where_it_was(
    editor: type[LocateAgent], config: Any, make: Callable[..., Any], tmp_path: Path
) -> None:
    env = make(editor)
    config = type(config)(**{**vars(config), "threshold": 1e9}) if editor is AlphaEditAgent else config
    config = type(config)(**{**vars(config), "recursion": True}) if editor is MEMITAgent else config
    agent = editor(env, config)
    observation, _ = env.reset(seed=0)
    observation, *_ = env.step(agent.predict(observation)[0])
    agent.save(tmp_path)
    expected, _ = agent.predict(observation)
    loaded = load_agent(tmp_path, env)
    assert type(loaded) is editor and loaded.config == config  # type: ignore[attr-defined]
    action, _ = loaded.predict(observation)
    for part, tensors in expected.items():
        for module, tensor in tensors.items():
            assert torch.equal(action[part][module], tensor)


def test_a_saved_editor_refuses_other_modules(make: Callable[..., Any], tmp_path: Path) -> None:
    MEMITAgent(make(MEMITAgent)).save(tmp_path)
    with pytest.raises(ValueError, match="edits model.layers.1.*, the environment"):
        MEMITAgent.load(tmp_path, make(ROMEAgent))
    with pytest.raises(ValueError, match="give the environment"):
        load_agent(tmp_path)


@pytest.mark.parametrize(("editor", "config"), EDITORS)
def test_facts_without_subjects_are_not_applicable(
    editor: type[LocateAgent], config: Any, make: Callable[..., Any]
) -> None:
    with pytest.raises(NotApplicable, match="subject"):
        editor(make(editor, kind="fever"), config)


def test_modules_of_another_kind_are_refused(tiny_lm: Callable[..., EditableLM]) -> None:
    assert output_projections(tiny_lm("tiny-llama", TWO)) == [TWO.replace("[1-2]", n) for n in "12"]
    for modules in ("model.layers.1.mlp.{gate,up}_proj", "model.layers.1.*.{o,down}_proj"):
        with pytest.raises(ValueError, match="last projection"):
            output_projections(tiny_lm("tiny-llama", modules))


def test_contexts_are_the_same_for_the_same_seed(tiny_lm: Callable[..., EditableLM]) -> None:
    lm = tiny_lm("tiny-llama", TWO)
    assert write_contexts(lm, 5, (12,), 0) == write_contexts(lm, 5, (12,), 0) != write_contexts(lm, 5, (12,), 1)
    assert len(write_contexts(lm, 3, (12,), 0)) == 3 and write_contexts(lm, 0, (12,), 0) == []


@pytest.mark.parametrize("name", [n for n in MODELS if n.startswith("tiny")])
def test_a_model_without_published_layers_is_edited_at_the_last_projections_of_its_default_layers(tiny_lm, name):
    lm = tiny_lm(name, default_edit_modules(name, tiny_lm(name).model)[0])
    found = default_output_projections(lm)
    last = "c_proj" if name == "tiny-gpt2" else "down_proj"
    assert [module.rpartition(".")[2] for module in found] == [last] * 2
    assert [module_layer(module) for module in found] == [0, 1]
    assert ROMEAgent.default_modules(lm) == found[1:]
    assert MEMITAgent.default_modules(lm) == found


def test_an_mlp_whose_last_projection_is_unknown_is_said_to_want_names(tiny_lm):
    with pytest.raises(ValueError, match="name them with edit_modules"):
        default_output_projections(tiny_lm(modules="model.layers.1.mlp.down_proj"))


def test_the_expected_time_of_the_statistics_is_near_what_they_take_and_nothing_once_they_are_kept(tiny_lm, tmp_path):
    lm = tiny_lm(modules=TWO)
    names = list(lm.module_shapes)
    expected = expected_seconds(lm, names, 4_096, cache=tmp_path)
    taken = key_statistics(lm, names, tokens=4_096, cache=tmp_path, progress=False).seconds
    assert taken / 5 < expected < 5 * taken
    assert expected_seconds(lm, names, 4_096, cache=tmp_path) == 0.0


SMALL = {"num_hidden_layers": 6, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64}
OTHER_MODELS = {
    "GPTNeoX": ({**SMALL, "intermediate_size": 64}, "dense_4h_to_h"),
    "OPT": ({**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 16}, "fc2"),
    "Bloom": ({**SMALL, "n_layer": 6, "n_head": 4}, "dense_4h_to_h"),
    "Falcon": (SMALL, "dense_4h_to_h"),
    "GPTNeo": ({"num_layers": 6, "hidden_size": 32, "num_heads": 4, "vocab_size": 64,
                "attention_types": [[["global"], 6]]}, "c_proj"),
    "Phi3": ({**SMALL, "intermediate_size": 64, "pad_token_id": 0}, "down_proj"),
    "Phi": ({**SMALL, "intermediate_size": 64}, "fc2"),
    "GPTJ": ({"n_layer": 6, "n_embd": 32, "n_head": 4, "vocab_size": 64, "rotary_dim": 4}, "fc_out"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_the_last_projections_are_found_whatever_an_architecture_calls_them(name: str) -> None:
    settings, last = OTHER_MODELS[name]
    config = getattr(transformers, f"{name}Config")(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    shapes = {n: linear_shape(linear[n]) for n in expand_globs(default_edit_modules(name, model), list(linear))}
    found = default_output_projections(SimpleNamespace(model=model, module_shapes=shapes, name=name))
    assert [module.rpartition(".")[2] for module in found] == [last, last]
    assert {linear_shape(linear[module])[1] for module in found} == {32}
