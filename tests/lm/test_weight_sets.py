"""Tests of rledit_env.lm.weight_sets: several sets of edited weights over one frozen model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rledit_env.encoding import encode
from rledit_env.evaluation.metrics import evaluate
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import TOKEN_CHOICES
from rledit_env.lm.weight_sets import WeightSetLM, together
from rledit_env.lm.weights import oriented
from rledit_env.reward import RewardConfig
from rledit_env.scoring import ScoredBatch, score, score_environments

ARCHITECTURES = ["tiny-llama", "tiny-mistral", "tiny-gemma2", "tiny-gemma3", "tiny-qwen2", "tiny-qwen3", "tiny-gpt2"]


def edited(lm: EditableLM, seed: int) -> EditableLM:
    """The LM after a random update, different for each seed."""
    generator = torch.Generator().manual_seed(seed)
    keys = {m: 0.1 * torch.randn(3, d_in, generator=generator) for m, (d_in, _) in lm.module_shapes.items()}
    values = {m: 0.1 * torch.randn(3, d_out, generator=generator) for m, (_, d_out) in lm.module_shapes.items()}
    lm.apply(keys, values)
    return lm


@pytest.fixture
def three_lms(tiny_lm):
    """Gives three edited LMs of a tiny LM, and a function that runs something on the LM itself, edited alike."""

    def get(name: str, **options):
        lm = tiny_lm(name, **options)
        three = [edited(WeightSetLM(lm), seed) for seed in range(3)]

        def alone(seed: int, work):
            lm.restore()
            try:
                return work(edited(lm, seed))
            finally:
                lm.restore()

        return three, alone

    return get


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("token", TOKEN_CHOICES)
@pytest.mark.parametrize("worth_ahead", [1, 10**6])  # whether tokens that need no gradient run ahead
def test_a_pass_of_several_weight_sets_traces_each_at_its_own(
    three_lms, uneven_facts, monkeypatch, name, token, worth_ahead
):
    monkeypatch.setattr("rledit_env.lm.passes.WORTH_AHEAD", worth_ahead)
    three, alone = three_lms(name)
    passages = [encode(three[0], r).edit for r in uneven_facts]
    batches = [passages[:3], passages[3:], passages[::-1]]
    traces = together(three).trace_batches(batches, token)
    for seed, (trace, batch) in enumerate(zip(traces, batches, strict=True)):
        expected = alone(seed, lambda lm, batch=batch: lm.trace(batch, token))
        assert trace.loss == pytest.approx(expected.loss, rel=1e-5)
        assert torch.equal(trace.owner, expected.owner)
        torch.testing.assert_close(trace.keys, expected.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(trace.value_gradients, expected.value_gradients, rtol=1e-3, atol=1e-6)
    other = alone(1, lambda lm: lm.trace(batches[0], token))
    assert traces[0].loss != pytest.approx(other.loss, rel=1e-4)  # the weight sets do differ


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("count", [1, 3])
def test_the_unedited_model_is_one_more_weight_set_of_a_pass(three_lms, uneven_facts, name, count):
    three, alone = three_lms(name)
    lm = three[0]
    passages = [encode(lm, r).edit for r in uneven_facts]
    whose = [i % count for i in range(len(passages))]
    lm.reference_cache.clear()
    lm.reference_states(passages[2:3])  # one of those below is known already
    referenced = [0, 2, len(passages) - 1]
    states, reference = together(three[:count]).states_beside_reference(passages, whose, referenced)
    everywhere = [alone(seed, lambda lm: lm.answer_states(passages)) for seed in range(count)]
    assert torch.equal(states.targets, everywhere[0].targets) and torch.equal(states.owner, everywhere[0].owner)
    for i, seed in enumerate(whose):
        rows = states.owner == i
        torch.testing.assert_close(states.hidden[rows], everywhere[seed].hidden[rows], rtol=1e-4, atol=1e-5)
    lm.reference_cache.clear()
    wanted = lm.reference_states([passages[i] for i in referenced])
    torch.testing.assert_close(reference, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wanted[0], everywhere[0].hidden[everywhere[0].owner == 0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("max_tokens", [40, 4096])
def test_a_pass_of_several_weight_sets_scores_each_at_its_own(three_lms, uneven_facts, name, max_tokens, monkeypatch):
    three, alone = three_lms(name)
    for lm in three:
        monkeypatch.setattr(lm, "max_tokens_per_pass", max_tokens)
    records = [encode(three[0], r) for r in uneven_facts]
    requests = [
        [ScoredBatch(records[:2], [0.1, 0.9], 1.0), ScoredBatch(records[2:], [0.0, 0.5], 0.5)],
        [],
        [ScoredBatch(records, [0.3] * 4, 2.0)],
    ]
    config = RewardConfig.with_efficacy()
    found = score_environments(together(three), requests, config, True)
    for seed, (scores, request) in enumerate(zip(found, requests, strict=True)):
        expected = alone(seed, lambda lm, request=request: score(lm, request, config, True))
        assert scores.weighted == pytest.approx(expected.weighted, rel=1e-5)
        assert [list(b) for b in scores.basic] == [list(b) for b in expected.basic]
        assert (scores.gradient is None) == (expected.gradient is None) == (not request)
        if expected.gradient is not None:
            torch.testing.assert_close(scores.gradient, expected.gradient, rtol=1e-3, atol=1e-5)
    without = score_environments(together(three), requests, config, False)
    assert [s.weighted for s in without] == [pytest.approx(s.weighted) for s in found]
    assert not any(w.requires_grad for lm in three for w in lm.weights.run.values())


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
def test_an_lm_with_shared_weights_is_an_lm_like_any_other(three_lms, uneven_facts, tmp_path: Path, name):
    three, alone = three_lms(name)
    own, prompts = three[2], ["Rome is in", "2 + 2 ="]
    assert own.generate(prompts) == alone(2, lambda lm: lm.generate(prompts))
    assert own.drift() == alone(2, lambda lm: lm.drift())
    scores = alone(2, lambda lm: evaluate(lm, uneven_facts.records, "zsre"))
    assert evaluate(own, uneven_facts.records, "zsre") == scores
    own.save_pretrained(tmp_path / "saved")
    saved = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "saved").named_modules())
    for m, module in own.weights.modules.items():
        torch.testing.assert_close(oriented(module, saved[m].weight), own.weight(m), rtol=0, atol=0)
        assert torch.equal(oriented(module, module.weight), own.original_weight(m))
    own.restore()
    assert all(torch.equal(own.weight(m), own.original_weight(m)) for m in own.module_shapes)


def test_weight_sets_leave_the_shared_lms_weights_and_one_another_alone(tiny_lm, uneven_facts):
    lm = edited(tiny_lm(), seed=9)
    before = lm.snapshot()
    first, second = WeightSetLM(lm), WeightSetLM(lm)
    assert all(torch.equal(first.weight(m), lm.original_weight(m)) for m in before)  # not from the edited weights
    edited(first, seed=1)
    first.trace([encode(lm, r).edit for r in uneven_facts])
    first.generate(["Rome is in"])
    with first.original_weights():
        first.generate(["Rome is in"])
    assert all(torch.equal(w, lm.weight(m)) for m, w in before.items())
    assert all(torch.equal(second.weight(m), lm.original_weight(m)) for m in before)
    assert not any("forward" in vars(module) for module in lm.weights.modules.values())


def test_the_reference_is_the_original_model_whatever_the_weight_set(tiny_lm, uneven_facts):
    lm = tiny_lm()
    passages = [encode(lm, r).edit for r in uneven_facts]
    expected = [state.clone() for state in lm.reference_states(passages)]
    lm.reference_cache.clear()
    found = together([edited(WeightSetLM(lm), 0), edited(WeightSetLM(lm), 1)]).reference_states(passages)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "bytes_a_number"), [(torch.float32, 4), (torch.bfloat16, 4 + 2)])
def test_a_weight_set_adds_its_master_weights_and_the_copy_it_runs_with(tiny_lm, dtype, bytes_a_number):
    lm = tiny_lm(dtype=dtype)
    numbers = sum(d_in * d_out for d_in, d_out in lm.module_shapes.values())
    assert WeightSetLM(lm).nbytes == bytes_a_number * numbers


def test_weight_sets_of_different_models_cannot_run_together(tiny_lm):
    with pytest.raises(ValueError, match="the 2 LMs share no frozen model; make them from one EditableLM"):
        together([WeightSetLM(tiny_lm("tiny-llama")), WeightSetLM(tiny_lm("tiny-qwen2"))])
