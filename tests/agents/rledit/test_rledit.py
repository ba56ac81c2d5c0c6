"""Tests of the RLEdit agent."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import warnings
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from agents import HypernetworkConfig, RLEditAgent, RLEditConfig
from agents.base import run_stream
from agents.rledit.credit import CreditAccumulator
from agents.rledit.trainer import evaluate_policy, improve_policy, update_policy
from agents.rledit.trajectory import trajectory
from rledit_env.files import MARKER
from rledit_env.knowledge import load_knowledge
from rledit_env.lm.editable import EditableLM
from rledit_env.reporting import read_curves

ROOT = Path(__file__).parents[3]
AGGREGATIONS = ("mend", "least_squares", "recursive")
MODULES = "model.layers.[2-3].mlp.{gate,up}_proj"


@pytest.fixture
def training_env(tiny_lm, make_env):
    """Makes an environment that an agent can learn in."""

    def make(**arguments):
        return make_env(**{"model": tiny_lm(modules=MODULES), "array_backend": "torch", "reward_gradient": True,
                           "reward": "efficacy", **arguments})

    return make


def config(
    aggregation: str = "recursive", step_size: float = 1e-3, blocks: int = 1, prior: float = 0, **settings
) -> RLEditConfig:
    network = HypernetworkConfig(rank=8, blocks=blocks, aggregation=aggregation, step_size=step_size, prior=prior)
    return RLEditConfig(network=network, **{"prior_batches": 2, **settings})


def parameters_of(agent: RLEditAgent) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in agent.network.learned_parameters()])


def moved(agent: RLEditAgent, by: float = 0.05) -> RLEditAgent:
    """With parameters away from their start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in agent.network.learned_parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)
    return agent


# -- acting


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_predictions_are_the_same_in_both_array_backends(training_env, aggregation):
    env = training_env()
    padded_env = training_env(array_backend="numpy", reward_gradient=False)
    agents = [moved(RLEditAgent(e, config(aggregation))) for e in (env, padded_env)]
    observation, padded = env.reset(seed=0)[0], padded_env.reset(seed=0)[0]
    for _ in range(2):  # the second time with memory
        used = int(padded["mask"].sum())
        factors, arrays = agents[0].predict(observation)[0], agents[1].predict(padded)[0]
        assert arrays in padded_env.action_space
        for part in ("keys", "values"):
            for m, tensor in factors[part].items():
                np.testing.assert_array_equal(arrays[part][m][:used], tensor.numpy())
                assert not arrays[part][m][used:].any()


def test_a_prediction_has_no_recurrent_state_and_needs_no_gradient(training_env):
    env = training_env()
    action, state = RLEditAgent(env, config()).predict(env.reset(seed=0)[0])
    assert state is None
    assert not any(t.requires_grad for fs in action.values() for t in fs.values())


def test_what_follows_the_last_batch_can_be_predicted_on_too(training_env):
    for backend in ("torch", "numpy"):
        env = training_env(num_batches=1, array_backend=backend, reward_gradient=False)
        agent = RLEditAgent(env, config())
        observation, _ = env.reset(seed=0)
        observation, *_ = env.step(agent.predict(observation)[0])
        agent.predict(observation)


def test_a_reset_forgets_the_stream(training_env):
    env = training_env()
    agent = RLEditAgent(env, config())
    observation, _ = env.reset(seed=0)
    first, second = agent.predict(observation)[0], agent.predict(observation)[0]
    agent.reset()
    again = agent.predict(observation)[0]
    module = next(iter(first["keys"]))
    assert torch.equal(first["keys"][module], again["keys"][module])
    assert not torch.equal(first["keys"][module], second["keys"][module])


def test_an_agent_without_environment_and_shapes_is_an_error():
    with pytest.raises(ValueError, match="give an environment or the edited modules' shapes"):
        RLEditAgent()
    assert RLEditAgent(shapes={"a": (3, 4)}).network.shapes == {"a": (3, 4)}


# -- learning


