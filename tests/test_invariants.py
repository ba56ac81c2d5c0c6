"""The eight invariants that the whole project rests on, one section each."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from agents import Hypernetwork, HypernetworkConfig, RLEditAgent, RLEditConfig
from agents.curvature import Curvature, low_curvature
from agents.rledit.credit import CreditAccumulator
from agents.rledit.hypernetwork import StepRecord
from agents.rledit.trajectory import policy_gradient, trajectory
from rledit_env.encoding import encode
from rledit_env.lm.loading.tiny import TINY_NAMES
from rledit_env.preservation import Constraint, Continuation, OwnText
from rledit_env.reward import Generalization, RewardConfig

ROOT = Path(__file__).parents[1]
every_architecture = pytest.mark.parametrize("name", TINY_NAMES)
both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def equal(a: Any, b: Any) -> bool:
    """Whether two nests of dictionaries, arrays, tensors and numbers are the same, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return bool(np.array_equal(a, b))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected value."""
    return float(((actual - expected).abs().max() / expected.abs().max()).detach())


# -- 1 ---------------------------------------------------------------------------------------------------------------


@both_precisions
@every_architecture
def test_1_reset_restores_the_edited_weights_bit_for_bit_and_frozen_weights_never_change(
    tiny_lm, make_env, random_action, name, dtype
):
    lm = tiny_lm(name, dtype=dtype)
    env = make_env(model=lm, reward_gradient=True)
    before = {n: p.clone() for n, p in lm.model.state_dict().items()}
    master = lm.snapshot()
    edited = {f"{m}.weight" for m in lm.module_shapes}
    env.reset(seed=0)
    for step in range(env.episode_steps):
        env.step(random_action(env, seed=step))
        env.evaluate(generate=step == 0)
        after = lm.model.state_dict()
        assert {n for n in before if not torch.equal(before[n], after[n])} == edited
    env.reset(seed=1)
    assert equal(before, dict(lm.model.state_dict()))
    assert equal(master, lm.snapshot())


def test_1_reset_restores_weights_even_from_numbers_that_are_not_finite(make_env, random_action):
    env = make_env()
    before, _ = env.reset(seed=0)
    weights = env.lm.snapshot()
    env.step(random_action(env, scale=1e30))
    after, _ = env.reset(seed=0)
    assert equal(weights, env.lm.snapshot())
    assert equal(before, after)


# -- 2 ---------------------------------------------------------------------------------------------------------------


@both_precisions
@every_architecture
def test_2_a_steps_update_equals_the_sum_of_the_actions_rank_one_factors(
    tiny_lm, make_env, random_action, name, dtype
):
    env = make_env(model=tiny_lm(name, dtype=dtype), reward="none")
    observation, _ = env.reset(seed=0)
    for step in range(env.episode_steps):
        used = int(observation["mask"].sum())
        before, action = env.lm.snapshot(), random_action(env, seed=step)
        observation, *_ = env.step(action)
        for m in env.lm.module_shapes:
            pairs = zip(action["values"][m][:used].astype(float), action["keys"][m][:used].astype(float), strict=True)
            expected = sum(np.outer(value, key) for value, key in pairs)
            change = (env.lm.weight(m).double() - before[m].double()).numpy()
            np.testing.assert_allclose(change, expected, rtol=1e-4, atol=1e-6)


def test_2_padded_rows_change_nothing(make_env, random_action):
    results = []
    for padding in (0.0, 1e6, "none"):
        env = make_env(max_tokens=150)
        observation, _ = env.reset(seed=0)
        used, action = int(observation["mask"].sum()), random_action(env)
        assert used < 150
        for factors in action.values():
            for m in factors:
                if padding == "none":
                    factors[m] = factors[m][:used]
                else:
                    factors[m][used:] = padding
        results.append((*env.step(action), env.lm.snapshot()))
    for other in results[1:]:
        assert all(equal(a, b) for a, b in zip(results[0], other, strict=True))


@both_precisions
@every_architecture
def test_2_a_dense_update_is_the_same_step_as_factors_that_give_it(tiny_lm, make_env, name, dtype):
    env = make_env(model=tiny_lm(name, dtype=dtype), array_backend="torch")
    results = []
    for form in ("factors", "updates", "accumulated"):
        observation, _ = env.reset(seed=0)
        rewards = []
        for _ in range(env.episode_steps):
            action = {"keys": observation["keys"],
                      "values": {m: -0.02 * g for m, g in observation["value_gradients"].items()}}
            update = {m: action["values"][m].T @ action["keys"][m] for m in env.lm.module_shapes}
            if form == "updates":
                action = {"updates": update}
            elif form == "accumulated":
                total = {m: env.lm.weight(m) - env.lm.original_weight(m) + d for m, d in update.items()}
                action = {"accumulated": total}
            observation, reward, *_ = env.step(action)
            rewards.append(reward)
        assert env.episode.over
        results.append((rewards, env.lm.snapshot()))
    for rewards, weights in results[1:]:
        assert rewards == pytest.approx(results[0][0], rel=1e-5 if dtype == torch.float32 else 1e-2)
        if dtype == torch.float32:
            for m, weight in weights.items():
                torch.testing.assert_close(weight, results[0][1][m], atol=1e-5, rtol=1e-4)
    assert results[0][0][0] != results[0][0][1]


# -- 3 ---------------------------------------------------------------------------------------------------------------


def full_gradient(lm, full_logits, passages) -> dict[str, torch.Tensor]:
    """∂L/∂W (d_out, d_in) by module, of the mean answer-token cross-entropy, by autograd through the whole model."""
    modules = dict(lm.model.named_modules())
    weights = [modules[m].weight.requires_grad_() for m in lm.module_shapes]
    losses = [F.cross_entropy(full_logits(lm, p), torch.tensor(p.targets), reduction="sum") for p in passages]
    pieces = torch.autograd.grad(sum(losses) / sum(len(p.targets) for p in passages), weights)
    for weight in weights:
        weight.requires_grad_(False)
    return {
        m: g if isinstance(modules[m], torch.nn.Linear) else g.t()
        for m, g in zip(lm.module_shapes, pieces, strict=True)
    }


def reconstructed(observation) -> dict[str, torch.Tensor]:
    return {m: torch.as_tensor(d).T @ torch.as_tensor(observation["keys"][m])
            for m, d in observation["value_gradients"].items()}


@every_architecture
def test_3_with_all_tokens_the_observation_reconstructs_the_true_gradient(
    tiny_lm, make_env, random_action, full_logits, uneven_facts, name
):
    env = make_env("counterfact", model=tiny_lm(name), data=uneven_facts, num_batches=2, token="all")
    env.reset(seed=0)
    observation, _, _, _, _ = env.step(random_action(env))  # at edited weights
    passages = [encode(env.lm, record).edit for record in env.stream.batch(1)]
    expected = full_gradient(env.lm, full_logits, passages)
    assert all(relative_error(g, expected[m]) < 2e-5 for m, g in reconstructed(observation).items())


@every_architecture
def test_3_with_answer_tokens_it_reconstructs_the_gradients_part_from_these_positions(
    tiny_lm, make_env, full_logits, uneven_facts, name
):
    lm = tiny_lm(name)
    observations = []
    for token in ("all", "answer"):
        env = make_env("counterfact", model=lm, data=uneven_facts, num_batches=1, batch_size=4, token=token)
        observations.append(env.reset(options={"indices": [2, 0, 3, 1]})[0])
    passages = [encode(lm, uneven_facts[i]).edit for i in (2, 0, 3, 1)]
    answer_rows = np.concatenate([[p in passage.positions for p in range(len(passage))] for passage in passages])
    used = int(observations[1]["mask"].sum())
    expected = full_gradient(lm, full_logits, passages)
    for m, gradient in reconstructed(observations[1]).items():
        for part in ("keys", "value_gradients"):
            rows = observations[0][part][m][: len(answer_rows)][answer_rows]
            np.testing.assert_allclose(observations[1][part][m][:used], rows, rtol=1e-3, atol=1e-6)
        no_attention_follows = ".3." in m and "attn" not in m
        if no_attention_follows:
            assert relative_error(gradient, expected[m]) < 2e-5
        elif ".1." in m:
            assert relative_error(gradient, expected[m]) > 0.01


# -- 4 ---------------------------------------------------------------------------------------------------------------


def edited_and_compared(lm, full_logits, records) -> tuple[torch.Tensor, torch.Tensor]:
    """Suffix logits of padded, mixed-length passages on edited weights, and the whole model's, one by one."""
    passages = [p for r in records for e in [encode(lm, r)] for p in (e.edit, *e.paraphrases, *e.unrelated)]
    with torch.no_grad():
        lm.answer_states(passages)  # fills the prefix cache before the edit
        generator = torch.Generator().manual_seed(0)
        keys, values = (
            {m: 0.1 * torch.randn(3, shape[side], generator=generator) for m, shape in lm.module_shapes.items()}
            for side in (0, 1)
        )
        unedited = lm.forward.logits(lm.answer_states(passages).hidden)
        lm.apply(keys, values)
        suffix = lm.forward.logits(lm.answer_states(passages).hidden)
        assert relative_error(unedited, suffix) > 0.05
        return suffix, torch.cat([full_logits(lm, p).float() for p in passages])


