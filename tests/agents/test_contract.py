"""The contract of `agents.Agent`, the same for every class of agent that can be saved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from torch import Tensor

from agents import (
    Agent,
    CrispEditConfig,
    DAFNetConfig,
    DAFNetNetworkConfig,
    HypernetworkConfig,
    MALMENConfig,
    MENDConfig,
    RLEditConfig,
    StableEditConfig,
    StandardConfig,
    ValueConfig,
    edit_facts,
    edit_stream,
    load_agent,
)
from agents.base import run_stream
from agents.hypernetworks.malmen import malmen_network
from agents.hypernetworks.mend import mend_network
from agents.locate_then_edit.locate import LocateAgent
from agents.rledit.agent import RLEditAgent
from agents.running.saved import CLASSES
from agents.sb3.agent import StandardAgent
from agents.sb3.random_search import RandomSearchAgent
from rledit_env.lm.editable import EditableLM

MODULES = "model.layers.[1-2].mlp.down_proj"
ONE_MODULE = "model.layers.1.mlp.down_proj"  # for ROME
EPISODE = 2  # steps: two batches, presented once
TRAINED = [name for name, kind in CLASSES.items() if issubclass(kind, (RLEditAgent, StandardAgent, RandomSearchAgent))]
RESUMING = [name for name in TRAINED if not issubclass(CLASSES[name], RandomSearchAgent)]
ANY_MODULES = ("none", "fine-tuning", "ft-l", "ft-m", "crispedit")  # they are made for no modules in particular
QUICK = {"contexts": 1, "context_lengths": (4,), "corpus_tokens": 512}


class Counted(gym.Wrapper[Any, Any, Any, Any]):
    """Counts the steps that are taken, and says when the environment was reset."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.steps = 0

    def step(self, action: Any) -> Any:
        self.steps += 1
        return self.env.step(action)


@pytest.fixture
def make(
    tiny_lm: Callable[..., EditableLM], facts: Callable[..., Any], request: pytest.FixtureRequest
) -> Callable[..., Counted]:
    name = request.node.callspec.params["name"]

    def made(modules: str = ONE_MODULE if name == "rome" else MODULES, **arguments: Any) -> Counted:
        settings = {"reward": "efficacy", "reward_gradient": True, **arguments}
        return Counted(gym.make(
            "RLEdit-CounterFact-v0", model=tiny_lm(modules=modules), data=facts("counterfact", 12), num_batches=2,
            batch_size=1, array_backend="torch", token="subject", disable_env_checker=True, **settings,
        ))  # fmt: skip

    return made


def config_of(name: str) -> Any:
    """A configuration that is quick on the tiny model."""
    kind = CLASSES[name]
    if issubclass(kind, LocateAgent):
        more = {"threshold": 0.3, "ridge": 0.1} if name == "alphaedit" else {}
        return kind.config_class(value=ValueConfig(steps=2), **QUICK, **more)
    small: dict[str, Any] = {"learning_rate": 1e-3, "trajectories_per_update": 1}
    return {
        "rledit": lambda: RLEditConfig(network=HypernetworkConfig(rank=4), prior_batches=2),
        "mend": lambda: MENDConfig(network=mend_network(rank=4), **small),
        "malmen": lambda: MALMENConfig(network=malmen_network(rank=4), **small),
        "dafnet": lambda: DAFNetConfig(DAFNetNetworkConfig(rank=4, feed_forward=4, attention=4, heads=1), **small),
        "stableedit": lambda: StableEditConfig(warm_up_facts=40),
        "standard": lambda: StandardConfig(
            baseline_streams=1, hyperparameters={"n_steps": 2, "batch_size": 2, "n_epochs": 1}
        ),
        "random search": StandardConfig,
        "crispedit": lambda: CrispEditConfig(steps=2, corpus_tokens=512),
    }.get(name, lambda: None)()


def agent_in(name: str, env: gym.Env[Any, Any]) -> Agent:
    kind: Any = CLASSES[name]
    return kind(env, config_of(name), seed=3)