@pytest.mark.parametrize(
    ("step_size", "step_size_learning_rate", "gain"),
    [(3e-4, 0.1, 3.0), (3e-3, 0.0, 0.5)],
    ids=["with step sizes", "blocks only"],
)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_learning_improves_the_return_on_held_out_streams(
    training_env, aggregation, step_size, step_size_learning_rate, gain
):
    dataset = load_knowledge("counterfact")
    train, held_out = (dataclasses.replace(dataset, records=dataset.records[part])
                       for part in (slice(0, 60), slice(100, 140)))
    env = training_env(kind="counterfact", data=train)
    test_env = training_env(kind="counterfact", data=held_out)
    rates = {"learning_rate": 3e-3, "step_size_learning_rate": step_size_learning_rate}
    agent = RLEditAgent(env, config(aggregation, step_size, **rates))
    frozen = RLEditAgent(env, agent.config)

    def held_out_return(policy) -> float:
        return float(np.mean([run_stream(test_env, policy, seed=seed)[0] for seed in range(3)]))

    before = held_out_return(agent)
    assert before == held_out_return(frozen)
    agent.learn(75, progress_bar=False)
    assert agent.updates == 25
    after = held_out_return(agent)
    assert after > before + gain
    for start, end in zip(frozen.network.learned_parameters(), agent.network.learned_parameters(), strict=True):
        assert torch.isfinite(end).all()
        assert torch.equal(start, end) == (start.ndim == 1 and len(start) == 4 and step_size_learning_rate == 0)


def test_learning_is_the_same_for_the_same_seed_and_another_for_another(training_env):
    results = []
    for seed in (1, 1, 2):
        env = training_env(action_noise_std=1e-4)
        agent = RLEditAgent(env, config(), seed=seed).learn(6, progress_bar=False)
        results.append(parameters_of(agent))
        env.close()
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_gradient_does_not_depend_on_how_many_graphs_are_kept(training_env, monkeypatch, aggregation):
    results, passes = [], []
    for steps_kept in (3, 1, 0):
        agent = moved(RLEditAgent(training_env(token="all"), config(aggregation, step_size=1e-4)))
        one = agent.network.graph_bytes(agent.env.max_tokens)
        agent.config = dataclasses.replace(agent.config, graph_bytes=steps_kept * one)
        ran, factors = [], agent.network.factors
        monkeypatch.setattr(agent.network, "factors", lambda *a, f=factors, ran=ran: ran.append(a) or f(*a))
        results.append(torch.cat([g.flatten() for g in trajectory(agent, agent.env, seed=0)[0]]))
        passes.append(len(ran))
    assert passes[0] == 3 and passes[0] < passes[1] <= 6
    assert passes[2] == 3 + 3 * len(agent.network.shapes)  # no graph fits: the second pass goes module by module
    assert results[0].abs().max() > 0 and torch.equal(results[0], results[1])
    torch.testing.assert_close(results[2], results[0], rtol=1e-4, atol=1e-6 * float(results[0].abs().max()))


def test_every_call_of_learn_takes_so_many_further_steps_and_reports_each_update(training_env):
    seen = []
    agent = RLEditAgent(training_env(), config(trajectories_per_update=2))
    assert agent.learn(12, callback=seen.append, progress_bar=False) is agent
    assert (agent.timesteps, agent.updates, len(seen)) == (12, 2, 2)
    agent.learn(12, callback=seen.append, progress_bar=False)
    assert (agent.timesteps, agent.updates, len(seen)) == (12, 4, 4)
    # 7 steps are three trajectories: an update of two, and one of the last.
    agent.learn(7, callback=seen.append, progress_bar=False, reset_num_timesteps=False)
    assert (agent.timesteps, agent.updates, len(seen)) == (12 + 9, 6, 6)
    assert {"return", "drift", "steps", "reward", "generalization", "gradient_norm", "step_size"} <= set(seen[0])
    assert seen[0]["steps"] == 3


def test_the_drift_of_every_step_is_logged(training_env, tmp_path):
    env = training_env(num_batches=3)
    RLEditAgent(env, config()).learn(6, progress_bar=False, log_dir=tmp_path)
    drift = read_curves(tmp_path / "steps")["step/drift"]
    assert [step for step, _ in drift] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in drift[3:]] == pytest.approx([h["drift"] for h in env.unwrapped.history])


