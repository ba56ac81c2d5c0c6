"""Locate-then-edit editors give the numbers that the published code gives: its formulas, by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from agents import (
    KeyStatistics,
    MEMITAgent,
    MEMITConfig,
    PRUNEAgent,
    PRUNEConfig,
    RECTConfig,
    ROMEAgent,
    ROMEConfig,
    ValueConfig,
    agent_settings,
    edit_stream,
    load_agent,
)
from agents.locate_then_edit.keys import averaged, subject_keys, write_contexts
from agents.locate_then_edit.prune import restrained
from agents.locate_then_edit.rome import sequential_rank_one
from agents.locate_then_edit.value_optimisation import encode_request, optimise_values
from agents.running.editors import EDITORS, configured, find_configs, load_configs
from rledit_env.ledger import EditLedger
from rledit_env.lm.continued import subject_states
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.head import AfterHead, OutputHead
from rledit_env.lm.losses import kl_divergence, reverse_kl_divergence

OLD = Path(__file__).parent / "first_format"  # agents that the package's first format wrote
ONE, TWO = "model.layers.1.mlp.down_proj", "model.layers.[1-2].mlp.down_proj"
QUICK: dict[str, Any] = {"value": ValueConfig(steps=4), "corpus_tokens": 8192, "contexts": 2}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLEDIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def make(tiny_lm: Callable[..., EditableLM], make_env: Callable[..., Any]) -> Callable[..., Any]:
    """Makes an environment of CounterFact's form on a tiny model."""

    def environment(modules: str = TWO, dtype: torch.dtype = torch.float32, **arguments: Any) -> Any:
        settings = {"token": "subject", "array_backend": "torch", "reward": "none", **arguments}
        return make_env("counterfact", model=tiny_lm("tiny-llama", modules, dtype), **settings)

    return environment


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# -- value optimisation ------------------------------------------------------------------------------------------------


class Scores:
    """A model whose final states are its logits."""

    quantum = 1

    def __init__(self, size: int) -> None:
        head = torch.nn.Linear(size, size, bias=False, dtype=torch.float64)
        head.weight.data = torch.eye(size, dtype=torch.float64)
        self.output = OutputHead(head.requires_grad_(False), AfterHead())


def test_the_divergence_is_that_of_the_new_distribution_from_the_old_one() -> None:
    new, old = (torch.tensor([p], dtype=torch.float64).log() for p in ((0.7, 0.2, 0.1), (0.5, 0.25, 0.25)))
    model: Any = Scores(3)
    assert float(reverse_kl_divergence(model, new, old)) == pytest.approx(0.0993, abs=5e-5)
    assert float(kl_divergence(model, new, old)) == pytest.approx(0.1166, abs=5e-5)  # KL(old ‖ new), what it was before
    torch.testing.assert_close(reverse_kl_divergence(model, old, new), kl_divergence(model, new, old))


def test_the_divergences_gradient_is_autograds() -> None:
    states, reference = 2 * random(5, 7), random(5, 7, seed=1)
    found, expected = states.clone().requires_grad_(), states.clone().requires_grad_()
    model: Any = Scores(7)
    reverse_kl_divergence(model, found, reference).sum().backward()
    log_p, log_q = expected.log_softmax(-1), reference.log_softmax(-1)
    (log_p.exp() * (log_p - log_q)).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad)


def test_the_divergence_is_taken_at_the_subjects_last_token(make: Callable[..., Any]) -> None:
    """By the whole model: what δ at the subject changes of the next token there."""
    env = make(ONE, torch.float64)
    env.reset(seed=0)
    lm = env.lm
    request = encode_request(lm, env.current_batch()[0].record)
    found = {}
    for weight in (0.0, 1.0):
        # One Adam step of size 1e-3 away from 0, and the loss there.
        config = ValueConfig(steps=2, learning_rate=1e-3, weight_decay=0.0, kl_weight=weight, loss_threshold=0.0)
        found[weight] = optimise_values(lm, ONE, [request], config)
    torch.testing.assert_close(found[0.0].delta, found[1.0].delta)  # the divergence has no slope at δ = 0
    ids, place = torch.tensor([request.essence.input_ids]), request.essence.subject_position
    assert place is not None and place < len(request.essence) - 1

    def add(_module: Any, _args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[0, place] += found[1.0].delta[0]
        return output

    with torch.no_grad():
        old = lm.model(input_ids=ids).logits[0, place].log_softmax(-1)
        handle = lm.model.get_submodule(ONE).register_forward_hook(add)
        new = lm.model(input_ids=ids).logits[0, place].log_softmax(-1)
        handle.remove()
    expected = float((new.exp() * (new - old)).sum())
    assert expected > 1e-6
    assert float(found[1.0].loss - found[0.0].loss) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 25])