def change_of(action: Any, lm: EditableLM) -> dict[str, Tensor]:
    """ΔW by module of an action, whatever its form."""
    if "keys" in action:
        return {m: action["values"][m].T @ action["keys"][m] for m in action["keys"]}
    if "accumulated" in action:
        return {m: a - (lm.weight(m) - lm.original_weight(m)) for m, a in action["accumulated"].items()}
    return dict(action["updates"])


@pytest.mark.parametrize("name", CLASSES)
def test_learn_takes_so_many_further_steps_and_returns_the_agent(make: Any, name: str) -> None:
    env = make()
    agent = agent_in(name, env)
    wanted = 8 if name in TRAINED else 0
    for reset, counted in ((True, wanted), (True, wanted), (False, 2 * wanted)):
        before = env.steps
        assert agent.learn(7, progress_bar=False, reset_num_timesteps=reset) is agent  # whole episodes: 8
        assert env.steps - before == wanted
        assert agent.timesteps == counted
    before = env.steps
    if name not in ("random search",):  # which needs two streams
        agent.learn(0, progress_bar=False)
        assert env.steps == before


@pytest.mark.parametrize("name", TRAINED)
def test_further_learning_trains_further(make: Any, name: str) -> None:
    agent = agent_in(name, make())

    def policy() -> list[Tensor]:
        if isinstance(agent, RLEditAgent):
            return [p.detach().clone() for p in agent.network.parameters()]
        if isinstance(agent, StandardAgent):
            return [p.detach().clone() for p in agent.model.policy.parameters()]
        return [torch.tensor(agent.searches)]

    agent.learn(8, progress_bar=False)
    before = policy()
    agent.learn(8, progress_bar=False)
    assert any(not torch.equal(a, b) for a, b in zip(before, policy(), strict=True))


@pytest.mark.parametrize("name", TRAINED)
def test_training_ends_when_the_callback_says_so(make: Any, name: str) -> None:
    calls: list[dict[str, float]] = []

    def stop(numbers: dict[str, float]) -> bool:
        calls.append(numbers)
        return False

    agent_in(name, make()).learn(80, stop, progress_bar=False)
    assert len(calls) == 1 and "return" in calls[0]


@pytest.mark.parametrize("name", RESUMING)
def test_an_unfinished_run_is_finished_counted_from_its_start(make: Any, name: str, tmp_path: Path) -> None:
    calls: list[Any] = []

    def interrupt(numbers: Any) -> None:
        calls.append(numbers)
        if len(calls) == 2:
            raise KeyboardInterrupt

    first, second = make(), make()
    agent = agent_in(name, first)
    with pytest.raises(KeyboardInterrupt):
        agent.learn(12, interrupt, progress_bar=False, log_dir=tmp_path)
    assert 0 < first.steps < 12
    going_on = agent_in(name, second).learn(12, progress_bar=False, log_dir=tmp_path)
    assert going_on.timesteps == 12 and 0 < second.steps < 12
    taken = second.steps
    assert agent_in(name, make()).learn(12, progress_bar=False, log_dir=tmp_path).timesteps == 12
    assert second.steps == taken, "a new agent takes a finished run as it is"
    going_on.learn(12, progress_bar=False, log_dir=tmp_path)
    assert going_on.timesteps == 12 and second.steps == taken + 12, "the agent that finished it takes further steps"
    with pytest.raises(KeyboardInterrupt):
        calls.clear()
        going_on.learn(12, interrupt, progress_bar=False, log_dir=tmp_path)
    taken = second.steps
    going_on.learn(12, progress_bar=False, log_dir=tmp_path)
    assert going_on.timesteps == 12 and second.steps < taken + 12, "its own unfinished run is finished, too"