@every_architecture
def test_4_the_suffix_forward_with_cached_prefixes_gives_the_full_models_logits(
    tiny_lm, full_logits, uneven_facts, name
):
    suffix, full = edited_and_compared(tiny_lm(name), full_logits, uneven_facts)
    torch.testing.assert_close(suffix, full, atol=5e-5, rtol=1e-4)


@every_architecture
def test_4_in_bfloat16_the_suffix_forward_gives_the_full_models_logits_to_its_precision(
    tiny_lm, full_logits, uneven_facts, name
):
    suffix, full = edited_and_compared(tiny_lm(name, dtype=torch.bfloat16), full_logits, uneven_facts)
    assert float((suffix - full).square().mean().sqrt() / full.std()) < 0.03
    assert relative_error(suffix, full) < 0.15


@pytest.mark.real
def test_4_the_default_models_suffix_forward_gives_the_full_models_logits(full_logits, uneven_facts):
    from rledit_env.lm.editable import EditableLM

    lm = EditableLM.load("smollm2-135m", dtype="float32", device="cpu")
    suffix, full = edited_and_compared(lm, full_logits, uneven_facts)
    torch.testing.assert_close(suffix, full, atol=2e-3, rtol=1e-3)


# -- 5 ---------------------------------------------------------------------------------------------------------------


