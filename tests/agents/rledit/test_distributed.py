"""Several processes train as one would with all their trajectories."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import import_paths
from safetensors.torch import load_file
from test_resume import environments, new_agent

from agents import RLEditAgent
from agents.rledit.checkpoint import training_state
from agents.rledit.distributed import Processes, evaluate_sharded
from rledit_env.evaluation.metrics import Metrics, evaluate
from rledit_env.knowledge import ImpliedFact, load_knowledge
from rledit_env.lm.editable import EditableLM

SETTINGS: dict[str, Any] = {"eval_every": 1, "patience": 99, "progress_bar": False}


def train(folder: Path, total_timesteps: int, processes: Processes | None = None, trajectories: int = 1) -> RLEditAgent:
    env, eval_env = environments()
    agent = new_agent(env)
    agent.config = replace(agent.config, trajectories_per_update=trajectories)
    return agent.learn(total_timesteps, log_dir=folder, eval_env=eval_env, processes=processes, **SETTINGS)


def launch(folder: Path, total_timesteps: int) -> None:
    """Two gloo processes, each with one trajectory an update."""
    code = (
        "import sys, torch; from pathlib import Path; torch.set_num_threads(1); from test_distributed import *\n"
        "processes = Processes.started(); assert processes.count == 2\n"
        "agent = train(Path(sys.argv[1]), int(sys.argv[2]), processes)\n"
        "states = processes.gathered({k: v for k, v in training_state(agent)[0].items()})\n"
        "assert all(torch.equal(states[0][k], states[1][k]) for k in states[0]), 'the policies differ'\n"
        "torch.distributed.destroy_process_group()\n"
    )
    script = folder.with_name(f"{folder.name}.py")
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": import_paths(), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    run = subprocess.run(
        [*command, str(folder), str(total_timesteps)], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]


def test_two_gloo_processes_make_the_updates_of_one_with_two_trajectories(tmp_path: Path) -> None:
    launch(tmp_path / "two", 12)  # three updates of two streams of two steps
    alone = train(tmp_path / "one", 12, trajectories=2)
    two = load_file(tmp_path / "two" / "last" / "training.safetensors")
    one = load_file(tmp_path / "one" / "last" / "training.safetensors")
    assert alone.updates == RLEditAgent.load(tmp_path / "two" / "last").updates == 3
    assert set(one) == set(two)
    start = training_state(new_agent(environments()[0]))[0]
    assert any(not torch.equal(start[k], one[k]) for k in start), "something was learned"
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6, msg=name)
    launch(tmp_path / "two", 16)  # goes on where it was
    assert RLEditAgent.load(tmp_path / "two" / "last").updates == 4


class Waiting(Exception):
    """Not all processes have spoken."""


class Fake(Processes):
    """Several processes, one after another: what each gives is noted, and given back once all have spoken."""

    said: list[Any]

    def gathered(self, value: Any) -> list[Any]:
        self.said[self.rank] = value
        if None in self.said:
            raise Waiting
        return self.said


def scored_by(count: int, records: Any, kind: str, lm: EditableLM, metrics: str = "paper") -> Metrics:
    """What the last of several processes gets."""
    said: list[Any] = [None] * count
    found: Metrics | None = None
    for rank in range(count):
        processes = Fake(rank, count)
        object.__setattr__(processes, "said", said)
        with suppress(Waiting):
            found = evaluate_sharded(processes, lm, records, kind, metrics)
    assert found is not None
    return found


@pytest.mark.parametrize("metrics", ["paper", "rledit-code"])
@pytest.mark.parametrize("kind", ["zsre", "counterfact"])
def test_sharded_scores_are_those_of_one_process(kind: str, metrics: str) -> None:
    lm = EditableLM.load("tiny-llama", dtype="float32", device="cpu")
    # Random weights know nothing: half the records ask for what they do answer.
    records = [*load_knowledge(kind).records[:7]]
    for i, text in enumerate(lm.generate([r.prompt for r in records], extra=2)[::2]):
        text = "".join(c for c in text if c.isascii()).strip()
        records[2 * i] = replace(records[2 * i], target=text or "?", implied=(ImpliedFact("Rome is in", "Peru"),) * i)
    wanted = evaluate(lm, records, kind, generate=False, metrics=metrics)
    found = scored_by(3, records, kind, lm, metrics)
    assert found.as_dict() == pytest.approx(wanted.as_dict())
    assert found.taken == wanted.taken and found.metrics == metrics
    assert found.portability is not None


def test_groups_and_further_edits_in_other_processes_are_scored() -> None:
    lm = EditableLM.load("tiny-llama", dtype="float32", device="cpu")
    records = [*load_knowledge("zsre").records[:4]]
    needs = ((records[1].prompt, records[1].target),)  # which another process scores
    records[0] = replace(records[0], implied=(ImpliedFact("Rome is in", "Peru", "multi_hop", needs),))
    records[3] = replace(records[3], implied=(ImpliedFact("Oslo is in", "Chad", "Reasoning"),))
    wanted = evaluate(lm, records, "zsre", generate=False)
    assert {"portability/multi_hop", "portability/Reasoning"} == set(wanted.groups)
    assert scored_by(3, records, "zsre", lm).as_dict() == pytest.approx(wanted.as_dict())


def test_processes_beyond_the_records_have_nothing_to_score() -> None:
    lm = EditableLM.load("tiny-llama", dtype="float32", device="cpu")
    records = load_knowledge("counterfact").records[:2]
    wanted = evaluate(lm, records, "counterfact", generate=False)
    assert scored_by(3, records, "counterfact", lm).as_dict() == pytest.approx(wanted.as_dict())


def test_moments_of_a_lifetime_are_not_split_among_processes() -> None:
    env, _ = environments()
    with pytest.raises(ValueError, match="normaliser is 'lifetime'"):
        new_agent(env, normaliser="lifetime").learn(4, processes=Processes(0, 2), progress_bar=False)


def test_alone_nothing_is_averaged_or_shared() -> None:
    alone = Processes.started()
    assert alone == Processes(0, 1) and alone.first
    tensors = [torch.ones(2), torch.zeros(3)]
    assert alone.mean(tensors) == tensors
    assert alone.share([1, 2, 3]) == [1, 2, 3]
    assert Processes(1, 2).share([1, 2, 3, 4, 5]) == [2, 4]