def test_an_adam_step_follows_every_loss_but_the_last(steps: int, make: Callable[..., Any]) -> None:
    env = make(ONE)
    env.reset(seed=0)
    request = encode_request(env.lm, env.current_batch()[0].record)
    found = optimise_values(env.lm, ONE, [request], ValueConfig(steps=steps, loss_threshold=0.0))
    assert found.steps.tolist() == [steps - 1]  # 25 take 24


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"steps": 0}, "steps is 0; give 1 or more"), ({"kl": "old"}, "kl is 'old'"), ({"clamp": 0.0}, "clamp is 0.0"),
     ({"learning_rate": -1.0}, "learning_rate is -1.0"), ({"kl_weight": -1.0}, "kl_weight is -1.0")],
)  # fmt: skip
def test_wrong_values_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ValueConfig(**wrong)


# -- keys --------------------------------------------------------------------------------------------------------------


def test_the_plain_prompt_weighs_half_in_a_key() -> None:
    keys = torch.tensor([[1.0]] + [[0.0]] * 5)
    assert float(averaged(keys, "balanced")) == 0.5
    assert float(averaged(keys, "mean")) == pytest.approx(1 / 6)  # ROME's
    assert float(averaged(keys[:1], "balanced")) == 1.0  # no context


@pytest.mark.parametrize("name", ["memit", "prune", "rect", "alphaedit"])
def test_editors_on_memit_take_the_balanced_key_and_five_contexts_of_ten_tokens(name: str) -> None:
    config = EDITORS[name].configuration()
    assert (config.key, config.contexts, config.context_lengths) == ("balanced", 5, (10,))