def random_batches(shapes, counts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for rows in counts:
        yield tuple(
            {m: torch.randn(rows, s[side], generator=generator, dtype=torch.float64) for m, s in shapes.items()}
            for side in (0, 1)
        )


def test_5_dual_and_primal_least_squares_agree():
    shapes = {"a": (16, 8), "b": (8, 16)}
    config = HypernetworkConfig(rank=4, blocks=1, aggregation="least_squares", damping=0.3, step_size=0.1)
    network = Hypernetwork(shapes, config).double()
    for rows, (u, delta) in zip((3, 40), random_batches(shapes, (3, 40)), strict=True):  # fewer and more than d_in
        keys, values = network.factors(network.observe(u, delta))
        for m, (d_in, _) in shapes.items():
            identity = torch.eye(d_in, dtype=torch.float64)
            primal = values[m].T @ u[m] @ torch.linalg.inv(u[m].T @ u[m] + 0.3 * identity)
            assert len(values[m]) == rows
            torch.testing.assert_close(values[m].T @ keys[m], primal, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-3)])
def test_5_the_recursion_agrees_with_the_explicit_inverse_over_many_batches(dtype, tolerance):
    shapes = {"a": (16, 8), "b": (8, 16)}
    config = HypernetworkConfig(rank=4, blocks=1, aggregation="recursive", damping=0.3, step_size=0.1)
    network = Hypernetwork(shapes, config).to(dtype)
    second_moment = {m: 0.3 * torch.eye(d_in, dtype=torch.float64) for m, (d_in, _) in shapes.items()}
    for u, delta in random_batches(shapes, (3, 40, 1, 5) * 10):
        cast = [{m: t.to(dtype) for m, t in part.items()} for part in (u, delta)]
        keys, values = network.factors(network.observe(*cast))
        for m in shapes:
            second_moment[m] += u[m].T @ u[m]
            primal = values[m].double().T @ u[m] @ torch.linalg.inv(second_moment[m])
            assert relative_error((values[m].T @ keys[m]).double(), primal) < tolerance


# -- 6 ---------------------------------------------------------------------------------------------------------------


class Recorder(RLEditAgent):
    """Keeps what a trajectory's gradient was computed from."""

    records: list[StepRecord]


def recorded(agent: Recorder, records: list[StepRecord], credit: CreditAccumulator) -> list[torch.Tensor]:
    agent.records = records
    return policy_gradient(agent, records, credit)


