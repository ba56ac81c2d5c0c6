"""CrispEdit is Adam on gradients without the directions of high curvature, computed by hand on a tiny model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agents import CrispEditAgent, CrispEditConfig, edit_facts, edit_stream, load_agent
from agents.curvature import Curvature, TextCurvature, answer_curvature
from agents.fine_tuning.rounds import loss_and_gradients
from rledit_env.ledger import EditLedger
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage

MODULES = "model.layers.[1-2].mlp.down_proj"
SMALL: dict[str, Any] = {"steps": 4, "learning_rate": 5e-3, "loss_goal": 0.0, "corpus_tokens": 1024}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("agents.key_statistics.cache_dir", lambda: folder)


@pytest.fixture
def make(tiny_lm: Callable[..., EditableLM], make_env: Callable[..., Any]) -> Callable[..., Any]:
    def made(model: str = "tiny-llama") -> Any:
        lm = tiny_lm(model, MODULES)
        return make_env("counterfact", model=lm, num_batches=3, array_backend="torch", reward="none")

    return made


def edits(env: Any) -> list[Passage]:
    return [record.edit for record in env.current_batch()]


def removing(curvature: Curvature, energy: float) -> Tensor:
    """P of vec(ΔW), rows of ΔW one after another, from the eigenvectors of the dense G ⊗ A."""
    values, vectors = torch.linalg.eigh(torch.kron(curvature.outputs.double(), curvature.inputs.double()))
    order = values.argsort(descending=True)
    count = int((values[order].cumsum(0) / values.sum() < energy).sum()) + 1
    top = vectors[:, order[:count]]
    return torch.eye(len(values), dtype=torch.float64) - top @ top.T


def small_curvature(lm: EditableLM, seed: int = 0) -> dict[str, Curvature]:
    """A curvature of small rank, so that the dense product of both factors has few large eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for m, (d_in, d_out) in lm.module_shapes.items():
        u, g = (torch.randn(6, d, generator=generator) * 2.0 ** -torch.arange(6)[:, None] for d in (d_in, d_out))
        found[m] = Curvature(u.T @ u, g.T @ g)
    return found


def factors_removed(curvature: Curvature, energy: float, change: Tensor) -> Tensor:
    """:func:`removing` by both factors' eigenvectors, where the dense product is too large."""
    a, v = torch.linalg.eigh(curvature.inputs.double())
    g, u = torch.linalg.eigh(curvature.outputs.double())
    values = torch.outer(g, a)
    descending = values.flatten().sort(descending=True).values
    least = descending[int((descending.cumsum(0) / descending.sum() < energy).sum())]
    return (u @ ((u.T @ change.double() @ v) * (values < least)) @ v.T).to(change)


def by_hand(
    lm: EditableLM, passages: Sequence[Passage], config: CrispEditConfig, curvature: dict[str, Curvature],
    states: dict[str, Any],
) -> dict[str, Tensor]:  # fmt: skip
    """ΔW by the formulas of Adam, m̂ / (√v̂ + ε), with each gradient projected; ``states`` has m, v and t by module."""
    start = lm.snapshot()
    changes = {m: torch.zeros_like(w) for m, w in start.items()}
    size = config.batch_size or len(passages)
    for _ in range(config.steps):
        for first in range(0, len(passages), size):
            _, gradients = loss_and_gradients(lm, passages[first : first + size], list(changes), "pooled")
            for m, gradient in gradients.items():
                gradient = factors_removed(curvature[m], config.energy, gradient)
                mean, square, t = states.get(m, (torch.zeros_like(gradient), torch.zeros_like(gradient), 0))
                mean, square, t = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient.square(), t + 1
                states[m] = (mean, square, t)
                corrected = (square / (1 - 0.999**t)).sqrt() + 1e-8
                changes[m] = changes[m] - config.learning_rate * mean / (1 - 0.9**t) / corrected
                if config.projects == "step":
                    changes[m] = factors_removed(curvature[m], config.energy, changes[m])
            lm.restore({m: start[m] + c for m, c in changes.items()})
    lm.restore(start)
    return changes


