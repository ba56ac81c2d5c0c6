"""Scores along a stream: which facts are scored, what is kept on disk, and that an interrupted run goes on alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents import HypernetworkConfig, RLEditAgent, RLEditConfig, edit_stream
from rledit_env.env import LifelongEditEnv
from rledit_env.evaluation.chunks import CHUNK, score_in_chunks
from rledit_env.evaluation.clock import BatchClock
from rledit_env.evaluation.general.scored_text import scored_texts
from rledit_env.evaluation.journal import Journal, Journalled
from rledit_env.evaluation.metrics import evaluate
from rledit_env.evaluation.points import ScoreProbe, sample
from rledit_env.evaluation.retention import DriftProbe, RetentionProbe
from rledit_env.lm.editable import EditableLM


def _env(lm: EditableLM, batches: int = 4) -> LifelongEditEnv:
    return LifelongEditEnv("counterfact", lm, num_batches=batches, batch_size=3, reward="none", array_backend="torch")


def _agent(env: LifelongEditEnv) -> RLEditAgent:
    return RLEditAgent(env, RLEditConfig(network=HypernetworkConfig(blocks=0, step_size=0.01)))


def test_a_point_is_scored_on_random_facts_edited_by_then_most_of_which_were_scored_before() -> None:
    total, most = 10_000, 500
    chosen = {edited: sample(total, edited, most, seed=3) for edited in (20, 500, 1_000, 2_000, 10_000)}
    assert chosen[20] == list(range(20))
    assert chosen[500] == list(range(500))
    for edited in (1_000, 2_000, 10_000):
        assert len(set(chosen[edited])) == most and max(chosen[edited]) < edited
        assert chosen[edited] == sample(total, edited, most, seed=3)
        # No part of the stream is preferred: the mean place of 500 of n has a standard error of 0.013 n.
        assert abs(np.mean(chosen[edited]) / edited - 0.5) < 0.04
    assert 200 < len(set(chosen[1_000]) & set(chosen[2_000])) < 300  # half of 1,000's are among the smallest of 2,000
    assert set(chosen[2_000]) & set(range(1_000)) <= set(chosen[1_000])
    assert sample(total, 2_000, most, seed=4) != chosen[2_000]


def test_scores_in_chunks_are_those_of_all_facts_at_once(
    tiny_lm: Callable[..., EditableLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_lm()
    env = _env(lm, batches=3)
    edit_stream(env, _agent(env), seed=0)
    records = env.edited_records()
    whole = evaluate(lm, records, "counterfact")
    monkeypatch.setattr("rledit_env.evaluation.chunks.CHUNK", 4)
    done: list[int] = []
    cached = len(lm.prefix_cache)
    scored = score_in_chunks(lm, records, "counterfact", progress=done.append)
    assert done == [4, 4, 1]
    assert scored.metrics(records, "paper").as_dict() == pytest.approx(whole.as_dict())
    assert scored.metrics(records, "paper").taken == whole.taken
    assert len(lm.prefix_cache) == cached  # the states of scored passages are not kept
    assert CHUNK >= 64


def test_points_have_the_scores_and_the_divergence_of_the_facts_edited_by_then(
    tiny_lm: Callable[..., EditableLM],
) -> None:
    lm = tiny_lm()
    env = _env(lm)
    texts, seen = scored_texts(lm, passages=2), []
    probe = ScoreProbe(env, every=2, facts=4, texts=texts, seed=5, say=seen.append)
    scores: dict[int, Any] = {}

    def check(edited: int) -> None:
        if edited in probe.points:
            records = [env.edited_records()[place] for place in sample(12, 3 * edited, 4, seed=5)]
            scores[edited] = evaluate(lm, records, "counterfact").as_dict()

    edit_stream(env, _agent(env), callbacks=[probe, check], seed=0)
    assert list(probe.points) == [2]
    metrics = evaluate(lm, env.edited_records(), "counterfact")
    probe.conclude(4, metrics, 12)
    assert seen == list(probe.points.values())
    point, last = seen
    assert (point["facts"], point["scored_facts"], last["facts"], last["scored_facts"]) == (6, 4, 12, 12)
    assert {name: point[name] for name in scores[2]} == pytest.approx(scores[2])
    assert {name: last[name] for name in metrics.as_dict()} == pytest.approx(metrics.as_dict())
    assert last["kl"] > 0 and "kl_human" in last and last["drift"] > point["drift"] > 0


@pytest.mark.parametrize(("every", "facts"), [(0, 500), (5, 0)])
def test_points_need_positive_numbers(tiny_lm: Callable[..., EditableLM], every: int, facts: int) -> None:
    with pytest.raises(ValueError, match="give 1 or more of each"):
        ScoreProbe(_env(tiny_lm()), every, facts)


def test_a_journal_outlives_a_line_that_was_not_finished(tmp_path: Path) -> None:
    path = tmp_path / "measurements.jsonl"
    journal = Journal(path)
    journal.append("points", 50, {"mean": 80.123456789, "exact_match": None, "text": "Zürich \ud800"})
    journal.append("points", 100, {"mean": float("inf")})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"probe": "points", "at": 150, "val')
    again = Journal(path)
    assert again.of("points") == journal.of("points")
    assert again.get("points", 50)["mean"] == 80.123456789 and again.get("points", 150) is None
    assert path.read_bytes() == whole
    again.append("points", 150, [])
    assert Journal(path).get("points", 150) == []


def test_probes_take_up_what_an_interrupted_run_measured(tiny_lm: Callable[..., EditableLM], tmp_path: Path) -> None:
    lm = tiny_lm()
    env = _env(lm)

    def probes(journal: Journal | None) -> tuple[list[Any], list[Journalled]]:
        measuring = [BatchClock(), DriftProbe(env), ScoreProbe(env, 1, 5), RetentionProbe(env, every=2)]
        names = ("batch", "drift", "points", "retention")
        return measuring, [Journalled(n, p, lm, journal) for n, p in zip(names, measuring, strict=True)]

    measured, callbacks = probes(Journal(tmp_path / "journal"))
    edit_stream(env, _agent(env), callbacks=[*callbacks, measured[0].start], seed=0)
    resumed, _ = probes(Journal(tmp_path / "journal"))
    assert resumed[0].seconds == measured[0].seconds and all(s > 0 for s in resumed[0].seconds.values())
    assert resumed[1].by_module == measured[1].by_module
    assert resumed[2].points == measured[2].points and list(resumed[2].points) == [1, 2, 3]
    assert resumed[3].result.as_dict() == measured[3].result.as_dict()
    lines = [json.loads(line) for line in (tmp_path / "journal").read_text().splitlines()]
    _, again = probes(Journal(tmp_path / "journal"))
    lm.restore()  # with other weights, anything that is measured again would differ
    for callback in again:
        callback(2)
    assert [json.loads(line) for line in (tmp_path / "journal").read_text().splitlines()] == lines


def test_the_clock_does_not_time_the_batch_in_which_a_run_was_resumed() -> None:
    clock = BatchClock()
    clock.take_up(1, [2.0, 100, None])
    clock.stop(2)
    clock.start(2)
    clock.stop(3)
    assert clock.seconds[2] is None and clock.seconds[3] is not None
    assert clock.seconds_of(1, 2) == 2.0
    assert clock.seconds_of(2, 2) is None
