"""Moments of training facts: what streams start from, so that a single fact takes."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from agents import (
    FineTuningAgent,
    HypernetworkConfig,
    MALMENConfig,
    MENDConfig,
    RLEditAgent,
    RLEditConfig,
    UltraEditAgent,
    UltraEditConfig,
    edit_facts,
    load_agent,
)
from agents.base import used_rows
from agents.files import TRAINING_STATE, read_tensors
from agents.hypernetworks.dafnet import DAFNetConfig
from agents.rledit.hypernetwork import Hypernetwork
from agents.rledit.moments import MissingMomentsWarning, Moments, start_warm, take, training_moments
from agents.rledit.normaliser import RunningNormaliser, moments_state
from agents.running.add_moments import main
from agents.running.editors import EDITORS
from rledit_env import cli

MODULES = "model.layers.[1-2].mlp.{gate,up}_proj"
QUIET: dict[str, Any] = {"progress_bar": False}


def config(**network: Any) -> RLEditConfig:
    settings = {"rank": 4, "blocks": 1, "step_size": 1e-3, "prior": 0.0, **network}
    return RLEditConfig(network=HypernetworkConfig(**settings), prior_batches=3)


@pytest.fixture
def env(tiny_lm, make_env):
    """A training environment of three batches of four facts."""
    return make_env(
        "counterfact", model=tiny_lm(modules=MODULES), batch_size=4, array_backend="torch", reward="efficacy",
        reward_gradient=True, token="subject",
    )  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLEDIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moments"


def norms(action: Any) -> torch.Tensor:
    """‖ΔW‖ of an action by module."""
    return torch.stack([torch.linalg.matrix_norm(v.T @ action["keys"][m]) for m, v in action["values"].items()])


def first_update(agent: Any, env: Any, facts: int, seed: int = 1) -> torch.Tensor:
    """The size, by module, of the agent's first update of a stream that begins with so many facts."""
    other = copy.copy(env)
    other.stream = type(env.stream)(env.dataset, 1, facts)
    observation, _ = other.reset(seed=seed)
    agent.reset()
    return norms(agent.predict(observation)[0])


# -- what a single fact gets


def test_a_fact_alone_is_edited_as_strongly_as_in_a_batch_and_without_moments_not_at_all(env):
    cold = RLEditAgent(env, config())
    assert (first_update(cold, env, 1) == 0).all() and (first_update(cold, env, 4) > 0).all()
    warm = RLEditAgent(env, config())
    warm.gather_moments(env, **QUIET)
    ratio = first_update(warm, env, 1) / first_update(warm, env, 4)
    assert (ratio > 0.1).all() and (ratio < 2).all()


@pytest.mark.parametrize("aggregation", ["mend", "least_squares", "recursive"])
def test_the_gradient_of_a_fact_counts_alike_in_batches_of_every_size(aggregation):
    """The environment's δ is of a mean over the batch: a fact that comes twice has half of it in each row."""
    generator = torch.Generator().manual_seed(0)
    net = Hypernetwork({"a": (6, 4)}, HypernetworkConfig(rank=3, aggregation=aggregation, prior=0.0))
    moments: Moments = {}
    for _ in range(3):
        take(moments, {"a": torch.randn(5, 6, generator=generator)}, {"a": torch.randn(5, 4, generator=generator)})
    net.start_from(moments)
    u, gradient = torch.randn(1, 6, generator=generator), torch.randn(1, 4, generator=generator)
    one = net.observe({"a": u}, {"a": gradient}).inputs["0"]
    net.reset()
    twice = net.observe({"a": u.repeat(2, 1)}, {"a": gradient.repeat(2, 1) / 2}).inputs["0"]
    weight = net.config.warm_up_rows
    mean, own = moments["a"].mean, torch.cat([u, gradient], 1)
    for rows, n in ((one, 1), (twice, 2)):  # the row itself is part of the running mean
        normaliser = RunningNormaliser(10, start=moments["a"], start_rows=weight)
        normaliser.update(own.repeat(n, 1))
        expected = (own - ((weight - n) * mean + n * own) / weight) * normaliser.moments()[1]
        torch.testing.assert_close(rows[0], expected.repeat(n, 1), rtol=1e-4, atol=1e-5)