def test_a_callback_that_returns_false_stops_the_training(training_env):
    agent = RLEditAgent(training_env(), config()).learn(30, callback=lambda _: False, progress_bar=False)
    assert agent.updates == 1


def test_learning_first_gathers_the_prior_from_training_batches_and_saves_it_with_the_agent(training_env, tmp_path):
    env = training_env(num_batches=2)
    agent = RLEditAgent(env, config(prior=5, prior_batches=3), seed=1)
    agent.learn(2, progress_bar=False)
    seen = [env.reset(seed=seed)[0]["keys"] for seed in (3, 4, 5)]
    for module in seen[0]:
        rows = torch.cat([keys[module] for keys in seen])
        torch.testing.assert_close(agent.network.key_memory.second_moments[module], rows.T @ rows / len(rows))
    agent.save(tmp_path)
    loaded = RLEditAgent.load(tmp_path, env)
    loaded_memory, memory = loaded.network.key_memory, agent.network.key_memory
    assert all(torch.equal(loaded_memory.second_moments[m], memory.second_moments[m]) for m in seen[0])
    agent.learn(4, progress_bar=False)
    assert all(torch.equal(loaded_memory.second_moments[m], memory.second_moments[m]) for m in seen[0])


def test_every_trajectory_draws_its_own_facts(training_env, monkeypatch):
    env = training_env()
    drawn = []
    reset = env.reset
    monkeypatch.setattr(env, "reset", lambda **k: drawn.append(reset(**k)) or drawn[-1])
    RLEditAgent(env, config(trajectories_per_update=2)).learn(18, progress_bar=False)
    assert len({tuple(info["indices"]) for _, info in drawn}) == 6


def test_calibration_keeps_the_factor_that_scores_best_and_stops_once_scores_fall(training_env, monkeypatch):
    agent = RLEditAgent(training_env(num_batches=1), config(step_size=0.1))
    env = training_env(num_batches=2, reward="none")
    tried = []

    def evaluate(generate):
        tried.append(float(agent.network.log_step_size.detach().exp().mean()))
        return SimpleNamespace(mean={1.0: 40.0, 0.7: 60.0, 0.5: 70.0, 0.35: 65.0, 0.2: 99.0}[round(tried[-1] / 0.1, 2)])

    monkeypatch.setattr(env.unwrapped, "evaluate", evaluate)
    scores = agent.calibrate(env, (0.2, 1.0, 0.5, 0.7, 0.35))
    assert scores == {1.0: 40.0, 0.7: 60.0, 0.5: 70.0, 0.35: 65.0}
    np.testing.assert_allclose(agent.network.log_step_size.detach().exp(), 0.05, rtol=1e-5)
    assert not agent.network.key_memory.inverses


def test_calibration_goes_on_to_smaller_steps_while_the_model_breaks(training_env):
    agent = RLEditAgent(training_env(num_batches=1), config(step_size=1e30))
    scores = agent.calibrate(training_env(num_batches=2, reward="none"), (1.0, 1e-30, 1e-33))
    assert scores[1.0] == -np.inf and 1e-33 in scores
    assert float(agent.network.log_step_size.detach().max()) < np.log(1.1)