@pytest.fixture
def recorder(tiny_lm, make_env, uneven_facts, monkeypatch):
    """Makes an agent in float64 with moved parameters, in an environment with backtracking and a norm penalty.

    GPT-2's is the one architecture that transformers runs in float64 throughout (the others' norms are in float32).
    """

    monkeypatch.setattr("agents.rledit.trajectory.policy_gradient", recorded)

    def make(aggregation: str, credit: str, **reward: Any) -> Recorder:
        config = RewardConfig(**{"regularisation": 0.02, "backtracking_depth": 1, "backtracking_decay": 0.7, **reward})
        env = make_env(
            "counterfact",
            model=tiny_lm("tiny-gpt2", "transformer.h.[2-3].{attn.c_proj,mlp.c_fc}", torch.float64),
            data=uneven_facts,
            num_batches=2,
            steps_per_batch=2,
            array_backend="torch",
            reward_gradient=True,
            reward=config,
        )
        step_size = 1e-3 if aggregation == "mend" else 0.02  # MEND's factors are both of order one
        network = HypernetworkConfig(rank=4, blocks=1, aggregation=aggregation, step_size=step_size)
        agent = Recorder(env, RLEditConfig(network=network, credit=credit, discount=0.9, drift_limit=10.0))
        agent.network.double()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # away from the identity, so that every parameter matters
            for parameter in agent.network.networks.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        return agent

    return make


def discounted(rewards: list[float]) -> float:
    return sum(0.9**t * reward for t, reward in enumerate(rewards))


def replayed_rewards(agent: Recorder) -> list[float]:
    """Rewards of the recorded states' actions under the network's present parameters, from W₀ on."""
    env = agent.env
    env.reset(seed=0)
    rewards = []
    with torch.no_grad():
        for record in agent.records:
            keys, values = agent.network.factors(record)
            rewards.append(env.step(agent.restrained({"keys": keys, "values": values}))[1])
    return rewards


def numeric_gradient(agent: Recorder, objective, direction, epsilon: float = 1e-8) -> float:
    """Central difference of the objective along a direction; so small that no ReLU of the network meets its kink."""
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, d in zip(agent.network.learned_parameters(), direction, strict=True):
                parameter += sign * epsilon * d
            values.append(objective())
            for parameter, d in zip(agent.network.learned_parameters(), direction, strict=True):
                parameter -= sign * epsilon * d
    return (values[0] - values[1]) / (2 * epsilon)


def directions(agent: Recorder):
    """One random direction over all parameters, and one for each parameter tensor alone."""
    generator = torch.Generator().manual_seed(1)
    whole = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in agent.network.learned_parameters()]
    yield whole
    for i in range(len(whole)):
        yield [d if i == j else torch.zeros_like(d) for j, d in enumerate(whole)]


def check_gradient(gradient, agent: Recorder, objective) -> None:
    """Compare the agent's policy gradient (to descend on, a mean over steps) with finite differences."""
    gradient = [-len(agent.records) * g for g in gradient]
    scale = sum(float((g * g).sum()) for g in gradient) ** 0.5
    assert scale > 0
    for direction in directions(agent):
        analytic = sum(float((g * d).sum()) for g, d in zip(gradient, direction, strict=True))
        numeric = numeric_gradient(agent, objective, direction)
        assert analytic == pytest.approx(numeric, rel=1e-4, abs=3e-6 * max(1.0, scale))


@pytest.mark.parametrize("aggregation", ["mend", "least_squares", "recursive"])
def test_6_the_trajectory_gradient_equals_a_finite_difference_gradient_of_the_return(recorder, aggregation):
    agent = recorder(aggregation, "trajectory")
    gradient, _ = trajectory(agent, agent.env, seed=0)
    assert len(agent.records) == 4
    check_gradient(gradient, agent, lambda: discounted(replayed_rewards(agent)))


@pytest.mark.parametrize("aggregation", ["mend", "least_squares", "recursive"])
def test_6_with_step_credit_it_is_the_gradient_of_each_reward_with_respect_to_its_own_action(recorder, aggregation):
    agent = recorder(aggregation, "step")
    gradient, _ = trajectory(agent, agent.env, seed=0)
    check_gradient(gradient, agent, truncated_rewards(agent))


def truncated_rewards(agent: Recorder):
    """Gives the return of the recorded states' actions, each with the earlier actions as they were."""
    fixed = [agent.network.factors(record) for record in agent.records]
    fixed = [tuple({m: t.detach() for m, t in part.items()} for part in factors) for factors in fixed]

    def truncated() -> float:
        rewards = []
        for t, record in enumerate(agent.records):  # the earlier actions as they were
            agent.env.reset(seed=0)
            for keys, values in [*fixed[:t], agent.network.factors(record)]:
                reward = agent.env.step(agent.restrained({"keys": keys, "values": values}))[1]
            rewards.append(reward)
        return discounted(rewards)

    return truncated


