"""An interrupted training run, killed or stopped by hand, ends as it would have ended."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from killing import assert_killed_runs_end_alike, die_at, forked, import_paths
from safetensors.torch import load_file

import rledit_env  # noqa: F401  (registers the environments)
from agents import HypernetworkConfig, RLEditAgent, RLEditConfig
from agents.files import read_tensors
from agents.rledit.checkpoint import load_training_state, training_state
from agents.rledit.trainer import update_policy
from agents.rledit.trajectory import trajectory
from rledit_env.files import MARKER, write_tensors
from rledit_env.knowledge import load_knowledge
from rledit_env.ledger import weights_hash
from rledit_env.preservation import Constraint, Continuation, OwnText
from rledit_env.reward import RewardConfig

SETTINGS: dict[str, Any] = {"total_timesteps": 12, "eval_every": 2, "patience": 99, "progress_bar": False}


def environments(reward: RewardConfig | None = None) -> tuple[gym.Env[Any, Any], gym.Env[Any, Any]]:
    """Two steps a stream, six updates in all, and a held-out stream on the same LLM."""
    facts = load_knowledge("zsre")
    common: dict[str, Any] = {
        "num_batches": 2, "batch_size": 2, "array_backend": "torch", "disable_env_checker": True,
    }  # fmt: skip
    env = gym.make(
        "RLEdit-ZsRE-v0", model="tiny-llama", dtype="float32", data=replace(facts, records=facts.records[:20]),
        reward_gradient=True, reward=reward, **common,
    )  # fmt: skip
    held_out = replace(facts, records=facts.records[20:30])
    return env, gym.make("RLEdit-ZsRE-v0", model=env.unwrapped.lm, data=held_out, reward="none", **common)


def new_agent(
    env: gym.Env[Any, Any], policy_average: float = 0.0, batches_per_update: int | None = None, **network: Any
) -> RLEditAgent:
    settings = {"rank": 4, "step_size": 3e-3, "aggregation": "least_squares", **network}
    config = RLEditConfig(network=HypernetworkConfig(**settings), learning_rate=0.05, prior_batches=2,
                          policy_average=policy_average, batches_per_update=batches_per_update)
    return RLEditAgent(env, config, seed=3)


def assert_same(one: RLEditAgent, other: RLEditAgent) -> None:
    """Network, moments, best score and counters agree."""
    for left, right in ((training_state(one), training_state(other)),):
        assert set(left[0]) == set(right[0])
        for name in left[0]:
            torch.testing.assert_close(left[0][name], right[0][name], rtol=1e-5, atol=1e-7, msg=name)
        assert left[1] == right[1]


class Stop(gym.Wrapper[Any, Any, Any, Any]):
    """Raises Ctrl-C in the middle of a stream."""

    def __init__(self, env: gym.Env[Any, Any], at: int) -> None:
        super().__init__(env)
        self.left = at

    def step(self, action: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.env.step(action)


@pytest.mark.parametrize(
    "settings",
    [{}, {"normaliser": "lifetime"}, {"policy_average": 0.5}, {"policy_average": 0.5, "batches_per_update": 1}],
    ids=["plain", "lifetime", "averaged", "along the stream"],
)
def test_a_run_stopped_by_ctrl_c_in_a_stream_ends_as_the_uninterrupted_one(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    env, eval_env = environments()
    whole = new_agent(env, **settings).learn(log_dir=tmp_path / "whole", eval_env=eval_env, **SETTINGS)
    stopped = new_agent(Stop(env, at=8), **settings)
    with pytest.raises(KeyboardInterrupt):
        stopped.learn(log_dir=tmp_path / "cut", eval_env=eval_env, **SETTINGS)
    assert stopped.updates == 3
    assert stopped.timesteps == 6
    going_on = new_agent(env, **settings).learn(log_dir=tmp_path / "cut", eval_env=eval_env, **SETTINGS)
    assert_same(whole, going_on)


BOUNDED = RewardConfig(
    components={**RewardConfig().components, "continuation": (0.5, Continuation(facts=1, tokens=4)),
                "own_text": (0.5, OwnText(passages=1, tokens=4, pool=8))},
    constraint=Constraint(bound=1e-4, rate=1e4),
)  # fmt: skip


def test_a_run_under_a_bound_that_was_stopped_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    env, eval_env = environments(BOUNDED)
    multipliers: list[float] = []
    whole = new_agent(env)
    whole.learn(log_dir=tmp_path / "whole", eval_env=eval_env, callback=lambda n: multipliers.append(n["multiplier"]),
                **SETTINGS)
    assert multipliers[0] == 0.0 and len(set(multipliers)) > 2, "each trajectory has a multiplier of its own"
    assert env.unwrapped.multiplier.value == training_state(whole)[1]["multiplier"] > 0
    env, eval_env = environments(BOUNDED)
    with pytest.raises(KeyboardInterrupt):
        new_agent(Stop(env, at=8)).learn(log_dir=tmp_path / "cut", eval_env=eval_env, **SETTINGS)
    assert env.unwrapped.multiplier.value == pytest.approx(multipliers[3], rel=1e-4)
    env, eval_env = environments(BOUNDED)
    assert env.unwrapped.multiplier.value == 0.0
    going_on = new_agent(env).learn(log_dir=tmp_path / "cut", eval_env=eval_env, **SETTINGS)
    assert_same(whole, going_on)


def test_trajectories_make_the_multiplier_of_their_last_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    env, _ = environments(BOUNDED)
    agent = new_agent(env)
    agent.config = replace(agent.config, trajectories_per_update=2)
    measured: list[float] = []
    one = env.unwrapped.multiplier

    def noting(*arguments: Any) -> Any:
        gradient, numbers = trajectory(*arguments)
        measured.append(env.unwrapped.history[-1]["own_text"])
        assert numbers["constrained_at_end"] == measured[-1]
        return gradient, numbers

    monkeypatch.setattr("agents.rledit.trainer.trajectory", noting)
    agent.learn(8, progress_bar=False)
    expected = 0.0
    for pair in (measured[:2], measured[2:]):
        expected = max(0.0, expected + 1e4 * (sum(pair) / 2 - 1e-4))
    assert len(measured) == 4 and one.value == pytest.approx(expected)


def test_a_run_stopped_by_ctrl_c_in_an_evaluation_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    env, eval_env = environments()
    whole = new_agent(env).learn(log_dir=tmp_path / "whole", eval_env=eval_env, **SETTINGS)
    with pytest.raises(KeyboardInterrupt):  # the second step of the second evaluation
        new_agent(env).learn(log_dir=tmp_path / "cut", eval_env=Stop(eval_env, at=4), **SETTINGS)
    assert_same(whole, new_agent(env).learn(log_dir=tmp_path / "cut", eval_env=eval_env, **SETTINGS))


def test_a_killed_process_leaves_a_run_that_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    env, eval_env = environments()
    whole = new_agent(env).learn(log_dir=tmp_path / "whole", eval_env=eval_env, **SETTINGS)
    code = (
        "import os, signal, sys, torch; torch.set_num_threads(1); from test_resume import *\n"
        "env, eval_env = environments(); agent = new_agent(env)\n"
        "kill = lambda numbers: os.kill(os.getpid(), signal.SIGKILL) if agent.updates == 5 else None\n"
        "agent.learn(log_dir=sys.argv[1], eval_env=eval_env, callback=kill, **SETTINGS)"
    )
    environment = {**os.environ, "PYTHONPATH": import_paths()}
    process = subprocess.run([sys.executable, "-c", code, str(tmp_path / "cut")], env=environment, check=False)
    assert process.returncode == -signal.SIGKILL
    going_on = new_agent(env)
    seen: list[int] = []
    going_on.learn(
        log_dir=tmp_path / "cut", eval_env=eval_env, callback=lambda _: seen.append(going_on.updates), **SETTINGS
    )
    assert seen[0] <= 6, "the run goes on, and does not start anew"
    assert seen[0] > 1
    assert_same(whole, going_on)


def train_and_die(folder: Path) -> str:
    """Train, or go on training, in a folder "at N", killed just before the N-th change of its files; a hash of the
    whole training state."""
    die_at(folder, int(folder.name.split()[1]))
    env, eval_env = environments()
    agent = new_agent(env).learn(
        log_dir=folder, eval_env=eval_env, **{**SETTINGS, "eval_every": 3, "checkpoint_every": 1}
    )
    tensors, counters = training_state(agent)
    return weights_hash(dict(sorted(tensors.items()))) + json.dumps(counters)


def test_training_killed_at_any_write_ends_as_the_uninterrupted_run(tmp_path: Path) -> None:
    # Of some 300 changes: the first files, the first checkpoint, each of the next ones once, and the last.
    with forked(__file__, "train_and_die") as runner:
        assert_killed_runs_end_alike(runner, tmp_path, (2, 9, 25, 60, 110, 170, 240, 300))


def test_training_in_two_parts_is_training_in_one(tmp_path: Path) -> None:
    env, eval_env = environments()
    whole = new_agent(env).learn(log_dir=tmp_path / "whole", eval_env=eval_env, **SETTINGS)
    first = new_agent(env).learn(log_dir=tmp_path / "parts", eval_env=eval_env, **{**SETTINGS, "total_timesteps": 8})
    rest = {**SETTINGS, "total_timesteps": 4, "reset_num_timesteps": False}
    second = first.learn(log_dir=tmp_path / "parts", eval_env=eval_env, **rest)
    assert (first.progress.begun, whole.progress.begun) == (8, 0)
    second.progress.begun = 0
    assert_same(whole, second)


def test_a_best_score_of_another_metrics_version_is_not_compared_with_new_ones() -> None:
    agent = new_agent(environments()[0])
    agent.best_score = 99.0
    tensors, counters = training_state(agent)
    load_training_state(agent, tensors, counters)
    assert agent.best_score == 99.0
    del counters["metrics_version"]  # as the first version of the metrics wrote it
    load_training_state(agent, tensors, counters)
    assert agent.best_score == -math.inf


def test_a_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    env, eval_env = environments()
    whole = new_agent(env).learn(log_dir=tmp_path, eval_env=eval_env, **SETTINGS)
    calls: list[Any] = []
    again = new_agent(env).learn(log_dir=tmp_path, eval_env=eval_env, callback=calls.append, **SETTINGS)
    assert not calls
    assert_same(whole, again)


def test_without_an_evaluation_checkpoints_are_written_all_the_same(tmp_path: Path) -> None:
    env, _ = environments()
    found: list[bool] = []
    new_agent(env).learn(
        12, log_dir=tmp_path, checkpoint_every=2, progress_bar=False,
        callback=lambda _: found.append((tmp_path / "last" / "agent.json").exists()),
    )  # fmt: skip
    assert found == [False, True, True, True, True, True]
    assert not (tmp_path / "best").exists()


def test_the_last_policy_is_evaluated_even_if_its_turn_had_not_come(tmp_path: Path) -> None:
    env, eval_env = environments()
    agent = new_agent(env).learn(log_dir=tmp_path, eval_env=eval_env, **{**SETTINGS, "eval_every": 100})
    assert agent.progress.evaluated == 6


def test_checkpoints_hold_safetensors_and_json_only(tmp_path: Path) -> None:
    env, eval_env = environments()
    new_agent(env).learn(log_dir=tmp_path, eval_env=eval_env, **SETTINGS)
    names = {path.name for folder in ("last", "best") for path in (tmp_path / folder).iterdir()}
    assert names == {"agent.json", "agent.safetensors", "training.safetensors", MARKER}
    assert any(name.startswith("optimizer.") for name in load_file(tmp_path / "last" / "training.safetensors"))


def test_the_best_checkpoint_is_what_the_agent_holds_at_the_end(tmp_path: Path) -> None:
    env, eval_env = environments()
    agent = new_agent(env).learn(log_dir=tmp_path, eval_env=eval_env, **SETTINGS)
    saved = RLEditAgent.load(tmp_path / "best").network.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in agent.network.state_dict().items())


def test_a_run_with_other_settings_is_not_continued(tmp_path: Path) -> None:
    env, _ = environments()
    new_agent(env).learn(2, log_dir=tmp_path, progress_bar=False)
    with pytest.raises(ValueError, match=r"config\.network\.rank: 4 there, 5 here.*resume=False"):
        new_agent(env, rank=5).learn(4, log_dir=tmp_path, progress_bar=False)


def test_resume_false_starts_anew(tmp_path: Path) -> None:
    env, _ = environments()
    new_agent(env).learn(4, log_dir=tmp_path, progress_bar=False)
    agent = new_agent(env, rank=5).learn(2, log_dir=tmp_path, progress_bar=False, resume=False)
    assert agent.updates == 1
    assert json.loads((tmp_path / "last" / "agent.json").read_text())["config"]["network"]["rank"] == 5


def test_a_run_shorter_than_the_agent_is_not_taken_for_its_past(tmp_path: Path) -> None:
    env, _ = environments()
    new_agent(env).learn(2, log_dir=tmp_path, progress_bar=False)
    agent = new_agent(env).learn(4, progress_bar=False)
    with pytest.raises(ValueError, match="holds a run after update 1, but this agent has already made 2"):
        agent.learn(6, log_dir=tmp_path, progress_bar=False)


def test_an_early_stop_stays_one_after_resuming(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    env, eval_env = environments()
    settings = {**SETTINGS, "eval_every": 1, "patience": 1, "total_timesteps": 40}

    def make() -> RLEditAgent:
        network = HypernetworkConfig(rank=4)
        return RLEditAgent(env, RLEditConfig(network=network, learning_rate=1e-9, step_size_learning_rate=1e-9))

    stopped = make().learn(log_dir=tmp_path, eval_env=eval_env, **settings)
    assert stopped.updates == 1  # nothing learned, so no better score
    assert "stopped early" in capsys.readouterr().out
    assert_same(stopped, make().learn(log_dir=tmp_path, eval_env=eval_env, **settings))


def test_a_full_disk_is_named_and_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    env, eval_env = environments()
    whole = new_agent(env).learn(log_dir=tmp_path / "whole", eval_env=eval_env, **SETTINGS)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    agent = new_agent(env)

    def fill_the_disk(_: Any) -> None:
        if agent.updates == 3:
            size = (tmp_path / "cut" / "last" / "agent.safetensors").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, limits[1]))

    try:
        with pytest.raises(OSError, match=r"agent.safetensors cannot be written \(.*\); free some space"):
            agent.learn(log_dir=tmp_path / "cut", eval_env=eval_env, callback=fill_the_disk, **SETTINGS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert RLEditAgent.load(tmp_path / "cut" / "last").updates == 2
    going_on = new_agent(env)
    going_on.learn(log_dir=tmp_path / "cut", eval_env=eval_env, **SETTINGS)
    assert_same(whole, going_on)


def test_a_folder_that_may_not_be_written_is_named_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env, _ = environments()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        new_agent(env).learn(4, log_dir=tmp_path / "file" / "run", progress_bar=False)

    def read_only(*_: Any) -> None:
        raise PermissionError(13, "Read-only file system")

    agent = new_agent(env)
    agent.learn(2, log_dir=tmp_path / "run", progress_bar=False, checkpoint_every=1)
    before = (tmp_path / "run" / "last" / "training.safetensors").read_bytes()
    monkeypatch.setattr(Path, "replace", read_only)  # tests may run as a user whom no permission stops
    with pytest.raises(PermissionError, match=r"cannot be written \(Read-only file system\).*What was there before"):
        agent.learn(4, log_dir=tmp_path / "run", progress_bar=False, checkpoint_every=1)
    monkeypatch.undo()
    assert (tmp_path / "run" / "last" / "training.safetensors").read_bytes() == before
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_a_policy_gradient_that_is_not_finite_leaves_the_policy_as_it_was() -> None:
    env, _ = environments()
    agent = new_agent(env)
    before = {k: v.clone() for k, v in agent.network.state_dict().items()}
    spoilt = [torch.full_like(p, float("nan")) for p in agent.network.learned_parameters()]
    with pytest.warns(UserWarning, match="gradient of update 1 is not finite"):
        update_policy(agent, [spoilt])
    assert all(torch.equal(before[k], v) for k, v in agent.network.state_dict().items())


@pytest.mark.parametrize("where", ["network", "stream", "optimizer", "best", "counters"])
def test_a_checkpoint_that_can_be_read_but_does_not_fit_leaves_the_agent_as_it_was(tmp_path: Path, where: str) -> None:
    env, eval_env = environments()
    run: dict[str, Any] = {**SETTINGS, "log_dir": tmp_path, "eval_env": eval_env}
    new_agent(env, normaliser="lifetime").learn(**{**run, "total_timesteps": 4})
    path = tmp_path / "last" / "training.safetensors"
    tensors, metadata = read_tensors(path)
    counters = json.loads(metadata["training"])
    if where == "counters":
        del counters["waited"]
    else:
        name = [n for n, t in tensors.items() if n.startswith(where) and t.dim()][-1]
        tensors[name] = tensors[name][..., 1:].contiguous()
    write_tensors(path, tensors, {"training": json.dumps(counters)})
    agent = new_agent(env, normaliser="lifetime")
    before, settings = training_state(agent)
    with pytest.raises(ValueError, match="is damaged, or of another version"):
        agent.learn(**run)
    after, settings_after = training_state(agent)
    assert before.keys() == after.keys() and settings == settings_after
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("what", ["cut short", "emptied", "no safetensors"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, what: str) -> None:
    env, _ = environments()
    new_agent(env).learn(2, log_dir=tmp_path, progress_bar=False)
    path = tmp_path / "last" / "training.safetensors"
    content = path.read_bytes()
    path.write_bytes({"cut short": content[:-10], "emptied": b"", "no safetensors": b"x" * 100}[what])
    with pytest.raises(ValueError, match="training.safetensors is damaged .*resume=False"):
        new_agent(env).learn(4, log_dir=tmp_path, progress_bar=False)