def test_the_projection_by_factors_is_that_of_the_dense_product() -> None:
    generator = torch.Generator().manual_seed(0)
    u, g = torch.randn(9, 5, generator=generator), torch.randn(9, 4, generator=generator)
    curvature, change = Curvature(u.T @ u, g.T @ g), torch.randn(4, 5, generator=generator, dtype=torch.float64)
    expected = (removing(curvature, 0.8) @ change.flatten()).view(4, 5)
    torch.testing.assert_close(factors_removed(curvature, 0.8, change), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("projects", ["gradient", "step"])
@pytest.mark.parametrize("batch_size", [32, 1])
def test_a_batch_is_edited_by_adam_on_projected_gradients(make: Any, projects: Any, batch_size: int) -> None:
    env = make()
    env.reset(seed=0)
    config = CrispEditConfig(**SMALL, projects=projects, batch_size=batch_size, energy=0.8)
    agent, curvature = CrispEditAgent(env, config), small_curvature(env.lm)
    agent.text = TextCurvature(curvature, 1024, 0.0)
    before = env.lm.snapshot()
    found = agent.predict(None)[0]["updates"]
    assert all(torch.equal(env.lm.weight(m), w) for m, w in before.items())
    expected = by_hand(env.lm, edits(env), config, curvature, {})
    for m, change in expected.items():
        assert float(change.abs().max()) > 1e-2
        # Adam makes much of the little that rounding leaves of entries whose gradient is about zero.
        assert float((found[m] - change).norm() / change.norm()) < 0.02
        assert float(((found[m] - change).abs() > 1e-4).float().mean()) < 0.01


def test_a_stream_is_edited_with_the_facts_so_far_and_adams_moments(make: Any) -> None:
    """After each batch its facts' A and G at the edited weights are added to the means, a token as a token of text."""
    env = make()
    env.reset(seed=0)
    config = CrispEditConfig(**SMALL, energy=0.8)
    agent, text = CrispEditAgent(env, config), small_curvature(env.lm)
    agent.text = TextCurvature(text, 20, 0.0)
    states: dict[str, Any] = {}
    curvature, sums, tokens = text, {m: (20 * c.inputs, 20 * c.outputs) for m, c in text.items()}, 20
    for batch in range(2):
        passages = edits(env)
        expected = by_hand(env.lm, passages, config, curvature, states)
        updates = agent.predict(None)[0]["updates"]
        for m, change in expected.items():
            assert float((updates[m] - change).norm() / change.norm()) < 0.05, batch
        env.step({"updates": updates})
        count = sum(len(p.targets) for p in passages)
        tokens += count
        for m, facts in answer_curvature(env.lm, passages, list(text)).items():  # at the edited weights
            sums[m] = (sums[m][0] + count * facts.inputs, sums[m][1] + count * facts.outputs)
        curvature = {m: Curvature(a / tokens, g / tokens) for m, (a, g) in sums.items()}
        projections = agent._projections()
        change = torch.randn(next(iter(expected.values())).shape)
        m = next(iter(curvature))
        by_sums = factors_removed(curvature[m], 0.8, change)
        assert float((projections[m].project(change) - by_sums).norm() / change.norm()) < 1e-3
        states = {m: (factors_removed(curvature[m], 0.8, mean), v, t) for m, (mean, v, t) in states.items()}


def test_with_projected_steps_the_curvature_is_hardly_met_and_with_projected_gradients_less_than_without(
    make: Any
) -> None:
    env = make()
    rises = {}
    for name, settings in {
        "free": {"energy": 1e-9}, "gradient": {"energy": 0.99}, "step": {"energy": 0.99, "projects": "step"}
    }.items():  # fmt: skip
        env.reset(seed=0)
        agent = CrispEditAgent(env, CrispEditConfig(**SMALL, **settings))
        agent.learn(progress_bar=False)
        updates = agent.predict(None)[0]["updates"]
        assert agent.text is not None
        rises[name] = 0.0
        for m, curvature in agent.text.by_module.items():  # relative to the change, so that a small one is no excuse
            rises[name] += curvature.rise(updates[m]) / float(updates[m].square().sum())
    assert rises["step"] < 0.1 * rises["free"] and rises["step"] < rises["gradient"] < rises["free"]


def test_the_edit_lowers_the_loss_of_its_facts(make: Any) -> None:
    env = make()
    env.reset(seed=0)
    passages = edits(env)
    before, _ = loss_and_gradients(env.lm, passages, list(env.lm.module_shapes), "pooled")
    agent = CrispEditAgent(env, CrispEditConfig(**{**SMALL, "steps": 15}, energy=0.9))
    env.step(agent.predict(None)[0])
    after, _ = loss_and_gradients(env.lm, passages, list(env.lm.module_shapes), "pooled")
    assert after < before - 0.5


@pytest.mark.parametrize("settings", [{}, {"edit_weight": 0.0}, {"carry_moments": False}])
def test_an_agent_given_anothers_memory_goes_on_as_it_would(make: Any, tmp_path: Path, settings: Any) -> None:
    env = make()
    agent = CrispEditAgent(env, CrispEditConfig(**SMALL, **settings))
    env.reset(seed=0)
    env.step(agent.predict(None)[0])
    memory = {k: v.clone() for k, v in agent.memory().items()}
    agent.save(tmp_path)
    first = agent.predict(None)[0]["updates"]
    other = CrispEditAgent(env, agent.config)
    other.load_memory(memory)
    for one in (other, load_agent(tmp_path, env)):
        again = one.predict(None)[0]["updates"]
        assert all(torch.equal(again[m], u) for m, u in first.items())
    agent.reset()
    assert agent.memory() == {}


def test_facts_that_count_for_nothing_leave_the_projection_as_it_was(make: Any) -> None:
    env = make()
    agent = CrispEditAgent(env, CrispEditConfig(**SMALL, edit_weight=0.0))
    env.reset(seed=0)
    env.step(agent.predict(None)[0])
    before = agent.projections
    env.step(agent.predict(None)[0])
    assert agent.projections is before and agent.stream.tokens == 0


def test_an_interrupted_run_ends_as_the_whole_one(make: Any, facts: Any, tmp_path: Path) -> None:
    data = facts("counterfact", 6)
    changes = []
    for folder, stop in (("whole", 0), ("parts", 2)):
        env = make()
        config = CrispEditConfig(**SMALL)
        agent = CrispEditAgent(env, config)
        if stop:
            calls: list[int] = []

            def interrupt(_facts: int, seen: list[int] = calls, after: int = stop) -> None:
                seen.append(1)
                if len(seen) == after:
                    raise KeyboardInterrupt

            ledger = EditLedger.create(tmp_path / folder, env.lm)
            with pytest.raises(KeyboardInterrupt):
                edit_facts(env.lm, agent, data, batch_size=2, ledger=ledger, progress=interrupt)
            ledger.close()
            env.lm.restore()
            agent = CrispEditAgent(env, config)
            ledger = EditLedger.resume(tmp_path / folder, env.lm)
            edit_facts(env.lm, agent, data, batch_size=2, ledger=ledger)
            ledger.close()
        else:
            edit_facts(env.lm, agent, data, batch_size=2)
        changes.append(env.lm.snapshot())
    for m, weight in changes[0].items():
        torch.testing.assert_close(changes[1][m], weight, rtol=0, atol=1e-6)


def test_another_llm_has_another_curvature(make: Any) -> None:
    env = make()
    agent = CrispEditAgent(env, CrispEditConfig(**SMALL))
    agent.learn(progress_bar=False)
    text = agent.text
    same_lm = make()
    assert same_lm is not env and same_lm.lm is env.lm
    agent.set_env(same_lm)
    assert agent.text is text and agent.one_off_seconds > 0
    agent.set_env(make("tiny-qwen2"))
    assert agent.text is None and agent.one_off_seconds == 0


def test_without_an_environment_it_says_what_is_missing(tmp_path: Path) -> None:
    CrispEditAgent(None).save(tmp_path)
    with pytest.raises(ValueError, match="the curvature of text needs the environment's LLM"):
        load_agent(tmp_path).learn(0)


def test_an_empty_batch_changes_nothing(make: Any) -> None:
    env = make()
    agent = CrispEditAgent(env, CrispEditConfig(**SMALL))
    agent.learn(progress_bar=False)
    assert not any(u.any() for u in agent.fine_tuned(env.lm, []).values())
    assert agent.memory() == {}


def test_a_stream_is_edited(make: Any) -> None:
    env = make()
    log = edit_stream(env, CrispEditAgent(env, CrispEditConfig(**SMALL)), seed=0)
    assert log.facts == 6 and min(log.update_norms) > 0


@pytest.mark.parametrize(("name", "value"), [
    ("energy", 0.0), ("energy", 1.0), ("projects", "weight"), ("edit_weight", -1.0), ("corpus_tokens", 3),
    ("learning_rate", 0.0), ("steps", -1), ("batch_size", 0), ("objective", "last"),
])  # fmt: skip
def test_what_cannot_be_is_refused_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        CrispEditConfig(**{name: value})
