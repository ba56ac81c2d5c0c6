"""A run's page: what of its folder is shown."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from rledit_env.answers import MEANING
from rledit_env.evaluation.metrics import METRICS_VERSION
from rledit_env.evaluation.retention import Retention
from rledit_env.lm.names import module_kind, module_layer
from rledit_env.reporting import general_table, versions
from rledit_env.reporting.run_report import RunReport, answer_rows, score_rows

SCORES = {"efficacy": 90.5, "generalization": 80.0, "specificity": 70.0, "exact_match": 60.0}
TASK = {"f1": 55.5, "mcc": 1.0, "accuracy": 56.0, "f1_calibrated": 57.5, "one_answer": 60.0, "examples": 9}
SELF = {"perplexity": 20.5, "original_perplexity": 20.5, "kl": 0.0}


def retention() -> Retention:
    efficacy = np.array([[90.0, np.nan], [70.0, 95.0]])
    return Retention((1, 2), efficacy, np.array([80.0, 60.0]))


def result(**more: Any) -> dict[str, Any]:
    return {
        "command": "rledit evaluate --agent runs/x", "metrics": SCORES,
        "before": {**SCORES, "efficacy": 29.5, "exact_match": None},
        "settings": {"model": "tiny-llama", "batch_size": 2, "num_batches": 2, "kind": "counterfact"},
        "versions": versions(), "data_source": "file facts.jsonl", "seconds_per_fact": 0.25, "taken": [True] * 4,
        "answers": [
            {"prompt": "Rome is in", "target": "Peru", "before": "Italy", "after": "Peru and", "took": True},
            {"prompt": "Oslo is in", "target": "Chile", "before": "Norway", "after": "", "took": False},
        ],
        "update_norms": [0.5, 0.25],
        "module_drift": {"model.layers.1.mlp.up_proj": [0.1, 0.2], "model.layers.2.mlp.up_proj": [0.2, 0.3]},
        "retention": retention().as_dict(),
        "general": {
            "sources": {"self": "sampled", "cola": "file cola.jsonl"}, "shots": 2,
            "scores": {"0": {"self": SELF, "cola": TASK}, "2": {"self": {**SELF, "kl": 0.75}, "cola": TASK}},
        },
        **more,
    }  # fmt: skip


def write(folder: Path, name: str, content: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def test_the_page_says_what_was_done_and_what_came_of_it(tmp_path: Path) -> None:
    write(tmp_path / "run", "result.json", result())
    writer = SummaryWriter(str(tmp_path / "run"))
    writer.add_scalar("train/generalization", 5.0, 1)
    writer.close()
    [path] = RunReport(tmp_path / "run").write()
    assert path == tmp_path / "run" / "report.html"
    page = path.read_text(encoding="utf-8")
    for text in (
        "4 new facts edited into tiny-llama, 2 at a time", "no edit", "29.5", "90.5", "Rome is in", "(nothing)",
        "Retention", "20.0 points below its best", "Updates", "General ability", "after 2", "own text, KL", "0.75",
        "cola, MCC", "Learning", "rledit evaluate --agent runs/x", "file facts.jsonl", "transformers",
    ):  # fmt: skip
        assert text in page, text
    assert page.count("✓") == 1 and page.count("✗") == 1 and MEANING in html.unescape(page)
    assert re.findall(r'(?:src|href)="(?!data:image/png;base64,)', page) == []
    assert "http" not in page and "<script" not in page


def test_the_answers_of_an_earlier_versions_result_are_not_judged_by_what_took_means_today() -> None:
    earlier = [{k: v for k, v in one.items() if k != "took"} for one in result()["answers"]]
    header, rows = answer_rows(earlier)
    assert header[-1] == "Exactly" and [row[-1] for row in rows] == [False, False]
    header, rows = answer_rows(result()["answers"])
    assert header[-1] == "Took" and [row[-1] for row in rows] == [True, False]


def test_what_was_not_measured_has_no_section(tmp_path: Path) -> None:
    short = result()
    for key in ("retention", "general", "module_drift", "update_norms", "answers", "before", "command"):
        del short[key]
    write(tmp_path, "result.json", short)
    page = RunReport(tmp_path).page().html()
    assert "90.5" in page
    for heading in ("Retention", "General ability", "Updates", "Facts of the stream", "Learning"):
        assert f"<h2>{heading}" not in page


def test_several_results_are_compared_and_share_the_unedited_row(tmp_path: Path) -> None:
    other = {**SCORES, "efficacy": 50.0}
    write(tmp_path, "a.json", result())
    write(tmp_path, "b.json", result(metrics=other))
    write(tmp_path, "c.json", result(before={**SCORES, "efficacy": 11.0}))
    rows = score_rows(RunReport(tmp_path).results)
    assert list(rows) == ["no edit", "a", "b", "no edit (c)", "c"]
    assert rows["b"]["efficacy"] == 50.0
    assert "<h2>Retention (b)" in RunReport(tmp_path).page().html()


def test_results_of_different_metrics_are_not_put_into_one_table(tmp_path: Path) -> None:
    write(tmp_path, "old.json", result())
    write(tmp_path, "new.json", result(metrics_version=METRICS_VERSION))
    with pytest.raises(ValueError, match=r"scores of .* do not compare.*old.json of version 1 \('paper'\).*new.json of "
                                         r"version 2 \('paper'\); write the older one again"):
        RunReport(tmp_path)
    (tmp_path / "old.json").unlink()
    settings = {**result()["settings"], "metrics": "rledit-code"}
    write(tmp_path, "code.json", result(metrics_version=METRICS_VERSION, settings=settings))
    with pytest.raises(ValueError, match=r"code.json of version 2 \('rledit-code'\)"):
        RunReport(tmp_path)
    (tmp_path / "new.json").unlink()
    assert "what the paper&#x27;s released code computes" in RunReport(tmp_path).page().html()


def test_a_page_says_how_its_scores_were_averaged(tmp_path: Path) -> None:
    write(tmp_path, "result.json", result())
    assert "Scored by an earlier version" in RunReport(tmp_path).page().html()
    write(tmp_path, "result.json", result(metrics_version=METRICS_VERSION))
    page = RunReport(tmp_path).page().html()
    assert "mean over facts" in page and "Scored by an earlier version" not in page


def test_pictures_are_written_for_a_paper_too(tmp_path: Path) -> None:
    write(tmp_path, "result.json", result())
    written = RunReport(tmp_path).write(tmp_path / "out" / "page.html", ["png", "pdf"])
    names = {path.name for path in written[1:]}
    assert {"scores.pdf", "scores.png", "retention.pdf", "memory.pdf", "layers.pdf", "norms.png"} <= names
    assert all(path.read_bytes()[:4] in (b"%PDF", b"\x89PNG") for path in written[1:])


def test_the_report_of_edited_facts_is_a_result_too(tmp_path: Path) -> None:
    content = result(answers=[{"prompt": "Rome is in", "target": "Peru", "answer": "Peru"}])
    for key in ("before", "retention", "general", "command"):
        del content[key]
    write(tmp_path, "edit_report.json", content)
    page = RunReport(tmp_path).page().html()
    assert "Answer before" not in page and "Rome is in" in page


def test_folders_without_a_result_say_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no folder"):
        RunReport(tmp_path / "none")
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds no result to show; write one with: rledit evaluate"):
        RunReport(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken.json is damaged"):
        RunReport(tmp_path)


def test_general_ability_is_tabled_with_the_scores_that_matter() -> None:
    scores = {step: {"self": {**SELF, "kl": step / 10}, "cola": TASK, "toy": {"acc": 0.5}} for step in range(10)}
    header, rows = general_table(scores, most=4)
    assert header == ["", "before", "after 3", "after 6", "after 9"]
    table = {row[0]: row[1:] for row in rows}
    assert table["own text, KL from the unedited model, nats"] == [0.0, 0.3, 0.6, 0.9]
    assert set(table) >= {"cola, F1", "cola, F1, calibrated", "cola, MCC", "toy, acc"}


def test_a_module_s_layer_and_kind_are_told_by_its_name() -> None:
    assert module_layer("model.layers.12.mlp.up_proj") == 12
    assert module_kind("transformer.h.3.attn.c_attn") == "attn.c_attn"
