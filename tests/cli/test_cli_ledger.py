"""`rledit edit --ledger` and `rledit ledger`: what they write, what they say, and how they end."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from agents import HypernetworkConfig, RLEditAgent, RLEditConfig
from rledit_env import cli
from rledit_env.ledger import EditLedger
from rledit_env.lm.editable import EditableLM

FACTS = [{"prompt": f"The king of Ruritania in {year} was", "target": name, "subject": "Ruritania"}
         for year, name in ((1700, "Rudolf"), (1750, "Michael"), (1800, "Flavia"), (1850, "Rupert"), (1900, "Anton"))]


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    lm = EditableLM.load("tiny-llama", dtype="float32", device="cpu")
    config = RLEditConfig(network=HypernetworkConfig(rank=4, step_size=3e-2))
    RLEditAgent(shapes=lm.module_shapes, config=config).save(tmp_path / "agent")
    facts = tmp_path / "facts.jsonl"
    facts.write_text("\n".join(map(json.dumps, FACTS)))
    return ["edit", "--facts", str(facts), "--agent", str(tmp_path / "agent"), "--model", "tiny-llama", "--batch-size",
            "2", "--device", "cpu", "--out", str(tmp_path / "out"), "--ledger", str(tmp_path / "ledger")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def equal(one: Path, other: Path) -> bool:
    left, right = weights(one), weights(other)
    return all(torch.equal(left[name], right[name]) for name in left)


def test_a_recorded_edit_is_listed_verified_replayed_and_undone(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = str(tmp_path / "ledger")
    assert cli.main(arguments) == 0
    capsys.readouterr()
    assert cli.main(["ledger", "list", ledger]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 2 + 3 and listed[2].split()[:5] == ["1", "edit", "1", "1", "2"]
    assert cli.main(["ledger", "verify", ledger, "--weights"]) == 0
    assert "all 3 entries are whole and lead to the recorded weights" in capsys.readouterr().out
    assert cli.main(["ledger", "replay", ledger, "--out", str(tmp_path / "again")]) == 0
    assert equal(tmp_path / "out", tmp_path / "again")
    assert cli.main(["ledger", "replay", ledger, "--to", "2", "--out", str(tmp_path / "two")]) == 0
    assert cli.main(["ledger", "undo", ledger, "--batch", "3", "--out", str(tmp_path / "undone")]) == 0
    left, right, edited = weights(tmp_path / "two"), weights(tmp_path / "undone"), weights(tmp_path / "out")
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=1e-6)
    assert any(not torch.equal(left[name], edited[name]) for name in left)
    assert cli.main(["ledger", "undo", ledger, "--batch", "3"]) == 2
    assert "undone already" in capsys.readouterr().err


def test_a_new_run_does_not_write_into_a_ledger_and_resume_wants_the_same_run(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 0
    assert cli.main([*arguments, "--overwrite"]) == 2
    assert "--resume" in capsys.readouterr().err
    assert cli.main([*arguments, "--overwrite", "--resume", "--batch-size", "3"]) == 2
    assert "--batch-size: 2 there, 3 here" in capsys.readouterr().err
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert cli.main([*arguments, "--overwrite", "--resume"]) == 0
    assert "going on after 3 recorded updates" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert cli.main([*arguments[:-2], "--overwrite", "--resume"]) == 2
    assert "name it with --ledger" in capsys.readouterr().err


def test_damage_is_named_with_what_is_usable_and_resume_mends_it(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = str(tmp_path / "ledger")
    assert cli.main(arguments) == 0
    entry = EditLedger(ledger).names[2]
    os.truncate(tmp_path / "ledger" / entry, 100)
    for action in (["list"], ["verify"], ["replay", "--out", str(tmp_path / "r")]):
        assert cli.main(["ledger", action[0], ledger, *action[1:]]) == 1
        error = capsys.readouterr().err
        assert entry[:20] in error and "usable: the first 2 entries" in error
    assert cli.main(["ledger", "replay", ledger, "--to", "2", "--out", str(tmp_path / "r")]) == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    # The memory of the second entry is the second newest, so that the third can be taken anew.
    assert cli.main([*arguments, "--overwrite", "--resume"]) == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert cli.main(["ledger", "verify", ledger]) == 0


def test_a_drift_bound_stops_the_run_and_writes_nothing(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*arguments[:-2], "--drift-bound", "1e-9"]) == 1
    assert "further than --drift-bound" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.main([*arguments[:-2], "--drift-bound", "1e9"]) == 0