def test_a_start_stands_in_for_missing_rows_and_counts_no_more_when_there_are_enough():
    generator = torch.Generator().manual_seed(0)
    start, own = RunningNormaliser(3), 3 - torch.randn(8, 3, generator=generator)
    start.update(5 + 2 * torch.randn(50, 3, generator=generator))
    before = {k: v.clone() for k, v in start.state().items()}
    normaliser, alone = RunningNormaliser(3, start=start, start_rows=8), RunningNormaliser(3)
    for mine, other in zip(normaliser.moments(), start.moments(), strict=True):
        torch.testing.assert_close(mine, other)
    normaliser.update(own[:2])
    mean = (6 * start.mean + own[:2].sum(0)) / 8
    variance = (start.squares / 49 * 5 + 6 * (start.mean - mean) ** 2 + ((own[:2] - mean) ** 2).sum(0)) / 7
    torch.testing.assert_close(normaliser.moments()[0], mean)
    torch.testing.assert_close(normaliser.moments()[1], 1 / (variance.sqrt() + 1e-8), rtol=1e-5, atol=0)
    normaliser.update(own[2:])
    for part in (own[:2], own[2:]):
        alone.update(part)
    assert all(torch.equal(a, b) for a, b in zip(normaliser.moments(), alone.moments(), strict=True))
    assert all(torch.equal(v, before[k]) for k, v in start.state().items())


# -- the agent's own moments