@pytest.mark.parametrize("aggregation", ["mend", "least_squares", "recursive"])
@pytest.mark.parametrize("credit", ["trajectory", "step"])
def test_6_holds_with_updates_projected_on_low_curvature(recorder, aggregation, credit):
    agent = recorder(aggregation, credit)
    generator = torch.Generator().manual_seed(0)
    curvature = {}
    for m, shape in agent.network.shapes.items():
        u, g = (torch.randn(30, d, generator=generator, dtype=torch.float64) / (1 + torch.arange(d)) for d in shape)
        curvature[m] = Curvature(u.T @ u, g.T @ g)
    agent.projections = low_curvature(curvature, 0.9)
    gradient, _ = trajectory(agent, agent.env, seed=0)
    assert len(agent.records) == 4
    if credit == "trajectory":
        check_gradient(gradient, agent, lambda: discounted(replayed_rewards(agent)))
    else:
        check_gradient(gradient, agent, truncated_rewards(agent))
    with torch.no_grad():  # the projection matters: the update without it is another one
        keys, values = agent.network.factors(agent.records[0])
    for m, update in agent.restrained({"keys": keys, "values": values})["updates"].items():
        assert relative_error(update, values[m].T @ keys[m]) > 0.1


def test_6_holds_where_only_a_batchs_last_step_is_scored(recorder):
    agent = recorder("least_squares", "trajectory", every_step=False)
    gradient, _ = trajectory(agent, agent.env, seed=0)
    check_gradient(gradient, agent, lambda: discounted(replayed_rewards(agent)))


@pytest.mark.parametrize("credit", ["trajectory", "step"])
def test_6_holds_with_own_text_continuations_and_a_bound_in_the_reward(recorder, credit):
    components = {
        "generalization": (1.0, Generalization()), "own_text": (5.0, OwnText(passages=2, tokens=6, pool=8)),
        "continuation": (5.0, Continuation(facts=1, tokens=5)),
    }  # fmt: skip
    agent = recorder("recursive", credit, components=components, constraint=Constraint(bound=0.01, start=20.0))
    gradient, numbers = trajectory(agent, agent.env, seed=0)
    assert numbers["own_text"] > 1e-4 and numbers["continuation"] > 1e-4 and numbers["multiplier"] == 20.0
    if credit == "trajectory":
        check_gradient(gradient, agent, lambda: discounted(replayed_rewards(agent)))
    else:
        check_gradient(gradient, agent, truncated_rewards(agent))


# -- 7 ---------------------------------------------------------------------------------------------------------------

EPISODE = """
import hashlib, json, sys
import gymnasium as gym, torch
torch.set_num_threads(1)
env = gym.make("rledit_env:RLEdit-CounterFact-v0", model="tiny-qwen3", num_batches=3, batch_size=3, device="cpu",
               dtype="float32", reward="efficacy", action_noise_std=1e-4, array_backend="torch", reward_gradient=True,
               data=json.loads(sys.argv[1]))
from agents import HypernetworkConfig, RLEditAgent, RLEditConfig
agent = RLEditAgent(env, RLEditConfig(network=HypernetworkConfig(rank=8)), seed=3)
agent.learn(6, progress_bar=False)
digest = hashlib.sha256()
observation, info = env.reset(seed=7)
agent.reset()
rewards, done = [], False
while not done:
    for part in ("keys", "value_gradients"):
        for module in sorted(observation[part]):
            digest.update(observation[part][module].numpy().tobytes())
    action, _ = agent.predict(observation)
    observation, reward, done, _, info = env.step(action)
    rewards.append(reward.hex())
for module in sorted(env.unwrapped.lm.module_shapes):
    digest.update(env.unwrapped.lm.weight(module).numpy().tobytes())
digest.update(json.dumps(env.unwrapped.stream.indices.tolist()).encode())
print(json.dumps([digest.hexdigest(), rewards, env.unwrapped.evaluate().as_dict()]))
"""


def test_7_the_same_seed_gives_the_same_trajectory_bit_for_bit_in_a_fresh_process(facts):
    rows = [
        {
            "case_id": i,
            "prompt": r.prompt,
            "subject": r.subject,
            "target_new": r.target,
            "ground_truth": r.original,
            "rephrase_prompt": r.paraphrases[0],
            "locality_prompt": r.unrelated[0].prompt,
            "locality_ground_truth": r.unrelated[0].answer,
        }
        for i, r in enumerate(facts("counterfact"))
    ]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", EPISODE, json.dumps(rows)],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for hash_seed in ("1", "2")
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    first, second = (json.loads(out) for out, _ in outputs)
    assert first == second
    assert len(first[1]) == 3 and len(first[0]) == len(hashlib.sha256().hexdigest())