def test_a_calibration_that_finds_nothing_or_is_interrupted_changes_nothing(training_env, monkeypatch):
    agent = RLEditAgent(training_env(num_batches=1), config(step_size=1e30))
    env = training_env(num_batches=2, reward="none")
    before = agent.network.log_step_size.detach().clone()
    with pytest.warns(UserWarning, match=r"broke with every factor \(1, 0\.5\)"):
        agent.calibrate(env, (1.0, 0.5))
    assert torch.equal(agent.network.log_step_size, before)
    agent.scale_step_sizes(1e-33)
    before = agent.network.log_step_size.detach().clone()

    def interrupted(generate):
        raise KeyboardInterrupt

    monkeypatch.setattr(env.unwrapped, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        agent.calibrate(env, (0.5,))
    assert torch.equal(agent.network.log_step_size, before)


def test_step_sizes_are_scaled_by_positive_factors_only(training_env):
    agent = RLEditAgent(training_env(), config(step_size=0.1))
    with pytest.raises(ValueError, match="factor is 0"):
        agent.scale_step_sizes(0)


def test_several_trajectories_an_update_are_averaged(training_env):
    agent = RLEditAgent(training_env(), config(max_gradient_norm=1e9))
    seen = []
    agent.optimizer.step = lambda: seen.append([p.grad.clone() for p in agent.network.learned_parameters()])
    ones, threes = ([torch.full_like(p, v) for p in agent.network.learned_parameters()] for v in (1.0, 3.0))
    update_policy(agent, [ones, threes])
    assert all((g == 2).all() for g in seen[0])


def test_the_gradient_is_clipped_and_one_that_is_not_finite_is_left_out(training_env):
    agent = RLEditAgent(training_env(), config(max_gradient_norm=0.5))
    norms = []
    step = agent.optimizer.step
    agent.optimizer.step = lambda: norms.append(
        float(torch.stack([p.grad.norm() for p in agent.network.learned_parameters()]).norm())
    ) or step()
    before = parameters_of(agent)
    update_policy(agent, [[torch.ones_like(p) for p in agent.network.learned_parameters()]])
    assert norms == [pytest.approx(0.5, rel=1e-3)]
    after = parameters_of(agent)
    assert not torch.equal(before, after)
    with pytest.warns(UserWarning, match="not finite; this update is left out"):
        update_policy(agent, [[torch.full_like(p, float("nan")) for p in agent.network.learned_parameters()]])
    assert torch.equal(after, parameters_of(agent)) and len(norms) == 1


def test_a_trajectory_is_cut_once_the_drift_passes_its_limit(training_env):
    whole, cut = [], []
    unlimited = RLEditAgent(training_env(), config(step_size=0.02, drift_limit=9))
    unlimited.learn(3, callback=whole.append, progress_bar=False)
    limit = whole[0]["drift"] * 0.4
    agent = RLEditAgent(training_env(), config(step_size=0.02, drift_limit=limit))
    with pytest.warns(UserWarning, match=r"drift .* passed drift_limit at step \d"):
        agent.learn(3, callback=cut.append, progress_bar=False)
    assert whole[0]["steps"] == 3 > cut[0]["steps"] >= 1
    assert limit < cut[0]["drift"] <= whole[0]["drift"]


def test_a_stream_that_breaks_the_model_at_once_leaves_the_policy_as_it_is(training_env):
    agent = RLEditAgent(training_env(), config(step_size=1e30))
    before = parameters_of(agent)
    with pytest.warns(UserWarning, match="the LLM broke at step 0"):
        agent.learn(3, progress_bar=False)
    assert torch.equal(before, parameters_of(agent))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reward_gradient": False}, "array_backend='torch' and reward_gradient=True"),
        ({"array_backend": "numpy"}, "array_backend='torch' and reward_gradient=True"),
        ({"reward": "none"}, "reward='none'"),
    ],
)
def test_an_environment_that_cannot_be_learned_in_is_an_error(training_env, arguments, message):
    with pytest.raises(ValueError, match=message):
        RLEditAgent(training_env(**arguments), config()).learn(3, progress_bar=False)


def test_an_agent_without_environment_cannot_learn():
    with pytest.raises(ValueError, match="no environment to learn in"):
        RLEditAgent(shapes={"a": (3, 4)}).learn(3)


def test_an_unknown_credit_is_named():
    with pytest.raises(ValueError, match="credit is 'all'; give 'trajectory' or 'step'"):
        RLEditConfig(credit="all")