@pytest.mark.parametrize("name", CLASSES)
def test_set_env_changes_the_agent_in_place_and_returns_nothing(make: Any, name: str) -> None:
    first = make()
    second = make(reward="none", reward_gradient=False)
    agent = agent_in(name, first)
    agent.learn(8, progress_bar=False)
    assert agent.set_env(second) is None  # type: ignore[func-returns-value]
    assert agent.env is second
    taken = first.steps
    agent.reset()
    observation, _ = second.reset(seed=5)
    second.step(agent.predict(observation)[0])
    assert (first.steps, second.steps) == (taken, 1)
    # A copy in the first environment again leaves this one where it is.
    other = copy.copy(agent)
    other.set_env(first)
    assert agent.env is second and other.env is first
    if name in TRAINED:
        other.learn(4, progress_bar=False)
        assert (first.steps, second.steps) == (taken + 4, 1)


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in ANY_MODULES])
def test_an_environment_that_the_agent_is_not_for_is_refused_and_changes_nothing(make: Any, name: str) -> None:
    env = make()
    agent = agent_in(name, env)
    wrong = make(modules="model.layers.1.mlp.up_proj")
    with pytest.raises(ValueError, match=r"modules|edit_modules"):
        agent.set_env(wrong)
    assert agent.env is env
    observation, _ = env.reset(seed=0)
    env.step(agent.predict(observation)[0])


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_no_environment_of_this_package_is_refused(make: Any, name: str) -> None:
    agent = agent_in(name, make())
    with pytest.raises(ValueError, match="no environment of this package"):
        agent.set_env(gym.make("CartPole-v1"))


@pytest.mark.parametrize("run", [run_stream, edit_stream], ids=["run_stream", "edit_stream"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_stream_begins_with_a_reset_of_the_agent_unless_the_weights_are_kept(make: Any, name: str, run: Any) -> None:
    env = make()
    agent = agent_in(name, env)
    resets: list[bool] = []
    original = agent.reset
    agent.reset = lambda: (resets.append(True), original())[1]  # type: ignore[method-assign]
    run(env, agent, seed=0)
    assert len(resets) == 1
    run(env, agent, seed=1, options={"keep_weights": True})
    assert len(resets) == 1
    run(env, agent, seed=1)
    assert len(resets) == 2


@pytest.mark.parametrize("name", CLASSES)
def test_a_stream_is_edited_alike_by_every_function_whatever_came_before(make: Any, name: str) -> None:
    env = make()
    agent = agent_in(name, env)
    agent.learn(0 if name != "random search" else 4, progress_bar=False)
    drifts = []
    for run in (run_stream, edit_stream, run_stream):
        run(env, agent, seed=4)
        drifts.append(sum(env.unwrapped.lm.drift().values()))
    assert drifts[1:] == pytest.approx(drifts[:1] * 2, rel=1e-5)


@pytest.mark.parametrize("name", CLASSES)
def test_edit_facts_puts_the_agent_s_environment_back(make: Any, name: str) -> None:
    env = make()
    agent = agent_in(name, env)
    inner = env.unwrapped
    edit_facts(inner.lm, agent, inner.dataset, batch_size=8, token="subject")
    assert agent.env is env


@pytest.mark.parametrize("name", CLASSES)
def test_an_agent_comes_back_from_its_folder_and_does_the_same(make: Any, name: str, tmp_path: Path) -> None:
    env = make()
    agent = agent_in(name, env)
    agent.learn(8, progress_bar=False)
    agent.save(tmp_path)
    loaded = load_agent(tmp_path, env)
    assert type(loaded) is type(agent) and loaded.timesteps in (agent.timesteps, 0)
    changes = []
    for one in (agent, loaded):
        one.reset()
        env.unwrapped.lm.prefix_cache.clear()
        observation, _ = env.reset(seed=6)
        changes.append(change_of(one.predict(observation)[0], env.unwrapped.lm))
    assert changes[0].keys() == changes[1].keys()
    for module, change in changes[0].items():
        torch.testing.assert_close(changes[1][module], change, rtol=1e-5, atol=1e-8)
