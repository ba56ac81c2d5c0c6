"""General ability: tasks by likelihood, drift on the LLM's own text, lm-eval."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents import edit_stream
from rledit_env.evaluation.general import GeneralAbility, GeneralEvery, load_tasks, score_task, self_drift, self_text
from rledit_env.evaluation.general.lm_eval import lm_eval_scores
from rledit_env.evaluation.general.tasks import (
    TASKS,
    Example,
    TaskData,
    _draw,
    confusion_matrix,
    matthews_correlation,
    mean_log_likelihoods,
    weighted_f1,
)
from rledit_env.lm.editable import EditableLM

GLUE = Path(__file__).parents[3] / "shared" / "data" / "glue"
ROWS: dict[str, dict[str, Any]] = {
    "sst2": {"sentence": "a fine film ", "label": 1},
    "mrpc": {"sentence1": "It rains.", "sentence2": "Rain falls.", "label": 1},
    "cola": {"sentence": "Him runs.", "label": 0},
    "rte": {"sentence1": "All cats sleep.", "sentence2": "Some cat sleeps.", "label": 0},
    "nli": {"sentence1": "It rains.", "sentence2": "It is dry.", "label": "not_entailment"},
    "mmlu": {"question": "2 + 2?", "subject": "arithmetic", "choices": ["3", "4", "5", "6"], "answer": 1},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, row in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join([json.dumps(row)] * 3), encoding="utf-8")
    return tmp_path


def examples(count: int = 12, answers: tuple[str, ...] = ("no", "yes")) -> TaskData:
    return TaskData("toy", tuple(Example(f"Is {i} {'odd' * (i % 5)}?", answers, i % 2) for i in range(count)), "a list")


def change(lm: EditableLM, scale: float) -> None:
    generator = torch.Generator().manual_seed(3)
    lm.apply(
        {m: scale * torch.randn(2, d_in, generator=generator) for m, (d_in, _) in lm.module_shapes.items()},
        {m: scale * torch.randn(2, d_out, generator=generator) for m, (_, d_out) in lm.module_shapes.items()},
    )


# -- the scores' mathematics ---------------------------------------------------------------------------------------


def test_f1_and_correlation_are_the_textbook_s() -> None:
    confusion = confusion_matrix(np.array([0, 0, 0, 1, 1, 1, 1, 1]), np.array([0, 0, 1, 1, 1, 1, 0, 0]), 2)
    assert confusion.tolist() == [[2, 1], [2, 3]]
    tp, fp, fn, tn = 3, 1, 2, 2
    negative, positive = 2 * tn / (2 * tn + fn + fp), 2 * tp / (2 * tp + fp + fn)
    assert weighted_f1(confusion) == pytest.approx((3 * negative + 5 * positive) / 8)
    expected = (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert matthews_correlation(confusion) == pytest.approx(expected)


def test_correlation_of_classes_is_that_of_their_indicators() -> None:
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(3, size=(2, 200))
    x, y = np.eye(3)[labels], np.eye(3)[predictions]
    covariance = [((a - a.mean(0)) * (b - b.mean(0))).sum() for a, b in ((x, y), (x, x), (y, y))]
    expected = covariance[0] / (covariance[1] * covariance[2]) ** 0.5
    assert matthews_correlation(confusion_matrix(labels, predictions, 3)) == pytest.approx(expected)


def test_a_constant_or_perfect_prediction_has_the_extreme_scores() -> None:
    labels = np.array([0, 1, 1, 0])
    constant = confusion_matrix(labels, np.zeros(4, dtype=int), 2)
    assert matthews_correlation(constant) == 0
    assert weighted_f1(constant) == pytest.approx(0.5 * 2 / 3)
    perfect = confusion_matrix(labels, labels, 2)
    assert matthews_correlation(perfect) == weighted_f1(perfect) == 1


# -- tasks ---------------------------------------------------------------------------------------------------------


def test_every_task_is_read_with_its_right_answer(folder: Path) -> None:
    found = {data.name: data.examples[0] for data in load_tasks(folder)}
    assert set(found) == set(TASKS)
    right = {name: example.answers[example.label] for name, example in found.items()}
    assert right == {"sst2": "positive", "mrpc": "yes", "cola": "no", "rte": "yes", "nli": "no", "mmlu": "B"}
    for name, row in ROWS.items():
        texts = [v.strip() for k, v in row.items() if isinstance(v, str) and k not in ("label", "subject")]
        assert all(text in found[name].prompt for text in [*texts, *row.get("choices", [])])
    assert [data.name for data in load_tasks(folder, ["cola"])] == ["cola"]
    assert [data.name for data in load_tasks(folder / "rte.jsonl")] == ["rte"]


def test_unusable_sources_say_what_would_do(folder: Path) -> None:
    with pytest.raises(ValueError, match="no task 'chess'; tasks are sst2"):
        load_tasks(folder, ["chess"])
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; give a folder"):
        load_tasks(folder / "nowhere")
    (folder / "sst2.jsonl").write_text('{"sentence": "x", "label": 1}\n{"label": 1}\n')
    with pytest.raises(ValueError, match=r"sst2.jsonl, line 2: no example of sst2 \(no field 'sentence'\)"):
        load_tasks(folder)
    (folder / "sst2.jsonl").write_text('{"sentence": "x", "label": 7}')
    with pytest.raises(ValueError, match="label 7; give 0 to 1"):
        load_tasks(folder)
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds none of sst2.jsonl"):
        load_tasks(folder / "empty")


def test_likelihoods_are_the_whole_model_s(tiny_lm: Callable[..., EditableLM], full_logits: Any) -> None:
    lm = tiny_lm()
    change(lm, 0.2)
    texts = [("Up is", "down"), ("Up is", "A"), ("Up is", "B"), ("A longer prompt is", "B"), ("Up is", "done")]
    passages = [lm.tokenize(prompt, answer) for prompt, answer in texts]
    expected = [
        float(full_logits(lm, p).log_softmax(-1)[range(len(p.targets)), list(p.targets)].mean()) for p in passages
    ]
    assert mean_log_likelihoods(lm, passages).tolist() == pytest.approx(expected, abs=1e-4)


def test_a_task_is_scored_by_the_likeliest_answer(tiny_lm: Callable[..., EditableLM]) -> None:
    lm = tiny_lm()
    data = examples()
    score = score_task(lm, data, limit=None)
    right, said = 0, []
    for example in data.examples:
        likelihoods = mean_log_likelihoods(lm, [lm.tokenize(example.prompt, answer) for answer in example.answers])
        said.append(int(likelihoods.argmax()))
        right += said[-1] == example.label
    assert score.accuracy == pytest.approx(100 * right / 12)
    assert score.one_answer == pytest.approx(100 * max(said.count(0), said.count(1)) / 12)
    assert (score.examples, score.left_out) == (12, 0)
    assert score_task(lm, data, limit=None) == score
    assert score_task(lm, data, limit=5).examples == 5


def test_solved_examples_alternate_classes_and_are_not_scored() -> None:
    data = examples(20)
    solved, scored = _draw(data, 4, None, seed=1)
    assert [example.label for example in solved] == [0, 1, 0, 1]
    assert len(scored) == 16 and not {e.prompt for e in solved} & {e.prompt for e in scored}
    assert _draw(data, 4, None, seed=1) == (solved, scored) != _draw(data, 4, None, seed=2)


def test_what_does_not_fit_the_context_is_shown_less_or_left_out(tiny_lm: Callable[..., EditableLM]) -> None:
    lm = tiny_lm()  # 512 tokens, one a byte
    data = TaskData("toy", tuple(Example("x" * n, ("no", "yes"), n % 2) for n in (200, 201, 202, 600)), "a list")
    assert score_task(lm, data, shots=2, limit=None).examples + score_task(lm, data, shots=2, limit=None).left_out == 2
    assert score_task(lm, data, limit=None).left_out == 1
    with pytest.raises(ValueError, match="no example of a list is left to score: of 1, 0 are shown solved"):
        score_task(lm, TaskData("toy", data.examples[3:], "a list"))


def test_calibration_undoes_a_preference_for_one_answer(
    tiny_lm: Callable[..., EditableLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = examples(10)
    biased = torch.tensor([[5.0 - e.label, float(e.label)] for e in _draw(data, 0, None, 0)[1]]).flatten()
    monkeypatch.setattr("rledit_env.evaluation.general.tasks.mean_log_likelihoods", lambda *_: biased)
    score = score_task(tiny_lm(), data)
    assert (score.one_answer, score.mcc, score.f1_calibrated) == (100, 0, 100)


@pytest.mark.data
@pytest.mark.skipif(not GLUE.is_dir(), reason="needs ../shared/data/glue")
def test_the_published_subsets_are_read_whole() -> None:
    counts = {data.name: len(data.examples) for data in load_tasks(GLUE)}
    assert counts == {"sst2": 856, "mrpc": 258, "cola": 644, "rte": 262, "nli": 2489, "mmlu": 1516}


# -- its own text --------------------------------------------------------------------------------------------------


def test_text_is_the_unedited_model_s_and_the_same_for_a_seed(tiny_lm: Callable[..., EditableLM]) -> None:
    lm = tiny_lm()
    before = self_text(lm, ["One", "Two and"], tokens=8)
    state = torch.get_rng_state()
    change(lm, 0.5)
    after = self_text(lm, ["One", "Two and"], tokens=8)
    assert torch.equal(torch.get_rng_state(), state)
    assert [(p.input_ids, p.targets) for p in before] == [(p.input_ids, p.targets) for p in after]
    assert self_text(lm, ["One"], tokens=8, seed=1)[0].targets != before[0].targets
    assert len(before[1].input_ids) + 1 == len(lm.tokenizer("Two and")["input_ids"]) + len(before[1].targets)


def test_nothing_edited_is_no_drift_and_more_is_more(tiny_lm: Callable[..., EditableLM]) -> None:
    lm = tiny_lm()
    text = self_text(lm, tokens=12)
    start = self_drift(lm, text)
    assert start.kl == pytest.approx(0, abs=1e-6)
    assert start.perplexity == pytest.approx(start.original_perplexity)
    change(lm, 0.05)
    little = self_drift(lm, text)
    change(lm, 0.3)
    much = self_drift(lm, text)
    assert 0 < little.kl < much.kl
    assert start.original_perplexity == little.original_perplexity == much.original_perplexity
    assert much.perplexity > little.perplexity


def test_drift_is_the_whole_model_s(tiny_lm: Callable[..., EditableLM], full_logits: Any) -> None:
    lm = tiny_lm()
    text = self_text(lm, ["One", "Two and"], tokens=6)
    before = torch.cat([full_logits(lm, p) for p in text]).log_softmax(-1)
    change(lm, 0.2)
    after = torch.cat([full_logits(lm, p) for p in text]).log_softmax(-1)
    targets = torch.tensor([t for p in text for t in p.targets])
    drift = self_drift(lm, text)
    assert drift.kl == pytest.approx(float((before.exp() * (before - after)).sum(1).mean()), rel=1e-3)
    assert drift.perplexity == pytest.approx(float((-after[range(len(targets)), targets]).mean().exp()), rel=1e-3)


# -- together ------------------------------------------------------------------------------------------------------


def test_ability_is_measured_before_during_and_after_a_stream(make_env: Callable[..., Any], folder: Path) -> None:
    class Nothing:
        def reset(self) -> None:
            pass

        def predict(self, observation: Any, deterministic: bool = True) -> tuple[Any, None]:
            values = {m: -3.0 * g for m, g in observation["value_gradients"].items()}
            return {"keys": observation["keys"], "values": values}, None

    env = make_env("zsre", num_batches=5, batch_size=2, array_backend="torch", reward="none")
    ability = GeneralAbility(env.lm, ["self", str(folder / "sst2.jsonl")])
    every = GeneralEvery(env, ability, every=2)
    edit_stream(env, Nothing(), callbacks=[every], seed=0)  # type: ignore[arg-type]
    assert list(every.scores) == [0, 2, 4, 5]
    assert set(every.scores[0]) == {"self", "human", "sst2"} == set(ability.sources)
    assert every.scores[0]["self"]["kl"] < 1e-6 < every.scores[5]["self"]["kl"]
    assert every.scores[5] == ability.measure()


def test_nothing_to_measure_and_a_wrong_interval_raise(make_env: Callable[..., Any]) -> None:
    env = make_env("zsre")
    with pytest.raises(ValueError, match="nothing to measure general ability on"):
        GeneralAbility(env.lm, [])
    with pytest.raises(ValueError, match="every is 0"):
        GeneralEvery(env, GeneralAbility(env.lm), every=0)


# -- lm-eval -------------------------------------------------------------------------------------------------------

TASK = """\
task: toy
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [" no", " yes"]
doc_to_target: label
metric_list: [{{metric: acc}}]
"""


def test_lm_eval_s_tasks_meet_the_edited_weights(
    tiny_lm: Callable[..., EditableLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra rledit-env[lm-eval]")
    lm = tiny_lm()
    data = examples(20)
    file = tmp_path / "toy.jsonl"
    file.write_text("\n".join(json.dumps({"question": e.prompt, "label": e.label}) for e in data.examples))
    (tmp_path / "toy.yaml").write_text(TASK.format(file=file))
    shares = []
    for scale in (0.0, 0.4):
        change(lm, scale)
        scores = lm_eval_scores(lm, ["toy"], include_path=tmp_path)
        sums = [
            [float(mean_log_likelihoods(lm, [p])) * len(p.targets) for p in map(lm.tokenize, [e.prompt] * 2, e.answers)]
            for e in data.examples
        ]  # lm-eval compares sums, not means
        right = [int(np.argmax(s)) == e.label for s, e in zip(sums, data.examples, strict=True)]
        assert scores["toy"]["acc"] == pytest.approx(np.mean(right))
        shares.append(np.mean(right))
    with pytest.raises(ValueError, match="lm-eval knows no task 'no-such-task'"):
        lm_eval_scores(lm, ["no-such-task"])


def test_without_lm_eval_the_error_says_what_to_install(
    tiny_lm: Callable[..., EditableLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"rledit-env\[lm-eval\]"):
        lm_eval_scores(tiny_lm(), ["hellaswag"])