def test_step_credit_sees_only_a_steps_own_reward_and_trajectory_credit_all_later_ones():
    generator = torch.Generator().manual_seed(0)
    keys, values = (
        [{"a": torch.randn(2, width, generator=generator)} for _ in range(3)] for width in (3, 4)
    )
    gradients = [torch.randn(4, 3, generator=generator) for _ in range(3)]
    nothing = {"keys": {"a": torch.zeros(2, 3)}, "values": {"a": torch.zeros(2, 4)}}
    for credit in ("trajectory", "step"):
        accumulator = CreditAccumulator(credit, key_gradients=True)
        for t in range(3):
            # The middle step is not scored.
            given = None if t == 1 else {"a": gradients[t].clone()}
            accumulator.take(keys[t], values[t], given, nothing, 0.9**t)
        for t, (for_keys, for_values) in enumerate(accumulator.finish()):
            counted = [j for j in (0, 2) if (j >= t if credit == "trajectory" else j == t)]
            total = sum((0.9**j * gradients[j] for j in counted), torch.zeros(4, 3))
            torch.testing.assert_close(for_values["a"], keys[t]["a"] @ total.T)
            torch.testing.assert_close(for_keys["a"], values[t]["a"] @ total)
        assert accumulator.finish() == []


def test_no_dense_gradient_outlives_the_credit_that_was_made_of_it(training_env, monkeypatch):
    env, alive, dense = training_env(), [], []
    agent = RLEditAgent(env, config())
    step, accumulate = env.unwrapped.step, agent.network.accumulate

    def watched_step(action):
        result = step(action)
        dense.extend(weakref.ref(g) for g in result[-1].get("reward_gradient", {}).values())
        return result

    def watched(*arguments):
        alive.append(sum(one() is not None for one in dense))
        return accumulate(*arguments)

    monkeypatch.setattr(env.unwrapped, "step", watched_step)
    monkeypatch.setattr(agent.network, "accumulate", watched)
    agent.learn(env.unwrapped.episode_steps, progress_bar=False)
    assert dense and alive == [0] * env.unwrapped.episode_steps


# -- the best policy, files


@pytest.mark.filterwarnings("ignore:drift")
def test_training_with_a_held_out_stream_keeps_the_best_policy(tiny_lm, training_env, make_env, facts):
    env = training_env()
    eval_env = make_env(model=env.lm, data=facts("zsre", 30), num_batches=5, reward="none", array_backend="torch")
    agent = RLEditAgent(env, config(step_size_learning_rate=0.5))
    agent.learn(24, eval_env=eval_env, eval_every=2, patience=99, progress_bar=False)
    run_stream(eval_env, agent, seed=12345)
    assert eval_env.evaluate(generate=False).mean == pytest.approx(agent.best_score, abs=1e-4)


@pytest.mark.parametrize("held_out", [True, False])
def test_the_mean_of_the_policies_is_evaluated_and_held_and_the_last_one_learns(
    training_env, make_env, monkeypatch, tmp_path, held_out
):
    env, policies, evaluated = training_env(), [], []
    agent = RLEditAgent(env, config(learning_rate=0.05, policy_average=0.6))

    def updated(*arguments):
        numbers = update_policy(*arguments)
        policies.append(parameters_of(agent))
        return numbers

    def judged(*arguments) -> bool:
        evaluated.append(parameters_of(agent))
        evaluate_policy(*arguments)
        return True

    monkeypatch.setattr("agents.rledit.trainer.update_policy", updated)
    monkeypatch.setattr("agents.rledit.trainer.evaluate_policy", judged)
    eval_env = make_env(model=env.lm, reward="none", array_backend="torch") if held_out else None
    agent.learn(4 * env.episode_steps, eval_env=eval_env, eval_every=1, progress_bar=False, log_dir=tmp_path / "run")
    mean = (policies[0] + policies[1]) / 2  # as long as fewer updates than 1 / (1 - decay) have been made: all alike
    means = [policies[0], mean]
    for policy in policies[2:]:
        means.append(0.6 * means[-1] + 0.4 * policy)
    assert len(policies) == 4 and not torch.allclose(means[-1], policies[-1])
    if held_out:
        torch.testing.assert_close(evaluated[1:], means)
    last = RLEditAgent.load(tmp_path / "run" / "last")
    torch.testing.assert_close(parameters_of(last), means[-1])
    if not held_out:
        torch.testing.assert_close(parameters_of(agent), means[-1])