def test_moments_are_those_of_the_first_batches_of_training_streams(env):
    agent = RLEditAgent(env, config())
    agent.gather_moments(env, **QUIET)
    rows = []
    for i in range(3):
        keys, gradients = used_rows(env.reset(seed=i)[0], torch.device("cpu"))
        rows.append({m: torch.cat([keys[m], 4 * gradients[m]], 1) for m in keys})
    for m, normaliser in agent.network.training_moments.items():
        every = torch.cat([r[m] for r in rows])
        torch.testing.assert_close(normaliser.mean, every.mean(0), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(1 / normaliser.moments()[1], every.std(0), rtol=1e-3, atol=1e-6)


def test_learning_gathers_moments_first_and_every_stream_starts_from_them(env):
    agent = RLEditAgent(env, config()).learn(3, **QUIET)
    gathered = RLEditAgent(env, config())
    gathered.gather_moments(env, **QUIET)
    saved = moments_state(gathered.network.training_moments)
    assert all(torch.equal(v, saved[k]) for k, v in moments_state(agent.network.training_moments).items())
    for _ in range(2):
        agent.reset()
        for m, normaliser in agent.network.normalisers.items():
            first, gathered_moments = normaliser.moments(), agent.network.training_moments[m].moments()
            assert float(normaliser.count) == 0
            assert all(torch.allclose(a, b) for a, b in zip(first, gathered_moments, strict=True))
        agent.predict(env.reset(seed=0)[0])
    cold = RLEditAgent(env, config(warm_up=False)).learn(3, **QUIET)
    assert cold.network.training_moments == {}


@pytest.mark.parametrize("where", ["save", "best", "last"])
def test_moments_are_saved_with_the_agent_and_its_checkpoints(env, tmp_path: Path, where: str):
    held_out = copy.copy(env)
    agent = RLEditAgent(env, config()).learn(3, log_dir=tmp_path, eval_env=held_out, eval_every=1, **QUIET)
    if where == "save":
        agent.save(tmp_path / "save")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_agent(tmp_path / where, env)
    assert torch.equal(first_update(loaded, env, 1), first_update(RLEditAgent.load(tmp_path / where), env, 1))
    assert (first_update(loaded, env, 1) > 0).all()
    fresh = load_agent(tmp_path / where, env)  # a stream that begins without a reset, too
    if where != "save":  # which keeps the stream it was in
        observation, _ = env.reset(seed=1)
        begun = norms(fresh.predict(observation)[0])
        fresh.reset()
        assert torch.equal(begun, norms(fresh.predict(observation)[0]))


def test_an_interrupted_training_goes_on_with_its_moments(env, tmp_path: Path):
    whole = RLEditAgent(env, config()).learn(6, **QUIET)
    RLEditAgent(env, config()).learn(3, log_dir=tmp_path, **QUIET)
    resumed = RLEditAgent(env, config()).learn(6, log_dir=tmp_path, **QUIET)
    for mine, other in zip(whole.network.learned_parameters(), resumed.network.learned_parameters(), strict=True):
        torch.testing.assert_close(mine, other)
    with pytest.raises(ValueError, match=r"config.network.warm_up: True there, False here"):
        RLEditAgent(env, config(warm_up=False)).learn(9, log_dir=tmp_path, **QUIET)


# -- agents of earlier versions


def test_a_run_of_an_earlier_version_goes_on_as_it_was_begun(env, tmp_path: Path):
    RLEditAgent(env, config(warm_up=False)).learn(3, log_dir=tmp_path, **QUIET)
    tensors, metadata = read_tensors(tmp_path / "last" / TRAINING_STATE)
    counters = json.loads(metadata["training"])
    del counters["config"]["network"]["warm_up"], counters["config"]["network"]["warm_up_rows"]
    save_file(tensors, tmp_path / "last" / TRAINING_STATE, {"training": json.dumps(counters)})
    with pytest.raises(ValueError, match=r"config.network.warm_up: False there, True here"):
        RLEditAgent(env, config()).learn(6, log_dir=tmp_path, **QUIET)
    resumed = RLEditAgent(env, config(warm_up=False)).learn(6, log_dir=tmp_path, **QUIET)
    assert resumed.updates == 2 and resumed.network.training_moments == {}


def saved_by_an_earlier_version(env: Any, folder: Path) -> RLEditAgent:
    agent = RLEditAgent(env, config(warm_up=False))
    agent.save(folder)
    path = folder / "agent.json"
    description = json.loads(path.read_text())
    del description["config"]["network"]["warm_up"], description["config"]["network"]["warm_up_rows"]
    description["environment"]["model"] = "tiny-llama"
    path.write_text(json.dumps(description))
    return agent


def test_an_agent_of_an_earlier_version_behaves_as_before_and_says_so_with_the_mend(env, tmp_path: Path):
    before = saved_by_an_earlier_version(env, tmp_path)
    with pytest.warns(MissingMomentsWarning, match=f"python -m agents.running.add_moments {tmp_path}") as said:
        loaded = load_agent(tmp_path, env)
    assert len(said) == 1
    for facts in (1, 4):
        assert torch.equal(first_update(loaded, env, facts), first_update(before, env, facts))
    loaded.learn(3, **QUIET)  # and goes on learning as it did
    assert loaded.network.training_moments == {}


def test_a_command_adds_moments_to_a_saved_agent_and_changes_nothing_else(env, tmp_path: Path, capsys):
    saved_by_an_earlier_version(env, tmp_path)
    old = load_file(tmp_path / "agent.safetensors")
    assert main([str(tmp_path)]) == 0 and "written" in capsys.readouterr().out
    new = load_file(tmp_path / "agent.safetensors")
    assert all(torch.equal(v, new[k]) for k, v in old.items() if not k.startswith("stream."))
    assert {k.split(".")[0] for k in set(new) - set(old)} == {"moments"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agent = load_agent(tmp_path, env)
    assert (first_update(agent, env, 1) > 0).all()
    first = (tmp_path / "agent.safetensors").read_bytes()
    assert main([str(tmp_path)]) == 0
    assert (tmp_path / "agent.safetensors").read_bytes() == first  # and can be repeated


def test_the_command_names_what_is_wrong_in_one_line(env, tmp_path: Path, capsys):
    assert main([str(tmp_path / "none")]) == 2 and "does not exist" in capsys.readouterr().err
    FineTuningAgent(env).save(tmp_path / "other")
    assert main([str(tmp_path / "other")]) == 2
    assert "needs no moments" in capsys.readouterr().err
    saved_by_an_earlier_version(env, tmp_path / "old")
    path = tmp_path / "old" / "agent.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "environment": None}))
    assert main([str(tmp_path / "old")]) == 2
    error = capsys.readouterr().err
    assert "does not say its environment's id; call agent.gather_moments(env)" in error and error.count("\n") == 1


def test_damaged_moments_are_named(env, tmp_path: Path):
    RLEditAgent(env, config()).learn(3, **QUIET).save(tmp_path)
    tensors = load_file(tmp_path / "agent.safetensors")
    name = next(k for k in tensors if k.startswith("moments.") and k.endswith("mean"))
    for bad in ({k: v for k, v in tensors.items() if k != name}, {**tensors, name: torch.zeros(3)}):
        save_file(bad, tmp_path / "agent.safetensors")
        with pytest.raises(ValueError, match=f"{name.removeprefix('moments.')} has shape"):
            load_agent(tmp_path, env)


def test_moments_of_other_modules_or_of_a_single_row_are_refused():
    net = Hypernetwork({"a": (6, 4)}, HypernetworkConfig(rank=3))
    with pytest.raises(ValueError, match=r"of 1 modules such as \('b', 10\), the network edits 1 such as \('a', 10\)"):
        net.start_from({"b": RunningNormaliser(10)})
    with pytest.raises(ValueError, match="0 modules such as None"):
        net.start_from({})
    moments: Moments = {}
    take(moments, {"a": torch.ones(1, 6)}, {"a": torch.ones(1, 4)})
    with pytest.raises(ValueError, match="of 1 rows; gather those of two facts or more"):
        net.start_from(moments)
    with pytest.raises(ValueError, match="warm_up_rows is 1; give 2 or more, or warm_up=False"):
        HypernetworkConfig(warm_up_rows=1)


# -- moments of bundled facts, for editors without an agent's


def test_bundled_facts_moments_are_computed_once_for_a_model_modules_and_token(tiny_lm, cache: Path, monkeypatch):
    lm = tiny_lm(modules=MODULES)
    first = training_moments(lm, "answer", facts=30)
    assert {m: len(n.mean) for m, n in first.items()} == {m: sum(s) for m, s in lm.module_shapes.items()}
    assert all(float(n.count) >= 30 for n in first.values()) and len(list(cache.iterdir())) == 1
    lm.apply(*({m: torch.ones(1, s[side]) for m, s in lm.module_shapes.items()} for side in (0, 1)))
    edited = {m: lm.weight(m).clone() for m in lm.module_shapes}
    other = training_moments(lm, "answer", facts=30, cache=cache)  # computed anew, of the pre-trained weights
    assert all(torch.equal(lm.weight(m), edited[m]) for m in edited)
    for name, value in moments_state(first).items():
        torch.testing.assert_close(moments_state(other)[name], value, rtol=1e-4, atol=1e-6)
    with monkeypatch.context() as patched:
        patched.setattr(lm, "trace", lambda *_: pytest.fail("the moments are in the cache"))
        again = training_moments(lm, "answer", facts=30)
    assert all(torch.equal(moments_state(again)[k], v) for k, v in moments_state(first).items())
    training_moments(lm, "subject", facts=30)
    training_moments(tiny_lm(modules="model.layers.2.mlp.up_proj"), "answer", facts=30)
    assert len(list(cache.glob("*.safetensors"))) == 3


def test_a_damaged_cache_is_computed_anew(tiny_lm, cache: Path):
    lm = tiny_lm(modules=MODULES)
    first = moments_state(training_moments(lm, facts=20))
    [path] = cache.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(UserWarning, match="is damaged"):
        again = moments_state(training_moments(lm, facts=20))
    assert all(torch.equal(again[k], v) for k, v in first.items())


@pytest.mark.parametrize("recursion", [False, True])
def test_ultraedit_starts_as_published_and_from_bundled_facts_where_asked_to(env, cache, tmp_path, recursion):
    settings = {"step_size": 1e-3, "recursion": recursion}
    apart = UltraEditAgent(env, UltraEditConfig(**settings, normaliser_scope="module")).learn(0)
    assert (first_update(apart, env, 1) == 0).all()  # a single row a module less its own mean
    published = UltraEditAgent(env, UltraEditConfig(**settings)).learn(0)
    assert (first_update(published, env, 1) > 0).all()  # the rows of four modules of one shape
    warm = UltraEditAgent(env, UltraEditConfig(step_size=1e-3, recursion=recursion, warm_up=True)).learn(0)
    assert (first_update(warm, env, 1) > 0).all()
    warm.save(tmp_path / "agent")
    assert torch.equal(first_update(load_agent(tmp_path / "agent", env), env, 1), first_update(warm, env, 1))
    with pytest.raises(ValueError, match="make the agent with env="):
        UltraEditAgent(None, UltraEditConfig(warm_up=True), shapes={"a": (3, 4)}).learn(0)


def test_editors_under_a_published_name_start_as_published():
    for published in (MENDConfig(), MALMENConfig(), DAFNetConfig()):
        assert not published.network.warm_up
    for name in ("mend+rledit", "malmen+rledit", "rledit-paper"):
        assert not EDITORS[name].configuration().network.warm_up
    assert not UltraEditConfig().warm_up
    assert RLEditConfig().network.warm_up and EDITORS["rledit"].configuration().network.warm_up


def test_a_warm_start_is_for_agents_that_normalise_with_their_streams_moments_and_have_none(env, cache):
    lm = env.lm
    cold, own = RLEditAgent(env, config()), RLEditAgent(env, config())
    own.gather_moments(env, **QUIET)
    before = first_update(own, env, 1)
    assert start_warm(cold, lm, "subject") and (first_update(cold, env, 1) > 0).all()
    assert not start_warm(own, lm, "subject") and torch.equal(first_update(own, env, 1), before)
    assert not start_warm(RLEditAgent(env, config(normaliser="lifetime")), lm, "subject")
    assert not start_warm(FineTuningAgent(env), lm, "subject")


def test_the_first_of_single_facts_moves_the_model_as_much_as_the_tenth(env, cache):
    facts = replace(env.dataset, records=env.dataset.records[:10])
    sizes = {}
    for warm in (False, True):
        agent = UltraEditAgent(env, UltraEditConfig(step_size=1e-5, normaliser_scope="module"))
        if warm:
            start_warm(agent, env.lm, "subject")
        sizes[warm] = edit_facts(env.lm, agent, facts, batch_size=1, token="subject").update_norms
    assert sizes[False][0] == 0 < sizes[False][9]
    assert 0.5 < sizes[True][0] / sizes[True][9] < 2


# -- the command line


def edited(folder: Path, out: Path, *options: str) -> dict[str, Any]:
    """The report of editing one fact with `rledit edit`."""
    facts = out.with_suffix(".jsonl")
    facts.write_text('{"prompt": "The capital of Freedonia is", "target": "Sylvania", "subject": "Freedonia"}\n')
    arguments = ["edit", "--facts", str(facts), "--agent", str(folder), "--save", "delta", "--out", str(out), *options]
    assert cli.main(arguments) == 0
    return json.loads((out / "edit_report.json").read_text())


def test_rledit_edit_lets_an_agent_without_moments_start_from_bundled_facts(env, cache, tmp_path: Path, capsys):
    saved_by_an_earlier_version(env, tmp_path / "old")
    report = edited(tmp_path / "old", tmp_path / "warm")
    note = "the agent has no moments of training facts, and starts from those of bundled ones"
    assert report["drift"] > 0 and note in report["notes"]
    shown = capsys.readouterr()
    assert f"note: {note}" in shown.out and "without moments" not in shown.err
    with pytest.warns(MissingMomentsWarning, match="python -m agents.running.add_moments"):
        report = edited(tmp_path / "old", tmp_path / "cold", "--no-warm-up")
    assert report["drift"] == 0 and note not in report["notes"]


def test_a_ledger_of_a_warm_start_is_not_gone_on_with_cold(env, cache, tmp_path: Path, capsys):
    saved_by_an_earlier_version(env, tmp_path / "old")
    ledger = ("--ledger", str(tmp_path / "ledger"))
    edited(tmp_path / "old", tmp_path / "warm", *ledger)
    arguments = ["edit", "--facts", str(tmp_path / "warm.jsonl"), "--agent", str(tmp_path / "old"), *ledger, "--resume"]
    with pytest.warns(MissingMomentsWarning):
        assert cli.main([*arguments, "--out", str(tmp_path / "cold"), "--no-warm-up"]) == 2
    assert "--warm-up: True there" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "warm"), [((), True), (("--no-warm-up",), False)])
def test_rledit_train_gathers_moments_unless_told_not_to(tmp_path: Path, flag, warm, capsys):
    arguments = [
        "train", "--env", "RLEdit-CounterFact-v0", "--model", "tiny-llama", "--edit-modules", MODULES, "--out",
        str(tmp_path / "run"), "--num-batches", "1", "--batch-size", "2", "--steps-per-batch", "1",
        "--trajectories", "1", "--rank", "2", "--blocks", "1", "--prior", "0", "--dtype", "float32", *flag,
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    assert bool(load_agent(tmp_path / "run" / "last").network.training_moments) is warm
