"""Retention: every batch's Efficacy after later steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from agents import edit_stream
from rledit_env.evaluation.metrics import evaluate, exact_matches
from rledit_env.evaluation.retention import Retention, RetentionProbe, batch_efficacy


class FineTuning:
    """The plain gradient."""

    def reset(self) -> None:
        """Nothing is remembered."""

    def predict(self, observation: Any, deterministic: bool = True) -> tuple[Any, None]:
        values = {m: -2.0 * g for m, g in observation["value_gradients"].items()}
        return {"keys": observation["keys"], "values": values}, None


@pytest.fixture
def env(make_env: Callable[..., Any], request: pytest.FixtureRequest) -> Any:
    kind = getattr(request, "param", "zsre")
    return make_env(kind, array_backend="torch", reward="none", num_batches=4, steps_per_batch=2)


@pytest.mark.parametrize("env", ["zsre", "counterfact", "fever"], indirect=True)
def test_each_row_is_the_efficacy_of_the_batches_edited_by_then(env: Any) -> None:
    expected: list[list[float]] = []

    def by_hand(edited: int) -> None:
        if edited:
            groups = [env.stream.batch(b) for b in range(edited)]
            expected.append([evaluate(env.lm, g, env.dataset.kind, generate=False).efficacy for g in groups])

    probe = RetentionProbe(env)
    edit_stream(env, FineTuning(), callbacks=[probe, by_hand], seed=0)
    result = probe.result
    assert result.edited == (1, 2, 3, 4)
    assert result.efficacy.shape == (4, 4)
    for row, hand in zip(result.efficacy, expected, strict=True):
        np.testing.assert_allclose(row[: len(hand)], hand, rtol=1e-5)
        assert np.isnan(row[len(hand) :]).all()
    assert result.first_exact_match[-1] == 100 * np.mean(exact_matches(env.lm, env.stream.batch(0)))
    # Equal batches have equal weight, whatever the lengths of their answers.
    assert result.efficacy[-1].mean() == pytest.approx(env.evaluate(generate=False).efficacy)


@pytest.mark.parametrize("metrics", ["paper", "rledit-code"])
@pytest.mark.parametrize("kind", ["zsre", "counterfact"])
def test_a_batch_s_efficacy_is_that_of_its_metrics(
    make_env: Callable[..., Any], kind: str, metrics: str
) -> None:
    env = make_env(kind)
    batches = [env.dataset.records[:5], env.dataset.records[5:6]]
    expected = [evaluate(env.lm, b, kind, generate=False, metrics=metrics).efficacy for b in batches]
    np.testing.assert_allclose(batch_efficacy(env.lm, batches, kind, metrics), expected)


def test_a_probe_scores_as_it_is_told_and_knows_the_ways(make_env: Callable[..., Any]) -> None:
    env = make_env("counterfact", array_backend="torch", reward="none")
    probe = RetentionProbe(env, generate=False, metrics="rledit-code")
    edit_stream(env, FineTuning(), callbacks=[probe], seed=0)
    assert probe.result.efficacy[-1].mean() == pytest.approx(
        env.evaluate(generate=False, metrics="rledit-code").efficacy
    )
    with pytest.raises(ValueError, match="metrics 'rome' is unknown"):
        RetentionProbe(env, metrics="rome")


def test_measurements_can_be_sparse_but_have_the_first_batch_and_the_last(env: Any) -> None:
    probe = RetentionProbe(env, every=3, generate=False)
    edit_stream(env, FineTuning(), callbacks=[probe], seed=0)
    assert probe.result.edited == (1, 3, 4)
    assert np.isnan(probe.result.first_exact_match).all()
    edit_stream(env, FineTuning(), callbacks=[probe], seed=1)  # a new stream begins anew
    assert probe.result.edited == (1, 3, 4)


def test_forgetting_is_what_batches_lost_from_their_best() -> None:
    nan = np.nan
    result = Retention((1, 2, 3), np.array([[80.0, nan, nan], [90.0, 60.0, nan], [50.0, 60.0, 100.0]]), np.full(3, nan))
    assert result.forgetting == pytest.approx((40 + 0) / 2)
    assert list(result.first_batch) == [80.0, 90.0, 50.0]
    assert np.isnan(Retention((1,), np.array([[80.0]]), np.full(1, nan)).forgetting)


def test_a_result_survives_json(env: Any) -> None:
    probe = RetentionProbe(env, generate=False)
    edit_stream(env, FineTuning(), callbacks=[probe], seed=0)
    again = Retention.from_dict(probe.result.as_dict())
    assert again.edited == probe.result.edited
    np.testing.assert_array_equal(again.efficacy, probe.result.efficacy)


def test_a_callback_s_time_is_not_the_editing_s(env: Any) -> None:
    called: list[int] = []

    def slow(edited: int) -> None:
        called.append(edited)
        time.sleep(0.5)

    log = edit_stream(env, FineTuning(), callbacks=[slow], seed=0)
    assert called == [0, 1, 2, 3, 4]
    assert log.seconds < 2.0


def test_nothing_measured_and_a_wrong_interval_raise(env: Any) -> None:
    with pytest.raises(ValueError, match="no batch has been edited yet"):
        _ = RetentionProbe(env).result
    with pytest.raises(ValueError, match="every is 0; give 1 or more"):
        RetentionProbe(env, every=0)