@pytest.mark.parametrize("presented", [1, 2])
def test_a_policy_learns_along_a_stream_from_a_few_batches_at_a_time(training_env, presented):
    env = training_env(num_batches=5, steps_per_batch=presented)
    settings = {"learning_rate": 0.05, "policy_average": 0.6}
    agent = RLEditAgent(env, config(**settings, batches_per_update=2))
    agent.gather_moments(env, progress_bar=False)
    own_only = RLEditAgent(env, config(**settings, credit="step", batches_per_update=2))
    own_only.load_policy_state(agent.policy_state())
    whole, numbers = trajectory(own_only, env, 0)
    parts: list[list[torch.Tensor]] = []
    last, same_numbers = trajectory(own_only, env, 0, parts.append)
    assert len(parts) == 2 and numbers == same_numbers  # two batches, two batches, and one that is returned
    # Of steps that do not look ahead the gradient is the mean over them.
    for one, two, three, all_five in zip(*parts, last, whole, strict=True):
        torch.testing.assert_close((2 * one + 2 * two + three) / 5, all_five, rtol=1e-3, atol=1e-6)
    agent.learn(env.episode_steps, progress_bar=False)
    assert (agent.updates, agent.timesteps, agent.progress.mean_updates) == (1, env.episode_steps, 3)
    by_hand = RLEditAgent(env, config(**settings, batches_per_update=2))
    by_hand.load_policy_state(own_only.policy_state())
    last, _ = trajectory(by_hand, env, 0, partial(improve_policy, by_hand))
    improve_policy(by_hand, last)
    torch.testing.assert_close(agent.progress.mean, by_hand.progress.mean)


def test_learning_along_a_stream_is_for_one_stream_at_a_time():
    with pytest.raises(ValueError, match="batches_per_update is 0; give a whole number from 1, or None for whole"):
        RLEditConfig(batches_per_update=0)
    with pytest.raises(ValueError, match="batches_per_update is 2 and trajectories_per_update 3, but"):
        RLEditConfig(batches_per_update=2, trajectories_per_update=3)


def test_a_mean_of_policies_needs_a_decay_below_one():
    with pytest.raises(ValueError, match="policy_average is 1; give a decay from 0 to below 1"):
        RLEditConfig(policy_average=1)


def test_training_stops_early_when_nothing_gets_better(training_env, make_env, monkeypatch):
    env = training_env()
    eval_env = make_env(model=env.lm, reward="none", array_backend="torch")
    agent = RLEditAgent(env, config())
    before = parameters_of(agent)
    scores = iter([True] + [False] * 99)

    def judged(*arguments) -> bool:
        better = next(scores)
        return evaluate_policy(*arguments) if better else False

    monkeypatch.setattr("agents.rledit.trainer.evaluate_policy", judged)
    agent.learn(300, eval_env=eval_env, eval_every=1, patience=3, progress_bar=False)
    assert agent.updates == 3
    assert torch.equal(before, parameters_of(agent))  # the best was the first


LOAD = """
import sys
import torch
from safetensors.torch import load_file, save_file
from agents import RLEditAgent
torch.set_num_threads(1)
agent = RLEditAgent.load(sys.argv[1])
given = load_file(sys.argv[2])
observation = {"mask": given["mask"], "keys": {}, "value_gradients": {}}
for name, tensor in given.items():
    if "/" in name:
        part, module = name.split("/")
        observation[part][module] = tensor
action, _ = agent.predict(observation)
save_file({f"{part}/{m}": t.contiguous() for part, of in action.items() for m, t in of.items()}, sys.argv[3])
"""


