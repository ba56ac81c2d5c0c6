"""Which weights to edit: what the probe tries, keeps, and recommends."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.running.probe import FINAL, NO_EDIT, Candidate, Probe, ProbeConfig, ProbeResult, run_glob
from rledit_env import cli
from rledit_env.files import MARKER
from rledit_env.knowledge import KnowledgeDataset
from rledit_env.lm.loading.loader import load_model
from rledit_env.lm.modules import linear_modules
from rledit_env.lm.names import expand_globs, module_kind, module_layer
from rledit_env.reporting import module_map

SMALL = ProbeConfig(
    step_sizes=(1e-2, 1.0), num_batches=1, batch_size=2, steps_per_batch=1, run_lengths=(2,), layer_stride=1,
    finalists=0,
)  # fmt: skip
MLP = ["model.layers.[0-2].mlp.{up,down}_proj"]


@pytest.fixture
def make_probe(facts: Callable[..., KnowledgeDataset], tmp_path: Path) -> Callable[..., Probe]:
    def make(config: ProbeConfig = SMALL, among: Any = MLP, beside: Any = None) -> Probe:
        model, tokenizer = load_model("tiny-llama")
        path = tmp_path / "probe.json"
        return Probe(model, tokenizer, facts("counterfact"), path, config, "tiny-llama", among, beside)

    return make


def at_every_step_size(candidate: Candidate) -> dict[str, float]:
    return {f"{candidate.glob} @ {size:g}": size for size in SMALL.step_sizes}


def test_every_module_is_tried_alone_then_runs_of_the_best_kinds(make_probe: Callable[..., Probe]) -> None:
    probe = make_probe()
    before = {k: v.clone() for k, v in probe.model.state_dict().items()}
    assert probe.runs() == []
    calls: list[tuple[int, int]] = []
    result = probe.run(lambda done, total: calls.append((done, total)))
    assert all(torch.equal(v, before[k]) for k, v in probe.model.state_dict().items())
    alone = [f"model.layers.{i}.mlp.{kind}_proj" for i in range(3) for kind in ("up", "down")]
    assert {c.glob for c in probe.singles()} == set(alone)
    runs = {f"model.layers.[{i}-{i + 1}].mlp.{k}" for i in (0, 1) for k in ("up_proj", "down_proj")}
    both = {c.glob for c in probe.runs()} - runs
    assert len(both) == 2 and all("{" in glob for glob in both)
    assert set(result.cells) == {f"{c} @ {s:g}" for c in {*alone, *runs, *both} for s in (0.01, 1)} | {NO_EDIT}
    assert calls[-1] == (12, 12) and [done for done, _ in calls] == list(range(1, 13))
    drifts = [cell["drift"] for cell in result.cells.values()]
    assert min(drifts) == 0 and sum(drift > 0 for drift in drifts) == 24


def test_the_best_meet_on_other_facts_with_what_is_edited_by_default(make_probe: Callable[..., Probe]) -> None:
    config = replace(SMALL, finalists=2, final_batches=2, final_batch_size=2)
    probe = make_probe(config, beside=["model.layers.[1-3].mlp.{up,down}_proj"])
    before = {k: v.clone() for k, v in probe.model.state_dict().items()}
    calls: list[tuple[int, int]] = []
    result = probe.run(lambda done, total: calls.append((done, total)))
    assert all(torch.equal(v, before[k]) for k, v in probe.model.state_dict().items())
    assert not {id(r) for r in probe.facts.records} & {id(r) for r in probe.final_facts.records}
    assert len(probe.facts) == 2 and len(probe.final_facts) == 4
    (default,) = probe.beside
    first = result.ranked(first=True)
    assert default.glob in {glob for glob, _, _ in first}
    finalists = {glob: size for glob, size, _ in [*first[:2], *(p for p in first if p[0] == default.glob)]}
    finals = {key for key in result.cells if key.startswith(FINAL)} - {FINAL + NO_EDIT}
    assert finals == {f"{FINAL}{g} @ {s:g}" for g, best in finalists.items() for s in (best / 3, best, 3 * best)}
    assert {glob for glob, _, _ in result.ranked()} == set(finalists)
    assert result.ranked()[0][2]["mean"] == max(result.cells[key]["mean"] for key in finals)
    assert result.unedited == result.cells[FINAL + NO_EDIT] != result.cells[NO_EDIT]
    assert calls[-1][0] == calls[-1][1] == 12 + 1 + len(finalists)
    assert make_probe(config, beside=["model.layers.[1-3].mlp.{up,down}_proj"]).run().cells == result.cells


def test_nothing_is_computed_twice_and_other_settings_are_refused(
    make_probe: Callable[..., Probe], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_probe()
    for candidate in list(first.singles())[:2]:
        first._score(candidate, at_every_step_size(candidate))
    assert len(first.cells) == 4
    whole = make_probe().run()

    def not_again(*_: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(Probe, "_edited", not_again)
    again = make_probe().run()
    assert again.cells == whole.cells
    with pytest.raises(ValueError, match=r"holds scores of other settings \(seed\)"):
        make_probe(ProbeConfig(**{**SMALL.__dict__, "seed": 1}))
    stored = json.loads(first.path.read_text(encoding="utf-8"))
    del stored["settings"]["metrics_version"]  # as the first version of the metrics wrote it
    first.path.write_text(json.dumps(stored), encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds scores of other settings \(metrics_version\)"):
        make_probe()


def test_cells_do_not_depend_on_what_was_tried_before(make_probe: Callable[..., Probe], tmp_path: Path) -> None:
    probe = make_probe()
    whole = probe.run()
    (tmp_path / "probe.json").unlink()
    alone = make_probe()
    last = list(alone.singles())[-1]
    alone._score(last, at_every_step_size(last))
    assert alone.cells[f"{last.glob} @ 1"] == whole.cells[f"{last.glob} @ 1"]


def test_globs_name_just_the_run_s_modules() -> None:
    for name in ("tiny-llama", "tiny-gpt2"):
        modules = list(linear_modules(load_model(name)[0]))
        assert not any("head" in module for module in modules)
        for kinds in (1, 2):
            chosen = [n for n in modules if module_layer(n) in (1, 2)]
            wanted = list(dict.fromkeys(map(module_kind, chosen)))[-kinds:]
            chosen = [n for n in chosen if module_kind(n) in wanted]
            assert expand_globs([run_glob(chosen)], modules) == chosen
    mixed = ["model.layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj"]
    assert run_glob(mixed) == "model.layers.1.{mlp.down_proj,self_attn.o_proj}"
    assert run_glob(mixed[:1]) == mixed[0]


def test_the_best_is_recommended_at_its_best_step_size_and_the_smaller_of_equals() -> None:
    def cell(mean: float) -> dict[str, float]:
        return {"efficacy": mean, "generalization": mean, "specificity": mean, "mean": mean, "drift": 0.1}

    a, b = "m.layers.0.mlp.up", "m.layers.1.mlp.up"
    run = Candidate("m.layers.[0-1].mlp.up", (a, b))
    result = ProbeResult(
        {"step_sizes": [0.1, 0.01]},
        {f"{a} @ 0.1": cell(50), f"{a} @ 0.01": cell(70), f"{b} @ 0.1": cell(30), f"{run.glob} @ 0.1": cell(70)},
        {run.glob: run, a: Candidate(a, (a,)), b: Candidate(b, (b,))},
    )
    assert [(glob, size) for glob, size, _ in result.ranked()] == [(a, 0.01), (run.glob, 0.1), (b, 0.1)]
    kinds, layers, maps = result.maps()
    assert (kinds, layers) == (["mlp.up"], [0, 1])
    np.testing.assert_array_equal(maps["mean"], [[70, 30]])
    assert module_map(kinds, layers, maps).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"step_sizes": (0.0,)}, "step_sizes"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"run_lengths": (1,)}, "run_lengths"),
        ({"finalists": -1}, "finalists is -1"),
    ],
)
def test_unusable_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProbeConfig(**wrong)


def test_too_few_facts_are_refused(make_probe: Callable[..., Probe]) -> None:
    with pytest.raises(ValueError, match="has 12 facts, and 116 are needed"):
        make_probe(ProbeConfig())


def test_the_command_recommends_what_the_other_commands_accept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["probe", "--model", "tiny-llama", "--edit-modules", *MLP, "--num-batches", "1", "--batch-size", "2"]
    arguments += ["--steps-per-batch", "1", "--step-sizes", "0.1", "--run-lengths", "2", "--finalists", "1"]
    arguments += ["--out", str(tmp_path / "p")]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "no edit" in out
    assert {"probe.json", "probe.png", "probe.pdf", MARKER} == {p.name for p in (tmp_path / "p").iterdir()}
    told = next(line for line in out.splitlines() if line.startswith("recommended: "))
    words = told.replace("'", "").split()
    glob = words[words.index("--edit-modules") + 1]
    assert expand_globs([glob], list(linear_modules(load_model("tiny-llama")[0])))
    assert f"{glob} @ 0.1" in json.loads((tmp_path / "p" / "probe.json").read_text())["cells"]
    train = ["train", "--env", "RLEdit-CounterFact-v0", "--model", "tiny-llama", "--out", str(tmp_path / "run")]
    small = ["--num-batches", "1", "--batch-size", "2", "--trajectories", "1", "--rank", "2"]
    assert cli.main([*train, *small, *words[1:]]) == 0