def test_7_the_same_seed_gives_the_same_trajectory_and_another_seed_another(make_env, random_action):
    returns = []
    for seed in (5, 5, 6):
        env = make_env(action_noise_std=1e-3, reward="efficacy")
        env.reset(seed=seed)
        returns.append([env.step(random_action(env, seed=step))[1] for step in range(3)])
        env.close()  # drops cached states, whose last bits depend on what they were computed together with
    assert returns[0] == returns[1] != returns[2]


# -- 8 ---------------------------------------------------------------------------------------------------------------


def spoiled(action, part: str, change):
    """The action with one part's last module changed."""
    module = list(action[part])[-1]
    return {**action, part: {**action[part], module: change(action[part][module])}}


def put(value: float, row: int = 0):
    def change(array):
        array = array.copy()
        array[row, -1] = value
        return array

    return change


BAD_ACTIONS = {
    "none": lambda a: None,
    "array": lambda a: a["keys"][next(iter(a["keys"]))],
    "without values": lambda a: {"keys": a["keys"]},
    "with a part too many": lambda a: {**a, "mask": np.ones(3)},
    "without a module": lambda a: {**a, "values": dict(list(a["values"].items())[1:])},
    "with an unknown module": lambda a: {**a, "keys": {**a["keys"], "lm_head": np.zeros((3, 3))}},
    "too wide": lambda a: spoiled(a, "values", lambda v: np.pad(v, ((0, 0), (0, 1)))),
    "too narrow": lambda a: spoiled(a, "keys", lambda k: k[:, :-1]),
    "too many rows": lambda a: spoiled(a, "values", lambda v: np.pad(v, ((0, 1), (0, 0)))),
    "too few rows": lambda a: spoiled(a, "keys", lambda k: k[:1]),
    "transposed": lambda a: spoiled(a, "values", np.transpose),
    "flat": lambda a: spoiled(a, "values", np.ravel),
    "stacked": lambda a: spoiled(a, "values", lambda v: v[None]),
    "nan in keys": lambda a: spoiled(a, "keys", put(np.nan)),
    "nan in values": lambda a: spoiled(a, "values", put(np.nan)),
    "infinite": lambda a: spoiled(a, "values", put(np.inf)),
    "minus infinite in the last row in use": lambda a: spoiled(a, "keys", put(-np.inf, row=-1)),
    "too large for float32": lambda a: spoiled(a, "values", lambda v: np.full(v.shape, 1e300)),
    "text": lambda a: spoiled(a, "values", lambda v: "values"),
    "missing array": lambda a: spoiled(a, "keys", lambda k: None),
    "ragged": lambda a: spoiled(a, "keys", lambda k: [[1.0], [1.0, 2.0]]),
}


@pytest.mark.parametrize("bad", BAD_ACTIONS)
def test_8_a_rejected_action_leaves_weights_stream_and_random_state_as_they_were(make_env, random_action, bad):
    def begin():
        env = make_env(action_noise_std=1e-3, reward="efficacy")
        observation, _ = env.reset(seed=0)
        used = int(observation["mask"].sum())
        env.step({part: {m: f[:used] for m, f in fs.items()} for part, fs in random_action(env, seed=1).items()})
        action = random_action(env, seed=2)
        used = env.episode.rows
        return env, {part: {m: f[:used] for m, f in fs.items()} for part, fs in action.items()}

    env, good = begin()
    expected = (*env.step(good), env.lm.snapshot())

    env, good = begin()
    before = (env.lm.snapshot(), env.stream.indices.copy(), list(env.history))
    state, torch_state = env.np_random.bit_generator.state, torch.get_rng_state()
    for _ in range(2):
        with pytest.raises(ValueError, match="action"):
            env.step(BAD_ACTIONS[bad](good))
    assert equal(before[0], env.lm.snapshot())
    assert equal(before[1], env.stream.indices)
    assert before[2] == env.history
    assert state == env.np_random.bit_generator.state
    assert torch.equal(torch_state, torch.get_rng_state())
    result = (*env.step(good), env.lm.snapshot())
    assert all(equal(a, b) for a, b in zip(expected, result, strict=True))