@pytest.mark.parametrize("aggregation", ["least_squares", "recursive"])
def test_a_saved_agent_predicts_the_same_in_a_fresh_process_even_in_mid_stream(training_env, tmp_path, aggregation):
    env = training_env()
    agent = RLEditAgent(env, config(aggregation), seed=4)
    agent.learn(6, progress_bar=False)
    observation, _ = env.reset(seed=0)
    agent.reset()
    observation, *_ = env.step(agent.predict(observation)[0])
    agent.save(tmp_path / "agent")
    assert sorted(p.name for p in (tmp_path / "agent").iterdir()) == [
        MARKER, "agent.json", "agent.safetensors",
    ]  # fmt: skip
    flat = {f"{part}/{m}": t for part in ("keys", "value_gradients") for m, t in observation[part].items()}
    save_file({**flat, "mask": observation["mask"]}, tmp_path / "given")
    result = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "agent"), str(tmp_path / "given"), str(tmp_path / "answer")],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )
    assert result.returncode == 0, result.stderr
    loaded = load_file(tmp_path / "answer")
    action, _ = agent.predict(observation)
    for part, factors in action.items():
        for m, tensor in factors.items():
            assert torch.equal(tensor, loaded[f"{part}/{m}"])


def test_a_loaded_agent_edits_whole_streams_and_learns_as_the_saved_one(training_env, tmp_path):
    env = training_env()
    agent = RLEditAgent(env, config(), seed=4).learn(3, progress_bar=False)
    agent.save(tmp_path)
    loaded = RLEditAgent.load(tmp_path, env)
    assert (loaded.updates, loaded.timesteps, loaded.seed, loaded.config) == (1, 3, 4, agent.config)
    assert run_stream(env, loaded, seed=0)[0] == pytest.approx(run_stream(env, agent, seed=0)[0], rel=1e-6)
    assert loaded.learn(3, progress_bar=False).updates == 2


def test_the_description_names_what_the_agent_was_trained_on(training_env, tmp_path):
    env = training_env(token="subject", steps_per_batch=2)
    RLEditAgent(env, config()).save(tmp_path)
    said = json.loads((tmp_path / "agent.json").read_text())["environment"]
    assert said["id"] == "RLEdit-ZsRE-v0"
    assert (said["model"], said["token"], said["steps_per_batch"]) == ("tiny-llama", "subject", 2)
    assert "bundled" in said["source"]


def test_blocks_saved_in_half_precision_take_half_the_room_and_predict_nearly_the_same(training_env, tmp_path):
    env = training_env()
    agent = moved(RLEditAgent(env, config()))
    for name, dtype in (("whole", torch.float32), ("half", torch.bfloat16)):
        agent.save(tmp_path / name, dtype)
    tensors = load_file(tmp_path / "half" / "agent.safetensors")
    assert {t.dtype for k, t in tensors.items() if k.startswith("network.networks.")} == {torch.bfloat16}
    assert tensors["network.log_step_size"].dtype == torch.float32
    observation, _ = env.reset(seed=0)
    values = []
    for name in ("whole", "half"):
        loaded = RLEditAgent.load(tmp_path / name, env)
        loaded.reset()
        assert {p.dtype for p in loaded.network.parameters()} == {torch.float32}
        values.append(loaded.predict(observation)[0]["values"])
    for module, expected in values[0].items():
        assert (values[1][module] - expected).norm() < 0.02 * expected.norm()


def test_a_saved_agents_files_are_as_readable_as_any_new_file(training_env, tmp_path):
    RLEditAgent(training_env(), config()).save(tmp_path / "agent")
    (tmp_path / "new").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "agent").iterdir()}
    assert modes == {(tmp_path / "new").stat().st_mode}


def test_an_agent_for_other_modules_is_refused(training_env, tmp_path):
    RLEditAgent(training_env(), config()).save(tmp_path)
    other = EditableLM.load("tiny-llama", "model.layers.3.mlp.down_proj", dtype="float32", device="cpu")
    with pytest.raises(ValueError, match=r"made for 4 modules.*the environment edits 1 such as .*down_proj"):
        RLEditAgent.load(tmp_path, training_env(model=other))


def test_a_folder_without_an_agent_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no agent"):
        RLEditAgent.load(tmp_path / "nowhere")


def test_training_warns_of_nothing_when_all_is_well(training_env):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RLEditAgent(training_env(), config()).learn(3, progress_bar=False)