def test_an_editors_key_is_that_of_its_prompts(make: Callable[..., Any]) -> None:
    env = make(TWO)
    env.reset(seed=0)
    modules = list(env.lm.module_shapes)
    requests = [encode_request(env.lm, r.record, ("I know", "They say", "You")) for r in env.current_batch()]
    found, hidden = subject_keys(env.lm, modules, requests, "balanced")
    for i, request in enumerate(requests):
        each = subject_states(env.lm, modules, request.rewrites)
        for m in modules:
            expected = each.keys[m][0] / 2 + each.keys[m][1:].mean(0) / 2
            torch.testing.assert_close(found[m][i], expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(hidden[i], each.hidden[0], atol=1e-5, rtol=1e-4)


def test_memit_solves_with_the_balanced_key(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    env = make(TWO)
    agent = MEMITAgent(env, MEMITConfig(**QUICK))
    observation, _ = env.reset(seed=0)
    seen: list[Tensor] = []
    update_keys = agent.update_keys
    monkeypatch.setattr(agent, "update_keys", lambda module, keys: seen.append(keys) or update_keys(module, keys))
    agent.predict(observation)
    assert agent.contexts is not None
    requests = [encode_request(env.lm, r.record, agent.contexts) for r in env.current_batch()]
    expected = subject_keys(env.lm, agent.modules, requests, "balanced")[0][agent.modules[0]]
    torch.testing.assert_close(seen[0], expected.double())


def test_contexts_of_several_lengths_share_their_number(tiny_lm: Callable[..., EditableLM]) -> None:
    lm = tiny_lm("tiny-llama", TWO)
    drawn: list[tuple[int, int]] = []
    extended = lm.forward.extended

    def watched(starts: Tensor, length: int, draw: Any) -> Tensor:
        drawn.append((len(starts), starts.shape[1] + length))
        return extended(starts, length, draw)

    lm.forward.extended = watched  # type: ignore[method-assign]
    try:
        assert len(write_contexts(lm, 20, (5, 10), 0)) == 20
        assert len(write_contexts(lm, 5, (4, 7), 0)) == 5
        assert len(write_contexts(lm, 1, (4, 7), 0)) == 1
    finally:
        del lm.forward.extended
    assert drawn == [(10, 5), (10, 10), (3, 4), (2, 7), (1, 4)]


@pytest.mark.parametrize("wrong", [{"contexts": -1}, {"context_lengths": ()}, {"context_lengths": (5, 0)}])
def test_wrong_contexts_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
        MEMITConfig(**wrong)


# -- ROME --------------------------------------------------------------------------------------------------------------


def test_without_second_moments_rome_edits_along_the_key_itself() -> None:
    weight, key, mean, target = random(6, 9), random(1, 9, seed=1), random(1, 9, seed=2), random(1, 6, seed=3)
    update_keys, residuals = sequential_rank_one(weight, key, target, None, mean)
    u = mean[0] / mean[0].norm()  # as published: u = k / ‖k‖, and v = (v* − W k) / (kᵀu)
    v = (target[0] - weight @ key[0]) / (key[0] @ u)
    torch.testing.assert_close(residuals.T @ update_keys, torch.outer(v, u))


def test_rome_without_second_moments_reads_no_corpus(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_args: Any, **_kwargs: Any) -> KeyStatistics:
        raise AssertionError("second moments were computed")

    monkeypatch.setattr("agents.locate_then_edit.locate.key_statistics", fails)
    env = make(ONE, batch_size=1)
    agent = ROMEAgent(env, ROMEConfig(second_moment=False, **QUICK))
    observation, _ = env.reset(seed=0)
    action, _ = agent.predict(observation)
    requests = [encode_request(env.lm, r.record, agent.contexts or ()) for r in env.current_batch()]
    mean = subject_keys(env.lm, [ONE], requests, "mean")[0][ONE][0]
    direction = action["keys"][ONE][0]
    torch.testing.assert_close(direction / direction.norm(), mean / mean.norm(), atol=1e-5, rtol=1e-4)


def test_romes_defaults_are_the_published_ones() -> None:
    config = ROMEConfig()
    assert (config.contexts, config.context_lengths, config.key, config.second_moment) == (20, (5, 10), "mixed", True)
    value = config.value
    assert (value.steps, value.learning_rate, value.weight_decay) == (20, 0.5, 0.5)
    assert (value.kl_weight, value.clamp, value.loss_threshold) == (0.0625, 4.0, 0.05)


# Published hyperparameter files: kmeng01/rome and kmeng01/memit (GPT), AlphaEdit's (Llama-3), EasyEdit's (Mistral).
# Model → ROME's mom2_adjustment, layer, v_num_grad_steps, v_weight_decay; MEMIT's layers, v_num_grad_steps, v_lr,
# v_weight_decay, clamp_norm_factor, mom2_update_weight.
FILES: dict[str, tuple[Any, ...]] = {
    "openai-community/gpt2-xl": (True, "17", 20, 0.5, "13-17", 20, 0.5, 0.5, 0.75, 20_000),
    "EleutherAI/gpt-j-6b": (True, "5", 20, 0.5, "3-8", 25, 0.5, 0.5, 0.75, 15_000),
    "meta-llama/Meta-Llama-3-8B-Instruct": (False, "5", 25, 1e-3, "4-8", 25, 0.1, 0.5, 0.75, 15_000),
    "mistralai/Mistral-7B-v0.1": (False, "5", 25, 1e-3, "4-8", 25, 0.5, 1e-3, 4.0, 15_000),
}


@pytest.mark.parametrize("model", FILES)
def test_a_models_file_says_what_is_published_for_it(model: str) -> None:
    moments, layer, rome_steps, rome_decay, layers, steps, rate, decay, clamp, weight = FILES[model]
    entries = load_configs(find_configs(model), "counterfact")
    editor = configured(EDITORS["rome"], entries)
    config = editor.configuration()
    assert f".{layer}.mlp." in editor.env["edit_modules"]
    assert (config.second_moment, config.contexts, config.context_lengths) == (moments, 20, (5, 10))
    assert config.value == ValueConfig(rome_steps, 0.5, rome_decay, 0.0625, 4.0, 0.05, "output", "subject")
    for name in ("memit", "prune", "rect"):
        editor = configured(EDITORS[name], entries)
        config = editor.configuration()
        assert f".[{layers}].mlp." in editor.env["edit_modules"]
        assert (config.key, config.contexts, config.context_lengths) == ("balanced", 5, (10,))
        assert config.value == ValueConfig(steps, rate, decay, 0.0625, clamp, 0.05, "state", "subject")
        assert config.covariance_weight == weight
    if "mistral" not in model:
        editor = configured(EDITORS["alphaedit"], entries)
        config = editor.configuration()
        assert f".[{layers}].mlp." in editor.env["edit_modules"]
        assert config.value == ValueConfig(steps, rate, decay, 0.0625, clamp, 0.05, "state", "subject")
        assert (config.threshold, config.ridge, config.remember) == (0.02, 10.0, True)


# -- PRUNE -------------------------------------------------------------------------------------------------------------


def restrained_sum(original: Tensor, update: Tensor, count: int, adds_to: Any) -> Tensor:
    """W − W₀ after so many equal updates, each batch's action applied as the environment does."""
    weights = {"m": original.clone()}
    lm = SimpleNamespace(weight=weights.__getitem__, original_weight=lambda name: original)
    agent: Any = PRUNEAgent.__new__(PRUNEAgent)
    agent.config, agent.lm, agent.modules, agent._largest = PRUNEConfig(adds_to=adds_to), lm, ["m"], {}
    agent.reset()
    left, values, right = torch.linalg.svd(update, full_matrices=False)
    factors = ({"m": right[:1]}, {"m": values[:1, None] * left[:, :1].T})
    for _ in range(count):
        weights["m"] = weights["m"] + agent.excess().get("m", 0.0)  # what `predict` lets MEMIT edit
        weights["m"] = original + agent.action(None, *factors)["accumulated"]["m"]
    return weights["m"] - original


@pytest.mark.parametrize(("adds_to", "norm"), [("restrained", 18.8), ("raw", 30.9)])
def test_thirty_rank_one_updates_are_restrained_as_one_sum(adds_to: str, norm: float) -> None:
    """σ_max = 16 and thirty updates of norm 8 in one direction: log_1.2(240 / 16) + 16 = 30.85; restrained again after
    each, they end where log_1.2((σ + 8) / 16) + 16 = σ, at 18.84."""
    original = torch.diag(torch.tensor([16.0, 3.0, 1.0, 0.5], dtype=torch.float64))
    direction = torch.outer(random(4, seed=1), random(4, seed=2))
    update = 8 * direction / direction.norm()
    change = restrained_sum(original, update, 30, adds_to)
    assert float(change.norm()) == pytest.approx(norm, abs=0.06)
    if adds_to == "raw":
        torch.testing.assert_close(change, restrained(30 * update, 16.0, 1.2))
        assert float(change.norm()) == pytest.approx(math.log(15, 1.2) + 16)


BROAD = {**QUICK, "value": ValueConfig(steps=4, clamp=0.75, relative_to="state")}
STRONG = PRUNEConfig(covariance_weight=1e-6, base=3.0, **BROAD)  # the restraint acts on the tiny model


def test_pruned_weights_are_those_of_memits_raw_sum_restrained_once_at_the_end(make: Callable[..., Any]) -> None:
    """As published: MEMIT edits the whole stream without restraint, then its sum is restrained."""
    env = make(TWO, torch.float64, num_batches=3)
    shared = {name: getattr(STRONG, name) for name in ("value", "contexts", "corpus_tokens", "covariance_weight")}
    edit_stream(env, MEMITAgent(env, MEMITConfig(**shared)), seed=0)
    largest = {m: float(torch.linalg.matrix_norm(env.lm.original_weight(m), 2)) for m in env.lm.module_shapes}
    expected = {
        m: restrained(env.lm.weight(m) - env.lm.original_weight(m), largest[m], STRONG.base) for m in largest
    }
    agent = PRUNEAgent(env, STRONG)
    edit_stream(env, agent, seed=0)
    assert agent.excess()  # otherwise this says nothing
    for m, change in expected.items():
        torch.testing.assert_close(env.lm.weight(m) - env.lm.original_weight(m), change, atol=1e-7, rtol=1e-5)


def test_an_update_that_was_taken_back_is_not_in_the_raw_sum(make: Callable[..., Any]) -> None:
    env = make(TWO, num_batches=4)
    agent = PRUNEAgent(env, STRONG)
    observation, _ = env.reset(seed=0)
    for _ in range(2):
        observation, *_ = env.step(agent.predict(observation)[0])
    raw = {m: env.lm.weight(m) - env.lm.original_weight(m) + e for m, e in agent.excess().items()}
    assert raw
    agent.predict(observation)  # proposed, not made
    for m, wanted in raw.items():
        torch.testing.assert_close(env.lm.weight(m) - env.lm.original_weight(m) + agent.excess()[m], wanted)
    env.lm.add({m: torch.ones_like(w) for m, w in raw.items()})  # the LLM is changed by something else
    assert agent.excess() == {}
    agent.reset()
    assert agent.memory() == {}


def test_an_interrupted_run_of_prune_ends_as_it_would_have_ended(make: Callable[..., Any], tmp_path: Path) -> None:
    def break_off(edited: int) -> None:
        if edited == 3:
            raise KeyboardInterrupt

    def run(folder: Path, callbacks: tuple[Any, ...] = ()) -> dict[str, Tensor]:
        env = make(TWO, num_batches=4)
        env.lm.restore()
        agent = PRUNEAgent(env, STRONG)
        if folder.exists():
            ledger = EditLedger(folder)
            ledger.lock()
        else:
            ledger = EditLedger.create(folder, env.lm)
        try:
            edit_stream(env, agent, callbacks=callbacks, ledger=ledger, seed=0)
        finally:
            ledger.close()
        assert agent.excess()  # the raw sum is another one than what the weights hold
        return env.lm.snapshot()

    expected = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", (break_off,))
    found = run(tmp_path / "broken")
    assert all(torch.equal(found[m], w) for m, w in expected.items())


@pytest.mark.parametrize(
    ("config", "wrong", "message"),
    [(PRUNEConfig, {"adds_to": "both"}, "adds_to is 'both'"), (PRUNEConfig, {"base": 1.0}, "base is 1.0"),
     (RECTConfig, {"kept": 0.0}, "kept is 0.0"), (RECTConfig, {"kept": 1.5}, "kept is 1.5")],
)  # fmt: skip
def test_wrong_settings_of_prune_and_rect_are_refused(config: Any, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**wrong)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rome", "memit", "prune"])
def test_an_agent_of_the_first_format_edits_as_it_did(name: str, make: Callable[..., Any]) -> None:
    """The files are from before the published defaults: one context length, steps that were all taken, KL(old ‖ new)
    after "is a", the mean key, and for PRUNE the sum restrained again."""
    assert agent_settings(OLD / name)["format"] == 1
    env = make(ONE if name == "rome" else TWO, num_batches=3)
    agent: Any = load_agent(OLD / name, env)
    assert (agent.config.value.steps, agent.config.value.kl) == (5, "essence")
    assert (agent.config.key, agent.config.context_lengths) == ("mean", (10,))
    kept = load_file(OLD / name / "expected.safetensors")
    env.reset(seed=0)
    observation, *_ = env.step({"updates": {}})
    env.lm.restore({m: kept[f"before/{m}"] for m in env.lm.module_shapes})
    env.step(agent.predict(observation)[0])
    for m in env.lm.module_shapes:
        change = kept[f"after/{m}"] - kept[f"before/{m}"]
        error = (env.lm.weight(m) - kept[f"after/{m}"]).norm() / change.norm()
        assert float(error) < 1e-3


def test_an_agent_of_a_later_format_is_refused_with_what_to_do(make: Callable[..., Any], tmp_path: Path) -> None:
    env = make(TWO)
    MEMITAgent(env, MEMITConfig(**QUICK)).save(tmp_path)
    path = tmp_path / "agent.json"
    path.write_text(path.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(ValueError, match="later version.*format 3.*save the agent again"):
        load_agent(tmp_path, env)


def test_a_saved_prune_goes_on_from_its_raw_sum(make: Callable[..., Any], tmp_path: Path) -> None:
    env = make(TWO, num_batches=4)
    value = replace(STRONG.value, clamp=10.0, steps=10)
    agent = PRUNEAgent(env, replace(STRONG, recursion=True, anchor=1e-6, value=value))
    observation, _ = env.reset(seed=0)
    for _ in range(2):
        observation, *_ = env.step(agent.predict(observation)[0])
    assert agent.excess()
    agent.save(tmp_path)
    other: Any = load_agent(tmp_path, env)
    assert other.memory().keys() == agent.memory().keys()
    wanted, found = (a.predict(observation)[0]["accumulated"] for a in (agent, other))
    assert all(torch.equal(found[m], wanted[m]) for m in wanted)
